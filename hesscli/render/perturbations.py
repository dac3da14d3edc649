"""Changes of a layer's weights as people read them; shared by tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable

from hesscli.render import words
from hesscli.results import LOW_LEVERAGE, LayerSensitivity, Perturbation, ScaledChange

_AIR = 1.5
_FURTHEST = 1e-8
"""Of the largest change: smaller ones are not told apart on an axis with both signs."""


def label(change: Perturbation) -> str:
    """Name a change, as in ``prune 50%`` or ``4 bit tensor``."""
    if change.kind == "prune":
        return f"prune {words.percent(change.level)}"
    return f"{change.level:g} bit {change.granularity}"


def predicted(change: Perturbation) -> float:
    """By how much the loss is predicted to grow."""
    return change.linear + change.quadratic


def size(change: Perturbation, scale: float = 1.0) -> float:
    """|linear| + |quadratic| of the change shrunk to a scale: what errors are measured by."""
    return abs(scale * change.linear) + abs(scale**2 * change.quadratic)


def miss(change: Perturbation, scaled: ScaledChange) -> float | None:
    """The error of a prediction as a share of its size; None where that is zero."""
    whole = size(change, scaled.scale)
    return abs(scaled.measured - scaled.predicted) / whole if whole else None


def verified(layers: Iterable[LayerSensitivity]) -> bool:
    """Tell whether any loss was measured."""
    return any(change.measured is not None for layer in layers for change in layer.perturbations)


def least_certain(layers: Iterable[LayerSensitivity]) -> float | None:
    """The largest two standard errors of a prediction as a share of its size."""
    changes = (change for layer in layers for change in layer.perturbations)
    shares = [2 * change.stderr / size(change) for change in changes if size(change)]
    return max((share for share in shares if math.isfinite(share)), default=None)


def ranks_by_magnitude(layer: LayerSensitivity) -> bool:
    """Tell whether damping and not data decides how the layer's weights rank."""
    return layer.leverage < LOW_LEVERAGE


def ranked_by(layer: LayerSensitivity) -> str:
    """Say what decides how a layer's weights rank."""
    return "magnitude" if ranks_by_magnitude(layer) else "data"


def above_next(layer: LayerSensitivity) -> str:
    """How sure it is that the layer's mean saliency is higher than the next one's."""
    return "-" if layer.above_next is None else words.probability(layer.above_next)


def axis_edges(values: Iterable[float]) -> tuple[float, ...]:
    """Where an axis of loss changes begins and ends, with room for a mark beyond each of them.

    Where not all are positive, between the two lies the size below which it turns linear.
    """
    drawn = sorted(value for value in values if math.isfinite(value))
    if not drawn:
        return ()
    if drawn[0] > 0:
        return drawn[0] / _AIR, drawn[-1] * _AIR
    largest = max(-drawn[0], drawn[-1])
    least = min((abs(value) for value in drawn if value), default=1.0)
    threshold = max(least, _FURTHEST * largest)
    return min(drawn[0], -threshold) * _AIR, -threshold, threshold, max(drawn[-1], threshold) * _AIR
