"""Named faults, and things that are no faults but once were: each with the words that name it.

A plant is sown into a network that the grammar draws. Where the user's function has a number, the
right number or a refusal that names the cause will do; where it has none, only the latter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fuzz import blocks, grammar, misleading, objectives
from fuzz.blocks import Call, Planted
from fuzz.dice import Dice, words
from fuzz.grammar import DEFINITE, Subject, subject
from fuzz.misleading import Pair
from fuzz.objectives import Objective, mean, reals
from fuzz.truth import honest, objective

Sow = Callable[[Dice], Subject]


@dataclass(frozen=True)
class Plant:
    """What is planted: how, and which words name it."""

    draw: Sow
    causes: tuple[str, ...]
    must_refuse: bool = False

    def sow(self, dice: Dice) -> Subject:
        drawn = self.draw(dice)
        return replace(drawn, causes=self.causes, must_refuse=self.must_refuse)


PLANTS: dict[str, Plant] = {}


def plant(name: str, *causes: str, must_refuse: bool = False) -> Callable[[Sow], Sow]:
    """Register a way to sow a plant."""

    def register(draw: Sow) -> Sow:
        assert name not in PLANTS, f"two plants called {name}"
        PLANTS[name] = Plant(draw, causes, must_refuse)
        return draw

    return register


def by_name(dice: Dice) -> Objective:
    """Any of torch's losses."""
    return dice.one_of(objectives.NAMED)(dice)


def of_rows(dice: Dice) -> Objective:
    """Any of torch's losses that has no tokens, and masses that do not differ."""
    options = (objectives.cross_entropy_plain(), objectives.mse(dice))
    return dice.one_of(options)


# -- what mixes the examples of a batch --------------------------------------------------------

MIXES = words(r"mixes", r"depends? on (the|its|their) batch", r"coupl", r"batch is the unit")
SUMS = (*MIXES, r"\bsum\b", r"\bmean\b")
MIXERS: dict[str, Callable[[Tensor], Tensor]] = {
    "less its mean": lambda h: h - h.mean(0),
    "less a little of its mean": lambda h: h - 0.05 * h.mean(0),
    "by its largest": lambda h: h / (1 + h.abs().amax(0)),
    "by its norm": lambda h: h / (1 + h.norm()),
    "softmax over the batch": lambda h: h.softmax(0) * len(h),
    "attention over the batch": lambda h: h + (h @ h.mT).softmax(1) @ h,
    "its neighbour": lambda h: h + 0.5 * h.roll(1, 0).tanh(),
    "the first row": lambda h: torch.tanh(h - h[:1]),
    "rows above the mean": lambda h: torch.where(h > h.mean(0), h.tanh(), 2 * h),
    "a mean of some rows": lambda h: h - (h * (h[:, :1] > 0)).sum(0) / ((h[:, 0] > 0).sum() + 1),
    "running sums": lambda h: (h.cumsum(0) / len(h)).tanh() + h,
}


def with_batches(dice: Dice, between: grammar.Stage) -> Subject:
    return subject(dice, of_rows(dice), between=between, forms=DEFINITE, coupled=True, fewest=4)


@plant("a model that mixes its batch", *MIXES)
def _mixing(dice: Dice) -> Subject:
    mix = dice.one_of(list(MIXERS.values()))
    return with_batches(dice, lambda width: Call(mix))


@plant("functional batch norm", *MIXES)
def _functional(dice: Dice) -> Subject:
    return with_batches(
        dice, lambda width: Call(lambda h: F.batch_norm(h, None, None, training=True))
    )


@plant("batch norm in training", *MIXES)
def _training(dice: Dice) -> Subject:
    drawn = with_batches(dice, lambda width: nn.BatchNorm1d(width, affine=dice.chance(0.7)))
    for module in drawn.model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.train()
    return drawn


@plant("batch norm without statistics", *MIXES)
def _without_statistics(dice: Dice) -> Subject:
    return with_batches(dice, lambda width: nn.BatchNorm1d(width, track_running_stats=False))


@plant(
    "batch norm and a last batch of one",
    r"last batch",
    r"one example",
    r"batch of (1|one)",
    must_refuse=True,
)
def _single(dice: Dice) -> Subject:
    return subject(
        dice,
        of_rows(dice),
        between=lambda width: nn.BatchNorm1d(width, track_running_stats=False),
        forms=("loader", "batches"),
        coupled=True,
        fewest=4,
        a_single_last=True,
    )


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    scores = F.normalize(outputs, dim=1) @ F.normalize(targets, dim=1).T / 0.5
    return F.cross_entropy(scores, torch.arange(len(scores)))


def pairwise(outputs: Tensor, targets: Tensor) -> Tensor:
    apart = (outputs[:, None] - outputs).square().sum(2)
    wanted = (targets[:, None] - targets).square().sum(2)
    return F.smooth_l1_loss(apart, wanted)


def variance(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets) + (1 - outputs.var(0)).relu().square().sum()


def correlation(outputs: Tensor, targets: Tensor) -> Tensor:
    a, b = outputs - outputs.mean(0), targets - targets.mean(0)
    return 1 - (a * b).sum() / (a.norm() * b.norm())


def root(outputs: Tensor, targets: Tensor) -> Tensor:
    return (F.mse_loss(outputs, targets) + 0.01).sqrt()


def masked(outputs: Tensor, targets: Tensor) -> Tensor:
    kept = targets[:, 0] > 0.3
    return ((outputs - targets)[kept] ** 2).sum() / kept.sum().clamp(min=1)


def balanced(outputs: Tensor, targets: Tensor) -> Tensor:
    weights = 1 + (targets[:, 0] > 0).double().mean().to(outputs)
    return (weights * (outputs - targets).square().sum(1)).mean()


def hardest(outputs: Tensor, targets: Tensor) -> Tensor:
    each = (outputs - targets).square().sum(1)
    return each.topk(max(1, len(each) // 2)).values.mean()


def of_batches(loss: Callable[[Tensor, Tensor], Tensor]) -> Objective:
    return Objective(loss, "reals", mean(loss), reals)


def with_mixing_loss(dice: Dice, *losses: Callable[[Tensor, Tensor], Tensor]) -> Subject:
    loss = of_batches(dice.one_of(losses))
    return subject(dice, loss, forms=DEFINITE, coupled=True, fewest=4)


@plant("a contrastive loss", *MIXES)
def _contrastive(dice: Dice) -> Subject:
    return with_mixing_loss(dice, contrastive, pairwise)


@plant("a loss of the whole batch", *MIXES)
def _of_the_batch(dice: Dice) -> Subject:
    return with_mixing_loss(dice, variance, correlation, root, balanced, hardest)


@plant("a mean over unmasked rows", *MIXES)
def _masked(dice: Dice) -> Subject:
    return with_mixing_loss(dice, masked)


@plant("a step that mixes its batch", *MIXES)
def _step(dice: Dice) -> Subject:
    loss = objectives.step(dice, of_batches(dice.one_of((contrastive, variance, masked, root))))
    return subject(dice, loss, forms=DEFINITE, coupled=True, fewest=4)


# -- sums --------------------------------------------------------------------------------------


def summed(objective: Objective, given: Any) -> Objective:
    return replace(objective, given=given, sums=True)


@plant("a criterion that sums", *SUMS)
def _criterion(dice: Dice) -> Subject:
    sums = {"reduction": "sum"}
    loss = dice.one_of(
        (
            summed(objectives.cross_entropy_plain(), nn.CrossEntropyLoss(**sums)),
            summed(_squares(), nn.MSELoss(**sums)),
            summed(_logits(), nn.BCEWithLogitsLoss(**sums)),
            summed(_likelihood(), nn.NLLLoss(**sums)),
        )
    )
    return subject(dice, loss)


@plant("a function of torch that sums", *SUMS)
def _bound(dice: Dice) -> Subject:
    from functools import partial

    sums = {"reduction": "sum"}
    loss = dice.one_of(
        (
            summed(objectives.cross_entropy_plain(), partial(F.cross_entropy, **sums)),
            summed(_squares(), partial(F.mse_loss, **sums)),
        )
    )
    return subject(dice, loss)


@plant("a function of one's own that sums", *SUMS)
def _own_sum(dice: Dice) -> Subject:
    loss = dice.one_of(
        (
            summed(_squares(), lambda z, y: (z - y).square().sum()),
            summed(objectives.cross_entropy_plain(), lambda z, y: F.cross_entropy(z, y) * len(z)),
        )
    )
    return subject(dice, loss, forms=DEFINITE)


@plant("a sum over a fixed number", *SUMS)
def _fixed_number(dice: Dice) -> Subject:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum() / 8

    total = lambda z, y: (loss(z, y), 0.0)  # noqa: E731
    summed_up = Objective(loss, "reals", total, reals, sums=True)
    return subject(dice, summed_up, forms=("whole", "rows of one batch"))


@plant("an elementwise criterion", r"reduction", r"\bmean\b", r"\bsum\b", must_refuse=True)
def _elementwise(dice: Dice) -> Subject:
    return subject(dice, replace(_squares(), given=nn.MSELoss(reduction="none")))


def _squares() -> Objective:
    return Objective(None, "reals", lambda z, y: ((z - y).square().sum(), float(y.numel())), reals)


def _logits() -> Objective:
    def total(outputs: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        summed = F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")
        return summed, float(targets.numel())

    return Objective(None, "bits", total, objectives.bits)


def _likelihood() -> Objective:
    def total(outputs: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        return F.nll_loss(outputs, targets, reduction="sum"), float(len(targets))

    return Objective(None, "log-probabilities", total, objectives.some_classes())


# -- several outputs ---------------------------------------------------------------------------

OUTPUTS = words(r"outputs?\b")


class Two(NamedTuple):
    """A named tuple of outputs."""

    logits: Tensor
    aux: Tensor


@dataclasses.dataclass
class Record:
    """A data class of outputs."""

    logits: Tensor
    aux: Tensor


class Several(nn.Module):
    """A second output beside the network's, in some kind of container."""

    def __init__(self, inner: nn.Module, make: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.make = inner, make
        self.scale = nn.Parameter(torch.tensor(0.75))

    def forward(self, x: Tensor) -> Any:
        first = self.inner(x)
        return self.make(first, torch.tanh(self.scale * first))


CONTAINERS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Any, Any]]]] = {
    "tuple": (lambda a, b: (a, b), lambda o: (o[0], o[1])),
    "list": (lambda a, b: [a, b], lambda o: (o[0], o[1])),
    "dict": (lambda a, b: {"first": a, "second": b}, lambda o: (o["first"], o["second"])),
    "named tuple": (Two, lambda o: (o.logits, o.aux)),
    "data class": (Record, lambda o: (o.logits, o.aux)),
    "nested": (
        lambda a, b: {"heads": [a, {"b": b}]},
        lambda o: (o["heads"][0], o["heads"][1]["b"]),
    ),
}


def _sown_outputs(kind: str) -> None:
    make, take = CONTAINERS[kind]

    def loss(outputs: Any, targets: Tensor) -> Tensor:
        first, second = take(outputs)
        return F.mse_loss(first, targets) + 0.5 * (second - targets).abs().pow(1.5).mean()

    @plant(f"a loss of a {kind} of outputs", *OUTPUTS)
    def _(dice: Dice) -> Subject:
        wrap = lambda net, _: Several(net, make)  # noqa: E731
        return subject(dice, of_batches(loss), wrap=wrap)


for _kind in CONTAINERS:
    _sown_outputs(_kind)


@plant("a named output of several", *OUTPUTS)
def _named_output(dice: Dice) -> Subject:
    kind, output, take = dice.one_of(
        [
            ("tuple", 0, 0),
            ("dict", "first", 0),
            ("named tuple", "logits", 0),
            ("data class", "logits", 0),
            ("dict", "second", 1),
            ("tuple", 1, 1),
            ("data class", "aux", 1),
        ]
    )
    make, parts = CONTAINERS[kind]
    inner = of_rows(dice)
    total = lambda outputs, targets: inner.total(parts(outputs)[take], targets)  # noqa: E731
    one_of_two = replace(inner, total=total, options=(("output", output),))
    return subject(dice, one_of_two, wrap=lambda net, _: Several(net, make))


@plant("a named loss of several outputs", *OUTPUTS, must_refuse=True)
def _unnamed_output(dice: Dice) -> Subject:
    make, parts = CONTAINERS[dice.one_of(["tuple", "dict", "list"])]
    inner = of_rows(dice)
    total = lambda outputs, targets: inner.total(parts(outputs)[0], targets)  # noqa: E731
    return subject(dice, replace(inner, total=total), wrap=lambda net, _: Several(net, make))


@plant("logits among several outputs", *OUTPUTS)
def _logits_among(dice: Dice) -> Subject:
    make, parts = CONTAINERS[dice.one_of(["named tuple", "data class"])]
    inner = of_rows(dice)
    total = lambda outputs, targets: inner.total(parts(outputs)[0], targets)  # noqa: E731
    return subject(dice, replace(inner, total=total), wrap=lambda net, _: Several(net, make))


# -- what a loss assumes -----------------------------------------------------------------------

NORMALISED = words(r"log.?prob", r"log_softmax", r"normali[sz]ed")
PROBABILITIES = words(r"softmax", r"probabilit", r"sum to")


@plant("nll of what is no log-probability", *NORMALISED)
def _raw_nll(dice: Dice) -> Subject:
    loss = replace(objectives.nll(dice), kind="classes")
    return subject(dice, loss)


@plant("nll of twice the log-probabilities", *NORMALISED)
def _twice_nll(dice: Dice) -> Subject:
    loss = replace(objectives.nll(dice), kind="classes")
    wrap = lambda net, _: nn.Sequential(net, nn.LogSoftmax(1), Call(lambda z: 2 * z))  # noqa: E731
    return subject(dice, loss, wrap=wrap)


@plant("nll of a softmax's logarithm")
def _log_of_softmax(dice: Dice) -> Subject:
    loss = replace(objectives.nll(dice), kind="classes")
    wrap = lambda net, _: nn.Sequential(net, nn.Softmax(1), Call(torch.log))  # noqa: E731
    return subject(dice, loss, wrap=wrap)


@plant("softmax in front of cross-entropy", *PROBABILITIES)
def _softmax(dice: Dice) -> Subject:
    wrap = lambda net, _: nn.Sequential(net, nn.Softmax(1))  # noqa: E731
    return subject(dice, objectives.cross_entropy(dice), wrap=wrap)


@plant("bce of what is no probability", r"probabilit", r"\[0, 1\]", r"0 (and|to|…) 1")
def _raw_bce(dice: Dice) -> Subject:
    def clamped(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy(outputs, targets)

    loss = Objective(F.binary_cross_entropy, "bits", mean(clamped), objectives.bits)
    wrap = lambda net, _: nn.Sequential(net, Call(lambda z: z.square() / (1 + z.square())))  # noqa: E731
    return subject(dice, loss, wrap=wrap)


TOKEN_LABELS = words(r"shift", r"labels?", r"mass")


def _by_itself(total: objectives.Total, targets: Any, kind: objectives.Kind) -> Objective:
    return Objective("huggingface", kind, total, targets, by="model")


@plant("labels that nobody shifts", *TOKEN_LABELS)
def _unshifted(dice: Dice) -> Subject:
    def total(outputs: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        summed = F.cross_entropy(outputs.transpose(1, 2), targets, reduction="sum")
        return summed, float((targets != -100).sum())

    return subject(dice, _by_itself(total, objectives.next_tokens, "tokens"))


@plant("labels of masked tokens alone", *TOKEN_LABELS)
def _masked_tokens(dice: Dice) -> Subject:
    def draw(dice: Dice, count: int, outputs: int) -> Tensor:
        labels = dice.classes(objectives.VOCABULARY, count, objectives.TOKENS)
        kept = torch.rand(labels.shape) < 0.4
        kept[:, 0] |= ~kept.any(1)
        return labels.masked_fill(~kept, -100)

    def total(outputs: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        summed = F.cross_entropy(outputs.transpose(1, 2), targets, reduction="sum")
        return summed, float((targets != -100).sum())

    return subject(dice, _by_itself(total, draw, "tokens"))


@plant("labels in a column", *TOKEN_LABELS)
def _column(dice: Dice) -> Subject:
    def draw(dice: Dice, count: int, outputs: int) -> Tensor:
        return dice.classes(outputs, count, 1)

    def total(outputs: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        return F.cross_entropy(outputs, targets[:, 0], reduction="sum"), float(len(targets))

    return subject(dice, _by_itself(total, draw, "classes"))


@plant("weights of tokens")
def _weighted_tokens(dice: Dice) -> Subject:
    plain = objectives.language_model(dice)
    drawn = subject(dice, plain, forms=("batches",))
    weights = [torch.randint(1, 8, y.shape).to(dice.dtype) / 4 for _, y in drawn.batches]
    data = [(x, y, w) for (x, y), w in zip(drawn.batches, weights, strict=True)]

    def total(outputs: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        losses = F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none")
        weight = torch.cat(weights).to(outputs) * (targets != -100)
        return (losses * weight).sum(), float(weight.sum())

    return replace(drawn, data=data, objective=replace(plain, total=total))


class Penalised:
    """A loss that reads a parameter behind the outputs' back."""

    def __init__(self) -> None:
        self.parameter: Tensor | None = None

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        assert self.parameter is not None
        return F.mse_loss(outputs, targets) + self.parameter.pow(4).sum()


@plant("a loss that reads parameters", r"parameters?", r"weights?", r"outputs")
def _reads(dice: Dice) -> Subject:
    loss = Penalised()
    drawn = subject(dice, of_batches(loss))
    last = [p for p in drawn.model.parameters() if p.requires_grad][-1]
    loss.parameter = last
    penalty = lambda model: [p for p in model.parameters() if p.requires_grad][-1].pow(4).sum()  # noqa: E731
    return replace(
        drawn, penalty=penalty, objective=replace(drawn.objective, total=mean(F.mse_loss))
    )


# -- derivatives that are not those of the function --------------------------------------------

DERIVATIVES = words(
    r"gradient", r"second derivative", r"differentiab", r"symmetric", r"central difference"
)


def misled(
    dice: Dice, pairs: dict[str, Pair], change: Callable[[Pair], Pair] = lambda p: p
) -> Subject:
    pair = change(dice.one_of(list(pairs.values())))
    stage = lambda width: Planted(pair.misleading, pair.plain)  # noqa: E731
    return subject(dice, by_name(dice), between=stage, fewest=4)


def casts(dice: Dice) -> list[Pair]:
    """Casts that a network of the chosen type can have."""
    alone = misleading.FLOAT32_ALONE if dice.dtype == torch.float32 else {}
    return [*misleading.CASTS.values(), *alone.values()]


def cast_after(dice: Dice, pairs: dict[str, Pair]) -> Subject:
    """What misleads, and a cast behind it."""
    cast = dice.one_of(casts(dice))

    def then(pair: Pair) -> Pair:
        return Pair(
            lambda x: cast.misleading(pair.misleading(x)), lambda x: cast.plain(pair.plain(x))
        )

    return replace(misled(dice, pairs, then), narrow=True)


@plant("a second derivative that is lost", *DERIVATIVES)
def _lost(dice: Dice) -> Subject:
    return misled(dice, misleading.WRONG_SECOND)


@plant("a second derivative that is lost on some rows", *DERIVATIVES)
def _lost_on_some(dice: Dice) -> Subject:
    return misled(dice, misleading.WRONG_SECOND, misleading.on_some_rows)


@plant("a second derivative that is lost in part", *DERIVATIVES)
def _lost_in_part(dice: Dice) -> Subject:
    return misled(dice, misleading.WRONG_SECOND, misleading.weakly)


@plant("a lost second derivative and a cast", *DERIVATIVES)
def _lost_and_cast(dice: Dice) -> Subject:
    return cast_after(dice, misleading.WRONG_SECOND)


@plant("a function without second derivative", *DERIVATIVES, r"not implemented")
def _without_second(dice: Dice) -> Subject:
    return misled(dice, misleading.WITHOUT_SECOND)


@plant("a custom function that is right")
def _right_function(dice: Dice) -> Subject:
    return misled(dice, {"square": Pair(misleading.Honest.apply, misleading.square)})


@plant("weight norm", *DERIVATIVES)
def _weight_norm(dice: Dice) -> Subject:
    def stage(width: int) -> nn.Module:
        layer = parametrizations.weight_norm(nn.Linear(width, width))
        return nn.Sequential(layer, blocks.activation(dice))

    return subject(dice, by_name(dice), between=stage)


@plant("a stopped gradient", *DERIVATIVES, r"detach")
def _stopped(dice: Dice) -> Subject:
    return misled(dice, misleading.STOPPED)


@plant("a stopped gradient on some rows", *DERIVATIVES, r"detach")
def _stopped_on_some(dice: Dice) -> Subject:
    return misled(dice, misleading.STOPPED, misleading.on_some_rows)


@plant("a stopped gradient and a cast", *DERIVATIVES, r"detach")
def _stopped_and_cast(dice: Dice) -> Subject:
    return cast_after(dice, misleading.STOPPED)


@plant("a gradient that a hook changes", *DERIVATIVES, r"hook")
def _hooked(dice: Dice) -> Subject:
    return misled(dice, misleading.HOOKED)


@plant("a gradient that a hook changes on some rows", *DERIVATIVES, r"hook")
def _hooked_on_some(dice: Dice) -> Subject:
    return misled(dice, misleading.HOOKED, misleading.on_some_rows)


@plant("a hook on a parameter", *DERIVATIVES, r"hook")
def _parameter_hook(dice: Dice) -> Subject:
    drawn = subject(dice, by_name(dice))
    chosen = dice.one_of([p for p in drawn.model.parameters() if p.requires_grad])
    factor = dice.one_of([0.0, 0.5, 2.0, -1.0])
    chosen.register_hook(lambda slope: factor * slope)
    return drawn


@plant("a hook that only looks")
def _looking(dice: Dice) -> Subject:
    drawn = subject(dice, by_name(dice))
    for module in drawn.model.modules():
        module.register_forward_hook(lambda module, given, made: None)
    for parameter in drawn.model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda slope: None)
    return drawn


# -- types -------------------------------------------------------------------------------------

TYPES = words(r"float32", r"float64", r"rounding", r"precision", r"check")


@plant("a cast", *TYPES)
def _cast(dice: Dice) -> Subject:
    pair = dice.one_of(casts(dice))
    return replace(misled(dice, {"chosen": pair}), narrow=True)


@plant("data of another type")
def _other_type(dice: Dice) -> Subject:
    drawn = subject(dice, by_name(dice), forms=("batches",))
    if dice.dtype == torch.float32:  # numbers that float32 has, in float64
        data = [tuple(t.double() if t.is_floating_point() else t for t in b) for b in drawn.data]
        return replace(drawn, data=data)
    narrow = tuple(
        tuple(t.float() if t.is_floating_point() else t for t in b) for b in drawn.batches
    )
    return replace(drawn, data=list(narrow), batches=narrow)


# -- parameters --------------------------------------------------------------------------------


@plant("a parameter without dimensions")
def _no_dimensions(dice: Dice) -> Subject:
    return subject(dice, by_name(dice), between=lambda width: blocks.Gain())


@plant("a parameter without entries", r"empty", r"no entries")
def _no_entries(dice: Dice) -> Subject:
    def stage(width: int) -> nn.Module:
        module = Call(lambda x: x)
        module.register_parameter("empty", nn.Parameter(torch.zeros(0, width)))
        return module

    return subject(dice, by_name(dice), between=stage)


@plant("a parameter that two layers share")
def _shared(dice: Dice) -> Subject:
    def stage(width: int) -> nn.Module:
        return blocks.Sharing(width, blocks.activation(dice))

    return subject(dice, by_name(dice), between=stage)


@plant("a layer under two names")
def _two_names(dice: Dice) -> Subject:
    def stage(width: int) -> nn.Module:
        layer = nn.Linear(width, width)
        return nn.Sequential(layer, blocks.activation(dice), layer)

    return subject(dice, by_name(dice), between=stage)


@plant("a layer that the loss does not reach", r"reach")
def _unreached(dice: Dice) -> Subject:
    def stage(width: int) -> nn.Module:
        return Call(lambda x, unused: x, nn.Linear(width, 2))

    return subject(dice, by_name(dice), between=stage)


@plant("a sparse embedding")
def _sparse(dice: Dice) -> Subject:
    drawn = subject(dice, objectives.language_model(dice))
    for module in drawn.model.modules():
        if isinstance(module, nn.Embedding):
            module.sparse = True
    return drawn


@plant("a lazy copy of a parameter")
def _view(dice: Dice) -> Subject:
    """A bank of weights of which each call takes a slice."""

    class Bank(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.bank = nn.Parameter(0.5 * torch.randn(2, width, width))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.bank[0]) @ self.bank[1].T

    return subject(dice, by_name(dice), between=Bank)


# -- what has no answer ------------------------------------------------------------------------

RANDOM = words(r"random", r"differ")
FINITE = words(r"not finite", r"\bNaN\b", r"infinit", r"not differentiable")


def varying(dice: Dice, stage: grammar.Stage) -> Subject:
    """A network whose loss is never the same: what comes behind must not hide that."""
    while True:
        drawn = subject(dice, of_rows(dice), between=stage, fewest=8)
        model = honest(drawn.model)
        with torch.no_grad():
            values = [float(objective(drawn, model)) for _ in range(2)]
        if abs(values[0] - values[1]) > 1e-3 * abs(values[0]):
            return drawn


@plant("a random operation", *RANDOM, must_refuse=True)
def _random(dice: Dice) -> Subject:
    noise = dice.one_of(
        [
            lambda h: h + 0.1 * torch.randn_like(h),
            lambda h: F.dropout(h, 0.3),
            lambda h: h * (1 + 0.1 * torch.rand(())),
        ]
    )
    return varying(dice, lambda width: Call(noise))


class Counter(nn.Module):
    """Another function each time that it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (1 + 0.1 * (7 * self.calls % 5))


@plant("a counter in the model", *RANDOM, r"state", must_refuse=True)
def _counter(dice: Dice) -> Subject:
    return varying(dice, lambda width: Counter())


class Norm(nn.Module):
    """The length of a linear map, which has no derivative where rows are zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x * (x[..., :1] > 0)).norm(dim=-1, keepdim=True)


@plant("a norm at zero", *FINITE, *DERIVATIVES)
def _norm(dice: Dice) -> Subject:
    return subject(dice, of_rows(dice), between=Norm)


@plant("a root at zero", *FINITE, *DERIVATIVES)
def _root(dice: Dice) -> Subject:
    return subject(dice, of_rows(dice), between=lambda width: Call(lambda h: h.relu().sqrt()))


# -- data --------------------------------------------------------------------------------------


@plant("a list of examples", r"list of", r"DataLoader", r"collat", r"single examples")
def _pairs(dice: Dice) -> Subject:
    return subject(dice, by_name(dice), forms=("pairs",))


@plant("a pair of tensors", r"pair of", r"two (tensors|arrays)", r"TensorDataset", r"\(X, y\)")
def _pair(dice: Dice) -> Subject:
    drawn = subject(dice, by_name(dice), forms=("whole",))
    x, y = drawn.batches[0]
    options = {k: v for k, v in drawn.options.items() if k != "batch_size"}
    return replace(drawn, data=(x, y), options=options)


@plant("a pair of arrays", r"pair of", r"two (tensors|arrays)", r"TensorDataset", r"\(X, y\)")
def _arrays(dice: Dice) -> Subject:
    drawn = subject(dice, by_name(dice), forms=("whole",))
    x, y = drawn.batches[0]
    options = {k: v for k, v in drawn.options.items() if k != "batch_size"}
    return replace(drawn, data=(x.numpy(), y.numpy()), options=options)
