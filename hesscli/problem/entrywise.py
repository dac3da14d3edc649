"""Losses that compare outputs and targets entry by entry."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional

from hesscli.problem.batches import Batch
from hesscli.problem.losses import Loss, doubles, require_shape


class Entrywise(Loss):
    """The mean, or sum, over all entries of outputs and targets of one shape ``(N, ...)``."""

    def masses(self, batch: Batch) -> Tensor:
        """One an example."""
        return torch.ones(len(self.targets(batch)), dtype=torch.float64)

    @abstractmethod
    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of each entry."""

    def numerators(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Mean over an example's entries, or their sum."""
        terms = self.terms(outputs, self.targets(batch).to(outputs.dtype))
        terms = terms.reshape(len(terms), -1)
        return terms.sum(1) if self.reduction == "sum" else terms.mean(1)

    def check(self, outputs: Tensor, batch: Batch) -> None:
        """One shape: broadcasting (N, 1) against (N,) would average N² differences."""
        require_shape(self.name, outputs.shape, self.targets(batch).shape)


class MeanSquaredError(Entrywise):
    """``F.mse_loss``."""

    name = "mse"

    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of each entry."""
        return (outputs - targets).square()


class BinaryCrossEntropy(Entrywise):
    """``F.binary_cross_entropy_with_logits``."""

    name = "bce_with_logits"

    def __init__(self, pos_weight: list[float] | None = None) -> None:
        self.pos_weight = doubles(pos_weight)

    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of each entry."""
        pos_weight = None if self.pos_weight is None else self.pos_weight.to(outputs)
        return functional.binary_cross_entropy_with_logits(
            outputs, targets, pos_weight=pos_weight, reduction="none"
        )

    def correct(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Entries on the right side of probability ½."""
        right = (outputs > 0) == (self.targets(batch) > 0.5)
        return right.sum(), torch.tensor(right.numel(), device=right.device)
