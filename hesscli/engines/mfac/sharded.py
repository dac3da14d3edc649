"""A window that ranks share by its columns: each has as many as fit, and all have every row.

GGᵀ is a sum over columns, and so is G x: of an m-row window each rank makes its part of either, and
one message of m × m numbers, or of m for a vector, makes them whole. What is long stays where it
is: a right side, a solution and a diagonal have on each rank the columns that it holds.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from hesscli import world
from hesscli.engines.mfac.window import GradientWindow
from hesscli.errors import UsageError
from hesscli.memory import room_for_more
from hesscli.units import human_bytes


class ShardedWindow(GradientWindow):
    """One rank's columns of a window; all ranks make theirs, and do the same with it together.

    A gradient that all ranks have is pushed as to any window: each keeps its columns. Gradients
    that each rank has made of its own examples are exchanged.

    Args:
        rows: how many there is room for.
        columns: length d of a gradient.
        dtype: that rows are kept in.
        path: a file of this rank's to keep its columns in; None keeps them in memory.
        device: where tiles are worked on.

    Attributes:
        place: this rank's columns.

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
        cuts = [columns * rank // world.size() for rank in range(world.size() + 1)]
        self._places = [slice(*cut) for cut in pairwise(cuts)]
        self.place = self._places[world.place()]
        with world.apart():
            if path is None:
                _require_room(rows, columns, dtype, torch.device(device or "cpu"))
            super().__init__(rows, columns, dtype=dtype, path=path, device=device, shard=self.place)

    @property
    def shards(self) -> int:
        """As many as there are ranks."""
        return world.size()

    def added_up(self, sums: Tensor) -> Tensor:
        """Over all ranks' columns, in the place of this rank's sums."""
        return world.added_up(sums)

    def exchange(self, block: Tensor) -> None:
        """Keep gradients ``(k, d)`` of every rank's own, of which k may differ or be 0.

        They come one of each rank after the other, by rank. A rank sends the others what is theirs
        of a row, so that no more than two rows are anywhere at once beside its shard.

        Raises:
            UsageError: a rank's have another length.
            UnsoundError: one is not finite; nothing has changed.
        """
        with world.apart():
            rows = self._checked(block)
        if self.shards == 1:
            self._keep(rows)
            return
        counts = world.gathered(len(rows))
        widths = [place.stop - place.start for place in self._places]
        for turn in range(max(counts)):
            row = rows[turn] if turn < len(rows) else rows.new_empty(0)
            self._keep(world.exchanged(row, widths, [turn < count for count in counts]))

    def whole(self, part: Tensor) -> Tensor:
        """A vector ``(d,)`` of which each rank has its columns, on every rank."""
        parts = world.gathered(part.cpu())
        return torch.cat(parts).to(part.device)


def _require_room(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    whole, room, ranks = rows * columns * dtype.itemsize, room_for_more(device), world.size()
    if whole <= ranks * room:
        return
    hint = f"{-(-whole // max(1, room))} ranks with as much memory each"
    if fewer := ranks * room // (columns * dtype.itemsize):
        hint += f", or {fewer} rows"
    raise UsageError(
        "a rank's share of the window is larger than the memory that is free",
        f"{rows} rows of {columns} take {human_bytes(whole)}, and each of {ranks} has room for "
        f"{human_bytes(room)}",
        hint,
    )
