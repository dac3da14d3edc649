"""An estimate of a diagonal, with replicates of its error, its squared norm, and its shrinkage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit
from torch import Tensor

# -- Squared norms of what is known with noise, and their intervals --------------------------------
# With x = t + e, T(x) = ‖Lx‖² is too large by T(e) on average. Replicates e_g of the error tell by
# how much, and both sources of spread of what is left: 2⟨Lt, Le⟩, which grows with the truth, and
# the spread of T(e) around its mean, which does not.


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
    """Variance of T(e) itself, and of its estimated mean, together."""
    product = (one - one.mean()) @ (other - other.mean())
    return float(product) / (len(one) - 1) * (1 + 1 / norm.freedom)


# -- An estimate of a diagonal, with replicates of its error ---------------------------------------


_AT_ONCE = 1 << 20
"""Entries of replicates that are in float64 at a time."""


@dataclass(frozen=True)
class Diagonal:
    """Entries of a diagonal, on the CPU.

    Attributes:
        values: ``(d,)`` float64, unbiased for the true diagonal.
        noise: ``(G, d)``, replicates of the joint error of all entries: given the data
            uncorrelated draws of mean zero, whose covariance is an unbiased estimate of the
            error's. None where the values are exact.
        freedom: degrees of freedom of a variance estimated from the replicates, at most G; 0 where
            the error is not known.
        moved: how far each entry was moved from its unbiased value ``(d,)``, None for not at all.
    """

    values: Tensor
    noise: Tensor | None
    freedom: float
    moved: Tensor | None = None

    def part(self, entries: slice | Tensor) -> Diagonal:
        """Some entries alone: a slice (as views), or their places."""
        noise = None if self.noise is None else self.noise[:, entries]
        moved = None if self.moved is None else self.moved[entries]
        return Diagonal(self.values[entries], noise, self.freedom, moved)

    def variance(self) -> Tensor:
        """Variance of each unbiased entry, ``(d,)`` float64: the mean square over replicates."""
        if not self.freedom:
            return torch.full_like(self.values, math.inf)
        total = torch.zeros_like(self.values)
        for errors in self._errors():
            total += errors.square_().sum(0)
        return total.div_(1 if self.noise is None else len(self.noise))

    def stderr(self) -> Tensor:
        """Standard error of each unbiased entry, ``(d,)`` float64."""
        return self.variance().sqrt_()

    def bars(self) -> Tensor:
        """Standard error of each entry, scaled so that ±1.96 of it covers 95%, ``(d,)`` float64.

        By Student's quantile, since the variance is estimated; what was moved is in it too.
        """
        variance = self.variance()
        if self.noise is not None and self.freedom:
            variance *= student_scale(self.freedom) ** 2
        if self.moved is not None:
            variance += self.moved.square()
        return variance.sqrt_()

    def squared_norm(self, linear: Callable[[Tensor], Tensor] = lambda v: v) -> SquaredNorm:
        """‖L t‖² of the true diagonal t, for a linear map of ``(…, d)``, default 1."""
        mapped = linear(self.values)
        slopes, biases = [mapped.new_zeros(0)], [mapped.new_zeros(0)]
        for errors in self._errors():
            images = linear(errors)
            slopes.append(2 * (images @ mapped))
            biases.append(torch.linalg.vector_norm(images, dim=-1).square())
        return SquaredNorm(
            plain=float(mapped @ mapped),
            slopes=torch.cat(slopes).numpy(),
            biases=torch.cat(biases).numpy(),
            freedom=self.freedom,
        )

    def _errors(self) -> Iterator[Tensor]:
        """The replicates in float64, a few at a time."""
        if self.noise is not None:
            few = max(1, _AT_ONCE // max(1, len(self.values)))
            yield from (errors.double() for errors in torch.split(self.noise, few))

    def relative_error(self) -> float:
        """Expected ‖error‖ / ‖t‖, with noise taken out of the norm; infinite where it is all."""
        norm = self.norm
        if not self.freedom:
            return math.inf
        if norm.bias == 0:
            return 0.0
        return math.sqrt(norm.bias / norm.debiased) if norm.debiased > 0 else math.inf

    def relative_error_bound(self, confidence: float) -> float:
        """What ‖error‖ / ‖t‖ stays below with probability ``confidence``.

        The error e is like one more replicate: ‖e‖² stays below a prediction bound for the next
        of G draws, made for its cube root, which is close to normal however few or many
        directions share the noise (Wilson & Hilferty 1931, "The distribution of chi-square").
        What is not known of ‖t‖ comes from the same e: ‖x‖² = ‖t‖² + 2⟨t, e⟩ + ‖e‖², so
        ‖e‖² ≤ ρ‖t‖² is (1 + ρ)‖e‖² + 2ρ⟨t, e⟩ ≤ ρ‖x‖², and the bound is the smallest ρ for which
        the left side's mean and spread leave room. Infinite where noise hides the diagonal.
        """
        norm = self.norm
        if not self.freedom:
            return math.inf
        if norm.bias == 0:
            return 0.0
        roots = np.cbrt(norm.biases)
        quantile = student(self.freedom, len(roots), 1 - confidence)
        highest = roots.mean() + quantile * roots.std(ddof=1) * math.sqrt(1 + 1 / self.freedom)
        above = float(highest) ** 3 - norm.bias
        a = norm.debiased**2 - above**2 - quantile**2 * norm.slope_variance
        b = norm.debiased * norm.bias + above**2
        c = norm.bias**2 - above**2
        if a <= 0 or norm.debiased <= 0:
            return math.inf
        return math.sqrt((b + math.sqrt(max(b**2 - a * c, 0.0))) / a)

    @cached_property
    def norm(self) -> SquaredNorm:
        """‖t‖² of the true diagonal t."""
        return self.squared_norm()


# -- Shrinkage of a noisy diagonal towards what is known of its shape, with bars that know of it ---
# James–Stein estimation, positive part, layer by layer: where noise is most of what was measured,
# little of it is kept (Efron & Morris 1973, "Stein's estimation rule and its competitors", section
# 3). No entry moves by more than a few of its own standard errors (their "limited translation" of
# 1972), so that one without noise stays where it is; and each layer keeps its sum.
#
# The bar of an entry that was moved by Δ is the root of s² + Δ². At whatever distance the truth
# lies from the shape, and however much of it is kept, ±1.96 of that covers 95% and more: it is
# conservative where much was moved, and the plain bar where little was.


_FURTHEST = 5.0
"""Standard errors that an entry may be moved by."""


def shrunk(layer: Diagonal, prior: Tensor) -> tuple[Diagonal, float]:
    """A layer's entries, pulled towards the multiple of a prior that has their sum.

    Args:
        layer: its entries, with replicates of their error.
        prior: shape to be pulled towards ``(d,)``, scaled to fit; its signs do not count.

    Returns:
        The entries with how far they were moved, and the share of their distance from the prior
        that was to be kept: 1 where there is no noise, none that is known, or no shape where it is.
    """
    if not layer.freedom:
        return layer, 1.0
    values, error = layer.values, layer.stderr()
    noisy = (error > 0).double()
    shape = prior.abs() * noisy
    size = float(shape.sum())
    if not size:
        return layer, 1.0
    distance = (values - shape * (float(values @ noisy) / size)) * noisy
    spread = float(distance @ distance)
    kept = max(0.0, 1 - float(error @ error) / spread) if spread else 1.0
    furthest = _FURTHEST * error
    moved = ((kept - 1) * distance).clamp(-furthest, furthest)
    moved -= error * (moved.sum() / error.sum())  # what the limit has taken from the sum
    return replace(layer, values=values + moved, moved=moved), kept
