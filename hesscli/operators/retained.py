"""Products with one matrix again and again: graphs are kept from one to the next."""

from __future__ import annotations

import torch
from torch import Tensor

from hesscli.operators.base import Operator, Term
from hesscli.problem.precision import doubled

_HEAVIEST = 2
"""Batches on which rounding is measured."""


class Retained:
    """A vector's product over all the batches, summed in float64.

    A batch's graph takes a gradient's work to make and each product on it two, so that keeping it
    saves a third. Graphs are kept as long as they fit; the other batches make theirs anew, and so
    do modes that have no graph of their own to keep.

    Args:
        operator: the matrix.
        room: bytes that the graphs may take.
    """

    def __init__(self, operator: Operator, room: int) -> None:
        self.operator = operator
        self._room = room if operator.mode == "double-backward" else 0
        self._kept: dict[int, Term] = {}
        self._parts: dict[int, float] = {}
        self._storages: set[int] = set()

    def __call__(self, vector: Tensor) -> Tensor:
        """A v in float64, weight decay included."""
        problem = self.operator.problem
        row = vector[None].to(problem.device, problem.dtype)
        total = self.operator.decay * row.double()
        for term in self.operator.batches():
            product = self._apply(term, row)
            total.add_(product.double(), alpha=term.weight)
            part = term.weight * float(product.norm())
            self._parts[term.index] = max(part, self._parts.get(term.index, 0.0))
        return total[0]

    def rounding(self, vectors: Tensor) -> float:
        """How far off a product with one of some unit vectors may be; 0 where it is float64.

        Measured on the batches that have the largest part in any product so far: errors come from
        where the curvature does, and that may be a few examples.

        Args:
            vectors: orthonormal rows ``(k, d)``, float64.
        """
        problem = self.operator.problem
        if problem.is_doubled or not problem.precision.is_float64:
            return 0.0
        heaviest = sorted(self._parts, key=lambda index: -self._parts[index])[:_HEAVIEST]
        relative = max(self._relative_error(index, vectors) for index in heaviest)
        return relative * sum(self._parts.values())

    def _relative_error(self, index: int, vectors: Tensor) -> float:
        """Of a batch's products with some vectors, beside the largest of them."""
        problem, operator = self.operator.problem, self.operator
        with problem.forward_context():
            own = operator.live(problem.batch(index))(vectors.to(problem.device, problem.dtype))
        with doubled(problem), problem.forward_context():
            exact = operator.live(problem.batch(index))(vectors.to(problem.device))
        size = float(exact.norm(dim=1).max())
        return float((own.double() - exact).norm(dim=1).max()) / size if size else 0.0

    def forget(self) -> None:
        """Give the graphs back; the next product makes new ones."""
        self._kept.clear()
        self._room = 0

    def _apply(self, term: Term, row: Tensor) -> Tensor:
        """A product on the graph that was kept, or else on a new one, kept if there is room."""
        if term.index in self._kept or self._room <= 0:
            return self._kept.get(term.index, term).apply(row)
        sizes: dict[int, int] = {}

        def weigh(tensor: Tensor) -> Tensor:
            for part in _dense_parts(tensor):
                storage = part.untyped_storage()
                if storage.data_ptr() not in self._storages:
                    sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(weigh, lambda tensor: tensor):
            product = term.apply(row)
        self._room -= sum(sizes.values())
        if self._room >= 0:
            self._kept[term.index] = term
            self._storages.update(sizes)
        return product


def _dense_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """What takes the memory of a tensor; a sparse one, as of an embedding's gradient, has two."""
    if tensor.layout == torch.strided:
        return (tensor,)
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    return ()
