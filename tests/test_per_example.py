"""The Gauss-Newton diagonal against the dense matrix's, module by module and loss by loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import TensorDataset

from hesscli import GaussNewton
from hesscli.engines.entries import Entries, Part
from hesscli.engines.per_example import PerExample
from hesscli.errors import UsageError
from hesscli.operators.per_example.squares import _by_gradients, _by_pairs
from hesscli.operators.products import flatten, gradient
from hesscli.problem.batches import rows
from hesscli.problem.freezing import FrozenData
from hesscli.problem.problem import Problem

ROUNDING = 1e-10  # float64, sums of some thousand terms
N = 23


def _draw(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _classes(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(2))


def _cut(data: tuple[Tensor, ...], sizes: list[int]) -> FrozenData:
    pieces = zip(*(torch.split_with_sizes(t, sizes) for t in data), strict=True)
    return FrozenData(tuple(pieces), tuple(sizes), sum(sizes), True, "by hand")


@dataclass
class Found:
    """What an engine and its stream say."""

    engine: PerExample
    diagonal: Tensor
    stderr: Tensor | None

    @property
    def cells(self) -> list[np.ndarray]:
        return list(self.engine.cells.values())


def _run(problem: Problem, draws: int | None = None, **options: Any) -> Found:
    parameters = options.pop("parameters", problem.parameters)
    entries = Entries(parameters, problem.device)
    stream = entries.stream(parameters, exact=draws is None)
    operator = GaussNewton(problem, parameters=parameters)
    engine = PerExample(operator, sampled=draws is not None, stream=stream, **options)
    for _ in engine.extend(draws or 1):
        pass
    found = entries.diagonal([Part(stream, 1.0, engine.count)], problem.weight_decay)
    exact = found.noise is None or (draws or 0) < 2
    stderr = None if exact else found.noise.double().square().mean(0).sqrt()
    return Found(engine, found.values, stderr)


def _error(problem: Problem, result: Found) -> float:
    """The worst relative error of an entry, small entries by the mean.

    The dense matrix is made of one batch, since its many products make all batches slow.
    """
    data = tuple(torch.cat(column) for column in zip(*problem.data.batches, strict=True))
    whole = _cut(data, [len(data[0])])
    merged = Problem(problem.model, problem.loss, whole, weight_decay=problem.weight_decay)
    dense = GaussNewton(merged).to_dense().diagonal()
    return float(((result.diagonal - dense).abs() / (dense.abs() + dense.mean())).max())


# -- networks ----------------------------------------------------------------------------------


def _sequential(*modules: nn.Module) -> nn.Module:
    """In evaluation mode, with statistics and scales that are not 0 and 1."""
    model = nn.Sequential(*modules).double()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.add_(0.1 * _draw(*tensor.shape).abs())
    return model.eval()


class Text(nn.Module):
    """Tokens and positions, attention, one linear map twice, and a head on flattened rows."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 6, padding_idx=0)
        self.positions = nn.Embedding(10, 6)
        self.norm1 = nn.LayerNorm(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.twice = nn.Linear(6, 6)
        self.norm2 = nn.RMSNorm(6)
        self.head = nn.Linear(6, 7, bias=not tied)
        if tied:
            self.head.weight = self.tokens.weight
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        z = self.norm1(x)
        x = x + self.attention(z, z, z, need_weights=False)[0]
        x = x + self.twice(torch.sin(self.twice(x)))
        result: Tensor = self.head(self.norm2(x).reshape(-1, 6)).reshape(*tokens.shape, 7)
        return result


class Base(nn.Module):
    """Two linear maps, whose use is for subclasses to say."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
        self.double()


class Functional(Base):
    """The first weight is also used without its module."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.tanh(self.first(x))) + x @ self.first.weight
        return y


class Swapped(Base):
    """Rows of the first map are features, columns examples: (3, N, ·) instead of (N, 3, ·)."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x[:, None] * torch.arange(1.0, 4.0).double()[:, None]).transpose(0, 1)
        z: Tensor = torch.tanh(self.last(y)).transpose(0, 1).sum(1)
        return z


class Normed(Base):
    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.weight_norm(self.first)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(torch.tanh(self.first(x)))
        return result


class Doubling(nn.Linear):
    """A subclass that does something else with its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x).square()


class Subclassed(Base):
    def __init__(self) -> None:
        super().__init__()
        self.first = Doubling(3, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.first(x))
        return result


class Bare(nn.Module):
    """A parameter of no module's, and no operation that vmap could not map but .item()."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(_draw(3))
        self.last = nn.Linear(3, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        assert math.isfinite(x.sum().item())
        result: Tensor = self.last(torch.tanh(x * self.scale))
        return result


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last = nn.LSTM(3, 4, batch_first=True).double(), nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.cell(x[:, None] * torch.ones(1, 4, 1).double())[0][:, -1])
        return result


class Partly(Base):
    """A frozen bias, a module that is never called, and a table that examples look up twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first.bias.requires_grad_(False)
        self.unused, self.table = nn.Linear(2, 2).double(), nn.Embedding(3, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) + self.table((x[:, :2] > 0).long()).sum(1)
        result: Tensor = self.last(torch.tanh(y))
        return result


def _weighted() -> nn.Module:
    return nn.CrossEntropyLoss(_draw(4).abs(), label_smoothing=0.1, ignore_index=2)


def _image_net() -> nn.Module:
    return _sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, (3, 2), dilation=(1, 2), padding="same", padding_mode="circular"),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.Conv2d(4, 4, 5, bias=False),
        nn.Flatten(),
        nn.Linear(4, 4),
    )


def _signal_net() -> nn.Module:
    return _sequential(
        nn.Conv1d(2, 4, 3, stride=2),
        nn.InstanceNorm1d(4, affine=True),
        nn.GELU(),
        nn.Conv1d(4, 3, 5),
    )


def _volume_net() -> nn.Module:
    return _sequential(
        nn.Conv3d(2, 4, 2, stride=(1, 2, 1), groups=2),
        nn.BatchNorm3d(4),
        nn.Flatten(),
        nn.Linear(72, 2),
    )


def _sequence_net() -> nn.Module:
    return _sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm((4, 5)), nn.Linear(5, 2))


def _turned_net() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return _sequential(Conv1D(5, 3), nn.GELU(), Conv1D(2, 5))


TOKENS, NEXT = _classes(7, N, 5), _classes(7, N, 5)
POINTS, KINDS = _draw(N, 3), _classes(3, N)
SMALL = (POINTS, KINDS)
TEXT = (TOKENS, NEXT.where(TOKENS != 3, -100), _draw(N, 5).square())
BCE = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0, 0.5]))

Case = tuple[Callable[[], nn.Module], Any, tuple[Tensor, ...], set[str]]

# Network, loss, examples, and the parameters that no module speaks for.
CASES: dict[str, Case] = {
    "images": (_image_net, _weighted(), (_draw(N, 3, 9, 9), _classes(4, N)), set()),
    "signals": (_signal_net, "mse", (_draw(N, 2, 11), _draw(N, 3, 1)), set()),
    "volumes": (_volume_net, BCE, (_draw(N, 2, 4, 5, 4), _draw(N, 2).sigmoid()), set()),
    "sequences": (_sequence_net, "mse", (_draw(N, 4, 3), _draw(N, 4, 2)), set()),
    "turned": (_turned_net, "mse", (_draw(N, 4, 3), _draw(N, 4, 2)), set()),
    "text": (Text, "language_model", TEXT, set()),
    "tied": (lambda: Text(tied=True), "language_model", TEXT, set()),
    "functional": (Functional, "cross_entropy", SMALL, {"first.weight", "first.bias"}),
    "swapped": (Swapped, "cross_entropy", SMALL, set()),
    "weight norm": (
        Normed,
        "cross_entropy",
        SMALL,
        {f"first.parametrizations.weight.original{i}" for i in (0, 1)},
    ),
    "subclass": (Subclassed, "cross_entropy", SMALL, set()),
    "partly": (Partly, "cross_entropy", SMALL, set()),
    "no vmap": (Bare, "cross_entropy", SMALL, {"scale"}),
    "recurrent": (
        Recurrent,
        "nll",
        (POINTS, KINDS),
        set(),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_diagonal_is_the_dense_matrix_s(name: str) -> None:
    build, loss, data, generic = CASES[name]
    torch.manual_seed(0)
    problem = Problem(build().double(), loss, _cut(data, [10, 1, 8, 4]), weight_decay=0.125)
    result = _run(problem)
    assert _error(problem, result) < ROUNDING
    assert set(result.engine.passes.generic) == generic
    assert result.stderr is None


@pytest.mark.parametrize("name", ["images", "text", "functional"])
def test_every_parameter_by_single_examples_gives_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, loss, data, _ = CASES[name]
    problem = Problem(build().double(), loss, _cut(data, [10, 1, 8, 4]))
    by_module = _run(problem)
    monkeypatch.setattr("hesscli.operators.per_example.passes.site_class", lambda module: None)
    alone = _run(problem)
    assert set(alone.engine.passes.generic) == set(problem.parameter_names)
    assert set(by_module.engine.passes.generic) < set(alone.engine.passes.generic)
    torch.testing.assert_close(alone.diagonal, by_module.diagonal, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", CASES)
def test_each_gradient_is_that_of_an_example_alone(name: str) -> None:
    build, loss, data, generic = CASES[name]
    torch.manual_seed(0)
    problem = Problem(build().double(), loss, _cut(data, [10, 1, 8, 4]))
    tensors, passes = problem.parameters.tensors, GaussNewton(problem).passes()
    for index in problem.indices:
        batch = problem.batch(index)
        outputs = problem.outputs(batch.data)
        column = _draw(*outputs.shape, seed=index)
        parts = passes.of((index,))
        found = torch.cat([live.each(column[i : i + live.batch.count]) for i, live in parts])
        assert not found.requires_grad
        for i, row in enumerate(found):
            alone = problem.outputs(rows(batch.data, i, i + 1))[0]
            expected = flatten(gradient((alone * column[i]).sum(), tensors))
            assert float((row - expected).abs().max()) <= ROUNDING * float(expected.norm())
        whole = flatten(gradient((outputs * column).sum(), tensors))
        assert float((found.sum(0) - whole).abs().max()) <= ROUNDING * float(found.norm())
    assert set(passes.generic) == generic


def test_both_orders_of_sums_agree() -> None:
    for positions in (1, 2, 7):
        gradients, inputs = _draw(5, 3, 2, 4, positions), _draw(5, 2, positions, 6, seed=2)
        each = torch.einsum("ncgop,ngpj->ncgoj", gradients, inputs)
        expected = each.square().sum((0, 1))
        for contract in (_by_gradients, _by_pairs):
            torch.testing.assert_close(contract(gradients, inputs), expected)


def test_the_sunspots_sample(sunspots: Problem) -> None:
    result = _run(sunspots)
    assert _error(sunspots, result) < ROUNDING
    assert result.engine.passes.generic == ()
    # One output: passes there and back over the data, and the check of 16 of 256.
    # A forward pass, a way back, and as much again for the squares of what it brings.
    assert result.engine.meter.gradients == pytest.approx(1 + 2 / 3, abs=0.2)
    table = np.stack(result.cells)
    assert table.shape == (16, 1, 4)
    share = np.asarray(sunspots.masses) / sum(sunspots.masses)
    mean = (share[:, None] * table[:, 0]).sum(0)
    parts = sunspots.parameters.split(result.diagonal - sunspots.weight_decay)
    layers = [float(sum(p.sum() for p in parts[i : i + 2])) for i in (0, 2, 4)]
    np.testing.assert_allclose(mean, [*layers, sum(layers)], rtol=1e-12)


@pytest.mark.parametrize("draws", [None, 2])
def test_a_selection_of_parameters_is_part_of_the_whole(
    sunspots: Problem, draws: int | None
) -> None:
    chosen = sunspots.parameters.select("hidden2")
    whole = sunspots.parameters.split(_run(sunspots, draws=draws).diagonal)
    part = _run(sunspots, parameters=chosen, draws=draws).diagonal
    torch.testing.assert_close(part, torch.cat([t.reshape(-1) for t in whole[2:4]]))


def test_class_weights_and_a_ragged_split_give_the_matrix_of_all_examples() -> None:
    build, loss, data, _ = CASES["images"]
    model = build()
    whole = _run(Problem(model, loss, _cut(data, [N])))
    ragged = Problem(model, loss, _cut(data, [17, 6]))
    torch.testing.assert_close(_run(ragged).diagonal, whole.diagonal, rtol=1e-12, atol=1e-16)
    parts = [
        _run(Problem(model, loss, _cut(tuple(t[s] for t in data), [n])))
        for s, n in ((slice(0, 17), 17), (slice(17, N), 6))
    ]
    naive = (parts[0].diagonal + parts[1].diagonal) / 2
    assert float((naive - whole.diagonal).norm() / whole.diagonal.norm()) > 0.01


# -- draws -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["images", "volumes", "text"])
def test_draws_are_unbiased_and_know_their_error(name: str) -> None:
    build, loss, data, _ = CASES[name]
    torch.manual_seed(0)
    problem = Problem(build().double(), loss, _cut(data, [10, 9, 4]))
    exact, draws, runs = _run(problem).diagonal, 3, 30
    results = [_run(problem, draws=draws, seed=seed) for seed in range(runs)]
    found = torch.stack([r.diagonal for r in results])
    spread = found.std(0)
    live = spread > 1e-12 * exact.mean()
    torch.testing.assert_close(found.mean(0)[~live], exact[~live], rtol=1e-9, atol=1e-12)
    scores = ((found.mean(0) - exact) / spread * math.sqrt(runs))[live]
    # Student's t with 29 degrees of freedom has heavier tails than the normal it is held to.
    assert float(scores.abs().max()) < 1.5 * norm.isf(5e-4 / len(scores))
    # The variance that a run states is the one that runs have, pooled over entries and runs:
    # 90 draws of correlated entries know their variance to some 15%.
    stated = torch.stack([r.stderr.square() for r in results if r.stderr is not None]).mean(0)
    assert float(stated.sum() / spread.square().sum()) == pytest.approx(1, abs=0.6)
    totals = np.array([[cell[:, -1].mean() for cell in r.cells] for r in results])
    share = np.asarray(problem.masses) / sum(problem.masses)
    np.testing.assert_allclose(totals @ share, found.sum(1).numpy(), rtol=1e-12)


def test_with_one_output_a_draw_is_exact(sunspots: Problem) -> None:
    drawn = _run(sunspots, draws=2, seed=5)
    torch.testing.assert_close(drawn.diagonal, _run(sunspots).diagonal, rtol=1e-12, atol=0)
    assert drawn.stderr is not None
    assert float(drawn.stderr.max()) < 1e-12
    assert _run(sunspots, draws=1).stderr is None


def test_draws_do_not_depend_on_how_a_batch_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    build, loss, data, _ = CASES["images"]
    problem = Problem(build(), loss, _cut(data, [19, 4]))
    whole = _run(problem, draws=2)
    monkeypatch.setattr("hesscli.operators.per_example.passes.PART_BYTES", 1)
    torch.testing.assert_close(_run(problem, draws=2).diagonal, whole.diagonal)
    assert not torch.equal(_run(problem, draws=2, seed=1).diagonal, whole.diagonal)


def test_a_large_vocabulary_is_drawn_and_never_enumerated() -> None:
    model = nn.Sequential(nn.Embedding(20_000, 2), nn.Linear(2, 20_000))
    tokens = _classes(20_000, 4, 3)
    problem = Problem(model, "language_model", _cut((tokens, tokens), [2, 2]))
    with pytest.raises(UsageError, match="one backward pass for each column") as caught:
        PerExample(GaussNewton(problem))
    assert str(3 * 19_999) in caught.value.got
    result = _run(problem, draws=1)
    looked_up = result.diagonal[: 2 * 20_000].view(-1, 2)[torch.unique(tokens)]
    assert float(looked_up.min()) > 0
    assert int((result.diagonal[: 2 * 20_000] > 0).sum()) == looked_up.numel()


# -- the loop ----------------------------------------------------------------------------------


def test_a_stopped_run_speaks_for_its_batches_and_goes_on(sunspots: Problem) -> None:
    engine = PerExample(GaussNewton(sunspots))
    steps = engine.extend()
    for _ in range(2 * 4 + 1):  # before each of four batches, in them, and before the fifth
        next(steps)
    steps.close()
    assert len(engine.seen) == 4
    whole = PerExample(GaussNewton(sunspots))
    for _ in whole.extend():
        pass
    for batch in engine.seen:
        np.testing.assert_array_equal(engine.cells[batch], whole.cells[batch])
    for _ in engine.extend():
        pass
    assert [len(cells) for cells in engine.cells.values()] == [1] * 16
    np.testing.assert_array_equal(list(engine.cells.values()), list(whole.cells.values()))


# -- refusals ----------------------------------------------------------------------------------


def test_batch_norm_in_train_mode_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double().train()
    with pytest.raises(UsageError, match="per-example gradients do not exist") as caught:
        PerExample(GaussNewton(Problem(model, "cross_entropy", _cut(SMALL, [N]))))
    assert "1 (BatchNorm1d)" in caught.value.got


class Mixing(Base):
    """An example's output depends on the others: no batch norm says so."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        result: Tensor = self.last(y - y.mean(0))
        return result


def test_examples_that_depend_on_each_other_are_found() -> None:
    with pytest.raises(UsageError, match="per-example gradients do not exist") as caught:
        _run(Problem(Mixing(), "cross_entropy", _cut(SMALL, [N])))
    assert "last (Linear) mixes" in caught.value.got


def test_unknown_output_hessians_and_shapeless_batches_are_refused() -> None:
    model = nn.Linear(3, 3).double()
    with pytest.raises(UsageError, match="is not known"):
        PerExample(GaussNewton(Problem(model, nn.MultiMarginLoss(), _cut(SMALL, [N]))))
    whole = FrozenData((SMALL,), (N,), N, False, "by hand")
    with pytest.raises(UsageError, match="one row an example"):
        PerExample(GaussNewton(Problem(model, "cross_entropy", whole)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_that_was_measured_small_by_chance_counts_as_a_unit(dtype: torch.dtype) -> None:
    """Squares of rounded numbers err by units in the last place, whatever one measurement says."""
    for seed in range(8):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(dtype)
        data = TensorDataset(torch.randn(20, 3), torch.randn(20, 2))
        rounding = GaussNewton(Problem(model, "mse", data)).passes().relative_rounding()
        assert torch.finfo(dtype).eps <= rounding <= 100 * torch.finfo(dtype).eps


def test_what_examples_share_is_seen_where_every_batch_has_one() -> None:
    """Rounding is measured on examples of several batches together: another structure."""
    tokens, targets = _classes(7, 4, 5), _classes(7, 4, 5)
    problem = Problem(Text(), "language_model", _cut((tokens, targets), [1] * 4))
    relative = _run(problem).engine.passes.relative_rounding()
    assert relative is not None
    assert relative < ROUNDING


class Positions(nn.Module):
    """Rows ``(T·N, ...)`` by position; of few examples has the linear layer a gradient."""

    def __init__(self, least: float) -> None:
        super().__init__()
        self.linear, self.least = nn.Linear(3, 2), least

    def forward(self, x: Tensor) -> Tensor:
        count, length, width = x.shape
        turned = self.linear(x.transpose(0, 1).reshape(length * count, width))
        found = turned.view(length, count, -1).transpose(0, 1)
        is_live = x[:, :1, :1] > self.least
        return torch.where(is_live, found, 0.0).tanh().sum(1)


@pytest.mark.parametrize("least", [0.5, 1.0])
def test_rows_by_position_are_told_from_rows_by_example(least: float) -> None:
    """However few examples speak: a half of them drawn at random may be all that would."""
    for seed in range(8):
        torch.manual_seed(seed)
        data = _draw(16, 4, 3, seed=seed), _classes(2, 16)
        problem = Problem(Positions(least).double(), "cross_entropy", _cut(data, [16]))
        assert _error(problem, _run(problem)) < ROUNDING
