"""Losses as weighted means: a numerator and a weight mass for each example.

Every named loss is Σ numerators / Σ masses, with the divisor that torch itself uses: examples,
unmasked tokens, or the sum of class weights. Batches can then be counted by their mass, and a
ragged last batch is right.
"""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from hesscli.errors import InputError
from hesscli.memory import is_out_of_memory
from hesscli.problem.batches import (
    Batch,
    filled,
    is_sliceable,
    rows,
    shape_of,
    size_of,
    split_batch,
    tensor_of,
    tensors_of,
)
from hesscli.problem.outputs import HiddenOutputsError, Layout, named_output, rows_of
from hesscli.results import Reduction

# -- Losses as weighted means: a numerator and a weight mass for each example ----------------------


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
        return tensor_of(split_batch(batch)[1])

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
    def is_of_outputs(self) -> bool:
        """Whether it is by construction the mean of the outputs that a forward pass gives."""
        return type(self).evaluate is Loss.evaluate

    @property
    def natural(self) -> Loss:
        """The same loss as a function of natural parameters, for the Gauss-Newton matrix."""
        return self

    @property
    def unscaled(self) -> Loss:
        """The mean that it is a multiple of."""
        return self

    def share(self, batch: Batch) -> float:
        """What the mean of a batch is multiplied by to be it."""
        return 1.0

    def mass(self, model: nn.Module, batch: Batch, count: int | None = None) -> float:
        """Weight mass of a whole batch; only a step needs the model for it.

        ``count`` is its number of examples where rows are none.
        """
        return float(self.masses(batch).sum())

    def value_and_mass(self, model: nn.Module, batch: Batch, count: int) -> tuple[Tensor, float]:
        """The loss and its mass, of which a step gives both at once."""
        return self.evaluate(model, batch), self.mass(model, batch, count)

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
        return self._mean(batch, *self._call(model, batch))

    def mass(self, model: nn.Module, batch: Batch, count: int | None = None) -> float:
        """The weight that the step returns, else the number of examples."""
        weight = self._call(model, batch)[1]  # with gradients on, for the step may take some
        return self._weight(batch, weight, count)

    def value_and_mass(self, model: nn.Module, batch: Batch, count: int) -> tuple[Tensor, float]:
        """Both, of one call."""
        value, weight = self._call(model, batch)
        return self._mean(batch, value, weight), self._weight(batch, weight, count)

    def _mean(self, batch: Batch, value: Tensor, weight: Any) -> Tensor:
        if self.reduction != "sum":
            return value
        return value / (size_of(batch) if weight is None else weight)

    def _weight(self, batch: Batch, weight: Any, count: int | None) -> float:
        if weight is not None:
            return float(tensor_of(weight).detach())
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
    return None if values is None else torch.tensor(values, dtype=torch.float64, device="cpu")


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


def require_shape(name: str, like: Tensor, targets: Tensor, hint: str | None = None) -> None:
    """Refuse targets of another shape than the outputs call for."""
    if like.shape != targets.shape:
        count = len(like)
        raise InputError(
            f"{name} needs targets of shape {shape_of(like, count)}, N an example each",
            f"targets of shape {shape_of(targets, count)}",
            hint or _same_numbers(like, targets) or "another [loss] name, or targets in that shape",
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


# -- A loss of the user's own: a function of what the model returned, whole, and of the targets ----


class UserLoss(Loss):
    """``fn(what the model returned, targets) -> mean loss``, or its sum; examples count once.

    Where the model returns a single tensor, that is its outputs as it is. Where it returns a tree
    of them, outputs are ``(N, M)``: the tree's tensors side by side, which the function gets back
    as the tree that they were.
    """

    def __init__(
        self,
        function: Callable[[Any, Any], Tensor],
        name: str,
        reduction: Reduction | None = None,
    ) -> None:
        self.function, self.name, self.reduction = function, name, reduction
        self._layouts: dict[tuple[int, torch.dtype], Layout] = {}

    def settled(self, model: nn.Module, batches: Iterable[Batch]) -> Loss:
        """The same, without outputs where what the model returns is not one row an example."""
        batch, settled = next(iter(batches)), copy.copy(self)
        try:
            settled.outputs(model, batch)
            if settled._layouts:
                settled.is_claim = True
                settled._look_at_half(model, batch)
        except HiddenOutputsError as error:
            settled.hidden, settled.is_claim = error.got, False
        return settled

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the model returned: a tensor as it is, a tree as rows ``(N, M)``.

        Raises:
            HiddenOutputsError: it is no rows of examples.
        """
        raw = returned(model, batch)
        if isinstance(raw, Tensor) and not self._layouts:
            return raw
        found, layout = rows_of(raw, size_of(batch))
        place = found.shape[1], found.dtype
        if not self._layouts.get(place, layout).is_like(layout):
            raise HiddenOutputsError("outputs that are of another form in another batch")
        self._layouts[place] = layout  # its types may be others meanwhile
        return found

    def evaluate(self, model: nn.Module, batch: Batch) -> Tensor:
        """The user's own mean of what the model returned, or sum over the number of examples."""
        return self._mean(returned(model, batch), batch)

    def masses(self, batch: Batch) -> Tensor:
        """Mass 1 for each example."""
        return torch.ones(size_of(batch), dtype=torch.float64, device="cpu")

    def mean(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The same of its rows."""
        return self._mean(self._as_returned(outputs), batch)

    def _mean(self, raw: Any, batch: Batch) -> Tensor:
        value = self.function(raw, split_batch(batch)[1])
        return value / size_of(batch) if self.reduction == "sum" else value

    def mass(self, model: nn.Module, batch: Batch, count: int | None = None) -> float:
        """The number of examples; of a sum, whose parts add up, what it was divided by."""
        return float(size_of(batch) if self.reduction == "sum" or count is None else count)

    def numerators(self, outputs: Tensor, batch: Batch) -> Tensor:
        """By one call an example, all in one where the function goes through vmap."""
        targets = split_batch(batch)[1]

        def alone(i: int) -> Tensor:
            pair = self._as_returned(outputs[i : i + 1]), rows(targets, i, i + 1)
            return self.function(*pair).reshape(())

        mapped = self._mapped(outputs, targets, alone)
        if mapped is not None:
            return mapped
        return torch.stack([alone(i) for i in range(len(outputs))])

    def _mapped(
        self, outputs: Tensor, targets: Any, alone: Callable[[int], Tensor]
    ) -> Tensor | None:
        """All examples at once, or None where that fails or ends differ from those alone."""

        def each(row: Tensor, *leaves: Tensor) -> Tensor:
            one = filled(targets, (leaf[None] for leaf in leaves))
            return self.function(self._as_returned(row[None]), one).reshape(())

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of operations that vmap maps one by one
                found = torch.func.vmap(each)(outputs, *tensors_of(targets))
            ends = torch.stack([alone(0), alone(len(outputs) - 1)]).detach()
            difference = (found[[0, -1]].detach() - ends).abs()
            coarse = torch.finfo(ends.dtype).eps ** 0.5
            return found if bool((difference <= coarse * ends.abs()).all()) else None
        except Exception as error:  # of any kind: what vmap cannot do shows in many ways
            if is_out_of_memory(error):
                raise
            return None

    def _as_returned(self, outputs: Tensor) -> Any:
        """What the function gets: the outputs, or the tree that they are the rows of.

        They are its own, for it may write into them: a model's it could, and not a leaf's.
        """
        own = outputs.clone()
        if not self._layouts:
            return own
        return self._layouts[own.shape[1], own.dtype].tree(own)

    def _look_at_half(self, model: nn.Module, batch: Batch) -> None:
        """Half a batch has half the rows, unless lengths were equal by chance.

        Raises:
            HiddenOutputsError: it has not.
        """
        if is_sliceable(batch) and size_of(batch) > 1:
            try:
                self.outputs(model, rows(batch, 0, size_of(batch) // 2))
            except HiddenOutputsError:
                raise
            except Exception as error:  # a model may refuse fewer examples
                if is_out_of_memory(error):
                    raise


# -- Losses that are a sum over all examples, written as a multiple of their mean ------------------


class Summed(Loss):
    """A loss times the size of the whole loader, of which the kept examples are a sample.

    Everything that is a mean over batches, weighted by their mass, then is of the sum.

    Args:
        loss: whose mean is taken.
        multiple: the number of examples that the loader has, or what its steps divide by in all.
    """

    def __init__(self, loss: Loss, multiple: float) -> None:
        self.loss, self.multiple = loss, multiple
        self.name, self.reduction = loss.name, loss.reduction
        self.shows_examples = loss.shows_examples
        self.hidden, self.is_claim, self.output = loss.hidden, loss.is_claim, loss.output
        self.is_likelihood, self.warnings = loss.is_likelihood, loss.warnings

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The outputs as the loss of one batch reads them."""
        return self.loss.outputs(model, batch)

    def targets(self, batch: Batch) -> Tensor:
        """The targets as the loss of one batch reads them."""
        return self.loss.targets(batch)

    def masses(self, batch: Batch) -> Tensor:
        """One an example, whatever its weight: a sum has no divisor that a sample would guess."""
        if self.shows_examples:
            return torch.ones(size_of(batch), dtype=torch.float64, device="cpu")
        return self.loss.masses(batch)

    def mass(self, model: nn.Module, batch: Batch, count: int | None = None) -> float:
        """The number of examples, or what a step divides by."""
        if self.shows_examples:
            return float(size_of(batch))
        return self.loss.mass(model, batch, count)

    def numerators(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The loss's numerators, multiplied."""
        return self.multiple * self.loss.numerators(outputs, batch)

    def mean(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The loss's mean, multiplied."""
        share = self.share(batch)
        return share * self.loss.mean(outputs, batch) if share else 0.0 * outputs.sum()

    @property
    def is_of_outputs(self) -> bool:
        """Whether the loss is."""
        return self.loss.is_of_outputs

    def evaluate(self, model: nn.Module, batch: Batch) -> Tensor:
        """Forward pass and mean loss, multiplied."""
        share = self.share(batch)
        if not share:
            return 0.0 * self.outputs(model, batch).sum()
        return share * self.loss.evaluate(model, batch)

    def share(self, batch: Batch) -> float:
        """What the loss's own mean of a batch is multiplied by to be the mean over examples."""
        if not self.shows_examples:
            return self.multiple
        return self.multiple * float(self.loss.masses(batch).sum()) / size_of(batch)

    @property
    def unscaled(self) -> Loss:
        """The mean loss that was multiplied."""
        return self.loss

    @property
    def natural(self) -> Loss:
        """The same in natural parameters: of the mean, multiplied."""
        return Summed(self.loss.natural, self.multiple)

    def check(self, outputs: Tensor, batch: Batch) -> None:
        """Check outputs and targets as the loss does."""
        self.loss.check(outputs, batch)

    def correct(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Count what is correct as the loss does."""
        return self.loss.correct(outputs, batch)
