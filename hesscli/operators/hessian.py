"""The Hessian of the loss, and what the Gauss-Newton matrix leaves of it: R = H − G."""

from __future__ import annotations

import torch
from torch import Tensor

from hesscli.errors import UsageError
from hesscli.operators.base import Operator
from hesscli.operators.gauss_newton import require_outputs
from hesscli.operators.products import Function, Tensors
from hesscli.problem.objective import WeightedBatch
from hesscli.problem.problem import Problem
from hesscli.results import Preflight

# -- The Hessian of the loss -----------------------------------------------------------------------


class Hessian(Operator):
    """∂²L/∂θ², weight decay included; the almost-everywhere Hessian that autograd defines.

    >>> import torch, hesscli
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(2, 1, bias=False).double()
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    >>> problem = hesscli.Problem(model, "mse", [(x, torch.zeros(2, 1).double())])
    >>> hesscli.Hessian(problem).to_dense()  # 2 xᵀx / n
    tensor([[1., 0.],
            [0., 4.]], dtype=torch.float64)
    """

    name = "hessian"
    kind = "hessian"

    def parts(self, batch: WeightedBatch) -> tuple[Function, Tensors]:
        """A batch's mean loss as a function of the parameters."""

        def loss(theta: Tensors | None) -> Tensor:
            return self.problem.evaluate(batch.data, self.named(theta))

        return loss, self.parameters.tensors


# -- What the Gauss-Newton matrix leaves of the Hessian: R = H − G ---------------------------------
# H = Jᵀ (∂²ℓ/∂f²) J + Σ_k (∂ℓ/∂f_k) ∂²f_k/∂θ², and the second term, the curvature of the model
# itself, is the Hessian of θ ↦ ⟨c, f(θ)⟩ with c the loss's slope ∂ℓ/∂f held fixed.


class Residual(Operator):
    """Σ_k (∂ℓ/∂f_k) ∂²f_k/∂θ² over the model's outputs f; indefinite.

    ``Hessian == GaussNewton + Residual``. Weight decay is in the first two and so not in this.

    Raises:
        UsageError: the loss is not known to be a function of the model's outputs alone.
    """

    name = "residual"
    kind = "hessian"

    def __init__(self, problem: Problem, **options: object) -> None:
        super().__init__(problem, **options)  # type: ignore[arg-type]
        require_outputs(problem, self.name)

    def check(self) -> Preflight:
        """The Hessian's: what makes its products right makes these right."""
        return Hessian(self.problem, mode=self._wanted).check()

    @property
    def decay(self) -> float:
        """None: the Gauss-Newton matrix has it."""
        return 0.0

    def parts(self, batch: WeightedBatch) -> tuple[Function, Tensors]:
        """The batch's outputs, weighted by the slope of its mean loss."""
        slope = self.slope(batch)

        def weighted_outputs(theta: Tensors | None) -> Tensor:
            return (slope * self.problem.outputs(batch.data, self.named(theta))).sum()

        return weighted_outputs, self.parameters.tensors

    def slope(self, batch: WeightedBatch) -> Tensor:
        """∂ℓ/∂f of a batch's mean loss, in natural parameters as the Gauss-Newton matrix is.

        Raises:
            UsageError: the loss reads parameters otherwise than through the outputs.
        """
        problem = self.problem
        outputs = problem.fixed_outputs(batch.data).requires_grad_()
        mean = problem.loss.natural.mean(outputs, batch.data)
        slope, *others = torch.autograd.grad(
            mean, [outputs, *problem.parameters.tensors], allow_unused=True
        )
        if any(other is not None for other in others):
            raise UsageError(
                "the Hessian is split only for losses of the model's outputs alone",
                f"[loss] {problem.loss.name!r} reads the model's parameters",
                "the Hessian as a whole: --method hutchinson",
            )
        return torch.zeros_like(outputs) if slope is None else slope
