"""A run goes on from its ledger to the bits of one that was never cut off, or says why not."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import faults
import pytest
import torch
from torch import Tensor, nn

import hesscli
from hesscli import ledger as ledgers
from hesscli.cli.parsing import damping, probes
from hesscli.diagnostics import reporting
from hesscli.diagnostics.looks import Tolerance
from hesscli.diagnostics.window import WindowOptions
from hesscli.errors import BudgetError, UsageError
from hesscli.ledger import FileLedger
from hesscli.operators.dense import Dense
from hesscli.problem.freezing import FrozenData
from hesscli.problem.objective import _Grown
from hesscli.problem.problem import Problem
from hesscli.render.document import to_json
from hesscli.results import Answer, Snapshot
from hesscli.state import Rows, State
from hesscli.tensor_files import Blocks, DamagedError, chunks, read_tensors, write_tensors

# -- From every step to the same bits --------------------------------------------------------------


BATCHES = (7, 4, 6)
Measure = Callable[..., Answer]


def problem(outputs: int = 3) -> Problem:
    """Made anew, as another process makes it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs))
    pairs = tuple((torch.randn(n, 3), torch.randn(n, outputs)) for n in BATCHES)
    found = Problem(model, "mse", FrozenData(pairs, BATCHES, sum(BATCHES), True, "by hand"))
    found.__dict__["_grown"] = _Grown(is_same=False)  # so small, they would be computed as one
    return found


def as_one() -> Problem:
    """The same in one batch, as it comes."""
    found = problem()
    del found.__dict__["_grown"]
    return found


def wide() -> Problem:
    """Columns of its output Hessian are drawn."""
    return problem(40)


def repeated() -> Problem:
    """Eigenvalues of which each start vector sees but one copy."""
    values = torch.tensor([-8.0] * 3 + [4.0] * 3 + [16.0] * 2, dtype=torch.float64)
    return Dense.of(torch.diag(torch.cat([values, torch.arange(24.0) / 32]))).problem


def in_haste(given: Problem, **how: Any) -> Answer:
    """A trace of batches that are taken as one."""
    found = {"groups": [[0, 1, 2]], "why": "in haste"}
    with patch.object(reporting, "in_haste", lambda _: found):
        return hesscli.trace(given, **how)


RUNS: dict[str, tuple[Callable[[], Problem], Measure]] = {
    "a trace": (problem, partial(hesscli.trace, rtol=0.05)),
    "a trace to its unit vectors": (problem, partial(hesscli.trace, rtol=0.001)),
    "a trace in haste": (wide, partial(in_haste, rtol=0.2)),
    "a trace in rounds": (problem, partial(hesscli.trace, method="hutchinson", probes=40)),
    "shared probes": (
        problem,
        partial(hesscli.trace, method="hutchinson", probes=4, probe_design="shared"),
    ),
    "probes by layer": (problem, partial(hesscli.trace, method="stratified", probes=4)),
    "a diagonal": (problem, partial(hesscli.diagonal, rtol=0.5)),
    "a deflated diagonal": (problem, partial(hesscli.diagonal, method="deflated", probes=4)),
    "columns and probes": (wide, partial(hesscli.diagonal, method="split", rtol=0.7)),
    "ranges of probes and batches": (
        wide,
        partial(hesscli.diagonal, method="split", probes=(5, 40), batches=(1, 3)),
    ),
    "an exact diagonal and its noise": (
        problem,
        partial(hesscli.diagonal, matrix="ggn", probes=4),
    ),
    "a spectrum": (problem, partial(hesscli.spectrum, steps=12, probes=3)),
    "a spectrum of one batch": (as_one, partial(hesscli.spectrum, steps=6, probes=2)),
    "a spectrum with copies": (repeated, partial(hesscli.spectrum, steps=12, probes=5)),
    "a spectrum of layers": (
        problem,
        partial(hesscli.spectrum, steps=5, probes=2, layers=["0"], exact=True, vectors=True),
    ),
    "a spectrum to a tolerance": (problem, partial(hesscli.spectrum, rtol=0.5, k=2, probes=1)),
    "a spectrum of differences": (
        problem,
        partial(hesscli.spectrum, steps=4, probes=2, mode="finite-difference"),
    ),
    "sensitivities": (
        problem,
        partial(hesscli.sensitivity, window=WindowOptions(size=34), rtol=0.01),
    ),
    "sensitivities, measured": (
        problem,
        partial(
            hesscli.sensitivity, window=WindowOptions(rows="example", dtype="bfloat16"), verify=True
        ),
    ),
    "a solve": (
        problem,
        partial(hesscli.ihvp, window=WindowOptions(size=34), refine=0.1, matrix="ggn"),
    ),
}
CUTS = [10, pytest.param(48, marks=pytest.mark.study)]
"""In about so many places a run is cut off, those before its first step included."""


def said(result: Answer) -> tuple[str, dict[str, Any]]:
    """All of a result but what was measured of the machine."""
    document = json.loads(to_json(result))
    del document["cost"]["seconds"], document["cost"]["peak_bytes"]
    arrays = {
        f"{file}/{name}": array.tobytes()
        for file, named in result.tensors().items()
        for name, array in named.items()
    }
    return json.dumps(document), arrays


def cut_off(
    measure: Measure, given: Problem, at: int, ledger: FileLedger, phase: str | None = None
) -> int:
    """Stop a run at a snapshot, of all or of a phase; how many there were."""
    seen = 0

    def observe(snapshot: Snapshot) -> bool:
        nonlocal seen
        seen += phase in (None, snapshot.phase)
        return seen == at

    with suppress(KeyboardInterrupt):  # before there was a result
        measure(given, observe=observe, budget=None, ledger=ledger)
    return seen


def kept_in(
    path: Path, *, resume: bool = False, facts: State | None = None, **how: Any
) -> FileLedger:
    return FileLedger(path, facts or {}, resume=resume, say=pytest.fail, **how)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("name", RUNS)
def test_from_any_step_a_run_goes_on_to_the_same_result(
    name: str, cuts: int, tmp_path: Path
) -> None:
    make, measure = RUNS[name]
    expected = said(measure(make(), budget=None))
    path, at = tmp_path / "run.ledger", 10**9
    at = cut_off(measure, make(), at, kept_in(path))
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    resumed = 0
    for step in range(at, 0, -max(1, at // cuts)):
        cut_off(measure, make(), step, kept_in(path))
        if not path.exists():  # nothing is kept of proofs and preflight
            break
        resumed += 1
        ledger = kept_in(path, resume=True)
        assert said(measure(make(), budget=None, ledger=ledger)) == expected, step
        ledger.delivered()
        for file in tmp_path.iterdir():
            file.unlink()
    assert resumed > 2


def test_a_run_that_is_cut_off_again_and_again_ends_where_one_does(tmp_path: Path) -> None:
    for name in ("a deflated diagonal", "a spectrum", "sensitivities"):
        make, measure = RUNS[name]
        expected = said(measure(make(), budget=None))
        path = tmp_path / f"{name}.ledger"
        for step in (20, 16, 22, 18):
            cut_off(measure, make(), step, kept_in(path, resume=path.exists()))
        assert said(measure(make(), budget=None, ledger=kept_in(path, resume=True))) == expected


def test_a_finished_run_goes_on_to_a_smaller_tolerance(tmp_path: Path) -> None:
    """Its probes are kept; what the looks have spent that it has told of stays spent."""
    path = tmp_path / "trace.ledger"
    measure = partial(hesscli.trace, method="hutchinson", budget=None)
    first = measure(problem(), rtol=0.3, ledger=kept_in(path))
    tighter = measure(problem(), rtol=0.1, ledger=kept_in(path, resume=True))
    assert tighter.status == "converged"
    assert first.method.looks == 2
    assert tighter.method.looks == 3
    assert tighter.cost.products == pytest.approx(tighter.method.num_probes)
    assert tighter.method.num_probes > first.method.num_probes
    alike = measure(problem(), probes=tighter.method.num_probes)
    assert tighter.trace.estimate == pytest.approx(alike.trace.estimate, rel=1e-5)  # float32
    again = measure(problem(), rtol=0.2, ledger=kept_in(path, resume=True))
    assert said(again)[0].count('"status"') == said(tighter)[0].count('"status"')
    assert again.trace == tighter.trace  # nothing is forgotten


# -- What is refused -------------------------------------------------------------------------------


def begun(tmp_path: Path, **facts: Any) -> Path:
    path = tmp_path / "trace.ledger"
    measure = partial(hesscli.trace, method="hutchinson", probes=4)
    cut_off(measure, problem(), 2, kept_in(path, facts=facts), "probing")
    assert path.exists()
    return path


def test_an_unfinished_run_is_not_overwritten_in_silence(tmp_path: Path) -> None:
    path = begun(tmp_path)
    with pytest.raises(UsageError) as refused:
        kept_in(path)
    assert "not finished" in refused.value.what
    assert "--resume" in refused.value.hint
    assert f"rm {path}" in refused.value.hint


def test_a_run_that_its_budget_ended_is_replaced_with_a_word(tmp_path: Path) -> None:
    path, seen = tmp_path / "trace.ledger", 0
    measure = partial(hesscli.trace, method="hutchinson", probes=4)
    last = cut_off(measure, problem(), 10**9, kept_in(path)) - 1
    path.unlink(missing_ok=True)

    def observe(_: Snapshot) -> bool:
        nonlocal seen
        seen += 1
        if seen == last:
            raise BudgetError("the budget ended before there was a result", "", "")
        return False

    stopped = measure(problem(), observe=observe, budget=None, ledger=kept_in(path))
    assert stopped.status == "budget"
    told: list[str] = []
    FileLedger(path, {}, resume=False, say=told.append)
    assert "ended at its budget" in told[0]
    assert "--resume" in told[0]
    resumed = measure(problem(), budget=None, ledger=kept_in(path, resume=True))
    assert said(resumed) == said(measure(problem(), budget=None))


def test_a_finished_run_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "trace.ledger"
    hesscli.trace(problem(), rtol=0.5, budget=None, ledger=kept_in(path))
    assert path.exists()
    kept_in(path)


@pytest.mark.parametrize("fact", ["hesscli", "--seed", "spec", "--method"])
def test_a_ledger_of_another_run_is_refused_by_name(fact: str, tmp_path: Path) -> None:
    facts = {"hesscli": "1.0", "--seed": 0, "spec": "ab" * 32, "--method": None}
    path = begun(tmp_path, **facts)
    kept_in(path, resume=True, facts=facts)
    with pytest.raises(UsageError) as refused:
        kept_in(path, resume=True, facts=facts | {fact: "another"})
    assert "another run" in refused.value.what
    assert refused.value.got.startswith(f"{fact} was ")
    assert "--dir" in refused.value.hint


@pytest.mark.parametrize(
    ("option", "began", "cure"),
    [
        ("--verify", True, "--verify,"),
        ("--verify", False, "no --verify,"),
        ("--seed", 0, "--seed 0,"),
        ("--refine", None, "no --refine,"),
        ("--layer", [], "no --layer,"),
        ("--layer", ["conv*", "head"], "--layer 'conv*' --layer 'head',"),
        ("--probes", str(probes("40")), "--probes 40,"),
        ("--probes", str(probes("64:128")), "--probes 64:128,"),
        ("--damping", str(damping("abs:1e-05")), "--damping abs:1e-05,"),
        ("--damping", str(damping("0.00123456789")), "--damping 0.00123456789,"),
    ],
)
def test_the_cure_is_what_can_be_typed(option: str, began: Any, cure: str, tmp_path: Path) -> None:
    path = begun(tmp_path, **{option: began})
    with pytest.raises(UsageError) as refused:
        kept_in(path, resume=True, facts={option: "another"})
    assert refused.value.hint.startswith(cure)


def test_another_function_is_refused_by_what_it_gives(tmp_path: Path) -> None:
    """One weight that is another in its last digits, and one example more."""
    path = begun(tmp_path)
    other = problem()
    with torch.no_grad():
        other.parameters[0].tensor[0, 0] *= 1 + 1e-6
    with pytest.raises(UsageError) as refused:
        hesscli.trace(other, ledger=kept_in(path, resume=True))
    assert "weights was" in refused.value.got
    torch.manual_seed(0)
    pairs = tuple((torch.randn(n, 3), torch.randn(n, 3)) for n in (*BATCHES, 1))
    data = FrozenData(pairs, (*BATCHES, 1), sum(BATCHES) + 1, True, "by hand, and one more")
    more = Problem(problem().model, "mse", data)
    with pytest.raises(UsageError) as refused:
        hesscli.trace(more, ledger=kept_in(path, resume=True))
    assert "num_examples was 17 and is 18" in refused.value.got


def test_what_another_option_makes_of_a_problem_is_refused_by_the_option(tmp_path: Path) -> None:
    """As it was typed, and only where it makes another problem."""
    path, measure = tmp_path / "trace.ledger", partial(hesscli.trace, method="hutchinson", probes=4)
    began = {"--examples": "all", "--batch-size": 7}
    cut_off(measure, problem(), 2, kept_in(path, loaded=began), "probing")
    for typed in ({"--batch-size": 7}, {"--batch-size": 6}):
        ledger = kept_in(path, resume=True, loaded={"--examples": "4096"} | typed)
        ledger.recognise({"matrix": "hessian"})
    with pytest.raises(UsageError) as refused:
        ledger.recognise({"num_batches": 2})
    assert refused.value.got.startswith(
        "--examples was all and is 4096; --batch-size was 7 and is 6"
    )
    assert refused.value.hint.startswith("--examples all, or")


def test_another_number_of_threads_is_refused_with_what_sets_it(tmp_path: Path) -> None:
    path, before = begun(tmp_path), torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        with pytest.raises(UsageError) as refused:
            hesscli.trace(problem(), ledger=kept_in(path, resume=True))
    finally:
        torch.set_num_threads(before)
    assert f"threads was {before} and is {before + 1}" in refused.value.got
    assert f"OMP_NUM_THREADS={before}" in refused.value.hint


# -- Files that are damaged, and disks that take no more -------------------------------------------


def written(path: Path) -> Path:
    rows = torch.arange(6.0).view(2, 3), torch.ones(1, 3)
    tensors = {
        "a": Blocks(torch.float32, (3, 3), iter(rows)),
        "empty": Blocks.of(torch.empty(0, 2, dtype=torch.int64)),
        "b": Blocks.of(torch.ones(2, dtype=torch.bfloat16)),
    }
    with path.open("wb") as stream:
        write_tensors(stream, tensors, "told")
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tensors, told = read_tensors(written(tmp_path / "file"))
    assert told == "told"
    assert torch.equal(tensors["a"], torch.cat([torch.arange(6.0).view(2, 3), torch.ones(1, 3)]))
    assert tensors["empty"].shape == (0, 2)
    assert tensors["b"].dtype == torch.bfloat16


def test_one_bit_anywhere_is_seen(tmp_path: Path) -> None:
    path = written(tmp_path / "file")
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in (0, 7):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(DamagedError):
                read_tensors(path)


def test_a_file_that_ends_early_is_seen(tmp_path: Path) -> None:
    path = written(tmp_path / "file")
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(DamagedError):
            read_tensors(path)
    path.unlink()
    with pytest.raises(DamagedError, match="no such file"):
        read_tensors(path)


def test_rows_that_are_damaged_or_missing_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "spectrum.ledger"
    measure = partial(hesscli.spectrum, steps=6, probes=1)
    cut_off(measure, problem(), 2, kept_in(path), "iterating")
    rows = tmp_path / "spectrum.ledger.1"
    content = bytearray(rows.read_bytes())
    content[-1] ^= 1
    rows.write_bytes(content)
    with pytest.raises(DamagedError):
        kept_in(path, resume=True)
    rows.unlink()
    with pytest.raises(DamagedError):
        kept_in(path, resume=True)


class Vectors:
    """Work that only grows."""

    lasting = False

    def __init__(self) -> None:
        self.rows = torch.empty(0, 4)

    def grow(self) -> None:
        self.rows = torch.cat([self.rows, torch.randn(1, 4)])

    def state_dict(self) -> State:
        return {"rows": Rows(self.rows), "sum": self.rows.sum(0)}

    def load_state_dict(self, state: State) -> None:
        self.rows = torch.cat(list(state["rows"].since(0)))


class Still:
    """A clock that stands."""

    earlier = seconds = 0.0


def driven(path: Path, resume: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[Vectors, FileLedger]:
    monkeypatch.setattr(ledgers, "_OFTEN", 0.0)
    monkeypatch.setattr(FileLedger, "_wait", lambda *_: 0.0)
    work, ledger = Vectors(), kept_in(path, resume=resume)
    ledger.attach(Still(), hesscli.meter.Meter())
    ledger.begin(work)
    return work, ledger


def test_rows_are_written_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.ledger"
    work, ledger = driven(path, False, monkeypatch)
    seen: dict[str, bytes] = {}
    for _ in range(3):
        work.grow()
        ledger.step()
        files = {file.name: file.read_bytes() for file in tmp_path.glob("run.ledger.*")}
        assert files.items() >= seen.items()
        assert len(files) == len(seen) + 1
        seen = files
    again, later = driven(path, True, monkeypatch)
    assert torch.equal(again.rows, work.rows)
    again.grow()
    later.step()
    assert {file.name for file in tmp_path.glob("run.ledger.*")} > seen.keys()
    later.end()
    later.close()
    later.delivered()
    assert list(tmp_path.iterdir()) == []


def test_files_of_rows_that_nothing_names_are_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.ledger.7").write_bytes(b"of a run that was killed")
    (tmp_path / "run.ledger.mine").write_bytes(b"not ours")
    work, ledger = driven(tmp_path / "run.ledger", False, monkeypatch)
    work.grow()
    ledger.step()
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"run.ledger", "run.ledger.8", "run.ledger.mine"}


def test_a_disk_that_takes_no_more_is_said_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    work, ledger = driven(tmp_path / "run.ledger", False, monkeypatch)
    monkeypatch.setattr(ledger, "_say", heard.append)
    work.grow()
    ledger.step()
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise UsageError("cannot write run.ledger", "the disk is full", "another folder")

    with monkeypatch.context() as patch:
        patch.setattr(ledgers, "write_atomically", full)
        for _ in range(2):
            work.grow()
            ledger.step()
    assert len(heard) == 1
    assert "the disk is full" in heard[0]
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    ledger.step()
    again, _ = driven(tmp_path / "run.ledger", True, monkeypatch)
    assert torch.equal(again.rows, work.rows)


def test_writing_waits_until_it_is_a_small_part_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that goes on by what a write takes, and by a step."""
    now, writes = [0.0], list[float]()
    write = ledgers.write_atomically

    def slow(path: Path, put: Callable[[Any], None]) -> Path:
        now[0] += 0.02
        writes.append(now[0])
        return write(path, put)

    monkeypatch.setattr(ledgers.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(ledgers, "write_atomically", slow)
    ledger = kept_in(tmp_path / "run.ledger")
    ledger.attach(Still(), hesscli.meter.Meter())

    class Sums(Vectors):
        def state_dict(self) -> State:
            return {"sum": torch.zeros(5)}

    ledger.begin(Sums())
    while now[0] < 100:
        now[0] += 0.01
        ledger.step()
    assert 0 < 0.02 * len(writes) < 0.01 * now[0]


class Aged:
    """A clock that is past a number of seconds."""

    earlier = 0.0

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


@pytest.mark.parametrize(("at_budget", "seconds"), [(True, 1000.0), (True, 100.0), (False, 1000.0)])
def test_a_large_state_is_written_at_the_budget_of_a_long_run(
    at_budget: bool, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth of its time may go into that; who interrupts it does not wait so long."""
    path, said = tmp_path / "run.ledger", list[str]()
    monkeypatch.setattr(ledgers, "_RATE", 1.0)  # a slow disk: 16 bytes a row, and as many of sums
    work, ledger = Vectors(), FileLedger(path, {}, resume=False, say=said.append)
    ledger.attach(Aged(seconds), hesscli.meter.Meter())
    ledger.begin(work)
    work.grow()
    ledger.cut(at_budget)
    assert path.exists() == (at_budget and seconds == 1000)
    assert len(said) == path.exists()


def test_bytes_are_those_of_the_tensor_whatever_its_strides() -> None:
    rows: Tensor = torch.arange(12.0).view(3, 4).T
    assert b"".join(chunks(rows)) == rows.contiguous().numpy().tobytes()


# -- Killed, and gone on with by another process ---------------------------------------------------


@pytest.mark.parametrize("command", ["trace", "diag", "ihvp", "spectrum", "prune"])
def test_killed_at_moments_of_chance_it_goes_on_to_the_same_bytes(
    command: str, tmp_path: Path
) -> None:
    faults.resumed_after_kills(command, tmp_path, 1, random.Random(0))


def test_who_goes_on_after_each_cut_does_not_stop_at_will(tmp_path: Path) -> None:
    """A run's budget may end it "converged" once; gone on with, only looks that are planned may."""
    path, left, ends, rtol = tmp_path / "trace.ledger", 0, list[tuple[str, bool]](), 0.3

    def observe(snapshot: Snapshot) -> bool:
        nonlocal left
        left -= snapshot.phase == "probing"
        if left < 0:
            raise BudgetError("the budget ended before there was a result", "", "")
        return False

    measure = partial(hesscli.trace, method="hutchinson", rtol=rtol, observe=observe, budget=None)
    while not ends or ends[-1][0] == "budget":
        left = 8
        result = measure(problem(), ledger=kept_in(path, resume=bool(ends)))
        low, high = result.trace.interval
        within = (high - low) / 2 <= Tolerance(rtol).half_width(result.trace.estimate)
        ends.append((result.status, within))
    assert ends[-1] == ("converged", True)
    assert ("budget", True) in ends  # else nothing was tempting
