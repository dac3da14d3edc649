"""Fisher matrices as Jᵀ A J of per-example losses."""

from __future__ import annotations

from torch import Tensor

from hesscli.errors import UsageError
from hesscli.operators.base import Operator
from hesscli.operators.gauss_newton import GaussNewton, require_examples
from hesscli.operators.products import Apply, Function, Tensors
from hesscli.problem.problem import Problem, WeightedBatch


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


class EmpiricalFisher(Operator):
    """Σ m_i g_i g_iᵀ / Σ m_i over examples, g_i the gradient of example i's own mean loss.

    An example of a language model is a sequence, its mass m_i its unmasked tokens. Labels are
    the data's, so this is not the Fisher matrix (Kunstner et al. 2019, arXiv 1905.12558).

    Raises:
        UsageError: examples cannot be told apart: a step loss, batches that are no rows of
            examples, or batch norm in train mode.
    """

    name = "empirical-fisher"
    kind = "sandwich"
    per_example = True

    def __init__(self, problem: Problem, **options: object) -> None:
        super().__init__(problem, **options)  # type: ignore[arg-type]
        require_examples(problem, self.name)

    @property
    def decay(self) -> float:
        """None: weight decay is no example's loss."""
        return 0.0

    def parts(self, batch: WeightedBatch) -> tuple[Function, Tensors, Apply]:
        """The examples' losses and weights: no per-example gradient is formed."""
        loss = self.problem.loss
        masses = loss.masses(batch.data).to(self.problem.device, self.problem.dtype)

        def each(theta: Tensors | None) -> Tensor:
            outputs = self.problem.outputs(batch.data, self.named(theta))
            return loss.numerators(outputs, batch.data) / (loss.multiple * masses).clamp_min(1e-30)

        weights = loss.multiple * masses / masses.sum()
        return each, self.parameters.tensors, lambda pushed: pushed * weights
