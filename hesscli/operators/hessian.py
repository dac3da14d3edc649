"""The Hessian of the loss."""

from __future__ import annotations

from torch import Tensor

from hesscli.operators.base import Operator
from hesscli.operators.products import Function, Tensors
from hesscli.problem.problem import WeightedBatch


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
        """The batch's mean loss."""

        def loss(theta: Tensors | None) -> Tensor:
            return self.problem.evaluate(batch.data, self.named(theta))

        return loss, self.parameters.tensors
