"""Which weights matter: saliencies, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import stdtr
from torch import Tensor

from hesscli.diagnostics.measurement import Work
from hesscli.diagnostics.window import Collected, WindowOptions, timed_on_columns
from hesscli.engines.mfac import GradientWindow
from hesscli.engines.mfac.static import Sizes
from hesscli.engines.mfac.subsets import inverse_diagonals
from hesscli.errors import UsageError
from hesscli.meter import OnStep, go_on
from hesscli.problem.problem import Problem
from hesscli.results import Histogram, Quantile, SaliencyReport, Snapshot
from hesscli.state import Rows, State

Array = NDArray[np.float64]

# -- Spearman's rank correlation of large vectors, and the median ----------------------------------


_MOST_RANKED = 1 << 18


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
_ODD = torch.arange(GROUPS) % 2 == 1
_SETS = torch.stack([torch.ones(GROUPS, dtype=torch.bool), ~_ODD, _ODD, *~torch.eye(GROUPS).bool()])
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

    Args:
        collected: the window and its blocks.
        weights: ``(d,)``.
        layers: where each layer lies in them.
    """

    def __init__(self, collected: Collected, weights: Tensor, layers: Sequence[slice]) -> None:
        self.collected, self.weights, self.layers = collected, weights, layers
        self._vectors = weights.new_empty(len(weights), 3, dtype=torch.float64)
        self._means, self._quantiles = list[Array](), list[Array]()

    def steps(self, on_step: OnStep = go_on) -> Iterator[Snapshot]:
        """A layer a step, or all of them where a block goes beyond one.

        Args:
            on_step: called within a step, which can be made again; may end it.
        """
        total, stretches = float(len(self.layers)), self._stretches()
        while self._done < len(self.layers):
            layers, sizes = stretches[self._done]
            self._invert(layers, sizes, on_step)
            yield Snapshot(phase="ranking", done=float(self._done), total=total)

    @property
    def ranked(self) -> Ranked:
        """Once all is done."""
        diagonal, halves = self._vectors[:, 0], self._vectors[:, 1:].T
        means, levels = np.stack(self._means, 1), np.stack(self._quantiles, 1)
        own = saliencies(self.weights, diagonal)
        return Ranked(diagonal, own, Repeats(means, levels, halves))

    def state_dict(self) -> State:
        """Of the layers that are done."""
        end = self.layers[self._done - 1].stop if self._done else 0
        return {
            "vectors": Rows(self._vectors[:end]),
            "means": self._means,
            "quantiles": self._quantiles,
        }

    def load_state_dict(self, state: State) -> None:
        """Have done what another had of the same window."""
        state["vectors"].copy_to(self._vectors)
        self._means, self._quantiles = list(state["means"]), list(state["quantiles"])

    @property
    def _done(self) -> int:
        return len(self._means)

    def _stretches(self) -> dict[int, tuple[Sequence[slice], Sizes]]:
        """Layers that blocks lie within, by the first of them, and these blocks."""
        sizes = self.collected.sizes
        if sizes is None:
            return {0: (self.layers, np.array([len(self.weights)]))}
        ends = np.cumsum(sizes)
        cuts = np.searchsorted(ends, [layer.stop for layer in self.layers]) + 1
        pairs = zip(self.layers, np.split(sizes, cuts[:-1]), strict=True)
        return {number: ([layer], own) for number, (layer, own) in enumerate(pairs)}

    def _invert(self, layers: Sequence[slice], sizes: Sizes, on_step: OnStep) -> None:
        window, place = self.collected.window, slice(layers[0].start, layers[-1].stop)
        damping = self.collected.fisher.damping
        found = inverse_diagonals(window, place, sizes, damping, _SETS, on_step)
        own, halves = found[0], saliencies(self.weights[place], found[1:3])
        self._vectors[place] = torch.stack([own, *halves], dim=1)
        for layer in layers:
            own = found[3:, layer.start - place.start : layer.stop - place.start]
            fewer = [saliencies(self.weights[layer], diagonal) for diagonal in own]
            self._quantiles.append(torch.stack([quantiles(each) for each in fewer]).numpy())
            self._means.append(np.array([float(each.mean()) for each in fewer]))


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


def ranking(problem: Problem, options: WindowOptions, rows: int) -> Work:
    """Diagonals of inverses from all and from fewer rows, as a part of them is timed."""

    def invert(window: GradientWindow, sizes: Sizes) -> None:
        inverse_diagonals(window, slice(0, window.size), sizes, 1.0, _SETS)

    places = problem.parameters.layer_places()
    most = max(place.stop - place.start for place in places)
    held = torch.float64.itemsize * (len(_SETS) * most + _VECTORS * problem.parameters.size)
    spent = timed_on_columns(problem, options, rows, invert)
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
