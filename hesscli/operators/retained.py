"""Products with one matrix again and again: graphs are kept from one to the next."""

from __future__ import annotations

import torch
from torch import Tensor

from hesscli.operators.base import Operator, Term


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
        self._storages: set[int] = set()

    def __call__(self, vector: Tensor) -> Tensor:
        """A v in float64, weight decay included."""
        problem = self.operator.problem
        row = vector[None].to(problem.device, problem.dtype)
        total = self.operator.decay * row.double()
        for term in self.operator.batches():
            product = self._apply(term, row)
            total.add_(product.double(), alpha=term.weight)
        return total[0]

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
