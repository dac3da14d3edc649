"""Hutchinson's estimator of a trace, whole and by layer, from one table of quadratic forms.

E[vᵀAv] = tr A for probes of independent entries of mean 0 and variance 1 (Hutchinson 1990, "A
stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines"), and
E[v ⊙ Av] = diag A from the same product (Bekas, Kokiopoulou & Saad 2007, "An estimator for the
diagonal of a matrix"), so that layers and single entries come with the total.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from hesscli.engines.cells import Cells, Visit
from hesscli.engines.entries import GROUP, BatchSum, Stream, groups, power_of_two
from hesscli.engines.hutchinson.designs import Design, Plain, Probes
from hesscli.engines.hutchinson.table import Sharing, Table, reduce_table
from hesscli.meter import OnStep, go_on
from hesscli.operators.source import Source, Term
from hesscli.parameters import Parameters
from hesscli.randomness import Distribution
from hesscli.state import State


class Hutchinson(Cells):
    """A batch × probe × layer table that grows round by round.

    Args:
        operator: the matrix.
        seed: of the probes.
        sharing: ``fresh`` probes for every batch, or one set ``shared`` by all.
        distribution: of the probes' entries.
        first: number of the first probe, so that runs can be split by probes.
        batches: the numbers of those that it goes through, default all that weigh something.
        whole: the network's parameters where the operator has but some of them; the table's
            columns are the whole's layers.
        design: from probes to estimates of a batch's diagonal; default one product each.
        stream: takes the estimates of single entries, where they are wanted.
        round_after: from the probes of every batch to those after a round, where one is not to
            bring all that are wanted: what is stopped on the way has no more than that to lose.

    A batch has an estimate vᵀAv for each probe.
    """

    phase = "probing"
    least = 2

    def __init__(
        self,
        operator: Source,
        *,
        seed: int,
        sharing: Sharing = "fresh",
        distribution: Distribution = "rademacher",
        first: int = 0,
        batches: Sequence[int] | None = None,
        whole: Parameters | None = None,
        design: Design | None = None,
        stream: Stream | None = None,
        round_after: Callable[[int], int] | None = None,
    ) -> None:
        super().__init__(operator, first=first, batches=batches, whole=whole, stream=stream)
        self.sharing, self.distribution = sharing, distribution
        self.probes = Probes(operator, seed, sharing, distribution)
        self.design = Plain() if design is None else design
        self._round_after = round_after

    def extend(self, num_probes: int, on_step: OnStep = go_on) -> Iterator[None]:
        """Bring every batch to ``num_probes``, yielding between two blocks of products.

        A batch's graph is made once and serves all its probes of this round. Stopping on the way
        loses only the batch at hand.

        Args:
            num_probes: of each batch.
            on_step: called between two products of a block; may end it.
        """
        yield from self.design.prepare()
        began = min(len(cells) for cells in self.cells.values())
        for wanted in self._rounds(began, num_probes):
            behind = [i for i in self.indices if len(self.cells[i]) < wanted]
            yield from self._through(behind, partial(self._visit, wanted=wanted, on_step=on_step))
        if num_probes > began:
            if self.stream is not None:
                self.stream.close_round(num_probes - began)
            yield

    def _rounds(self, began: int, num_probes: int) -> Iterator[int]:
        """Probes of every batch after each round, up to those that are wanted."""
        while self._round_after is not None and (began := self._round_after(began)) < num_probes:
            yield began
        yield num_probes

    def _visit(self, batch: int, wanted: int, on_step: OnStep) -> Generator[None, None, Visit]:
        (term,) = self.operator.batches([batch])
        forms = list[Tensor]()
        entries = None if self.stream is None else self.stream.of_batch(batch, term.weight)
        for start, stop in self._blocks(len(self.cells[batch]), wanted):
            if forms:
                yield
            forms.append(self._estimated(term, start, stop, entries, on_step))
        new = torch.cat(forms).cpu().numpy() + self.design.offset(batch)
        return Visit({batch: new}, entries)

    def _estimated(
        self, term: Term, start: int, stop: int, entries: BatchSum | None, on_step: OnStep
    ) -> Tensor:
        """Sums of some probes' estimates, which are gone then but for what is kept of them."""
        block = self.probes.block(term.index, start, stop - start)
        estimates = self.design.estimates(term, block, on_step)
        if self.stream is not None and entries is not None:
            self.stream.add(entries, estimates, start)
        return self._sums(estimates)

    def _blocks(self, done: int, wanted: int) -> Iterator[tuple[int, int]]:
        """Numbers of probes in blocks that memory allows, of two and more to be centred."""
        least = 1 if self.stream is None else 2
        most = power_of_two(max(least, min(GROUP, self.operator.block_size)))
        return groups(self.first + done, self.first + wanted, most)

    def table(self) -> Table | None:
        """What the table says so far, or None before two probes on two batches (if there are two).

        Batches that a stopped round did not reach are left out; with shared probes, only the
        probes that all the others have seen count.
        """
        if len(self.seen) < min(2, len(self.indices)):
            return None
        masses = [self.operator.masses[i] for i in self.seen]
        return reduce_table(self.aligned(self.seen), masses, self.sharing)

    def state_dict(self) -> State:
        """With what the design has made before any probe."""
        return super().state_dict() | {"design": self.design.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Be where an engine of the same matrix, probes and design was."""
        super().load_state_dict(state)
        self.design.load_state_dict(state["design"])

    def join(self, state: State) -> None:
        """Add other batches, or other probes, on the same design."""
        super().join(state)
        self.design.join(state["design"])

    @property
    def streams(self) -> list[Stream]:
        """The streams of single entries, the design's among them."""
        return [s for s in (self.stream, self.design.stream) if s is not None]

    @property
    def _together(self) -> bool:
        return self.sharing == "shared" or super()._together
