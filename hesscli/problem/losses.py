"""Losses as weighted means: a numerator and a weight mass for each example.

Every named loss is Σ numerators / Σ masses, with the divisor that torch itself uses: examples,
unmasked tokens, or the sum of class weights. Batches can then be counted by their mass, and a
ragged last batch is right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hesscli.errors import InputError
from hesscli.problem.batches import Batch, output_tensor, rows, size_of, split_batch


class Loss(ABC):
    """A mean loss of a model on a batch.

    ``exposes_outputs`` says whether the loss is a function of model outputs and batch, which
    Gauss-Newton and per-example quantities need; where it is ``computed_by_model``, this is a
    claim that the proof puts to the test.
    """

    name: str
    exposes_outputs = True
    computed_by_model = False

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


def doubles(values: list[float] | None) -> Tensor | None:
    """A spec's numbers as they are, not rounded to single precision."""
    return None if values is None else torch.tensor(values, dtype=torch.float64)


def require_shape(name: str, expected: torch.Size, got: torch.Size) -> None:
    """Refuse targets of another shape than the outputs call for."""
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
