"""One layer's entries in a few numbers, each with a standard error.

What is linear or quadratic in the entries is known without bias. Quantiles, fractions and the
largest entries are not: noise broadens the distribution, pushes its ends outwards and turns
signs over. Adding a replicate of the noise to the estimates once more shows how far. Where they
are nothing but noise of one size, the first helping moved a quantile 1/(√2 − 1) = 2.4 times as
far as the second one does, and less elsewhere; a share of entries turned over by the first is at
most about twice that turned over by the second. Standard errors are widened so that two of them
span this, and are not small where noise hides the answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hesscli.engines.diagonal import Diagonal, SquaredNorm
from hesscli.results import Entry, EntrySummary, Histogram, ParameterReport, Quantile

Array = NDArray[np.float64]

LEVELS = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
LARGEST = 5
BINS = 72
"""Logarithmic bins, of both signs together."""
_SAMPLED = 1_000_000
"""Entries that are looked at to choose the edges."""
_SMALL_SHARE, _MOST, _LEAST = 0.01, 1e10, 10.0
"""The linear bin holds this share of the nonzero entries, within these ratios to the largest."""
_HALF_SHIFT = 0.5 / (np.sqrt(2) - 1)


def summarise(
    diagonal: Diagonal, parameters: Sequence[ParameterReport], edges: Sequence[float]
) -> EntrySummary:
    """Summarise a layer's diagonal entries.

    Args:
        diagonal: the layer's entries alone.
        parameters: its tensors, in the order of the entries.
        edges: of the histogram, from :func:`histogram_edges` for the whole network.
    """
    values = diagonal.values.numpy()
    ordered = np.sort(values)
    plain = _order_statistics(ordered)
    again = [] if diagonal.noise is None else [_Again(values, e.numpy()) for e in diagonal.noise]
    spread, shift = _spread_and_shift([noisy.statistics - plain for noisy in again], plain)
    variance = diagonal.squared_norm(_centred)
    unknown = 0.0 if diagonal.freedom else math.inf
    return EntrySummary(
        mean=float(values.mean()),
        mean_stderr=_root_mean_square([noisy.shift for noisy in again]) + unknown,
        std=variance.estimate**0.5,
        std_stderr=_std_stderr(variance),
        negative_fraction=_negative(ordered),
        negative_stderr=_negative_stderr(again) + unknown,
        quantiles=tuple(
            Quantile(level=level, value=float(value), stderr=float(error))
            for level, value, error in zip(LEVELS, plain, spread + shift + unknown, strict=False)
        ),
        histogram=Histogram(edges=tuple(edges), counts=_counts(ordered, edges)),
        largest=_largest(diagonal, plain[len(LEVELS) :], shift[len(LEVELS) :], parameters),
    )


def histogram_edges(values: Tensor) -> tuple[float, ...]:
    """Edges for entries of both signs and many sizes: log-spaced, and one linear bin around zero.

    The outermost edges are the extremes of all entries; the linear bin is left to exact zeros
    and the few entries that are smallest. Each sign has its share of the decades in bins.
    """
    array = values.numpy()
    low, high = float(array.min()), float(array.max())
    biggest = max(-low, high)
    if biggest == 0:
        return -1.0, 1.0
    sizes = np.abs(array[:: -(-len(array) // _SAMPLED)])
    small = float(np.quantile(sizes[sizes > 0], _SMALL_SHARE)) if sizes.any() else 0.0
    small = min(max(small, biggest / _MOST), biggest / _LEAST)
    decades = np.log([max(-low / small, 1.0), max(high / small, 1.0)])
    below, above = np.ceil(BINS * decades / decades.sum()).astype(int)
    negative = -np.geomspace(max(-low, small), small, below + 1)
    positive = np.geomspace(small, max(high, small), above + 1)
    return tuple(np.concatenate([negative, positive]).tolist())


def total_histogram(layers: Sequence[Histogram]) -> Histogram:
    """The sum of histograms over the same edges."""
    counts = zip(*(layer.counts for layer in layers), strict=True)
    return Histogram(edges=layers[0].edges, counts=tuple(map(sum, counts)))


class _Again:
    """What is seen of the entries with a replicate of their error added once more."""

    def __init__(self, values: Array, error: NDArray[np.float32]) -> None:
        noisy = values + error
        self.shift = float(error.mean(dtype=np.float64))
        below = noisy < 0
        self.turned = float(np.mean((values < 0) != below))
        self.negative = float(np.mean(below))
        noisy.partition(_places(len(noisy)))
        self.statistics = _order_statistics(noisy)


def _places(count: int) -> NDArray[np.int_]:
    """Of the entries that :func:`_order_statistics` reads, in ascending order."""
    below = (np.array(LEVELS) * (count - 1)).astype(int)
    ends = np.arange(min(LARGEST, count))
    places = np.concatenate([below, below + 1, ends, count - 1 - ends])
    return np.unique(np.minimum(places, count - 1))


def _order_statistics(ordered: Array) -> Array:
    """The quantiles at LEVELS, and the sizes of the largest entries.

    Args:
        ordered: entries, of which those at :func:`_places` stand where sorting would put them.
    """
    place = np.array(LEVELS) * (len(ordered) - 1)
    below = place.astype(int)
    above = np.minimum(below + 1, len(ordered) - 1)
    quantiles = ordered[below] + (place - below) * (ordered[above] - ordered[below])
    few = min(LARGEST, len(ordered))
    ends = ordered if len(ordered) < 2 * few else np.concatenate([ordered[:few], ordered[-few:]])
    sizes = np.sort(np.abs(ends))[::-1][:few]
    return np.concatenate([quantiles, sizes])


def _centred(vectors: Tensor) -> Tensor:
    """The map whose squared norm is the variance of the entries."""
    return (vectors - vectors.mean(-1, keepdim=True)).div_(math.sqrt(vectors.shape[-1]))


def _negative(ordered: Array) -> float:
    return float(np.searchsorted(ordered, 0.0) / len(ordered))


def _counts(ordered: Array, edges: Sequence[float]) -> tuple[int, ...]:
    """Entries in [edge, next edge), the last bin with its end."""
    places = np.searchsorted(ordered, edges)
    places[-1] = np.searchsorted(ordered, edges[-1], side="right")
    return tuple(np.diff(places).tolist())


def _spread_and_shift(differences: Sequence[Array], like: Array) -> tuple[Array, Array]:
    """The standard deviation of order statistics, and half of what noise may have shifted them.

    They add up, for a shift is no spread: noise of another seed shifts the same way.
    """
    if not differences:
        return np.zeros_like(like), np.zeros_like(like)
    shift = np.abs(np.mean(differences, axis=0))
    return np.std(differences, axis=0, ddof=1), _HALF_SHIFT * shift


def _negative_stderr(again: Sequence[_Again]) -> float:
    """Turned entries count without their direction: at zero, noise turns as many back."""
    if not again:
        return 0.0
    spread = np.std([noisy.negative for noisy in again], ddof=1)
    return float(spread + np.mean([noisy.turned for noisy in again]))


def _root_mean_square(errors: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(errors)))) if errors else 0.0


def _std_stderr(variance: SquaredNorm) -> float:
    """How far the root moves when the variance does by its standard error, the further way."""
    value, error = variance.estimate, variance.stderr
    up, down = (value + error) ** 0.5, max(value - error, 0.0) ** 0.5
    return float(max(up - value**0.5, value**0.5 - down))


def _largest(
    diagonal: Diagonal, sizes: Array, shift: Array, parameters: Sequence[ParameterReport]
) -> tuple[Entry, ...]:
    """The entries of largest size, the first of equal ones.

    Being among the largest is partly luck, so what noise may have added at an entry's rank is
    added to the entry's own standard error.
    """
    values = diagonal.values.numpy()
    places = np.flatnonzero((values >= sizes[-1]) | (values <= -sizes[-1]))
    places = places[np.argsort(-np.abs(values[places]), kind="stable")][: len(sizes)]
    chosen = diagonal.part(torch.from_numpy(places))
    stderr = chosen.bars().numpy() + shift
    starts = np.cumsum([0, *(math.prod(p.shape) for p in parameters)])
    found = []
    for place, value, error in zip(places, chosen.values, stderr, strict=True):
        owner = int(np.searchsorted(starts, place, side="right")) - 1
        index = np.unravel_index(place - starts[owner], parameters[owner].shape)
        found.append(
            Entry(
                parameter=parameters[owner].name,
                index=tuple(map(int, index)),
                estimate=float(value),
                stderr=float(error),
            )
        )
    return tuple(found)
