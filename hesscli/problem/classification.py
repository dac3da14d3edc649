"""Losses of class scores: cross-entropy, and its kin of log-probabilities and of tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from hesscli.errors import InputError, UnsoundError
from hesscli.problem.batches import Batch
from hesscli.problem.losses import Loss, doubles, require_shape


class CrossEntropy(Loss):
    """``F.cross_entropy``: outputs ``(N, K, ...)``, targets of classes or of probabilities."""

    name = "cross_entropy"

    def __init__(
        self,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        class_weights: list[float] | None = None,
    ) -> None:
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index
        self.class_weights = doubles(class_weights)

    def logits(self, outputs: Tensor) -> Tensor:
        """Class scores with the classes along dimension 1."""
        return outputs

    def targets(self, batch: Batch) -> Tensor:
        """Classes as int64, or probabilities as they are."""
        targets = super().targets(batch)
        return targets if targets.is_floating_point() else targets.long()

    def masses(self, batch: Batch) -> Tensor:
        """Unmasked targets, or the sum of their class weights, as torch divides by them."""
        targets = self.targets(batch)
        if targets.is_floating_point():
            cells = math.prod(targets.shape[2:])
            return targets.new_full((len(targets),), cells, dtype=torch.float64)
        kept = (targets != self.ignore_index).double()
        if self.class_weights is not None:
            weights = self.class_weights.to(targets.device)
            kept = kept * weights[targets.clamp(0, len(weights) - 1)]
        return kept.reshape(len(kept), -1).sum(1)

    def terms(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of each target, weighted and not divided, in the shape of the targets."""
        return functional.cross_entropy(
            logits,
            targets.to(logits.dtype) if targets.is_floating_point() else targets,
            weight=None if self.class_weights is None else self.class_weights.to(logits),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="none",
        )

    def numerators(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Sum over an example's targets of their weighted losses."""
        terms = self.terms(self.logits(outputs), self.targets(batch))
        return terms.reshape(len(terms), -1).sum(1)

    def check(self, outputs: Tensor, batch: Batch) -> None:
        """Shapes, then labels within 0 … K−1."""
        logits, targets = self.logits(outputs), self.targets(batch)
        if logits.dim() < 2:
            raise InputError(
                f"{self.name} needs outputs (N, K)",
                f"outputs of shape {tuple(logits.shape)}",
                "[loss] name = 'bce_with_logits' for one output an example",
            )
        if targets.is_floating_point():
            return require_shape(self.name, logits.shape, targets.shape)
        require_shape(self.name, logits[:, 0].shape, targets.shape)
        num_classes = logits.shape[1]
        outside = (targets != self.ignore_index) & ((targets < 0) | (targets >= num_classes))
        if outside.any():
            raise UnsoundError(
                "a label lies outside the model's classes",
                f"label {targets[outside][0].item()} for outputs of {num_classes} classes",
                f"labels 0 to {num_classes - 1}; [loss] ignore_index names a padding label",
            )
        return None

    def correct(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Top-1 predictions among the unmasked targets."""
        logits, targets = self.logits(outputs), self.targets(batch)
        if targets.is_floating_point():
            return None
        kept = targets != self.ignore_index
        return ((logits.argmax(1) == targets) & kept).sum(), kept.sum()


class NegativeLogLikelihood(CrossEntropy):
    """``F.nll_loss``: outputs are log-probabilities ``(N, K, ...)``."""

    name = "nll"

    def __init__(self, ignore_index: int = -100, class_weights: list[float] | None = None) -> None:
        super().__init__(0.0, ignore_index, class_weights)

    @property
    def natural(self) -> Loss:
        """Cross-entropy, since log-softmax leaves log-probabilities as they are."""
        weights = None if self.class_weights is None else self.class_weights.tolist()
        return CrossEntropy(0.0, self.ignore_index, weights)

    def terms(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of each target, weighted and not divided."""
        weight = None if self.class_weights is None else self.class_weights.to(logits)
        return functional.nll_loss(
            logits, targets, weight=weight, ignore_index=self.ignore_index, reduction="none"
        )


class LanguageModel(CrossEntropy):
    """Next-token loss: outputs ``(N, T, V)``, targets ``(N, T)`` already shifted.

    −100 is ignored; an optional third tensor ``(N, T)`` of the batch weights the tokens.
    """

    name = "language_model"

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Forward pass, giving ``(N, T, V)``: the token weights are no model input."""
        return super().outputs(model, _first_two(batch))

    def targets(self, batch: Batch) -> Tensor:
        """Next tokens, int64."""
        return super().targets(_first_two(batch))

    def logits(self, outputs: Tensor) -> Tensor:
        """``(N, V, T)``."""
        if outputs.dim() != 3:
            raise InputError(
                f"{self.name} needs outputs (N, T, V)",
                f"outputs of shape {tuple(outputs.shape)}",
                "[loss] name = 'cross_entropy' for one label an example",
            )
        return outputs.transpose(1, 2)

    def token_weights(self, batch: Batch) -> Tensor | None:
        """The batch's third tensor ``(N, T)``, if it has one."""
        return batch[2] if isinstance(batch, (tuple, list)) and len(batch) == 3 else None

    def masses(self, batch: Batch) -> Tensor:
        """Unmasked tokens, or the sum of their weights."""
        weights = self.token_weights(batch)
        if weights is None:
            return super().masses(batch)
        return (weights.double() * (self.targets(batch) != self.ignore_index)).sum(1)

    def numerators(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Sum over an example's tokens."""
        terms = self.terms(self.logits(outputs), self.targets(batch))
        weights = self.token_weights(batch)
        return (terms if weights is None else terms * weights.to(terms)).sum(1)


def _first_two(batch: Batch) -> Batch:
    return batch[:2] if isinstance(batch, (tuple, list)) else batch
