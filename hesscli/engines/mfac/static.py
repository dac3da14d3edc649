"""The inverse of a window's Fisher matrix, whole or block by block, for a window that stays."""

from __future__ import annotations

import copy
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hesscli.engines.mfac.dual import DualBlock
from hesscli.engines.mfac.primal import PrimalRun
from hesscli.engines.mfac.system import Solved
from hesscli.engines.mfac.window import GradientWindow
from hesscli.engines.mfac.work import InverseWork
from hesscli.errors import UnsoundError, UsageError
from hesscli.memory import available_bytes
from hesscli.meter import OnStep, go_on
from hesscli.units import human_bytes

# -- What comes out of a solve, and what may go in -------------------------------------------------


@dataclass(frozen=True)
class Solution:
    """What was solved for, and how far off rounding may have put it.

    Attributes:
        vector: y, float64 ``(d,)``.
        error: bound of ‖ŷ − y‖ / ‖y‖, as far as it is due to rounding; infinite where no digit
            is sure.
    """

    vector: Tensor
    error: float

    @classmethod
    def of(cls, vector: Tensor, error: Tensor, window: GradientWindow) -> Solution:
        """From ŷ and a bound of ‖ŷ − y‖, a scalar."""
        return cls.within(vector, *size_and_error(vector, error, window))

    @classmethod
    def within(cls, vector: Tensor, size: float, off: float) -> Solution:
        """From ŷ, ‖ŷ‖ and a bound of ‖ŷ − y‖; ‖y‖ is no less than ‖ŷ‖ without it."""
        if off == 0:
            return cls(vector, 0.0)
        return cls(vector, off / (size - off) if off < size else math.inf)


def size_and_error(vector: Tensor, error: Tensor, window: GradientWindow) -> tuple[float, float]:
    """‖ŷ‖, and a bound of ‖ŷ − y‖ that is a scalar, which a device is waited for once to tell."""
    size, off = torch.stack([window.lengths(vector[None])[0], error]).tolist()
    return size, off


def checked_damping(damping: float) -> float:
    """λ, which must be above 0.

    Raises:
        UsageError: it is not, or it is not finite.
    """
    if not 0 < damping < math.inf:
        raise UsageError(
            "--damping must be above 0 and finite", f"{damping}", "--damping 1e-3 or abs:1e-5"
        )
    return float(damping)


def checked_rows(rows: Tensor, length: int, window: GradientWindow) -> Tensor:
    """Vectors ``(k, length)`` in float64, where the window is.

    Raises:
        UsageError: they have another length.
        UnsoundError: one is not finite.
    """
    with window.apart():
        if rows.ndim != 2 or rows.shape[1] != length:
            raise UsageError(
                "a vector has the wrong length",
                f"shape {tuple(rows.shape[1:])}",
                f"a vector of {length} numbers",
            )
        if not bool(torch.isfinite(rows).all()):
            raise UnsoundError(
                "a vector to solve for is not finite",
                "NaN or infinity",
                "--dtype float64, or a checkpoint from before the run diverged",
            )
    return rows.detach().to(window.device, torch.float64)


def only(slot: int, window: GradientWindow) -> Tensor:
    """Amounts ``(n,)`` of the rows, of which there is one.

    Raises:
        UsageError: there is no such row.
    """
    if not 0 <= slot < window.count:
        raise UsageError(
            "no such row in the window", f"{slot}", f"a slot from 0 to {window.count - 1}"
        )
    amounts = torch.zeros(window.count, dtype=torch.float64, device=window.device)
    amounts[slot] = 1
    return amounts


# -- The inverse of a window's Fisher matrix, whole or block by block, for a window that stays -----


Sizes = NDArray[np.int64]
"""Of consecutive blocks of columns, of which there may be millions."""
Part = DualBlock | PrimalRun
T = TypeVar("T")
_TOGETHER = 1 << 17
"""Numbers in the matrices that are inverted together: a processor's cache holds some of them."""
_KEPT = 1 << 30
"""Bytes of matrices and factors that are kept, at most."""


@dataclass(frozen=True)
class Division:
    """Consecutive blocks, as the shards of a window have them.

    A block that reaches over shards is inverted by all that share the window together, each with
    the columns that it has, if any; any other by the shard that it lies in.

    Attributes:
        shared: of those that reach over shards, the size and the columns that are in this one.
        own: sizes of those that lie in this one.
        first: column of this one at which they begin.
    """

    shared: Sequence[tuple[int, slice]]
    own: Sizes
    first: int

    @classmethod
    def of(cls, window: GradientWindow, sizes: Sizes, start: int = 0) -> Division:
        """Of a window's blocks.

        Args:
            window: whole, or in shards.
            sizes: of the blocks.
            start: where they begin, of all columns.
        """
        if window.shards == 1:
            return cls((), sizes, start)
        stops = start + np.cumsum(sizes)
        starts, cuts = stops - sizes, np.array(window.cuts)
        # The first cut after a block's start is where its shard ends.
        ends = np.append(cuts, window.columns)[np.searchsorted(cuts, starts, side="right")]
        over = np.flatnonzero(stops > ends)
        places = [window.own(slice(starts[i], stops[i])) for i in over]
        first, last = window.place.start, window.place.stop
        inside = np.flatnonzero((starts >= first) & (stops <= last))
        offset = int(starts[inside[0]]) - first if len(inside) else 0
        return cls(list(zip(sizes[over].tolist(), places, strict=True)), sizes[inside], offset)

    def runs(self, rows: int, together: int = _TOGETHER) -> Iterator[tuple[int, slice]]:
        """Own blocks that are inverted together, where they lie in the shard."""
        if len(self.own):
            for size, place in runs(self.own, rows, together):
                yield size, slice(place.start + self.first, place.stop + self.first)


class StaticFisher:
    """(F̂ + λI)⁻¹ with F̂ = (1/n) GᵀG, or its block diagonal.

    A block of b columns is inverted as a matrix of its own where b ≤ n, and else by way of its
    n×n Gram matrix: O(d n min(n, b)) once, then O(dn) a product and O(n) an element. Of a window in
    shards vectors have the columns that a shard has, and all that share it do the same at once.

    Args:
        window: the rows of G; it must not change from now on.
        damping: λ, absolute.
        blocks: sizes of consecutive blocks of all columns; None is one whole block.
        precise: make products with the window in float64, or in float32 where b > n. None is
            float64 where b < 2n, and elsewhere float32 unless too few digits would be left.
        on_step: called as blocks are inverted, some columns at a time; may end it.

    Inverses are kept where they take little memory, and are else made anew by whatever needs them
    all, a few at a time.

    Raises:
        UsageError: an empty window, blocks that do not fit, a λ that is not above 0, or more
            memory than there is.
        UnsoundError: λ is lost in rounding.
    """

    def __init__(
        self,
        window: GradientWindow,
        damping: float,
        *,
        blocks: Sequence[int] | Sizes | None = None,
        precise: bool | None = None,
        on_step: OnStep = go_on,
    ) -> None:
        self.damping = checked_damping(damping)
        window.require_rows()
        columns = window.size if window.shards == 1 else window.columns
        sizes = np.asarray((columns,) if blocks is None else blocks, dtype=np.int64)
        if sizes.min(initial=1) < 1 or sizes.sum() != columns:
            raise UsageError(
                "blocks do not make up the gradient",
                f"sizes that sum to {sizes.sum()}, for {columns} columns",
                "sizes above 0 of all consecutive blocks",
            )
        self.window, self._pushes, self._has_room = window, window.pushes, False
        self._sizes, self._precise, self._on_step = sizes, precise, on_step
        self._division = Division.of(window, sizes)
        self._starts = [columns.start for _, columns in self._division.runs(window.count)]
        self._shared: list[Part] | None = None
        self._kept: list[Part] | None = None
        if kept_bytes(sizes, window.count, window.shards):
            self._keep(self._made_together(), self._made())

    def with_damping(self, damping: float) -> StaticFisher:
        """The same matrix with another λ: what was kept of the rows is used again."""
        found = copy.copy(self)
        found.damping = checked_damping(damping)
        if self._kept is not None:
            shared, own = self.shared_parts(), self.parts()
            found._keep(*((part.damped(found.damping) for part in each) for each in (shared, own)))
        return found

    def parts(self) -> Iterator[Part]:
        """Its blocks, left to right; made as they are taken where all are too large to keep.

        Of a window in shards those that lie in this one.

        Raises:
            UsageError: rows were pushed or the window was closed.
            UnsoundError: λ is lost in rounding.
        """
        self._require_as_it_was()
        return self._made() if self._kept is None else iter(self._kept)

    def shared_parts(self) -> Iterator[Part]:
        """Blocks that reach over shards, which all that share the window must take together."""
        self._require_as_it_was()
        return self._made_together() if self._shared is None else iter(self._shared)

    def _require_as_it_was(self) -> None:
        if self.window.pushes != self._pushes or not self.window.count:
            raise UsageError(
                "the window is not what it was when it was inverted",
                f"{self.window.pushes - self._pushes} new rows, {self.window.count} in all",
                "a new StaticFisher, or a WindowedFisher that follows its window",
            )

    def _keep(self, shared: Iterable[Part], own: Iterable[Part]) -> None:
        """Have parts, whose dampings are seen not to be lost."""
        self._shared = list(shared)
        with self.window.apart():
            self._kept = list(own)
            for part in self._kept:
                part.factorise()

    def _made_together(self) -> Iterator[Part]:
        for size, columns in self._division.shared:
            yield self._dual(self.window, size, columns)
            self._on_step()

    def _made(self) -> Iterator[Part]:
        window, on_step = self.window.alone(), self._on_step
        for size, columns in self._division.runs(window.count):
            if size <= window.count:
                yield PrimalRun(window, columns, size, self.damping, on_step=on_step)
            else:
                yield self._dual(window, size, columns)
            on_step()

    def _dual(self, window: GradientWindow, size: int, columns: slice) -> DualBlock:
        precise = (self._precise is None and size < 2 * window.count) or self._precise
        return DualBlock(window, columns, self.damping, precise, on_step=self._on_step)

    def _of_each(self, work: Callable[[Part], T]) -> tuple[list[T], list[T]]:
        """Something of each block that reaches over shards, and of each that does not."""
        shared = [work(part) for part in self.shared_parts()]
        with self.window.apart():
            return shared, [work(part) for part in self.parts()]

    def _in_place(self, work: Callable[[Part], Tensor]) -> Tensor:
        """A vector ``(size,)`` of what something makes of each block."""
        found = self._empty(self.window.size)
        for columns, values in chain(*self._of_each(lambda part: (part.columns, work(part)))):
            found[columns] = values
        return found

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64, device=self.window.device)

    @property
    def work(self) -> InverseWork:
        """What it takes to make it, and to ask it, in all shards together."""
        window = self.window
        return InverseWork(self._sizes, window.count, window.dtype, self._kept is not None)

    @property
    def table_nbytes(self) -> int:
        """Memory for the table that the first ``element`` makes."""
        return sum(part.table_nbytes for part in self._held())

    def ihvp(self, vector: Tensor) -> Solution:
        """(F̂ + λI)⁻¹ x for x ``(d,)``."""
        solved, errors = self._solve(vector[None])
        return Solution.of(solved[0], errors[0], self.window)

    def ihvp_many(self, vectors: Tensor) -> Tensor:
        """(F̂ + λI)⁻¹ x for rows ``(k, d)``, in as many passes over the window as for one."""
        return self._solve(vectors)[0]

    def combination(self, amounts: Tensor) -> Solution:
        """(F̂ + λI)⁻¹ x for x = Gᵀa with a ``(n,)`` in the order of slots.

        One pass, and far more digits than ``ihvp`` of the same x where λ is small.
        """
        rows = checked_rows(amounts[None], self.window.count, self.window)
        solved, errors = self._solved(1, lambda part: part.combination(rows))
        return Solution.of(solved[0], errors[0], self.window)

    def member(self, slot: int) -> Solution:
        """(F̂ + λI)⁻¹ g for the row in a slot."""
        return self.combination(only(slot, self.window))

    def multiply(self, vector: Tensor) -> Tensor:
        """(F̂ + λI) x for x ``(d,)``, all in float64."""
        rows = checked_rows(vector[None], self.window.size, self.window)
        return self._in_place(lambda part: part.multiply(rows[:, part.columns])[0])

    def diagonal(self) -> Tensor:
        """Diagonal of the inverse, float64 ``(d,)``."""
        return self._in_place(lambda part: part.diagonal[0])

    def diagonal_error(self) -> Tensor:
        """Bounds of what rounding has done to each entry of ``diagonal``, float64 ``(d,)``."""
        return self._in_place(lambda part: part.diagonal[1])

    def leverage(self) -> Tensor:
        """1 − λ · diagonal ``(d,)``: how much of each entry the data decide, from 0 to 1."""
        return 1 - self.damping * self.diagonal()

    def element(self, row: int, column: int) -> float:
        """An entry of the inverse: O(n), after the first has made a table.

        Raises:
            UsageError: no such entry, or no room for the table.
        """
        parts = self._held()
        if not (0 <= row < self.window.size and 0 <= column < self.window.size):
            raise _no_entry((row, column), self.window)
        if not self._has_room:
            _require_room(self.table_nbytes, self.window)
            self._has_room = True
        index = bisect_right(self._starts, row) - 1
        if bisect_right(self._starts, column) - 1 != index:
            return 0.0
        start = self._starts[index]
        return parts[index].element(row - start, column - start)

    def submatrix(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Some rows, and the same columns, of the inverse: float64 ``(k, k)``.

        Raises:
            UsageError: no such entries.
        """
        parts, device = self._held(), self.window.device
        chosen = torch.as_tensor(indices, device=device, dtype=torch.long)
        inside = (chosen >= 0) & (chosen < self.window.size)
        if not bool(inside.all()):
            raise _no_entry(chosen[~inside].tolist(), self.window)
        found = torch.zeros(len(chosen), len(chosen), dtype=torch.float64, device=device)
        owners = torch.searchsorted(self._starts_tensor(), chosen, right=True) - 1
        for owner in sorted(set(owners.tolist())):
            here = (owners == owner).nonzero()[:, 0]
            found[here[:, None], here] = parts[owner].submatrix(chosen[here] - self._starts[owner])
        return found

    def groups(self, size: int) -> Tensor:
        """Blocks on the inverse's diagonal of so many consecutive columns each ``(r, size, size)``.

        Raises:
            UsageError: a block that was inverted is no whole number of them.
        """
        if (self._sizes % size).any():
            raise UsageError(
                "groups of columns reach over blocks",
                f"groups of {size}",
                f"blocks of a multiple of {size} columns",
            )
        return torch.cat([part.groups(size) for part in self.parts()])

    def group_saliency(self, weights: Tensor, indices: Tensor | Sequence[int]) -> float:
        """½ w_Qᵀ ([F̂⁻¹]_QQ)⁻¹ w_Q: what it costs to remove entries Q of w ``(d,)`` together.

        Raises:
            UsageError: no such entries, or one is named twice.
            UnsoundError: rounding leaves too little of the matrix.
        """
        chosen = torch.as_tensor(indices, dtype=torch.long, device="cpu")
        if len(torch.unique(chosen)) < len(chosen):
            raise UsageError("an entry is named twice", f"{len(chosen)} entries", "each once")
        matrix = self.submatrix(chosen)
        removed = weights[chosen.to(weights.device)].to(matrix)
        lower, info = torch.linalg.cholesky_ex(matrix)
        if int(info):
            raise UnsoundError(
                "rounding leaves nothing of the inverse for a group of entries",
                f"{len(matrix)} entries with --damping abs:{self.damping:.3g}",
                "a larger --damping, or a smaller group",
            )
        root = torch.linalg.solve_triangular(lower, removed[:, None], upper=False)
        return 0.5 * float(root.square().sum())

    def _solve(self, vectors: Tensor) -> Solved:
        rows = checked_rows(vectors, self.window.size, self.window)
        return self._solved(len(rows), lambda part: part.solve(rows[:, part.columns]))

    def _solved(self, count: int, work: Callable[[Part], Solved]) -> Solved:
        """So many solutions, part by part; the squares of their errors add up."""
        vectors = self._empty(count, self.window.size)
        together, alone = self._empty(2, count).zero_()
        shared, own = self._of_each(lambda part: (part.columns, *work(part)))
        for squares, solved in ((together, shared), (alone, own)):
            for columns, found, errors in solved:
                vectors[:, columns] = found
                squares += errors.square()
        if len(shared) < len(self._sizes):
            alone = self.window.added_up(alone)
        return vectors, (together + alone).sqrt()

    def _held(self) -> list[Part]:
        """All parts, kept from now on: whoever asks for single entries will ask for more.

        Raises:
            UsageError: there is no room for them.
        """
        parts = self.parts()
        if self._kept is None:
            _require_room(_matrix_bytes(self._sizes, self.window.count), self.window)
            self._kept = list(parts)
        return self._kept

    def _starts_tensor(self) -> Tensor:
        return torch.tensor(self._starts, device=self.window.device)


def runs(sizes: Sizes, rows: int, together: int = _TOGETHER) -> Iterator[tuple[int, slice]]:
    """Columns that are inverted together: runs of equal blocks, and each block above n alone.

    Args:
        sizes: of all blocks.
        rows: n.
        together: numbers in the matrices of a run at most, unless one alone has more.
    """
    ends = np.append(np.flatnonzero(np.diff(sizes)) + 1, len(sizes))
    start = first = 0
    for end in ends.tolist():
        size = int(sizes[first])
        stop = start + size * (end - first)
        step = size * max(1, together // size**2) if size <= rows else size
        yield from ((size, slice(i, min(i + step, stop))) for i in range(start, stop, step))
        start, first = stop, end


def kept_bytes(sizes: Sizes, rows: int, shards: int = 1) -> int:
    """Memory for what is kept of the inverse of so many rows' matrix; 0 where nothing is.

    Of shards each has about an equal part, and what reaches over them.
    """
    needed = _matrix_bytes(sizes, rows) // shards
    needed += min(len(sizes), shards - 1) * _matrix_bytes(sizes.max(keepdims=True), rows)
    return needed if needed <= _KEPT else 0


def _matrix_bytes(sizes: Sizes, rows: int) -> int:
    """Memory for the matrices and their factors."""
    return 2 * torch.float64.itemsize * int(np.square(np.minimum(sizes, rows)).sum())


def _require_room(nbytes: int, window: GradientWindow) -> None:
    room = available_bytes(window.device)
    if nbytes > room:
        raise UsageError(
            "not enough memory for the inverse",
            f"{human_bytes(nbytes)} for {window.count} rows, and {human_bytes(room)} are free",
            "--blocks with fewer entries each, or fewer rows with --window",
        )


def _no_entry(entries: Sequence[int], window: GradientWindow) -> UsageError:
    return UsageError(
        "no such entries of the inverse",
        f"{', '.join(map(str, entries[:4]))}, of {window.size} columns",
        f"numbers from 0 to {window.size - 1}",
    )
