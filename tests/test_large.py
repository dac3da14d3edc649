"""Networks that are large beside the memory there is: what products take, and how they are checked.

Truth is the process's peak as the system tells it, in units of the weights' float32 bytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from program import environment
from test_preflight import check_of, lying, problem_of, tanh_net

import hesscli
from hesscli import memory
from hesscli.diagnostics import symmetry, symmetry_places
from hesscli.diagnostics.check import check
from hesscli.engines.entries import most_entries, needed_bytes
from hesscli.engines.mfac import ShardedWindow
from hesscli.errors import UnsoundError, UsageError
from hesscli.operators.gauss_newton import GaussNewton
from hesscli.operators.hessian import Hessian
from hesscli.operators.preflight import preflight

BENCHMARKS = Path(__file__).parent / "benchmarks"
MEASURE = """
import json, sys
from pathlib import Path
import large
path = large.write(Path(sys.argv[1]), 1024, 768, 1)
print(json.dumps({what: large.apart(path, what, room=1 << 28) for what in ("forms", "product")}))
"""


@pytest.mark.study
@pytest.mark.skipif(sys.platform != "linux", reason="peaks of a phase are told by Linux alone")
def test_forms_take_four_and_a_half_times_the_weights_and_products_six_and_a_half(
    tmp_path: Path,
) -> None:
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        env=environment(PYTHONPATH=os.pathsep.join([str(BENCHMARKS), *sys.path])),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "checks in float64 would take" in run.stdout
    times = json.loads(run.stdout.splitlines()[-1])
    small = 0.25  # of the weights, 8 MB: interpreter, activations, pieces of sums
    assert max(times["forms"].values()) < 4.5 + small
    assert times["forms"]["probing"] < 4.5
    assert times["product"]["product"] < 6.5


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(memory, "_of_machine", lambda: 1 << 10)


@pytest.mark.usefixtures("little")
def test_they_are_checked_in_their_own_type_and_that_is_said() -> None:
    problem = problem_of(tanh_net())
    flight = preflight(problem, Hessian)
    assert (flight.relative_rounding, flight.product_rounding) == (None, None)
    for name in ("determinism", "gradient", "symmetry", "central difference"):
        assert check_of(flight, name).state == "passed"
    assert "portions of the parameters in float32" in check_of(flight, "central difference").detail
    result = hesscli.trace(problem, method="hutchinson", probes=4)
    assert result.trace.rounding_error is None
    (told,) = [warning for warning in result.warnings if "rounding is unknown" in warning]
    assert "checks were in float32: checks in float64 would take" in told


@pytest.mark.usefixtures("little")
def test_what_is_wrong_is_still_refused_or_not_said_to_be_right() -> None:
    with pytest.raises(UnsoundError, match="not symmetric"):
        preflight(problem_of(tanh_net()), lying(lambda block, product: product.flip(1)))
    flight = preflight(problem_of(tanh_net()), lying(lambda block, product: 1.5 * product))
    assert check_of(flight, "central difference").state == "skipped"
    with pytest.raises(UnsoundError, match="central differences need float64: checks in float64"):
        preflight(problem_of(tanh_net()), Hessian, "finite-difference")
    detail = check_of(preflight(problem_of(tanh_net()), GaussNewton), "central difference").detail
    assert "checks in float64 would take" in detail


@pytest.mark.usefixtures("little")
def test_bfloat16_is_refused_where_nobody_can_measure_what_it_does() -> None:
    given = problem_of(tanh_net())
    with pytest.raises(UsageError, match="bfloat16 does to products is measured in float64"):
        hesscli.Problem(given.model, "cross_entropy", given.data, dtype=torch.bfloat16)


@pytest.mark.usefixtures("little")
def test_a_diagonal_that_does_not_fit_is_refused_and_planned_as_that() -> None:
    problem = problem_of(tanh_net())
    with pytest.raises(UsageError, match="entries of the diagonal do not fit") as refusal:
        hesscli.diagonal(problem)
    assert "hesscli trace" in refusal.value.hint
    plans = {plan.command: plan for plan in check(problem).plan.commands}
    assert plans["diag"].note.startswith("refused: the entries of the diagonal do not fit")
    assert plans["trace"].products > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("room", [10**5, 10**8, 10**10, 10**12])
def test_as_many_entries_fit_as_is_said(room: int, dtype: torch.dtype) -> None:
    most = most_entries(room, dtype)
    assert 0 < needed_bytes(most, dtype) <= room


def test_a_window_says_how_many_ranks_would_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 rows of 100 million float32 columns are 102.4 GB, of which nothing is taken."""
    monkeypatch.setattr(memory, "_of_machine", lambda: 10 * 10**9)
    with pytest.raises(UsageError, match="95 GiB") as refusal:
        ShardedWindow(256, 100_000_000)
    found = refusal.value.hint.split(", ")
    assert found[0] == "--window 22"  # in 9 GB
    assert found[1] == "--window-file FILE or 12 ranks with as much memory each"


def test_a_large_network_is_not_looked_through_for_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    for most, told in ((1 << 25, ""), (40, "no time to plan it: 43 parameters to look through")):
        monkeypatch.setattr(symmetry, "_LOOKED_THROUGH", most)
        plans = {plan.command: plan for plan in check(problem_of(tanh_net())).plan.commands}
        assert told in plans["symmetry"].note
        assert bool(plans["symmetry"].gradients) != bool(told)


def test_families_of_a_network_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(tanh_net())
    monkeypatch.setattr(
        symmetry_places, "room_for_more", lambda _: 20 * symmetry_places._BYTES_EACH
    )
    with pytest.raises(UsageError, match="do not fit") as refused:
        hesscli.symmetries(problem)
    assert "--params for at most 20 of them" in refused.value.hint
