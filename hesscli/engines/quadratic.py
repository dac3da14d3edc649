"""Squared norms of what is known with noise, and their intervals.

With x = t + e, T(x) = ‖Lx‖² is too large by T(e) on average. Replicates e_g of the error tell by
how much, and both sources of spread of what is left: 2⟨Lt, Le⟩, which grows with the truth, and
the spread of T(e) around its mean, which does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

Array = NDArray[np.float64]

_UPPER = 0.975


def student(freedom: float, replicates: int, tail: float) -> float:
    """Student's quantile; a variance around the mean of G replicates knows G − 1 at most."""
    return float(stdtrit(min(freedom, replicates - 1), 1 - tail))


def student_scale(freedom: float) -> float:
    """What makes a standard error of so many degrees of freedom cover 95% within ±1.96 of it."""
    return float(stdtrit(freedom, _UPPER) / ndtri(_UPPER)) if math.isfinite(freedom) else 1.0


@dataclass(frozen=True)
class SquaredNorm:
    """An estimate of T(t) = ‖Lt‖².

    Attributes:
        plain: T(x).
        slopes: ``(G,)`` 2⟨Lx, Le_g⟩, or none where x is exact.
        biases: ``(G,)`` T(e_g).
        freedom: degrees of freedom of a variance estimated from the replicates, 0 where nothing
            is known of the error.
    """

    plain: float
    slopes: Array
    biases: Array
    freedom: float

    @property
    def bias(self) -> float:
        """What noise adds to T(x) on average."""
        return float(self.biases.mean()) if self.biases.size else 0.0

    @property
    def debiased(self) -> float:
        """Unbiased for T(t), and below zero by chance where T(t) is small."""
        return self.plain - self.bias

    @property
    def estimate(self) -> float:
        """T(t), not below zero."""
        return max(self.debiased, 0.0)

    @property
    def slope_variance(self) -> float:
        """Variance of 2⟨Lx, Le⟩."""
        return float(np.square(self.slopes).mean()) if self.slopes.size else 0.0

    @property
    def stderr(self) -> float:
        """Standard error of the estimate."""
        if not self.freedom:
            return math.inf
        growth, floor = self._variance()
        return math.sqrt(growth * self.estimate + floor)

    def interval(self, confidence: float) -> tuple[float, float]:
        """A score interval (Wilson 1927, "Probable inference").

        It holds each T₀ ≥ 0 from which the estimate is no further than Student's quantile times
        the standard error that the estimate would have if T₀ were true. Unlike estimate ±
        quantile · stderr it covers down to T₀ = 0, where it has but one end, and with noise in
        one direction as in many.
        """
        if not self.freedom:
            return 0.0, math.inf
        if not self.biases.size:
            return self.plain, self.plain
        growth, floor = self._variance()
        quantile = student(self.freedom, len(self.biases), (1 - confidence) / 2)
        lean = quantile**2 * growth / 2
        reach = lean**2 + quantile**2 * (growth * self.debiased + floor)
        centre, width = self.debiased + lean, math.sqrt(max(reach, 0.0))
        return max(min(centre - width, self.estimate), 0.0), max(centre + width, self.estimate)

    def _variance(self) -> tuple[float, float]:
        """The estimate's variance is the first times T(t), plus the second."""
        if not self.biases.size or self.plain == 0:
            return 0.0, 0.0
        return self.slope_variance / self.plain, _floor(self.biases, self.biases, self)


def share(part: SquaredNorm, rest: SquaredNorm) -> float:
    """Estimate of T_part / (T_part + T_rest); 1 where there is nothing to share."""
    whole = part.estimate + rest.estimate
    return part.estimate / whole if whole > 0 else 1.0


def share_interval(part: SquaredNorm, rest: SquaredNorm, confidence: float) -> tuple[float, float]:
    """Interval of the share by Fieller's method (1954, "Some problems in interval estimation").

    A share ρ is in it if (1 − ρ) T_part − ρ T_rest is not significantly off zero; where the sum
    itself is not significantly off zero, any share is.
    """
    estimate = share(part, rest)
    if not part.freedom:
        return 0.0, 1.0
    if not part.biases.size or part.plain + rest.plain == 0:
        return estimate, estimate
    slopes, biases = part.slopes + rest.slopes, part.biases + rest.biases
    whole = SquaredNorm(part.plain + rest.plain, slopes, biases, part.freedom)
    squared = student(part.freedom, len(biases), (1 - confidence) / 2) ** 2
    a = whole.debiased**2 - squared * _covariance(whole, whole)
    b = whole.debiased * part.debiased - squared * _covariance(whole, part)
    c = part.debiased**2 - squared * _covariance(part, part)
    if a <= 0:
        return 0.0, 1.0
    width = math.sqrt(max(b**2 - a * c, 0.0))
    low, high = np.clip([(b - width) / a, (b + width) / a], 0, 1)
    return min(float(low), estimate), max(float(high), estimate)


def _covariance(one: SquaredNorm, other: SquaredNorm) -> float:
    return float((one.slopes * other.slopes).mean()) + _floor(one.biases, other.biases, one)


def _floor(one: Array, other: Array, norm: SquaredNorm) -> float:
    """Of T(e) itself, and of its estimated mean."""
    product = (one - one.mean()) @ (other - other.mean())
    return float(product) / (len(one) - 1) * (1 + 1 / norm.freedom)
