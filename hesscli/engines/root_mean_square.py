"""AdaHessian's memory of a Hessian diagonal: a root mean square over past estimates.

D̄_t = √( (1−β) Σ_i β^(t−i) h_i² / (1−β^t) ), entry by entry, for estimates h_i of diagonals D_i
("Hessian momentum" in Yao, Gholami, Shen, Mustafa, Keutzer & Mahoney 2020, "ADAHESSIAN: an
adaptive second order optimizer for machine learning", arXiv 2006.00719). With w_i the weights,
which sum to 1,

    E[D̄_t²] = Σ w_i (D_i² + Var h_i):

the noise of the estimates goes into the mean square and no β averages it out. For one Rademacher
probe Var h is the sum of the row's squares off the diagonal, so that D̄ tends to the norms of the
rows. Where the variances are estimated too, their mean can be taken off again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscli.errors import UsageError


class RootMeanSquare:
    """The running root mean square of a stream of estimates, of any one shape.

    Steps between updates, as when the Hessian is looked at only now and then, count for nothing.

    Args:
        beta2: share of the past that an update keeps.
        dtype: of the sums, which are where the estimates are.

    >>> import torch
    >>> mean = RootMeanSquare(beta2=0.5)
    >>> mean.update(torch.tensor([-3.0]))
    >>> mean.value  # one update is its own mean
    tensor([3.], dtype=torch.float64)
    """

    def __init__(self, beta2: float = 0.999, *, dtype: torch.dtype = torch.float64) -> None:
        if not 0 <= beta2 < 1:
            raise UsageError("beta2 must lie in [0, 1)", str(beta2), "beta2=0.999")
        self.beta2, self.dtype = beta2, dtype
        self.count = 0
        """Updates so far."""
        self._square: Tensor | None = None
        self._noise: Tensor | None = None
        self._noise_mass = 0.0

    def update(self, estimate: Tensor, variance: Tensor | None = None) -> None:
        """Take in one more estimate.

        Args:
            estimate: of the diagonal, or of averages over its blocks.
            variance: an unbiased estimate of the estimate's own variance, where there is one:
                :func:`variance_of_mean` or :func:`variance_from_successive`.

        Raises:
            UsageError: one is not of the shape that all have had so far.
        """
        before = estimate if self._square is None else self._square
        for new in (estimate,) if variance is None else (estimate, variance):
            if new.shape != before.shape:
                raise UsageError(
                    "all estimates and variances must have one shape",
                    f"{tuple(new.shape)} after {tuple(before.shape)}",
                    "one RootMeanSquare for each tensor",
                )
        self._square = self._averaged(self._square, estimate.detach().to(self.dtype).square())
        self._noise_mass *= self.beta2
        if variance is not None:
            self._noise = self._averaged(self._noise, variance.detach().to(self.dtype))
            self._noise_mass += 1 - self.beta2
        elif self._noise is not None:
            self._noise.mul_(self.beta2)
        self.count += 1

    @property
    def mean_square(self) -> Tensor:
        """D̄², whose expectation is Σ w_i (D_i² + Var h_i).

        Raises:
            UsageError: there has been no update.
        """
        if self._square is None:
            raise UsageError("there is no estimate yet", "no update", "update(estimate) first")
        return self._square / (1 - self.beta2**self.count)

    @property
    def noise(self) -> Tensor:
        """Σ w_i Var h_i, from the updates that came with a variance.

        Raises:
            UsageError: none did.
        """
        if self._noise is None:
            raise UsageError(
                "the noise is not known", "no update with a variance", "update(estimate, variance)"
            )
        return self._noise / self._noise_mass

    @property
    def value(self) -> Tensor:
        """AdaHessian's D̄, biased upwards by noise."""
        return self.mean_square.sqrt_()

    @property
    def debiased(self) -> Tensor:
        """D̄ without the noise: √max(D̄² − noise, 0).

        D̄² − noise is unbiased for Σ w_i D_i² where every update has a variance of its own; where
        some have none, if the noise was the same throughout. Cutting off at 0 leaves an upward
        bias in entries that are smaller than their noise.
        """
        return (self.mean_square - self.noise).clamp_(min=0).sqrt_()

    def state_dict(self) -> dict[str, Any]:
        """All there is to go on from, by reference, as torch's optimizers give theirs."""
        return {
            "beta2": self.beta2,
            "count": self.count,
            "square": self._square,
            "noise": self._noise,
            "noise_mass": self._noise_mass,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where another left off, on its device and in this one's dtype."""
        self.beta2, self.count = state["beta2"], state["count"]
        self._square, self._noise = self._copy(state["square"]), self._copy(state["noise"])
        self._noise_mass = state["noise_mass"]

    def _averaged(self, mean: Tensor | None, new: Tensor) -> Tensor:
        """The mean moved towards a new value, in place; from zero if there is none."""
        if mean is None:
            return new * (1 - self.beta2)
        return mean.lerp_(new, 1 - self.beta2)

    def _copy(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(self.dtype, copy=True)


def variance_of_mean(estimates: Tensor) -> Tensor:
    """Variance of the mean of two or more independent estimates ``(P, ...)`` of one update.

    It assumes nothing of other updates. Where the estimates share a mini-batch, it is the noise
    of the probes alone: what differs between batches counts as curvature.
    """
    return estimates.var(0) / len(estimates)


def variance_from_successive(before: Tensor, now: Tensor) -> Tensor:
    """Variance of each of two successive updates' independent estimates, from their difference.

    It assumes that the diagonal D is the same at both: half the squared change of D counts as
    noise, and is taken off too much. Where each update has a batch of its own, the differences
    between batches are noise here.
    """
    return (now - before).square_() / 2
