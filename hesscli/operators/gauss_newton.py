"""Jᵀ A J: the generalised Gauss-Newton matrix, and Fisher matrices of per-example losses.

Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient descent",
section 3.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import partial

from torch import Tensor

from hesscli.errors import UsageError
from hesscli.operators.base import Operator
from hesscli.operators.per_example.passes import ExampleGradients
from hesscli.operators.products import (
    Apply,
    Function,
    Middle,
    Tensors,
    gradient,
    vector_jacobian,
)
from hesscli.problem.batches import Batch
from hesscli.problem.losses import Loss
from hesscli.problem.objective import WeightedBatch
from hesscli.problem.output_hessian import Columns, columns_at, scores_at, softmax_products
from hesscli.problem.problem import Problem

# -- The generalised Gauss-Newton matrix Jᵀ A J, A the loss's Hessian in the model's outputs -------


class Sandwich(Operator):
    """Jᵀ A J over the model's outputs, A one block an example."""

    kind = "sandwich"

    @abstractmethod
    def columns(self, loss: Loss, outputs: Tensor, batch: Batch) -> Columns:
        """Signed columns of A at a batch's outputs.

        Raises:
            UsageError: A is not known.
        """

    def passes(self) -> ExampleGradients:
        """The matrix example by example, for its diagonal; counted with this operator's work.

        Raises:
            UsageError: an example's gradient does not exist.
        """
        require_examples(self.problem, self.name)
        return ExampleGradients(
            self.problem, self.parameters, self.columns, self.meter, "--method hutchinson"
        )


class GaussNewton(Sandwich):
    """Jᵀ (∂²ℓ/∂f²) J over the model's outputs f; positive semidefinite for convex ℓ.

    For cross-entropy and the other log-likelihoods with natural parameters it is the Fisher
    matrix (Martens 2020, arXiv 1412.1193, section 9.2).

    Raises:
        UsageError: the loss does not expose the model's outputs.
    """

    name = "ggn"

    def __init__(self, problem: Problem, **options: object) -> None:
        super().__init__(problem, **options)  # type: ignore[arg-type]
        require_outputs(problem, self.name)

    def parts(self, batch: WeightedBatch) -> tuple[Function, Tensors, Middle]:
        """The batch's outputs, and the loss's Hessian in them."""

        def function(theta: Tensors | None) -> Tensor:
            return self.problem.outputs(batch.data, self.named(theta))

        return function, self.parameters.tensors, partial(self._middle, batch.data)

    def _middle(self, batch: Batch, outputs: Tensor) -> Apply:
        """A of the batch's mean, in closed form where it has as many classes as outputs."""
        if (closed := softmax_products(self.problem.loss, outputs, batch)) is not None:
            return closed
        outputs = outputs.requires_grad_()
        mean = self.problem.loss.natural.mean(outputs, batch)
        slope = gradient(mean, [outputs], create_graph=True)
        return lambda pushed: vector_jacobian(slope, [outputs], [pushed])[0]

    def columns(self, loss: Loss, outputs: Tensor, batch: Batch) -> Columns:
        """Columns of the loss's Hessian in the outputs."""
        return columns_at(loss, outputs, batch)


def require_outputs(problem: Problem, matrix: str) -> None:
    """Refuse losses that do not say how they read the outputs.

    Raises:
        UsageError: the loss is a step, or the model's own and not that of its outputs.
    """
    if (reason := problem.hidden_outputs) is not None:
        raise UsageError(
            f"--matrix {matrix} needs the model's outputs",
            reason,
            "--matrix hessian, or [loss] name or factory",
        )


def require_examples(problem: Problem, matrix: str) -> None:
    """Refuse problems whose single examples have no gradient of their own.

    Raises:
        UsageError: a step loss, examples that are mixed, or batches that are no rows of examples.
    """
    require_outputs(problem, matrix)
    if (module := problem.couples_examples) is not None:
        raise UsageError(
            "per-example gradients do not exist here",
            f"{module} mixes the examples of a batch",
            "--method hutchinson with --matrix hessian or ggn, or, of batch norm, model.eval() "
            "(of a spec, training = false under [model])",
        )
    if not problem.data.sliceable:
        raise UsageError(
            "per-example gradients need batches with one row an example",
            "batches whose tensors differ in length",
            "--matrix hessian --method hutchinson",
        )


# -- Fisher matrices as Jᵀ A J of per-example losses -----------------------------------------------


class Fisher(GaussNewton):
    """The Fisher matrix of the model's own label distribution, computed as the Gauss-Newton.

    The two are one matrix when the loss is the negative log-likelihood of an exponential family
    in its natural parameters (cross-entropy, bce_with_logits; mse up to the noise variance).

    Raises:
        UsageError: the loss is no such likelihood.
    """

    name = "fisher"

    def __init__(self, problem: Problem, **options: object) -> None:
        super().__init__(problem, **options)
        if not problem.loss.natural.is_likelihood:
            raise UsageError(
                "--matrix fisher needs a distribution of labels, in its natural parameters",
                f"the loss {problem.loss.name}, which the model's outputs make none of",
                "--matrix ggn or empirical-fisher",
            )


class EmpiricalFisher(Sandwich):
    """Σ m_i g_i g_iᵀ / Σ m_i over examples, g_i the gradient of example i's own mean loss.

    An example of a language model is a sequence, its mass m_i its unmasked tokens. Labels are
    the data's, so this is not the Fisher matrix (Kunstner et al. 2019, arXiv 1905.12558).

    Raises:
        UsageError: examples cannot be told apart: a step loss, batches that are no rows of
            examples, or batch norm in train mode.
    """

    name = "empirical-fisher"
    per_example = True

    def __init__(self, problem: Problem, **options: object) -> None:
        super().__init__(problem, **options)  # type: ignore[arg-type]
        require_examples(problem, self.name)

    @property
    def decay(self) -> float:
        """None: weight decay is no example's loss."""
        return 0.0

    def parts(self, batch: WeightedBatch) -> tuple[Function, Tensors, Middle]:
        """The examples' losses and weights: no per-example gradient is formed."""
        loss = self.problem.loss
        masses = loss.masses(batch.data).to(self.problem.device, self.problem.dtype)

        def each(theta: Tensors | None) -> Tensor:
            outputs = self.problem.outputs(batch.data, self.named(theta))
            return loss.numerators(outputs, batch.data) / (loss.multiple * masses).clamp_min(1e-30)

        weights = loss.multiple * masses / masses.sum()
        return each, self.parameters.tensors, lambda _: lambda pushed: pushed * weights

    def columns(self, loss: Loss, outputs: Tensor, batch: Batch) -> Columns:
        """The one column: the slopes of the examples' losses."""
        return scores_at(loss, outputs, batch)
