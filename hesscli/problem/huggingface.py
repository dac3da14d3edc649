"""The loss that a transformers-style model computes itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hesscli.errors import InputError
from hesscli.problem.batches import Batch, output_tensor
from hesscli.problem.classification import CrossEntropy


class HuggingFace(CrossEntropy):
    """A transformers-style model: the batch is passed as keywords, ``.loss`` is the mean.

    Labels ``(N, T)`` are shifted by the model itself, so their mass is the number of
    ``labels[:, 1:]`` other than −100; labels ``(N,)`` count once each. Masked language models
    shift nothing, and experts add a loss of their routers: the proof finds out.
    """

    name = "huggingface"
    computed_by_model = True

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


def _mapping(batch: Batch) -> Mapping[str, Any]:
    if isinstance(batch, Mapping) and "labels" in batch:
        return batch
    raise InputError(
        "huggingface needs batches that are dicts with 'labels'",
        f"a batch of type {type(batch).__name__}",
        "a data factory that yields such dicts",
    )
