"""Which weights matter: saliencies, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import stdtr
from torch import Tensor

from hesscli import world
from hesscli.diagnostics.measurement import Work
from hesscli.diagnostics.window import Collected, WindowOptions, inverse_work, timed_on_columns
from hesscli.engines.mfac import GradientWindow
from hesscli.engines.mfac.static import Sizes
from hesscli.engines.mfac.subsets import inverse_diagonals
from hesscli.engines.mfac.work import InverseWork
from hesscli.errors import UsageError
from hesscli.meter import Algebra, OnStep, go_on
from hesscli.problem.problem import Problem
from hesscli.results import Histogram, Quantile, SaliencyReport, Snapshot
from hesscli.state import Rows, State

Array = NDArray[np.float64]

# -- Spearman's rank correlation of large vectors, and the median ----------------------------------


_MOST_RANKED = 1 << 18
_SORTED, _PARTITIONED, _BINNED = 200, 20, 50
"""Times as long as reading an entry it takes to rank two vectors, to find the quantiles of one, and
to count it in bins: fitted to vectors of 16 thousand to 4 million entries."""


def rank_correlation(one: Tensor, other: Tensor) -> float | None:
    """Spearman's, ties at their mean rank; None where either is constant.

    Of longer vectors a quarter of a million entries stand for all: it is then known to 0.002.
    """
    places = sampled_places(len(one), one.device)
    ranks = [torch.from_numpy(_ranks(v[places].cpu().numpy())) for v in (one, other)]
    centred = [r - r.mean() for r in ranks]
    sizes = [float(torch.linalg.vector_norm(c)) for c in centred]
    if not all(sizes):
        return None
    return float(centred[0] @ centred[1]) / (sizes[0] * sizes[1])


def correlated(size: int) -> Algebra:
    """What a rank correlation of so many entries takes: sorting each."""
    return Algebra(read=_SORTED).times(min(size, _MOST_RANKED))


def sampled_places(size: int, device: torch.device) -> Tensor:
    """Places in rising order that stand for all of a vector: all, or some drawn by chance."""
    if size <= _MOST_RANKED:
        return torch.arange(size, device=device)
    drawn = np.random.default_rng(0).integers(size, size=_MOST_RANKED)
    return torch.from_numpy(np.sort(drawn)).to(device)


def _ranks(values: Array) -> Array:
    """As ``scipy.stats.rankdata``, whose import would take half as long as torch's."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[places])


# -- How sure saliencies are: the same from fewer rows, many times ---------------------------------
# Two disjoint half-windows show how far the ranking of weights repeats. Standard errors are the
# jackknife's over eight groups of rows, each left out in turn (Efron & Stein 1981, "The jackknife
# estimate of variance"): of the logarithm of a layer's mean saliency, in which it is nearly linear.
# Differences of half-windows would do for that too, but an inverse has so much more noise from half
# of the rows that they were seen to be a third too small where λ matters.


GROUPS = 8
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_ODD = torch.arange(GROUPS, device="cpu") % 2 == 1
_SETS = torch.stack(
    [
        torch.ones(GROUPS, dtype=torch.bool, device="cpu"),
        ~_ODD,
        _ODD,
        *~torch.eye(GROUPS, device="cpu").bool(),
    ]
)
"""Groups of rows that are taken: all, one half, the other, and all but one."""
_VECTORS = 4
"""That a ranking holds, float64."""


def saliencies(weights: Tensor, inverse_diagonal: Tensor) -> Tensor:
    """w² / (2 [(F̂ + λI)⁻¹]_qq) of every weight (Hassibi & Stork 1993, "Optimal Brain Surgeon")."""
    return weights.double().square() / (2 * inverse_diagonal)


@dataclass(frozen=True)
class Repeats:
    """What fewer rows say of saliencies.

    ``means`` is ``(groups, L)``, each layer's mean saliency without a group of rows, and
    ``quantiles`` ``(groups, L, Q)``; ``halves`` ``(2, d)`` the saliencies of two half-windows.
    """

    means: Array
    quantiles: Array
    halves: Tensor

    def relative_errors(self) -> Array:
        """Standard errors of the layers' means, relative to them ``(L,)``."""
        return _jackknife(_logs(self.means))

    def quantile_errors(self) -> Array:
        """Standard errors of the layers' quantiles, relative to them ``(L, Q)``."""
        return _jackknife(_logs(self.quantiles))

    def above(self, means: Array) -> Array:
        """Probabilities ``(L, L)`` that one layer's mean is higher than another's.

        Student's distribution with one degree of freedom less than there are groups.
        """
        logs = _logs(self.means)
        own = _logs(means)
        with np.errstate(divide="ignore", invalid="ignore"):  # of saliencies that are zero
            error = _jackknife(logs[:, :, None] - logs[:, None, :])
            apart = np.nan_to_num(own[:, None] - own[None, :], nan=0.0)
            score = np.where(apart == 0, 0.0, apart / error)
        return np.asarray(stdtr(GROUPS - 1, score))


def require_rows(count: int, capacity: int) -> None:
    """See that there are two rows for each group.

    Raises:
        UsageError: there are not, of a window that has room for so many.
    """
    if count >= 2 * GROUPS:
        return
    raise UsageError(
        f"no ranking without its confidence, which takes {2 * GROUPS} rows",
        f"{count} rows",
        "a larger --window"
        if count == capacity
        else f"more --examples, in {2 * GROUPS} batches or more where batches are the rows",
    )


@dataclass(frozen=True)
class Ranked:
    """Saliencies of all weights, and what they rest on: no ranking without.

    ``diagonal`` ``(d,)`` is that of (F̂ + λI)⁻¹.
    """

    diagonal: Tensor
    saliency: Tensor
    repeats: Repeats


class Inverted:
    """Diag (F̂ + λI)⁻¹ from all rows and from some of them, layer by layer.

    Of a window in shards each rank inverts the layers that it has, while others do theirs; then
    all together those that reach over shards. What is kept of it is kept once all have all.

    Args:
        collected: the window and its blocks.
        weights: ``(d,)``.
        layers: where each layer lies in them.
    """

    def __init__(self, collected: Collected, weights: Tensor, layers: Sequence[slice]) -> None:
        self.collected, self.weights, self.layers = collected, weights, layers
        self._vectors = weights.new_empty(len(weights), 3, dtype=torch.float64)
        self._means, self._quantiles = dict[int, Array](), dict[int, Array]()
        self._done = 0

    def steps(
        self, on_step: OnStep = go_on, count: Callable[[Algebra], object] = lambda _: None
    ) -> Iterator[Snapshot]:
        """A layer a step, or all of them where a block goes beyond one.

        Args:
            on_step: called within a step, which can be made again; may end it.
            count: told what was done once it is in the state: by all ranks at the end of all.
        """
        window, total = self.collected.window, float(len(self.layers))

        def told() -> Snapshot:
            return Snapshot(phase="ranking", done=float(len(self._means)), total=total)

        left = [each for each in self._stretches() if each.first >= self._done]
        own = [each for each in left if self._lies_here(each.place)]
        for _ in world.abreast(self._inverted(own, on_step, count)):
            yield told()
        for each in left:
            if self._is_spread(each.place):
                self._invert(each, on_step)
                yield told()
        if self._done < len(self.layers):
            window.completed(self._vectors, slice(0, len(self.weights)))
            for means, levels in world.gathered((self._means, self._quantiles)):
                self._means |= means
                self._quantiles |= levels
            self._done = len(self.layers)
            for each in left:
                count(self._work(each))
            yield told()

    @property
    def ranked(self) -> Ranked:
        """Once all is done."""
        diagonal, halves = self._vectors[:, 0], self._vectors[:, 1:].T
        means, levels = (np.stack(self._in_order(x), 1) for x in (self._means, self._quantiles))
        own = saliencies(self.weights, diagonal)
        return Ranked(diagonal, own, Repeats(means, levels, halves))

    def state_dict(self) -> State:
        """Of the layers that are done."""
        end = self.layers[self._done - 1].stop if self._done else 0
        return {
            "vectors": Rows(self._vectors[:end]),
            "means": self._in_order(self._means),
            "quantiles": self._in_order(self._quantiles),
        }

    def load_state_dict(self, state: State) -> None:
        """Have done what another had of the same window."""
        state["vectors"].copy_to(self._vectors)
        self._means = dict(enumerate(state["means"]))
        self._quantiles = dict(enumerate(state["quantiles"]))
        self._done = len(self._means)

    def _in_order(self, by_layer: Mapping[int, Array]) -> list[Array]:
        """Of the layers that are done on all ranks."""
        return [by_layer[number] for number in range(self._done)]

    def _stretches(self) -> list[_Stretch]:
        """Layers that blocks lie within, and these blocks."""
        sizes = self.collected.sizes
        if sizes is None:
            return [_Stretch(0, self.layers, np.array([len(self.weights)]))]
        ends = np.cumsum(sizes)
        cuts = np.searchsorted(ends, [layer.stop for layer in self.layers]) + 1
        pairs = zip(self.layers, np.split(sizes, cuts[:-1]), strict=True)
        return [_Stretch(number, [layer], own) for number, (layer, own) in enumerate(pairs)]

    def _is_spread(self, place: slice) -> bool:
        """Whether it reaches over shards."""
        return any(place.start < cut < place.stop for cut in self.collected.window.cuts)

    def _lies_here(self, place: slice) -> bool:
        """Whether it is this rank's alone."""
        here = self.collected.window.own(place)
        return here.stop > here.start and not self._is_spread(place)

    def _inverted(
        self, stretches: Sequence[_Stretch], on_step: OnStep, count: Callable[[Algebra], object]
    ) -> Generator[None, None, None]:
        for stretch in stretches:
            self._invert(stretch, on_step)
            if not self.collected.window.cuts:
                self._done = len(self._means)
                count(self._work(stretch))
            yield

    def _work(self, stretch: _Stretch) -> Algebra:
        """What a stretch takes on all ranks."""
        window = self.collected.window
        return ranked_work(InverseWork(stretch.sizes, window.count, window.dtype, kept=False))

    def _invert(self, stretch: _Stretch, on_step: OnStep) -> None:
        """Of what this rank has of some layers, and what their ranks have together."""
        window, damping = self.collected.window, self.collected.fisher.damping
        found = inverse_diagonals(window, stretch.place, stretch.sizes, damping, _SETS, on_step)
        first = window.place.start + window.own(stretch.place).start
        here = slice(first, first + found.shape[1])
        own, halves = found[0], saliencies(self.weights[here], found[1:3])
        self._vectors[here] = torch.stack([own, *halves], dim=1)
        for number, layer in enumerate(stretch.layers, stretch.first):
            if not (self._is_spread(layer) or self._lies_here(layer)):
                continue
            kept = window.own(layer)
            part = slice(window.place.start + kept.start, window.place.start + kept.stop)
            means, levels = list[float](), list[Tensor]()
            for diagonal in found[3:, part.start - first : part.stop - first]:
                fewer = saliencies(self.weights[part], diagonal)
                if self._is_spread(layer):
                    whole = fewer.new_empty(layer.stop - layer.start)
                    whole[part.start - layer.start : part.stop - layer.start] = fewer
                    fewer = window.completed(whole, layer)
                means.append(float(fewer.mean()))
                levels.append(quantiles(fewer))
            self._means[number] = np.array(means)
            self._quantiles[number] = torch.stack(levels).numpy()


@dataclass(frozen=True)
class _Stretch:
    """Consecutive layers from number ``first`` on that hold whole blocks, and these."""

    first: int
    layers: Sequence[slice]
    sizes: Sizes

    @property
    def place(self) -> slice:
        """Of all of them."""
        return slice(self.layers[0].start, self.layers[-1].stop)


def quantiles(values: Tensor) -> Tensor:
    """The levels ``QUANTILES`` of a vector of any length ``(Q,)``: torch's own ends at 2^24."""
    places = np.array(QUANTILES) * (len(values) - 1)
    low = np.floor(places).astype(int)
    high = np.minimum(low + 1, len(values) - 1)
    ordered = np.partition(values.cpu().numpy(), [*low, *high])
    return torch.lerp(*map(torch.from_numpy, (ordered[low], ordered[high], places - low)))


def _jackknife(values: Array) -> Array:
    """Standard errors from estimates without each group, the first axis; 0 where all are -inf."""
    with np.errstate(invalid="ignore"):
        off = np.nan_to_num(values - values.mean(0), nan=0.0)
    return np.asarray(np.sqrt((GROUPS - 1) / GROUPS * np.square(off).sum(0)))


def _logs(values: Array) -> Array:
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(values))


def ranked_work(inverse: InverseWork) -> Algebra:
    """Diagonals from all and from fewer rows, and of saliencies quantiles for each group."""
    summary = Algebra(made=2, read=_PARTITIONED).times(GROUPS) + Algebra(made=_VECTORS)
    return inverse.subsets(_SETS) + summary.times(int(inverse.sizes.sum()))


def ranking(problem: Problem, options: WindowOptions, rows: int) -> Work:
    """Diagonals of inverses from all and from fewer rows, as a part of them is timed."""

    def invert(window: GradientWindow, sizes: Sizes) -> None:
        inverse_diagonals(window, slice(0, window.size), sizes, 1.0, _SETS)

    places = problem.parameters.layer_places()
    most = max(place.stop - place.start for place in places)
    most = min(most, -(-problem.parameters.size // world.size()))
    held = torch.float64.itemsize * (len(_SETS) * most + _VECTORS * problem.parameters.size)
    taken = ranked_work(inverse_work(problem, options, rows))
    spent = timed_on_columns(problem, options, rows, invert, taken)
    return Work(phase="ranking", spent=spent, num_bytes=held)


# -- A layer's saliencies in its report ------------------------------------------------------------


_BINS_A_DECADE = 2
_MOST_DECADES = 16


def saliency_edges(saliency: Tensor) -> Array:
    """Edges at equal ratios, over all saliencies that are not zero and not absurdly small."""
    positive = saliency[saliency > 0]
    if not len(positive):
        return np.array([1e-1, 1.0])
    top = math.floor(math.log10(float(positive.max()))) + 1
    bottom = max(math.floor(math.log10(float(positive.min()))), top - _MOST_DECADES)
    return np.logspace(bottom, top, _BINS_A_DECADE * (top - bottom) + 1)


def reported(sizes: Sequence[int]) -> Algebra:
    """What reports of layers of some sizes take: two rank correlations each, and one of all."""
    found, total = correlated(sum(sizes)), sum(sizes)
    for size in sizes:
        found += correlated(size).times(2)
    return found + Algebra(made=2, read=_PARTITIONED + _BINNED).times(total)


def saliency_report(
    values: Tensor, error: float, level_errors: Array, edges: Array
) -> SaliencyReport:
    """A layer's saliencies in a few numbers.

    Args:
        values: of its weights.
        error: of their mean, relative.
        level_errors: of their quantiles, relative.
        edges: of the histogram.
    """
    mean = float(values.mean())
    levels = zip(QUANTILES, quantiles(values).tolist(), level_errors, strict=True)
    counts = np.histogram(values.cpu().numpy(), edges)[0]
    return SaliencyReport(
        mean=mean,
        stderr=_finite(mean * error),
        quantiles=tuple(
            Quantile(level=level, value=value, stderr=_finite(value * off))
            for level, value, off in levels
        ),
        histogram=Histogram(edges=tuple(edges.tolist()), counts=tuple(int(n) for n in counts)),
    )


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
