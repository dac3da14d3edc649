"""Losses as weighted means: a numerator and a weight mass for each example.

Every named loss is Σ numerators / Σ masses, with the divisor that torch itself uses: examples,
unmasked tokens, or the sum of class weights. Batches can then be counted by their mass, and a
ragged last batch is right.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from hesscli.errors import InputError
from hesscli.problem.batches import Batch, shape_of, size_of, split_batch
from hesscli.problem.outputs import named_output
from hesscli.results import Reduction

WEIGHTS = "loss_weights"
"""The key of a batch under which named losses find what each target counts, 0 for a mask."""


class Loss(ABC):
    """A mean loss of a model on a batch.

    Attributes:
        name: in reports.
        hidden: why the loss is no function of model outputs and batch, which Gauss-Newton and
            per-example quantities need; None where it is one.
        is_claim: that it is this function of these outputs is a claim, which the proof puts to
            the test.
        output: which of several outputs of the model it reads, a key, attribute or index.
        shows_examples: whether the mass and the loss of single examples are known.
        reduction: what is analysed, the mean over all examples or their sum; None where a
            function of the user's does not say and its batches have to tell.
        multiple: what the mean is multiplied by to be it.
        is_likelihood: it is the negative log-likelihood of labels in natural parameters, so that
            Fisher and Gauss-Newton matrices are one.
        warnings: what the model's outputs and the data say against it.
    """

    name: str
    hidden: str | None = None
    is_claim = False
    is_likelihood = False
    output: str | int | None = None
    shows_examples = True
    reduction: Reduction | None = "mean"
    multiple = 1.0
    warnings: tuple[str, ...] = ()

    def settled(self, model: nn.Module, batches: Iterable[Batch]) -> Loss:
        """The loss as model and data show it to be, before anything is made of it."""
        return self

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Forward pass, giving the tensor that the loss reads: ``(N, ...)``."""
        if isinstance(batch, Mapping):  # weights are no input of the model
            batch = {key: value for key, value in batch.items() if key != WEIGHTS}
        return named_output(returned(model, batch), self.output)

    def weights(self, batch: Batch) -> Tensor | None:
        """What each target counts, ``(N, ...)``: the ``loss_weights`` of a dict; None for 1."""
        return batch.get(WEIGHTS) if isinstance(batch, Mapping) else None

    def weighed(self, terms: Tensor, batch: Batch) -> Tensor:
        """Terms of the targets ``(N, ...)`` times their weights, which may be of examples alone.

        Raises:
            InputError: weights of another shape.
        """
        weights = self.weights(batch)
        if weights is None:
            return terms
        if weights.shape != terms.shape[: weights.dim()]:
            raise InputError(
                f"{self.name} needs a weight for each target or example",
                f"weights {shape_of(weights, len(terms))}, targets {shape_of(terms, len(terms))}",
                "weights in the shape of the targets, or one an example",
            )
        return terms * weights.to(terms).view(*weights.shape, *[1] * (terms.dim() - weights.dim()))

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

    @property
    def unscaled(self) -> Loss:
        """The mean that it is a multiple of."""
        return self

    def mass(self, model: nn.Module, batch: Batch, count: int | None = None) -> float:
        """Weight mass of a whole batch; only a step needs the model for it.

        ``count`` is its number of examples where rows are none.
        """
        return float(self.masses(batch).sum())

    def reduced(self, reduction: Reduction) -> Self:
        """The same loss with its reduction settled, where it did not say."""
        if self.reduction is not None:
            return self
        settled = copy.copy(self)
        settled.reduction = reduction
        return settled

    def check(self, outputs: Tensor, batch: Batch) -> None:  # noqa: B027  nothing by default
        """Raise a HesscliError where outputs and targets cannot be meant together."""

    def correct(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Right predictions and their possible number, or None where targets are no classes."""
        return None


class StepLoss(Loss):
    """``step(model, batch) -> mean loss``, or ``(mean loss, weight)``, or a sum."""

    shows_examples = False

    def __init__(
        self,
        function: Callable[[nn.Module, Any], Any],
        name: str,
        reduction: Reduction | None = None,
    ) -> None:
        self.function, self.name, self.reduction = function, name, reduction
        self.hidden = f"[loss] step = {name!r}"

    def evaluate(self, model: nn.Module, batch: Batch) -> Tensor:
        """The user's own mean, or sum over the batch's weight."""
        value, weight = self._call(model, batch)
        if self.reduction != "sum":
            return value
        return value / (size_of(batch) if weight is None else weight)

    def mass(self, model: nn.Module, batch: Batch, count: int | None = None) -> float:
        """The weight that the step returns, else the number of examples."""
        weight = self._call(model, batch)[1]  # with gradients on, for the step may take some
        if weight is not None:
            return float(torch.as_tensor(weight).detach())
        return float(size_of(batch) if self.reduction == "sum" or count is None else count)

    def _call(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        result = self.function(model, batch)
        return result if isinstance(result, tuple) else (result, None)

    def masses(self, batch: Batch) -> Tensor:
        """Not known: a step shows no examples."""
        raise _no_outputs(self.name)

    def numerators(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Not known: a step shows no examples."""
        raise _no_outputs(self.name)


def returned(model: nn.Module, batch: Batch) -> Any:
    """What the model returns for a batch's inputs."""
    inputs, _ = split_batch(batch)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def same_mean(value: Tensor, expected: float) -> bool:
    """Up to rounding of sums of logarithms, which are of order 1 though their mean may be tiny.

    Sums in another order err by a few eps, other functions by percents (auxiliary losses of
    routers by 1e-3 of 1).
    """
    bound = torch.finfo(value.dtype).eps ** 0.6
    return bool(abs(float(value.detach()) - expected) <= bound * (1 + abs(expected)))


def doubles(values: list[float] | None) -> Tensor | None:
    """A spec's numbers as they are, not rounded to single precision."""
    return None if values is None else torch.tensor(values, dtype=torch.float64)


def require_number(loss: Loss, value: object) -> None:
    """Refuse a loss that is not one number in a tensor."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return
    given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise InputError(
        "the loss must be one number in a tensor",
        f"{loss.name} gave {given}",
        "a mean over the batch",
    )


def require_shape(name: str, like: Tensor, targets: Tensor) -> None:
    """Refuse targets of another shape than the outputs call for."""
    if like.shape != targets.shape:
        count = len(like)
        raise InputError(
            f"{name} needs targets of shape {shape_of(like, count)}, N an example each",
            f"targets of shape {shape_of(targets, count)}",
            _same_numbers(like, targets) or "another [loss] name, or targets in that shape",
        )


def _same_numbers(like: Tensor, targets: Tensor) -> str | None:
    """What makes targets that lack a dimension of one, or have one too many, fit."""
    for dim in range(max(like.dim(), targets.dim())):
        if dim < targets.dim() and targets.squeeze(dim).shape == like.shape:
            return f"targets.squeeze({dim}), which takes the column out of them"
        if dim <= targets.dim() and targets.unsqueeze(dim).shape == like.shape:
            return f"targets.unsqueeze({dim}), or squeeze({dim}) of the model's outputs"
    return None


def _no_outputs(name: str) -> InputError:
    return InputError(
        "this needs the model's outputs and one loss an example",
        f"[loss] step = {name!r}, which shows neither",
        "--matrix hessian, or [loss] name or factory",
    )
