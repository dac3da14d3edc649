"""hesscli.trace by probes end to end: coverage, stopping, interruption, memory."""

from __future__ import annotations

import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from scipy.stats import t as student
from torch import nn

import hesscli
from hesscli.diagnostics import estimation
from hesscli.errors import BudgetError, UsageError
from hesscli.problem.freezing import FrozenData
from hesscli.problem.sources import TensorRows
from hesscli.results import Snapshot, TraceResult

if TYPE_CHECKING:
    from conftest import TimeIsUp


SAMPLES = Path(__file__).parents[1] / "samples"
SEEDS = 200
LEVEL = 1e-3

probed = partial(hesscli.trace, method="hutchinson")


@pytest.fixture(scope="module")
def sunspots() -> hesscli.Problem:
    return hesscli.load(SAMPLES / "sunspots" / "model.pt", examples="all")


@pytest.fixture(scope="module")
def relu() -> hesscli.Problem:
    """A small ReLU classifier after a little training, whose 200 examples are all it has."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
    x = torch.randn(200, 6)
    y = (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 1).long()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return hesscli.Problem(model, "cross_entropy", TensorRows(x, y))


def in_four(problem: hesscli.Problem, loss: str) -> hesscli.Problem:
    """The same examples in four batches, so that many seeds are cheap."""
    size = problem.data.count // 4
    columns = zip(*problem.data.batches, strict=True)
    x, y = (torch.cat(column).split(size) for column in columns)
    data = FrozenData(tuple(zip(x, y, strict=True)), (size,) * 4, 4 * size, True, "by hand")
    return hesscli.Problem(problem.model, loss, data, weight_decay=problem.weight_decay)


@pytest.fixture(scope="module")
def few_sunspots(sunspots: hesscli.Problem) -> hesscli.Problem:
    return in_four(sunspots, "mse")


@pytest.fixture(scope="module")
def few_relu(relu: hesscli.Problem) -> hesscli.Problem:
    return in_four(relu, "cross_entropy")


def layer_traces(problem: hesscli.Problem, matrix: type = hesscli.Hessian) -> dict[str, float]:
    """By layer, from the dense float64 matrix."""
    with problem.in_dtype(torch.float64):
        diagonal = matrix(problem).to_dense().diagonal()
    pieces = diagonal.split([p.numel for p in problem.parameters])
    traces = dict.fromkeys(problem.layer_names, 0.0)
    for parameter, piece in zip(problem.parameters, pieces, strict=True):
        traces[parameter.layer] += float(piece.sum())
    return traces


@pytest.mark.parametrize(
    ("name", "design", "probes"),
    [
        ("few_sunspots", "fresh", 2),
        pytest.param("few_sunspots", "shared", 16, marks=pytest.mark.study),
        pytest.param("few_relu", "fresh", 2, marks=pytest.mark.study),
        pytest.param("few_relu", "shared", 8, marks=pytest.mark.study),
    ],
)
def test_coverage_end_to_end(
    name: str, design: str, probes: int, request: pytest.FixtureRequest
) -> None:
    """93 to 97% of the intervals of 200 seeds hold the dense truth, pooled over layers and total.

    Layers of one run share probes, so the pooled rate is as uncertain as one of 200 at most.
    """
    problem = request.getfixturevalue(name)
    truth = layer_traces(problem)
    hits = []
    for seed in range(SEEDS):
        result = probed(problem, probes=probes, probe_design=design, seed=seed)
        found = [
            layer.interval[0] <= truth[layer.name] <= layer.interval[1] for layer in result.layers
        ]
        low, high = result.trace.interval
        hits.append(np.mean([*found, low <= sum(truth.values()) <= high]))
    tail = LEVEL / 4 / 2
    assert np.mean(hits) >= binom.ppf(tail, SEEDS, 0.93) / SEEDS
    assert np.mean(hits) <= binom.ppf(1 - tail, SEEDS, 0.97) / SEEDS


@pytest.mark.study
def test_coverage_from_a_quarter_of_the_examples(relu: hesscli.Problem) -> None:
    """The interval is for the whole loader: probe noise, and data noise of the 75% left out."""
    truth = sum(layer_traces(relu).values())
    rows = TensorRows(
        torch.cat([b.data[0] for b in relu.batches()]),
        torch.cat([b.data[1] for b in relu.batches()]),
    )
    hits, stderrs = 0, []
    for seed in range(SEEDS):
        part = hesscli.Problem(relu.model, "cross_entropy", rows, examples=50, seed=seed)
        result = probed(part, probes=2, seed=seed)
        low, high = result.trace.interval
        hits += low <= truth <= high
        stderrs.append((result.trace.data_stderr, result.trace.probe_stderr))
    assert hits / SEEDS >= binom.ppf(LEVEL / 2, SEEDS, 0.9) / SEEDS
    data, probe = np.mean(stderrs, axis=0)
    assert data > 0
    assert probe > 0


@pytest.mark.parametrize(
    ("matrix", "operator"),
    [
        ("ggn", hesscli.GaussNewton),
        ("fisher", hesscli.Fisher),
        ("empirical-fisher", hesscli.EmpiricalFisher),
    ],
)
def test_other_matrices(relu: hesscli.Problem, matrix: str, operator: type) -> None:
    truth = layer_traces(relu, operator)
    result = probed(relu, matrix=matrix, probes=8, seed=1)
    assert result.problem.matrix == matrix
    # Ten standard errors: a test of the right matrix, not of luck.
    assert abs(result.trace.estimate - sum(truth.values())) < 10 * result.trace.probe_stderr


def test_tolerance_is_met_and_said(few_sunspots: hesscli.Problem) -> None:
    result = probed(few_sunspots, rtol=0.2, seed=3)
    truth = sum(layer_traces(few_sunspots).values())
    low, high = result.trace.interval
    assert result.status == "converged"
    assert high - low <= 2 * 0.2 * abs(truth)
    assert low <= truth <= high
    assert result.method.probe_design == "fresh"
    assert result.trace.data_stderr is not None
    assert result.trace.population_interval is None
    assert str(result).startswith("trace(hessian) = ")


def test_weight_decay_is_added_exactly(relu: hesscli.Problem) -> None:
    rows = TensorRows(*next(relu.batches()).data)
    plain = probed(hesscli.Problem(relu.model, "cross_entropy", rows), probes=2)
    decayed = probed(hesscli.Problem(relu.model, "cross_entropy", rows, weight_decay=0.5), probes=2)
    added = 0.5 * relu.parameters.size
    assert decayed.trace.estimate - plain.trace.estimate == pytest.approx(added, rel=1e-12)
    assert decayed.trace.probe_stderr == plain.trace.probe_stderr


def test_probe_ranges_join(relu: hesscli.Problem) -> None:
    """Probes a:b are the same probes that one long run would have drawn."""
    whole = probed(relu, probes=8).trace.estimate
    parts = [probed(relu, probes=(a, a + 4)).trace.estimate for a in (0, 4)]
    assert np.mean(parts) == pytest.approx(whole, rel=1e-12)
    assert parts[0] != parts[1]


def test_ranges_of_random_columns_join() -> None:
    """Columns of the output Hessian are numbered as probes are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 40))
    rows = [(torch.randn(3), torch.randn(40)) for _ in range(20)]
    problem = hesscli.Problem(model.double(), "mse", rows)
    split = partial(hesscli.trace, problem, matrix="ggn", method="split", budget=None)
    whole = split(probes=8).trace.estimate
    parts = [split(probes=(a, a + 4)).trace.estimate for a in (0, 4)]
    assert np.mean(parts) == pytest.approx(whole, rel=1e-12)
    assert parts[0] != parts[1]


GROUPS = 6


def grouped(count: int) -> hesscli.Problem:
    """Linear regression: the trace of a batch's Hessian is the mean square of its inputs."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    pairs = tuple(
        (torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64))
        for _ in range(count)
    )
    return hesscli.Problem(model, "mse", FrozenData(pairs, (4,) * count, 4 * count, True, "own"))


def test_a_range_of_batches_speaks_of_all_with_the_noise_of_a_sample() -> None:
    problem = grouped(2 * GROUPS)
    inputs = torch.stack([batch[0] for batch in problem.data.batches])
    traces = 2 * (inputs.square().sum(2).mean(1) + 1).numpy()  # d²/dθ² of a square is 2
    for first in (0, GROUPS):
        result = hesscli.trace(problem, batches=(first, first + GROUPS), budget=None)
        own = traces[first : first + GROUPS]
        width = student.isf(0.025, GROUPS - 1) * (own.var(ddof=1) / GROUPS / 2) ** 0.5
        low, high = result.trace.interval
        assert result.trace.estimate == pytest.approx(own.mean(), rel=1e-12)
        assert (high - low) / 2 == pytest.approx(width, rel=1e-9)
        assert result.status != "exact"
        assert any(f"{GROUPS} of {2 * GROUPS} batches" in told for told in result.warnings)
        assert result.method.batches_measured == GROUPS
        assert result.problem == hesscli.trace(problem).problem
    whole = hesscli.trace(problem)
    assert whole.method.batches_measured is None
    assert whole.status == "exact"
    assert not whole.warnings


def test_ranges_of_batches_join() -> None:
    """Each has the probes that it has in a run over all."""
    problem = grouped(GROUPS)
    drawn = partial(hesscli.trace, problem, method="hutchinson", probes=4, budget=None)
    parts = [drawn(batches=pair).trace.estimate for pair in ((0, 2), (2, GROUPS))]
    mean = (2 * parts[0] + (GROUPS - 2) * parts[1]) / GROUPS
    assert mean == pytest.approx(drawn().trace.estimate, rel=1e-12)


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ({"batches": (0, GROUPS + 1)}, "one of those that there are"),
        ({"batches": (3, 3)}, "one of those that there are"),
        ({"batches": (0, 2), "method": "hutchinson"}, "needs a number"),
        ({"batches": (0, 2), "method": "deflated", "probes": 4}, "cannot be deflated"),
    ],
)
def test_ranges_that_mean_nothing_are_refused(how: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        hesscli.trace(grouped(GROUPS), **how)


def test_seeds_differ_and_repeat(relu: hesscli.Problem) -> None:
    runs = [probed(relu, probes=2, seed=seed).trace for seed in (5, 5, 6)]
    assert runs[0] == runs[1]
    assert runs[0].estimate != runs[2].estimate


def test_budget_ends_a_run(relu: hesscli.Problem, time_is_up_when: TimeIsUp) -> None:
    """In the middle of a round, what there is of it counts; there is no 1e-6 to be had."""
    seen: list[Snapshot] = []

    def sixth(snapshot: Snapshot) -> bool:
        seen.append(snapshot)
        return sum(s.phase == "probing" for s in seen) >= 6

    result = probed(relu, rtol=1e-6, observe=time_is_up_when(sixth))
    assert result.status == "budget"
    assert all(layer.status == "budget" for layer in result.layers)
    assert sum(s.phase == "probing" for s in seen) == 6


@pytest.mark.parametrize("phase", ["preflight", "probing"])
def test_a_budget_too_small_says_what_would_do(
    relu: hesscli.Problem, time_is_up_when: TimeIsUp, phase: str
) -> None:
    with pytest.raises(BudgetError) as raised:
        probed(relu, observe=time_is_up_when(lambda snapshot: snapshot.phase == phase))
    assert raised.value.exit_code == 5
    assert phase in raised.value.got
    assert "--budget" in raised.value.hint


def test_a_number_of_probes_cut_short_keeps_half(
    relu: hesscli.Problem, time_is_up_when: TimeIsUp
) -> None:
    late = time_is_up_when(lambda s: s.phase == "probing" and (s.done or 0) >= 60)
    result = probed(relu, rtol=1e-9, probes=100_000, observe=late)
    assert result.status == "budget"
    assert 16 <= result.method.num_probes < 100


def test_data_limited(relu: hesscli.Problem) -> None:
    """A tenth of the examples cannot give 1%, and no probe will: the run says so and stops."""
    rows = TensorRows(
        torch.cat([b.data[0] for b in relu.batches()]),
        torch.cat([b.data[1] for b in relu.batches()]),
    )
    part = hesscli.Problem(relu.model, "cross_entropy", rows, examples=32)
    result = probed(part, rtol=0.01, budget=None)
    assert result.status == "data-limited"
    assert any("--examples" in warning for warning in result.warnings)


@pytest.mark.parametrize("after", [1, 6, 40])
def test_the_observer_can_stop_a_run(relu: hesscli.Problem, after: int) -> None:
    """In the middle of the first round, that is a sample of the batches; none yet: no result."""
    seen: list[Snapshot] = []

    def observe(snapshot: Snapshot) -> bool:
        seen.append(snapshot)
        return sum(s.phase == "probing" for s in seen) >= after

    if after == 1:
        with pytest.raises(KeyboardInterrupt):
            probed(relu, rtol=1e-6, observe=observe)
        return
    result = probed(relu, rtol=1e-6, observe=observe)
    assert result.status == "interrupted"
    truth = sum(layer_traces(relu).values())
    low, high = result.trace.interval
    assert low <= truth <= high
    assert [s.phase for s in seen if s.phase != "probing"][-1] == "choosing a method"


def test_progress_tells_the_truth(relu: hesscli.Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done never exceeds what is expected by the end, and the end is where it was said.

    The table is read at every step, on a fast machine as on a slow one.
    """
    monkeypatch.setattr(estimation, "_SHOW_EVERY", -1.0)
    seen: list[Snapshot] = []
    probed(relu, rtol=0.05, observe=lambda s: bool(seen.append(s)))
    probing = [s for s in seen if s.phase == "probing"]
    done = [s.done for s in probing]
    assert done == sorted(done)
    rounding = len(done) * 2.0**-52  # what is done is a sum of as many shares
    assert all(s.total is None or s.done <= s.total * (1 + rounding) for s in probing)
    assert probing[-1].total == pytest.approx(done[-1], rel=rounding)
    assert probing[-1].interval is not None


def test_a_stream_that_was_not_read_to_its_end(relu: hesscli.Problem) -> None:
    batches = [b.data for b in relu.batches()]
    part = hesscli.Problem(relu.model, "cross_entropy", iter(batches), examples="first:64")
    result = probed(part, probes=2)
    assert result.problem.num_examples_available is None
    assert result.trace.data_stderr is None
    assert any("kept" in warning for warning in result.warnings)


def test_population_interval_needs_unseen_examples(relu: hesscli.Problem) -> None:
    rows = TensorRows(*next(relu.batches()).data)
    result = probed(hesscli.Problem(relu.model, "cross_entropy", rows, unseen=True), probes=4)
    assert result.trace.population_interval is not None
    inner, outer = result.trace.interval, result.trace.population_interval
    assert outer[0] < inner[0] < inner[1] < outer[1]


def test_one_probe_is_no_error_bar(relu: hesscli.Problem) -> None:
    with pytest.raises(UsageError, match="two probes"):
        probed(relu, probes=1)


def test_nothing_of_the_model_changes(relu: hesscli.Problem) -> None:
    before = {name: t.clone() for name, t in relu.model.state_dict().items()}
    state = torch.random.get_rng_state()
    probed(relu, probes=2)
    assert all(torch.equal(t, before[name]) for name, t in relu.model.state_dict().items())
    assert all(p.grad is None for p in relu.model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


MEMORY = """
import resource, sys, torch, hesscli
from hesscli.problem.freezing import FrozenData
from hesscli.problem.sources import TensorRows
torch.set_num_threads(1)
torch.manual_seed(0)
hidden = [torch.nn.Linear(32, 32), torch.nn.Tanh()] * 4
model = torch.nn.Sequential(*hidden, torch.nn.Linear(32, 2))
count = 512 * int(sys.argv[1])
rows = TensorRows(torch.randn(count, 32), torch.randint(2, (count,)))
problem = hesscli.Problem(model, "cross_entropy", rows, examples="all", batch_size=512)
result = hesscli.trace(problem, probes=2, method="hutchinson")
unit = 1 if sys.platform == "darwin" else 1024
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
print(result.problem.num_batches, problem.data.nbytes, peak)
"""


def test_memory_is_flat_in_the_number_of_batches() -> None:
    """80 batches more, each with a graph of over 1 MB, cost no more than their examples.

    The source and the kept copy both count (they are two); 24 MB are left to the allocator.
    """
    readings = []
    for batches in (16, 96):
        command = [sys.executable, "-c", MEMORY, str(batches)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        readings.append([int(word) for word in output.split()])
    (few, kept_few, peak_few), (many, kept_many, peak_many) = readings
    assert (few, many) == (16, 96)
    assert peak_many - peak_few < 2 * (kept_many - kept_few) + 24e6


def test_result_is_frozen_and_plain(relu: hesscli.Problem) -> None:
    result = probed(relu, probes=2)
    assert isinstance(result, TraceResult)
    if (pages := Path("/proc/self/statm")).exists():
        resident = int(pages.read_text().split()[1]) * resource.getpagesize()
        assert resident <= result.cost.peak_bytes + (1 << 26)  # it is told in steps of that
    with pytest.raises(AttributeError):
        result.status = "exact"  # type: ignore[misc]
