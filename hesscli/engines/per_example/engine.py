"""The diagonal of the Gauss-Newton matrix without probes: exact, or from random columns.

G = Σ_i J_iᵀ A_i J_i / M with A_i = Σ_s ± s_i s_iᵀ the Hessian of example i's loss in its outputs,
so diag G = Σ_i Σ_s ± (J_iᵀ s_i)² / M: as many backward passes as there are columns s, whatever
the number of parameters. Random columns in their place are unbiased.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hesscli import streams
from hesscli.engines.entries import Stream
from hesscli.engines.hutchinson.table import Array
from hesscli.engines.per_example.passes import Pass, SquaredJacobian
from hesscli.errors import UsageError
from hesscli.meter import Meter
from hesscli.operators.base import BLOCK_BYTES
from hesscli.operators.gauss_newton import require_examples
from hesscli.parameters import LayerSums, Parameters
from hesscli.problem.batches import Batch
from hesscli.problem.losses import Loss
from hesscli.problem.output_hessian import Columns, columns_at
from hesscli.problem.precision import doubled
from hesscli.problem.problem import Problem, WeightedBatch

MakeColumns = Callable[[Loss, Tensor, Batch], Columns]

_SAMPLE = 16
_DRAWS = 0xD4A35
"""Separates label streams from other uses of a seed."""


class ExactDiagonal:
    """diag G over a problem's batches: a table of traces, and the entries if they are wanted.

    Args:
        problem: its loss's output Hessian must be known and its examples independent.
        parameters: the entries; default all trainable ones.
        sampled: random columns, as many as are asked for, in place of all of them.
        columns: those at a batch's outputs; default of the loss's output Hessian.
        seed: of the random columns.
        batches: only so many of the first batches (a pilot), default all.
        stream: takes the estimates of single entries, where they are wanted.
        meter: counts the passes; default a new one.

    ``cells[b]`` is ``(draws, L + 1)``, as Hutchinson's tables have it: a batch's traces by layer
    and in the last column their sum, without weight decay; one row where they are exact.

    Raises:
        UsageError: the loss's output Hessian is not known, an example's gradient does not
            exist, or the exact diagonal would take too many backward passes.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        parameters: Parameters | None = None,
        sampled: bool = False,
        columns: MakeColumns = columns_at,
        seed: int = 0,
        batches: int | None = None,
        stream: Stream | None = None,
        meter: Meter | None = None,
    ) -> None:
        require_examples(problem, "ggn")
        self.problem, self.sampled, self.seed = problem, sampled, seed
        self.parameters = problem.parameters if parameters is None else parameters
        self._columns = columns
        found = columns_of_sample(problem, columns)
        self.num_columns = found.num_columns
        if not sampled and self.num_columns > found.most:
            raise UsageError(
                "the exact diagonal takes one backward pass for each column of the outputs",
                f"{self.num_columns} columns",
                "--method split, which draws columns",
            )
        self.meter = Meter() if meter is None else meter
        self._jacobian = SquaredJacobian(problem, self.parameters, self.meter)
        self._sums, self.stream = LayerSums(self.parameters), stream
        self.indices = [i for i, mass in enumerate(problem.masses) if mass > 0][:batches]
        empty: Array = np.empty((0, self._sums.num_layers + 1))
        self.cells = dict.fromkeys(self.indices, empty)

    @property
    def generic(self) -> tuple[str, ...]:
        """Parameters whose per-example gradients are made one example at a time."""
        return tuple(self.parameters[i].name for i in sorted(self._jacobian.generic))

    @property
    def streams(self) -> list[Stream]:
        """Where single entries are kept, if they are."""
        return [] if self.stream is None else [self.stream]

    @property
    def count(self) -> int:
        """Random columns that every batch in the table has had; 1 where it is exact."""
        return min((len(self.cells[i]) for i in self.seen), default=0)

    @property
    def seen(self) -> list[int]:
        """Batches that are complete; random columns need two for their error bar."""
        return [i for i in self.indices if len(self.cells[i]) >= (2 if self.sampled else 1)]

    def aligned(self, indices: Sequence[int]) -> list[Array]:
        """The cells of some batches, of equal length where entries are kept.

        Entries know nothing of a round that is not complete but is not the first.
        """
        common = None if self.stream is None else self.count
        return [self.cells[i][:common] for i in indices]

    def extend(self, draws: int = 1) -> Iterator[None]:
        """Bring every batch to so many random columns, or to its exact diagonal.

        Yields after each block of columns; stopping within a batch loses that batch.
        """
        wanted = draws if self.sampled else 1
        began = min(len(cells) for cells in self.cells.values())
        most = max(2, BLOCK_BYTES // (8 * max(1, self.parameters.size)))
        rounds = max(1, (wanted - began) // most) if wanted > began else 0
        bounds = np.linspace(began, wanted, rounds + 1).astype(int).tolist()
        for start, stop in itertools.pairwise(bounds):
            for batch in map(self.problem.batch, self.indices):
                if len(self.cells[batch.index]) < stop:
                    yield from self._visit(batch, len(self.cells[batch.index]), stop)
            if self.stream is not None:
                self.stream.close_round(stop - start)

    def verify(self) -> None:
        """Put the problem to the test on a few examples.

        Raises:
            UnsoundError: examples depend on each other.
        """
        next(self._jacobian.passes(next(self.problem.batches())))

    def traces_of(self, batch: WeightedBatch) -> Array:
        """Traces ``(L + 1,)`` of a few examples by one draw, for comparisons."""
        live = Pass(self._jacobian, batch)
        drawn = self._columns(self.problem.loss, live.outputs, batch.data).draw(0)
        squares = torch.stack([sign * live.squares([column]) for sign, column in drawn])
        return np.asarray(self._sums(squares.sum(0, keepdim=True))[0].cpu().numpy())

    def _visit(self, batch: WeightedBatch, done: int, wanted: int) -> Iterator[None]:
        """Add a batch: its parts, on one graph each, and on that all its columns."""
        size = self.parameters.size
        kept = torch.zeros(wanted - done, size, dtype=torch.float64, device=self.problem.device)
        for first, live in self._jacobian.passes(batch):
            for row, sign, columns in self._estimates(live, first, done, wanted):
                kept[row] += sign * live.squares(columns)
                yield
        kept /= self.problem.masses[batch.index]
        if self.stream is not None and self.sampled:
            entries = self.stream.of_batch(batch.index, batch.weight)
            self.stream.add(entries, kept, done)
            self.stream.keep(entries)
        elif self.stream is not None:
            self.stream.add_exact(batch.index, batch.weight, kept[0])
        rows = self._sums(kept).cpu().numpy()
        self.cells[batch.index] = np.concatenate([self.cells[batch.index], rows])

    def _estimates(
        self, live: Pass, first: int, done: int, wanted: int
    ) -> Iterator[tuple[int, float, list[Tensor]]]:
        """Columns of one sign in blocks, with the row of the estimate that they are a part of."""
        columns = self._columns(self.problem.loss, live.outputs, live.batch.data)
        if not self.sampled:
            signed = map(columns.column, range(columns.num_columns))
            for sign, block in itertools.groupby(signed, lambda pair: pair[0]):
                each = (column for _, column in block)
                while part := list(itertools.islice(each, live.block_size)):
                    yield 0, sign, part
            return
        for draw in range(done, wanted):
            stream = streams.key(_DRAWS, self.seed, live.batch.index, draw)
            for sign, column in columns.draw(stream, first):
                yield draw - done, sign, [column]


def columns_of_sample(problem: Problem, columns: MakeColumns = columns_at) -> Columns:
    """The columns of a few examples, which say how many backward passes the exact diagonal takes.

    Raises:
        UsageError: the loss's output Hessian is not known.
    """
    sample = problem.sample(_SAMPLE)
    outputs = problem.fixed_outputs(sample.data)
    problem.loss.check(outputs, sample.data)
    return columns(problem.loss, outputs, sample.data)


def relative_rounding(engine: ExactDiagonal) -> float | None:
    """Error of a layer's traces relative to their size, at most, on a few examples.

    One measurement may come out small by chance: a unit in the last place is added to it. None
    where the model does not run in float64.
    """
    problem = engine.problem
    if not problem.precision.is_float64:
        return None
    rough = engine.traces_of(problem.sample(_SAMPLE))
    with doubled(problem):
        fine = engine.traces_of(problem.sample(_SAMPLE))
    unit = torch.finfo(problem.dtype).eps
    least = unit * abs(fine[-1])  # of a layer that an invariance zeroes
    size = np.abs(fine).clip(min=max(least, np.finfo(float).tiny))
    return float(np.max(np.abs(rough - fine) / size)) + unit
