"""A window that ranks share by its columns: each has as many as fit, and all have every row.

GGᵀ is a sum over columns, and so is G x: of an m-row window each rank makes its part of either, and
one message of m × m numbers, or of m for a vector, makes them whole. What is long stays where it
is: a right side, a solution and a diagonal have on each rank the columns that it holds.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from hesscli import world
from hesscli.engines.mfac.window import GradientWindow
from hesscli.state import Rows, State


class ShardedWindow(GradientWindow):
    """One rank's columns of a window; all ranks make theirs, and do the same with it together.

    A gradient that all ranks have is pushed as to any window: each keeps its columns. Gradients
    that each rank has made of its own examples are exchanged.

    Args:
        rows: how many there is room for.
        columns: length d of a gradient.
        dtype: that rows are kept in.
        path: a file to keep them in, after whose name comes the rank's number; None keeps them in
            memory.
        device: where tiles are worked on.

    Raises:
        UsageError: sizes that cannot be, or a share that does not fit; the hint says on how many
            ranks with as much memory it would.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        dtype: torch.dtype = torch.float32,
        path: Path | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self._is_shared = True
        self._places = world.places(columns)
        shard = self._places[world.place()]
        if path is not None:
            path = path.with_name(f"{path.name}.{world.place()}")
        super().__init__(rows, columns, dtype=dtype, path=path, device=device, shard=shard)

    @property
    def cuts(self) -> Sequence[int]:
        """Columns at which each rank's but the first's begin."""
        return [place.start for place in self._places[1:]] if self._is_shared else ()

    def apart(self) -> AbstractContextManager[None]:
        """A stretch in which each rank works on its columns; what one raises, all raise."""
        return world.apart() if self._is_shared else nullcontext()

    def alone(self) -> GradientWindow:
        """This rank's columns, as a window that is not shared."""
        found = copy.copy(self)
        found._is_shared = False
        return found

    def added_up(self, sums: Tensor) -> Tensor:
        """Over all ranks' columns, in the place of this rank's sums."""
        return world.added_up(sums) if self._is_shared else sums

    def completed(self, tensor: Tensor, columns: slice) -> Tensor:
        """With the entries of all ranks, where each had those of its own columns."""
        if not self._is_shared:
            return tensor
        first, last = columns.start, columns.stop
        bounds = ((min(max(p.start, first), last), min(p.stop, last)) for p in self._places)
        return world.completed(tensor, [slice(a - first, max(a, b) - first) for a, b in bounds])

    def state_dict(self) -> State:
        """How many rows there were: a file of all of them would be one rank's, who has a part."""
        return {"pushes": self.pushes, "rows": None, "squares": None}

    def load_state_dict(self, state: State) -> None:
        """Hold this rank's columns of what a window of all of them did, if that was kept."""
        if state["rows"] is None:
            return
        rows = state["rows"] if isinstance(state["rows"], Rows) else Rows(state["rows"])
        self.pushes = 0
        for block in rows.since(0):
            self._keep(block[:, self.place].to(self.dtype))
        self.pushes = state["pushes"]

    def exchange(self, block: Tensor) -> None:
        """Keep gradients ``(k, d)`` of every rank's own, of which k may differ or be 0.

        They come one of each rank after the other, by rank. A rank sends the others what is theirs
        of a row, so that no more than two rows are anywhere at once beside its shard.

        Raises:
            UsageError: a rank's have another length.
            UnsoundError: one is not finite; nothing has changed.
        """
        with self.apart():
            rows = self._checked(block)
        if self.shards == 1:
            self._keep(rows)
            return
        counts = world.gathered(len(rows))
        widths = [place.stop - place.start for place in self._places]
        for turn in range(max(counts)):
            row = rows[turn] if turn < len(rows) else rows.new_empty(0)
            self._keep(world.exchanged(row, widths, [turn < count for count in counts]))
