"""What training does to charges, where it is known how it went: step by step, in closed form.

A gradient is orthogonal to what a symmetry does, so that of a step −lr v a quadratic charge Q keeps
only what is of second order, and a linear one nothing. With decay and momentum v is a sum over
earlier steps, whose products with the weights follow from the steps alone. With B the bilinear form
of Q, and torch's v' = momentum v + (1 − dampening) (∇L + decay θ),

    Q(θ') = Q(θ) − 2 lr P + lr² Q(v),    P = B(θ, v),
    P' = momentum (P − lr Q(v)) + (1 − dampening) decay Q(θ').

Nesterov's step is of d = ∇L + decay θ + momentum v instead, whence v = (d + momentum v₋₁) / (1 +
momentum). Steps that are no gradients times a number, as Adam's, keep no charge (Kunin et al.,
ICLR 2021; Zhao et al., arXiv 2402.07193).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscli.engines.symmetry.families import Family, Translation, signs

_DRAWS = 8
"""Of rounded weights, from which the usual size of their charges' rounding is told."""


@dataclass(frozen=True)
class Descent:
    """How torch's SGD makes steps of gradients.

    Attributes:
        decay: multiple of the weights that is added to the gradient.
        momentum: of the steps.
        dampening: share of a gradient that its velocity does without, after the first.
        nesterov: whether steps look ahead.
        velocity: before the first step, ``(d,)``; None where that is the first of all.
    """

    decay: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    velocity: Tensor | None = None


class Prediction:
    """The charges of a family on their way.

    Args:
        family: whose charges.
        theta: the weights before the first step.
        descent: how steps are made.

    Attributes:
        charges: after the steps so far; None once one was not known that has to be.
    """

    def __init__(self, family: Family, theta: Tensor, descent: Descent) -> None:
        self._family, self._descent = family, descent
        self._linear = isinstance(family, Translation)
        self._velocity = descent.velocity
        self.charges: Tensor | None = family.charges(theta)
        if descent.velocity is None:
            self._cross = descent.decay * self.charges
        else:
            moved = self._paired(theta, descent.velocity)
            self._cross = descent.momentum * moved + self._fresh(self.charges)

    def _paired(self, one: Tensor, other: Tensor) -> Tensor:
        """B of two vectors, and of a linear charge its value at the second."""
        if self._linear:
            return self._family.charges(other)
        charges = self._family.charges
        return (charges(one + other) - charges(one - other)) / 4

    def _fresh(self, charges: Tensor) -> Tensor:
        """What decay brings into the velocity."""
        return (1 - self._descent.dampening) * self._descent.decay * charges

    def _ahead(self, charges: Tensor) -> Tensor:
        """B(θ, −step / lr)."""
        if not self._descent.nesterov:
            return self._cross
        return self._descent.decay * charges + self._descent.momentum * self._cross

    def step(self, rate: float, update: Tensor | None) -> None:
        """Go on by a step.

        Args:
            rate: the learning rate.
            update: what was added to the weights; None where nobody knows.
        """
        if self.charges is None:
            return
        if self._linear:  # nothing happens to these but decay
            self.charges = self.charges - rate * self._ahead(self.charges)
            self._cross = self._descent.momentum * self._cross + self._fresh(self.charges)
            return
        if update is None or (self._descent.nesterov and not rate):
            self.charges = None
            return
        moved = self._family.charges(update)
        self.charges = self.charges - 2 * rate * self._ahead(self.charges) + moved
        own = self._with_velocity(rate, update, moved)
        self._cross = self._descent.momentum * (self._cross + own) + self._fresh(self.charges)

    def _with_velocity(self, rate: float, update: Tensor, moved: Tensor) -> Tensor:
        """B(step, v)."""
        if not self._descent.nesterov:
            return -moved / rate if rate else torch.zeros_like(moved)
        momentum, before = self._descent.momentum, self._velocity
        ahead = -update / rate + (0.0 if before is None else momentum * before)
        self._velocity = ahead / (1 + momentum)
        return self._paired(update, self._velocity)


def rounding_of(family: Family, theta: Tensor, eps: float, steps: int) -> float:
    """What the rounding of weights does to the norm of a family's charges, in 95% and more.

    Each step leaves each weight within eps/2 of what it should be. Over the weights that is at
    random, and over the steps it need not be: where these are short and alike, so is their
    rounding. A root mean square over the weights is taken twice, as often as there are steps.

    Args:
        family: whose charges.
        theta: the weights.
        eps: of their type.
        steps: that were made; what is stored in the end is rounded once more.
    """
    generator = torch.Generator().manual_seed(0)
    squares = 0.0
    for _ in range(_DRAWS):
        off = theta * signs(theta.shape, generator)
        moved = (family.charges(theta + off) - family.charges(theta - off)) / 2
        squares += float(moved.square().sum()) / _DRAWS
    return 2 * (steps + 1) * eps / 2 * math.sqrt(squares)
