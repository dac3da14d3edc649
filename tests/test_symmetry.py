"""Symmetries: which hold, which do not and why, against dense Hessians and plain derivatives."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from program import SPEC, SUNSPOTS, hesscli_warm, three_lines
from rich.console import Console
from safetensors.torch import save_file
from scipy.stats import t as student
from symmetric_networks import (
    GROUPS,
    HEADS,
    LENGTH,
    RANK,
    ROTARY,
    TOKENS,
    WIDTH,
    Decoder,
    Pictures,
    Squared,
    gpt_like,
    llama_like,
    problem_of,
    require_complete,
    spread,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import hesscli
from hesscli.diagnostics.charges import strays, way_to
from hesscli.diagnostics.symmetry_places import found_in
from hesscli.engines.symmetry.families import (
    Family,
    Mixing,
    Scaling,
    Told,
    Translation,
    tangents,
)
from hesscli.engines.symmetry.gauges import (
    Anchored,
    Conjugated,
    MeanFree,
    MeanFreeRows,
    Shear,
    Turning,
)
from hesscli.engines.symmetry.identities import Place, residuals_of
from hesscli.errors import ExitCode, InputError, UsageError
from hesscli.meter import Meter
from hesscli.operators import preflight
from hesscli.operators.head import check_head
from hesscli.operators.trials import MismatchError, Products
from hesscli.optim import AdaHessian, UpdateLog
from hesscli.problem import proof
from hesscli.problem.ends import read_end, steps_of
from hesscli.problem.losses import StepLoss
from hesscli.problem.objective import Sample
from hesscli.problem.problem import Problem
from hesscli.problem.work import PassWork
from hesscli.render.families import family_label
from hesscli.render.figures.symmetry import figures
from hesscli.render.tables.symmetry import symmetry_table
from hesscli.results import CheckpointReport, SymmetryFamily, SymmetryResult
from hesscli.vocabulary import TrainedWith

HOLDS = 1e-12
"""Residuals of what holds: a thousand units of rounding, or a few thousand."""


@functools.cache
def answered(make: Callable[[], nn.Module]) -> SymmetryResult:
    """The answer for a network of which several tests ask."""
    result: SymmetryResult = hesscli.symmetries(problem_of(spread(make())))
    return result


def table_of(result: SymmetryResult) -> str:
    """What a terminal of 120 columns shows."""
    console = Console(width=120, file=io.StringIO())
    console.print(symmetry_table(result))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def standing(result: SymmetryResult) -> dict[str, set[str]]:
    """How the families of each name stand."""
    found: dict[str, set[str]] = {}
    for family in result.families:
        found.setdefault(family.name, set()).add(family.status)
    return found


def require_exact(result: SymmetryResult) -> None:
    """What holds does so to rounding, and what is broken by much more."""
    for one in result.families:
        sizes = one.gradient_residual, one.hessian_residual or 0.0, one.finite_residual
        if one.status == "holds":
            assert max(sizes) < HOLDS, one
            assert one.null_directions == one.directions > 0
        else:
            assert max(sizes) > 1e-8, one
            assert (one.null_directions, one.charges) == (0, 0)


def normed() -> nn.Module:
    return llama_like(normed=True)


# -- The families of known architectures -----------------------------------------------------------


COMMON = {
    "softmax head": {"holds"},
    "norm gain": {"holds"},
    "value-output": {"holds"},
    "residual writers": {"asymptotic"},
    "single writer": {"broken"},
    "residual rotation": {"holds"},
    "bias through maps": {"holds"},
}
GPT = COMMON | {
    "query scale": {"broken"},
    "query-key": {"holds"},
    "key bias": {"holds"},
    "residual shift": {"holds"},
    "bias against bias": {"holds"},
    "rows without a mean": {"holds"},
}
LLAMA = COMMON | {
    "query scale": {"broken"},
    "gated unit": {"holds"},
    "query-key": {"broken"},
    "query-key plane": {"holds"},
    "query-key plane rotation": {"holds"},
    "key bias": {"broken"},
    "residual shift": {"broken"},
}
NORMED = COMMON | {
    "gated unit": {"holds"},
    "query-key": {"broken"},
    "query-key plane": {"holds", "broken"},  # of the norms' gains, and of the maps before them
    "query-key plane rotation": {"broken"},
    "key bias": {"broken"},
    "map before a norm": {"asymptotic"},
    "residual shift": {"broken"},
}


CAUSES = {
    "residual shift": "an RMS norm, which keeps the mean",
    "query scale": "the softmax, which sees the size of scores",
    "single writer": "what it is added to, which does not scale with it",
}


@pytest.mark.parametrize(
    ("make", "expected"),
    [(gpt_like, GPT), (llama_like, LLAMA), (normed, NORMED)],
    ids=["gpt", "llama", "query and key norms"],
)
def test_the_families_of_transformers(
    make: Callable[[], nn.Module], expected: dict[str, set[str]]
) -> None:
    result = answered(make)
    assert standing(result) == expected
    require_exact(result)
    otherwise = "a norm of queries and keys" if make is normed else "rotary positions"
    for one in result.families:
        if one.status == "broken":
            assert one.hessian_residual is not None
            assert one.hessian_residual > 0.1
            assert one.causes == (CAUSES.get(one.name, otherwise),)
        else:
            assert one.causes == ("eps",) * (one.status == "asymptotic")


def test_what_eps_breaks_holds_without_it() -> None:
    """With it a norm is of degree 0 up to O(eps): it is broken, by so little, and not held."""
    decoder = normed()
    for module in decoder.modules():
        if isinstance(module, nn.RMSNorm):
            module.eps = 0.0
    result = hesscli.symmetries(problem_of(spread(decoder)))
    scaled = {"residual writers": {"holds"}, "map before a norm": {"holds"}}
    assert standing(result) == NORMED | scaled
    require_exact(result)


def counts(result: SymmetryResult, name: str) -> set[tuple[int, int]]:
    return {(one.directions, one.charges) for one in result.families if one.name == name}


class Dispatched(nn.Module):
    """Experts that get the examples that are sent to them, which may be none."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(5, 3), nn.Linear(5, 3)
        self.experts = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        best, chosen = self.router(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = torch.where(chosen == number)[0]
            y = y.index_add(0, rows, expert(x[rows]) * best[rows][:, None])
        return self.head(x + y)


def test_experts_that_see_no_example_are_no_obstacle() -> None:
    torch.manual_seed(0)
    data = torch.randn(24, 5).double(), torch.arange(24) % 3
    result = hesscli.symmetries(hesscli.Problem(Dispatched().double(), "cross_entropy", data))
    assert "holds" in {one.status for one in result.families if one.name == "softmax head"}


@pytest.mark.parametrize("column", [0, 2])
def test_outcomes_that_the_loss_does_not_read(column: int) -> None:
    """A bias of the norm that the last map's may take back, were all of its entries read."""

    def read(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[:, column] - targets).square().mean()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    data = torch.randn(60, 4).double(), torch.randn(60).double()
    result = hesscli.symmetries(hesscli.Problem(model, read, data))
    require_exact(result)
    assert "norm gain" in standing(result)


def test_a_line_counts_directions_that_depend_on_others_once() -> None:
    """Two maps before a norm: some of the group that mixes them is what the norm takes out."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(2)), nn.LayerNorm(4), nn.Linear(4, 3))
    data = torch.randn(60, 4).double(), torch.arange(60) % 3
    result = hesscli.symmetries(hesscli.Problem(model.double(), "cross_entropy", data))
    assert result.flat.independent < result.flat.directions
    assert f"; {result.flat.independent} null directions" in str(result)


def test_directions_and_charges_are_counted_by_groups_of_heads() -> None:
    gpt = answered(gpt_like)
    square, triangle = RANK * RANK, RANK * (RANK + 1) // 2
    assert counts(gpt, "value-output") == {(HEADS * square, HEADS * triangle)}
    assert counts(gpt, "query-key") == {(HEADS * square, HEADS * triangle)}
    assert counts(gpt, "key bias") == {(HEADS * RANK, HEADS * RANK)}
    assert counts(gpt, "softmax head") == {(WIDTH, WIDTH)}
    # A column of each writer's weight and its bias; and one for each token and position.
    shifts = TOKENS + LENGTH + HEADS * RANK + 1 + 9 + 1
    assert counts(gpt, "residual shift") == {(shifts, shifts)}
    llama = answered(llama_like)
    planes = GROUPS * RANK // 2
    assert counts(llama, "value-output") == {(GROUPS * square, GROUPS * triangle)}
    assert counts(llama, "query-key plane") == {(planes, planes)}
    assert counts(llama, "query-key plane rotation") == {(planes, 0)}
    assert counts(llama, "gated unit") == {(9, 9)}
    assert counts(llama, "residual rotation") == {(WIDTH * (WIDTH - 1) // 2, 0)}
    assert counts(gpt, "residual rotation") == {((WIDTH - 1) * (WIDTH - 2) // 2, 0)}
    assert llama.flat.independent == llama.flat.directions


ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky": nn.LeakyReLU,
    "prelu": lambda: nn.PReLU(4),
    "squared": Squared,
    "dropout": lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.5)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_homogeneous_activations_between_maps(activation: Callable[[], nn.Module]) -> None:
    layers = nn.Linear(5, 4), activation(), nn.Linear(4, 4), activation(), nn.Linear(4, 3)
    result = hesscli.symmetries(problem_of(spread(nn.Sequential(*layers))))
    assert standing(result) == {"homogeneous activation": {"holds"}, "softmax head": {"holds"}}
    assert result.flat.directions == 4 + 4 + 5
    require_exact(result)


def test_the_charge_has_the_degree_of_the_activation() -> None:
    one, other = nn.Linear(5, 4), nn.Linear(4, 3)
    result = hesscli.symmetries(problem_of(spread(nn.Sequential(one, Squared(), other))))
    values = [charge.value for charge in result.charges if charge.layer == "0"]
    ahead = one.weight.square().sum(1) + one.bias.square()
    assert values == pytest.approx((ahead - 2 * other.weight.square().sum(0)).tolist())


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.PReLU(1)], ids=["relu", "prelu"])
def test_batch_norm_in_both_modes(activation: nn.Module) -> None:
    model = spread(Pictures(activation))
    fixed = hesscli.symmetries(problem_of(model))
    shared = {"norm gain": {"holds"}, "softmax head": {"holds"}}
    anchored = {"map before fixed statistics": {"holds"}, "bias through maps": {"holds"}}
    assert standing(fixed) == shared | anchored | {"map before batch norm": {"broken"}}
    require_exact(fixed)
    (cause,) = {cause for one in fixed.families for cause in one.causes}
    assert "statistics are fixed" in cause
    training = hesscli.symmetries(problem_of(model.train()))
    moving = {"map before batch norm": {"asymptotic"}, "bias before batch norm": {"holds"}}
    assert standing(training) == shared | moving
    require_exact(training)


@pytest.mark.parametrize("rotary", ROTARY[1:])
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
def test_rotary_positions_however_they_are_written(
    rotary: Callable[[Tensor], Tensor], normed: bool
) -> None:
    """The families of halves that are turned as one, each with what it acts on."""
    found = [
        [(family.told, len(family.entries)) for family in found_in(problem_of(spread(decoder)))]
        for decoder in (llama_like(normed=normed), llama_like(normed=normed, rotary=rotary))
    ]
    assert sorted(found[0], key=str) == sorted(found[1], key=str)


class Fused(nn.Module):
    """Queries, keys and values of one map, whose heads come first."""

    def __init__(self) -> None:
        super().__init__()
        self.whole, self.out = nn.Linear(WIDTH, 3 * HEADS * RANK), nn.Linear(HEADS * RANK, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.whole(x).unflatten(-1, (HEADS, 3, RANK)).transpose(1, 2).unbind(3)
        key, value = self.remembered(key), self.remembered(value)
        seen = (query @ key.mT / RANK**0.5).softmax(-1) @ value
        return self.out(seen.transpose(1, 2).flatten(-2))

    def remembered(self, tokens: Tensor) -> Tensor:
        return tokens


class Cached(Fused):
    """Joined to what a cache has of tokens before these, which is nothing."""

    def remembered(self, tokens: Tensor) -> Tensor:
        return torch.cat([tokens.new_empty(0), tokens], dim=-2)


class Heads(nn.Module):
    """Torch's own."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("make", [Fused, Cached, Heads], ids=["fused", "cached", "torch's"])
def test_attention_however_it_is_written(make: Callable[[], nn.Module]) -> None:
    model = Decoder(lambda: nn.LayerNorm(WIDTH), make(), nn.Linear(WIDTH, WIDTH))
    result = hesscli.symmetries(problem_of(spread(model)))
    require_exact(result)
    for name in ("value-output", "query-key", "key bias"):
        assert standing(result)[name] == {"holds"}
    rank = WIDTH // HEADS if make is Heads else RANK
    assert counts(result, "query-key") == {(HEADS * rank**2, HEADS * rank * (rank + 1) // 2)}


class Again(nn.Module):
    """One map twice on the way, as in a recurrent network."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.inner(F.relu(self.inner(F.relu(self.first(x)))))))


class Beside(nn.Module):
    """One branch twice, on two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.inner(x))) + self.head(F.relu(self.inner(-x)))


class Last(nn.Module):
    """The last state of a recurrent layer, whose gates have two biases each."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.LSTM(5, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(torch.stack([x, -x], 1))[0][:, -1])


class Patches(nn.Module):
    """A token for the class beside those of patches, all with their positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Linear(1, 4), nn.LayerNorm(4)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.positions = nn.Parameter(torch.randn(1, 6, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.token.expand(len(x), -1, -1), self.patches(x[..., None])], 1)
        return self.head(F.gelu(self.norm(tokens + self.positions)).mean(1))


class LayerScaled(nn.Module):
    """A branch whose channels are scaled before they are added."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(x + self.scale * self.inner(F.relu(x)))


def convolutions(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 5)), *layers, nn.Flatten(), nn.Linear(9, 3))


OTHERS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "used again": (Again, {"homogeneous activation": 4, "softmax head": 5}),
    "used beside": (Beside, {"homogeneous activation": 4, "softmax head": 5}),
    "two biases": (Last, {"bias against bias": 16, "softmax head": 5}),
    # Four of the class's token, and four of the bias of patches; the shift's are those of
    # patches (2), of the token and of six positions, and the last are the rows of the norm's gain.
    "patches": (Patches, {"bias against bias": 8, "residual shift": 9, "softmax head": 5}),
    "depthwise": (
        lambda: convolutions(nn.Conv1d(1, 3, 1), nn.Conv1d(3, 3, 3, groups=3)),
        {"linear maps": 6, "bias through maps": 6, "softmax head": 10},
    ),
    "instances": (
        lambda: convolutions(
            nn.Conv1d(1, 4, 3), nn.InstanceNorm1d(4, affine=True), nn.ReLU(), nn.Conv1d(4, 9, 3)
        ),
        {"norm gain": 4, "bias before batch norm": 4, "linear maps": 81, "softmax head": 10}
        | {"bias through maps": 9},
    ),
    "groups of channels": (
        lambda: convolutions(nn.Conv1d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv1d(4, 9, 3)),
        {"norm gain": 4, "bias before group norm": 2, "linear maps": 81, "softmax head": 10}
        | {"bias through maps": 9},
    ),
    "transposed": (
        lambda: convolutions(nn.Conv1d(1, 3, 3), nn.ReLU(), nn.ConvTranspose1d(3, 3, 1)),
        {"homogeneous activation": 3, "linear maps": 9, "softmax head": 10}
        | {"bias through maps": 3},
    ),
    "layer scale": (
        LayerScaled,
        {"gain": 4, "homogeneous activation": 4, "softmax head": 5},
    ),
}


@pytest.mark.parametrize(("make", "expected"), OTHERS.values(), ids=OTHERS.keys())
def test_other_networks_have_these_directions(
    make: Callable[[], nn.Module], expected: dict[str, int]
) -> None:
    """No more than once each, and what holds has no cause of being broken."""
    result = hesscli.symmetries(problem_of(spread(make())))
    require_exact(result)
    found: dict[str, int] = {}
    for one in result.families:
        if one.status == "holds":
            found[one.name] = found.get(one.name, 0) + one.directions
            assert not one.causes
    assert found == expected


# -- What breaks a family, planted -----------------------------------------------------------------


class Residual(nn.Module):
    """What is added comes from before the map, whose scale it does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + F.relu(self.inner(x)))


class Twice(nn.Module):
    """One map that is used before the activation and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.inner(F.relu(self.inner(x)))))


class Clamped(nn.Module):
    """Far from where it clips, on these data."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).clamp(max=100.0)


class Offset(nn.Module):
    """A small constant beside what scales."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) + self.eps


class Length(Offset):
    """Divides by a length that is kept from 0."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.norm(dim=-1, keepdim=True) + self.eps)


class Deviation(Offset):
    """A layer norm as it is often written, with its gain and bias."""

    def __init__(self, eps: float) -> None:
        super().__init__(eps)
        self.gain, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return self.gain * centred / (x.std(-1, keepdim=True) + self.eps) + self.bias


class Recurrent(nn.Module):
    """The last state of torch's own, whose code turns its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.RNN(5, 4, batch_first=True, nonlinearity="relu")
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x[:, None].expand(-1, 3, -1))[0][:, -1])


class TurnedInPlace(nn.Module):
    """Each of these returns the numbers that it was given, in the same order."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.clone().unsqueeze_(1).transpose_(1, 2).squeeze_(2)
        return F.relu(wide).clone().t_().clone().t_()


def perceptron(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), activation, nn.Linear(4, 3))


def tied() -> nn.Module:
    return gpt_like(tied=True)


BROKEN: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "relu6": (lambda: perceptron(nn.ReLU6()), "homogeneous activation", "clipped"),
    "clamp": (lambda: perceptron(Clamped()), "homogeneous activation", "clipped"),
    "hardtanh": (lambda: perceptron(nn.Hardtanh()), "homogeneous activation", "clipped"),
    "residual": (Residual, "homogeneous activation", ""),
    "shared": (Twice, "homogeneous activation", "inner.weight is used elsewhere"),
    "tied gain": (tied, "norm gain", "tokens.weight is used elsewhere"),
    "tied head": (tied, "softmax head", "tokens.weight is used elsewhere"),
    "tied shift": (tied, "residual shift", "tokens.weight is used"),
    "tied scale": (tied, "residual writers", "tokens.weight is used"),
    "padding": (lambda: llama_like(padding=3), "residual writers", "padding_idx"),
    "added keys": (
        lambda: Decoder(
            lambda: nn.LayerNorm(WIDTH), Heads(add_zero_attn=True), nn.Linear(WIDTH, WIDTH)
        ),
        "key bias",
        "",
    ),
}


@pytest.mark.parametrize(("make", "name", "cause"), BROKEN.values(), ids=BROKEN.keys())
def test_what_is_broken_is_refused(make: Callable[[], nn.Module], name: str, cause: str) -> None:
    result = answered(make)
    found = [one for one in result.families if one.name == name]
    acting = [one for one in found if one.status != "holds"] if cause else found
    assert all(one.status == "broken" for one in acting)
    if cause:
        assert any(cause in " ".join(one.causes) for one in acting)
    holding = {one.layers for one in result.families if one.status == "holds"}
    assert not holding & {one.layers for one in acting}
    require_sound(result)


class Padded(nn.Module):
    """Looks up tokens, of which one is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(7, 5, padding_idx=0), nn.Embedding(4, 5)
        self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        sums = self.tokens(tokens) + self.places(torch.arange(4))[None]
        return self.head(torch.tanh(self.inner(sums)).mean(1))


@pytest.mark.parametrize(
    ("batch", "dtype"),
    [(None, torch.float64), (0, torch.float32), (1, torch.float64), (8, torch.float32)],
    ids=["none", "first", "untested", "later"],
)
def test_padding_breaks_in_whatever_batch_it_is(batch: int | None, dtype: torch.dtype) -> None:
    """Autograd leaves its row without a gradient there, and the loss does depend on it."""
    model, draw = spread(Padded()).to(dtype), torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 7, (40, 4), generator=draw)
    labels = torch.randint(0, 3, (40,), generator=draw)
    if batch is not None:
        tokens[4 * batch + 3] = 0
    result = hesscli.symmetries(
        hesscli.Problem(model, "cross_entropy", (tokens, labels), batch_size=4)
    )
    acting = [one for one in result.families if "tokens" in one.layers]
    assert {one.status for one in acting} == {"holds" if batch is None else "broken"}
    assert all(("padding_idx" in " ".join(one.causes)) == (batch is not None) for one in acting)


def require_sound(result: SymmetryResult) -> None:
    """No residual of what holds is more than rounding."""
    for one in result.families:
        if one.status == "holds":
            assert one.gradient_residual < HOLDS
            assert one.finite_residual < HOLDS


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm], ids=["layer norm", "rms norm"])
@pytest.mark.parametrize("eps", [1e-2, 1e-5, pytest.param(1e-12, marks=pytest.mark.study)])
def test_eps_breaks_by_the_inverse_square_of_the_scale(
    norm: Callable[..., nn.Module], eps: float
) -> None:
    model = nn.Sequential(nn.Linear(5, 8), norm(8, eps=eps), nn.Linear(8, 3))
    result = hesscli.symmetries(problem_of(spread(model)))
    (scale,) = [one for one in result.families if one.name == "map before a norm"]
    assert (scale.status, scale.null_directions) == ("asymptotic", 0)
    assert scale.exponent == pytest.approx(2, abs=0.05)


def of_eps(*between: nn.Module) -> SymmetryFamily:
    """The family that an eps between two maps may break."""
    model = nn.Sequential(nn.Linear(5, 8), *between, nn.Linear(8, 3))
    families = hesscli.symmetries(problem_of(spread(model))).families
    before = [each for each in families if each.layers[0] == "0" and each.name in SCALED]
    return next((one for one in before if "eps" in one.causes), before[0])


SCALED = ("map before a norm", "gain", "homogeneous activation")


@pytest.mark.parametrize(
    ("written", "eps"), [(Length, 1e-3), (Length, 1e-12), (Deviation, 1e-9), (Offset, 1e-9)]
)
def test_eps_outside_a_root_breaks_by_the_inverse_of_the_scale(
    written: Callable[[float], nn.Module], eps: float
) -> None:
    one = of_eps(written(eps))
    assert (one.status, one.null_directions) == ("asymptotic", 0)
    assert one.exponent == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    "between",
    [
        (Length(1e-18),),
        (nn.RMSNorm(8, eps=1e-24),),
        (
            nn.LayerNorm(8, eps=1e-5, elementwise_affine=False),
            nn.RMSNorm(8, eps=0.0, elementwise_affine=False),
        ),
    ],
    ids=["below rounding", "inside a root", "cancelled"],
)
def test_an_eps_of_which_nothing_is_left_breaks_nothing(between: tuple[nn.Module, ...]) -> None:
    one = of_eps(*between)
    assert (one.status, one.causes, one.exponent) == ("holds", (), None)
    assert one.null_directions == 1
    assert max(one.gradient_residual, one.hessian_residual or 0.0, one.finite_residual) < HOLDS


# -- Against plain derivatives ---------------------------------------------------------------------


def plain(problem: Problem) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Weights, gradient and loss of the first batch, by nothing but torch."""
    model, (x, y) = problem.model, problem.data.batches[0]
    names, shapes = problem.parameters.names, [t.shape for t in problem.parameters.tensors]

    def loss(theta: Tensor) -> Tensor:
        pieces = theta.split([shape.numel() for shape in shapes])
        named = {n: p.view(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
        outputs = torch.func.functional_call(model, named, (x,))
        return F.cross_entropy(outputs.flatten(0, -2), y.flatten())

    theta = torch.cat([t.detach().flatten() for t in problem.parameters.tensors])
    return theta, torch.func.grad(loss)(theta), loss


MODELS = {
    "gpt": gpt_like,
    "llama": llama_like,
    "norms": normed,
    "pictures": Pictures,
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_charges_are_kept_by_gradient_flow(make: Callable[[], nn.Module]) -> None:
    """Their gradient is orthogonal to the loss's, and the transformed loss is the loss."""
    problem = problem_of(spread(make()))
    theta, slope, loss = plain(problem)
    generator = torch.Generator().manual_seed(0)
    result = answered(make)
    for family, report in zip(found_in(problem), result.families, strict=True):
        if report.status != "holds":
            continue
        moved = family.moved(family.draw(generator, 0.3), theta)
        assert loss(moved).item() == pytest.approx(loss(theta).item(), rel=HOLDS)
        if family.num_charges:
            flow = torch.func.jvp(family.charges, (theta,), (slope,))[1]
            assert flow.abs().max() <= HOLDS * max(theta.norm(), 1) * slope.norm()


def test_a_transformer_has_no_other_null_directions() -> None:
    """The null space of JᵀJ, the Hessian at weights that fit their data, is what is reported."""
    require_complete(gpt_like(), answered(gpt_like))


@pytest.mark.parametrize("widths", [(3, 4, 2), (3, 4, 3, 2)], ids=str)
def test_relu_networks_have_no_other_null_directions(widths: tuple[int, ...]) -> None:
    """One a hidden unit, which is all that there are (Marcotte, Gribonval, Peyré 2023)."""
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for one, other in pairwise(widths):
        layers += [nn.Linear(one, other), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).double()
    x = 3 * torch.randn(400, widths[0], dtype=torch.float64)  # all units are on here and off there
    problem = hesscli.Problem(model, "mse", [(x, model(x).detach())])
    result = hesscli.symmetries(problem)
    assert standing(result) == {"homogeneous activation": {"holds"}}
    assert result.problem.gradient_norm == 0
    sizes = torch.linalg.eigvalsh(hesscli.Hessian(problem).to_dense())
    nullity = int((sizes.abs() < 1e-12 * sizes[-1]).sum())
    assert nullity == result.flat.directions == result.flat.independent == sum(widths[1:-1])


def test_products_that_are_not_of_the_loss_are_told() -> None:
    """On directions that no reference is needed for."""
    problem = problem_of(spread(perceptron(nn.ReLU())))
    theta, slope, loss = plain(problem)
    dense = torch.func.hessian(loss)(theta)
    usual = float((dense @ torch.ones_like(theta)).norm() / len(theta) ** 0.5)
    for wrong, low, high in ((0.0, 0.0, HOLDS), (1e-3, 1e-5, 1.0)):

        def product(vector: Tensor, wrong: float = wrong) -> Tensor:
            return dense @ vector + wrong * vector

        place = Place(
            theta, lambda there: float(loss(there)), float(loss(theta)), slope, product, usual
        )
        for family in found_in(problem):
            found = residuals_of(family, place, torch.Generator().manual_seed(0))
            assert max(found.gradient, found.finite) < HOLDS
            assert found.hessian is not None
            assert low <= found.hessian <= high


def test_the_check_of_products_on_null_directions(sunspots: Problem) -> None:
    *_, last = hesscli.check(problem_of(spread(gpt_like())), symmetry=True).preflight.checks
    assert (last.name, last.state) == ("null directions of symmetry", "passed")
    assert last.value is not None
    assert last.value < HOLDS
    *_, last = hesscli.check(sunspots, symmetry=True).preflight.checks
    assert last.state == "not applicable"


def linear(last: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), last)


HEADS_OF: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "with bias": (lambda: linear(nn.Linear(4, 3)), ("2.weight", "2.bias")),
    "without": (lambda: linear(nn.Linear(4, 3, bias=False)), ("2.weight",)),
    "of tokens": (gpt_like, ("head.weight",)),
    "tied": (tied, ()),
    "twice": (lambda: Twice(), ("head.weight", "head.bias")),
    "not linear": (lambda: linear(nn.Sequential(nn.Linear(4, 3), nn.Tanh())), ()),
    "turned": (lambda: linear(nn.Sequential(nn.Linear(4, 6), Grouped())), ()),
    "of a norm": (lambda: linear(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))), ()),
}


class Grouped(nn.Module):
    """Two numbers a class, one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), 3, 2).sum(-1)


@pytest.mark.parametrize(("make", "names"), HEADS_OF.values(), ids=HEADS_OF.keys())
def test_products_on_the_null_directions_of_a_softmax_head(
    make: Callable[[], nn.Module], names: tuple[str, ...]
) -> None:
    """They are tried where the graph shows such a head; the truth is a dense Hessian's."""
    problem = problem_of(spread(make()))
    theta, _, loss = plain(problem)
    generator = torch.Generator().manual_seed(0)
    vectors = 2.0 * torch.randint(0, 2, (2, len(theta)), generator=generator).double() - 1
    slope = torch.func.grad(loss)
    with sdpa_kernel(SDPBackend.MATH):
        rows = [torch.func.grad(lambda t, v=v: slope(t) @ v)(theta) for v in vectors]
    values = torch.stack(rows)
    operator, sample = hesscli.Hessian(problem), Sample.of(problem, 16)
    found = check_head(operator, sample, Products(vectors, values))
    assert (found is not None) == bool(names)
    noise = 1e-6 * values.norm() * torch.randn(values.shape, generator=generator).double()
    if found is not None:
        assert found.value is not None
        assert found.value < HOLDS
        with pytest.raises(MismatchError, match=", ".join(names)):
            check_head(operator, sample, Products(vectors, values + noise))


def test_heads_of_which_only_a_part_is_looked_at() -> None:
    """Others are constants; and squared errors have no null directions there."""
    model = spread(linear(nn.Linear(4, 3)))
    batches = list(problem_of(model).data.batches)
    for params, shown in (("2.bias", True), ("2.weight", True), ("0", False)):
        few = hesscli.Problem(model, "cross_entropy", batches, params=[params])
        names = [check.name for check in hesscli.Hessian(few).check().checks]
        assert ("softmax head" in names) == shown
    squared = hesscli.Problem(
        model, "mse", [(x, torch.randn(len(x), 3).double()) for x, _ in batches]
    )
    assert "softmax head" not in [c.name for c in hesscli.Hessian(squared).check().checks]


# -- Groups by themselves --------------------------------------------------------------------------


TOLD = Told(name="own", layers=("all",))
GAIN = torch.arange(20, 23)
FAMILIES: dict[str, Family] = {
    "scaling": Scaling(
        TOLD,
        torch.tensor([0, 1, 2, 5, 7]),
        torch.tensor([0, 0, 1, 1, 0]),
        torch.tensor([1.0, -2.0, 1.0, -1.0, 0.5], dtype=torch.float64),
        2,
    ),
    "general": Mixing(
        TOLD, (torch.arange(12).view(2, 3, 2),), (torch.arange(12, 24).view(2, 3, 2),)
    ),
    "rotation": Mixing(
        TOLD, (torch.arange(8).view(2, 2, 2),), (torch.arange(8, 16).view(2, 2, 2),), "rotation"
    ),
    "translation": Translation(TOLD, (torch.tensor([[0, 2], [1, 3]]), torch.tensor([[5, 6, 7]]))),
    "signed": Translation(
        TOLD, (torch.tensor([[0, 2], [1, 3]]),), (torch.tensor([1.0, -1.0], dtype=torch.float64),)
    ),
    "shear": Shear(
        TOLD,
        index=torch.tensor([0, 1, 2]),
        channel=torch.tensor([0, 0, 1]),
        target=torch.tensor([3, 4, 3, 4, 4]),
        weight=torch.tensor([10, 11, 12, 13, 14]),
        by=torch.tensor([0, 0, 1, 1, 1]),
        factor=torch.tensor([1.0, 1.0, 2.0, 2.0, -0.5], dtype=torch.float64),
        size=2,
    ),
    "turning": Turning(
        TOLD,
        torch.eye(3, dtype=torch.float64),
        (
            Conjugated(torch.arange(6).view(3, 2)),
            Conjugated(torch.arange(6, 12).view(3, 2), GAIN),
            Conjugated(torch.arange(12, 15).view(3, 1), GAIN, inverse=True),
        ),
        3,
    ),
    "mean": MeanFree(
        TOLD,
        GAIN,
        torch.arange(12, 15),
        (torch.arange(6).view(3, 2), torch.arange(6, 9).view(3, 1)),
    ),
    "mean by rows": MeanFreeRows(
        TOLD, GAIN, torch.arange(12, 15), torch.arange(6).view(3, 2), torch.arange(15, 17)
    ),
    "mean without biases": MeanFreeRows(TOLD, GAIN, None, torch.arange(6).view(3, 2), None),
    "anchored": Anchored(
        Scaling(
            TOLD,
            torch.tensor([0, 1, 2, 3, 4, 5]),
            torch.tensor([0, 0, 1, 1, 0, 1]),
            torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0], dtype=torch.float64),
            2,
        ),
        bias=torch.tensor([6, 7]),
        gain=torch.tensor([4, 5]),
        shift=torch.tensor([0.3, -0.7], dtype=torch.float64),
    ),
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_tangents_are_derivatives_and_moments_their_products(family: Family) -> None:
    generator = torch.Generator().manual_seed(0)
    theta, vector = torch.randn(2, 24, generator=generator, dtype=torch.float64)
    drawn = family.draw(generator, 1.0)
    tangent = family.tangent(drawn, theta)

    def path(t: Tensor) -> Tensor:
        return family.moved(t * drawn, theta)

    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    assert torch.allclose(torch.func.jvp(path, (zero,), (one,))[1], tangent)
    transposed = torch.func.vjp(lambda there: family.tangent(drawn, there), theta)[1](vector)[0]
    assert torch.allclose(family.transposed(drawn, theta, vector), transposed)
    rows = torch.stack(tangents(family, theta))
    assert len(rows) == family.num_directions
    still = torch.ones(24, dtype=torch.bool)
    still[family.entries] = False
    assert not rows[:, still].any()
    assert torch.allclose(family.moments(theta, vector), rows @ vector)
    assert torch.allclose(family.lengths(theta), rows.norm(dim=1))
    assert family.charges(theta).shape == (family.num_charges,)


# -- The answer ------------------------------------------------------------------------------------


def test_the_gauss_newton_matrix_has_them_everywhere() -> None:
    result = hesscli.symmetries(problem_of(spread(llama_like())), matrix="ggn")
    for one in result.families:
        assert one.hessian_residual is not None
        if one.status == "holds":
            assert one.hessian_residual < HOLDS


def cosine(outputs: Tensor, labels: Tensor) -> Tensor:
    wanted = F.one_hot(labels, 3).to(outputs.dtype)
    return (1 - F.cosine_similarity(outputs, wanted, dim=-1)).mean()


def of_unit_length(outputs: Tensor, labels: Tensor) -> Tensor:
    wanted = F.one_hot(labels, 3).to(outputs.dtype)
    return (outputs / outputs.norm(dim=-1, keepdim=True) - wanted).square().sum(-1).mean()


@pytest.mark.parametrize(
    ("activation", "loss", "alone"),
    [
        (nn.ReLU(), cosine, {"map before a norm": 1}),
        (nn.Tanh(), of_unit_length, {"map before a norm": 1}),
        (nn.ReLU(), "cross_entropy", {}),
        (nn.ReLU(), "mse", {}),
    ],
    ids=["cosine", "unit length", "cross-entropy", "squares"],
)
def test_null_directions_of_gauss_newton_are_counted_by_themselves(
    activation: nn.Module, loss: str | Callable[..., Tensor], alone: dict[str, int]
) -> None:
    """What the loss alone undoes changes the outputs, by Jξ, and JᵀAJξ is not 0; the truth is the
    null space of a dense JᵀAJ, whose other singular values are above 1e-6 of the largest."""
    draw = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(120, 5, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, 3, (120,), generator=draw)
    targets = F.one_hot(labels, 3).double() if loss == "mse" else labels
    problem = hesscli.Problem(spread(perceptron(activation)), loss, (x, targets), batch_size=40)
    sizes = torch.linalg.svdvals(hesscli.GaussNewton(problem).to_dense())
    nullity = int((sizes < 1e-10 * sizes[0]).sum())
    result = hesscli.symmetries(problem)
    assert result.flat.independent == result.flat.directions
    assert result.flat.gauss_newton == nullity == result.flat.directions - sum(alone.values())
    for one in result.families:
        wanted = one.null_directions - alone.get(one.name, 0)
        assert one.gauss_newton_directions == wanted
        assert one.gauss_newton_residual is not None
        assert (one.gauss_newton_residual < HOLDS) == (wanted == one.null_directions)
    for mode in ("auto", "finite-difference"):
        flat = hesscli.symmetries(problem, matrix="ggn", mode=mode).flat
        assert flat.directions == flat.gauss_newton == nullity
    shown = table_of(result)
    undone = f"of the Gauss-Newton matrix {nullity} everywhere: the loss alone undoes the others"
    assert (undone if alone else "of the Gauss-Newton matrix everywhere") in shown
    assert ("map before a norm of 2: the loss alone undoes it" in shown) == bool(alone)


class Scores(nn.Module):
    """Queries and keys of one number a token: scaling them is scaling the map before, too."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(1, 2, bias=False), nn.Linear(1, 2, bias=False)
        self.o = nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x[:, :, None]
        scores = self.q(tokens) @ self.k(tokens).transpose(1, 2)
        result: Tensor = self.o(scores.softmax(-1) @ tokens).mean(1)
        return result


@pytest.mark.parametrize("loss", [cosine, "cross_entropy"])
def test_no_more_directions_are_counted_than_are_independent(
    loss: str | Callable[..., Tensor],
) -> None:
    """Of the Gauss-Newton matrix either, by the null space of the dense one."""
    torch.manual_seed(5)
    data = torch.randn(40, 4).double(), torch.randint(0, 3, (40,))
    problem = hesscli.Problem(Scores().double(), loss, data)
    sizes = torch.linalg.svdvals(hesscli.GaussNewton(problem).to_dense())
    flat = hesscli.symmetries(problem).flat
    assert flat.independent is not None
    assert flat.independent < flat.directions
    assert flat.gauss_newton == int((sizes < 1e-10 * sizes[0]).sum())


@pytest.mark.parametrize("scale", [1.0, 13.0, 20.0])
def test_a_softmax_that_is_sure_of_every_example_keeps_its_symmetry(scale: float) -> None:
    """A probability less 1 is 1e-7 or 1e-11 then, and is rounded as 1 is."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=draw, dtype=torch.float64)
    weight = torch.randn(3, 4, generator=draw, dtype=torch.float64)
    first, second = (x @ weight.T).topk(2, dim=1).values.T
    x = x[first - second > 1]
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        model.weight.copy_(scale * weight)
        model.bias.zero_()
    problem = hesscli.Problem(model, "cross_entropy", (x, (x @ weight.T).argmax(1)))
    (head,) = hesscli.symmetries(problem).families
    assert (head.name, head.status) == ("softmax head", "holds")
    *_, tried = hesscli.check(problem, symmetry=True).preflight.checks
    assert (tried.name, tried.state) == ("null directions of symmetry", "passed")


def test_a_loss_that_hides_its_outputs_has_no_gauss_newton_matrix() -> None:
    given = problem_of(spread(perceptron(nn.ReLU())))
    step = StepLoss(lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), "step")
    problem = hesscli.Problem(given.model, step, list(given.data.batches))
    result = hesscli.symmetries(problem)
    assert result.flat.directions > 0
    assert result.flat.gauss_newton is None
    assert {one.gauss_newton_directions for one in result.families} == {None}
    assert "Gauss-Newton" not in table_of(result)


def test_what_the_loss_alone_undoes_is_no_symmetry_of_gauss_newton() -> None:
    """Its outputs grow with the scale of the last map: Jξ is not 0, and JᵀAJξ is not."""
    given = problem_of(spread(perceptron(nn.ReLU())))
    problem = hesscli.Problem(given.model, cosine, list(given.data.batches))
    result = hesscli.symmetries(problem, matrix="ggn")
    (one,) = [each for each in result.families if each.status != "holds"]
    assert one.causes == ("outputs that it changes: the loss has it, and this matrix has not",)
    assert standing(result)["homogeneous activation"] == {"holds"}
    *_, last = hesscli.check(problem, matrix="ggn", symmetry=True).preflight.checks
    assert last.state == "passed"


def test_weight_decay_is_left_out_and_said() -> None:
    problem = problem_of(spread(perceptron(nn.ReLU())))
    decayed = hesscli.Problem(
        problem.model, "cross_entropy", list(problem.data.batches), weight_decay=0.1
    )
    result = hesscli.symmetries(decayed)
    assert standing(result) == standing(hesscli.symmetries(problem))
    assert any("weight decay" in told for told in result.warnings)


def test_a_model_that_is_sure_of_its_examples_is_no_broken_one() -> None:
    """Its gradient is the rounding of much larger numbers, which says nothing."""
    model = spread(perceptron(nn.ReLU()))
    x = problem_of(model).data.batches[0][0]
    with torch.no_grad():
        model[-1].weight *= 1e3  # type: ignore[operator, index]
    sure = hesscli.Problem(model, "cross_entropy", [(x, model(x).argmax(1))])
    assert standing(hesscli.symmetries(sure))["homogeneous activation"] == {"holds"}


def test_some_parameters_alone_have_what_needs_no_others() -> None:
    problem = problem_of(spread(nn.Sequential(*perceptron(nn.ReLU()), nn.ReLU(), nn.Linear(3, 3))))
    few = hesscli.Problem(
        problem.model, "cross_entropy", list(problem.data.batches), params=["0", "2"]
    )
    result = hesscli.symmetries(few)
    assert {one.layers for one in result.families} == {("0", "2")}
    assert standing(result) == {"homogeneous activation": {"holds"}}


def test_layers_that_are_shown_have_their_families() -> None:
    result = answered(gpt_like)
    few = result.only({"attention.key"})
    shared = {"residual rotation", "bias through maps", "rows without a mean"}
    assert {one.name for one in few.families} == {"norm gain", "query-key", "key bias"} | shared
    assert {layer.name for layer in few.layers} == {"attention.key"}
    assert sum(layer.null_directions for layer in result.layers) == result.flat.directions
    assert dataclasses.replace(few, families=result.families).flat == result.flat


@pytest.mark.parametrize("make", [Recurrent, lambda: perceptron(TurnedInPlace())])
def test_views_in_place_keep_what_scales(make: Callable[[], nn.Module]) -> None:
    result = answered(make)
    (one,) = [each for each in result.families if each.name == "homogeneous activation"]
    assert (one.status, one.directions) == ("holds", 4)


def test_a_norm_of_two_channels_leaves_no_rotation() -> None:
    """Of what has no mean there is one direction, and nothing to turn it into."""
    model = nn.Sequential(nn.Linear(5, 2), nn.LayerNorm(2), nn.Linear(2, 3))
    families = hesscli.symmetries(problem_of(spread(model))).families
    assert families
    assert all(one.directions > 0 for one in families)


@pytest.mark.parametrize("is_large", [True, False])
def test_work_is_little(is_large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most twelve gradients, and two products a family, and the plan says so.

    Of a network that is large, that is: in one as small as this each pass calls its operations.
    """
    if is_large:
        monkeypatch.setattr(PassWork, "nanoseconds", lambda _, count, __: 1e9 * count)
    problem = problem_of(spread(gpt_like()), batches=8)
    checked = hesscli.check(problem)
    result = hesscli.symmetries(problem)
    (planned,) = [one for one in checked.plan.commands if one.command == "symmetry"]
    assert result.cost.products == pytest.approx(planned.products)
    exponent = 0.015  # of an eps, which no plan foresees
    assert result.cost.gradients == pytest.approx(planned.gradients, rel=exponent)
    assert result.cost.products <= 2 * len(result.families)
    told = re.search(r"(\d+) families: (\S+) products and (\S+) gradients besides", planned.note)
    assert told is not None
    assert int(told[1]) == len(result.families)
    assert float(told[2]) <= 2 * int(told[1])
    if is_large:
        preflight.checked(problem, hesscli.Hessian, meter=(checks := Meter()))
        besides = result.cost.gradients - checks.gradients - 2 * result.cost.products
        assert besides <= 12
        assert float(told[3]) <= 12


def test_a_gradient_that_was_too_large_to_be_kept_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is made once more, and once only, however often families are reported."""
    costs = list[float]()
    for kept in (1 << 28, 0):
        monkeypatch.setattr(proof, "_KEPT", kept)
        costs.append(hesscli.symmetries(problem_of(spread(gpt_like()))).cost.gradients)
    problem = problem_of(spread(gpt_like()))
    once = problem.gradient_cost * problem.joint_share
    assert costs[1] - costs[0] == pytest.approx(once)


def test_the_trace_is_a_matter_of_scale_and_its_companion_is_not() -> None:
    """The first of them against a dense Hessian."""
    problem = problem_of(spread(perceptron(nn.ReLU())), batches=1)
    result = hesscli.symmetries(problem)
    assert result.orbit is not None
    first, *others = result.orbit.points
    for point in others:
        assert point.loss == pytest.approx(first.loss, rel=HOLDS)
        assert point.companion == pytest.approx(first.companion, rel=1e-10)
        assert point.largest_companion == pytest.approx(first.largest_companion, rel=1e-8)
    for name in ("trace", "largest"):
        sizes = [abs(getattr(point, name)) for point in result.orbit.points]
        assert max(sizes) > 1.5 * min(sizes)
    theta, _, loss = plain(problem)
    dense = torch.func.hessian(loss)(theta)
    signs = torch.Generator().manual_seed(0)
    draws = 2.0 * torch.randint(0, 2, (result.orbit.probes, len(theta)), generator=signs) - 1
    by_hand = [z @ dense @ z for z in draws.double()]
    assert first.trace == pytest.approx(float(torch.stack(by_hand).mean()))
    by_t = float(student.ppf(0.975, len(by_hand) - 1)) / math.sqrt(len(by_hand))
    assert first.trace_error == pytest.approx(by_t * float(torch.stack(by_hand).std()))
    scaled = [(z * theta) @ dense @ (z * theta) for z in draws.double()]
    assert first.companion == pytest.approx(float(torch.stack(scaled).mean()))
    for matrix, value, error in (
        (dense, first.largest, first.largest_error),
        (theta[:, None] * dense * theta, first.largest_companion, first.largest_companion_error),
    ):
        eigenvalues = torch.linalg.eigvalsh(matrix)
        assert (eigenvalues - value).abs().min() <= error < 0.2 * value
        assert value <= eigenvalues[-1] * (1 + HOLDS)


# -- Two ends of a run -----------------------------------------------------------------------------


RATE, STEPS = 0.05, 20


def trained(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[tuple[Tensor, Tensor]],
    steps: int = STEPS,
) -> dict[str, Tensor]:
    """Train, and log what each step adds to each parameter."""
    updates: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for step in range(steps):
        x, y = batches[step % len(batches)]
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
        optimizer.step()
        for name, parameter in model.named_parameters():
            updates[name].append(parameter.detach() - before[name])
    return {name: torch.stack(each) for name, each in updates.items()}


def require_predicted(result: SymmetryResult, decay: float) -> None:
    """Every charge is, to rounding; and those that are linear stay unless they decay."""
    assert len(result.drifts) == sum(one.charges > 0 for one in result.families)
    for drift in result.drifts:
        (change,) = drift.changes
        assert drift.error is not None
        assert drift.rounding is not None
        assert drift.error <= drift.rounding
        if drift.name in LINEAR and not decay:
            assert change < 1e-12 * STEPS * max(drift.size, 1)
        else:
            assert change > 1e-6
            assert drift.error < 1e-7
    assert all(one.later is not None and one.predicted is not None for one in result.charges)


LINEAR = ("softmax head", "key bias", "residual shift", "bias against bias")
SETTINGS: dict[str, dict[str, float]] = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "both": {"momentum": 0.9, "weight_decay": 0.1},
    "dampening": {"momentum": 0.8, "weight_decay": 0.1, "dampening": 0.3},
    "nesterov": {"momentum": 0.8, "weight_decay": 0.1, "nesterov": True},
}


TRAINED: list[Callable[[], nn.Module]] = [
    lambda: perceptron(nn.ReLU()),
    llama_like,
    lambda: perceptron(Squared()),
    gpt_like,
    lambda: perceptron(nn.LeakyReLU()),
    lambda: perceptron(nn.PReLU()),
]


@pytest.mark.parametrize("number", range(len(SETTINGS)), ids=list(SETTINGS))
def test_what_sgd_does_to_charges_is_predicted(number: int, tmp_path: Path) -> None:
    """By a log of a loop of one's own, and settings that were typed."""
    make, settings = TRAINED[number], list(SETTINGS.values())[number]
    model = spread(make())
    problem = problem_of(spread(make()))
    sgd = torch.optim.SGD(model.parameters(), RATE, **settings)  # type: ignore[arg-type]
    save_file(trained(model, sgd, problem.data.batches), tmp_path / "log.safetensors")
    torch.save(model.state_dict(), tmp_path / "late.pt")
    typed = ",".join(f"{name}={value}" for name, value in settings.items())
    typed = f"lr={RATE},updates={tmp_path / 'log.safetensors'},{typed}".removesuffix(",")
    way = TrainedWith.parse(typed.replace("weight_decay", "wd"))
    result = hesscli.symmetries(problem, later=[tmp_path / "late.pt"], trained_with=way)
    require_predicted(result, settings.get("weight_decay", 0.0))


@pytest.mark.parametrize("nesterov", [False, True], ids=["plain", "nesterov"])
def test_log_and_checkpoints_say_how_it_was_trained(nesterov: bool, tmp_path: Path) -> None:
    """From the middle of a run, whose steps have a velocity already, with a rate that falls."""
    net = perceptron(nn.ReLU())
    problem = problem_of(spread(net))
    sgd = torch.optim.SGD(net.parameters(), RATE, momentum=0.9, weight_decay=0.1, nesterov=nesterov)
    schedule = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.95)

    def saved(name: str) -> Path:
        whole = {"model": net.state_dict(), "optimizer": sgd.state_dict()}
        torch.save(whole, tmp_path / name)
        return tmp_path / name

    def further(steps: int) -> None:
        for step in range(steps):
            trained(net, sgd, problem.data.batches[step % 3 :], steps=1)
            schedule.step()

    further(7)
    early = hesscli.Problem(
        net,
        "cross_entropy",
        list(problem.data.batches),
        checkpoint=CheckpointReport(path=str(saved("early.pt")), sha256=""),
    )
    log = str(tmp_path / "log.safetensors")
    twin = copy.deepcopy(net)
    with UpdateLog(net, sgd, log) as updates:
        further(20)
    assert len(updates) == 20
    net_later, way = saved("late.pt"), TrainedWith(updates=log)
    net.load_state_dict(twin.state_dict())
    result = hesscli.symmetries(early, later=[net_later], trained_with=way)
    require_predicted(result, 0.1)


def test_a_log_that_does_not_lead_from_end_to_end_is_told(tmp_path: Path) -> None:
    """In float32, where a log of own steps and its ends are rounded; and its distance by hand."""
    net = perceptron(nn.ReLU()).float()
    early, batches = copy.deepcopy(net), problem_of(spread(perceptron(nn.ReLU()))).data.batches
    single = [(x.float(), y) for x, y in batches]
    log = trained(net, torch.optim.SGD(net.parameters(), RATE), single)
    moved = torch.cat([each.double().sum(0).flatten() for each in log.values()])
    last = torch.cat([each[-1].double().flatten() for each in log.values()])
    half = {name: each[:-1].clone() for name, each in log.items()}
    another = {name: 1.01 * each for name, each in log.items()}
    torch.save(net.state_dict(), tmp_path / "late.pt")
    torch.save(early.state_dict(), tmp_path / "early.pt")
    for model, end, kept, gap in (
        (early, "late", log, None),
        (net, "early", log, 2 * moved.norm()),
        (early, "late", half, last.norm()),
        (early, "late", another, 0.01 * moved.norm()),
    ):
        save_file(kept, tmp_path / "log.safetensors")
        problem = hesscli.Problem(copy.deepcopy(model), "cross_entropy", single)
        way = TrainedWith(lr=RATE, updates=str(tmp_path / "log.safetensors"))
        ends = [read_end(problem, tmp_path / f"{end}.pt")]
        found = list(strays(problem, ends, way_to(problem, ends, way)))
        assert bool(found) == (gap is not None)
        if gap is not None:
            assert f"lead from the first weights to {end}.pt" in found[0]
            size = float(re.findall(r"end (\S+) beside", found[0])[0])
            assert size == pytest.approx(float(gap), rel=0.06)  # of two digits


@pytest.mark.parametrize("rate", [RATE, 1e-5], ids=["steps", "steps within rounding"])
def test_what_rounding_does_to_charges_is_said(rate: float, tmp_path: Path) -> None:
    """In float32; and what is off by decay that was not said is off by more than that."""
    net = perceptron(nn.ReLU()).float()
    early, batches = copy.deepcopy(net), problem_of(spread(perceptron(nn.ReLU()))).data.batches
    single = [(x.float(), y) for x, y in batches]
    sgd = torch.optim.SGD(net.parameters(), rate, weight_decay=1.0)
    save_file(trained(net, sgd, single), tmp_path / "log.safetensors")
    torch.save(net.state_dict(), tmp_path / "late.pt")
    for decay, is_rounding in ((1.0, True), (0.0, False)):
        problem = hesscli.Problem(copy.deepcopy(early), "cross_entropy", single)
        way = TrainedWith(lr=rate, wd=decay, updates=str(tmp_path / "log.safetensors"))
        result = hesscli.symmetries(problem, later=[tmp_path / "late.pt"], trained_with=way)
        for drift in result.drifts:
            assert drift.error is not None
            assert drift.rounding is not None
            assert (drift.error <= drift.rounding) == is_rounding
    console = Console(width=120, file=io.StringIO())
    console.print(symmetry_table(result))
    assert re.search(r"\de-\d+ ± \de-\d+|1e\+00 ± ", console.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize("layers", [["a.0.b.long", "a.0.b.longer"], ["a.b", "c", "d.e"], ["a.b.c"]])
def test_labels_of_families_are_cut_between_modules(layers: list[str]) -> None:
    """Until there is no room for the kind itself."""
    whole = f"value-output: {', '.join(layers)}"
    names = {part for layer in layers for part in layer.split(".")} | {"", "layer", "layers"}
    for width in range(len(whole) + 9, 11, -1):
        label = family_label("value-output", layers, width)
        assert len(label) <= width
        assert label.startswith("value-output")
        words = re.split(r"[.,… ()]+", label.removeprefix("value-output").removeprefix(":"))
        assert {word for word in words if not word.isdigit()} <= names
    assert family_label("value-output", layers[:2], 80) == f"value-output: {', '.join(layers[:2])}"


@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_families_in_a_table_are_cut_between_words(width: int) -> None:
    """Each has its kind whole, on several lines where there is no room, and rows differ."""
    result = answered(Pictures)
    console = Console(width=width, file=io.StringIO())
    console.print(symmetry_table(result))
    shown = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, shown)) <= width
    rows = shown[shown.index(next(line for line in shown if line.startswith("──"))) + 1 :]
    labels, label = list[str](), ""
    for row in rows:
        name, *numbers = re.split(r"\s{2,}", row.strip())
        label = f"{label} {name}".strip()
        if numbers:
            labels.append(label)
            label = ""
        if len(labels) == len(result.families):
            break
    assert labels == [f"{one.name}: {', '.join(one.layers)}" for one in result.families]
    assert "…" not in "".join(shown)


def test_an_optimizer_of_the_file_that_keeps_no_charges_is_named(tmp_path: Path) -> None:
    """AdamW's state, an unknown one's, and groups that are unlike; none predicts anything."""
    model = spread(perceptron(nn.ReLU()))
    problem, weights = problem_of(model), list(model.parameters())
    groups = [{"params": weights[:2], "weight_decay": 0.1}, {"params": weights[2:]}]
    for optimizer, said in (
        (torch.optim.AdamW(weights), "adamw keeps no charges"),
        (AdaHessian(weights), "the optimizer keeps no charges"),
        (torch.optim.SGD(groups, RATE), "unlike settings"),
    ):
        log = tmp_path / f"{type(optimizer).__name__}.safetensors"
        with UpdateLog(model, optimizer, log):
            loss = F.cross_entropy(model(problem.data.batches[0][0]), problem.data.batches[0][1])
            optimizer.step(lambda loss=loss: loss)  # type: ignore[misc]
        whole = {"net": model.state_dict(), "optim": optimizer.state_dict()}
        torch.save(whole, tmp_path / "late.pt")
        with pytest.raises(UsageError, match="there already"):
            UpdateLog(model, optimizer, log)
        with pytest.raises(UsageError, match="folder does not exist"):
            UpdateLog(model, optimizer, tmp_path / "nowhere" / "log.safetensors")
        for way in (None, TrainedWith(updates=str(log))):
            late = [tmp_path / "late.pt"]
            result = hesscli.symmetries(problem, later=late, trained_with=way)
            assert any(said in warning for warning in result.warnings)
            assert all(drift.predicted_change is None for drift in result.drifts)


def test_what_is_typed_counts_before_what_the_log_and_the_checkpoint_say(tmp_path: Path) -> None:
    """The rate as any other setting, which is told where the log has others."""
    model = perceptron(nn.ReLU())
    problem, log = problem_of(model), tmp_path / "log.safetensors"
    sgd = torch.optim.SGD(model.parameters(), RATE, momentum=0.5)
    with UpdateLog(model, sgd, log):
        sgd.step()
        sgd.param_groups[0]["lr"] = 2 * RATE
        sgd.step()
    whole = {"net": model.state_dict(), "optim": sgd.state_dict()}
    torch.save(whole, tmp_path / "late.pt")
    ends = [read_end(problem, tmp_path / "late.pt")]
    for typed, rates, momentum, told in (
        (TrainedWith(), [RATE, 2 * RATE], 0.5, []),
        (TrainedWith(lr=0.5, momentum=0.1), [0.5, 0.5], 0.1, ["lr=0.5 was typed"]),
    ):
        typed = typed._replace(updates=str(log))
        way = way_to(problem, ends, typed)
        assert [rate for rate, _ in steps_of(way.settings, way.log)] == rates
        assert way.settings.momentum == momentum
        assert [warning[:16] for warning in way.warnings(typed, True)] == told
    with pytest.raises(InputError, match="steps=120"):
        way_to(problem, ends, TrainedWith(lr=RATE, updates="120"))


LOGS: dict[str, tuple[str, Callable[[dict[str, Tensor]], object]]] = {
    "lacking": ("lacks parameters", lambda log: log.pop("0.weight")),
    "of another": ("of another model", lambda log: log.update({"0.bias": torch.zeros(3, 7)})),
    "uneven": ("unlike lengths", lambda log: log.update({"0.bias": torch.zeros(2, 4)})),
    "rates": ("unlike lengths", lambda log: log.update({"lr": torch.zeros(2)})),
    "no rate": ("learning rate", lambda log: None),
}


@pytest.mark.parametrize(("said", "spoil"), LOGS.values(), ids=list(LOGS))
def test_logs_that_cannot_be_meant_are_refused(
    said: str, spoil: Callable[[dict[str, Tensor]], object], tmp_path: Path
) -> None:
    model = spread(perceptron(nn.ReLU()))
    log = {name: torch.zeros(3, *p.shape) for name, p in model.named_parameters()}
    spoil(log)
    save_file(log, tmp_path / "log.safetensors")
    torch.save(model.state_dict(), tmp_path / "late.pt")
    way = TrainedWith(updates=str(tmp_path / "log.safetensors"))
    with pytest.raises(InputError, match=said):
        hesscli.symmetries(problem_of(model), later=[tmp_path / "late.pt"], trained_with=way)


def test_decay_alone_is_a_factor(tmp_path: Path) -> None:
    """Where nothing is learned quadratic charges shrink by (1 − lr · wd)² a step, linear ones by
    its root."""
    model = spread(perceptron(nn.ReLU()))
    problem = problem_of(model)
    shrunk = {name: p.detach() * (1 - RATE * 0.1) ** STEPS for name, p in model.named_parameters()}
    torch.save(shrunk, tmp_path / "late.pt")
    way = TrainedWith(lr=RATE, wd=0.1, steps=STEPS)
    result = hesscli.symmetries(problem, later=[tmp_path / "late.pt"], trained_with=way)
    factor = (1 - RATE * 0.1) ** STEPS
    for charge in result.charges:
        linear = charge.name == "softmax head"
        assert charge.later == pytest.approx(charge.value * factor ** (1 if linear else 2))
        assert charge.predicted == (pytest.approx(charge.later) if linear else None)


def test_adam_keeps_no_charges_and_that_is_no_fault(tmp_path: Path) -> None:
    model = spread(perceptron(nn.ReLU()))
    problem = problem_of(spread(perceptron(nn.ReLU())))
    trained(model, torch.optim.Adam(model.parameters(), RATE), problem.data.batches)
    torch.save(model.state_dict(), tmp_path / "late.pt")
    way = TrainedWith("adam", lr=RATE, steps=STEPS)
    result = hesscli.symmetries(problem, later=[tmp_path / "late.pt"], trained_with=way)
    assert all(drift.predicted_change is None for drift in result.drifts)
    assert min(drift.changes[0] / drift.size for drift in result.drifts) > 1e-3
    (told,) = [warning for warning in result.warnings if "adam" in warning]
    assert "no fault" in told
    drawn = dict(figures(result, {}))
    assert drawn.keys() == {"symmetry", "symmetry_charges", "symmetry_orbit"}
    for figure in drawn.values():
        labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
        assert labels
        assert not any("$" in label for label in labels)
        low, high = figure.axes[0].get_xlim()
        marks = [float(x) for line in figure.axes[0].lines for x in np.ravel(line.get_xdata())]
        assert 1.2 * low < min(marks) <= max(marks) < high / 1.2
    assert [text.get_text() for text in drawn["symmetry_charges"].legends[0].get_texts()] == [
        "found"
    ]
    assert not any("exact" in text.get_text() for text in drawn["symmetry_orbit"].texts)
    console = Console(width=120, file=io.StringIO())
    console.print(symmetry_table(result))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "charges at late.pt" in shown
    assert "homogeneous activation: 0" in shown


def test_ends_in_the_program(tmp_path: Path) -> None:
    problem = hesscli.load(SUNSPOTS, spec=SPEC[1])
    names, tensors = problem.parameters.names, problem.parameters.tensors
    log = {name: torch.zeros(3, *t.shape) for name, t in zip(names, tensors, strict=True)}
    save_file(log, tmp_path / "log.safetensors")
    how = "lr=0.1,updates=log.safetensors"
    line = ("symmetry", SUNSPOTS, SUNSPOTS, *SPEC, "--trained-with", how, "--out", "json")
    run = hesscli_warm(*line, "--dir", "-", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    document = json.loads(run.stdout)
    assert [Path(end["path"]) for end in document["later"]] == [SUNSPOTS]
    for wrong in ("lr=fast", "speed=1", "optimizer=lion", "momentum=1", "nesterov=2"):
        refused = hesscli_warm(*line[:-3], wrong, cwd=tmp_path)
        assert refused.returncode == ExitCode.USAGE
        what, got, _ = three_lines(refused.stderr)
        assert "--trained-with" in what
        assert wrong in got
    missing = hesscli_warm("symmetry", SUNSPOTS, "nothing.pt", *SPEC, cwd=tmp_path)
    assert missing.returncode == ExitCode.INPUT
