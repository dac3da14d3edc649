"""What an exploration of a spectrum says, as results."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from hesscli.diagnostics.exploring import Exploration
from hesscli.engines.lanczos import Ritz
from hesscli.engines.quadrature import (
    FUNCTIONS,
    Array,
    Counted,
    Function,
    Measure,
    evaluate,
    smoothed,
    standing_alone,
)
from hesscli.results import (
    Condition,
    DenseSpectrum,
    Eigenvalue,
    Outliers,
    SpectralDensity,
    SpectralFunction,
    SpectralFunctions,
)

APART = 1.5
"""A step of the staircase is wide if one eigenvalue is so many times the next."""
_ROUND_OFF = 1e-9  # relative: a change of depth that says nothing


def listed(ritz: Ritz, count: int) -> list[int]:
    """The Ritz values to report: so many from the top, then from the bottom, descending."""
    total = len(ritz.values)
    top = range(total - 1, max(total - count, 0) - 1, -1)
    bottom = range(min(count, total - len(top)) - 1, -1, -1)
    return [*top, *bottom]


def eigenvalues(found: Exploration, indices: list[int]) -> Iterator[Eigenvalue]:
    """The listed Ritz values with their bars."""
    ritz = found.ritz
    settled = {i for group in standing_alone(ritz) for i in group.indices}
    for position, index in enumerate(indices):
        value, bar = float(ritz.values[index]), float(ritz.residuals[index])
        yield Eigenvalue(
            value=value,
            residual=bar,
            end="top" if position < found.plan.count else "bottom",
            settled=index in settled,
            copies=_copies(found.known, value, bar),
            vector_error=_vector_error(ritz, index) if index in settled else None,
        )


def _copies(known: tuple[Counted, ...], value: float, bar: float) -> int:
    return max((one.copies for one in known if one.is_at(value, bar)), default=1)


def _vector_error(ritz: Ritz, index: int) -> float | None:
    """Davis & Kahan: sin of the angle ≤ residual / distance to the other eigenvalues."""
    others = np.delete(np.arange(len(ritz.values)), index)
    distances = np.abs(ritz.values[others] - ritz.values[index]) - ritz.residuals[others]
    distance, bar = float(distances.min(initial=np.inf)), float(ritz.residuals[index])
    return bar / distance if bar < distance else None


def density(found: Exploration, bandwidth: float | None) -> SpectralDensity:
    """The density over all runs."""
    measure = found.measure
    smooth = smoothed(measure, len(found.runs), bandwidth)
    return SpectralDensity(
        grid=tuple(smooth.grid.tolist()),
        values=tuple(smooth.values.tolist()),
        bandwidth=smooth.bandwidth,
        scale=smooth.scale,
        nodes=tuple(measure.values.tolist()),
        weights=tuple(measure.weights.tolist()),
        isolated=tuple(measure.isolated.tolist()),
    )


def functions(found: Exploration) -> SpectralFunctions:
    """Sums over all eigenvalues, with error bars where several runs allow them."""
    return SpectralFunctions(**{n: _function(found, function) for n, function in FUNCTIONS.items()})


def _function(found: Exploration, function: Function) -> SpectralFunction:
    """The mean over the runs; no bar where depth matters more than the start vector."""
    if found.runs[0].complete:
        value = evaluate(function, found.measure, found.size)
        return SpectralFunction(
            value=value, stderr=None if value is None else 0.0, depth_change=0.0
        )
    each = _values(found.by_run, function, found.size)
    if each is None:
        return SpectralFunction(value=None, stderr=None, depth_change=None)
    value = float(each.mean())
    half = _values(found.by_half, function, found.size)
    if half is None or not len(half):
        return SpectralFunction(value=value, stderr=None, depth_change=None)
    stderr = float(each.std(ddof=1)) / math.sqrt(len(each))
    change = float((each[1:] - half).mean())
    settled = abs(change) <= max(stderr, _ROUND_OFF * abs(value))
    return SpectralFunction(value=value, stderr=stderr if settled else None, depth_change=change)


def _values(measures: list[Measure], function: Function, size: int) -> Array | None:
    """Of each measure; None where one of them has none."""
    values = [evaluate(function, measure, size) for measure in measures]
    known = [value for value in values if value is not None]
    return np.array(known) if len(known) == len(values) else None


def outliers(found: Exploration, classes: int | None) -> Outliers:
    """How many of the largest eigenvalues lie above the widest step of the staircase."""
    stairs = _stairs(found)
    ratios = stairs[:-1] / stairs[1:]
    at = None if classes is None or len(ratios) < classes - 1 else float(ratios[classes - 2])
    if not len(ratios) or ratios.max() < APART:
        return Outliers(count=0, ratio=None, classes=classes, class_ratio=at)
    widest = int(ratios.argmax())
    return Outliers(count=widest + 1, ratio=float(ratios[widest]), classes=classes, class_ratio=at)


def _stairs(found: Exploration) -> Array:
    """The positive eigenvalues that stand alone at the top, and the next; descending."""
    values = [value for one in found.known for value in [one.value] * one.copies]
    others = found.measure.values[~found.measure.isolated]
    below = float(others.max(initial=0.0))
    top = sorted((value for value in values if value > max(below, 0.0)), reverse=True)
    return np.array([*top, below] if below > 0 else top)


def condition(found: Exploration, relative: float, decay: float) -> Condition | None:
    """Of a matrix plus damping; None where it is zero, or not positive semidefinite."""
    ritz = found.ritz
    mean = float(found.measure.weights @ found.measure.values)
    if not mean > 0 or float((ritz.values + ritz.residuals).min()) < 0:
        return None
    damping = relative * mean
    least = max(float((ritz.values + ritz.residuals).min()), decay)
    if found.runs[0].complete:
        lowest = max(float((ritz.values - ritz.residuals).min()), decay, 0.0)
    else:
        lowest = decay
    largest, bar = float(ritz.values[-1]), float(ritz.residuals[-1])
    return Condition(
        damping=damping,
        relative_damping=relative,
        interval=(
            max((largest - bar + damping) / (max(least, 0.0) + damping), 1.0),
            (largest + bar + damping) / (lowest + damping),
        ),
    )


def dense_spectrum(known: Array, found: Measure) -> DenseSpectrum:
    """All eigenvalues, and the distance of the estimate from them."""
    size = float(np.abs(known).mean())
    return DenseSpectrum(
        eigenvalues=tuple(known.tolist()),
        distance=_wasserstein(known, found) / size if size else None,
    )


def _wasserstein(known: Array, found: Measure) -> float:
    """∫ |F − G| between two distribution functions."""
    places = np.sort(np.concatenate([known, found.values]))
    below = np.searchsorted(np.sort(known), places[:-1], side="right") / len(known)
    sums = np.concatenate([[0.0], np.cumsum(found.weights)])
    estimated = sums[np.searchsorted(found.values, places[:-1], side="right")]
    return float(np.abs(below - estimated) @ np.diff(places))
