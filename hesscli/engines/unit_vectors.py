"""The diagonal of any matrix from products with its unit vectors: exact, for d of them."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from functools import partial

import torch
from torch import Tensor

from hesscli.engines.cells import Cells, Visit
from hesscli.engines.entries import BatchSum, Stream
from hesscli.meter import OnStep, go_on
from hesscli.operators.source import Source, Term


class UnitVectors(Cells):
    """eᵢᵀ A eᵢ for every entry i, batch by batch: what d products tell, and no probe adds to.

    Args:
        operator: A.
        stream: takes the entries, where they are wanted.
    """

    phase = "multiplying unit vectors"
    sampled = False
    least = 1

    def __init__(self, operator: Source, stream: Stream | None = None) -> None:
        super().__init__(operator, stream=stream)

    def extend(self, _draws: int = 1, on_step: OnStep = go_on) -> Iterator[None]:
        """All batches, yielding before each and between two blocks of products.

        One that is cut short is lost. ``on_step`` is called between two products; may end it.
        """
        left = [i for i in self.indices if not len(self.cells[i])]
        yield from self._through(left, partial(self._visit, on_step=on_step))
        if left:
            yield
        if self.stream is not None:
            self.stream.close_round(1)

    def _visit(self, batch: int, on_step: OnStep) -> Generator[None, None, Visit]:
        (term,) = self.operator.batches([batch])
        size = self.operator.parameters.size
        found = torch.empty(size, dtype=torch.float64, device=self.operator.device)
        for start in range(0, size, self.operator.block_size):
            if start:
                yield
            stop = min(start + self.operator.block_size, size)
            found[start:stop] = self._entries(term, start, stop, on_step)
        entries = None if self.stream is None else BatchSum(batch, term.weight, found, None)
        return Visit({batch: self._sums(found[None]).cpu().numpy()}, entries)

    def _entries(self, term: Term, start: int, stop: int, on_step: OnStep) -> Tensor:
        """Diagonal entries of the rows from ``start`` to ``stop``."""
        operator, count = self.operator, stop - start
        block = torch.zeros(
            count, operator.parameters.size, dtype=operator.dtype, device=operator.device
        )
        block[:, start:stop].fill_diagonal_(1.0)
        return term.apply(block, on_step)[:, start:stop].diagonal().double()
