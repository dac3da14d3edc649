"""The losses that have a name: of class scores, and of entries that are compared one by one."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from hesscli.errors import InputError, UnsoundError
from hesscli.problem import chunks
from hesscli.problem.batches import Batch, shape_of, split_batch, tensors_of
from hesscli.problem.losses import Loss, doubles, require_shape

# -- Losses of class scores: cross-entropy, and its kin of log-probabilities and of tokens ---------


class CrossEntropy(Loss):
    """``F.cross_entropy``: outputs ``(N, K, ...)``, targets of classes or of probabilities."""

    name = "cross_entropy"
    is_likelihood = True

    def __init__(
        self,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        class_weights: list[float] | None = None,
    ) -> None:
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index
        self.class_weights = doubles(class_weights)

    def settled(self, model: nn.Module, batches: Iterable[Batch]) -> Loss:
        """The same; outputs that are probabilities already are told."""
        outputs, settled = self._seen(model, batches), copy.copy(self)
        logits = self.logits(outputs).detach().double()
        if bool((logits >= 0).all()) and _is_rounding(logits.sum(1) - 1, outputs, logits.shape[1]):
            settled.warnings = (
                f"the model's outputs are probabilities already (they sum to 1), and {self.name} "
                "puts a softmax on top: numbers are of that loss; nll of their log may be meant",
            )
        return settled

    def _seen(self, model: nn.Module, batches: Iterable[Batch]) -> Tensor:
        """Live outputs of a batch whose labels are in order."""
        batch = next(iter(batches))
        outputs = self.outputs(model, batch)
        self.check(outputs.detach(), batch)
        return outputs

    def logits(self, outputs: Tensor) -> Tensor:
        """Class scores with the classes along dimension 1."""
        return outputs

    def class_dim(self, outputs: Tensor) -> int:
        """The dimension of the outputs along which classes lie."""
        return 1

    def targets(self, batch: Batch) -> Tensor:
        """Classes as int64, or probabilities as they are."""
        targets = super().targets(batch)
        return targets if targets.is_floating_point() else targets.long()

    def masses(self, batch: Batch) -> Tensor:
        """Unmasked targets, or the sum of their weights, as torch divides by them."""
        targets = self.targets(batch)
        if targets.is_floating_point():
            kept = torch.ones_like(targets[:, 0] if targets.dim() > 1 else targets)
        else:
            kept = targets != self.ignore_index
        kept = kept.double()
        if self.class_weights is not None and not targets.is_floating_point():
            weights = self.class_weights.to(targets.device)
            kept = kept * weights[targets.clamp(0, len(weights) - 1)]
        return self.weighed(kept, batch).reshape(len(kept), -1).sum(1)

    def terms(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of each target, weighted and not divided, in the shape of the targets."""
        return chunks.losses(logits, self.compared(logits, targets))

    def compared(self, logits: Tensor, targets: Tensor) -> chunks.Targets:
        """What logits are compared with, and how."""
        weights = None if self.class_weights is None else self.class_weights.to(logits)
        return chunks.Targets(targets, weights, self.ignore_index, self.label_smoothing)

    def numerators(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Sum over an example's targets of their weighted losses."""
        terms = self.weighed(self.terms(self.logits(outputs), self.targets(batch)), batch)
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
            if targets.dim() < logits.dim():
                raise InputError(
                    f"{self.name} needs class labels that are whole numbers",
                    f"targets of dtype {str(targets.dtype).removeprefix('torch.')}",
                    "labels.long(), or one probability a class in the shape of the outputs, "
                    f"{shape_of(logits, len(logits))}",
                )
            return require_shape(self.name, logits, targets)
        is_text = logits.dim() == 3 and targets.shape == logits.shape[:2]
        hint = "language_model, for outputs (N, T, V) and as targets the tokens that come next"
        require_shape(self.name, logits[:, 0], targets, hint if is_text else None)
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
        kept = self.weighed((targets != self.ignore_index).double(), batch) != 0
        return ((logits.argmax(1) == targets) & kept).sum(), kept.sum()


class NegativeLogLikelihood(CrossEntropy):
    """``F.nll_loss``: outputs ``(N, K, ...)`` are log-probabilities, or the loss is linear in them.

    Of log-probabilities it is the cross-entropy, since log-softmax leaves them as they are.
    Whether they are is asked of the outputs: their log-sum-exp is zero, and stays so when
    parameters move.
    """

    name = "nll"

    def __init__(self, ignore_index: int = -100, class_weights: list[float] | None = None) -> None:
        super().__init__(0.0, ignore_index, class_weights)
        self.is_linear: bool | None = None  # not yet known

    @property
    def natural(self) -> Loss:
        """Cross-entropy where outputs are log-probabilities, else the loss as it is."""
        if self.is_linear:
            return self
        weights = None if self.class_weights is None else self.class_weights.tolist()
        return CrossEntropy(0.0, self.ignore_index, weights)

    def settled(self, model: nn.Module, batches: Iterable[Batch]) -> Loss:
        """With what its outputs are."""
        logits, settled = self.logits(self._seen(model, batches)), copy.copy(self)
        normal = _are_log_probabilities(logits.detach()) and _stay_normalised(logits, model)
        settled.is_linear, settled.is_likelihood = not normal, normal
        if not normal:
            settled.warnings = (
                "the model's outputs are no log-probabilities, so that nll is linear in them and "
                "its Gauss-Newton matrix is zero: numbers are of that loss; cross_entropy, or a "
                "log_softmax at the model's end, may be meant",
            )
        return settled

    def check(self, outputs: Tensor, batch: Batch) -> None:
        """Shapes and labels; and log-probabilities everywhere if anywhere."""
        super().check(outputs, batch)
        logits = self.logits(outputs).detach()
        if self.is_linear is False and not _are_log_probabilities(logits):
            off = float(logits.double().logsumexp(1).abs().max())
            raise UnsoundError(
                "the model's outputs are log-probabilities of some examples and not of others",
                f"probabilities that sum to exp({off:.2g}) or its inverse",
                "a log_softmax at the model's end, or [loss] factory of a loss of your own",
            )

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

    def settled(self, model: nn.Module, batches: Iterable[Batch]) -> Loss:
        """The same; labels that nobody has shifted are told."""
        batch = next(iter(batches))
        settled = super().settled(model, [batch])
        if self._copies_inputs(batch):
            settled.warnings += (
                "labels equal the inputs: language_model takes labels that are already shifted, "
                "inputs[:, :-1] and labels = inputs[:, 1:]",
            )
        return settled

    def _copies_inputs(self, batch: Batch) -> bool:
        """Whether some input is the labels, up to what is masked of them."""
        targets, inputs = self.targets(batch), split_batch(_first_two(batch))[0]
        kept = targets != self.ignore_index
        return bool(kept.any()) and any(
            tensor.shape == targets.shape and torch.equal(tensor[kept], targets[kept])
            for tensor in tensors_of(inputs)
            if not tensor.is_floating_point()
        )

    def logits(self, outputs: Tensor) -> Tensor:
        """Scores of tokens ``(N, V, T)``."""
        if outputs.dim() != 3:
            raise InputError(
                f"{self.name} needs outputs (N, T, V)",
                f"outputs of shape {tuple(outputs.shape)}",
                "[loss] name = 'cross_entropy' for one label an example",
            )
        return outputs.transpose(1, 2)

    def class_dim(self, outputs: Tensor) -> int:
        """The last dimension of the outputs."""
        return 2

    def weights(self, batch: Batch) -> Tensor | None:
        """The batch's third tensor ``(N, T)``, if it has one, or a dict's ``loss_weights``."""
        if isinstance(batch, (tuple, list)):
            return batch[2] if len(batch) == 3 else None
        return super().weights(batch)


def _are_log_probabilities(logits: Tensor) -> bool:
    """Whether exponentials sum to one."""
    return _is_rounding(logits.double().logsumexp(1), logits, logits.shape[1])


def _stay_normalised(logits: Tensor, model: nn.Module) -> bool:
    """Whether the log-sum-exp has no slope in the parameters, as it has at a chance zero."""
    tensors = [p for p in model.parameters() if p.requires_grad]

    def pulled(weights: Tensor) -> float:
        value = (weights.to(logits) * logits).sum()
        parts = torch.autograd.grad(value, tensors, retain_graph=True, allow_unused=True)
        return math.hypot(*(float(p.norm()) for p in parts if p is not None))

    if not logits.requires_grad:
        return True
    signs = 1 - 2 * (torch.arange(logits.shape[1], device=logits.device) % 2)
    size = pulled(signs.view(-1, *[1] * (logits.dim() - 2)).expand_as(logits))
    slope = pulled(logits.detach().softmax(1))
    return slope <= math.sqrt(torch.finfo(logits.dtype).eps) * size


def _is_rounding(errors: Tensor, outputs: Tensor, classes: int) -> bool:
    """Whether sums over classes are off by no more than their rounding: a few eps a class."""
    bound = torch.finfo(outputs.dtype).eps * (classes + 16)
    return bool((errors.abs() <= bound).all())


def _first_two(batch: Batch) -> Batch:
    return batch[:2] if isinstance(batch, (tuple, list)) else batch


# -- Losses that compare outputs and targets entry by entry ----------------------------------------


class Entrywise(Loss):
    """The mean, or sum, over all entries of outputs and targets of one shape ``(N, ...)``."""

    def masses(self, batch: Batch) -> Tensor:
        """One an example, or the mean weight of its entries."""
        ones = torch.ones_like(self.targets(batch), dtype=torch.float64)
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
        """Squared error of each entry."""
        return (outputs - targets).square()

    def curvature(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Second derivative of the squared error: 2 everywhere."""
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
        """Cross-entropy of each entry, from logits."""
        pos_weight = None if self.pos_weight is None else self.pos_weight.to(outputs)
        return functional.binary_cross_entropy_with_logits(
            outputs, targets, self.entry_weight(outputs), pos_weight=pos_weight, reduction="none"
        )

    def curvature(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Slope of the sigmoid: p (1 − p), weighed, without cancellation where p is near 0 or 1."""
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
        """Cross-entropy of each entry, from probabilities."""
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
