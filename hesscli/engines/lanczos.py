"""Lanczos' method: a growing orthonormal basis in which a symmetric matrix is tridiagonal.

Every new vector is orthogonalised against the last two, of which it has most, and then against all
others, once more where that took away much: "twice is enough" keeps the basis orthonormal to
rounding (Giraud, Langou, Rozložník & van den Eshof 2005, "Rounding error analysis of the
classical Gram-Schmidt orthogonalization process"; when once is: Daniel, Gragg, Kaufman & Stewart
1976, "Reorthogonalization and stable algorithms for updating the Gram-Schmidt QR factorization"),
so that no eigenvalue comes again as a ghost.
Where the basis has become invariant, a new segment begins with a random vector orthogonal to it:
that finds eigenvalues of any multiplicity, and after d steps the decomposition is complete.
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
from hesscli.state import Rows, State
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
        dtype: in which the product computes: its rounding is part of every residual, as is that
            of sums over the basis' entries.
        device: of the vectors; default the CPU.
        reserve: steps to make room for at first; where there are more, room doubles.
        rounding: error of a product relative to the largest, where it was measured to be more
            than is usual for its type.

    The basis is float64 whatever the product computes in, ``8 d`` bytes a step.
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
    ) -> None:
        self.size, self.seed = size, seed
        self._product = product
        self._unit = ROUNDING * torch.finfo(dtype).eps + rounding_of_sum(size, torch.float64)
        self._error = max(self._unit, rounding)
        self._rows = torch.empty(min(reserve, size), size, dtype=torch.float64, device=device)
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
        """Whether the basis spans the whole space."""
        return self.count == self.size

    @property
    def basis(self) -> Tensor:
        """Orthonormal rows ``(k, d)``, all with their products made; a view, not to be changed."""
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
        product = self._product(self._next)
        rows = self._rows_with_next()
        image = self._place(self.count + 1).copy_(product)
        largest = torch.linalg.vector_norm(image)
        overlaps = _orthogonalise(image, rows)
        if self.count > self._starts[-1]:
            overlaps[-2] -= self._left[-1]
        asymmetry = torch.linalg.vector_norm(overlaps[:-1])
        left = torch.linalg.vector_norm(image)
        self._record(*torch.stack([overlaps[-1], left, largest, asymmetry]).tolist())
        if not self.done:
            invariant = self._left[-1] <= self._unit * self._largest
            self._next = self._fresh() if invariant else image.div_(self._left[-1])

    def ritz(self) -> Ritz:
        """Eigenvalues of the tridiagonal matrix, and how far they are from the true ones at most.

        A Ritz pair's residual has length β|s|, with β what was left at its segment's end and s
        its vector's last coordinate there; the product's own error comes on top. That error
        shows where it breaks symmetry, and is taken as it was measured besides, ``ROUNDING`` · eps
        at least; inner products with the basis have d terms.
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
        """Some of the Ritz vectors, as orthonormal rows ``(m, d)``, or some columns of them."""
        chosen = torch.tensor(ritz.coordinates[:, which].T, device=self._rows.device)
        return chosen @ self._rows[: len(ritz.values), columns]

    def state_dict(self) -> State:
        """The basis with the vector that comes next, the tridiagonal matrix, and the errors."""
        following = () if self.done else (self._next[None],)
        return {
            "rows": Rows(self.basis, *following),
            "starts": self._starts,
            "diagonal": self._diagonal,
            "left": self._left,
            "largest": self._largest,
            "asymmetry": self._asymmetry,
            "error": self._error,
        }

    def load_state_dict(self, state: State) -> None:
        """Be where another with the same matrix, seed and room was."""
        count, rows = len(state["diagonal"]), Rows(*state["rows"].parts)
        while len(self._rows) < count:
            self._rows = self._rows.new_empty(self._more_than(len(self._rows)), self.size)
        if count < self.size:
            *_, last = rows.parts
            self._next = self._place(count).copy_(last[-1])
            rows = Rows(*rows.parts[:-1], last[:-1])
        rows.copy_to(self._rows)
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
            grown = self._rows.new_empty(self._more_than(self.count), self.size)
            grown[: self.count] = self._rows
            self._rows = grown
        row = self._rows[self.count]
        if row.data_ptr() != self._next.data_ptr():
            self._next = row.copy_(self._next)
        return self._rows[: self.count + 1]

    def _place(self, row: int) -> Tensor:
        """Where a vector of the basis is made: its row, or by itself where there is none yet."""
        return self._rows[row] if row < len(self._rows) else self._rows.new_empty(self.size)

    def _more_than(self, count: int) -> int:
        """Rows to make room for where there is room for so many."""
        return min(max(1, 2 * count), self.size)

    def _fresh(self) -> Tensor:
        """A random unit vector orthogonal to the basis, with which a segment begins."""
        stream = randomness.key(_START, self.seed, len(self._starts))
        vector = randomness.at(
            [(0, self.size)],
            randomness.gaussian,
            stream,
            dtype=torch.float64,
            device=self._rows.device,
        )
        _orthogonalise(vector, self.basis)
        self._starts.append(self.count)
        vector.div_(torch.linalg.vector_norm(vector))
        return self._place(self.count).copy_(vector)

    def _segments(self) -> Iterator[tuple[int, int]]:
        """Where each segment of the basis begins and ends, of the steps that have been made."""
        starts = [start for start in self._starts if start < self.count]
        return itertools.pairwise([*starts, self.count])

    def _tridiagonal(self, start: int, stop: int) -> Array:
        beside = self._left[start : stop - 1]
        return np.diag(self._diagonal[start:stop]) + np.diag(beside, 1) + np.diag(beside, -1)


_LAST = 2
"""Rows that a product's image has most of: the three-term recurrence knows no others."""


def _orthogonalise(vector: Tensor, rows: Tensor) -> Tensor:
    """Take orthonormal rows out of a vector, in place, and say how much of each it had.

    A pass leaves rounding of what it takes away. So the last rows, of which the vector has most,
    go first; where the pass through all has still taken away half of the vector or more, there is
    another, which removes what that one has left.
    """
    overlaps = torch.zeros(len(rows), dtype=vector.dtype, device=vector.device)
    for among in (slice(-_LAST, None), slice(None), slice(None)):
        part = rows[among] @ vector
        vector.addmv_(rows[among].T, part, alpha=-1)
        overlaps[among] += part
        taken, left = torch.stack([part.norm(), vector.norm()]).tolist()
        if len(part) == len(rows) and taken <= left:
            break
    return overlaps


class Complement:
    """Coordinates of the vectors orthogonal to some orthonormal rows ``(s, d)``.

    The last d − s columns of the product of s Householder reflections, which is never formed.
    """

    def __init__(self, rows: Tensor) -> None:
        self._count, self._length = rows.shape
        self._reflectors, self._scales = torch.geqrf(rows.T)

    @property
    def size(self) -> int:
        """Dimension of the complement, d − s."""
        return self._length - self._count

    def embed(self, coordinates: Tensor) -> Tensor:
        """From coordinates in the complement, ``(d − s,)``, to the vector ``(d,)``."""
        padded = coordinates.new_zeros(self._length, 1)
        padded[self._count :, 0] = coordinates
        return torch.ormqr(self._reflectors, self._scales, padded)[:, 0]

    def restrict(self, vector: Tensor) -> Tensor:
        """From a vector ``(d,)`` to the coordinates of its part in the complement."""
        turned = torch.ormqr(self._reflectors, self._scales, vector[:, None], transpose=True)
        return turned[self._count :, 0].contiguous()
