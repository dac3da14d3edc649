"""Losses that are a sum over all examples, written as a multiple of their mean."""

from __future__ import annotations

from torch import Tensor, nn

from hesscli.problem.batches import Batch
from hesscli.problem.losses import Loss


class Summed(Loss):
    """A loss times the mass of the whole loader, of which the kept examples are a sample.

    Everything that is a mean over batches, weighted by their mass, then is of the sum.

    Args:
        loss: whose mean is taken.
        multiple: the mass of all the examples that the loader has.
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
        """Of the mean."""
        return self.loss.masses(batch)

    def mass(self, model: nn.Module, batch: Batch, count: int | None = None) -> float:
        """Of the mean."""
        return self.loss.mass(model, batch, count)

    def numerators(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Multiplied."""
        return self.multiple * self.loss.numerators(outputs, batch)

    def mean(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Multiplied."""
        return self.multiple * self.loss.mean(outputs, batch)

    def evaluate(self, model: nn.Module, batch: Batch) -> Tensor:
        """Multiplied."""
        return self.multiple * self.loss.evaluate(model, batch)

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
