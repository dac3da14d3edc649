"""Losses that compare outputs and targets entry by entry."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional

from hesscli.errors import InputError, UnsoundError
from hesscli.problem.batches import Batch
from hesscli.problem.losses import Loss, doubles, require_shape


class Entrywise(Loss):
    """The mean, or sum, over all entries of outputs and targets of one shape ``(N, ...)``."""

    def masses(self, batch: Batch) -> Tensor:
        """One an example, or the mean weight of its entries."""
        ones = torch.ones_like(torch.as_tensor(self.targets(batch)), dtype=torch.float64)
        return self.weighed(ones, batch).reshape(len(ones), -1).mean(1)

    @abstractmethod
    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of each entry."""

    def curvature(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Second derivative of each entry's loss, as autograd makes it."""
        with torch.enable_grad():
            outputs = outputs.detach().requires_grad_()
            terms = self.terms(outputs, self.targets(batch).to(outputs.dtype))
            slope = torch.autograd.grad(terms.sum(), outputs, create_graph=True)[0]
            return torch.autograd.grad(slope.sum(), outputs)[0]

    def numerators(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Mean over an example's entries, or their sum."""
        terms = self.terms(outputs, self.targets(batch).to(outputs.dtype))
        terms = self.weighed(terms, batch).reshape(len(terms), -1)
        return terms.sum(1) if self.reduction == "sum" else terms.mean(1)

    def check(self, outputs: Tensor, batch: Batch) -> None:
        """One shape: broadcasting (N, 1) against (N,) would average N² differences."""
        require_shape(self.name, outputs, self.targets(batch))


class MeanSquaredError(Entrywise):
    """``F.mse_loss``."""

    name = "mse"
    is_likelihood = True

    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of each entry."""
        return (outputs - targets).square()

    def curvature(self, outputs: Tensor, batch: Batch) -> Tensor:
        """2 everywhere."""
        return torch.full_like(outputs, 2.0)


class _Binary(Entrywise):
    """Entries that are true or not; ``weight`` is of the entries of one example.

    As torch divides: by the number of entries, whatever they weigh.
    """

    def __init__(self, weight: list[float] | None = None) -> None:
        self.weight = doubles(weight)

    def check(self, outputs: Tensor, batch: Batch) -> None:
        """One shape, and weights that are not of the examples of some batch."""
        super().check(outputs, batch)
        if self.weight is None:
            return
        entries, given = tuple(outputs.shape[1:]), tuple(self.weight.shape)
        own = given[1:] if len(given) > len(entries) and given[0] == 1 else given
        pairs = zip(own[::-1], entries[::-1], strict=False)
        if len(own) > len(entries) or any(size not in (1, of) for size, of in pairs):
            raise InputError(
                f"{self.name} takes weights of the entries of one example, {entries}",
                f"weight of shape {given}",
                "[loss] factory of a loss that reads each example's weight from the targets",
            )

    def entry_weight(self, outputs: Tensor) -> Tensor | None:
        """The weights of entries in the outputs' type."""
        return None if self.weight is None else self.weight.to(outputs)

    def correct(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Entries on the right side of probability ½; None where targets are shares."""
        targets = self.targets(batch)
        if not bool(((targets == 0) | (targets == 1)).all()):
            return None
        kept = self.weighed(torch.ones_like(outputs), batch) != 0
        right = (outputs > self.boundary) == (targets > 0.5)
        return (right & kept).sum(), kept.sum()

    boundary: float


class BinaryCrossEntropy(_Binary):
    """``F.binary_cross_entropy_with_logits``."""

    name = "bce_with_logits"
    is_likelihood = True
    boundary = 0.0

    def __init__(
        self, pos_weight: list[float] | None = None, weight: list[float] | None = None
    ) -> None:
        super().__init__(weight)
        self.pos_weight = doubles(pos_weight)

    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of each entry."""
        pos_weight = None if self.pos_weight is None else self.pos_weight.to(outputs)
        return functional.binary_cross_entropy_with_logits(
            outputs, targets, self.entry_weight(outputs), pos_weight=pos_weight, reduction="none"
        )

    def curvature(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Of the sigmoid: p (1 − p), weighed, without cancellation where p is near 0 or 1."""
        curvature = outputs.sigmoid() * (-outputs).sigmoid()
        if self.weight is not None:
            curvature = curvature * self.weight.to(outputs)
        if self.pos_weight is None:
            return curvature
        targets = self.targets(batch).to(outputs)
        return curvature * (1 + (self.pos_weight.to(outputs) - 1) * targets)


class BinaryCrossEntropyOfProbabilities(_Binary):
    """``F.binary_cross_entropy``: outputs are probabilities."""

    name = "bce"
    boundary = 0.5

    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of each entry."""
        return functional.binary_cross_entropy(
            outputs, targets, self.entry_weight(outputs), reduction="none"
        )

    def check(self, outputs: Tensor, batch: Batch) -> None:
        """One shape, and outputs between 0 and 1."""
        super().check(outputs, batch)
        outside = (outputs < 0) | (outputs > 1)
        if bool(outside.any()):
            raise UnsoundError(
                "bce needs outputs that are probabilities",
                f"an output of {float(outputs[outside][0]):.4g}",
                "[loss] name = 'bce_with_logits', or a sigmoid at the model's end",
            )
