"""Lanczos' method: a growing orthonormal basis in which a symmetric matrix is tridiagonal.

Every new vector is orthogonalised against the last two, of which it has most, and then against all
others, once more where that took away much: "twice is enough" keeps the basis orthonormal to
rounding (Giraud, Langou, Rozložník & van den Eshof 2005, "Rounding error analysis of the
classical Gram-Schmidt orthogonalization process"; when once is: Daniel, Gragg, Kaufman & Stewart
1976, "Reorthogonalization and stable algorithms for updating the Gram-Schmidt QR factorization"),
so that no eigenvalue comes again as a ghost. The basis has the type of the products: whatever an
inner product is off by stays in the vector, and a residual is as small as before; how far from
orthonormal that leaves the basis enters eigenvalues by its square (Simon 1984, "Analysis of the
symmetric Lanczos algorithm with reorthogonalization methods").
Where the basis has become invariant, a new segment begins with a random vector orthogonal to it:
that finds eigenvalues of any multiplicity, and after d steps the decomposition is complete.
Where ranks share a basis, each has its columns of every vector. An inner product is then one
message of a number for each row, and a step one of d numbers, since a product takes a whole vector.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hesscli import randomness
from hesscli.engines.ritz import Array, Ritz
from hesscli.errors import UnsoundError
from hesscli.shards import Columns
from hesscli.state import State
from hesscli.sums import rounding_of_sum

ROUNDING = 16.0
"""Error of a product in units of eps times the largest product: 2 to 18 were seen in networks."""
_START = 0x1A2C05
"""Separates start vectors from other uses of a seed."""


class Lanczos:
    """A fixed symmetric matrix, seen only through products, one a step.

    Args:
        product: ``(d,)`` to ``(d,)``; called once for each vector of the basis, in order.
        size: d.
        seed: of the start vector, which is uniform on the sphere.
        dtype: in which the product computes, and of the basis: the rounding of both is part of
            every residual.
        device: of the vectors; default the CPU.
        reserve: steps to make room for at first; where there are more, room doubles.
        rounding: error of a product relative to the largest, where it was measured to be more
            than is usual for its type.
        apart: orthonormal rows ``(s, d)`` of that type, in some blocks: the matrix is taken in the
            complement of what they span.
        shared: among all ranks, which make each step together: each has its columns of the basis,
            and of these rows, and all have a vector whole while the product with it is made.
    """

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        size: int,
        *,
        seed: int,
        dtype: torch.dtype = torch.float64,
        device: torch.device | None = None,
        reserve: int = 16,
        rounding: float = 0.0,
        apart: Sequence[Tensor] = (),
        shared: bool = False,
    ) -> None:
        self.size, self.seed = size, seed
        self.columns = Columns(size, shared=shared)
        self._product, self._apart = product, apart
        self._dimension = size - sum(map(len, apart))
        eps = torch.finfo(dtype).eps
        self._unit = (ROUNDING + _VECTORS) * eps + rounding_of_sum(size, torch.float64)
        self._error = max(self._unit, rounding)
        rows = min(reserve, self._dimension)
        self._rows = torch.empty(rows, self.columns.count, dtype=dtype, device=device or "cpu")
        self._starts: list[int] = []
        self._diagonal: list[float] = []
        self._left: list[float] = []  # norms after each step: the off-diagonal, or a segment's end
        self._largest = self._asymmetry = 0.0
        self._next = self._fresh()

    @property
    def count(self) -> int:
        """Lanczos steps made."""
        return len(self._diagonal)

    @property
    def done(self) -> bool:
        """Whether the basis spans the whole space, or the complement that there is."""
        return self.count == self._dimension

    @property
    def basis(self) -> Tensor:
        """Orthonormal rows ``(k, d)``, all with their products made; a view, not to be changed.

        Of a basis that is shared, this rank's columns.
        """
        return self._rows[: self.count]

    @property
    def nbytes(self) -> int:
        """Memory that the basis takes, room for more included."""
        return self._rows.nbytes

    def step(self) -> None:
        """Make one more product; none once the basis spans the whole space.

        Whatever the product raises, nothing has changed, and the step can be made again.

        Raises:
            UnsoundError: the product is not finite.
        """
        if self.done:
            return
        product = self._product(self.columns.whole(self._next))
        rows, image = self._rows_with_next(), self._place(self.count + 1)
        length = _length(product)
        _divided(image, product[self.columns.own], length)
        overlaps, left = self._orthogonalise(image, rows)
        overlaps = overlaps * length
        if self.count > self._starts[-1]:
            overlaps[-2] -= self._left[-1]
        asymmetry = torch.linalg.vector_norm(overlaps[:-1])
        self._record(*torch.stack([overlaps[-1], left * length, length, asymmetry]).tolist())
        if not self.done:
            invariant = self._left[-1] <= self._unit * self._largest
            self._next = self._fresh() if invariant else image.div_(left)

    def ritz(self) -> Ritz:
        """Eigenvalues of the tridiagonal matrix, and how far they are from the true ones at most.

        A Ritz pair's residual has length β|s|, with β what was left at its segment's end and s
        its vector's last coordinate there; the product's own error comes on top. That error
        shows where it breaks symmetry, and is taken as it was measured besides, ``ROUNDING`` · eps
        at least, with that of vectors' own arithmetic and of sums over d terms.
        """
        rounding = self._asymmetry + self._error * self._largest
        values, residuals, weights = (np.empty(self.count) for _ in range(3))
        coordinates = np.zeros((self.count, self.count))
        for start, stop in self._segments():
            part = slice(start, stop)
            values[part], vectors = np.linalg.eigh(self._tridiagonal(start, stop))
            coordinates[part, part] = vectors
            residuals[part] = self._left[stop - 1] * np.abs(vectors[-1]) + rounding
            weights[part] = vectors[0] ** 2 if start == 0 else 0.0
        order = np.argsort(values, kind="stable")
        return Ritz(
            values[order], residuals[order], weights[order], coordinates[:, order], rounding
        )

    def allow(self, error: float) -> None:
        """Count an error of products in all bars from now on, where it is more than they have."""
        self._error = max(self._error, error / self._largest if self._largest else 0.0)

    def vectors(
        self, ritz: Ritz, which: slice | Sequence[int], columns: slice = slice(None)
    ) -> Tensor:
        """Some of the Ritz vectors, as orthonormal rows ``(m, d)``, or some columns of them.

        Of a basis that is shared, what this rank has of these columns.
        """
        chosen = torch.from_numpy(np.ascontiguousarray(ritz.coordinates[:, which].T))
        return chosen.to(self._rows) @ self._rows[: len(ritz.values), self.columns.among(columns)]

    def state_dict(self) -> State:
        """The basis with the vector that comes next, the tridiagonal matrix, and the errors."""
        following = () if self.done else (self._next[None],)
        return {
            "rows": self.columns.rows(self.basis, *following),
            "starts": self._starts,
            "diagonal": self._diagonal,
            "left": self._left,
            "largest": self._largest,
            "asymmetry": self._asymmetry,
            "error": self._error,
        }

    def load_state_dict(self, state: State) -> None:
        """Be where another with the same matrix, seed and room was."""
        count = len(state["diagonal"])
        while len(self._rows) < count:
            self._rows = self._room_for(self._more_than(len(self._rows)))
        whole = (row for block in state["rows"].since(0) for row in block)
        for number, row in enumerate(whole):  # the last one may be the next
            self._next = self._place(number).copy_(row[self.columns.own])
        self._starts = list(state["starts"])
        self._diagonal, self._left = list(state["diagonal"]), list(state["left"])
        self._largest, self._asymmetry = state["largest"], state["asymmetry"]
        self._error = state["error"]

    def is_as(self, state: State) -> bool:
        """Whether another made the same vectors, as far as its tridiagonal matrix tells."""
        return self._diagonal == list(state["diagonal"]) and self._left == list(state["left"])

    def _record(self, diagonal: float, left: float, largest: float, asymmetry: float) -> None:
        if not math.isfinite(left):
            raise UnsoundError(
                "a curvature product is not finite",
                f"NaN or infinity in product {self.count + 1} of Lanczos' method",
                "--mode finite-difference, or a checkpoint from before the run diverged",
            )
        self._diagonal.append(diagonal)
        self._left.append(left)
        self._largest = max(self._largest, largest)
        self._asymmetry = math.hypot(self._asymmetry, asymmetry)

    def _rows_with_next(self) -> Tensor:
        """The basis and the vector that comes next, which may be there already."""
        if self.count == len(self._rows):
            grown = self._room_for(self._more_than(self.count))
            grown[: self.count] = self._rows
            self._rows = grown
        row = self._rows[self.count]
        if row.data_ptr() != self._next.data_ptr():
            self._next = row.copy_(self._next)
        return self._rows[: self.count + 1]

    def _place(self, row: int) -> Tensor:
        """Where a vector of the basis is made: its row, or by itself where there is none yet."""
        return self._rows[row] if row < len(self._rows) else self._room_for(1)[0]

    def _room_for(self, rows: int) -> Tensor:
        return self._rows.new_empty(rows, self.columns.count)

    def _more_than(self, count: int) -> int:
        """Rows to make room for where there is room for so many."""
        return min(max(1, 2 * count), self._dimension)

    def _fresh(self) -> Tensor:
        """A random unit vector orthogonal to the basis, with which a segment begins."""
        stream = randomness.key(_START, self.seed, len(self._starts))
        vector = randomness.at(
            [(self.columns.own.start, self.columns.count)],
            randomness.gaussian,
            stream,
            dtype=self._rows.dtype,
            device=self._rows.device,
        )
        _, left = self._orthogonalise(vector, self.basis)
        self._starts.append(self.count)
        return self._place(self.count).copy_(vector.div_(left))

    def _orthogonalise(self, vector: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return _orthogonalise(vector, *self._apart, rows, summed=self.columns.summed)

    def _segments(self) -> Iterator[tuple[int, int]]:
        """Where each segment of the basis begins and ends, of the steps that have been made."""
        starts = [start for start in self._starts if start < self.count]
        return itertools.pairwise([*starts, self.count])

    def _tridiagonal(self, start: int, stop: int) -> Array:
        beside = self._left[start : stop - 1]
        return np.diag(self._diagonal[start:stop]) + np.diag(beside, 1) + np.diag(beside, -1)


_LAST = 2
"""Rows that a product's image has most of: the three-term recurrence knows no others."""
_VECTORS = 5.0
"""What arithmetic with a vector is off by at most, in units of eps beside the image that it was: ½
for its type, 2½ where the last two rows are taken out of it, and ½ for each pass through all."""
_TILE = 1 << 15
"""Entries whose products a narrow type sums by itself; tiles are summed in float64. In one sum of
1e7 products float32 was seen to be off by 1e-3, in tiles by 3e-7 where all have one sign."""


def _length(vector: Tensor) -> Tensor:
    """Of a vector of any size and type, float64: squares of a narrow one's entries could vanish."""
    lengths = [torch.linalg.vector_norm(tile.double()) for tile in torch.split(vector, _TILE)]
    length: Tensor = torch.linalg.vector_norm(torch.stack(lengths))
    return length


def _divided(into: Tensor, vector: Tensor, length: Tensor) -> None:
    """Write a vector, or some of its columns, over its length; a zero stays one."""
    divisor = torch.where(length == 0, 1.0, length)
    for part, tile in zip(torch.split(into, _TILE), torch.split(vector, _TILE), strict=True):
        part.copy_(tile.double() / divisor)


def _orthogonalise(
    vector: Tensor, *blocks: Tensor, summed: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Take orthonormal rows out of a vector, in place.

    A pass leaves rounding of what it takes away. So the last rows, of which the vector has most,
    go first; where the pass through all has still taken away half of the vector or more, there is
    another, which removes what that one has left.

    Args:
        vector: ``(d,)``.
        blocks: of rows ``(k, d)``, which are orthonormal together.
        summed: over all columns, what was summed over those that are here.

    Returns:
        How much it had of each row of the last block, float64, and its length at the end.
    """
    last = blocks[-1]
    overlaps = torch.zeros(len(last), dtype=torch.float64, device=vector.device)
    overlaps[-_LAST:] += _taken_out(vector, last[-_LAST:], summed)
    for _ in range(2):
        parts = [_taken_out(vector, rows, summed) for rows in blocks]
        overlaps += parts[-1]
        left = summed(_square(vector)).sqrt()
        if bool(torch.cat(parts).norm() <= left):
            break
    return overlaps, left


def _taken_out(vector: Tensor, rows: Tensor, summed: Callable[[Tensor], Tensor]) -> Tensor:
    """One pass, and how much the vector had of each row."""
    parts = summed(_overlaps(vector, rows)).to(vector.dtype)
    for tile, beside in _tiles(vector, rows):
        tile.sub_(parts @ beside)
    return parts.double()


def _overlaps(vector: Tensor, rows: Tensor) -> Tensor:
    """Inner products of a vector with rows ``(k, d)``, float64 ``(k,)``."""
    return torch.stack([beside @ tile for tile, beside in _tiles(vector, rows)]).double().sum(0)


def _square(vector: Tensor) -> Tensor:
    """Of its length, float64."""
    return torch.stack([tile @ tile for tile in torch.split(vector, _TILE)]).double().sum()


def _tiles(vector: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(vector, _TILE), torch.split(rows, _TILE, dim=1), strict=True)
