"""The weighted sum over batches, in one place: where processes that share the data will meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from torch import Tensor


class Weighted(Protocol):
    """A batch, or what stands for one."""

    @property
    def weight(self) -> float:
        """Its share of the whole weight mass."""


T = TypeVar("T", bound=Weighted)


def weighted_sum(
    batches: Iterable[T], into: Tensor, parts: Callable[[T], Iterable[Tensor]]
) -> Tensor:
    """Add each batch's rows, times its weight, to a total: in the total's type, best float64.

    Args:
        batches: one at a time.
        into: the total ``(k, …)``, which is changed.
        parts: a batch's k rows, a block of them after the other.

    Returns:
        The total.
    """
    for batch in batches:
        row = 0
        for part in parts(batch):
            into[row : row + len(part)].add_(part.detach(), alpha=batch.weight)
            row += len(part)
    return into
