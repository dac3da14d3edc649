"""What (F̂ + λI)⁻¹ is, from the stored rows, with nothing but dense matrices."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Wide = np.ndarray  # of np.longdouble, 11 bits more than float64


def rows_of(kind: str, count: int, size: int, seed: int = 0) -> Tensor:
    """Float64 rows of a kind that is hard in its own way."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = normal(count, size)
    if kind == "graded":  # singular values over four decades
        decades = torch.logspace(0, -4, count, dtype=torch.float64)
        return normal(count, count) @ (decades[:, None] * rows) / count
    if kind == "columns":  # some parameters matter 1,000 times as much as others
        return rows * torch.logspace(0, -3, size, dtype=torch.float64)
    if kind == "mean":  # most of every row is the same
        return rows + 3
    if kind == "pairs":
        return torch.cat([rows[: -(-count // 2)], rows[: count // 2]])
    if kind == "equal":
        return rows[:1].repeat(count, 1)
    if kind == "zero":
        return torch.zeros_like(rows)
    assert kind == "normal"
    return rows


class Truth:
    """A dense float64 inverse, whose solutions are refined with residuals in extended precision.

    Refinement takes the error from κ · 1e-16 of the inverse itself to about κ · 1e-19.
    """

    def __init__(self, rows: Tensor, damping: float, blocks: list[int] | None = None) -> None:
        wide = rows.double().numpy().astype(np.longdouble)
        count, size = wide.shape
        matrix = wide.T @ wide / count
        if blocks is not None:
            label = np.repeat(np.arange(len(blocks)), blocks)
            matrix *= label[:, None] == label
        self.matrix: Wide = matrix + np.longdouble(damping) * np.eye(size, dtype=np.longdouble)
        largest = torch.linalg.matrix_norm(rows.double(), 2) ** 2 / count
        self.condition = 1 + float(largest) / damping
        self._rough = np.linalg.inv(self.matrix.astype(np.float64))

    def solve(self, right: Tensor) -> Tensor:
        """Columns ``(d,)`` or ``(d, k)``."""
        wide = right.double().numpy().astype(np.longdouble)
        found = np.zeros_like(wide)
        for _ in range(6):
            residual = (wide - self.matrix @ found).astype(np.float64)
            found += self._rough @ residual
        return torch.from_numpy(found.astype(np.float64))

    def inverse(self) -> Tensor:
        """All of it."""
        return self.solve(torch.eye(len(self.matrix), dtype=torch.float64))


def distance(found: Tensor, true: Tensor) -> float:
    """‖found − true‖ / ‖true‖."""
    return float(torch.linalg.vector_norm(found - true) / torch.linalg.vector_norm(true))
