"""The diagonal of the Gauss-Newton matrix without probes: exact, or from random columns.

G = Σ_i J_iᵀ A_i J_i / M with A_i = Σ_s ± s_i s_iᵀ the Hessian of example i's loss in its outputs,
so diag G = Σ_i Σ_s ± (J_iᵀ s_i)² / M: as many backward passes as there are columns s, whatever
the number of parameters. Random columns in their place are unbiased.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from hesscli import randomness
from hesscli.engines.cells import Cells, Visit
from hesscli.engines.entries import BatchSum, Stream, groups, power_of_two
from hesscli.errors import UsageError
from hesscli.meter import OnStep, go_on
from hesscli.operators.base import BLOCK_BYTES
from hesscli.operators.source import ByExample, Pass
from hesscli.state import State

_DRAWS = 0xD4A35
"""Separates label streams from other uses of a seed."""


class PerExample(Cells):
    """diag G over a matrix's batches: a table of traces, and the entries if they are wanted.

    Args:
        operator: G, whose output Hessian must be known and whose examples independent.
        sampled: random columns, as many as are asked for, in place of all of them.
        seed: of the random columns.
        first: number of the first random column, so that runs can be split by them.
        batches: the numbers of those that it goes through, default all that weigh something.
        stream: takes the estimates of single entries, where they are wanted.

    A batch has an estimate for each draw, or one that is exact.

    Raises:
        UsageError: the loss's output Hessian is not known, an example's gradient does not
            exist, or the exact diagonal would take too many backward passes.
    """

    phase = "squaring gradients"

    def __init__(
        self,
        operator: ByExample,
        *,
        sampled: bool = False,
        seed: int = 0,
        first: int = 0,
        batches: Sequence[int] | None = None,
        stream: Stream | None = None,
    ) -> None:
        super().__init__(operator, first=first, batches=batches, stream=stream)
        self.sampled, self.seed, self.least = sampled, seed, 2 if sampled else 1
        self.passes = operator.passes()
        found = self.passes.columns
        self.num_columns = found.num_columns
        self._bounds: list[int] = []
        if not sampled and self.num_columns > found.most:
            raise UsageError(
                "the exact diagonal takes one backward pass for each column of the outputs",
                f"{self.num_columns} columns",
                "--method split, which draws columns",
            )

    def extend(self, draws: int = 1, _on_step: OnStep = go_on) -> Iterator[None]:
        """Bring every batch to so many random columns, or to its exact diagonal.

        Yields before each batch and after each block of columns; stopping within a batch loses
        that one, or those that are computed as one.
        """
        wanted = draws if self.sampled else 1
        if self._bounds[-1:] != [wanted]:
            self._bounds = self._rounds_to(wanted)
        while len(self._bounds) > 1:
            start, stop = self._bounds[:2]
            yield from self._through(self._behind(stop), partial(self._visit, wanted=stop))
            if self.stream is not None:
                self.stream.close_round(stop - start)
            del self._bounds[0]

    def state_dict(self) -> State:
        """With the rounds of an extension that is under way."""
        return super().state_dict() | {"bounds": self._bounds}

    def load_state_dict(self, state: State) -> None:
        """Be where an engine of the same matrix was."""
        super().load_state_dict(state)
        self._bounds = list(state["bounds"])

    def verify(self) -> None:
        """Put the operator to the test on a few examples.

        Raises:
            UnsoundError: examples depend on each other.
        """
        next(self.passes.of(self.operator.indices[:1]))

    def _rounds_to(self, wanted: int) -> list[int]:
        """Where rounds begin and end, each of as many draws as memory allows."""
        began = min(len(cells) for cells in self.cells.values())
        most = power_of_two(max(2, BLOCK_BYTES // (8 * max(1, self.operator.parameters.size))))
        rounds = groups(self.first + began, self.first + wanted, most)
        return [began, *(stop - self.first for _, stop in rounds)]

    def _behind(self, stop: int) -> Sequence[Sequence[int]]:
        """Batches that lack estimates, some of them as one.

        Sums over layers are taken batch by batch all the same. Entries are not, so that batches
        stay alone where their differences speak of others; and so they do where columns are drawn,
        which are each batch's own.
        """
        behind = [index for index in self.indices if len(self.cells[index]) < stop]
        source = self.operator
        speaks_of_others = len(self.indices) < len(source.indices) or (
            source.sampling_fraction not in (None, 1)
        )
        if self.sampled or (self.stream is not None and speaks_of_others):
            return [(index,) for index in behind]
        return self.passes.joint(behind)

    def _visit(self, batches: Sequence[int], wanted: int) -> Generator[None, None, Visit]:
        """Some batches: their parts, on one graph each, and on that all their columns."""
        done = len(self.cells[batches[0]])
        parameters, device = self.operator.parameters, self.operator.device
        counts = torch.tensor([self.operator.counts[index] for index in batches], device="cpu")
        owners = torch.arange(len(batches), device="cpu").repeat_interleave(counts).to(device)
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        sums = zeros(wanted - done, len(batches), len(parameters))
        entries = zeros(0 if self.stream is None else len(sums), parameters.size)
        tells_all = self.stream is not None and len(batches) == 1
        for first, live in self.passes.of(batches):
            for row, sign, columns in self._estimates(batches[0], live, first, done, wanted):
                pulled = live.pull(columns)
                if self.stream is not None:
                    entries[row].add_(live.squares(pulled), alpha=sign)
                if not tells_all:
                    norms = live.norms(pulled)
                    sums[row].index_add_(0, owners[first : first + len(norms)], norms, alpha=sign)
                yield
        masses = [self.operator.masses[index] for index in batches]
        if tells_all:
            own = {batches[0]: self._sums(entries) / masses[0]}
        else:
            own = {
                batch: self._sums.of_tensors(sums[:, place] / mass)
                for place, (batch, mass) in enumerate(zip(batches, masses, strict=True))
            }
        rows = {batch: layers.cpu().numpy() for batch, layers in own.items()}
        return Visit(rows, self._entries(batches[0], sum(masses), entries, done))

    def _entries(self, batch: int, mass: float, rows: Tensor, done: int) -> BatchSum | None:
        """What batches that were computed as one have of the diagonal, where it is wanted."""
        if self.stream is None:
            return None
        weight, rows = mass / sum(self.operator.masses), rows.div_(mass)
        if not self.sampled:
            return BatchSum(batch, weight, rows[0], None)
        found = self.stream.of_batch(batch, weight)
        self.stream.add(found, rows, self.first + done)
        return found

    def _estimates(
        self, batch: int, live: Pass, first: int, done: int, wanted: int
    ) -> Iterator[tuple[int, float, list[Tensor]]]:
        """Columns of one sign in blocks, with the row of the estimate that they are a part of."""
        columns = live.columns
        if not self.sampled:
            signed = map(columns.column, range(columns.num_columns))
            for sign, block in itertools.groupby(signed, lambda pair: pair[0]):
                each = (column for _, column in block)
                while part := list(itertools.islice(each, live.block_size)):
                    yield 0, sign, part
            return
        for draw in range(done, wanted):
            stream = randomness.key(_DRAWS, self.seed, batch, self.first + draw)
            for sign, column in columns.draw(stream, first):
                yield draw - done, sign, [column]
