"""Products of a Hessian made once, from which other libraries' estimators can run many times.

What an estimator asks of a matrix that it knows only by products lies in a small space: random
signs w, an orthonormal basis of their images Hw, and combinations of both. A pool holds H on all
of that for some hundred w. A library's own function, set to draw from a place in the same random
stream, then sees the very products that it would have paid for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from curvlinops.sampling import random_vector
from torch import Tensor

from hesscli import Hessian, Problem

BLOCK = 32
DENSE = 1024
"""Parameters up to which the whole matrix is made, so that any vector will do."""
REPEATS = 200
"""Runs of an estimator on a dense matrix."""
PER_LAYER = 4
"""Random signs on each layer alone."""
SEED = 20240


class Rows:
    """Named tensors in one file, replaced as a whole at every growth."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._tensors: dict[str, Tensor] = torch.load(file) if file.exists() else {}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def count(self, name: str) -> int:
        """Rows so far."""
        return len(self._tensors[name]) if name in self else 0

    def append(self, **new: Tensor) -> None:
        """Add rows to each named tensor and save."""
        for name, rows in new.items():
            old = self._tensors.get(name)
            self._tensors[name] = rows if old is None else torch.cat([old, rows])
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        torch.save(self._tensors, part)
        part.replace(self.file)


class Pool:
    """H of a problem on ``size`` random signs and on a basis of their images.

    Args:
        problem: in the dtype that it is to be multiplied in.
        size: number of random signs.
        file: keeps the products; a run that was cut off goes on from there.
    """

    def __init__(self, problem: Problem, size: int, file: Path) -> None:
        self.problem, self.size = problem, size
        self.dense = problem.parameters.size <= DENSE
        self.states: list[Tensor] = []
        self.weights = torch.tensor([batch.weight for batch in problem.batches()])
        layers, sizes = problem.parameters.layer_index(), torch.tensor(problem.parameters.sizes)
        self.layer = layers.repeat_interleave(sizes)
        self.kept = Rows(file)
        self.signs = self._draw()

    def _draw(self) -> Tensor:
        """Signs ``(size, d)`` as the library draws them, noting where in the stream each begins."""
        torch.manual_seed(SEED)
        rows = []
        for _ in range(self.size):
            self.states.append(torch.get_rng_state())
            row = random_vector(self.problem.parameters.size, "rademacher", "cpu", torch.float64)
            rows.append(row.to(torch.int8))
        return torch.stack(rows)

    def fill(self) -> Iterator[str]:
        """Make the products that are missing, telling of each block."""
        while (done := self.kept.count("images")) < self.size:
            self.kept.append(**self._multiply(self.signs[done : done + BLOCK]))
            yield f"{done + BLOCK} of {self.size} random products"
        if self.dense:
            if "matrix" not in self.kept:
                self.kept.append(matrix=Hessian(self.problem).to_dense())
        elif "basis" not in self.kept:
            basis = torch.linalg.qr(self.images.T.double())[0].T
            self.kept.append(basis=basis.to(self.problem.dtype))
        while not self.dense and (done := self.kept.count("basis_images")) < self.size:
            block = self.kept["basis"][done : done + BLOCK]
            self.kept.append(basis_images=self._multiply(block)["images"])
            yield f"{done + BLOCK} of {self.size} products with the basis"
        while (done := self.kept.count("blocks")) < PER_LAYER:
            self.kept.append(blocks=self._restricted(self.signs[done])[None])
            yield f"{done + 1} of {PER_LAYER} products for each layer"

    def _restricted(self, signs: Tensor) -> Tensor:
        """‖(Hw)_l‖² for each layer l and the signs w on it alone, zero elsewhere."""
        on_layer = self.layer == torch.arange(len(self.problem.layer_names))[:, None]
        images = Hessian(self.problem).apply(signs * on_layer)
        return (images * on_layer).square().sum(1)

    def _multiply(self, block: Tensor) -> dict[str, Tensor]:
        """Hv for the rows v, and of each batch vᵀH_b v by layer, ‖H_b v‖² and Σ v ⊙ H_b v."""
        operator = Hessian(self.problem)
        rows = block.to(self.problem.dtype)
        images = operator.decay * rows.double()
        forms, squares, entries = [], [], []
        for term in operator.batches():
            product = term.apply(rows).double() + operator.decay * rows
            images += term.weight * (product - operator.decay * rows)
            diagonals = rows * product
            by_layer = torch.zeros(len(rows), len(self.problem.layer_names), dtype=torch.float64)
            forms.append(by_layer.index_add_(1, self.layer, diagonals))
            squares.append(product.square().sum(1))
            entries.append(diagonals.sum(0))
        return {
            "images": images.to(self.problem.dtype),
            "forms": torch.stack(forms, 1),
            "squares": torch.stack(squares, 1),
            "diagonals": torch.stack(entries)[None],
        }

    @property
    def images(self) -> Tensor:
        """Hw in rows."""
        return self.kept["images"]

    @property
    def forms(self) -> Tensor:
        """wᵀH_b w by layer: ``(size, batches, layers)``."""
        return self.kept["forms"]

    @property
    def squares(self) -> Tensor:
        """‖H_b w‖²: ``(size, batches)``."""
        return self.kept["squares"]

    @property
    def diagonals(self) -> Tensor:
        """Mean over the signs of w ⊙ H_b w: ``(batches, d)``."""
        return self.kept["diagonals"].sum(0) / self.size

    @property
    def operator(self) -> Tensor | Known:
        """H as curvlinops' functions take it."""
        if self.dense:
            return self.kept["matrix"]
        vectors = torch.cat([self.signs.to(self.problem.dtype), self.kept["basis"]])
        return Known(vectors, torch.cat([self.images, self.kept["basis_images"]]))

    def starts(self, draws: int) -> Iterator[None]:
        """Put the random stream where each run of an estimator that takes so many draws begins."""
        if self.dense:
            for repeat in range(REPEATS):
                torch.manual_seed(SEED + 1 + repeat)
                yield
            return
        for first in range(0, self.size - draws + 1, draws):
            torch.set_rng_state(self.states[first])
            yield


class Known:
    """A symmetric matrix on the span of vectors whose images are known.

    Args:
        vectors: rows, independent.
        images: of each.
    """

    device = torch.device("cpu")
    dtype = torch.float64

    def __init__(self, vectors: Tensor, images: Tensor) -> None:
        scale = vectors.norm(dim=1, keepdim=True)
        self.vectors, self.images = (vectors / scale).double(), (images / scale).double()
        self.shape = (vectors.shape[1], vectors.shape[1])
        self._factor = torch.linalg.cholesky(self.vectors @ self.vectors.T)

    def adjoint(self) -> Known:
        return self

    def __matmul__(self, block: Tensor) -> Tensor:
        columns = block if block.dim() == 2 else block[:, None]
        shadows = self.vectors @ columns
        weights = torch.cholesky_solve(shadows, self._factor)
        outside = columns.square().sum() - (weights * shadows).sum()
        if outside > 1e-10 * columns.square().sum():
            raise ValueError("asked for a product outside of the span")
        products = self.images.T @ weights
        return products if block.dim() == 2 else products[:, 0]
