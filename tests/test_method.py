"""Which engine answers, and that each answers with the dense matrix's diagonal."""

from __future__ import annotations

import itertools
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom
from scipy.stats import t as student
from torch import Tensor, nn

import hesscli
from hesscli.diagnostics.choice import Draw, choose
from hesscli.diagnostics.diag import _standing as diagonal_standing
from hesscli.diagnostics.diag import diagonal
from hesscli.diagnostics.estimation import Estimation
from hesscli.diagnostics.looks import Standing, Tolerance
from hesscli.diagnostics.measurement import drive
from hesscli.diagnostics.run import Clock
from hesscli.engines.entries import Entries, Part
from hesscli.engines.estimator import Estimator, Reading, Rounding
from hesscli.engines.hutchinson.blocks import Blocks
from hesscli.engines.hutchinson.designs import (
    REGIME_PROBES,
    Deflated,
    Stratified,
    common_share,
    deflated_ratio,
    stratified_ratio,
)
from hesscli.errors import BudgetError, HesscliError, UsageError
from hesscli.operators.base import Operator
from hesscli.operators.dense import Dense
from hesscli.operators.hessian import Hessian
from hesscli.operators.matrices import matrix_named
from hesscli.problem.freezing import FrozenData
from hesscli.problem.problem import Problem
from hesscli.problem.sources import TensorRows
from hesscli.vocabulary import BlockRule

LEVEL = 1e-3
SEEDS = 200
SUNSPOTS = Path(__file__).parents[1] / "samples" / "sunspots" / "model.pt"
ROUNDING = 1e-10  # float64, sums of some thousand terms

UNLIMITED = Clock(None, None)


class Pieces(nn.Module):
    """A small sibling of the fashion sample: convolutions, batch norm, ReLU and pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.norm2 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.max_pool2d(self.norm1(self.conv1(images)).relu(), 2)
        x = self.norm2(self.conv2(x)).relu()
        result: Tensor = self.head(x.mean((2, 3)))
        return result


def curved() -> nn.Sequential:
    """GELU bends all that comes before it; the head is still exact."""
    return nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


def problem_of(
    model: nn.Module, x: Tensor, classes: int = 3, loss: str = "cross_entropy", **options: object
) -> Problem:
    generator = torch.Generator().manual_seed(4)
    y = torch.randint(classes, (len(x),), generator=generator)
    return Problem(model.double().eval(), loss, TensorRows(x, y), seed=1, **options)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def images() -> Problem:
    torch.manual_seed(0)
    model = Pieces()
    for norm in (model.norm1, model.norm2):
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        nn.init.normal_(norm.running_mean, std=0.3)
        nn.init.uniform_(norm.weight, 0.5, 2.0)
    x, y = draw(48, 1, 8, 8), torch.arange(48) * 7 % 5
    batches = tuple(zip(x.split(24), y.split(24), strict=True))
    data = FrozenData(batches, (24, 24), 48, True, "by hand")
    return Problem(model.double().eval(), "cross_entropy", data, weight_decay=0.01)


@pytest.fixture(scope="module")
def bent() -> Problem:
    torch.manual_seed(1)
    return problem_of(curved(), draw(64, 5))


@pytest.fixture(scope="module")
def few() -> Problem:
    """In four batches, so that many seeds are cheap."""
    torch.manual_seed(1)
    x, y = draw(64, 5), torch.arange(64) % 3
    batches = tuple(zip(x.split(16), y.split(16), strict=True))
    data = FrozenData(batches, (16,) * 4, 64, True, "by hand")
    return Problem(curved().double(), "cross_entropy", data)


@pytest.fixture(scope="module")
def trained() -> Problem:
    """The sunspots sample, at its minimum, in four batches."""
    whole = hesscli.load(SUNSPOTS, examples="all")
    x, y = (torch.cat(c).split(64) for c in zip(*whole.data.batches, strict=True))
    data = FrozenData(tuple(zip(x, y, strict=True)), (64,) * 4, 256, True, "by hand")
    return Problem(whole.model, "mse", data, weight_decay=whole.weight_decay)


def dense(problem: Problem, matrix: str = "hessian") -> Tensor:
    return matrix_named(matrix)(problem).to_dense().diagonal()


# -- exact -------------------------------------------------------------------------------------


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "fisher", "empirical-fisher"])
def test_a_small_sibling_of_fashion_is_exact(images: Problem, matrix: str) -> None:
    result = diagonal(images, matrix=matrix)
    found = torch.cat([torch.from_numpy(result.entries[n]).flatten() for n in result.entries])
    truth = dense(images, matrix)
    assert float((found - truth).abs().max() / truth.abs().max()) < ROUNDING
    assert result.status == "exact"
    assert result.method.name == "exact"
    assert result.method.num_probes == 0
    assert result.cost.products == 0
    assert all(layer.status == "exact" for layer in result.layers)
    assert all(np.all(array == 0) for array in result.stderr.values())
    low, high = result.trace.interval
    total = float(truth.sum())
    assert low <= total <= high
    assert high - low < ROUNDING * total
    if matrix == "hessian":
        assert result.trace.gauss_newton == pytest.approx(total, rel=ROUNDING)
        assert result.trace.residual == pytest.approx(0, abs=ROUNDING * total)


def test_from_some_examples_exact_is_not_said(images: Problem) -> None:
    rows = TensorRows(*(torch.cat(c) for c in zip(*images.data.batches, strict=True)))
    part = Problem(images.model, "cross_entropy", rows, examples=24, weight_decay=0.01)
    result = diagonal(part, rtol=1e-6)
    assert result.status == "data-limited"
    found = torch.cat([torch.from_numpy(result.entries[n]).flatten() for n in result.entries])
    truth = dense(images)
    error = float((found - truth).norm() / truth.norm())
    assert error / 3 < result.diagonal.relative_error < 3 * error
    assert error < result.diagonal.relative_error_bound
    assert result.trace.probe_stderr == 0
    assert result.trace.data_stderr > 0
    assert all(layer.status != "exact" for layer in result.layers)


def test_probes_in_exact_mode_show_only_the_noise(images: Problem) -> None:
    plain, probed = diagonal(images), diagonal(images, probes=8)
    assert probed.status == "exact"
    assert probed.method.num_probes == 8
    assert probed.cost.products == pytest.approx(8)
    for name, array in plain.entries.items():
        np.testing.assert_array_equal(array, probed.entries[name])
    for before, after in zip(plain.layers, probed.layers, strict=True):
        assert before.block.noise_variance is None
        assert after.block.noise_variance > 0
        assert after.block.between_variance == before.block.between_variance
        assert after.block.between_interval == before.block.between_interval


# -- choice ------------------------------------------------------------------------------------


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(x)
        return result


class InDict(Step):
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"logits": self.last(x)}


class InTuple(Step):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:  # type: ignore[override]
        return self.last(x), 7


class Coupled(Step):
    """Mixes the examples of a batch without any batch norm to say so."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(x)
        return result - result.mean(0)


def smooth_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.multi_margin_loss(outputs, targets, p=2)


def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


CHOICES = {
    "linear": (Step(), "cross_entropy", "exact", "2 backward passes"),
    "dict": (InDict(), "cross_entropy", "exact", "2 backward passes"),
    "tuple": (InTuple(), "cross_entropy", "exact", "2 backward passes"),
    "curved": (curved(), "cross_entropy", "split", "4 of 6 tensors: "),
    "unknown loss": (Step(), smooth_loss, "hutchinson", "smooth_loss"),
    "train-mode norm": (
        nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)),
        "cross_entropy",
        "hutchinson",
        "1 (BatchNorm1d)",
    ),
    "coupled": (Coupled(), "cross_entropy", "hutchinson", "mixes the examples of a batch"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_auto_takes_what_the_problem_allows_and_says_why(name: str) -> None:
    model, loss, method, words = CHOICES[name]
    torch.manual_seed(0)
    x, y = draw(32, 5), torch.arange(32) % 3
    problem = Problem(model.double().train(), loss, TensorRows(x, y), batch_size=8)
    choice = choose(Hessian(problem), "auto", Draw())
    assert choice.name == method
    assert words in choice.note
    if method == "hutchinson":
        with pytest.raises(HesscliError):
            choose(Hessian(problem), "exact", Draw())


def test_train_mode_batch_norm_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double().train()
    problem = Problem(model, "cross_entropy", TensorRows(draw(32, 5), torch.arange(32) % 3))
    for method in ("exact", "split"):
        with pytest.raises(UsageError) as caught:
            hesscli.trace(problem, method=method)
        assert "1 (BatchNorm1d)" in caught.value.got
    with pytest.raises(UsageError) as caught:
        hesscli.trace(problem, matrix="empirical-fisher")
    assert "1 (BatchNorm1d)" in caught.value.got


def test_a_choice_that_runs_out_of_time_is_no_choice(bent: Problem) -> None:
    looks = 0

    def look() -> None:
        nonlocal looks
        looks += 1
        if looks == 2:
            raise BudgetError("the budget ended before there was a result", "", "")

    with pytest.raises(BudgetError):
        choose(Hessian(bent), "auto", Draw(), look)
    assert looks == 2


def test_sources_go_through_the_batches_side_by_side(bent: Problem) -> None:
    estimator = choose(Hessian(bent), "split", Draw()).estimator
    known, probes = estimator.gauss_newton, estimator.probes
    assert known is not None
    assert probes is not None
    joint = max(map(len, bent.joint()))  # batches that are known at once
    ready = None  # batches that were known at the first result
    for _ in estimator.extend(4):
        assert len(probes.seen) <= len(known.seen) <= len(probes.seen) + joint
        if ready is None and estimator.table() is not None:
            ready = len(known.seen)
    assert ready == joint
    assert len(known.seen) == len(probes.seen) == bent.num_batches > 2


def test_exact_names_what_stands_in_its_way(bent: Problem) -> None:
    with pytest.raises(UsageError, match="not the Gauss-Newton") as caught:
        hesscli.trace(bent, method="exact")
    assert "0.weight (gelu" in caught.value.got
    assert hesscli.trace(bent, method="exact", matrix="ggn").status == "exact"


def test_no_such_method(bent: Problem) -> None:
    with pytest.raises(UsageError, match="no such method"):
        hesscli.trace(bent, method="magic")


def test_a_large_vocabulary_is_drawn() -> None:
    """Neither 49,999 backward passes nor a matrix of outputs by outputs."""
    words, length = 50_000, 6
    model = nn.Sequential(nn.Embedding(words, 4), nn.Linear(4, words))
    tokens = torch.randint(words, (16, length), generator=torch.Generator().manual_seed(0))
    problem = Problem(model, "language_model", TensorRows(tokens, tokens.roll(-1, 1)))
    choice = choose(Hessian(problem), "auto", Draw())
    assert choice.estimator.sampled
    for _ in choice.estimator.extend(2):
        pass
    table = choice.estimator.table()
    assert table is not None
    assert table.label is not None
    assert float(table.estimate[-1]) > 0
    assert float(table.label.value[-1]) > 0
    # Two draws of columns in place of 49,999: passes are counted.
    assert choice.estimator.gradients < 20


# -- split, stratified, deflated ---------------------------------------------------------------


def estimates(operator: Operator, method: str, seeds: int, probes: int) -> list[tuple]:
    """Readings of the total, the layers and the entries for many seeds."""
    found = []
    for seed in range(seeds):
        entries = Entries(operator.parameters, torch.device("cpu"))
        choice = choose(operator, method, Draw(seed, entries=entries))
        goal = lambda estimator, reading: Standing(1.0, 1.0, 0.0, 1.0)  # noqa: E731
        run = Estimation(choice.estimator, goal, 0.05, Rounding(0.0), probes=probes)
        reading = run.outcome(drive(UNLIMITED, run)).reading
        found.append((reading, choice.estimator.diagonal(1.0)))
    return found


def shared_outliers(*sizes: int) -> Dense:
    """Four batches' matrices: outliers that they share, and each its own indefinite rest."""
    generator, size = torch.Generator().manual_seed(8), sum(sizes)
    common = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    own = torch.randn(4, size, size, generator=generator, dtype=torch.float64)
    return Dense.of(
        common @ common.T * 3 + (own + own.mT) / 4,
        masses=[1.0, 2.0, 1.5, 0.5],
        layers=dict(zip(("first", "second", "third"), sizes, strict=True)),
    )


@pytest.fixture(scope="module")
def matrices() -> Dense:
    return shared_outliers(10, 8, 6)


@pytest.mark.parametrize("method", ["stratified", "deflated", "hutchinson"])
def test_every_design_is_unbiased_and_its_bars_hold(matrices: Dense, method: str) -> None:
    _check_coverage(matrices, method, SEEDS)


@pytest.mark.study
@pytest.mark.parametrize("name", ["few", "trained"])
def test_the_split_is_unbiased_and_its_bars_hold(name: str, request: pytest.FixtureRequest) -> None:
    _check_coverage(Hessian(request.getfixturevalue(name)), "split", SEEDS)


def test_a_diagonal_s_bars_hold_at_the_stop(matrices: Dense) -> None:
    """The relative error is below the tolerance, and every entry in its bar, when it ends."""
    truth = matrices.to_dense().diagonal()
    tolerance = Tolerance(0.3, None)
    below, covered, looks = [], [], []
    for seed in range(SEEDS):
        draw = Draw(seed, entries=Entries(matrices.parameters, torch.device("cpu")))
        choice = choose(matrices, "hutchinson", draw)
        goal = partial(diagonal_standing, tolerance=tolerance)
        run = Estimation(choice.estimator, goal, 0.05, Rounding(0.0))
        outcome = run.outcome(drive(UNLIMITED, run))
        assert outcome.status == "converged"
        found = choice.estimator.diagonal(1.0)
        error = (found.values - truth).abs()
        below.append(float(error.norm() / truth.norm()) <= 0.3)
        limit = student.isf(0.025, found.freedom) * found.stderr()
        covered.append(float((error <= limit).double().mean()))
        looks.append(outcome.looks)
    assert np.mean(below) >= binom.ppf(LEVEL / 2, SEEDS, 0.95) / SEEDS
    assert np.mean(covered) >= binom.ppf(LEVEL / 2, SEEDS, 0.93) / SEEDS
    assert max(looks) > 1


def _check_coverage(operator: Operator, method: str, seeds: int) -> None:
    """Total, layers and entries, pooled over what shares probes: 93% and more of all seeds."""
    truth, parameters = operator.to_dense().diagonal(), operator.parameters
    sizes = [sum(p.numel for p in parameters.in_layer(n)) for n in parameters.layers]
    layers = np.array([float(part.sum()) for part in truth.split(sizes)])
    wanted = np.append(layers, layers.sum())
    found = estimates(operator, method, seeds, 4)
    means = np.mean([reading.estimate for reading, _ in found], axis=0)
    spread = np.std([reading.estimate for reading, _ in found], axis=0, ddof=1)
    # Four standard errors of each of four columns, and rounding where there is no noise.
    assert (np.abs(means - wanted) <= 4 * spread / seeds**0.5 + 1e-9).all()
    hits = [np.abs(r.estimate - wanted) <= r.half_width + 1e-9 for r, _ in found]
    low = binom.ppf(LEVEL / 8, seeds, 0.93) / seeds
    assert np.mean(hits) >= low
    covered = []
    for _, entries in found:
        limit = student.isf(0.025, entries.freedom) * entries.stderr()
        covered.append(float(((entries.values - truth).abs() <= limit + 1e-9).double().mean()))
    assert np.mean(covered) >= low


def test_plain_probes_are_adahessian_s_estimate(few: Problem) -> None:
    """z ⊙ Hz by the paper's two backward passes on each batch, then its signed block means."""
    parameters = few.parameters
    entries = Entries(parameters, torch.device("cpu"))
    choice = choose(Hessian(few), "hutchinson", Draw(5, entries=entries))
    for _ in choice.estimator.extend(2):
        pass
    engine = choice.estimator.probes
    assert engine is not None
    wanted = torch.zeros(parameters.size, dtype=torch.float64)
    for batch in few.batches():
        loss = few.evaluate(batch.data)
        gradient = torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, parameters.tensors, create_graph=True)]
        )
        for z in engine.probes.block(batch.index, 0, 2):
            product = torch.autograd.grad(gradient @ z, parameters.tensors, retain_graph=True)
            wanted += batch.weight / 2 * z * torch.cat([p.flatten() for p in product])
    found = choice.estimator.diagonal(1.0).values
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    first = parameters.split(found)[0]
    means = Blocks.of(first.shape, BlockRule.parse("5")).average(first)
    torch.testing.assert_close(means, first.mean(1, keepdim=True).expand_as(first))


def test_the_parts_of_the_hessian_add_up(bent: Problem) -> None:
    result = hesscli.trace(bent, probes=4, seed=1)
    gauss_newton = float(dense(bent, "ggn").sum())
    assert result.method.name == "split"
    assert result.trace.gauss_newton == pytest.approx(gauss_newton, rel=ROUNDING)
    total = result.trace.gauss_newton + result.trace.residual
    assert result.trace.estimate == pytest.approx(total, rel=1e-12)
    status = {layer.name: layer.status for layer in result.layers}
    assert status["4"] == "exact"
    assert status["0"] != "exact"
    assert result.layers[-1].probe_stderr == 0


def test_the_regime_test_tells_layers_from_their_borders() -> None:
    """Untrained and deep: most of H lies between layers, and strata pay. Not with two layers."""
    torch.manual_seed(0)
    deep = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(6, 6), nn.Tanh())))
    flat = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    for model in (deep, flat):
        x, y = draw(16, 6), torch.arange(16) % 6
        data = FrozenData(((x, y),), (16,), 16, True, "by hand")
        operator = Hessian(Problem(model.double(), "cross_entropy", data))
        matrix = operator.to_dense().numpy()
        np.fill_diagonal(matrix, 0)
        ends = np.cumsum([0, *(42 for _ in operator.parameters.layers)])
        own = sum(np.square(matrix[a:b, a:b]).sum() for a, b in itertools.pairwise(ends))
        exact = (len(ends) - 1) * own / np.square(matrix).sum()
        # Eight probes know a ratio of two variances to a factor of about 4, at one in a thousand.
        assert exact / 6 < stratified_ratio(operator, 0) < 6 * exact


@pytest.mark.parametrize("size", [0.3, 1.0, 2.0])
def test_what_batches_have_in_common_is_known_before_a_basis_is_made(size: float) -> None:
    """Of C + N, C - N and C + M, where N and M are zero on the range of C, which has rank 12."""
    rank, dim = 12, 80
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
    inside, outside = basis[:, :rank], basis[:, rank:]
    common = inside @ torch.diag(torch.linspace(1, 2, rank, dtype=torch.float64)) @ inside.T
    rest = torch.randn(2, dim - rank, dim - rank, generator=generator, dtype=torch.float64)
    own, other = size / dim**0.5 * (outside @ (rest + rest.mT) @ outside.T)
    batches = torch.stack([common + own, common - own, common + other])
    matrices = Dense.of((batches + batches.mT) / 2)
    # Σ |Av|² of so many probes, whose variance each is at most 2 ‖AᵀA‖².
    spread = [2 * (b @ b).square().sum() / REGIME_PROBES for b in batches]
    off = 4 * max(float(s.sqrt() / b.square().sum()) for s, b in zip(spread, batches, strict=True))
    c, n, m = (float(part.square().sum()) for part in (common, own, other))
    assert abs(common_share(matrices, 0) - (c - n) / (c + n)) <= off
    # One step more than the rank, of which a direction of M may be taken away.
    left = deflated_ratio(matrices, rank + 1, 0)
    largest = float(torch.linalg.matrix_norm(other, 2)) ** 2
    assert abs(left - m / (m + c)) <= off * left + largest / (m + c)


def test_many_probes_ahead_change_the_design() -> None:
    """Where there are more parameters than probes are foretold; else unit vectors would do."""
    matrices = shared_outliers(300, 240, 180)
    choice = choose(matrices, "auto", Draw(3))
    assert "hidden" in choice.note or "step" in choice.note  # why there is no Gauss-Newton part

    def standing(estimator: Estimator, reading: Reading) -> Standing:
        share = reading.random_share
        return Standing(float(reading.half_width[-1]), 0.05 * truth, 0.0, share)

    truth = float(matrices.to_dense().trace())
    run = Estimation(choice.estimator, standing, 0.05, Rounding(0.0), choice.rethink)
    outcome = run.outcome(drive(UNLIMITED, run))
    assert outcome.status == "converged"
    assert outcome.turn is not None
    assert "the first probes foretold" in outcome.turn
    assert outcome.estimator is not choice.estimator
    assert abs(float(outcome.reading.estimate[-1]) - truth) < 0.1 * abs(truth)


def test_deflation_takes_the_outliers_and_strata_leave_out_the_borders(matrices: Dense) -> None:
    spreads = {
        method: np.std([r.estimate[-1] for r, _ in estimates(matrices, method, 40, 2)])
        for method in ("hutchinson", "deflated", "stratified")
    }
    assert spreads["deflated"] < spreads["hutchinson"] / 2
    assert spreads["stratified"] < spreads["hutchinson"]
    assert Stratified(matrices).products == 3


def test_a_basis_that_was_broken_off_is_made_anew(matrices: Dense) -> None:
    entries = Entries(matrices.parameters, torch.device("cpu"))
    stream = entries.stream(matrices.parameters, exact=True)
    broken = Deflated(matrices, 24, 0, stream, matrices.parameters)
    steps = broken.prepare()
    next(steps)
    next(steps)
    steps.close()
    for _ in broken.prepare():
        pass
    # A whole basis leaves nothing for probes: its traces are the matrix's own.
    total = sum(t.weight * broken.offset(t.index)[-1] for t in matrices.batches())
    assert total == pytest.approx(float(matrices.to_dense().trace()), rel=1e-10)
    found = entries.diagonal([Part(stream, 1.0, 1)], 0.0)
    torch.testing.assert_close(found.values, matrices.to_dense().diagonal())


LARGE_VOCABULARY = """
import torch
from torch import nn
import hesscli
from hesscli.memory import peak_bytes
from hesscli.problem.sources import TensorRows

torch.manual_seed(0)
words = 50_000
model = nn.Sequential(nn.Embedding(words, 4), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, words))
tokens = torch.randint(words, (16, 8))
problem = hesscli.Problem(model, "language_model", TensorRows(tokens, tokens.roll(-1, 1)))
plan = hesscli.check(problem, rtol=1.0).plan
planned = {command.command: command.peak_bytes for command in plan.commands}
assert hesscli.diagonal(problem, probes=2).method.num_probes == 2
print(planned["diag"], peak_bytes(torch.device("cpu")))
"""


def test_memory_of_a_large_vocabulary_is_bounded_and_planned() -> None:
    """One example's outputs are 1.6 MB; a matrix of outputs by outputs would be 80 GB."""
    run = subprocess.run(
        [sys.executable, "-c", LARGE_VOCABULARY], capture_output=True, text=True, check=True
    )
    planned, used = map(int, run.stdout.split())
    assert used < 1 << 30
    assert used / 1.5 < planned < 1.5 * used
