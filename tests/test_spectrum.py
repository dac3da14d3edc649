"""hesscli.spectrum end to end against dense spectra, and how it ends early."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import nn

import hesscli
from hesscli.diagnostics import spectral_study
from hesscli.diagnostics.spectral_runs import needed_bytes
from hesscli.errors import UsageError
from hesscli.operators.retained import Retained
from hesscli.problem.freezing import FrozenData
from hesscli.results import Snapshot, SpectrumResult

if TYPE_CHECKING:
    from conftest import TimeIsUp


SAMPLES = Path(__file__).parents[1] / "samples"
PRODUCTS = 128
DISTANCE = 0.03
"""Wasserstein-1 over the mean |λ|."""


def trained(activation: type[nn.Module]) -> hesscli.Problem:
    """A small float64 classifier of four classes, its examples in one batch."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(10, 20), activation(), nn.Linear(20, 14), activation(), nn.Linear(14, 4)
    ).double()
    x = torch.randn(400, 10).double()
    y = (x[:, 0] * x[:, 1] > 0).long() + 2 * (x[:, 2] + x[:, 3].abs() > 1).long()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    data = FrozenData(((x, y),), (400,), 400, True, "-")
    return hesscli.Problem(model, "cross_entropy", data)


@pytest.fixture(scope="module")
def relu() -> hesscli.Problem:
    return trained(nn.ReLU)


@pytest.fixture(scope="module")
def smooth(sunspots: hesscli.Problem) -> hesscli.Problem:
    """The sunspot network, with its examples in one batch, so that its matrix is soon formed."""
    columns = zip(*sunspots.data.batches, strict=True)
    data = FrozenData((tuple(map(torch.cat, columns)),), (256,), 256, True, "-")
    return hesscli.Problem(sunspots.model, "mse", data, weight_decay=sunspots.weight_decay)


@pytest.fixture(scope="module", params=["relu", "gelu", "smooth"])
def problem(request: pytest.FixtureRequest) -> hesscli.Problem:
    if request.param == "gelu":
        return trained(nn.GELU)
    known: hesscli.Problem = request.getfixturevalue(request.param)
    return known


def dense_matrix(problem: hesscli.Problem, matrix: type = hesscli.Hessian) -> np.ndarray:
    found = matrix(problem).to_dense().numpy()
    return (found + found.T) / 2


@pytest.fixture(scope="module")
def dense(problem: hesscli.Problem) -> np.ndarray:
    """The dense Hessian, in float64."""
    return dense_matrix(problem)


@pytest.fixture(scope="module")
def relu_truth(relu: hesscli.Problem) -> np.ndarray:
    """Its Hessian's eigenvalues."""
    return np.linalg.eigvalsh(dense_matrix(relu))


@pytest.fixture(scope="module")
def usual(problem: hesscli.Problem) -> SpectrumResult:
    """What is found where nothing is asked for."""
    return hesscli.spectrum(problem)


@pytest.fixture(scope="module")
def explored(problem: hesscli.Problem) -> SpectrumResult:
    """From one start vector, with vectors and the block of the last layer."""
    last = problem.layer_names[-1:]
    return hesscli.spectrum(problem, steps=64, probes=1, vectors=True, layers=last)


def test_the_ten_largest_to_eight_digits(explored: SpectrumResult, dense: np.ndarray) -> None:
    result = explored
    truth = np.linalg.eigvalsh(dense)[::-1][:10]
    top = [one for one in result.eigenvalues if one.end == "top"]
    np.testing.assert_allclose([one.value for one in top], truth, rtol=1e-8)
    assert all(one.settled and one.copies == 1 for one in top)
    assert result.status == "converged"


def test_an_eigenvalue_lies_within_each_bar(problem: hesscli.Problem, dense: np.ndarray) -> None:
    """LAPACK's own error is some eps of the largest."""
    truth = np.linalg.eigvalsh(dense)
    own = len(truth) * 2.0**-52 * truth[-1]
    for steps in (3, 12, 30):
        for one in hesscli.spectrum(problem, steps=steps, probes=1).eigenvalues:
            assert np.abs(truth - one.value).min() <= one.residual + own


def test_the_density_is_near_the_dense_one(usual: SpectrumResult, dense: np.ndarray) -> None:
    """As nodes, and as the smooth curve that is drawn."""
    truth = np.linalg.eigvalsh(dense)
    size = np.abs(truth).mean()
    assert usual.cost.products == PRODUCTS
    density = usual.density
    assert abs(sum(density.weights) - 1) < 1e-12
    assert wasserstein_distance(truth, density.nodes, None, density.weights) / size <= DISTANCE
    grid, values = np.array(density.grid), np.array(density.values)
    assert np.trapezoid(values, grid) == pytest.approx(1, abs=1e-6)
    masses = np.gradient(grid) * values
    assert wasserstein_distance(truth, grid, None, masses) / size <= DISTANCE


def test_sums_over_all_eigenvalues(usual: SpectrumResult, dense: np.ndarray) -> None:
    """Within six standard errors of what the dense spectrum gives: a test of what is summed."""
    truth = np.linalg.eigvalsh(dense)
    shares = np.abs(truth) / np.abs(truth).sum()
    expected = {
        "trace": truth.sum(),
        "squared_norm": (truth**2).sum(),
        "stable_rank": (truth**2).sum() / truth[-1] ** 2,
        "effective_rank": math.exp(-(shares * np.log(shares)).sum()),
    }
    for name, value in expected.items():
        found = getattr(usual.functions, name)
        error = found.stderr or abs(found.depth_change)
        assert found.value == pytest.approx(value, abs=6 * error, rel=1e-9), name
    mass = shares[truth < 0].sum()
    assert usual.negative_mass == pytest.approx(mass, abs=0.01)


def test_participation_and_vectors(
    problem: hesscli.Problem, explored: SpectrumResult, dense: np.ndarray
) -> None:
    result, count = explored, len(explored.eigenvalues)
    stacked = [result.vectors[name].reshape(count, -1) for name in problem.parameter_names]
    vectors = np.concatenate(stacked, axis=1)
    assert np.abs(vectors @ vectors.T - np.eye(count)).max() < 1e-10
    for row, one in enumerate(result.eigenvalues):
        residual = np.linalg.norm(dense @ vectors[row] - one.value * vectors[row])
        assert residual <= one.residual + 1e-10 * np.abs(dense).max()
    for layer in result.layers:
        names = [p.name for p in problem.parameters.in_layer(layer.name)]
        owned = [result.vectors[name].reshape(count, -1) for name in names]
        shares = sum((part**2).sum(1) for part in owned)
        np.testing.assert_allclose(layer.participation, shares, atol=1e-12)


def test_vector_errors_bound_the_angle(problem: hesscli.Problem, dense: np.ndarray) -> None:
    """That to the nearest true eigenvector: after few steps the start may have missed one."""
    known = np.linalg.eigh(dense)[1]
    result = hesscli.spectrum(problem, steps=14, probes=1, k=5, vectors=True)
    parts = [result.vectors[name].reshape(10, -1)[:5] for name in problem.parameter_names]
    cosines = np.abs(np.concatenate(parts, axis=1) @ known).max(axis=1)
    bounds = [one.vector_error for one in result.eigenvalues[:5]]
    assert any(bound is not None for bound in bounds)
    for cosine, bound in zip(cosines, bounds, strict=True):
        assert bound is None or math.sqrt(max(1 - cosine**2, 0.0)) <= bound + 1e-7


def test_blocks_of_layers(
    problem: hesscli.Problem, explored: SpectrumResult, dense: np.ndarray
) -> None:
    name = problem.layer_names[-1]
    parameters = problem.parameters.in_layer(name)
    start = parameters[0].offset
    size = sum(p.numel for p in parameters)
    block = dense[start : start + size, start : start + size]
    (layer,) = (layer for layer in explored.layers if layer.density is not None)
    assert layer.name == name
    assert layer.eigenvalues is not None
    assert layer.functions is not None
    truth = np.linalg.eigvalsh(block)
    assert layer.status == "exact"
    assert layer.eigenvalues[0].value == pytest.approx(truth[-1], rel=1e-9)
    assert layer.functions.trace.value == pytest.approx(truth.sum(), rel=1e-9)
    assert layer.functions.trace.stderr == 0


def test_the_dense_spectrum(smooth: hesscli.Problem) -> None:
    result = hesscli.spectrum(smooth, steps=32, probes=1, exact=True, layers=["head"])
    truth = np.linalg.eigvalsh(dense_matrix(smooth))
    assert result.exact is not None
    np.testing.assert_allclose(result.exact.eigenvalues, truth, atol=1e-9)
    nodes, weights = result.density.nodes, result.density.weights
    expected = wasserstein_distance(truth, nodes, None, weights) / np.abs(truth).mean()
    assert result.exact.distance == pytest.approx(expected, rel=1e-9)
    # Sums are those of the dense matrix, and nothing is uncertain about them.
    assert result.functions.trace.value == pytest.approx(float(truth.sum()), abs=1e-9)
    negative = float(-truth[truth < 0].sum() / np.abs(truth).sum())
    assert result.negative_mass == pytest.approx(negative, abs=1e-9)
    assert result.functions.negative_mass.interval == (result.negative_mass,) * 2
    assert not [warning for warning in result.warnings if "no error bar" in warning]
    assert result.layers[-1].exact is not None
    assert result.layers[-1].exact.distance == pytest.approx(0, abs=1e-9)
    with pytest.raises(UsageError, match="at most 300 parameters"):
        hesscli.spectrum(smooth, exact=True, exact_limit=300)


@pytest.mark.parametrize("matrix", ["ggn", "fisher", "empirical-fisher"])
def test_other_matrices_and_their_condition(relu: hesscli.Problem, matrix: str) -> None:
    operators = {
        "ggn": hesscli.GaussNewton,
        "fisher": hesscli.Fisher,
        "empirical-fisher": hesscli.EmpiricalFisher,
    }
    truth = np.linalg.eigvalsh(dense_matrix(relu, operators[matrix]))
    result = hesscli.spectrum(relu, matrix=matrix, steps=48, probes=2, damping=1e-2)
    assert result.problem.matrix == matrix
    assert result.eigenvalues[0].value == pytest.approx(truth[-1], rel=1e-8)
    assert result.condition is not None
    damping = result.condition.damping
    assert damping == pytest.approx(1e-2 * truth.mean(), rel=0.05)
    low, high = result.condition.interval
    number = (truth[-1] + damping) / (max(truth[0], 0.0) + damping)
    assert low * (1 - 1e-9) <= number <= high * (1 + 1e-9)
    assert hesscli.spectrum(relu, steps=8, probes=1).condition is None


def test_outliers_beside_the_number_of_classes(
    relu: hesscli.Problem, relu_truth: np.ndarray
) -> None:
    result = hesscli.spectrum(relu, probes=1)
    ratios = relu_truth[:-21:-1] / relu_truth[-2:-22:-1]
    assert result.outliers.classes == 4
    assert result.outliers.class_ratio == pytest.approx(ratios[2], rel=1e-6)
    assert result.outliers.count == (ratios.argmax() + 1 if ratios.max() >= 1.5 else 0)


def test_weight_decay_moves_every_eigenvalue(relu: hesscli.Problem) -> None:
    decayed = hesscli.Problem(relu.model, "cross_entropy", relu.data, weight_decay=0.5)
    plain, moved = (hesscli.spectrum(p, steps=40, probes=1) for p in (relu, decayed))
    for before, after in zip(plain.eigenvalues[:5], moved.eigenvalues[:5], strict=True):
        assert after.value - before.value == pytest.approx(0.5, rel=1e-9)


def test_float32_products_have_an_honest_bar(relu: hesscli.Problem, relu_truth: np.ndarray) -> None:
    with relu.in_dtype(torch.float32):
        result = hesscli.spectrum(relu, steps=40, probes=1)
    for one in result.eigenvalues:
        assert np.abs(relu_truth - one.value).min() <= one.residual
    assert 1e-7 < result.eigenvalues[0].residual / relu_truth[-1] < 1e-4


# How a run ends.


def test_a_tolerance_ends_the_first_run(relu: hesscli.Problem) -> None:
    whole = hesscli.spectrum(relu, steps=64, probes=1)
    early = hesscli.spectrum(relu, rtol=0.01, k=5, probes=1)
    assert early.status == "converged"
    assert early.steps < 30
    for one, known in zip(early.eigenvalues[:5], whole.eigenvalues[:5], strict=True):
        assert one.residual <= 0.01 * one.value
        assert abs(one.value - known.value) <= one.residual
    missed = hesscli.spectrum(relu, rtol=1e-6, k=5, steps=6, probes=1)
    assert missed.status == "budget"


def test_progress_and_convergence(relu: hesscli.Problem) -> None:
    seen: list[Snapshot] = []
    result = hesscli.spectrum(relu, steps=24, probes=3, observe=lambda s: bool(seen.append(s)))
    iterating = [s for s in seen if s.phase == "iterating"]
    assert [s.done for s in iterating] == sorted(s.done or 0.0 for s in iterating)
    assert iterating[-1].done == iterating[-1].total == result.cost.products
    assert iterating[-1].estimate == result.eigenvalues[0].value
    assert [point.steps for point in result.convergence] == list(range(1, 25))
    assert result.convergence[-1].values[0] == result.eigenvalues[0].value


def stopping(after: int) -> Iterator[bool]:
    yield from [False] * after
    while True:
        yield True


@pytest.mark.parametrize("after", [1, 10, 30])
def test_the_observer_can_stop_a_run(relu: hesscli.Problem, after: int) -> None:
    """In the first run, or in a later one, which then does not count."""
    stop = stopping(after - 1)
    result = hesscli.spectrum(
        relu, steps=24, probes=5, observe=lambda s: s.phase == "iterating" and next(stop)
    )
    assert result.status == "interrupted"
    assert result.steps == min(after, 24)
    assert result.method.num_probes == 1
    assert abs(sum(result.density.weights) - 1) < 1e-12
    assert result.functions.trace.stderr is None


def test_nothing_yet_is_no_result(relu: hesscli.Problem) -> None:
    with pytest.raises(KeyboardInterrupt):
        hesscli.spectrum(relu, observe=lambda s: s.phase == "preflight")


def test_budget_ends_a_run(relu: hesscli.Problem, time_is_up_when: TimeIsUp) -> None:
    late = time_is_up_when(lambda snapshot: snapshot.phase == "iterating")
    result = hesscli.spectrum(relu, steps=400, layers=["0"], exact=True, observe=late)
    assert result.status == "budget"
    assert result.steps == 1
    assert result.exact is None
    assert any("no time for 0" in warning for warning in result.warnings)


def test_one_start_vector_says_that_it_gives_no_bar(relu: hesscli.Problem) -> None:
    result = hesscli.spectrum(relu, steps=16, probes=1)
    assert result.functions.trace.stderr is None
    assert any("one start vector" in warning for warning in result.warnings)


def test_a_part_of_the_examples() -> None:
    batch = (torch.randn(200, 3, dtype=torch.float64), torch.arange(200) % 2)
    data = FrozenData((batch,), (200,), 400, True, "-")
    half = hesscli.Problem(nn.Linear(3, 2).double(), "cross_entropy", data)
    result = hesscli.spectrum(half, k=1)
    assert result.status == "converged"  # all eigenvalues, but of half of the examples
    assert any("200 examples" in warning for warning in result.warnings)


def test_seeds_differ_and_repeat(relu: hesscli.Problem) -> None:
    runs = [hesscli.spectrum(relu, steps=12, probes=2, seed=seed) for seed in (5, 5, 6)]
    densities = [run.density for run in runs]
    assert densities[0] == densities[1]
    assert densities[0] != densities[2]


@pytest.mark.parametrize("mode", ["double-backward", "forward-over-reverse", "finite-difference"])
def test_every_mode_has_the_dense_matrix_s_eigenvalues(mode: str) -> None:
    """In float32, whose rounding is measured in float64 by the same mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    problem = hesscli.Problem(model, "cross_entropy", (torch.randn(24, 4), torch.arange(24) % 3))
    truth = torch.linalg.eigvalsh(hesscli.Hessian(problem).to_dense().double()).max().item()
    found = hesscli.spectrum(problem, mode=mode, steps=12, probes=1, k=1, budget=None)
    (largest,) = found.eigenvalues[:1]
    assert abs(largest.value - truth) <= largest.residual + 1e-5 * abs(truth)


@pytest.mark.parametrize("wrong", [{"k": 0}, {"steps": 0}, {"probes": 0}])
def test_numbers_from_one(relu: hesscli.Problem, wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=r"number from 1|start vector"):
        hesscli.spectrum(relu, **wrong)


# Memory.


def test_what_does_not_fit_is_refused_with_what_does(
    relu: hesscli.Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = relu.parameters.size * relu.dtype.itemsize * 30
    monkeypatch.setattr(spectral_study, "available_bytes", lambda *_: room)
    with pytest.raises(UsageError) as refusal:
        hesscli.spectrum(relu, steps=64)
    ways = "--steps 9 or --steps 27 --probes 1 or 6 ranks with as much memory each"
    assert refusal.value.hint == ways
    assert needed_bytes(relu, 64, 5, ranks=6) <= 27 / 30 * room < needed_bytes(relu, 64, 5, ranks=5)
    assert "64 steps" in refusal.value.got
    assert hesscli.spectrum(relu, steps=9).steps == 9
    assert hesscli.spectrum(relu, steps=27, probes=1).steps == 27


def test_steps_that_are_not_asked_for_fit_into_memory(
    relu: hesscli.Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 30 vectors nine tenths may be taken; later runs leave out 9, and make 8 of their own."""
    room = relu.parameters.size * relu.dtype.itemsize * 30
    monkeypatch.setattr(spectral_study, "available_bytes", lambda *_: room)
    (planned,) = (c for c in hesscli.check(relu).plan.commands if c.command == "spectrum")
    assert "9 steps for want of memory" in planned.note
    result = hesscli.spectrum(relu)
    assert result.steps == 9
    assert planned.products == result.cost.products
    assert any("9 steps" in warning for warning in result.warnings)


def test_steps_that_are_not_asked_for_leave_time_for_all_runs(
    relu: hesscli.Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By this clock a product takes 1000 s, and 60 fit: the first run is shorter, none missing."""
    now, late = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now() + late[0])

    def observe(snapshot: Snapshot) -> bool:
        late[0] += 1000.0 * (snapshot.phase == "iterating")
        return False

    result = hesscli.spectrum(relu, budget=60_000.0, observe=observe)
    assert 50 <= result.cost.products <= 60
    assert result.method.num_probes == 5
    assert any(f"{result.steps} steps" in warning for warning in result.warnings)
    late[0] = 0.0
    asked = hesscli.spectrum(relu, steps=64, budget=60_000.0, observe=observe)
    assert (asked.status, asked.method.num_probes) == ("budget", 1)


def test_the_plan_states_the_memory(relu: hesscli.Problem) -> None:
    (planned,) = (c for c in hesscli.check(relu).plan.commands if c.command == "spectrum")
    assert planned.products == PRODUCTS
    assert planned.peak_bytes >= 64 * relu.parameters.size * relu.dtype.itemsize
    assert "64 steps, each of which keeps a vector" in planned.note


def test_the_plan_counts_graphs_and_windows() -> None:
    """4096 examples keep at least what 32 units of each gave, and a window its 512 rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
    data = [(torch.randn(1024, 4), torch.randn(1024, 1)) for _ in range(4)]
    plan = hesscli.check(hesscli.Problem(model, "mse", data)).plan
    taken = {command.command: command.peak_bytes for command in plan.commands}
    rows = 512 * (4 * 32 + 32 + 32 + 1) * 4
    assert taken["ihvp"] - taken["trace"] >= rows
    assert taken["spectrum"] - taken["trace"] >= 4096 * 32 * 4


@pytest.mark.parametrize("room", [0, 1, 1 << 40])
def test_kept_graphs_change_nothing_but_the_cost(relu: hesscli.Problem, room: int) -> None:
    operator = hesscli.Hessian(relu)
    vector = torch.randn(relu.parameters.size, dtype=torch.float64)
    plain = operator.apply(vector[None])[0]
    rounding = relu.data.count * 2.0**-24 * float(plain.abs().max())  # float32 sums over examples
    retained, start = Retained(operator, room), operator.meter.gradients
    torch.testing.assert_close(retained(vector), plain, rtol=0, atol=rounding)
    first = operator.meter.gradients - start
    torch.testing.assert_close(retained(vector), plain, rtol=0, atol=rounding)
    assert operator.meter.gradients - start - first == pytest.approx(
        (2 if room > 1 else 3) + len(relu.joint()) * relu.vectors(1, 4)
    )
    retained.forget()
    torch.testing.assert_close(retained(vector), plain, rtol=0, atol=rounding)


@pytest.fixture(scope="module")
def single(relu: hesscli.Problem) -> hesscli.Problem:
    """In float32, where the rounding of products is measured."""
    return hesscli.Problem(relu.model, "cross_entropy", relu.data, dtype=torch.float32)


def test_kept_graphs_outlive_a_look_in_another_type(single: hesscli.Problem) -> None:
    """Autograd forgets leaves whose type changes meanwhile, and would give zeros in silence."""
    operator = hesscli.Hessian(single)
    vector = torch.randn(single.parameters.size, dtype=torch.float64)
    retained = Retained(operator, 1 << 40)
    before = retained(vector).clone()
    assert retained.rounding(vector[None] / vector.norm()) > 0
    rounding = single.data.count * 2.0**-24 * float(before.abs().max())
    torch.testing.assert_close(retained(vector), before, rtol=0, atol=rounding)
    term = next(iter(operator.batches()))
    row = vector[None].float()
    alone = term.apply(row)
    with single.in_dtype(torch.float64):
        pass
    torch.testing.assert_close(term.apply(row), alone, rtol=0, atol=rounding)


def test_the_density_counts_every_run(single: hesscli.Problem) -> None:
    """Rounding is measured between the first run and the short ones, on graphs that are kept."""
    found = hesscli.spectrum(single, steps=24, probes=4).functions.trace
    truth = float(hesscli.Hessian(single).to_dense().trace())
    assert found.stderr is not None
    assert abs(found.value - truth) <= 4 * found.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_eigenvalues_on_a_gpu() -> None:
    """An eigenvalue of either lies within both bars of the other's, and so do vectors' parts."""
    found = []
    for device in ("cpu", "cuda"):
        problem = hesscli.load(SAMPLES / "fashion" / "model.pt", device=device, examples=64)
        found.append(hesscli.spectrum(problem, steps=32, probes=3, k=5))
    for one, other in zip(*(run.eigenvalues[:5] for run in found), strict=True):
        assert abs(one.value - other.value) <= one.residual + other.residual
    for one, other in zip(*(run.layers for run in found), strict=True):
        np.testing.assert_allclose(one.participation[:5], other.participation[:5], atol=1e-2)


def test_the_line_is_honest(relu: hesscli.Problem) -> None:
    result = hesscli.spectrum(relu, steps=16, probes=2)
    assert isinstance(result, SpectrumResult)
    assert str(result).startswith("spectrum(hessian): an eigenvalue in ")
    assert "16 steps" in str(result)
    assert result.vectors == {}
