"""GGᵀ, the inner products of a window's rows."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from hesscli.engines.mfac.window import TILE, GradientWindow
from hesscli.meter import OnStep, go_on
from hesscli.sums import rounding_of_sum

PANEL = 256
"""Rows of a triangular matrix that are multiplied at once, up to the diagonal only."""


class Gram:
    """The matrix GGᵀ in float64, kept up as rows of the window are replaced.

    Products are made in float32 within a tile of columns and summed in float64 over tiles,
    which leaves errors of 1e-8 to 4e-6 of ‖g_i‖‖g_j‖, however long the rows are: most where
    all terms of a sum have one sign and a processor adds them one by one. Or all are made in
    float64.

    Args:
        window: whose rows.
        columns: a range of them, start and stop given; default all.
        exact: make products in float64 as well.
        on_step: called after each tile of columns; may end it.
    """

    def __init__(
        self,
        window: GradientWindow,
        columns: slice | None = None,
        *,
        exact: bool = False,
        on_step: OnStep = go_on,
    ) -> None:
        self.window, self.columns = window, columns or slice(0, window.size)
        self.exact = exact or window.dtype == torch.float64
        capacity = window.capacity
        self._entries = torch.zeros(capacity, capacity, dtype=torch.float64, device=window.device)
        self.refresh(on_step)

    @classmethod
    def of(cls, window: GradientWindow, matrix: Tensor, *, exact: bool) -> Gram:
        """One whose entries ``(n, n)`` are known already."""
        found = cls(window, slice(0, 0), exact=exact)
        found.columns = slice(0, window.size)
        found.matrix.copy_(matrix)
        return found

    @property
    def count(self) -> int:
        """Rows of the window that are valid."""
        return self.window.count

    @property
    def matrix(self) -> Tensor:
        """Float64 ``(n, n)`` in the order of slots; a view, not to be changed."""
        return self._entries[: self.count, : self.count]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the products within a tile."""
        return torch.float64 if self.exact else torch.float32

    @property
    def rounding(self) -> float:
        """Bound of an entry's error, beside ‖g_i‖‖g_j‖."""
        return self.inner_rounding(self.dtype)

    def inner_rounding(self, dtype: torch.dtype) -> float:
        """That of a product with a row, likewise: the same on all ranks that have shards of it."""
        shards, width = self.window.shards, self.columns.stop - self.columns.start
        widest = width if shards == 1 else -(-self.window.columns // shards)
        return inner_rounding(widest, dtype, shards)

    def select(self, slots: Tensor) -> Gram:
        """That of some rows, of which no product is made anew; the window must stay."""
        found = copy.copy(self)
        found.window = self.window.select(slots)
        found._entries = self.matrix[slots[:, None], slots]
        return found

    def refresh(self, on_step: OnStep = go_on) -> None:
        """Make all of it from the rows."""
        matrix = self.matrix.zero_()
        with self.window.apart():
            for _, tile in self.window.tiles(self.columns):
                rows = tile.to(self.dtype)
                for panel in panels(self.count):
                    matrix[panel, : panel.stop] += rows[panel] @ rows[: panel.stop].T
                on_step()
        matrix.copy_(self.window.added_up(matrix.tril() + matrix.tril(-1).T))

    def row(self, slot: int) -> Tensor:
        """One row, float64 ``(n,)``, made anew: one sweep over the window."""
        found = self._entries.new_zeros(self.count)
        for _, tile in self.window.tiles(self.columns):
            rows = tile.to(self.dtype)
            found += rows @ rows[slot]
        return self.window.added_up(found)

    def replace(self, slot: int) -> None:
        """Take note of a row that was pushed."""
        matrix, row = self.matrix, self.row(slot)
        matrix[slot], matrix[:, slot] = row, row


def panels(count: int) -> Iterator[slice]:
    """Rows of a triangular matrix in turn."""
    for start in range(0, count, PANEL):
        yield slice(start, min(start + PANEL, count))


def inner_rounding(size: int, dtype: torch.dtype, shards: int = 1) -> float:
    """Bound of the error of gᵀx beside ‖g‖‖x‖, for a row g and x of any dtype.

    Args:
        size: entries of each, in a shard.
        dtype: of the products within a tile, and of their sum; tiles are summed in float64.
        shards: of about equal size, whose sums are scaled, added up and scaled back.
    """
    tiles = shards * -(-size // TILE) + 4 * (shards - 1)
    return rounding_of_sum(min(size, TILE) + 1, dtype) + rounding_of_sum(tiles, torch.float64)
