"""One matrix from up to two sources, and its table read as estimates with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hesscli import world
from hesscli.engines.diagonal import Diagonal
from hesscli.engines.entries import Entries, Part
from hesscli.engines.hutchinson.engine import Hutchinson
from hesscli.engines.hutchinson.table import Array, MeanSquare, Sharing, Table, reduce_table
from hesscli.engines.per_example import PerExample
from hesscli.engines.unit_vectors import UnitVectors
from hesscli.meter import BACKWARD, Meter, OnStep, Spent, go_on, watched
from hesscli.operators.bias import Bias
from hesscli.operators.source import Source
from hesscli.parameters import Parameters
from hesscli.state import State

# -- One matrix from up to two sources: its Gauss-Newton part without probes, and what is probed ---


Engine = PerExample | UnitVectors | Hutchinson

_PRODUCT = 2.0
"""Gradients that a probe's product takes; a random column takes one way back."""
_MOST_UNEVEN = 8
"""Random columns to a probe, or probes to a column: their variances are estimates."""


class Estimator:
    """Tables and entries of a matrix, from whichever sources add up to it.

    ``tr H = tr G + tr R``: with the Gauss-Newton matrix G from per-example gradients and the
    residual R from probes, where it is not zero; or all of the matrix from either.

    Args:
        operator: the matrix; its decay is what neither source has.
        gauss_newton: the source without probes, if any; unit vectors in its place tell all of
            the matrix.
        probes: the source with, if any; at least one of the two.
        entries: where the sources' streams keep single entries, if they do.
        pilot: the batches that the sources go through stand for all.
    """

    def __init__(
        self,
        operator: Source,
        *,
        gauss_newton: PerExample | UnitVectors | None = None,
        probes: Hutchinson | None = None,
        entries: Entries | None = None,
        pilot: bool = False,
    ) -> None:
        self.operator, self.entries, self.pilot = operator, entries, pilot
        self.gauss_newton, self.probes = gauss_newton, probes
        self.draws_per_probe = 1.0
        self.sources: list[Engine] = [s for s in (gauss_newton, probes) if s is not None]
        self._spent = {source: Spent() for source in self.sources}
        self._prepared = Spent()

    @property
    def parameters(self) -> Parameters:
        """The rows of the matrix."""
        return self.operator.parameters

    @property
    def exact(self) -> bool:
        """Whether nothing is drawn at random."""
        return self.probes is None and self.gauss_newton is not None and not self.sampled

    @property
    def sampled(self) -> bool:
        """Whether columns of the output Hessian are drawn at random."""
        return self.gauss_newton is not None and self.gauss_newton.sampled

    @property
    def phase(self) -> str:
        """What it does, in words."""
        return self.sources[-1].phase

    @property
    def sharing(self) -> Sharing:
        """Whether batches have probes of their own."""
        return "fresh" if self.probes is None else self.probes.sharing

    @property
    def indices(self) -> Sequence[int]:
        """The batches that its sources go through."""
        return self.sources[0].indices

    @property
    def reach(self) -> float:
        """The share of the kept examples that is in them."""
        return self._share(self.indices)

    @property
    def partial(self) -> bool:
        """Whether there are batches that its sources pass over, and that they do not stand for."""
        return not self.pilot and len(self.indices) < len(self.operator.indices)

    @property
    def first(self) -> int:
        """The number of the first probe, or random column."""
        return self.sources[-1].first

    @property
    def num_probes(self) -> int:
        """Probes that every batch has seen, or columns where there are no probes."""
        return 0 if self.probes is None else self.probes.count

    @property
    def draws(self) -> int:
        """Probes that every batch has seen, or random columns where there are no probes."""
        return min((s.count for s in self.sources if s.least > 1), default=0)

    @property
    def products(self) -> float:
        """Matrix-vector products so far, over all kept examples."""
        return sum(meter.products for meter in self._meters)

    @property
    def gradients(self) -> float:
        """Work so far in full-data gradients."""
        return sum(meter.gradients for meter in self._meters)

    @property
    def _meters(self) -> Iterable[Meter]:
        """Each once: sources may share one."""
        return {id(source.meter): source.meter for source in self.sources}.values()

    def extend(self, count: int, on_step: OnStep = go_on) -> Iterator[None]:
        """Bring every batch to so many probes, and to its share of random columns.

        The sources go through the batches side by side, so that a run that is cut short has all
        of the batches that it has seen.

        Args:
            count: probes of each batch.
            on_step: called between two products of a step; may end it.
        """
        known, probes = self.gauss_newton, self.probes
        under_way = []
        if known is not None:
            draws, whole = self._draws(count), _batch_by_batch(known)
            steps = known.extend(draws, on_step)
            steps = _watched(steps, known.meter, self._spent[known], whole)
            under_way.append(_Passage(known, draws if known.least > 1 else 1, steps))
        if probes is not None:
            yield from _watched(probes.design.prepare(), probes.meter, self._prepared)
            steps = probes.extend(count, on_step)
            steps = _watched(steps, probes.meter, self._spent[probes])
            under_way.append(_Passage(probes, count, steps))
        while under_way:
            passage = min(under_way, key=lambda each: each.done)  # the first of those behind
            if next(passage.steps, passage) is passage:
                under_way.remove(passage)
            else:
                yield

    def settle(self) -> None:
        """Let every rank have the entries that others have added in a round that was cut."""
        for source in self.sources:
            for stream in source.streams:
                stream.settle()

    def has(self, count: int) -> bool:
        """Whether each batch has so many probes and random columns, or what is exact of it."""
        return all(
            len(cells) >= (count if source.least > 1 else 1)
            for source in self.sources
            for cells in source.cells.values()
        )

    def foreseen(self, count: int) -> Spent:
        """What so many probes of every batch that there is take in all, at the pace so far.

        Each source must have seen a batch.
        """
        total, counts = self._prepared, self.operator.counts
        everything = sum(counts[i] for i in self.operator.indices)
        for source in self.sources:
            drawn = count if source is self.probes else self._draws(count)
            wanted = drawn if source.least > 1 else 1  # an exact one is seen once
            done = sum(counts[i] * len(cells) for i, cells in source.cells.items())
            spent = self._spent[source].times(wanted * everything / done)
            total += spent.dealt(world.gain(len(self.operator.indices)))
        return total

    def _draws(self, count: int) -> int:
        """Random columns that go with so many probes.

        As many, of the same numbers, until they are balanced: ranges of them can be joined then.
        In pairs after, for one alone tells nothing of noise.
        """
        if self.draws_per_probe == 1:
            return max(2, count)
        return 2 * max(1, math.ceil(count * self.draws_per_probe / 2))

    def balance(self) -> float:
        """As many random columns to a probe as leave the least noise for the work.

        For n draws of variance V and work c each, Σ V/n at a given Σ c n is least with n ∝ √(V/c).

        Returns:
            How many times the probes have the same noise then.
        """
        known, probes = self.gauss_newton, self.probes
        if known is None or probes is None or not self.sampled:
            return 1.0
        drawn, probed = self._energy(known), self._energy(probes)
        if not drawn + probed:
            return 1.0
        cheaper = probes.design.products * _PRODUCT / BACKWARD
        best = math.sqrt(cheaper * drawn / probed) if probed else math.inf
        self.draws_per_probe = min(max(best, 1 / _MOST_UNEVEN), _MOST_UNEVEN)
        before, after = known.count / probes.count, self.draws_per_probe
        return (probed + drawn / after) / (probed + drawn / before)

    def _energy(self, source: Engine) -> float:
        """A single draw's squared error, of the entries where they are kept, else of the total."""
        if self.entries is not None:
            found = self.entries.diagonal(self._parts([source], 1.0), 0.0)
            return found.squared_norm().bias * source.count
        weights = [self.operator.masses[i] for i in source.seen]
        table = reduce_table(source.aligned(source.seen), weights, "fresh")
        return float(table.within.value[-1]) * source.count

    def state_dict(self) -> State:
        """Of both sources."""
        return {
            "draws_per_probe": self.draws_per_probe,
            "sources": [source.state_dict() for source in self.sources],
        }

    def load_state_dict(self, state: State) -> None:
        """Be where another of the same matrix and sources was."""
        self.draws_per_probe = state["draws_per_probe"]
        for source, its in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(its)

    def join(self, state: State) -> None:
        """Add what the sources of another have found in other batches, or with other probes."""
        for source, its in zip(self.sources, state["sources"], strict=True):
            source.join(its)

    @property
    def uneven(self) -> dict[int, int] | None:
        """How many estimates batches have, where entries are kept of more of some than of others.

        Entries are sums over all of them, in which each batch must have its share.
        """
        for source in self.sources:
            counts = {i: len(source.cells[i]) for i in source.indices}
            if source.stream is not None and len(set(counts.values())) > 1:
                return counts
        return None

    def table(self) -> Table | None:
        """What the sources say together: of the batches that are probed, and of all that are known.

        Where entries are kept, both rest on the same draws: those of complete rounds.
        """
        seen = self._seen()
        if not seen or len(seen) < min(2, len(self.indices)):
            return None
        known, masses, probed = self.gauss_newton, self.operator.masses, seen
        if known is not None:
            seen = [*probed, *sorted(set(known.seen) - set(probed))]
        added = None if known is None else known.aligned(seen)
        if self.probes is not None:
            cells = self.probes.aligned(probed)
        else:
            assert added is not None  # or there is no source
            cells = [0 * rows[:1] for rows in added]
        weights = [masses[i] for i in seen]
        return reduce_table(cells, weights, self.sharing, added, examples=self._examples(seen))

    def gauss_newton_traces(self) -> Array | None:
        """By layer and in all, weight decay included, over the batches of :meth:`table`."""
        if not isinstance(self.gauss_newton, PerExample):
            return None
        if not (seen := self.gauss_newton.seen):
            return None
        masses = np.array([self.operator.masses[i] for i in seen])
        means = np.stack([rows.mean(0) for rows in self.gauss_newton.aligned(seen)])
        return np.asarray(masses @ means / masses.sum() + self.decay_traces())

    def decay_traces(self) -> Array:
        """Weight decay's own share: its coefficient times the number of parameters, exactly."""
        parameters = self.parameters
        sizes = [sum(p.numel for p in parameters.in_layer(name)) for name in parameters.layers]
        return self.operator.decay * np.array([*sizes, parameters.size], dtype=np.float64)

    def diagonal(self, fraction: float, bias: Bias | None = None) -> Diagonal:
        """The entries, weight decay included.

        Args:
            fraction: share of all examples that the kept ones make up.
            bias: of the products with probes, if that is to be in the errors.
        """
        assert self.entries is not None  # asked for only of estimators that keep them
        found = self.entries.diagonal(self._parts(self.sources, fraction), self.operator.decay)
        if bias is None or self.probes is None:
            return found
        return self.entries.rounded(found, bias.entries, self.probes.operator.parameters)

    def known_diagonal(self) -> Tensor | None:
        """The entries of the part that has no probes, without weight decay."""
        if self.gauss_newton is None or self.entries is None:
            return None
        return self.entries.diagonal(self._parts([self.gauss_newton], 1.0), 0.0).values

    def probed_diagonal(self, fraction: float) -> Diagonal | None:
        """The entries of the part that is probed, without weight decay."""
        if self.probes is None or self.entries is None:
            return None
        return self.entries.diagonal(self._parts([self.probes], fraction), 0.0)

    def _parts(self, sources: Sequence[Engine], fraction: float) -> list[Part]:
        """Streams, with the share of all examples and the estimates that each rests on."""
        return [
            Part(stream, fraction * self._share(source.seen), source.count)
            for source in sources
            for stream in source.streams
            if source.seen
        ]

    def _examples(self, batches: Sequence[int]) -> float:
        """Independent ones in a batch, on average."""
        if not self.operator.independent:
            return 1.0
        return sum(self.operator.counts[i] for i in batches) / len(batches)

    def coverage(self) -> float:
        """Share of the kept examples in the batches that every source has seen."""
        return self._share(self._seen())

    def _share(self, batches: Sequence[int]) -> float:
        counts = self.operator.counts
        every = self.indices if self.pilot else self.operator.indices
        return sum(counts[i] for i in batches) / sum(counts[i] for i in every)

    def _seen(self) -> list[int]:
        """Batches that every source has seen."""
        return sorted(set[int].intersection(*(set(s.seen) for s in self.sources)))


class _Passage:
    """A source on its way through the batches; between two of them it holds no graph."""

    def __init__(self, source: Engine, wanted: int, steps: Iterator[None]) -> None:
        self.steps = steps
        self._source, self._wanted, self._done = source, wanted, 0

    @property
    def done(self) -> int:
        """Batches from the first on that have as many estimates as wanted."""
        indices, cells = self._source.indices, self._source.cells
        while self._done < len(indices) and len(cells[indices[self._done]]) >= self._wanted:
            self._done += 1
        return self._done


def _watched(
    steps: Iterator[None], meter: Meter, spent: Spent, whole: Callable[[], bool] = lambda: True
) -> Iterator[None]:
    """The steps; what they take is added up, once what there is of them is ``whole``."""
    over, pending = False, Spent()
    while not over:
        with watched(meter) as step:
            over = next(steps, steps) is steps
        if over or whole():
            spent.add(pending + step if over else pending)
            pending = Spent()
        if not over:
            pending += step
            yield


def _batch_by_batch(source: Engine) -> Callable[[], bool]:
    """Whether there is a batch more that has its cells, since it was last asked."""
    left = iter(source.indices)
    following = next(left, None)

    def is_done() -> bool:
        nonlocal following
        if following is None or not len(source.cells[following]):
            return False
        following = next(left, None)
        return True

    return is_done


# -- From a table to intervals: estimates, variances and rounding, layer by layer and in all -------


@dataclass(frozen=True)
class Rounding:
    """Error of a quadratic form relative to its size, root mean square.

    Where it is not ``known``, it is what is allowed for: nobody could measure it. ``mixed`` says
    that products are made under autocast, and ``bias`` what that does to those that are probed.
    """

    relative: float
    known: bool = True
    mixed: bool = False
    bias: Bias | None = None

    @property
    def is_exact(self) -> bool:
        """Whether what nothing was drawn for may be called exact."""
        return self.known and not self.mixed


@dataclass(frozen=True)
class Reading:
    """Numbers with half-widths, each ``(L + 1,)``: the layers, and the total last.

    ``variance`` is about all available examples; ``rounding`` is part of ``half_width``.
    ``fraction`` is the share of the loader's examples that they rest on. ``bias`` is that of the
    products with which they were made.
    """

    table: Table
    estimate: Array
    variance: MeanSquare
    half_width: Array
    rounding: Array
    fraction: float
    miss: float
    bias: Bias | None = None

    def interval(self, column: int = -1) -> tuple[float, float]:
        """Interval of a layer, or of the total; without ends where nothing is known."""
        value, width = float(self.estimate[column]), float(self.half_width[column])
        return value - width, value + width

    def population_interval(self) -> tuple[float, float] | None:
        """Interval of the total, for unseen examples of the same kind."""
        if self.table.between is None:
            return None
        width = self.table.half_width(0.0, self.miss)[-1] + self.rounding[-1]
        return float(self.estimate[-1] - width), float(self.estimate[-1] + width)

    def data_half_width(self) -> float:
        """The part of the total's half-width that no number of probes can take away."""
        width = self.table.data_half_width(self.fraction, self.miss)
        return float(width[-1] + self.rounding[-1])

    @property
    def random_share(self) -> float:
        """Share of the total's variance that more probes and drawn columns would shrink."""
        variance = float(self.variance.value[-1])
        return float(self.table.within.value[-1]) / variance if variance else 0.0


def read(
    estimator: Estimator, miss: float, relative: float, bias: Bias | None = None
) -> Reading | None:
    """What an estimator's table says with intervals that miss with probability ``miss``.

    Args:
        estimator: rounds so far; a first one that was stopped counts as a sample of the batches.
        miss: probability.
        relative: error of a quadratic form relative to its size, root mean square.
        bias: of the products with probes, if they have one.

    Returns:
        None before there is anything to read.
    """
    table = estimator.table()
    if table is None:
        return None
    # Where the loader's size is not known, intervals are about the kept examples.
    fraction = (estimator.operator.sampling_fraction or 1.0) * estimator.coverage()
    variance = table.variance(fraction)
    # A layer whose forms cancel is rounded as what they are made of, which is the whole's.
    unit = torch.finfo(estimator.operator.dtype).eps
    rounding = relative * table.root_mean_square + unit * table.root_mean_square[-1]
    if bias is not None and estimator.probes is not None:
        rounding = rounding + bias.of_sums(table.probed_size, estimator.parameters)
    return Reading(
        table=table,
        estimate=table.estimate + estimator.decay_traces(),
        variance=variance,
        half_width=table.half_width(fraction, miss) + rounding,
        rounding=rounding,
        fraction=fraction,
        miss=miss,
        bias=bias,
    )
