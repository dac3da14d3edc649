"""The diagonal of the Gauss-Newton matrix without probes: exact, or from random columns.

G = Σ_i J_iᵀ A_i J_i / M with A_i = S_i S_iᵀ the Hessian of example i's loss in its outputs, so
diag G = Σ_i Σ_s (J_iᵀ s_i)² / M over the columns s of S: as many backward passes as S has
columns, whatever the number of parameters. A random column in their place is unbiased.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscli import streams
from hesscli.engines.exact_diagonal.squares import Pass, SquaredJacobian
from hesscli.engines.hutchinson.statistics import Array
from hesscli.errors import UsageError
from hesscli.operators.gauss_newton import require_outputs
from hesscli.parameters import Parameters
from hesscli.problem.factors import factor_of, has_factor
from hesscli.problem.problem import Problem, WeightedBatch

MAX_COLUMNS = 1024
"""Columns up to which the exact diagonal is made."""
_DRAWS = 0xD4A35
"""Separates label streams from other uses of a seed."""


@dataclass(frozen=True)
class GaussNewtonDiagonal:
    """What the batches seen so far say.

    Attributes:
        diagonal: float64 ``(d,)`` on the CPU, weight decay included.
        stderr: of each entry, from the draws alone; None when exact or from a single draw.
        cells: for each batch the traces of its own matrix, without weight decay: ``(draws, L +
            1)``, by layer and in the last column their sum, as Hutchinson's tables have them;
            one row when exact.
        masses: weight mass of each of these batches.
        exact: no draw is in it.
        coverage: share of the kept examples, in batches that weigh something, that it rests on.
        gradients: work so far in full-data gradients.
        generic: parameters whose per-example gradients were made one example at a time.
    """

    diagonal: Tensor
    stderr: Tensor | None
    cells: tuple[Array, ...]
    masses: tuple[float, ...]
    exact: bool
    coverage: float
    gradients: float
    generic: tuple[str, ...]


class ExactDiagonal:
    """Accumulates diag G over a problem's batches.

    Args:
        problem: its loss's output Hessian must be known and its examples independent.
        parameters: the entries; default all trainable ones.
        draws: random columns for each batch, or None for all columns and the exact diagonal.
        seed: of the draws.

    Raises:
        UsageError: the loss's output Hessian is not known, an example's gradient does not
            exist, or the exact diagonal would take too many backward passes.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        parameters: Parameters | None = None,
        draws: int | None = None,
        seed: int = 0,
    ) -> None:
        _require_examples(problem)
        self.problem, self.draws, self.seed = problem, draws, seed
        self.parameters = problem.parameters if parameters is None else parameters
        self.num_columns = columns_of(problem)
        if draws is None and self.num_columns > MAX_COLUMNS:
            raise UsageError(
                "the exact diagonal takes one backward pass for each column of the outputs",
                f"{self.num_columns} columns",
                "random columns: draws=1",
            )
        self._jacobian = SquaredJacobian(problem, self.parameters)
        self._layers = self.parameters.layer_index().to(problem.device)
        self._cells: dict[int, Array] = {}
        self._sum = torch.zeros(self.parameters.size, dtype=torch.float64, device=problem.device)
        self._variance = torch.zeros_like(self._sum)

    def run(self) -> Generator[None, None, None]:
        """Visit the batches that were not visited, yielding after each block of columns.

        Stopping within a batch loses that batch.
        """
        for batch in self.problem.batches():
            if batch.index not in self._cells:
                yield from self._visit(batch)

    def result(self) -> GaussNewtonDiagonal | None:
        """What is known so far, or None before the first batch is complete."""
        if not self._cells:
            return None
        masses = tuple(self.problem.masses[index] for index in self._cells)
        counts = self.problem.data.counts
        weighty = [n for n, m in zip(counts, self.problem.masses, strict=True) if m > 0]
        stderr = self._variance.sqrt().cpu() / sum(masses) if (self.draws or 1) > 1 else None
        return GaussNewtonDiagonal(
            diagonal=self._sum.cpu() / sum(masses) + self.problem.weight_decay,
            stderr=stderr,
            cells=tuple(self._cells.values()),
            masses=masses,
            exact=self.draws is None,
            coverage=sum(counts[index] for index in self._cells) / sum(weighty),
            gradients=self._jacobian.gradients,
            generic=tuple(self.parameters[i].name for i in sorted(self._jacobian.generic)),
        )

    def _visit(self, batch: WeightedBatch) -> Iterator[None]:
        """Add a batch; its parts have draws of their own, so that their variances add up."""
        rows = torch.zeros(self.draws or 1, len(self.parameters.layers) + 1, dtype=torch.float64)
        mean, variance = torch.zeros_like(self._sum), torch.zeros_like(self._sum)
        for first, live in self._jacobian.passes(batch):
            moments = _Moments(self._sum)
            for blocks in self._estimates(live, first):
                estimate = torch.zeros_like(mean)
                for columns in blocks:
                    estimate += live.squares(columns)
                    yield
                rows[moments.count] += self._by_layer(estimate).cpu()
                moments.add(estimate)
            mean += moments.mean
            variance += moments.variance_of_mean
        self._sum += mean
        self._variance += variance
        self._cells[batch.index] = rows.numpy() / self.problem.masses[batch.index]

    def _estimates(self, live: Pass, first: int) -> Iterator[Iterator[list[Tensor]]]:
        """For each estimate of a part's diagonal, the columns that it sums over, in blocks.

        One estimate from all columns of the factor, or one from every random column.
        """
        factor = factor_of(self.problem.loss, live.outputs, live.batch.data)
        if self.draws is None:
            size, count = live.block_size, factor.num_columns
            starts = range(0, count, size)
            yield ([factor.column(j) for j in range(s, min(s + size, count))] for s in starts)
            return
        for draw in range(self.draws):
            stream = streams.key(_DRAWS, self.seed, live.batch.index, draw)
            yield iter([[factor.draw(stream, first)]])

    def _by_layer(self, squares: Tensor) -> Tensor:
        """Sums over each layer's entries, and over all: ``(L + 1,)``."""
        sums = torch.stack([part.sum() for part in self.parameters.split(squares)])
        layers = sums.new_zeros(len(self.parameters.layers)).index_add_(0, self._layers, sums)
        return torch.cat([layers, layers.sum(0, keepdim=True)])


class _Moments:
    """Mean of equally distributed vectors, and its variance (Welford's recurrence)."""

    def __init__(self, like: Tensor) -> None:
        self.count, self.mean, self._scatter = 0, torch.zeros_like(like), torch.zeros_like(like)

    def add(self, value: Tensor) -> None:
        self.count += 1
        change = value - self.mean
        self.mean += change / self.count
        self._scatter += change * (value - self.mean)

    @property
    def variance_of_mean(self) -> Tensor:
        """Zero for a single vector, which tells nothing of its variance."""
        return self._scatter / (self.count * max(1, self.count - 1))


def columns_of(problem: Problem) -> int:
    """Backward passes that the exact diagonal takes for each batch.

    Raises:
        UsageError: the loss's output Hessian is not known.
    """
    example = problem.sample(1)
    with torch.no_grad():
        outputs = problem.outputs(example.data)
    problem.loss.check(outputs, example.data)
    return factor_of(problem.loss, outputs, example.data).num_columns


def _require_examples(problem: Problem) -> None:
    """Refuse problems whose per-example gradients do not exist or cannot be told apart."""
    require_outputs(problem, "ggn")
    if not has_factor(problem.loss):
        raise UsageError(
            "the loss's Hessian in the model's outputs is not known",
            f"[loss] {problem.loss.name!r}",
            "a named loss, or --method hutchinson",
        )
    if (module := problem.couples_examples) is not None:
        raise UsageError(
            "per-example gradients do not exist here",
            f"{module} mixes the examples of a batch",
            "[model] training = false",
        )
    if not problem.data.sliceable:
        raise UsageError(
            "per-example gradients need batches with one row an example",
            "batches whose tensors differ in length",
            "--method hutchinson",
        )
