"""Sensitivity against dense matrices, naive twins, and the coverage of its error bars."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from scipy.special import stdtrit
from scipy.stats import binom, spearmanr
from torch import Tensor, nn

import hesscli
from hesscli.diagnostics.predictions import sampled_mean
from hesscli.diagnostics.saliency import GROUPS, Inverted, rank_correlation
from hesscli.diagnostics.window import block_sizes, layer_sizes
from hesscli.engines.diagonal import student_scale
from hesscli.engines.mfac import GradientWindow, StaticFisher
from hesscli.errors import UnsoundError, UsageError
from hesscli.operators.per_example.rows import Rows
from hesscli.parameters import Parameters
from hesscli.problem.freezing import FrozenData
from hesscli.problem.losses import StepLoss
from hesscli.results import IhvpResult, Snapshot
from hesscli.vocabulary import RowKind

if TYPE_CHECKING:
    from conftest import TimeIsUp


SAMPLES = Path(__file__).parents[1] / "samples"
ALL = 1e-12
"""A tolerance for which every batch is seen."""


@pytest.fixture(scope="module")
def problem() -> hesscli.Problem:
    return hesscli.load(SAMPLES / "sunspots/model.pt")


@pytest.fixture(scope="module")
def few(problem: hesscli.Problem) -> hesscli.Problem:
    """The same examples in four batches, for what sums over batches have no part in."""
    columns = zip(*problem.data.batches, strict=True)
    x, y = (torch.cat(column).split(64) for column in columns)
    data = FrozenData(tuple(zip(x, y, strict=True)), (64,) * 4, 256, True, "by hand")
    return hesscli.Problem(problem.model, "mse", data, weight_decay=problem.weight_decay)


@pytest.fixture(scope="module")
def result(problem: hesscli.Problem) -> IhvpResult:
    return hesscli.sensitivity(problem, rtol=ALL, verify=True, budget=None)


def flat(problem: hesscli.Problem) -> Tensor:
    return problem.parameters.flatten([t.detach().double() for t in problem.parameters.tensors])


def window_of(problem: hesscli.Problem, count: int) -> Tensor:
    return torch.cat(list(Rows(problem, RowKind("sampled")).take(count))).double()


def test_saliency_and_leverage_are_those_of_the_dense_blocks(
    problem: hesscli.Problem, result: IhvpResult
) -> None:
    rows = window_of(problem, 512).float().double()  # as the window keeps them
    fisher = rows.T @ rows / len(rows)
    damping = 1e-3 * float(fisher.trace()) / len(fisher)
    inverse = torch.zeros_like(fisher)
    start = 0
    for size in block_sizes(layer_sizes(problem.parameters), "auto", 512).tolist():
        place = slice(start, start + size)
        damped = fisher[place, place] + damping * torch.eye(size, dtype=torch.float64)
        inverse[place, place] = torch.linalg.inv(damped)
        start += size
    expected = flat(problem).square() / (2 * inverse.diagonal())
    found = np.concatenate([result.saliency[n].ravel() for n in problem.parameter_names])
    # The condition number of a damped block is at most d/1e-3.
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    leverage = 1 - damping * inverse.diagonal()
    for layer, place in zip(result.layers, places(problem), strict=True):
        assert layer.leverage == pytest.approx(float(leverage[place].median()), rel=1e-9)
        assert layer.saliency.mean == pytest.approx(float(expected[place].mean()), rel=1e-9)
        assert sum(layer.saliency.histogram.counts) == layer.num_parameters
    assert result.window.damping == pytest.approx(damping, rel=1e-9)


def places(problem: hesscli.Problem) -> list[slice]:
    found, start = [], 0
    for name in problem.layer_names:
        size = sum(p.numel for p in problem.parameters.in_layer(name))
        found.append(slice(start, start + size))
        start += size
    return found


def test_predictions_are_the_dense_quadratic_form(
    problem: hesscli.Problem, result: IhvpResult
) -> None:
    hessian = hesscli.Hessian(problem).to_dense()
    theta, gradient = flat(problem), problem.prove().gradient
    saliency = torch.from_numpy(
        np.concatenate([result.saliency[n].ravel() for n in problem.parameter_names])
    )
    for layer, place in zip(result.layers, places(problem), strict=True):
        for share in (0.1, 0.5, 0.9):
            change = next(c for c in layer.perturbations if (c.kind, c.level) == ("prune", share))
            delta = naive_pruning(problem, layer.name, theta, saliency, share)
            quadratic = float(delta @ hessian @ delta) / 2
            assert change.quadratic == pytest.approx(quadratic, rel=1e-9, abs=1e-14)
            assert change.linear == pytest.approx(float(gradient @ delta), rel=1e-6, abs=1e-14)
            assert change.squared_norm == pytest.approx(float(delta @ delta))
            trace = float(hessian.diagonal()[place].sum())
            size = place.stop - place.start
            # HAWQ's trace: of 8 probes where it is not exact.
            assert change.hawq == pytest.approx(
                trace / size * float(delta @ delta) / 2, rel=0.3, abs=1e-14
            )
            assert change.stderr == 0


def test_a_users_batch_is_one_graph_and_all_there_is() -> None:
    """What is cut for the sake of errors is joined again where nothing was left out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = torch.utils.data.TensorDataset(torch.randn(48, 4).double(), torch.randint(3, (48,)))
    problem = hesscli.Problem(model, "cross_entropy", data, batch_size=48)
    assert problem.num_batches == 16
    phases: list[float] = []
    found = hesscli.sensitivity(
        problem, observe=lambda s: phases.append(s.total or 0) if s.phase == "perturbing" else None
    )
    assert set(phases) == {1.0}
    dense, theta = hesscli.Hessian(problem).to_dense(), flat(problem)
    saliency = torch.from_numpy(
        np.concatenate([found.saliency[n].ravel() for n in problem.parameter_names])
    )
    for layer in found.layers:
        delta = naive_pruning(problem, layer.name, theta, saliency, 0.5)
        change = next(c for c in layer.perturbations if (c.kind, c.level) == ("prune", 0.5))
        assert change.quadratic == pytest.approx(float(delta @ dense @ delta) / 2, rel=1e-9)
        assert change.stderr == 0


def naive_pruning(
    problem: hesscli.Problem, layer: str, theta: Tensor, saliency: Tensor, share: float
) -> Tensor:
    """In a loop: the least salient weights of a layer's matrices, set to zero."""
    candidates: list[int] = []
    for parameter in problem.parameters.in_layer(layer):
        if parameter.tensor.dim() >= 2:
            candidates += range(parameter.offset, parameter.offset + parameter.numel)
    candidates.sort(key=lambda i: (float(saliency[i]), i))
    delta = torch.zeros_like(theta)
    for i in candidates[: round(share * len(candidates))]:
        delta[i] = -theta[i]
    return delta


def test_measured_losses_are_those_of_a_changed_copy(
    problem: hesscli.Problem, result: IhvpResult
) -> None:
    theta = flat(problem)
    saliency = torch.from_numpy(
        np.concatenate([result.saliency[n].ravel() for n in problem.parameter_names])
    )
    layer = result.layers[0]
    change = next(c for c in layer.perturbations if (c.kind, c.level) == ("prune", 0.5))
    delta = naive_pruning(problem, layer.name, theta, saliency, 0.5)
    for scaled in change.changes:
        model = copy.deepcopy(problem.model)
        with torch.no_grad():
            for p, part in zip(
                model.parameters(), problem.parameters.split(scaled.scale * delta), strict=True
            ):
                p += part
        changed = hesscli.Problem(
            model, problem.loss, problem.data, weight_decay=problem.weight_decay
        )
        difference = changed.prove().loss - problem.prove().loss
        assert scaled.measured == pytest.approx(difference, rel=1e-10)
    assert change.measured == change.changes[0].measured


def test_errors_of_a_smooth_network_fall_with_the_third_power(result: IhvpResult) -> None:
    """What the quadratic leaves is of third order; at a quarter it is small."""
    small = [
        c
        for layer in result.layers
        for c in layer.perturbations
        if c.kind == "round" and c.level >= 6 and c.order is not None
    ]
    assert len(small) >= 6
    assert np.median([c.order for c in small if c.order is not None]) == pytest.approx(3, abs=0.3)
    for change in small:
        quarter = change.changes[-1]
        size = abs(change.linear) / 4 + abs(change.quadratic) / 16
        assert abs(quarter.measured - quarter.predicted) <= 0.1 * size


def test_weights_are_the_same_bytes_afterwards(
    problem: hesscli.Problem, result: IhvpResult
) -> None:
    before = hesscli.load(SAMPLES / "sunspots/model.pt")
    for name, tensor in before.model.state_dict().items():
        assert torch.equal(tensor, problem.model.state_dict()[name]), name


@pytest.mark.parametrize("available", [16, 64])
@pytest.mark.parametrize("seen", [4, 8, 16])
def test_standard_errors_of_predictions_hold(seen: int, available: int) -> None:
    """±1.96 of them as scaled, from some of 16 kept batches: 93 to 97% of 2,000 draws.

    The linear term is of all kept batches and goes against the quadratic one, as it does where a
    network has been trained.
    """
    generator, draws, missed = np.random.default_rng(0), 2000, 0
    for _ in range(draws):
        weights = generator.uniform(0.5, 1.5, available)
        quadratic = generator.normal(3, 1, available) + generator.normal(0, 0.2, available)
        linear = generator.normal(0, 1, available) - quadratic / 2
        truth = weights @ (quadratic + linear) / weights.sum()
        probed = weights[:seen].sum() / weights[:16].sum()
        mean, error = sampled_mean(
            quadratic[:seen, None],
            None if available == 16 else linear[:seen, None],
            weights[:seen],
            probed,
            probed * 16 / available,
        )
        known = weights[:16] @ linear[:16] / weights[:16].sum()
        bar = 1.96 * student_scale(seen - 1) * error[0]
        missed += abs(mean[0] + known - truth) > bar + 1e-12
    if seen == available:
        assert missed == 0
    else:
        assert binom.cdf(missed, draws, 0.07) < 1 - 1e-3
        assert binom.sf(missed, draws, 0.03) < 1 - 1e-3


@pytest.mark.parametrize("relative", [1e-3, 1e-1])
def test_standard_errors_of_saliencies_hold(relative: float) -> None:
    """Against the spread over 150 windows of rows with heavy tails, four layers each."""
    torch.manual_seed(0)
    rows, width, windows = 128, 32, 150
    size = 4 * width
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    root = basis * torch.logspace(-1.5, 0, size, dtype=torch.float64)
    damping = relative * 2 * float(root.square().sum()) / size
    weights, sizes = torch.randn(size, dtype=torch.float64), np.full(4, width)
    layers = [slice(i * width, (i + 1) * width) for i in range(4)]
    logs, errors, above = [], [], []
    for _ in range(windows):
        scale = torch.distributions.Exponential(1.0).sample((rows, 1)).double()
        with GradientWindow(rows, size, dtype=torch.float64) as window:
            window.extend(scale * torch.randn(rows, size, dtype=torch.float64) @ root.T)
            fisher = StaticFisher(window, damping, blocks=sizes)
            collected: Any = SimpleNamespace(window=window, fisher=fisher, sizes=sizes)
            inverted = Inverted(collected, weights, layers)
            for _ in inverted.steps():
                pass
            ranked = inverted.ranked
            means = np.array([float(ranked.saliency[layer].mean()) for layer in layers])
        logs.append(np.log(means))
        errors.append(ranked.repeats.relative_errors())
        above.append(ranked.repeats.above(means))
    off = np.abs(np.array(logs) - np.mean(logs, 0)) / np.array(errors)
    missed = int((off > stdtrit(GROUPS - 1, 0.975)).sum())
    # Layers share rows and the mean is the windows' own: a band around 5% at level 1e-3.
    assert binom.cdf(missed, windows * 4, 0.08) < 1 - 1e-3
    assert binom.sf(missed, windows * 4, 0.025) < 1 - 1e-3
    matrix = np.array(above)
    np.testing.assert_allclose(matrix + matrix.transpose(0, 2, 1), 1.0, atol=1e-12)


def test_a_ranking_says_how_sure_it_is(result: IhvpResult) -> None:
    ranking = result.ranking
    assert ranking is not None
    by_rank = sorted(result.layers, key=lambda layer: layer.rank)
    assert tuple(layer.name for layer in by_rank) == ranking.layers
    means = [layer.saliency.mean for layer in by_rank]
    assert means == sorted(means, reverse=True)
    assert by_rank[0].above_next == ranking.above[0][1]
    assert by_rank[-1].above_next is None
    assert 0.9 < (ranking.half_correlation or 0) <= 1


def test_residuals_and_the_sweep_against_dense_matrices(few: hesscli.Problem) -> None:
    torch.manual_seed(3)
    x = torch.randn(few.parameters.size, dtype=torch.float64)
    options = hesscli.WindowOptions(size=100, blocks="whole", dtype="float64")
    result = hesscli.ihvp(few, x, window=options)
    rows = window_of(few, 100)
    identity = torch.eye(len(x), dtype=torch.float64)
    damped = rows.T @ rows / 100 + result.window.damping * identity
    y = torch.from_numpy(np.concatenate([v.ravel() for v in result.direction.values()]))
    torch.testing.assert_close(y, torch.linalg.solve(damped, x), rtol=1e-7, atol=1e-9 * y.norm())
    hessian = hesscli.Hessian(few).to_dense() + result.window.damping * identity
    off = float((hessian @ y - x).norm() / x.norm())
    assert result.residual.operator == pytest.approx(off, rel=1e-7)
    assert result.residual.window is not None
    assert result.residual.window < 1e-8
    projector = torch.linalg.pinv(rows) @ rows
    previous = None
    for point in reversed(result.sweep):
        fisher = rows.T @ rows / 100 + point.absolute * identity
        direction = torch.linalg.solve(fisher, x)
        share = float((projector @ direction).norm() / direction.norm())
        assert point.span_share == pytest.approx(share, rel=1e-5)
        inverse = torch.linalg.inv(fisher)
        leverage = float((1 - point.absolute * inverse.diagonal()).median())
        assert point.leverage == pytest.approx(leverage, rel=1e-5, abs=1e-8)
        if previous is not None:
            cosine = float(torch.cosine_similarity(direction, previous, dim=0))
            assert point.cosine == pytest.approx(cosine, rel=1e-6)
        previous = direction


def test_refinement_reaches_its_tolerance_and_says_where_it_cannot(few: hesscli.Problem) -> None:
    torch.manual_seed(3)
    x = torch.randn(few.parameters.size, dtype=torch.float64)
    window = hesscli.WindowOptions(damping=1.0)
    found = hesscli.ihvp(few, x, matrix="ggn", window=window, refine=1e-3)
    refinement = found.solve.refinement
    assert refinement is not None
    assert refinement.converged
    assert found.status == "converged"
    y = torch.from_numpy(np.concatenate([v.ravel() for v in found.direction.values()]))
    matrix = hesscli.GaussNewton(few).to_dense()
    off = (matrix @ y + found.window.damping * y - x).norm() / x.norm()
    assert float(off) <= 1.001e-3


def untrained() -> hesscli.Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    data = torch.utils.data.TensorDataset(
        5 * torch.randn(96, 6, dtype=torch.float64), torch.randint(3, (96,))
    )
    return hesscli.Problem(model, "cross_entropy", data)


def test_negative_curvature_is_named() -> None:
    problem = untrained()
    hessian = hesscli.Hessian(problem).to_dense()
    assert torch.linalg.eigvalsh(hessian)[0] < -1e-3  # or there were nothing to find
    torch.manual_seed(1)
    x = torch.randn(problem.parameters.size, dtype=torch.float64)
    found = hesscli.ihvp(problem, x, refine=1e-10)
    refinement = found.solve.refinement
    assert refinement is not None
    assert refinement.negative_curvature is not None
    assert refinement.negative_curvature < 0
    assert found.status == "budget"
    assert any("negative curvature" in text for text in found.warnings)


def test_low_leverage_is_called_magnitude() -> None:
    found = hesscli.sensitivity(untrained(), window=hesscli.WindowOptions(damping=100.0))
    assert all(layer.leverage < 0.5 for layer in found.layers)
    assert all((layer.magnitude_correlation or 0) > 0.99 for layer in found.layers)
    assert any("this ranking is magnitude" in text for text in found.warnings)


def test_a_stop_leaves_what_was_known(
    problem: hesscli.Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(problem.__dict__, "_joint", {1: tuple((i,) for i in problem.indices)})
    seen: list[str] = []

    def stop(snapshot: Snapshot) -> bool:
        seen.append(snapshot.phase)
        return snapshot.phase == "perturbing" and (snapshot.done or 0) > 3

    found = hesscli.sensitivity(problem, rtol=ALL, observe=stop)
    assert found.status == "interrupted"
    assert found.ranking is not None
    change = found.layers[0].perturbations[1]
    assert change.stderr > 0
    with pytest.raises(KeyboardInterrupt):
        hesscli.sensitivity(problem, observe=lambda s: s.phase == "collecting gradients")


@pytest.mark.parametrize("phase", ["ranking", "probing", "perturbing"])
def test_the_budget_ends_a_run_with_a_result(
    problem: hesscli.Problem, time_is_up_when: TimeIsUp, phase: str
) -> None:
    """With what there is by then, and a line on what there is not."""
    late = time_is_up_when(lambda snapshot: snapshot.phase == phase)
    found = hesscli.sensitivity(problem, rtol=ALL, verify=True, observe=late)
    assert found.status == "budget"
    assert found.solve.norm > 0
    assert all(c.measured is None for layer in found.layers for c in layer.perturbations)
    missing = "ranking" if phase == "ranking" else "predictions"
    assert any(f"no time for {'a ' * (missing == 'ranking')}{missing}" in w for w in found.warnings)
    assert (found.ranking is None) == (phase == "ranking")


def test_losses_that_there_was_time_to_measure_are_kept(
    problem: hesscli.Problem, result: IhvpResult, time_is_up_when: TimeIsUp
) -> None:
    """With what is said of them, and how many there are not."""
    late = time_is_up_when(lambda s: s.phase == "verifying" and (s.done or 0) >= 3)
    found = hesscli.sensitivity(problem, rtol=ALL, verify=True, observe=late)
    assert found.status == "budget"
    changes = {c for layer in found.layers for c in layer.perturbations}
    whole = {c for layer in result.layers for c in layer.perturbations}
    measured = {change for change in changes if change.measured is not None}
    assert len(measured) == 3
    assert measured <= whole
    wanted = f"no time to measure {len(whole) - 3} of {len(whole)} losses"
    assert any(warning.startswith(wanted) for warning in found.warnings)


def test_few_rows_do_where_time_is_short(
    problem: hesscli.Problem, time_is_up_when: TimeIsUp
) -> None:
    """The clock jumps by 1e9 seconds while rows are collected: a tenth of a budget, or half."""

    def rows(budget: float) -> int:
        late = time_is_up_when(lambda s: s.phase == "collecting gradients" and (s.done or 0) >= 40)
        found = hesscli.sensitivity(problem, budget=budget, observe=late)
        told = any("no time for more than" in warning for warning in found.warnings)
        assert told == (found.window.rows < 512)
        return found.window.rows

    assert rows(1e10) == 512
    assert 40 <= rows(2e9) < 512


def test_zero_gradients_are_named() -> None:
    model = nn.Linear(3, 1).double()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    data = torch.utils.data.TensorDataset(
        torch.randn(64, 3, dtype=torch.float64), torch.zeros(64, 1, dtype=torch.float64)
    )
    problem = hesscli.Problem(model, "mse", data)
    rows = hesscli.WindowOptions(rows="example")
    with pytest.raises(UnsoundError, match="all gradients in the window are zero"):
        hesscli.sensitivity(problem, window=rows)
    absolute = hesscli.WindowOptions(rows="example", damping=0.5, absolute=True)
    found = hesscli.ihvp(problem, torch.ones(4, dtype=torch.float64), window=absolute)
    assert found.solve.norm == pytest.approx(4.0)  # x / λ
    assert hesscli.sensitivity(problem, window=absolute).residual.operator is None  # no gradient


@pytest.mark.parametrize("damping", [0.0, -1.0, math.inf, math.nan])
def test_dampings_that_cannot_be(damping: float) -> None:
    with pytest.raises(UsageError, match="--damping"):
        hesscli.WindowOptions(damping=damping)


def test_a_dtype_that_no_window_has() -> None:
    with pytest.raises(UsageError, match="bfloat16"):
        hesscli.WindowOptions(dtype="float16")


@pytest.mark.parametrize("matrix", ["ggn", "empirical-fisher"])
def test_other_matrices_predict_by_their_own_form(few: hesscli.Problem, matrix: str) -> None:
    found = hesscli.sensitivity(few, matrix=matrix, rtol=ALL)
    make = {"ggn": hesscli.GaussNewton, "empirical-fisher": hesscli.EmpiricalFisher}[matrix]
    dense, theta = make(few).to_dense(), flat(few)
    saliency = torch.from_numpy(
        np.concatenate([found.saliency[n].ravel() for n in few.parameter_names])
    )
    delta = naive_pruning(few, "hidden1", theta, saliency, 0.5)
    change = next(c for c in found.layers[0].perturbations if (c.kind, c.level) == ("prune", 0.5))
    assert change.quadratic == pytest.approx(float(delta @ dense @ delta) / 2, rel=1e-8)


def test_coupled_examples_make_rows_of_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).train()
    data = torch.utils.data.TensorDataset(torch.randn(256, 4), torch.randint(2, (256,)))
    problem = hesscli.Problem(model, "cross_entropy", data, batch_size=16)
    found = hesscli.sensitivity(problem, rtol=ALL, verify=True)
    assert found.window.row_kind == "microbatch:16"
    assert found.window.rows == 16
    assert any("BatchNorm1d" in text for text in found.warnings)
    rounded = [c for c in found.layers[0].perturbations if (c.kind, c.level) == ("round", 8)]
    for change in rounded:
        quarter = change.changes[-1]
        size = abs(change.linear) / 4 + abs(change.quadratic) / 16
        assert abs(quarter.measured - quarter.predicted) <= 0.1 * size


def test_too_few_rows_give_no_ranking(problem: hesscli.Problem) -> None:
    with pytest.raises(UsageError, match="16 rows"):
        hesscli.sensitivity(problem, window=hesscli.WindowOptions(size=8))
    found = hesscli.ihvp(problem, window=hesscli.WindowOptions(size=8))
    assert found.window.rows == 8


@pytest.mark.parametrize("seed", range(4))
def test_where_the_matrix_curves_down_there_is_a_y_and_its_own_residual(seed: int) -> None:
    """One example's Hessian + λI is indefinite: conjugate gradients may come no nearer than 0."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    problem = hesscli.Problem(model, nn.MSELoss(), [(torch.randn(1, 3), torch.randn(1, 1))])
    matrix = hesscli.Hessian(problem).to_dense().double() + 1e-3 * torch.eye(16)
    assert float(torch.linalg.eigvalsh(matrix)[0]) < 0
    right = torch.randn(16, dtype=torch.float64)
    run = hesscli.ihvp(
        problem,
        right,
        refine=1e-8,
        window=hesscli.WindowOptions(
            size=64, dtype="float64", blocks="whole", damping=1e-3, absolute=True
        ),
    )
    y = torch.cat([torch.from_numpy(part).reshape(-1).double() for part in run.direction.values()])
    left = float((matrix @ y - right).norm() / right.norm())
    assert float(y.norm()) > 0
    assert run.residual.operator == pytest.approx(left, rel=1e-6)
    assert run.solve.refinement is not None
    assert run.solve.refinement.residual == run.residual.operator
    assert run.solve.refinement.converged == (left <= 1e-8)


@pytest.mark.parametrize("seeds", [3, pytest.param(60, marks=pytest.mark.study)])
def test_predictions_from_a_quarter_of_the_examples_hold(seeds: int) -> None:
    """Against gᵀδ + ½ δᵀHδ over all 200 examples, δ pruning a half; densely, in float64."""
    torch.manual_seed(0)
    x, y = torch.randn(200, 4).double(), torch.randint(0, 3, (200,))
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    data = torch.utils.data.TensorDataset(x, y)
    whole = hesscli.Problem(model, "cross_entropy", data, examples="all")
    hessian = hesscli.Hessian(whole).to_dense()
    gradient = whole.prove().gradient
    theta = flat(whole)
    held, errors = [], []
    for seed in range(seeds):
        part = hesscli.Problem(model, "cross_entropy", data, examples=50, seed=seed)
        run = hesscli.sensitivity(part, window=hesscli.WindowOptions(size=32), seed=seed)
        assert run.status == "data-limited"  # with three quarters left out, 20% is out of reach
        for layer, place in zip(run.layers, places(part), strict=True):
            size = next(p.shape[0] * p.shape[1] for p in layer.parameters if len(p.shape) == 2)
            change = next(c for c in layer.perturbations if (c.kind, c.level) == ("prune", 0.5))
            least = np.argsort(run.saliency[f"{layer.name}.weight"].ravel(), kind="stable")
            chosen = place.start + least[: round(0.5 * size)].copy()
            delta = torch.zeros_like(theta)
            delta[chosen] = -theta[chosen]
            assert change.squared_norm == pytest.approx(float(delta @ delta))
            truth = float(gradient @ delta + delta @ hessian @ delta / 2)
            errors.append(change.stderr)
            held.append(abs(change.linear + change.quadratic - truth) <= 1.96 * change.stderr)
    assert min(errors) > 0
    # Two layers of a run share its examples: as many independent draws as runs, at worst.
    assert np.mean(held) >= binom.ppf(1e-3, seeds, 0.93) / seeds


def test_rows_that_are_not_to_be_had_are_planned_and_told() -> None:
    """A step's rows are its batches: eight of them rank nothing, and no larger window helps."""

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    torch.manual_seed(0)
    batches = [(torch.randn(1, 4), torch.randn(1, 1)) for _ in range(8)]
    problem = hesscli.Problem(nn.Linear(4, 1), StepLoss(step, "step"), batches)
    (planned,) = (p for p in hesscli.check(problem).plan.commands if p.command == "ihvp")
    assert planned.note.startswith("refused: ")
    assert "16 rows, 8 rows" in planned.note
    assert planned.gradients == 0
    with pytest.raises(UsageError, match="16 rows") as raised:
        hesscli.sensitivity(problem)
    assert "16 batches" in raised.value.hint


@pytest.mark.parametrize("kinds", [3, 1000])
def test_rank_correlation_is_spearmans(kinds: int) -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randint(kinds, (50,), generator=generator).double()  # with ties, and without
    other = one + torch.randn(50, generator=generator) * kinds / 3
    found = rank_correlation(one, other)
    assert found == pytest.approx(float(spearmanr(one, other).statistic), rel=1e-12)
    assert rank_correlation(one, torch.ones(50)) is None


def test_blocks_make_up_the_layers_whatever_their_sizes() -> None:
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))  # 40 and 18 weights
    layers = layer_sizes(Parameters.of(model))
    assert block_sizes(layers, "auto", 64).tolist() == [16, 16, 8, 16, 2]  # a quarter of them
    assert block_sizes(layers, "auto", 3).tolist() == [1] * 58
    assert block_sizes(layers, "layer", 64).tolist() == [40, 18]
    assert block_sizes(layers, "20", 64).tolist() == [20, 20, 18]
    assert block_sizes(layers, "whole", 64) is None
