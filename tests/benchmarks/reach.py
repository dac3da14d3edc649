"""How many products an estimator takes to come within an error of the truth, at best.

At best: the smallest number whose median error over runs is small enough, which nobody who does
not know the truth can tell. A library's own rule for when to stop can only add to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

How = Literal["measured", "extrapolated", "all unit vectors", "exact"]
RESAMPLES = 200


@dataclass(frozen=True)
class Reach:
    """Products, quartiles of that number under resampling of the runs, and how it was found."""

    products: float
    low: float
    high: float
    how: How


def by_rate(errors: Sequence[float], wanted: float, columns: int, unit: int) -> Reach:
    """Of a mean of independent rounds, from its error after one: as found, then resampled.

    Args:
        errors: these.
        wanted: error to come to.
        columns: products with unit vectors that make the matrix known.
        unit: products in a round.
    """
    first, *others = errors
    low, high = np.quantile(others, [0.25, 0.75])
    middle, least, most = (unit * rounds(error, wanted) for error in (first, low, high))
    if middle >= columns:
        return Reach(columns, columns, columns, "all unit vectors")
    return Reach(middle, least, most, "extrapolated")


def rounds(first: float, wanted: float) -> int:
    """Whose mean is off by ``wanted``, where one is off by ``first``."""
    return max(1, math.ceil((first / wanted) ** 2))


def by_grid(errors: Mapping[int, Sequence[float]], wanted: float, columns: int) -> Reach:
    """Of anything else, from the errors of runs at each of several numbers of products."""
    generator = np.random.default_rng(0)
    resampled = [
        {m: generator.choice(runs, len(runs)).tolist() for m, runs in errors.items()}
        for _ in range(RESAMPLES)
    ]
    middle = crossing(errors, wanted)
    low, high = np.quantile([crossing(again, wanted) for again in resampled], [0.25, 0.75])
    if middle >= columns:
        return Reach(columns, columns, columns, "all unit vectors")
    how: How = "measured" if middle <= max(errors) else "extrapolated"
    return Reach(middle, float(low), float(high), how)


def crossing(errors: Mapping[int, Sequence[float]], wanted: float) -> float:
    """Where the falling curve of medians meets ``wanted``.

    It is straight between its points in logarithms, and goes on as between its last point and the
    one with half as many products.
    """
    points = sorted(falling(errors).items())
    below = next((i for i, (_, error) in enumerate(points) if error <= wanted), None)
    if below == 0:
        return points[0][0]
    m1, e1 = points[-1 if below is None else below]
    m0, e0 = points[below - 1] if below else max(p for p in points if 2 * p[0] <= m1)
    return m0 * (m1 / m0) ** (math.log(e0 / wanted) / math.log(e0 / e1)) if e0 > e1 else math.inf


def falling(errors: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """Medians by number of products, averaged where by chance they rise (adjacent violators)."""
    levels: list[tuple[float, int, list[int]]] = []  # mean of medians, runs, numbers of products
    for products, runs in sorted(errors.items()):
        level, weight, members = float(np.median(runs)), len(runs), [products]
        while levels and levels[-1][0] < level:
            before, count, others = levels.pop()
            level = (level * weight + before * count) / (weight + count)
            weight, members = weight + count, others + members
        levels.append((level, weight, members))
    return {products: level for level, _, members in levels for products in members}
