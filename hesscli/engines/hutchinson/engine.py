"""Hutchinson's estimator of a trace, whole and by layer, from one table of quadratic forms.

E[vᵀAv] = tr A for probes of independent entries of mean 0 and variance 1 (Hutchinson 1990, "A
stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines"), and
E[v_lᵀ(Av)_l] = tr A_ll for the entries of one layer, from the same product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hesscli.engines.hutchinson.probes import Probes
from hesscli.engines.hutchinson.statistics import Array, Design, Table, reduce_table
from hesscli.operators.base import Operator, Term
from hesscli.streams import Distribution


class Hutchinson:
    """A batch × probe × layer table that grows round by round.

    Args:
        operator: the matrix.
        seed: of the probes.
        design: ``fresh`` probes for every batch, or one set ``shared`` by all.
        distribution: of the probes' entries.
        first_probe: number of the first probe, so that runs can be split by probes.
        batches: only so many of the first batches (a pilot), default all.

    ``cells[b]`` is ``(P_b, L + 1)``: vᵀAv by layer, and in the last column their sum.
    """

    def __init__(
        self,
        operator: Operator,
        *,
        seed: int,
        design: Design,
        distribution: Distribution = "rademacher",
        first_probe: int = 0,
        batches: int | None = None,
    ) -> None:
        self.operator, self.design, self.first_probe = operator, design, first_probe
        self.probes = Probes(operator, seed, design, distribution)
        masses = operator.problem.masses
        self.indices = [i for i, mass in enumerate(masses) if mass > 0][:batches]
        self._layers = operator.parameters.layer_index().to(operator.problem.device)
        columns = len(operator.parameters.layers) + 1
        self.cells = {index: np.empty((0, columns)) for index in self.indices}

    @property
    def num_probes(self) -> int:
        """Probes that every batch in the table has seen."""
        return min((len(self.cells[i]) for i in self._seen()), default=0)

    def extend(self, num_probes: int) -> Iterator[None]:
        """Bring every batch to ``num_probes``, yielding after each block of products.

        A batch's graph is made once and serves all its probes of this round. Stopping between
        blocks loses only the batch at hand.
        """
        for term in self.operator.batches():
            if term.index not in self.cells:
                break
            done = len(self.cells[term.index])
            blocks: list[Tensor] = []
            for start in range(done, num_probes, self.operator.block_size):
                count = min(self.operator.block_size, num_probes - start)
                blocks.append(self._forms(term, self.first_probe + start, count))
                yield
            if blocks:
                new = torch.cat(blocks).cpu().numpy()
                self.cells[term.index] = np.concatenate([self.cells[term.index], new])

    def _forms(self, term: Term, first: int, count: int) -> Tensor:
        """Quadratic forms of a block, float64 ``(count, L + 1)`` on the device."""
        block = self.probes.block(term.index, first, count)
        forms = block * term.apply(block)
        parts = torch.split(forms, list(self.operator.parameters.sizes), dim=1)
        sums = torch.stack([part.sum(1, dtype=torch.float64) for part in parts], dim=1)
        layers = sums.new_zeros(count, len(self.operator.parameters.layers))
        layers.index_add_(1, self._layers, sums)
        return torch.cat([layers, layers.sum(1, keepdim=True)], dim=1)

    def table(self) -> Table | None:
        """What the table says so far, or None before two probes on two batches (if there are two).

        Batches that a stopped round did not reach are left out; with shared probes, only the
        probes that all the others have seen count.
        """
        seen = self._seen()
        if len(seen) < min(2, len(self.indices)):
            return None
        cells: Sequence[Array] = [self.cells[i] for i in seen]
        if self.design == "shared":
            common = min(len(cell) for cell in cells)
            cells = [cell[:common] for cell in cells]
        masses = self.operator.problem.masses
        return reduce_table(cells, [masses[i] for i in seen], self.design)

    def coverage(self) -> float:
        """Share of the kept examples in the batches that :meth:`table` rests on."""
        counts = self.operator.problem.data.counts
        return sum(counts[i] for i in self._seen()) / sum(counts[i] for i in self.indices)

    def _seen(self) -> list[int]:
        return [i for i in self.indices if len(self.cells[i]) >= 2]
