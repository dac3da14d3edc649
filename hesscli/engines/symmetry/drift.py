"""What training does to charges, where it is known how it went: step by step, in closed form.

A gradient is orthogonal to what a symmetry does, so that of a step −lr v a quadratic charge Q keeps
only what is of second order, and a linear one nothing. With decay and momentum v is a sum over
earlier steps, whose products with the weights follow from Q(v) alone:

    Q(θ') = Q(θ) − 2 lr P + lr² Q(v),    P' = momentum (P − lr Q(v)) + decay Q(θ'),

P being the bilinear form of θ and v. Steps that are no gradients times a number, as Adam's, keep no
charge (Kunin et al., ICLR 2021; Zhao et al., arXiv 2402.07193).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hesscli.engines.symmetry.families import Family, Translation


class Prediction:
    """The charges of a family on their way, by torch's SGD without dampening or Nesterov's steps.

    Args:
        family: whose charges.
        theta: the weights before the first step, whose velocity was 0.
        decay: multiple of the weights that is added to the gradient.
        momentum: of the steps.

    Attributes:
        charges: after the steps so far; None once one was not known that has to be.
    """

    def __init__(
        self, family: Family, theta: Tensor, decay: float = 0.0, momentum: float = 0.0
    ) -> None:
        self._family, self._decay, self._momentum = family, decay, momentum
        self._linear = isinstance(family, Translation)
        self.charges: Tensor | None = family.charges(theta)
        self._cross = decay * self.charges

    def step(self, rate: float, update: Tensor | None) -> None:
        """Go on by a step.

        Args:
            rate: the learning rate.
            update: what was added to the weights; None where nobody knows.
        """
        if self.charges is None:
            return
        if self._linear:  # nothing happens to these but decay
            self.charges = self.charges - rate * self._cross
            self._cross = self._momentum * self._cross + self._decay * self.charges
            return
        if update is None:
            self.charges = None
            return
        moved = self._family.charges(update)
        self.charges = self.charges - 2 * rate * self._cross + moved
        own = moved / rate**2 if rate else torch.zeros_like(moved)
        kept = self._momentum * (self._cross - rate * own)
        self._cross = kept + self._decay * self.charges
