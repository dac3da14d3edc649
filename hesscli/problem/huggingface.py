"""The loss that a transformers-style model computes itself, and how it reads its labels."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hesscli.errors import HesscliError, InputError
from hesscli.problem.batches import Batch, size_of, tensor_of
from hesscli.problem.losses import Loss, same_mean
from hesscli.problem.named_losses import CrossEntropy
from hesscli.problem.outputs import named_output

Reading = Literal["shifted", "unshifted", "column"]
"""Labels of which each position predicts the next, its own, or that are one an example."""

UNEXPLAINED = (
    "the model's own .loss is not the cross-entropy of its .logits and labels, shifted or not"
)
_LOOKED_AT = 4
"""Batches by which a reading is chosen; the proof puts it to the test on all."""


class HuggingFace(CrossEntropy):
    """A transformers-style model: the batch is passed as keywords, ``.loss`` is the mean.

    How the model reads its labels is found out from what it makes of them: causal models shift
    labels ``(N, T)`` by one, masked models, token classifiers and decoders do not, classifiers
    take ``(N,)`` or ``(N, 1)``. The mass is the number of labels so read that are not -100.
    Where none of these is the model's loss (routers that add their own, labels that are no
    classes), the mass is the number of examples and the outputs are hidden.
    """

    name = "huggingface"
    is_claim = True

    def __init__(self, reading: Reading = "shifted") -> None:
        super().__init__()
        self.reading = reading

    def settled(self, model: nn.Module, batches: Iterable[Batch]) -> Loss:
        """The reading that explains the model's own loss and its slope in the logits."""
        readings: list[Reading] = ["shifted", "unshifted", "column"]
        left = [self._read(reading) for reading in readings]
        for batch in islice(batches, _LOOKED_AT):
            result = model(**_mapping(batch))
            left = [each for each in left if each._explains(result, batch)]
        if left:
            return left[0]
        whole = self._read("shifted")
        whole.hidden = UNEXPLAINED
        return whole

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's ``.logits``."""
        return named_output(model(**_mapping(batch)), self.output)

    def evaluate(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's own ``.loss``, which is the user's and not a rewriting of it."""
        return _own_loss(model(**_mapping(batch)))

    def masses(self, batch: Batch) -> Tensor:
        """Labels that are not masked, or where that is not the model's way one an example."""
        if self.hidden is None:
            return super().masses(batch)
        return torch.ones(size_of(batch), dtype=torch.float64, device="cpu")

    def targets(self, batch: Batch) -> Tensor:
        """Labels ``(N,)`` or ``(N, T)``, or ``(N, T − 1)`` without the first."""
        labels = tensor_of(_mapping(batch)["labels"])
        if self.reading == "column":
            return labels.flatten().long()
        return (labels[:, 1:] if self._shifts(labels) else labels).long()

    def weights(self, batch: Batch) -> Tensor | None:
        """None: what is in the batch is the model's."""
        return None

    def logits(self, outputs: Tensor) -> Tensor:
        """``(N, K, ...)``: without the last position where labels are shifted."""
        if outputs.dim() != 3:
            return outputs
        return (outputs[:, :-1] if self.reading == "shifted" else outputs).transpose(1, 2)

    def class_dim(self, outputs: Tensor) -> int:
        """The last one where there are tokens."""
        return 2 if outputs.dim() == 3 else 1

    def _read(self, reading: Reading) -> HuggingFace:
        chosen = copy.copy(self)
        chosen.reading = reading
        return chosen

    def _shifts(self, labels: Tensor) -> bool:
        return self.reading == "shifted" and labels.dim() == 2

    def _explains(self, result: Any, batch: Batch) -> bool:
        """Whether the model's loss on a batch, and its slope, is what this reading gives."""
        loss, labels = _own_loss(result), tensor_of(_mapping(batch)["labels"])
        if labels.is_floating_point() or (self.reading == "column" and labels.shape[1:] != (1,)):
            return False
        try:
            outputs = named_output(result, self.output)
            alone = outputs.detach().requires_grad_()
            self.check(alone, batch)
        except HesscliError:
            return False
        if not float(self.masses(batch).sum()):
            return not float(loss.detach()) > 0  # zero or not a number: nothing is labelled
        mean = self.mean(alone, batch)
        if not same_mean(loss, float(mean.detach())):
            return False
        if not (loss.requires_grad and outputs.requires_grad):
            return True
        slope = torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True)[0]
        if slope is None:  # the loss is of other logits than those that are shown
            return True
        difference = slope - torch.autograd.grad(mean, alone)[0]
        return bool(difference.norm() <= torch.finfo(slope.dtype).eps ** 0.5 * slope.norm())


def _own_loss(result: Any) -> Tensor:
    """The ``.loss`` of what a model returned."""
    loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
    if not isinstance(loss, Tensor):
        raise InputError(
            "the model returned no loss",
            f"{type(result).__name__} without .loss",
            "labels in each batch, or another [loss] name",
        )
    return loss


def _mapping(batch: Batch) -> Mapping[str, Any]:
    if isinstance(batch, Mapping) and "labels" in batch:
        return batch
    raise InputError(
        "huggingface needs batches that are dicts with 'labels'",
        f"a batch of type {type(batch).__name__}",
        "a data factory that yields such dicts",
    )
