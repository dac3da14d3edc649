"""Losses that are a sum over all examples, written as a multiple of their mean."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hesscli.problem.batches import Batch, size_of
from hesscli.problem.losses import Loss


class Summed(Loss):
    """A loss times the size of the whole loader, of which the kept examples are a sample.

    Everything that is a mean over batches, weighted by their mass, then is of the sum.

    Args:
        loss: whose mean is taken.
        multiple: the number of examples that the loader has, or what its steps divide by in all.
    """

    def __init__(self, loss: Loss, multiple: float) -> None:
        self.loss, self.multiple = loss, multiple
        self.name, self.reduction = loss.name, loss.reduction
        self.shows_examples = loss.shows_examples
        self.hidden, self.is_claim, self.output = loss.hidden, loss.is_claim, loss.output
        self.is_likelihood, self.warnings = loss.is_likelihood, loss.warnings

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """As the loss reads them."""
        return self.loss.outputs(model, batch)

    def targets(self, batch: Batch) -> Tensor:
        """As the loss reads them."""
        return self.loss.targets(batch)

    def masses(self, batch: Batch) -> Tensor:
        """One an example, whatever its weight: a sum has no divisor that a sample would guess."""
        if self.shows_examples:
            return torch.ones(size_of(batch), dtype=torch.float64)
        return self.loss.masses(batch)

    def mass(self, model: nn.Module, batch: Batch, count: int | None = None) -> float:
        """The number of examples, or what a step divides by."""
        if self.shows_examples:
            return float(size_of(batch))
        return self.loss.mass(model, batch, count)

    def numerators(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Multiplied."""
        return self.multiple * self.loss.numerators(outputs, batch)

    def mean(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Multiplied."""
        share = self._share(batch)
        return share * self.loss.mean(outputs, batch) if share else 0.0 * outputs.sum()

    def evaluate(self, model: nn.Module, batch: Batch) -> Tensor:
        """Multiplied."""
        share = self._share(batch)
        if not share:
            return 0.0 * self.outputs(model, batch).sum()
        return share * self.loss.evaluate(model, batch)

    def _share(self, batch: Batch) -> float:
        """What the loss's own mean of a batch is multiplied by to be the mean over examples."""
        if not self.shows_examples:
            return self.multiple
        return self.multiple * float(self.loss.masses(batch).sum()) / size_of(batch)

    @property
    def unscaled(self) -> Loss:
        """The mean."""
        return self.loss

    @property
    def natural(self) -> Loss:
        """Of the mean, multiplied."""
        return Summed(self.loss.natural, self.multiple)

    def check(self, outputs: Tensor, batch: Batch) -> None:
        """As the loss does."""
        self.loss.check(outputs, batch)

    def correct(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """As the loss does."""
        return self.loss.correct(outputs, batch)
