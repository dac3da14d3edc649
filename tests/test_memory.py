"""What happens where memory runs out: less at once, once; and then the result so far."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import faults
import pytest
import torch
from program import hesscli_warm
from torch import Tensor, nn

import hesscli
from hesscli import heap, ledger, memory
from hesscli.diagnostics import growth
from hesscli.diagnostics.growth import Growth
from hesscli.errors import ExitCode, UnsoundError, UsageError
from hesscli.ledger import FileLedger
from hesscli.memory import Together, available_bytes
from hesscli.operators.at_once import vectors_at_once
from hesscli.operators.retained import Retained
from hesscli.problem.freezing import FrozenData
from hesscli.problem.objective import _Grown
from hesscli.problem.problem import Problem
from hesscli.results import Snapshot
from hesscli.state import Rows, bytes_of

# -- A model with memory for so many vectors at once, or for some of its passes --------------------


class Tracked(torch.autograd.Function):
    """The identity, which sees how many vectors go through it side by side."""

    generate_vmap_rule = False
    most = 10**9

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        return Tracked.apply(slope)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Any:
        return Tracked.apply(tangent)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        if info.batch_size > Tracked.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB")
        return Tracked.apply(x), in_dims[0]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.passes, self.full = 0, range(0)

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        if self.passes in self.full:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB")
        return self.last(Tracked.apply(self.first(x).tanh()))


BATCHES = (7, 4, 6)


def problem(make: type[Net] = Net) -> Problem:
    torch.manual_seed(0)
    model = make().double()
    pairs = tuple((torch.randn(n, 3).double(), torch.randn(n, 2).double()) for n in BATCHES)
    found = Problem(model, "mse", FrozenData(pairs, BATCHES, sum(BATCHES), True, "by hand"))
    found.__dict__["_grown"] = _Grown(is_same=False)  # so small, they would be computed as one
    return found


def unlimited(measure: Any) -> tuple[Any, int]:
    """What a run comes to, and how many passes through the model it takes."""
    given = problem()
    return measure(given, budget=None), given.model.passes


# -- How much there is -----------------------------------------------------------------------------


GIB = 1 << 30
UNIFIED = "0::/job/step\n", "", ("memory.max", "memory.current"), ""
OLDER = (
    "5:devices:/\n4:cpu,memory:/job/step\n0::/\n",
    "memory",
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    "total_",
)


@pytest.mark.parametrize(("own", "root", "files", "total"), [UNIFIED, OLDER])
def test_limits_of_a_container_count(
    own: str,
    root: str,
    files: tuple[str, str],
    total: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the kernel writes them: the narrowest of the groups around the process, caches apart."""
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    monkeypatch.setattr(memory, "_of_machine", lambda: 64 * GIB)
    monkeypatch.setattr(memory, "kept_bytes", lambda: 0)
    assert available_bytes() == 64 * GIB
    stat = f"cache 7\n{total}inactive_file {GIB}\n{total}active_file {GIB // 2}"
    limits = {"job/step": "max" if total == "" else str(2**63 - 4096), "job": str(8 * GIB)}
    for group, limit in limits.items():
        folder = tmp_path / root / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in zip((*files, "memory.stat"), (limit, str(3 * GIB), stat), strict=True):
            (folder / name).write_text(text + "\n")
    assert available_bytes() == 6.5 * GIB


@pytest.mark.parametrize("method", ["exact", "hutchinson"])
def test_entries_for_which_there_is_no_room_are_refused(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """26 of them, three times: 8 bytes each, and 16 replicates of 8 within batches and between."""
    run = partial(hesscli.diagonal, method=method, matrix="ggn", probes=2, budget=None)
    needed = 3 * 26 * (8 + 16 * 8 * (1 if method == "exact" else 2))
    monkeypatch.setattr(memory, "_of_machine", lambda: needed / 0.9 - 2)
    with pytest.raises(UsageError) as refused:
        run(problem())
    assert "26 of them" in refused.value.got
    monkeypatch.setattr(memory, "_of_machine", lambda: needed / 0.9 + 2)
    run(problem())


# -- Less at once ----------------------------------------------------------------------------------


def test_memory_runs_out_once_and_half_as_many_go_on() -> None:
    seen = list[int]()

    def squares(rows: Tensor, most: int = 5) -> Tensor:
        seen.append(len(rows))
        if len(rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rows**2

    together, block = Together(), torch.arange(20.0).view(10, 2)
    assert torch.equal(together(squares, block), block**2)
    assert torch.equal(together(squares, block[:7]), block[:7] ** 2)
    assert seen == [10, 5, 5, 5, 2]
    (warning,) = together.warnings
    assert "5 vectors" in warning
    with pytest.raises(torch.OutOfMemoryError):
        together(partial(squares, most=4), block)
    assert seen[5:] == [5]


def test_one_vector_cannot_be_halved_and_other_errors_are_none_of_memory() -> None:
    def fails(rows: Tensor, error: Exception) -> Tensor:
        raise error

    full, other = torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("of another kind")
    for rows, error in ((1, full), (8, other)):
        together = Together()
        with pytest.raises(type(error)):
            together(partial(fails, error=error), torch.zeros(rows, 2))
        assert not together.warnings


@pytest.mark.parametrize("measure", [hesscli.trace, hesscli.diagonal])
def test_the_block_is_halved_and_the_numbers_stay(
    measure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for last digits: 2·10⁻¹³ is a thousand units of float64's."""
    run = partial(measure, method="hutchinson", mode="forward-over-reverse", probes=16, budget=None)
    whole = run(problem())
    monkeypatch.setattr(Tracked, "most", 8)
    halved = run(problem())
    assert halved.trace.estimate == pytest.approx(whole.trace.estimate, rel=2e-13)
    assert halved.trace.probe_stderr == pytest.approx(whole.trace.probe_stderr, rel=1e-9)
    assert halved.status == whole.status
    assert (halved.cost.products, halved.cost.gradients) == (
        whole.cost.products,
        whole.cost.gradients,
    )
    (warning,) = set(halved.warnings) - set(whole.warnings)
    assert "memory ran out" in warning
    assert "8 vectors" in warning
    monkeypatch.setattr(Tracked, "most", 4)
    with pytest.raises(torch.OutOfMemoryError):  # before there is a result
        run(problem())


def test_no_more_vectors_go_side_by_side_than_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that memory need not run out; a graph of this network keeps about a kilobyte."""
    run = partial(
        hesscli.trace, method="hutchinson", mode="forward-over-reverse", probes=16, budget=None
    )
    whole, fitting = run(problem()), list[int]()
    for room in (1, 20_000, 50_000, 10**9):
        monkeypatch.setattr(memory, "_of_machine", lambda room=room: room)
        fits = vectors_at_once(hesscli.Hessian(problem(), mode="forward-over-reverse"))
        assert fits is not None
        fitting.append(fits)
        given = problem()
        hesscli.Hessian(given, mode="forward-over-reverse").check()  # which takes a few examples
        with monkeypatch.context() as patch:
            patch.setattr(Tracked, "most", fits)
            found = run(given)
        assert found.warnings == whole.warnings
        assert found.trace.estimate == pytest.approx(whole.trace.estimate, rel=2e-13)
    one, few, more, most = fitting
    assert one == 1 < few < more < most == 32
    assert vectors_at_once(hesscli.Hessian(problem(), mode="double-backward")) is None


def test_graphs_that_were_kept_are_given_back() -> None:
    given = problem()
    hessian = hesscli.Hessian(given)
    vector = torch.randn(given.parameters.size, dtype=torch.float64)
    expected = hessian @ vector
    product, passes = Retained(hessian, room=10**9), given.model.passes
    given.model.full = range(passes + 3, passes + 4)  # the last batch's, once
    assert torch.allclose(product(vector), expected, rtol=1e-13)
    assert any("graphs" in told for told in given.together.warnings)
    assert given.model.passes == passes + 4
    assert torch.allclose(product(vector), expected, rtol=1e-13)
    assert given.model.passes == passes + 7
    given.model.full = range(passes + 8, passes + 100)  # with nothing more to give back
    with pytest.raises(torch.OutOfMemoryError):
        product(vector)


# -- The result so far -----------------------------------------------------------------------------


MEASURES = {
    "trace": partial(hesscli.trace, method="hutchinson", probes=40),
    "diag": partial(hesscli.diagonal, method="hutchinson", probes=40),
    "ihvp": hesscli.sensitivity,
    "spectrum": partial(hesscli.spectrum, steps=8, probes=3, mode="forward-over-reverse"),
}


@pytest.mark.parametrize("command", MEASURES)
def test_a_run_without_memory_ends_with_what_there_is(command: str) -> None:
    """Or with the error, where there is nothing yet."""
    measure, statuses = MEASURES[command], set[str]()
    whole, passes = unlimited(measure)
    for end in range(passes - 1, passes // 4, -max(1, passes // 8)):
        given = problem()
        given.model.full = range(end, 2 * passes)
        try:
            result = measure(given, budget=None)
        except (torch.OutOfMemoryError, UnsoundError):
            continue
        statuses.add(result.status)
        assert any("memory ran out, and this is what" in told for told in result.warnings)
    assert statuses == {"interrupted"}
    assert whole.status != "interrupted"


def kept_at_each_step(path: Path, resume: bool, monkeypatch: pytest.MonkeyPatch) -> FileLedger:
    monkeypatch.setattr(ledger, "_OFTEN", 0.0)
    monkeypatch.setattr(FileLedger, "_wait", lambda *_: 0.0)
    return FileLedger(path, {}, resume=resume, say=pytest.fail)


@pytest.mark.parametrize("command", ["trace", "spectrum"])
def test_its_ledger_is_gone_on_with_where_there_is_more(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, measure = tmp_path / "run.ledger", MEASURES[command]
    whole, passes = unlimited(measure)
    given = problem()
    given.model.full = range(passes - 2, 2 * passes)
    cut = measure(given, budget=None, ledger=kept_at_each_step(path, False, monkeypatch))
    assert cut.status == "interrupted"
    later = measure(problem(), budget=None, ledger=kept_at_each_step(path, True, monkeypatch))
    assert replace(later.cost, seconds=0, peak_bytes=0) == replace(
        whole.cost, seconds=0, peak_bytes=0
    )
    assert replace(later, cost=whole.cost) == whole


NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self, most):
        super().__init__()
        self.linear, self.left = torch.nn.Linear(3, 2), most

    def forward(self, x):
        self.left -= 1
        if self.left < 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB")
        return self.linear(x).tanh()

def data():
    torch.manual_seed(0)
    return [(torch.randn(3), torch.randn(2)) for _ in range(32)]
"""
SPEC = """
checkpoint = "model.pt"
[model]
factory = "net:Net"
kwargs = {{ most = {most} }}
[data]
factory = "net:data"
[loss]
name = "mse"
"""


def program(folder: Path, most: int) -> Any:
    torch.save(
        {"linear.weight": torch.ones(2, 3), "linear.bias": torch.ones(2)}, folder / "model.pt"
    )
    (folder / "net.py").write_text(NET)
    (folder / "hesscli.toml").write_text(SPEC.format(most=most))
    line = ("trace", "model.pt", "--method", "hutchinson", "--probes", 64, "--out", "json")
    return hesscli_warm(*line, "--dir", "-", cwd=folder)


def test_the_program_says_what_it_came_to(tmp_path: Path) -> None:
    """A result so far, as after Ctrl-C; in three lines that there is none."""
    codes = set[int]()
    for most in (10**6, 90, 75, 50, 20):  # passes, of which a good third is before any product
        run = program(tmp_path, most)
        codes.add(run.returncode)
        if run.returncode == ExitCode.UNSOUND:
            assert not run.stdout
            what, got, hint, *_ = run.stderr.splitlines()
            assert "memory" in what
            assert "1.00 TiB" in got
            assert "batch" in hint
            continue
        document = json.loads(run.stdout)
        told = any("memory ran out, and this" in text for text in document["warnings"])
        assert told == (document["status"] == "interrupted") == (run.returncode != 0)
    assert codes == {0, ExitCode.UNSOUND, ExitCode.INTERRUPTED}


# -- Many products ---------------------------------------------------------------------------------


@pytest.mark.study
def test_memory_and_open_files_stay_as_they_are_over_thousands_of_products() -> None:
    """A vector kept of each would show; `make faults` asks it of all commands.

    One of 9 kB of each of 2,000 would be a fifteenth of the process, and a twentieth is allowed.
    """
    faults.stays_flat_alone("diag", 2000)


KEPT = """
import torch
from hesscli.heap import keep_freed_memory, kept_bytes
from hesscli.memory import available_bytes, taken_bytes
keep_freed_memory()
cpu = torch.device("cpu")
vector = torch.ones(50_000_000)
before, taken = kept_bytes(), taken_bytes(cpu)
del vector
assert taken_bytes(cpu) > taken - 2e7, "it went back"
assert abs(kept_bytes() - before - 2e8) < 1e7, kept_bytes() - before  # and small ones
assert available_bytes() >= kept_bytes()
"""


@pytest.mark.skipif(not heap.kept_bytes(), reason="only glibc tells what it keeps")
def test_a_vector_that_was_freed_is_kept_and_counts_as_free() -> None:
    """Of 200 MB, which glibc would give back by itself."""
    subprocess.run([sys.executable, "-c", KEPT], check=True)


def fresh() -> Tensor:
    """8 MB that no heap has had before: one that was freed may not show as growth."""
    private = mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(private, dtype=torch.float32).fill_(1)


class Hoarder(Net):
    """Keeps 8 MB of each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.kept.append(fresh())
        output: Tensor = super().forward(x)
        return output


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Growth counts from 12 MB on, and is looked at after each step."""
    monkeypatch.setattr(growth, "_SLACK", 12 << 20)
    monkeypatch.setattr(growth, "_SHARE", 0)
    monkeypatch.setattr(growth, "_EVERY", 0.0)


LONG_TRACE = partial(hesscli.trace, method="hutchinson", probes=240, budget=None)


@pytest.mark.usefixtures("strict")
def test_what_a_model_keeps_of_each_pass_is_seen() -> None:
    plain = LONG_TRACE(problem())
    found = LONG_TRACE(problem(Hoarder))
    assert found.trace == plain.trace
    (warning,) = set(found.warnings) - set(plain.warnings)
    assert "keeps something of each pass" in warning


@pytest.mark.usefixtures("strict")
def test_a_run_ends_with_its_result_before_memory_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, plain = tmp_path / "run.ledger", LONG_TRACE(problem())
    with monkeypatch.context() as patch:
        patch.setattr(memory, "_of_machine", lambda: 1 << 20)
        cut = LONG_TRACE(problem(Hoarder), ledger=FileLedger(path, {}, resume=False, say=print))
        unkept = LONG_TRACE(problem(Hoarder))
    assert cut.status == unkept.status == "interrupted"
    assert 100 < cut.cost.products < 240
    assert any("memory ran out, and this is what" in told for told in cut.warnings)
    assert any("1.0 MiB are left" in told for told in cut.warnings)
    resumed = LONG_TRACE(
        problem(Hoarder), ledger=FileLedger(path, {}, resume=True, say=pytest.fail)
    )
    assert resumed.trace == plain.trace


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(("kept", "seen"), [(True, False), (False, True)])
def test_what_the_run_keeps_itself_is_no_growth(kept: bool, seen: bool) -> None:
    watch, rows = Growth(torch.device("cpu")), list[Tensor]()
    for products in range(0, 300, 50):
        rows.append(fresh())
        state = {"nested": [{"rows": Rows(*rows)}, rows[0].numpy(), 1.0]} if kept else {}
        watch.look(Snapshot(phase="probing", done=float(products)), lambda state=state: state)
    assert (watch.warning is not None) == seen
    watch.look(Snapshot(phase="another", done=0.0), dict)
    assert bytes_of(state) == (7 * 8 << 20 if kept else 0)


def test_a_program_s_peak_is_not_that_of_what_started_it() -> None:
    """A process begins as large as its parent, until it becomes another program."""
    held = torch.ones(1 << 28)  # 1 GiB
    code = "import torch; from hesscli import memory; print(memory.peak_bytes(torch.device('cpu')))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < held.nbytes
