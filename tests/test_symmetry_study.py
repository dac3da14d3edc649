"""A hundred random networks: what is said to hold does; and what was planted is found."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuzz.dice import Dice
from fuzz.grammar import plain
from symmetric_networks import (
    GROUPS,
    HEADS,
    ROTARY,
    WIDTH,
    Attention,
    Decoder,
    Gated,
    Perceptron,
    Pictures,
    Squared,
    gpt_like,
    layer_norm,
    llama_like,
    problem_of,
    require_complete,
    rms_norm,
    spread,
)
from torch import nn
from torch.nn import functional as F

import hesscli
from hesscli.diagnostics.symmetry_places import found_in
from hesscli.errors import HesscliError
from hesscli.optim import UpdateLog
from hesscli.vocabulary import TrainedWith

pytestmark = pytest.mark.study

SAMPLES = Path(hesscli.__file__).parent.parent / "samples"

Make = Callable[[random.Random], nn.Module]


@pytest.mark.parametrize("seed", range(100))
def test_what_holds_does_so_at_other_weights_by_other_transformations(seed: int) -> None:
    subject = plain(Dice(seed))
    try:
        problem = hesscli.Problem(subject.model, subject.loss, subject.data, **subject.options)
        result = hesscli.symmetries(problem)
    except HesscliError as refused:
        pytest.fail(f"nothing was planted: {refused}")
    generator = torch.Generator().manual_seed(seed)
    with problem.in_dtype(torch.float64):
        families = found_in(problem)
        parameters = problem.parameters
        weights = parameters.flatten([tensor.detach() for tensor in parameters.tensors])

        def grown(vector: torch.Tensor) -> float:
            product = hesscli.GaussNewton(problem) @ vector - problem.weight_decay * vector
            return float(product.norm() / vector.norm())

        def loss(theta: torch.Tensor, batch: object) -> float:
            named = dict(zip(parameters.names, parameters.split(theta), strict=True))
            return float(problem.evaluate(batch, named).detach())

        for family, report in zip(families, result.families, strict=True):
            if report.status != "holds":
                assert report.causes, report
                continue
            if report.gauss_newton_directions:
                null = family.tangent(family.draw(generator, 1.0), weights)
                any_other = torch.randn(weights.shape, generator=generator, dtype=torch.float64)
                assert grown(null) < 1e-12 * grown(any_other), report
            for distance in (0.0, 0.3, 1.0):
                noise = torch.randn(weights.shape, generator=generator, dtype=torch.float64)
                theta = weights + distance * weights.std() * noise
                moved = family.moved(family.draw(generator, 1.0), theta)
                for batch in problem.batches():
                    before, after = loss(theta, batch.data), loss(moved, batch.data)
                    assert after == pytest.approx(before, rel=1e-9, abs=1e-12), report


@pytest.mark.parametrize("normed", [False, True], ids=["rotary", "query and key norms"])
def test_transformers_have_no_other_null_directions(normed: bool) -> None:
    decoder = llama_like(normed=normed)
    require_complete(decoder, hesscli.symmetries(problem_of(spread(decoder))))


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_charges_of_five_hundred_steps_are_predicted(decay: float, tmp_path: Path) -> None:
    """Of a GPT-like network, to a millionth of what they have changed by, from the log alone."""
    model = spread(gpt_like())
    problem = problem_of(spread(gpt_like()))
    sgd = torch.optim.SGD(model.parameters(), 0.05, weight_decay=decay)
    with UpdateLog(model, sgd, tmp_path / "log.safetensors"):
        for step in range(500):
            x, y = problem.data.batches[step % 3]
            sgd.zero_grad()
            F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
            sgd.step()
    torch.save(model.state_dict(), tmp_path / "late.pt")
    way = TrainedWith(updates=str(tmp_path / "log.safetensors"))
    result = hesscli.symmetries(problem, later=[tmp_path / "late.pt"], trained_with=way)
    drifts = [each for each in result.drifts if each.changes[0] > 1e-9 * each.size]
    assert {each.name for each in drifts} >= {"norm gain", "query-key", "value-output"}
    assert all(each.error is not None and each.error < 1e-6 for each in drifts)
    linear = [c for c in result.charges if c.name in ("key bias", "softmax head")]
    shrunk = (1 - 0.05 * decay) ** 500
    assert all(c.later == pytest.approx(c.value * shrunk, rel=1e-6, abs=1e-12) for c in linear)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_charges_and_sharpness_of_a_trained_network(optimizer: str, tmp_path: Path) -> None:
    """Five hundred steps from the sample of pictures; and its trace where the loss is the same."""
    problem = hesscli.load(SAMPLES / "fashion" / "model.pt", spec=SAMPLES / "fashion/hesscli.toml")
    late = copy.deepcopy(problem.model).double()
    make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    steps = make(late.parameters(), 0.02 if optimizer == "sgd" else 1e-4)
    x, y = (torch.cat(parts) for parts in zip(*problem.data.batches, strict=True))
    generator = torch.Generator().manual_seed(0)
    with UpdateLog(late, steps, tmp_path / "log.safetensors"):
        for _ in range(500):
            chosen = torch.randint(0, len(x), (16,), generator=generator)
            steps.zero_grad()
            F.cross_entropy(late(x[chosen].double()), y[chosen]).backward()
            steps.step()
    torch.save(late.state_dict(), tmp_path / "late.pt")
    way = TrainedWith(updates=str(tmp_path / "log.safetensors"))
    result = hesscli.symmetries(problem, later=[tmp_path / "late.pt"], trained_with=way)
    gains = [drift for drift in result.drifts if drift.name == "norm gain"]
    assert len(gains) == 3
    assert all(drift.changes[0] > 1e-6 * drift.size for drift in gains)
    if optimizer == "adam":
        assert all(drift.predicted_change is None for drift in result.drifts)
        assert any("adam keeps no charges" in warning for warning in result.warnings)
        return
    assert all(drift.error is not None and drift.error < 0.01 for drift in gains)
    assert result.orbit is not None
    first, *others = result.orbit.points
    for point in others:
        assert point.loss == pytest.approx(first.loss, rel=1e-10)
        assert point.companion == pytest.approx(first.companion, rel=1e-10)
    traces = [point.trace for point in result.orbit.points]
    assert max(traces) > 10 * min(traces) > 0


def test_work_on_a_trained_transformer_is_little() -> None:
    """Of twelve gradients and two products a family."""
    path = SAMPLES / "text" / "model.safetensors"
    result = hesscli.symmetries(hesscli.load(path, spec=SAMPLES / "text" / "hesscli.toml"))
    assert len(result.families) == 30
    assert result.cost.products <= 2 * len(result.families)
    assert result.cost.gradients - 2 * result.cost.products <= 12


# -- Planted families, each in several forms -------------------------------------------------------


def decoder(choose: random.Random, **options: bool) -> nn.Module:
    normed = options.get("normed", False)
    rotary = choose.choice(ROTARY) if options.get("rotary") else None
    groups = choose.choice([1, GROUPS, HEADS])
    attention = Attention(groups=groups, rotary=rotary, normed=normed)
    norm = layer_norm if options.get("shifts") else choose.choice([layer_norm, rms_norm])
    perceptron = Gated() if options.get("gated") else choose.choice([Gated, Perceptron])()
    return Decoder(norm, attention, perceptron, positions=choose.random() < 0.5)


def perceptron(choose: random.Random) -> nn.Module:
    width = choose.randint(2, 6)
    kinds = (nn.ReLU, nn.LeakyReLU, nn.PReLU, lambda: nn.PReLU(width), Squared)
    middle = [nn.Linear(width, width), choose.choice(kinds)()] if choose.random() < 0.5 else []
    first = nn.Linear(5, width, bias=choose.random() < 0.5)
    return nn.Sequential(first, choose.choice(kinds)(), *middle, nn.Linear(width, 3))


def low_rank(choose: random.Random) -> nn.Module:
    rank = choose.randint(2, 4)
    return nn.Sequential(nn.Linear(5, rank, bias=choose.random() < 0.5), nn.Linear(rank, 3))


def pictures(choose: random.Random, *, training: bool) -> nn.Module:
    model = Pictures(choose.choice([nn.ReLU, nn.PReLU, nn.LeakyReLU])())
    return model.train(training)


class Recurrent(nn.Module):
    """The last state of a recurrent network with two biases."""

    def __init__(self, kind: type[nn.RNNBase], width: int) -> None:
        super().__init__()
        self.inner, self.head = kind(5, width, batch_first=True), nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.inner(torch.stack([x, 2 * x, -x], 1))[0]
        return self.head(states[:, -1])


def recurrent(choose: random.Random) -> nn.Module:
    return Recurrent(choose.choice([nn.LSTM, nn.GRU, nn.RNN]), choose.randint(2, 5))


def normalised(choose: random.Random) -> nn.Module:
    width = choose.randint(4, 8)
    norm = choose.choice([nn.LayerNorm, nn.RMSNorm, lambda width, eps: nn.GroupNorm(1, width, eps)])
    return nn.Sequential(nn.Linear(5, width), norm(width, eps=1e-5), nn.Linear(width, 3))


PLANTED: dict[str, tuple[Make, str]] = {
    "softmax head": (perceptron, "holds"),
    "homogeneous activation": (perceptron, "holds"),
    "linear maps": (low_rank, "holds"),
    "key bias": (decoder, "holds"),
    "query-key": (decoder, "holds"),
    "value-output": (decoder, "holds"),
    "norm gain": (decoder, "holds"),
    "residual writers": (decoder, "asymptotic"),
    "residual shift": (lambda choose: decoder(choose, shifts=True), "holds"),
    "gated unit": (lambda choose: decoder(choose, gated=True), "holds"),
    "query-key plane": (lambda choose: decoder(choose, rotary=True), "holds"),
    "query-key plane rotation": (lambda choose: decoder(choose, rotary=True), "holds"),
    "map before a norm": (normalised, "asymptotic"),
    "map before batch norm": (lambda choose: pictures(choose, training=True), "asymptotic"),
    "map before fixed statistics": (lambda choose: pictures(choose, training=False), "holds"),
    "bias through maps": (lambda choose: decoder(choose, shifts=True), "holds"),
    "bias against bias": (lambda choose: recurrent(choose), "holds"),
    "residual rotation": (decoder, "holds"),
    "rows without a mean": (lambda choose: decoder(choose, shifts=True), "holds"),
    "bias before batch norm": (lambda choose: pictures(choose, training=True), "holds"),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", PLANTED)
def test_what_was_planted_is_found(name: str, seed: int) -> None:
    make, expected = PLANTED[name]
    model = make(random.Random(f"{name} {seed}"))
    training = model.training and isinstance(model, Pictures)
    result = hesscli.symmetries(problem_of(spread(model, seed).train(training), seed=seed))
    found = {one.status for one in result.families if one.name == name}
    assert found == {expected}


@pytest.mark.parametrize("seed", range(5))
def test_heads_with_norms_keep_the_scale_of_each_query_map(seed: int) -> None:
    choose = random.Random(seed)
    model = decoder(choose, rotary=choose.random() < 0.5, normed=True)
    result = hesscli.symmetries(problem_of(spread(model, seed), seed=seed))
    scales = [one for one in result.families if one.name == "map before a norm"]
    assert {one.status for one in scales} == {"asymptotic"}
    assert max(one.directions for one in scales) == HEADS
    assert WIDTH > HEADS
