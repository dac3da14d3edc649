"""The diagonal of any matrix from products with its unit vectors: exact, for d of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hesscli.engines.entries import Stream
from hesscli.engines.hutchinson.table import Array
from hesscli.meter import Meter
from hesscli.operators.source import Source, Term
from hesscli.parameters import LayerSums


class UnitVectors:
    """eᵢᵀ A eᵢ for every entry i, batch by batch: what d products tell, and no probe adds to.

    Args:
        operator: A.
        stream: takes the entries, where they are wanted.

    ``cells[b]`` is ``(1, L + 1)``: a batch's traces by layer, and in the last column their sum,
    without weight decay.
    """

    phase = "multiplying unit vectors"
    sampled = False

    def __init__(self, operator: Source, stream: Stream | None = None) -> None:
        self.operator, self.stream = operator, stream
        self._sums, self.indices = LayerSums(operator.parameters), operator.indices
        empty: Array = np.empty((0, self._sums.num_layers + 1))
        self.cells = dict.fromkeys(self.indices, empty)

    @property
    def meter(self) -> Meter:
        """The operator's."""
        return self.operator.meter

    @property
    def streams(self) -> list[Stream]:
        """Where single entries are kept, if they are."""
        return [] if self.stream is None else [self.stream]

    @property
    def count(self) -> int:
        """1: there is nothing to repeat."""
        return min((len(self.cells[i]) for i in self.seen), default=0)

    @property
    def seen(self) -> list[int]:
        """Batches that are complete."""
        return [i for i in self.indices if len(self.cells[i])]

    def aligned(self, indices: Sequence[int]) -> list[Array]:
        """The cells of some batches."""
        return [self.cells[i] for i in indices]

    def extend(self, _draws: int = 1) -> Iterator[None]:
        """All batches, yielding after each block of products; one that is cut short is lost."""
        for term in self.operator.batches():
            if not len(self.cells[term.index]):
                yield from self._visit(term)
        if self.stream is not None:
            self.stream.close_round(1)

    def _visit(self, term: Term) -> Iterator[None]:
        size = self.operator.parameters.size
        found = torch.empty(size, dtype=torch.float64, device=self.operator.device)
        for start in range(0, size, self.operator.block_size):
            stop = min(start + self.operator.block_size, size)
            found[start:stop] = self._entries(term, start, stop)
            yield
        if self.stream is not None:
            self.stream.add_exact(term.index, term.weight, found)
        self.cells[term.index] = self._sums(found[None]).cpu().numpy()

    def _entries(self, term: Term, start: int, stop: int) -> Tensor:
        """Of the rows from ``start`` to ``stop``."""
        operator, count = self.operator, stop - start
        block = torch.zeros(
            count, operator.parameters.size, dtype=operator.dtype, device=operator.device
        )
        block[:, start:stop].fill_diagonal_(1.0)
        return term.apply(block)[:, start:stop].diagonal().double()
