"""Losses as weighted means: a numerator and a weight mass for each example.

Every named loss is Σ numerators / Σ masses, with the divisor that torch itself uses: examples,
unmasked tokens, or the sum of class weights. Batches can then be counted by their mass, and a
ragged last batch is right.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hesscli.errors import InputError, UnsoundError
from hesscli.problem.batches import Batch, output_tensor, rows, size_of, split_batch


class Loss(ABC):
    """A mean loss of a model on a batch.

    ``exposes_outputs`` says whether the loss is a function of model outputs and batch, which
    Gauss-Newton and per-example quantities need.
    """

    name: str
    exposes_outputs = True

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Forward pass, giving the tensor that the loss reads: ``(N, ...)``."""
        inputs, _ = split_batch(batch)
        return output_tensor(model(**inputs) if isinstance(inputs, Mapping) else model(*inputs))

    def targets(self, batch: Batch) -> Tensor:
        """What the outputs are compared with."""
        return torch.as_tensor(split_batch(batch)[1])

    @abstractmethod
    def masses(self, batch: Batch) -> Tensor:
        """Weight mass of each example, float64 ``(N,)``."""

    @abstractmethod
    def numerators(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Loss of each example times its mass, ``(N,)``."""

    def mean(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The batch's mean loss, a scalar."""
        total = self.numerators(outputs, batch).sum()
        return total / self.masses(batch).sum().to(total.dtype)

    def evaluate(self, model: nn.Module, batch: Batch) -> Tensor:
        """Forward pass and mean loss in one."""
        return self.mean(self.outputs(model, batch), batch)

    @property
    def natural(self) -> Loss:
        """The same loss as a function of natural parameters, for the Gauss-Newton matrix."""
        return self

    def mass(self, model: nn.Module, batch: Batch) -> float:
        """Weight mass of a whole batch; only a step loss needs the model for it."""
        return float(self.masses(batch).sum())

    def check(self, outputs: Tensor, batch: Batch) -> None:  # noqa: B027  nothing by default
        """Raise a HesscliError where outputs and targets cannot be meant together."""

    def correct(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Right predictions and their possible number, or None where targets are no classes."""
        return None


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
        self.class_weights = _doubles(class_weights)

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
            return _require_shape(self.name, logits.shape, targets.shape)
        _require_shape(self.name, logits[:, 0].shape, targets.shape)
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

    def masses(self, batch: Batch) -> Tensor:
        """Unmasked tokens, or the sum of their weights."""
        weights = _token_weights(batch)
        if weights is None:
            return super().masses(batch)
        return (weights.double() * (self.targets(batch) != self.ignore_index)).sum(1)

    def numerators(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Sum over an example's tokens."""
        terms = self.terms(self.logits(outputs), self.targets(batch))
        weights = _token_weights(batch)
        return (terms if weights is None else terms * weights.to(terms)).sum(1)


class HuggingFace(CrossEntropy):
    """A transformers-style model: the batch is passed as keywords, ``.loss`` is the mean.

    Labels ``(N, T)`` are shifted by the model itself, so their mass is the number of
    ``labels[:, 1:]`` other than −100; labels ``(N,)`` count once each.
    """

    name = "huggingface"

    def __init__(self) -> None:
        super().__init__()

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's ``.logits``."""
        return output_tensor(model(**_mapping(batch)))

    def evaluate(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's own ``.loss``, which is the user's and not a rewriting of it."""
        result = model(**_mapping(batch))
        loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
        if not isinstance(loss, Tensor):
            raise InputError(
                "the model returned no loss",
                f"{type(result).__name__} without .loss",
                "labels in each batch, or another [loss] name",
            )
        return loss

    def targets(self, batch: Batch) -> Tensor:
        """Labels ``(N,)``, or ``(N, T − 1)`` without the first."""
        labels = torch.as_tensor(_mapping(batch)["labels"])
        if labels.is_floating_point():
            raise InputError(
                "huggingface needs labels that are classes",
                f"labels of type {labels.dtype}",
                "[loss] step = 'module:function' that returns model(**batch).loss",
            )
        return (labels[:, 1:] if labels.dim() == 2 else labels).long()

    def logits(self, outputs: Tensor) -> Tensor:
        """``(N, K)``, or ``(N, V, T − 1)`` without the last position."""
        return outputs[:, :-1].transpose(1, 2) if outputs.dim() == 3 else outputs


class Entrywise(Loss):
    """The mean over all entries of outputs and targets of one shape ``(N, ...)``."""

    def masses(self, batch: Batch) -> Tensor:
        """One an example."""
        return torch.ones(len(self.targets(batch)), dtype=torch.float64)

    @abstractmethod
    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of each entry."""

    def numerators(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Mean over an example's entries."""
        terms = self.terms(outputs, self.targets(batch).to(outputs.dtype))
        return terms.reshape(len(terms), -1).mean(1)

    def check(self, outputs: Tensor, batch: Batch) -> None:
        """One shape: broadcasting (N, 1) against (N,) would average N² differences."""
        _require_shape(self.name, outputs.shape, self.targets(batch).shape)


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
        self.pos_weight = _doubles(pos_weight)

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


class UserLoss(Loss):
    """``fn(outputs, targets) -> mean loss``; each example counts once."""

    def __init__(self, function: Callable[[Any, Any], Tensor], name: str) -> None:
        self.function, self.name = function, name

    def masses(self, batch: Batch) -> Tensor:
        """One an example."""
        return torch.ones(size_of(batch), dtype=torch.float64)

    def mean(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The user's own mean."""
        return self.function(outputs, split_batch(batch)[1])

    def numerators(self, outputs: Tensor, batch: Batch) -> Tensor:
        """By one call an example: the function is a black box."""
        pairs = (rows((outputs, split_batch(batch)[1]), i, i + 1) for i in range(len(outputs)))
        return torch.stack([self.function(*pair) for pair in pairs])


class StepLoss(Loss):
    """``step(model, batch) -> mean loss``, or ``(mean loss, weight)``; the batch is the unit."""

    exposes_outputs = False

    def __init__(self, function: Callable[[nn.Module, Any], Any], name: str) -> None:
        self.function, self.name = function, name

    def evaluate(self, model: nn.Module, batch: Batch) -> Tensor:
        """The user's own mean."""
        return self._call(model, batch)[0]

    def mass(self, model: nn.Module, batch: Batch) -> float:
        """The weight that the step returns, else the number of examples."""
        weight = self._call(model, batch)[1]  # with gradients on, for the step may take some
        return float(size_of(batch) if weight is None else torch.as_tensor(weight).detach())

    def _call(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        result = self.function(model, batch)
        return result if isinstance(result, tuple) else (result, None)

    def masses(self, batch: Batch) -> Tensor:
        """Not known: a step shows no examples."""
        raise _no_outputs(self.name)

    def numerators(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Not known: a step shows no examples."""
        raise _no_outputs(self.name)


NAMED: dict[str, type[Loss]] = {
    loss.name: loss
    for loss in (
        CrossEntropy,
        NegativeLogLikelihood,
        LanguageModel,
        HuggingFace,
        MeanSquaredError,
        BinaryCrossEntropy,
    )
}


def as_loss(loss: Any) -> Loss:
    """A Loss from a name, a torch criterion, or ``fn(outputs, targets) -> mean loss``.

    Raises:
        InputError: an unknown name, or a criterion whose reduction is not ``"mean"``.
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str) and loss in NAMED:
        return NAMED[loss]()
    if isinstance(loss, str) or not callable(loss):
        known = ", ".join(NAMED)
        raise InputError("unknown loss", repr(loss), f"{known}, or fn(outputs, targets)")
    if getattr(loss, "reduction", "mean") != "mean":
        raise InputError(
            "the loss must be a mean",
            f"{type(loss).__name__}(reduction={loss.reduction!r})",
            "reduction='mean'",
        )
    return _from_criterion(loss) or UserLoss(loss, getattr(loss, "__name__", type(loss).__name__))


def _from_criterion(loss: Any) -> Loss | None:
    """The named loss that a torch criterion is, so that its weights are counted right."""
    weight = getattr(loss, "weight", None)
    weights = None if weight is None else weight.tolist()
    if type(loss) is nn.CrossEntropyLoss:
        return CrossEntropy(loss.label_smoothing, loss.ignore_index, weights)
    if type(loss) is nn.NLLLoss:
        return NegativeLogLikelihood(loss.ignore_index, weights)
    if type(loss) is nn.MSELoss:
        return MeanSquaredError()
    if type(loss) is nn.BCEWithLogitsLoss and weights is None:
        pos_weight = loss.pos_weight
        return BinaryCrossEntropy(None if pos_weight is None else pos_weight.tolist())
    return None


def _doubles(values: list[float] | None) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.float64)


def _first_two(batch: Batch) -> Batch:
    return batch[:2] if isinstance(batch, (tuple, list)) else batch


def _token_weights(batch: Batch) -> Tensor | None:
    return batch[2] if isinstance(batch, (tuple, list)) and len(batch) == 3 else None


def _mapping(batch: Batch) -> Mapping[str, Any]:
    if isinstance(batch, Mapping) and "labels" in batch:
        return batch
    raise InputError(
        "huggingface needs batches that are dicts with 'labels'",
        f"a batch of type {type(batch).__name__}",
        "a data factory that yields such dicts",
    )


def _require_shape(name: str, expected: torch.Size, got: torch.Size) -> None:
    if expected != got:
        raise InputError(
            f"{name} needs targets of shape {tuple(expected)}",
            f"targets of shape {tuple(got)}",
            "another [loss] name, or targets in that shape",
        )


def _no_outputs(name: str) -> InputError:
    return InputError(
        "this needs the model's outputs and one loss an example",
        f"[loss] step = {name!r}, which shows neither",
        "--matrix hessian, or [loss] name or factory",
    )
