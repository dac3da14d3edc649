"""Which weights matter: saliencies, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import stdtr
from torch import Tensor

from hesscli.diagnostics.window import Collected
from hesscli.engines.mfac import GradientWindow, StaticFisher
from hesscli.engines.mfac.static import Sizes
from hesscli.errors import UsageError
from hesscli.meter import OnStep, go_on
from hesscli.results import Histogram, Quantile, SaliencyReport, Snapshot

Array = NDArray[np.float64]

# -- Spearman's rank correlation of large vectors, and the median ----------------------------------


def rank_correlation(one: Tensor, other: Tensor) -> float | None:
    """Spearman's, ties at their mean rank; None where either is constant."""
    ranks = [torch.from_numpy(_ranks(v.cpu().numpy())) for v in (one, other)]
    centred = [r - r.mean() for r in ranks]
    sizes = [float(torch.linalg.vector_norm(c)) for c in centred]
    if not all(sizes):
        return None
    return float(centred[0] @ centred[1]) / (sizes[0] * sizes[1])


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
_TILE_NUMBERS = 1 << 25
"""Numbers of a window that are copied at once, unless one block has more."""


def saliencies(weights: Tensor, inverse_diagonal: Tensor) -> Tensor:
    """w² / (2 [(F̂ + λI)⁻¹]_qq) of every weight (Hassibi & Stork 1993, "Optimal Brain Surgeon")."""
    return weights.double().square() / (2 * inverse_diagonal)


@dataclass(frozen=True)
class Repeats:
    """What fewer rows say of saliencies.

    ``means`` is ``(groups, L)``, each layer's mean saliency without a group of rows, and
    ``quantiles`` ``(groups, L, Q)``; ``one`` and ``other`` are the saliencies of two half-windows.
    """

    means: Array
    quantiles: Array
    one: Tensor
    other: Tensor

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


@dataclass
class Repeated:
    """Layers' mean saliencies and their quantiles, without one group of rows after the other."""

    means: list[list[float]] = field(default_factory=list)
    quantiles: list[list[list[float]]] = field(default_factory=list)


def repeats(
    collected: Collected,
    weights: Tensor,
    layers: Sequence[slice],
    found: Repeated,
    on_step: OnStep = go_on,
) -> Generator[Snapshot, None, Repeats]:
    """Saliencies from fewer rows, an inversion a step.

    Args:
        collected: the window and its blocks.
        weights: ``(d,)``.
        layers: where each layer lies in them.
        found: without the first groups, as far as that is done; the others are added.
        on_step: called within an inversion, which can be made again; may end it.

    Raises:
        UsageError: there are not two rows for each group.
    """
    window = collected.window
    require_rows(window.count, window.capacity)
    group = torch.arange(window.count, device=window.device) % GROUPS

    def from_rows(chosen: Tensor) -> Tensor:
        return saliencies(weights, _inverse_diagonal(collected, chosen, on_step))

    for left_out in range(len(found.means), GROUPS):
        saliency = from_rows(group != left_out)
        means = [float(saliency[layer].mean()) for layer in layers]
        found.quantiles.append([quantiles(saliency[layer]).tolist() for layer in layers])
        found.means.append(means)
        yield Snapshot(phase="ranking", done=float(left_out + 1), total=float(GROUPS + 2))
    one, other = (from_rows(group % 2 == half) for half in range(2))
    return Repeats(np.array(found.means), np.array(found.quantiles), one, other)


def quantiles(values: Tensor) -> Tensor:
    """The levels ``QUANTILES`` of a vector of any length ``(Q,)``: torch's own ends at 2^24."""
    ordered, count = values.sort().values, len(values)
    places = torch.tensor(QUANTILES, dtype=torch.float64) * (count - 1)
    low = places.floor().long()
    high, share = (low + 1).clamp_max(count - 1), (places - low).to(values.device)
    return torch.lerp(ordered[low.to(values.device)], ordered[high.to(values.device)], share).cpu()


def _jackknife(values: Array) -> Array:
    """Standard errors from estimates without each group, the first axis; 0 where all are -inf."""
    with np.errstate(invalid="ignore"):
        off = np.nan_to_num(values - values.mean(0), nan=0.0)
    return np.asarray(np.sqrt((GROUPS - 1) / GROUPS * np.square(off).sum(0)))


def _logs(values: Array) -> Array:
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(values))


def copied_bytes(numbers: int, itemsize: int) -> int:
    """What an inversion of some rows holds beside it, of a window of so many numbers.

    Three times as much as is copied at once: the chosen rows, as they are checked, and as kept.
    """
    return 3 * itemsize * min(numbers, _TILE_NUMBERS)


def _inverse_diagonal(collected: Collected, chosen: Tensor, on_step: OnStep) -> Tensor:
    """Diag (F̂ + λI)⁻¹ from some of the rows, a few blocks at a time."""
    window, damping = collected.window, collected.fisher.damping
    parts = []
    for columns, sizes in _chunks(collected.sizes, window):
        rows = window.tile(columns.start, columns.stop)[chosen]
        fewer = GradientWindow(*rows.shape, dtype=rows.dtype, device=rows.device)
        fewer.extend(rows)
        parts.append(StaticFisher(fewer, damping, blocks=sizes, on_step=on_step).diagonal())
    return torch.cat(parts)


def _chunks(sizes: Sizes | None, window: GradientWindow) -> Iterator[tuple[slice, Sizes | None]]:
    """Runs of blocks of a bounded number of columns, unless one has more, and their sizes."""
    if sizes is None:
        yield slice(0, window.size), None
        return
    ends, most, first, start = np.cumsum(sizes), _TILE_NUMBERS // window.count, 0, 0
    while first < len(sizes):
        stop = max(first + 1, int(np.searchsorted(ends, start + most, side="right")))
        yield slice(start, int(ends[stop - 1])), sizes[first:stop]
        first, start = stop, int(ends[stop - 1])


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
