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
        that one.
        """
        wanted = draws if self.sampled else 1
        if self._bounds[-1:] != [wanted]:
            self._bounds = self._rounds_to(wanted)
        while len(self._bounds) > 1:
            start, stop = self._bounds[:2]
            behind = [i for i in self.indices if len(self.cells[i]) < stop]
            yield from self._through(behind, partial(self._visit, wanted=stop))
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
        next(self.passes.of(self.operator.indices[0]))

    def _rounds_to(self, wanted: int) -> list[int]:
        """Where rounds begin and end, each of as many draws as memory allows."""
        began = min(len(cells) for cells in self.cells.values())
        most = power_of_two(max(2, BLOCK_BYTES // (8 * max(1, self.operator.parameters.size))))
        rounds = groups(self.first + began, self.first + wanted, most)
        return [began, *(stop - self.first for _, stop in rounds)]

    def _visit(self, batch: int, wanted: int) -> Generator[None, None, Visit]:
        """A batch: its parts, on one graph each, and on that all its columns."""
        done = len(self.cells[batch])
        size, masses = self.operator.parameters.size, self.operator.masses
        kept = torch.zeros(wanted - done, size, dtype=torch.float64, device=self.operator.device)
        for first, live in self.passes.of(batch):
            for row, sign, columns in self._estimates(batch, live, first, done, wanted):
                kept[row] += sign * live.squares(columns)
                yield
        kept /= masses[batch]
        weight, entries = masses[batch] / sum(masses), None
        if self.stream is not None and self.sampled:
            entries = self.stream.of_batch(batch, weight)
            self.stream.add(entries, kept, self.first + done)
        elif self.stream is not None:
            entries = BatchSum(batch, weight, kept[0], None)
        return Visit({batch: self._sums(kept).cpu().numpy()}, entries)

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
