"""An estimate of a diagonal, with replicates of its error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hesscli.engines.quadratic import SquaredNorm, student, student_scale

_AT_ONCE = 1 << 20
"""Entries of replicates that are in float64 at a time."""


@dataclass(frozen=True)
class Diagonal:
    """Entries of a diagonal, on the CPU.

    Attributes:
        values: ``(d,)`` float64, unbiased for the true diagonal.
        noise: ``(G, d)`` float32, replicates of the joint error of all entries: given the data
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
        """Of each unbiased entry, ``(d,)`` float64: the mean square over replicates."""
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
            slopes.append(2 * images @ mapped)
            biases.append(images.square().sum(-1))
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
        norm = self._norm
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
        norm = self._norm
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
    def _norm(self) -> SquaredNorm:
        return self.squared_norm()
