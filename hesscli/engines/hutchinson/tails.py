"""Whether batches that are a sample tell how far off their mean is: skew and heavy tails.

Student's interval is for batches that differ symmetrically. Where they are skew, its upper end
comes too short by γ (1 + 2t²) / (6√n) standard errors to first order, by which it is widened
(Johnson 1978, "Modified t tests and confidence intervals for asymmetrical populations"; Hall
1983, "Inverting an Edgeworth expansion"). Where a few batches carry much of the sum, what was
left out may hold others like them, and no width is enough: the interval is unknown.

Tails are heavy where three things come together, of which ordinary data have one at most:

- The batches are more skew than the exponential distribution, so that widening is no use.
- They are no Gamma distribution of whatever shape, close to which a sum over many independent
  examples is that have exponential tails, however few of them matter: the cube root of a Gamma
  variable is close to normal (Wilson & Hilferty 1931, "The distribution of chi-square"), and
  here it is skew by D'Agostino's test (1970, "Transformation to normality of the null
  distribution of g1").
- They are no sum over as many exponential variables as a batch has examples, by the same test of
  the cube root, wherever such a distribution may begin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

FEWEST = 8
"""Batches from which on their skewness tells anything."""
_ANY_GAMMA, _OWN_GAMMA = 2.05, 2.58
"""Normal scores that 2% and 0.5% of samples exceed: the second sees samples' own moments."""
_SKEW = 2.0
"""Skewness of the batches, that of the exponential distribution, up to which widening is enough."""


@dataclass(frozen=True)
class Tails:
    """How batches differ.

    Attributes:
        count: batches.
        skewness: of the deviations of each column ``(C,)``; 0 where there are too few batches.
        heavy: whether those of the last column, the total, have heavy tails.
        largest: the share of the total that one batch makes up, the largest there is.
    """

    count: int
    skewness: Array
    heavy: bool
    largest: float

    def widening(self, quantile: Array) -> Array:
        """How many times as wide as Student's, by his quantile, an interval has to be ``(C,)``."""
        short = np.abs(self.skewness) * (1 + 2 * quantile**2) / (6 * math.sqrt(self.count))
        return np.asarray(1 + short / quantile)


def tails_of(means: Array, share: Array, examples: float = 1.0) -> Tails:
    """Describe batches.

    Args:
        means: one of each batch and column ``(B, C)``, the total in the last.
        share: weights of the batches, which sum to 1.
        examples: independent ones in a batch, on average.
    """
    count = len(means)
    estimate = share @ means
    parts = share * means[:, -1]
    largest = float(np.abs(parts).max() / abs(estimate[-1])) if estimate[-1] else 0.0
    if count < FEWEST:
        return Tails(count, np.zeros(means.shape[1]), False, largest)
    deviations = share[:, None] * (means - estimate)
    skewness = _skewness(deviations, np.abs(share[:, None] * means).max(0))
    upwards = np.sign(estimate[-1]) or 1.0
    heavy = upwards * skewness[-1] > _SKEW
    if heavy:  # so that they differ by more than rounding
        off = upwards * deviations[:, -1]
        scaled = 1 + off / (off.std() * math.sqrt(examples))
        heavy = (
            _score(np.cbrt(upwards * means[:, -1])) > _ANY_GAMMA
            and _score(np.cbrt(scaled)) > _OWN_GAMMA
        )
    return Tails(count, skewness, bool(heavy), largest)


def _skewness(values: Array, size: Array | float) -> Array:
    """Third standardised moment along the first axis; 0 where all differ by rounding of a size."""
    off = values - values.mean(0)
    square = np.square(off).mean(0)
    rounding = np.square(np.finfo(float).eps * len(values) * size)
    scale = np.where(square > rounding, square, np.inf) ** 1.5
    return np.asarray((off**3).mean(0) / scale)


def _score(values: Array) -> float:
    """D'Agostino's score of a sample's skewness, standard normal for a normal sample."""
    n = float(len(values))
    skewness = float(_skewness(values, np.abs(values).max()))
    y = skewness * math.sqrt((n + 1) * (n + 3) / (6 * (n - 2)))
    kurtosis = 3 * (n**2 + 27 * n - 70) * (n + 1) * (n + 3)
    kurtosis /= (n - 2) * (n + 5) * (n + 7) * (n + 9)
    w = math.sqrt(2 * (kurtosis - 1)) - 1
    return math.asinh(y * math.sqrt((w - 1) / 2)) / math.sqrt(0.5 * math.log(w))
