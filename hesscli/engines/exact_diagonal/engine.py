"""The diagonal of the Gauss-Newton matrix without probes: exact, or from random columns.

G = Σ_i J_iᵀ A_i J_i / M with A_i = S_i S_iᵀ the Hessian of example i's loss in its outputs, so
diag G = Σ_i Σ_s (J_iᵀ s_i)² / M over the columns s of S: as many backward passes as S has
columns, whatever the number of parameters. A random column in their place is unbiased.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hesscli import streams
from hesscli.engines.entries import Stream
from hesscli.engines.exact_diagonal.passes import Pass
from hesscli.engines.exact_diagonal.squares import SquaredJacobian
from hesscli.engines.hutchinson.statistics import Array
from hesscli.engines.layers import LayerSums
from hesscli.errors import UsageError
from hesscli.operators.base import BLOCK_BYTES
from hesscli.operators.gauss_newton import require_examples
from hesscli.parameters import Parameters
from hesscli.problem.batches import Batch
from hesscli.problem.factors import Factor, factor_of
from hesscli.problem.losses import Loss
from hesscli.problem.precision import doubled
from hesscli.problem.problem import Problem, WeightedBatch

MakeFactor = Callable[[Loss, Tensor, Batch], Factor]

MAX_COLUMNS = 1024
"""Columns up to which the exact diagonal is made."""
_SAMPLE = 16
_DRAWS = 0xD4A35
"""Separates label streams from other uses of a seed."""


class ExactDiagonal:
    """diag G over a problem's batches: a table of traces, and the entries if they are wanted.

    Args:
        problem: its loss's output Hessian must be known and its examples independent.
        parameters: the entries; default all trainable ones.
        sampled: random columns, as many as are asked for, in place of all of them.
        factor: the factor at a batch's outputs; default that of the loss's output Hessian.
        seed: of the random columns.
        batches: only so many of the first batches (a pilot), default all.
        stream: takes the estimates of single entries, where they are wanted.

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
        factor: MakeFactor = factor_of,
        seed: int = 0,
        batches: int | None = None,
        stream: Stream | None = None,
    ) -> None:
        require_examples(problem, "ggn")
        self.problem, self.sampled, self.seed = problem, sampled, seed
        self.parameters = problem.parameters if parameters is None else parameters
        self._factor = factor
        self.num_columns = columns_of(problem, factor)
        if not sampled and self.num_columns > MAX_COLUMNS:
            raise UsageError(
                "the exact diagonal takes one backward pass for each column of the outputs",
                f"{self.num_columns} columns",
                "--method split, which draws columns",
            )
        self._jacobian = SquaredJacobian(problem, self.parameters)
        self._sums, self.stream = LayerSums(self.parameters), stream
        self.indices = [i for i, mass in enumerate(problem.masses) if mass > 0][:batches]
        empty: Array = np.empty((0, self._sums.num_layers + 1))
        self.cells = dict.fromkeys(self.indices, empty)

    @property
    def gradients(self) -> float:
        """Work so far in full-data gradients."""
        return self._jacobian.gradients

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
        """Traces ``(L + 1,)`` of a few examples by one column, for comparisons."""
        live = Pass(self._jacobian, batch)
        column = self._factor(self.problem.loss, live.outputs, batch.data).draw(0)
        return np.asarray(self._sums(live.squares([column])[None])[0].cpu().numpy())

    def _visit(self, batch: WeightedBatch, done: int, wanted: int) -> Iterator[None]:
        """Add a batch: its parts, on one graph each, and on that all its columns."""
        size = self.parameters.size
        kept = torch.zeros(wanted - done, size, dtype=torch.float64, device=self.problem.device)
        for first, live in self._jacobian.passes(batch):
            for row, columns in self._estimates(live, first, done, wanted):
                kept[row] += live.squares(columns)
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
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """Columns in blocks, each with the row of the estimate that it is a part of."""
        factor = self._factor(self.problem.loss, live.outputs, live.batch.data)
        if not self.sampled:
            size, count = live.block_size, factor.num_columns
            for start in range(0, count, size):
                yield 0, [factor.column(j) for j in range(start, min(start + size, count))]
            return
        for draw in range(done, wanted):
            stream = streams.key(_DRAWS, self.seed, live.batch.index, draw)
            yield draw - done, [factor.draw(stream, first)]


def columns_of(problem: Problem, factor: MakeFactor = factor_of) -> int:
    """Backward passes that the exact diagonal takes for each batch.

    Raises:
        UsageError: the loss's output Hessian is not known.
    """
    example = problem.sample(1)
    outputs = problem.fixed_outputs(example.data)
    problem.loss.check(outputs, example.data)
    return factor(problem.loss, outputs, example.data).num_columns


def relative_rounding(engine: ExactDiagonal) -> float | None:
    """Error of a layer's traces relative to their size, at most, on a few examples.

    None where the model does not run in float64.
    """
    problem = engine.problem
    if not problem.precision.is_float64:
        return None
    rough = engine.traces_of(problem.sample(_SAMPLE))
    with doubled(problem):
        fine = engine.traces_of(problem.sample(_SAMPLE))
    least = torch.finfo(problem.dtype).eps * abs(fine[-1])  # of a layer that an invariance zeroes
    size = np.abs(fine).clip(min=max(least, np.finfo(float).tiny))
    return float(np.max(np.abs(rough - fine) / size)) + float(np.finfo(float).eps)
