"""The last gradients, as rows of a matrix in memory or in a file."""

from __future__ import annotations

import copy
import mmap
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from hesscli import storage
from hesscli.errors import UnsoundError, UsageError
from hesscli.memory import require_room
from hesscli.state import Rows, State
from hesscli.vocabulary import WINDOW_DTYPES

DTYPES = tuple(getattr(torch, name) for name in WINDOW_DTYPES)
TILE = 4096
"""Columns in a tile: a float32 sum over more loses digits, over fewer time."""
_SLAB = 2**25
"""Bytes that are read from a file at once."""
_CONVERTED = 2**17
"""Numbers that a CPU converts to float64 at once: they stay in its cache."""
_AT_ONCE = 32
"""Rows of a file that are touched before its pages are let go of: a kernel may map 2 MiB of each
where a few bytes are read."""


class GradientWindow:
    """A ring of rows: when it is full, a new one takes the place of the oldest.

    Args:
        rows: how many there is room for.
        columns: length d of a gradient.
        dtype: that rows are kept in; what the rows are is what this leaves of them.
        path: a file to keep them in, made anew; None keeps them in memory.
        device: where tiles are worked on, and kept unless there is a file; default the CPU.
        shard: keep these columns only, of the whole gradients that are pushed.

    Attributes:
        capacity: how many rows there is room for.
        columns: length of a row that is pushed.
        place: which of them are kept.
        size: how many.
        pushes: rows that were ever pushed.

    Raises:
        UsageError: sizes that cannot be, or more than the memory or the disk has room for.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        dtype: torch.dtype = torch.float32,
        path: Path | None = None,
        device: torch.device | str | None = None,
        shard: slice | None = None,
    ) -> None:
        if rows < 1 or columns < 1:
            raise UsageError(
                "a window needs room for a row", f"{rows} rows of {columns}", "--window 512"
            )
        if dtype not in DTYPES:
            allowed = ", ".join(_name(each) for each in DTYPES)
            raise UsageError("no dtype for a window", _name(dtype), f"--window-dtype: {allowed}")
        self.capacity, self.columns, self.pushes = rows, columns, 0
        self.dtype, self.device = dtype, torch.device(device or "cpu")
        start, stop, _ = (shard or slice(None)).indices(columns)
        self.place, self.size = slice(start, stop), stop - start
        if path is None:
            wide = self.size if self.shards == 1 else columns
            require_room(rows, wide, dtype, self.device, self.shards)
        self._map: mmap.mmap | None = None
        with self.apart():
            if path is None or not self.size:
                self._data = torch.empty(rows, self.size, dtype=dtype, device=self.device)
            else:
                self._map = storage.map_scratch(path, self.nbytes)
                self._data = torch.frombuffer(self._map, dtype=dtype).view(rows, self.size)
        self._squares = torch.zeros(rows, dtype=torch.float64, device=self._data.device)

    def __enter__(self) -> GradientWindow:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def cuts(self) -> Sequence[int]:
        """Columns at which another's begin, where it is one of several of the same rows."""
        return ()

    @property
    def shards(self) -> int:
        """Windows of as many ranks that hold columns of the same rows, this one included."""
        return len(self.cuts) + 1

    def apart(self) -> AbstractContextManager[None]:
        """A stretch in which each shard is worked on by itself."""
        return nullcontext()

    def alone(self) -> GradientWindow:
        """The columns that it keeps, as a window that is not shared."""
        return self

    def added_up(self, sums: Tensor) -> Tensor:
        """What sums over its columns come to over those of all shards, in their place."""
        return sums

    def completed(self, tensor: Tensor, columns: slice) -> Tensor:
        """With the entries of all shards, where it had those of the columns that it keeps.

        Args:
            tensor: ``(columns, …)``; changed in place.
            columns: a range of all.
        """
        return tensor

    def whole(self, part: Tensor) -> Tensor:
        """A vector ``(d,)`` of which each shard has its columns."""
        if self.shards == 1:
            return part
        found = part.new_empty(self.columns)
        found[self.place] = part
        return self.completed(found, slice(0, self.columns))

    def own(self, columns: slice) -> slice:
        """Which of a range of all columns it keeps, where they lie in what it keeps."""
        first, last = self.place.start, self.place.stop
        start, stop = (min(max(end, first), last) for end in (columns.start, columns.stop))
        return slice(start - first, stop - first)

    def lengths(self, vectors: Tensor) -> Tensor:
        """Of vectors ``(k, size)``, of which each shard has its columns: float64 ``(k,)``."""
        own = torch.linalg.vector_norm(vectors, dim=1)
        return own if self.shards == 1 else self.added_up(own.square_()).sqrt_()

    @property
    def count(self) -> int:
        """Rows that are valid: the first so many slots."""
        return min(self.pushes, len(self._data))

    @property
    def full(self) -> bool:
        """Whether the next row takes the place of another."""
        return self.pushes >= self.capacity

    @property
    def nbytes(self) -> int:
        """Memory or disk space that the rows take, empty slots included."""
        return self.capacity * self.size * self.dtype.itemsize

    @property
    def rows(self) -> Tensor:
        """The valid rows ``(n, size)`` in the order of slots; a view, not to be changed."""
        return self._data[: self.count]

    def push(self, row: Tensor) -> int:
        """Keep one gradient ``(d,)``, in place of the oldest where the window is full.

        Returns:
            The slot that it is in now.

        Raises:
            UsageError: it has another length.
            UnsoundError: it is not finite; nothing has changed.
        """
        self.extend(row[None])
        return (self.pushes - 1) % self.capacity

    def extend(self, block: Tensor) -> None:
        """Keep some gradients ``(k, d)``, in turn; all of them or, where one is bad, none.

        Raises:
            UsageError: they have another length.
            UnsoundError: one is not finite.
        """
        self._keep(self._checked(block)[:, self.place])

    def _keep(self, block: Tensor) -> None:
        """Keep the columns that it has of some rows."""
        kept = block[-self.capacity :].to(self._data.device)
        self.pushes += len(block)
        start = (self.pushes - len(kept)) % self.capacity
        until_end = min(len(kept), self.capacity - start)
        self._write(start, kept[:until_end])
        self._write(0, kept[until_end:])

    def state_dict(self) -> State:
        """The rows; as long as none has taken another's place, they stay as they are."""
        rows = Rows(self.rows) if self.pushes <= self.capacity else self.rows
        return {"pushes": self.pushes, "rows": rows, "squares": self._squares[: self.count]}

    def load_state_dict(self, state: State) -> None:
        """Hold what another of the same shape did, unless that was in shards and kept no rows."""
        rows = state["rows"]
        if rows is None:
            return
        self.pushes = state["pushes"]
        (rows if isinstance(rows, Rows) else Rows(rows)).copy_to(self._data)
        self._squares[: self.count] = state["squares"].to(self._squares)
        self._let_go()

    def select(self, slots: Tensor) -> GradientWindow:
        """Some of its valid rows as a window of their own, which takes no memory, nor new rows."""
        return _Selection(self, slots)

    def without(self, gone: Tensor) -> GradientWindow:
        """A window with zeros in some columns ``(d,)``, which takes no memory, nor new rows."""
        return _Masked(self, gone)

    def tile(self, start: int, stop: int) -> Tensor:
        """Columns of the valid rows, ``(n, stop - start)``, on the device; not to be changed."""
        return self._read(slice(start, stop)).to(self.device)

    def gather(self, indices: Tensor) -> Tensor:
        """Some columns ``(k,)`` of the valid rows, ``(n, k)``, on the device."""
        return self._read(indices.to(self._data.device)).to(self.device)

    def tiles(self, columns: slice, width: int = TILE) -> Iterator[tuple[slice, Tensor]]:
        """A range of columns in tiles, left to right.

        Of a window in a file no more than a few tiles are in memory at once.

        Args:
            columns: start and stop, both given.
            width: columns in a tile; the last may have fewer.

        Yields:
            Where a tile lies within the range, and the tile.
        """
        step = width if self._map is None else self._slab(width)
        for start in range(columns.start, columns.stop, step):
            slab = self.tile(start, min(start + step, columns.stop))
            for first in range(0, slab.shape[1], width):
                tile, place = slab[:, first : first + width], start - columns.start + first
                yield slice(place, place + tile.shape[1]), tile

    def project(
        self,
        vectors: Tensor,
        columns: slice | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """G x for some vectors: their inner products with the rows.

        Args:
            vectors: ``(k, size)``, or as long as the range of columns.
            columns: a range, start and stop given; default all.
            dtype: of the products in a tile; tiles are summed in float64.

        Returns:
            float64 ``(k, n)``.
        """
        found = torch.zeros(len(vectors), self.count, dtype=torch.float64, device=self.device)
        for place, tile in self.tiles(columns or slice(0, self.size)):
            found += _times(tile.to(dtype), vectors[:, place].to(dtype).T).T
        return found

    def combine(
        self,
        coefficients: Tensor,
        columns: slice | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """Gᵀ a for some vectors of coefficients: sums of the rows.

        Args:
            coefficients: ``(k, n)``, one for each row in the order of slots.
            columns: a range, start and stop given; default all.
            dtype: of the sums.

        Returns:
            float64 ``(k, size)``, or as long as the range of columns.
        """
        columns, weights = columns or slice(0, self.size), coefficients.to(dtype).T.contiguous()
        width = columns.stop - columns.start
        found = torch.empty(len(coefficients), width, dtype=torch.float64, device=self.device)
        for place, tile in self.tiles(columns):
            found[:, place] = _times(tile.to(dtype).T, weights).T
        return found

    def mean_square(self) -> float:
        """Tr F̂: the mean of the rows' squared lengths.

        Raises:
            UsageError: there are no rows.
        """
        self.require_rows()
        return float(self.added_up(self._squares[: self.count].clone()).mean())

    def require_rows(self) -> None:
        """See that there is a row.

        Raises:
            UsageError: there is none.
        """
        if self.count == 0:
            raise UsageError("the window is empty", "no gradients", "push some gradients first")

    def close(self) -> None:
        """Give memory or disk space back, once nobody else holds a view of the rows."""
        self._data, self._map = self._data.new_empty(0, self.size), None

    def _checked(self, block: Tensor) -> Tensor:
        """The rows in the window's dtype."""
        if block.ndim != 2 or block.shape[1] != self.columns:
            raise UsageError(
                "a gradient has the wrong length",
                f"shape {tuple(block.shape[1:])}, for a window of {self.columns} columns",
                "a window of the same parameters as the gradients",
            )
        kept = block.detach().to(self.dtype)
        if torch.linalg.vector_norm(kept, dim=1).isfinite().all():  # in a tenth of the time
            return kept
        finite = torch.isfinite(kept).all(dim=1)  # for a norm may overflow, too
        if not finite.all():
            raise UnsoundError(
                "a gradient is not finite",
                f"NaN or infinity in row {self.pushes + int(finite.int().argmin())} of the window",
                "--dtype float64, or a checkpoint from before the run diverged",
            )
        return kept

    def _write(self, start: int, rows: Tensor) -> None:
        self._data[start : start + len(rows)] = rows
        self._squares[start : start + len(rows)] = _squares(rows)
        self._let_go()

    def _slab(self, width: int) -> int:
        """Columns to read from a file at once, in whole tiles."""
        return width * max(1, _SLAB // (self.count * width * self.dtype.itemsize))

    def _read(self, columns: slice | Tensor) -> Tensor:
        """Some columns of the valid rows; of a file a copy, made some rows at a time."""
        if self._map is None:
            return self.rows[:, columns]
        copy = self.rows.new_empty(self.count, self.rows[:0, columns].shape[1])
        for start in range(0, self.count, _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            copy[part] = self.rows[part, columns]
            self._let_go()
        return copy

    def _let_go(self) -> None:
        """Keep none of a file's pages in the process's memory; the system may."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)  # shared: the file keeps what was written


class _View(GradientWindow):
    """A window that is read through another, and shared as that is."""

    def __init__(self, whole: GradientWindow, rows: int) -> None:
        self._whole = whole
        self.capacity = self.pushes = rows
        self.columns, self.place, self.size = whole.columns, whole.place, whole.size
        self.dtype, self.device = whole.dtype, whole.device
        self._data, self._map = whole._data, whole._map

    @property
    def cuts(self) -> Sequence[int]:
        return self._whole.cuts

    def apart(self) -> AbstractContextManager[None]:
        return self._whole.apart()

    def alone(self) -> GradientWindow:
        found = copy.copy(self)
        found._whole = self._whole.alone()
        return found

    def added_up(self, sums: Tensor) -> Tensor:
        return self._whole.added_up(sums)

    def completed(self, tensor: Tensor, columns: slice) -> Tensor:
        return self._whole.completed(tensor, columns)


class _Selection(_View):
    """Some rows of a window."""

    def __init__(self, whole: GradientWindow, slots: Tensor) -> None:
        super().__init__(whole, len(slots))
        self._slots = slots.to(whole.device)
        self._squares = whole._squares[slots.to(whole._squares.device)]

    def tile(self, start: int, stop: int) -> Tensor:
        return self._whole.tile(start, stop)[self._slots]

    def gather(self, indices: Tensor) -> Tensor:
        return self._whole.gather(indices)[self._slots]


class _Masked(_View):
    """A window with zeros in some of its columns."""

    def __init__(self, whole: GradientWindow, gone: Tensor) -> None:
        super().__init__(whole, whole.count)
        self._stays = ~gone.to(whole.device)

    @property
    def _squares(self) -> Tensor:  # type: ignore[override]
        tiles = (tile for _, tile in self.tiles(slice(0, self.size)))
        return torch.stack([_squares(tile) for tile in tiles]).sum(0)

    def tile(self, start: int, stop: int) -> Tensor:
        return self._whole.tile(start, stop) * self._stays[start:stop]

    def gather(self, indices: Tensor) -> Tensor:
        return self._whole.gather(indices) * self._stays[indices.to(self.device)]


def _times(matrix: Tensor, columns: Tensor) -> Tensor:
    """A product with one column or more; libraries are slow where a matrix has one column."""
    return (matrix @ columns[:, 0])[:, None] if columns.shape[1] == 1 else matrix @ columns


def _squares(rows: Tensor) -> Tensor:
    """‖row‖² of each, in float64; torch converts long rows of another type slowly."""
    width = rows.shape[1]
    if rows.device.type == "cpu":
        width = min(width, max(1, _CONVERTED // max(1, len(rows))))
    parts = [torch.linalg.vector_norm(part.double(), dim=1) for part in torch.split(rows, width, 1)]
    return torch.stack(parts).square_().sum(0)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
