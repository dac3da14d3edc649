"""Losses: what hesscli is given, and the same in torch's own functions as a sum over a mass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fuzz.dice import Dice

Kind = Literal["classes", "log-probabilities", "reals", "bits", "probabilities", "tokens"]
Total = Callable[[Any, Any], tuple[Tensor, float]]
"""Of outputs and targets of a batch: the summed loss, and the mass that a mean divides it by."""
STEP = Literal["outputs", "step", "model"]


@dataclass(frozen=True)
class Objective:
    """A loss.

    Attributes:
        given: what hesscli gets.
        kind: what its outputs and targets are.
        total: the loss of a batch, from outside.
        targets: targets for so many examples of so many outputs.
        sums: the user's objective is the sum over all batches and not their mean.
        by: where hesscli meets it: as a loss of outputs, a step, or computed by the model.
        options: what Problem is given besides.
    """

    given: Any
    kind: Kind
    total: Total
    targets: Callable[[Dice, int, int], Tensor]
    sums: bool = False
    by: STEP = "outputs"
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def by_token(self) -> bool:
        return self.kind == "tokens"


def mean(loss: Callable[[Any, Any], Tensor]) -> Total:
    """Of a mean over the examples of a batch, whatever it mixes."""
    return lambda outputs, targets: (len(targets) * loss(outputs, targets), float(len(targets)))


def some_classes(ignored: int | None = None) -> Callable[[Dice, int, int], Tensor]:
    """Classes, of which some but never all are ignored."""

    def draw(dice: Dice, count: int, outputs: int) -> Tensor:
        targets = dice.classes(outputs, count)
        if ignored is not None:
            targets[1:][torch.rand(count - 1) < 0.3] = ignored
            targets[0] = 1  # which no loss here ignores
        return targets

    return draw


def reals(dice: Dice, count: int, outputs: int) -> Tensor:
    return dice.normal(count, outputs)


def bits(dice: Dice, count: int, outputs: int) -> Tensor:
    return dice.classes(2, count, outputs).to(dice.dtype)


def counts(dice: Dice, count: int, outputs: int) -> Tensor:
    return dice.classes(4, count, outputs).to(dice.dtype)


TOKENS, VOCABULARY = 4, 5


def next_tokens(dice: Dice, count: int, outputs: int) -> Tensor:
    """Tokens ``(N, T)``, some ignored, at least one an example counted."""
    targets = dice.classes(VOCABULARY, count, TOKENS)
    lengths = torch.randint(2, TOKENS + 1, (count, 1))
    return targets.masked_fill(torch.arange(TOKENS) >= lengths, -100)


# -- losses by name ----------------------------------------------------------------------------


def cross_entropy(dice: Dice) -> Objective:
    weights = dice.positive(8) if dice.chance(0.4) else None
    smoothing = dice.one_of([0.0, 0.0, 0.25])
    ignored = dice.one_of([None, None, -100, 0, -1])
    if weights is None and not smoothing and ignored in (None, -100) and dice.chance(0.7):
        given = dice.one_of(["cross_entropy", F.cross_entropy, nn.CrossEntropyLoss()])
        return Objective(given, "classes", _cross_entropy(), some_classes(ignored))
    index = -100 if ignored is None else ignored

    def make(classes: int) -> nn.Module:
        chosen = None if weights is None else torch.tensor(weights[:classes])
        return nn.CrossEntropyLoss(chosen, ignore_index=index, label_smoothing=smoothing)

    total = _cross_entropy(weights, index, smoothing)
    return Objective(Later(make), "classes", total, some_classes(ignored))


@dataclass(frozen=True)
class Later:
    """A criterion that needs the number of classes."""

    make: Callable[[int], Any]


def _cross_entropy(
    weights: list[float] | None = None, index: int = -100, smoothing: float = 0.0
) -> Total:
    def total(outputs: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        chosen = None if weights is None else outputs.new_tensor(weights[: outputs.shape[1]])
        kept = targets != index
        mass = kept.double() if chosen is None else chosen[targets * kept].double() * kept
        summed = F.cross_entropy(
            outputs,
            targets,
            chosen,
            ignore_index=index,
            label_smoothing=smoothing,
            reduction="sum",
        )
        return summed, float(mass.sum())

    return total


def probabilities_as_targets(dice: Dice) -> Objective:
    def draw(dice: Dice, count: int, outputs: int) -> Tensor:
        return dice.normal(count, outputs).softmax(1)

    return Objective("cross_entropy", "classes", mean(F.cross_entropy), draw)


def nll(dice: Dice) -> Objective:
    if dice.chance(0.5):
        given = dice.one_of(["nll", F.nll_loss, nn.NLLLoss()])
        return Objective(given, "log-probabilities", mean(F.nll_loss), some_classes())
    weights, ignored = dice.positive(8), dice.one_of([-100, 0])

    def make(classes: int) -> nn.Module:
        return nn.NLLLoss(torch.tensor(weights[:classes]), ignore_index=ignored)

    def total(outputs: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        chosen = outputs.new_tensor(weights[: outputs.shape[1]])
        kept = targets != ignored
        summed = F.nll_loss(outputs, targets, chosen, ignore_index=ignored, reduction="sum")
        return summed, float((chosen[targets * kept] * kept).sum())

    return Objective(Later(make), "log-probabilities", total, some_classes(ignored))


def mse(dice: Dice) -> Objective:
    given = dice.one_of(["mse", F.mse_loss, nn.MSELoss()])
    return Objective(given, "reals", mean(F.mse_loss), reals)


def bce_with_logits(dice: Dice) -> Objective:
    plain = F.binary_cross_entropy_with_logits
    if dice.chance(0.6):
        given = dice.one_of(["bce_with_logits", plain, nn.BCEWithLogitsLoss()])
        return Objective(given, "bits", mean(plain), bits)
    weights = dice.positive(8)

    def make(outputs: int) -> nn.Module:
        return nn.BCEWithLogitsLoss(pos_weight=torch.tensor(weights[:outputs]))

    def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
        chosen = outputs.new_tensor(weights[: outputs.shape[1]])
        return plain(outputs, targets, pos_weight=chosen)

    return Objective(Later(make), "bits", mean(weighted), bits)


def bce(dice: Dice) -> Objective:
    given = dice.one_of(["bce", F.binary_cross_entropy, nn.BCELoss()])
    return Objective(given, "probabilities", mean(F.binary_cross_entropy), bits)


def language_model(dice: Dice) -> Objective:
    def total(outputs: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        summed = F.cross_entropy(outputs.transpose(1, 2), targets, reduction="sum")
        return summed, float((targets != -100).sum())

    return Objective("language_model", "tokens", total, next_tokens)


def huggingface(dice: Dice) -> Objective:
    """Computed by the model: a causal one shifts its labels, a classifier has one an example."""
    if dice.chance(0.5):
        classified = replace(cross_entropy_plain(), given="huggingface", by="model")
        return replace(classified, targets=some_classes())

    def total(outputs: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        kept = targets[:, 1:]
        summed = F.cross_entropy(outputs[:, :-1].transpose(1, 2), kept, reduction="sum")
        return summed, float((kept != -100).sum())

    return Objective("huggingface", "tokens", total, next_tokens, by="model")


def cross_entropy_plain() -> Objective:
    return Objective("cross_entropy", "classes", _cross_entropy(), some_classes())


# -- losses of one's own -----------------------------------------------------------------------


def robust(outputs: Tensor, targets: Tensor) -> Tensor:
    return (1 + (outputs - targets).square()).sqrt().mean()


def poisson(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.clamp(max=3).exp() - targets * outputs).sum(1).mean()


def own_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets) + 0.01 * outputs.square().sum(1).mean()


def quartic(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets).square().sum(1) + 0.1 * outputs.pow(4).sum(1)).mean()


def own(dice: Dice) -> Objective:
    """A function of the user's that is a mean over examples."""
    function, kind, targets = dice.one_of(
        [
            (robust, "reals", reals),
            (quartic, "reals", reals),
            (poisson, "reals", counts),
            (own_cross_entropy, "classes", some_classes()),
            (partial(F.huber_loss, delta=0.75), "reals", reals),
        ]
    )
    return Objective(function, kind, mean(function), targets)


def step(dice: Dice, inner: Objective | None = None) -> Objective:
    """``step(model, batch)`` with the mean of one of the user's own losses."""
    from hesscli.problem.losses import StepLoss

    inner = own(dice) if inner is None else inner
    function, weighted = inner.given, dice.chance(0.5)

    def take(model: nn.Module, batch: Any) -> Any:
        x, y = batch.values() if isinstance(batch, dict) else batch
        value = function(model(x), y)
        return (value, len(y)) if weighted else value

    return replace(inner, given=StepLoss(take, "step"), by="step")


NAMED = (cross_entropy, cross_entropy, nll, mse, bce_with_logits, language_model)
PLAIN = (*NAMED, bce, huggingface, probabilities_as_targets, own, own, step)
