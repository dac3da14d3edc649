"""Networks, with data in the forms in which people have them: one subject from one seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fuzz import blocks, objectives
from fuzz.dice import Dice
from fuzz.objectives import Later, Objective

LARGEST = 150
"""Parameters: what a dense Hessian by double backward takes a moment for."""

Stage = Callable[[int], nn.Module]
"""A piece that keeps the shape ``(..., width)``, from the width."""
Wrap = Callable[[nn.Module, Objective], nn.Module]


@dataclass(frozen=True)
class Subject:
    """What hesscli is given, and what the user means by it.

    Attributes:
        model: the network.
        objective: the loss.
        data: the examples in one of the forms of data.
        batches: the user's own batches as (inputs, targets).
        coupled: an example's term depends on its batch, so that the batches matter.
        options: of Problem.
        weight_decay: as in options.
        subsample: examples that are kept, or None for all.
        causes: words that name what was planted; empty where nothing was.
        must_refuse: there is no right number, only a refusal will do.
        narrow: it computes in float32 somewhere, whatever its type.
        penalty: what the user's loss adds that is no function of outputs.
        form: of the data.
    """

    model: nn.Module
    objective: Objective
    data: Any
    batches: tuple[tuple[Tensor, Tensor], ...]
    coupled: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    subsample: int | None = None
    causes: tuple[str, ...] = ()
    must_refuse: bool = False
    narrow: bool = False
    penalty: Callable[[nn.Module], Tensor] | None = None
    form: str = ""

    @property
    def weight_decay(self) -> float:
        return float(self.options.get("weight_decay", 0.0))

    @property
    def dtype(self) -> torch.dtype:
        return next(p for p in self.model.parameters() if p.requires_grad).dtype

    @property
    def loss(self) -> Any:
        return self.objective.given


# -- networks ----------------------------------------------------------------------------------


def network(
    dice: Dice, objective: Objective, outputs: int, between: Stage | None
) -> tuple[nn.Module, Callable[[int], Tensor]]:
    """A network of the right kind of outputs, and what draws inputs for it."""
    width = dice.between(3, 4)
    if objective.by_token:
        stages, inputs, tied = _token_encoder(dice, width, keep=True)
        stage = blocks.sequence_stage
    else:
        encoder = dice.one_of(
            [_vector_encoder, _vector_encoder, _image, _signal, _sequence, _tokens]
        )
        stages, inputs, tied = encoder(dice, width)
        stage = blocks.row_stage
    middle = [stage(dice, width) for _ in range(dice.between(0, 2))]
    if between is not None:
        middle.insert(dice.between(0, len(middle)), between(width))
    head: nn.Module = nn.Linear(width, outputs, bias=dice.chance(0.8))
    if tied is not None and objective.by_token and dice.chance(0.3):
        head = blocks.Call(_by_embedding, tied)
    last = {"log-probabilities": [nn.LogSoftmax(-1)], "probabilities": [nn.Sigmoid()]}
    return nn.Sequential(*stages, *middle, head, *last.get(objective.kind, [])), inputs


def _by_embedding(x: Tensor, embedding: nn.Embedding) -> Tensor:
    return x @ embedding.weight.T


Encoder = tuple[list[nn.Module], Callable[[int], Tensor], nn.Module | None]


def _vector_encoder(dice: Dice, width: int) -> Encoder:
    size = dice.between(2, 5)
    first = [nn.Linear(size, width), blocks.activation(dice)]
    return first, lambda count: dice.normal(count, size), None


def _image(dice: Dice, width: int) -> Encoder:
    channels = dice.between(1, 2)
    pool = dice.one_of([nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2)])
    flat = blocks.Call(lambda x: x.flatten(2).amax(2)) if dice.chance(0.5) else _mean_of_image()
    first = [nn.Conv2d(channels, width, 2), blocks.activation(dice), pool, flat]
    return first, lambda count: dice.normal(count, channels, 5, 5), None


def _mean_of_image() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _signal(dice: Dice, width: int) -> Encoder:
    pool = dice.one_of([nn.MaxPool1d(2), nn.AvgPool1d(2)])
    first = [nn.Conv1d(2, width, 3, padding=dice.between(0, 1)), blocks.activation(dice), pool]
    last = blocks.Call(lambda x: x.mean(2))
    return [*first, last], lambda count: dice.normal(count, 2, 6), None


def _sequence(dice: Dice, width: int) -> Encoder:
    kind = dice.one_of([nn.RNN, nn.GRU, nn.LSTM])
    first = blocks.Recurrent(kind, 2, 3) if dice.chance(0.7) else nn.Linear(2, 3)
    stages = [first, nn.Linear(3, width)]
    if dice.chance(0.4):
        stages.append(blocks.sequence_stage(dice, width))
    return [*stages, blocks.pooled(dice)], lambda count: dice.normal(count, 4, 2), None


def _tokens(dice: Dice, width: int) -> Encoder:
    return _token_encoder(dice, width, keep=False)


def _token_encoder(dice: Dice, width: int, keep: bool) -> Encoder:
    padding = 0 if dice.chance(0.2) else None
    embedding = nn.Embedding(objectives.VOCABULARY, width, padding_idx=padding)
    stages: list[nn.Module] = [embedding]
    if keep or dice.chance(0.5):
        stages.append(blocks.sequence_stage(dice, width))
    if not keep:
        stages.append(blocks.pooled(dice))

    def inputs(count: int) -> Tensor:
        return dice.classes(objectives.VOCABULARY, count, objectives.TOKENS)

    return stages, inputs, embedding


class ByItself(nn.Module):
    """A model that computes its own loss, as transformers' do."""

    def __init__(self, inner: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.inner, self.total = inner, objective.total

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.inner(x)
        summed, mass = self.total(logits, labels)
        return {"loss": summed / mass, "logits": logits}


# -- data --------------------------------------------------------------------------------------


class Rows(Dataset[dict[str, Tensor]]):
    """Rows that are dicts."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.y[index]}


FORMS = ("dataset", "loader", "batches", "rows", "dicts", "shuffled")
DEFINITE = ("whole", "loader", "batches", "rows of one batch")
"""Forms in which it is certain what a batch is."""


def formed(
    dice: Dice, x: Tensor, y: Tensor, form: str, size: int
) -> tuple[Any, dict[str, Any], tuple[tuple[Tensor, Tensor], ...]]:
    """The data in a form, options of Problem, and the batches that the user means."""
    whole = ((x, y),)
    cut = tuple(zip(x.split(size), y.split(size), strict=True))
    sized = {"batch_size": size} if dice.chance(0.5) else {}
    all_at_once = {"batch_size": len(x) + dice.between(0, 3)}
    return {
        "dataset": lambda: (TensorDataset(x, y), sized, whole),
        "whole": lambda: (TensorDataset(x, y), all_at_once, whole),
        "loader": lambda: (DataLoader(TensorDataset(x, y), batch_size=size), {}, cut),
        "shuffled": lambda: (
            DataLoader(TensorDataset(x, y), batch_size=size, shuffle=True),
            {},
            whole,
        ),
        "batches": lambda: (list(cut), {}, cut),
        "rows": lambda: (Rows(x, y), sized, whole),
        "rows of one batch": lambda: (Rows(x, y), all_at_once, whole),
        "dicts": lambda: ([{"x": a, "labels": b} for a, b in cut], {}, cut),
        "pairs": lambda: (list(zip(x, y, strict=True)), sized, whole),
    }[form]()


# -- subjects ----------------------------------------------------------------------------------


def subject(
    dice: Dice,
    objective: Objective,
    *,
    between: Stage | None = None,
    wrap: Wrap | None = None,
    forms: tuple[str, ...] = FORMS,
    outputs: int | None = None,
    fewest: int = 2,
    coupled: bool = False,
    subsamples: bool = False,
    a_single_last: bool = False,
) -> Subject:
    """A network of a loss, drawn until it is small.

    Args:
        dice: chooses all that is not said.
        objective: the loss.
        between: a piece of the network that keeps the shape.
        wrap: what is done to the whole network.
        forms: of data, from which one is chosen.
        outputs: of the network.
        fewest: examples.
        coupled: an example's term depends on its batch.
        subsamples: now and then keep half of the examples.
        a_single_last: the last batch has one example, which else it has not.
    """
    for model, count, width in _attempts(dice, objective, between, outputs, fewest):
        module, inputs = model
        x, y = inputs(count), objective.targets(dice, count, width)
        given = objective.given
        loss = replace(objective, given=given.make(width) if isinstance(given, Later) else given)
        if objective.by == "model":
            module, forms = ByItself(module, objective), ("rows", "dicts")
        if wrap is not None:
            module = wrap(module, loss)
        module = module.to(dice.dtype)
        module.train(False)
        form = dice.one_of(forms)
        sizes = [n for n in range(2, count + 1) if (count % n == 1) == a_single_last]
        data, options, batches = formed(dice, x, y, form, dice.one_of(sizes))
        if dice.chance(0.2):
            options["weight_decay"] = 0.25
        kept = None
        if subsamples and count >= 32 and form in ("dataset", "rows") and dice.chance(0.3):
            kept = options["examples"] = count // 2
        options |= dict(objective.options)
        return Subject(module, loss, data, batches, coupled, options, kept, form=form)
    raise AssertionError("the grammar draws no small network")


def _attempts(
    dice: Dice, objective: Objective, between: Stage | None, outputs: int | None, fewest: int
) -> Iterator[tuple[tuple[nn.Module, Callable[[int], Tensor]], int, int]]:
    count = fewest if dice.chance(0.1) else dice.between(fewest, 64)
    for _ in range(100):
        width = outputs or (objectives.VOCABULARY if objective.by_token else dice.between(2, 3))
        module, inputs = network(dice, objective, width, between)
        trained = [p for p in module.parameters() if p.requires_grad]
        if 0 < sum(p.numel() for p in trained) <= LARGEST:
            yield (module, inputs), count, width


def plain(dice: Dice) -> Subject:
    """A network with nothing planted."""
    return subject(dice, dice.one_of(objectives.PLAIN)(dice), subsamples=True)
