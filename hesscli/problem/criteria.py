"""A loss from what a user has: a name, one of torch's criteria, or a function."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hesscli.errors import InputError
from hesscli.problem.huggingface import HuggingFace
from hesscli.problem.losses import Loss, StepLoss, UserLoss
from hesscli.problem.named_losses import (
    BinaryCrossEntropy,
    BinaryCrossEntropyOfProbabilities,
    CrossEntropy,
    LanguageModel,
    MeanSquaredError,
    NegativeLogLikelihood,
)
from hesscli.results import Reduction

NAMED: dict[str, type[Loss]] = {
    loss.name: loss
    for loss in (
        CrossEntropy,
        NegativeLogLikelihood,
        LanguageModel,
        HuggingFace,
        MeanSquaredError,
        BinaryCrossEntropy,
        BinaryCrossEntropyOfProbabilities,
    )
}

_CRITERIA = (
    (functional.cross_entropy, nn.CrossEntropyLoss),
    (functional.nll_loss, nn.NLLLoss),
    (functional.mse_loss, nn.MSELoss),
    (functional.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss),
    (functional.binary_cross_entropy, nn.BCELoss),
)


def as_loss(loss: Any, name: str | None = None, reduction: Reduction | None = None) -> Loss:
    """A Loss from a name, a torch criterion, or ``fn(outputs, targets) -> mean or summed loss``.

    Torch's own criteria and functions become the named losses that they are, so that class
    weights and ignored targets are counted as torch does.

    Args:
        loss: what the user has; a function's options may be bound by ``functools.partial``.
        name: of a function in reports; default its own.
        reduction: ``"mean"`` or ``"sum"``; default what the loss says, if it does.

    Raises:
        InputError: an unknown name, or a reduction that gives no number.
    """
    if isinstance(loss, str) and loss in NAMED:
        loss = NAMED[loss]()
    if isinstance(loss, Loss):
        return _with_reduction(loss, reduction)
    if isinstance(loss, str) or not callable(loss):
        known = ", ".join(NAMED)
        raise InputError("unknown loss", repr(loss), f"{known}, or fn(outputs, targets)")
    function, options = _unbound(loss)
    own_name = getattr(function, "__name__", type(function).__name__)
    own = options.get("reduction", getattr(loss, "reduction", None))
    if own == "none":
        raise InputError(
            "the loss must be a mean or a sum", f"{own_name}(reduction='none')", "reduction='mean'"
        )
    criterion = next((kind for known, kind in _CRITERIA if known is function), None)
    if criterion and options.keys() <= inspect.signature(criterion).parameters.keys():
        loss = criterion(**options)
    found = _from_criterion(loss) or UserLoss(loss, name or own_name)
    said: Reduction | None = "sum" if own == "sum" else None
    return _with_reduction(found, reduction or said)


def _with_reduction(loss: Loss, reduction: Reduction | None) -> Loss:
    """The loss with a reduction that somebody asked for."""
    if reduction is None or reduction == loss.reduction:
        return loss
    settled = copy.copy(loss)
    settled.reduction = reduction
    return settled


def reading(loss: Loss, output: str | int | None) -> Loss:
    """A loss that reads one of several outputs of the model.

    Args:
        loss: what is to read it.
        output: its key, attribute or index; None leaves the loss as it is.

    Raises:
        InputError: the loss is no named one, and so gets all of them.
    """
    if output is None:
        return loss
    if isinstance(loss, (UserLoss, StepLoss)):
        raise InputError(
            "output is for named losses",
            f"output = {output!r} and the loss {loss.name}",
            "no output: a loss of one's own gets what the model returned, whole",
        )
    chosen = copy.copy(loss)
    chosen.output = output
    return chosen


def with_tensors(loss: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """A spec's options for a loss: lists of numbers become the tensors that torch's own take."""
    if not str(getattr(loss, "__module__", "")).startswith("torch.nn."):
        return dict(options)
    known = any(loss in pair for pair in _CRITERIA)
    # They are read here, or by torch.
    dtype = torch.float64 if known else torch.get_default_dtype()
    device = torch.device("cpu") if known else torch.get_default_device()
    return {
        name: torch.tensor(value, dtype=dtype, device=device) if isinstance(value, list) else value
        for name, value in options.items()
    }


def _unbound(loss: Callable[..., Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A function, and the options that are bound to it."""
    if isinstance(loss, partial) and not loss.args:
        return loss.func, loss.keywords
    return loss, {}


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
    if type(loss) is nn.BCEWithLogitsLoss:
        pos_weight = loss.pos_weight
        return BinaryCrossEntropy(None if pos_weight is None else pos_weight.tolist(), weights)
    if type(loss) is nn.BCELoss:
        return BinaryCrossEntropyOfProbabilities(weights)
    return None
