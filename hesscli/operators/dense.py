"""Given matrices as an operator: the Hessian of a quadratic loss, known without autodiff."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hesscli.errors import UsageError
from hesscli.operators.hessian import Hessian
from hesscli.operators.products import Apply
from hesscli.problem.batches import Batch
from hesscli.problem.freezing import FrozenData, digest_of
from hesscli.problem.losses import StepLoss
from hesscli.problem.objective import WeightedBatch
from hesscli.problem.problem import Problem
from hesscli.results import Preflight


class Dense(Hessian):
    """Σ mass_b · A_b / Σ mass_b, each batch of whose problem is its matrix.

    The problem is a real one, the mean of ½ θᵀ A_b θ, so that whatever takes an operator takes
    this one too.

    >>> import torch
    >>> Dense.of(torch.tensor([[[2.0, 1.0], [1.0, 0.0]], [[0.0, 1.0], [1.0, 4.0]]])).to_dense()
    tensor([[1., 1.],
            [1., 2.]], dtype=torch.float64)
    """

    @classmethod
    def of(
        cls,
        matrices: Tensor,
        *,
        masses: Sequence[float] | None = None,
        layers: Mapping[str, int] | None = None,
    ) -> Dense:
        """The mean of symmetric matrices.

        Args:
            matrices: ``(d, d)``, or ``(B, d, d)`` for batches.
            masses: weight mass of each; default equal ones.
            layers: the sizes of the layers by name; default one layer.

        Raises:
            UsageError: a matrix is not symmetric.
        """
        matrices = matrices[None] if matrices.dim() == 2 else matrices
        if not torch.equal(matrices, matrices.mT):
            raise UsageError(
                "the matrices must be symmetric", f"shape {tuple(matrices.shape)}", "(A + A.T) / 2"
            )
        sizes = {"dense": matrices.shape[-1]} if layers is None else layers
        weights = [1.0] * len(matrices) if masses is None else masses
        model = nn.ParameterDict(
            {
                name: torch.zeros(size, dtype=matrices.dtype, device="cpu")
                for name, size in sizes.items()
            }
        )
        return cls(Problem(model, StepLoss(_quadratic, "quadratic"), _frozen(matrices, weights)))

    def check(self) -> Preflight:
        """Nothing was differentiated that could have gone wrong."""
        return Preflight(
            mode="double-backward",
            attention_kernel="math",
            fallback=None,
            relative_rounding=torch.finfo(self.problem.dtype).eps,
            product_rounding=torch.finfo(self.problem.dtype).eps,
            checks=(),
        )

    def live(self, batch: WeightedBatch, *, side_by_side: bool = False) -> Apply:
        """Products with a batch's matrix, in the rows and columns of this operator."""
        kept = torch.cat(
            [torch.arange(p.offset, p.offset + p.numel, device="cpu") for p in self.parameters]
        )
        matrix = batch.data["matrix"][kept][:, kept]
        return lambda block: block @ matrix


def _quadratic(model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
    theta = torch.cat(list(model.parameters()))
    return theta @ batch["matrix"] @ theta / 2, batch["mass"]


def _frozen(matrices: Tensor, masses: Sequence[float]) -> FrozenData:
    batches = tuple({"matrix": a, "mass": m} for a, m in zip(matrices, masses, strict=True))
    return FrozenData(
        batches=batches,
        counts=(1,) * len(batches),
        available=len(batches),
        sliceable=False,
        sha256=digest_of(batches),
    )
