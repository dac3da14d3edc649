"""Long vectors of which each rank has its columns, and sums over all columns.

What needs one vector as a whole has it made for that, by one message of d numbers; an inner product
takes a message of one.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from hesscli import world
from hesscli.state import Rows


class Columns:
    """Which columns of vectors of one length this process has: all, or a rank's share.

    Args:
        size: d.
        shared: among the ranks that there are, which make all sums and whole vectors together.
    """

    def __init__(self, size: int, *, shared: bool) -> None:
        self.size, self._is_shared = size, shared and world.size() > 1
        self._places = world.places(size) if self._is_shared else [slice(0, size)]
        self.own = self._places[world.place() if self._is_shared else 0]

    @property
    def count(self) -> int:
        """How many this process has."""
        return self.own.stop - self.own.start

    def among(self, columns: slice) -> slice:
        """Which of its own are in a range of all, counted from its first."""
        first, last = self.own.start, self.own.stop
        start, stop, _ = columns.indices(self.size)
        start, stop = (min(max(end, first), last) for end in (start, stop))
        return slice(start - first, stop - first)

    def summed(self, sums: Tensor) -> Tensor:
        """What sums over its columns come to over all, the same to the last bit on every rank."""
        return world.summed(sums) if self._is_shared else sums

    def whole(self, part: Tensor) -> Tensor:
        """A vector ``(d,)``, or rows of them, of which each rank has its columns."""
        if not self._is_shared:
            return part
        found = part.new_empty(*part.shape[:-1], self.size)
        found[..., self.own] = part
        for row in found.view(-1, self.size):
            world.completed(row, self._places)
        return found

    def rows(self, *parts: Tensor) -> Rows:
        """Rows to be kept."""
        return SharedRows(self, *parts) if self._is_shared else Rows(*parts)


class SharedRows(Rows):
    """Rows of which each rank has its columns; all ranks make blocks of whole ones together.

    Args:
        columns: whose.
        parts: tensors ``(k, its columns)``, one below the other.
    """

    def __init__(self, columns: Columns, *parts: Tensor) -> None:
        super().__init__(*parts)
        self._columns = columns

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all of them, whole."""
        return len(self), self._columns.size

    def since(self, first: int) -> Iterator[Tensor]:
        """The rows from ``first`` on, one at a time."""
        for part in super().since(first):
            for row in part:
                yield self._columns.whole(row)[None]
