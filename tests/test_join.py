"""Runs over parts of the same work come to what one over all of it does, or it is said why not."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from program import SPEC, SUNSPOTS, hesscli_run, hesscli_warm, three_lines
from torch import Tensor, nn

import hesscli
from hesscli.errors import ExitCode, UsageError
from hesscli.joining import MAY_DIFFER, JoinedLedger
from hesscli.ledger import FileLedger, read_header, read_ledger
from hesscli.problem.freezing import FrozenData
from hesscli.problem.problem import Problem
from hesscli.render.document import to_json
from hesscli.results import Answer, Snapshot
from hesscli.tensor_files import Blocks, read_tensors, write_tensors

COUNTS = (7, 4, 6, 5, 8, 4, 4, 5)
WHOLE = (0, 32)
HALVES = (0, 16), (16, 32)
QUARTERS = (*HALVES, (32, 48), (48, 64))
PAIRS = tuple(itertools.pairwise(range(0, 9, 2)))
Span = tuple[int, int]


def problem(outputs: int = 3) -> Problem:
    """In float64, of batches of several sizes; made anew, as on another machine."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()
    kind = {"dtype": torch.float64}
    pairs = tuple((torch.randn(n, 3, **kind), torch.randn(n, outputs, **kind)) for n in COUNTS)
    return Problem(model, "mse", FrozenData(pairs, COUNTS, sum(COUNTS), True, "by hand"))


@dataclass(frozen=True)
class Kind:
    """A measurement that can be made in parts."""

    measure: Callable[..., Answer]
    outputs: int = 3
    probes: bool = True

    def run(self, probes: Any = None, batches: Span | None = None, **how: Any) -> Answer:
        return self.measure(
            problem(self.outputs), probes=probes, batches=batches, budget=None, **how
        )


KINDS = {
    "a trace": Kind(partial(hesscli.trace, method="hutchinson")),
    "a trace of columns and probes": Kind(partial(hesscli.trace, method="split"), outputs=40),
    "a trace by layers": Kind(partial(hesscli.trace, method="stratified")),
    "a deflated trace": Kind(partial(hesscli.trace, method="deflated")),
    "a diagonal": Kind(partial(hesscli.diagonal, method="hutchinson")),
    "a diagonal of columns and probes": Kind(partial(hesscli.diagonal, method="split"), outputs=40),
    "a diagonal that is shrunk": Kind(partial(hesscli.diagonal, method="split")),
    "a deflated diagonal": Kind(partial(hesscli.diagonal, method="deflated")),
    "an exact diagonal and its noise": Kind(partial(hesscli.diagonal, matrix="ggn")),
    "forward mode": Kind(partial(hesscli.trace, method="hutchinson", mode="forward-over-reverse")),
}
EXACT = {
    "an exact trace": Kind(partial(hesscli.trace, matrix="ggn"), probes=False),
    "an exact diagonal": Kind(partial(hesscli.diagonal, matrix="ggn"), probes=False),
}


def begun_as(probes: Any, batches: Any, **changes: Any) -> dict[str, Any]:
    given = {"probes": probes, "batches": batches, "rtol": None, "atol": None}
    told = {"command": "trace", "joins": True, "checkpoint": None, "found": None, "host": "here"}
    return told | {"given": given} | changes


def kept_in(path: Path, probes: Any = None, batches: Span | None = None) -> FileLedger:
    begun = begun_as(probes, batches)
    how = {"loaded": {"--examples": "4096"}, "begun": begun, "part": True}
    return FileLedger(path, {"spec": "0"}, resume=False, say=pytest.fail, **how)


def part(kind: Kind, path: Path, probes: Any = None, batches: Span | None = None) -> Path:
    """A run over a part, which leaves its ledger."""
    kind.run(probes, batches, ledger=kept_in(path, probes, batches))
    return path


def joined(kind: Kind, paths: Sequence[Path], say: Callable[[str], None] = len) -> Answer:  # type: ignore[assignment]
    """What they come to, without a product."""
    ledger = JoinedLedger(paths, say)
    return kind.run(ledger.given["probes"], ledger=ledger)


def said(result: Answer) -> dict[str, Any]:
    """All of a document but what joining costs, and that it was joined."""
    document: dict[str, Any] = json.loads(to_json(result))
    del document["cost"], document["method"]["note"]
    return document


def numbers(value: Any) -> Iterator[Any]:
    """All that a document has, flat."""
    match value:
        case dict():
            for name, each in value.items():
                yield name
                if name != "largest":  # of entries that are the same, rounding picks one
                    yield from numbers(each)
        case list():
            for each in value:
                yield from numbers(each)
        case float() | int():
            yield float(value)
        case _:
            yield value


def require_same(found: Answer, expected: Answer) -> None:
    """Traces to the last bit; what is made of sums of entries to 1e-12 of the largest."""
    if found.command == "trace":
        assert said(found) == said(expected)
        return
    for one, other in zip(numbers(said(found)), numbers(said(expected)), strict=True):
        assert one == (pytest.approx(other, rel=1e-10) if isinstance(other, float) else other)
    assert asdict(found)["trace"] == asdict(expected)["trace"]
    for file, arrays in expected.tensors().items():
        size = max(np.abs(array).max() for array in arrays.values())
        for name, array in arrays.items():
            off = np.abs(found.tensors()[file][name] - array).max()
            assert off <= 1e-12 * size, (file, name)


def tables(path: Path) -> dict[tuple[int, int], dict[int, Tensor]]:
    """The cells of each stage's sources, by batch."""
    found = {}
    for stage, work in enumerate(read_ledger(path)["work"]):
        state = work["state"]
        sources = state["estimator"]["sources"] if "estimator" in state else [state]
        for number, source in enumerate(sources):
            ends = np.cumsum(source["estimates"])[:-1]
            rows = np.split(source["cells"], ends)
            found[stage, number] = dict(zip(source["batches"], rows, strict=True))
    return found


@pytest.mark.parametrize("name", KINDS)
def test_ranges_of_probes_come_to_one_run(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    paths = [part(kind, tmp_path / f"{a}", (a, b)) for a, b in HALVES]
    whole = tmp_path / "whole"
    expected = kind.run(WHOLE, ledger=kept_in(whole, WHOLE))
    products = sum(read_header(path)["work"][-1]["counted"][0] for path in paths)
    found = joined(kind, paths)
    require_same(found, expected)
    assert found.cost.products == products
    parts = [tables(path) for path in paths]
    for source, table in tables(whole).items():
        for batch, cells in table.items():
            rows = [each[source][batch] for each in parts]
            is_exact = len(cells) == 1
            assert np.array_equal(rows[0] if is_exact else np.concatenate(rows), cells)


@pytest.mark.parametrize("name", [*(n for n in KINDS if "deflated" not in n), *EXACT])
def test_ranges_of_batches_come_to_one_run(name: str, tmp_path: Path) -> None:
    kind = (KINDS | EXACT)[name]
    probes = (0, 6) if kind.probes else None
    paths = [part(kind, tmp_path / f"{a}", probes, (a, b)) for a, b in PAIRS]
    expected = kind.run(probes)
    assert expected.status == ("exact" if "exact" in name else expected.status)
    require_same(joined(kind, paths[::-1]), expected)


def test_ranges_of_both_come_to_one_run(tmp_path: Path) -> None:
    for name in ("a trace of columns and probes", "a diagonal that is shrunk"):
        kind, folder = KINDS[name], tmp_path / name
        folder.mkdir()
        grid = itertools.product([(0, 16), (16, 32)], [(0, 3), (3, 8)])
        paths = [part(kind, folder / f"{p}{b}", p, b) for p, b in grid]
        require_same(joined(kind, paths), kind.run((0, 32)))


def test_neither_order_nor_number_of_ranges_changes_a_trace(tmp_path: Path) -> None:
    kind = KINDS["a trace of columns and probes"]
    expected = said(kind.run((0, 32)))
    for cuts in ([0, 32], [0, 16, 32], [0, 5, 9, 32]):
        spans = list(itertools.pairwise(cuts))
        paths = [part(kind, tmp_path / f"{cuts}{a}", (a, b)) for a, b in spans]
        for order in itertools.permutations(paths):
            assert said(joined(kind, order)) == expected


def test_the_order_of_ranges_changes_no_byte_of_a_diagonal(tmp_path: Path) -> None:
    kind = KINDS["a diagonal that is shrunk"]
    paths = [part(kind, tmp_path / f"{a}", (a, b)) for a, b in QUARTERS]
    forth, back = joined(kind, paths), joined(kind, paths[::-1])
    assert said(forth) == said(back)
    for file, arrays in forth.tensors().items():
        for name, array in arrays.items():
            assert array.tobytes() == back.tensors()[file][name].tobytes()


def test_entries_are_the_same_wherever_ranges_begin(tmp_path: Path) -> None:
    """Only bars depend on which probes were centred together, as they do on signs."""
    kind = KINDS["a diagonal"]
    spans = [(0, 5), (5, 22), (22, 40)]
    paths = [part(kind, tmp_path / f"{a}", (a, b)) for a, b in spans]
    found, expected = joined(kind, paths), kind.run((0, 40))
    for name, array in expected.tensors()["diag"].items():
        np.testing.assert_allclose(found.tensors()["diag"][name], array, rtol=1e-12, atol=1e-14)
    bars, usual = (
        np.concatenate([each.ravel() for each in result.tensors()["diag_stderr"].values()])
        for result in (found, expected)
    )
    assert 0.7 < np.linalg.norm(bars) / np.linalg.norm(usual) < 1.4


# -- What is missing -------------------------------------------------------------------------------


def test_what_is_missing_is_said_and_the_rest_is_joined(tmp_path: Path) -> None:
    kind, told = KINDS["a trace"], list[str]()
    spans = [(0, 4), (8, 12)]
    paths = [part(kind, tmp_path / f"{a}", (a, b)) for a, b in spans]
    found = joined(kind, paths, told.append)
    means = [kind.run(span).trace.estimate for span in spans]
    assert found.trace.estimate == pytest.approx(np.mean(means), rel=1e-12)
    assert found.method.num_probes == 8
    assert "in none of them: probes 4:8" in told
    told.clear()
    paths = [part(kind, tmp_path / f"of {a}", (0, 4), (a, b)) for a, b in PAIRS[:3]]
    found = joined(kind, paths, told.append)
    assert said(found) == said(kind.run((0, 4), (0, 6)))
    assert "in none of them: batches 6:8 of 8" in told
    assert any("6 of 8 batches" in warning for warning in found.warnings)


def cut_off(kind: Kind, path: Path, probes: Span, at: int) -> Path:
    """A part that is interrupted after so many products over all the data."""

    def observe(snapshot: Snapshot) -> bool:
        return snapshot.phase == "probing" and (snapshot.done or 0) >= at

    with suppress(KeyboardInterrupt):  # before there was a result
        kind.run(probes, observe=observe, ledger=kept_in(path, probes))
    assert not read_header(path)["finished"]
    return path


def test_of_a_part_that_was_cut_off_what_is_whole_counts(tmp_path: Path) -> None:
    """Of a trace all cells; of a diagonal the rounds that all batches have."""
    kind, told = KINDS["a trace"], list[str]()
    first = part(kind, tmp_path / "first", (0, 16))
    for at in (4, 10):
        cut = cut_off(kind, tmp_path / f"cut {at}", (16, 32), at)
        cells = [tables(path)[0, 0] for path in (first, cut)]
        assert min(map(len, cells[1].values())) == 0
        means = [np.concatenate([each[b] for each in cells])[:, -1].mean() for b in cells[0]]
        masses = np.array(problem().masses)
        found = joined(kind, [cut, first], told.append)
        assert found.trace.estimate == pytest.approx(masses @ means / masses.sum(), rel=1e-12)
        assert any("cut off" in line and str(cut) in line for line in told)
        assert sum("cut off" in line for line in told) == 1
        told.clear()
    kind = KINDS["a diagonal"]
    first = part(kind, tmp_path / "whole", (0, 16))
    cut = cut_off(kind, tmp_path / "in its first round", (16, 32), 10)
    require_same(joined(kind, [cut, first]), kind.run((0, 16)))
    cut = cut_off(kind, tmp_path / "in its second round", (16, 64), 22)
    require_same(joined(kind, [cut, first]), kind.run((0, 32)))


def test_a_join_without_a_result_is_refused(tmp_path: Path) -> None:
    kind = KINDS["a trace"]
    cut = cut_off(kind, tmp_path / "begun", (0, 16), 0)
    with pytest.raises(UsageError, match="no result yet"):
        joined(kind, [cut])
    kind = KINDS["a diagonal"]
    paths = [part(kind, tmp_path / f"{b}", (0, 4 * b), (b, 8 - b)) for b in (1,)]
    paths += [part(kind, tmp_path / "rest", (0, 8), (7, 8))]
    with pytest.raises(UsageError) as refused:
        joined(kind, paths)
    assert "4 of batch 1, and 8 of batch 7" in refused.value.got


# -- What is refused -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("two")
    kind = KINDS["a trace of columns and probes"]
    return [part(kind, folder / name, span) for name, span in zip("ab", HALVES, strict=True)]


def told_otherwise(path: Path, into: Path, change: Callable[[Any], None]) -> Path:
    """A ledger with something else in what it tells."""
    arrays, text = read_tensors(path)
    told = json.loads(text)
    change(told)
    tensors = {name: Blocks.of(array) for name, array in arrays.items()}
    with into.open("wb") as stream:
        write_tensors(stream, tensors, json.dumps(told))
    return into


def test_each_fact_that_must_be_the_same_is_refused_by_name(
    two: list[Path], tmp_path: Path
) -> None:
    facts = read_header(two[0])["facts"]
    must = facts.keys() - MAY_DIFFER
    assert {"spec", "weights", "examples", "torch", "dtype", "matrix", "num_batches"} < must
    for fact in sorted(must):

        def change(told: Any, fact: str = fact) -> None:
            value = told["facts"][fact]
            told["facts"][fact] = value + 1 if isinstance(value, float) else f"{value}0"

        if fact == "dtype":
            continue  # see below: it must be one that there is
        other = told_otherwise(two[1], tmp_path / "other", change)
        with pytest.raises(UsageError) as refused:
            JoinedLedger([two[0], other], pytest.fail)
        assert refused.value.got.startswith(f"{fact} ")
        assert str(other) in refused.value.what
        assert refused.value.hint


def given_otherwise(told: Any) -> None:
    """What an option does is named by it."""
    told["loaded"]["--examples"] = "16"
    told["facts"]["num_examples"] = 16


def set_in(*place: str, to: Any) -> Callable[[Any], None]:
    def change(told: Any) -> None:
        for name in place[:-1]:
            told = told[name]
        told[place[-1]] = to

    return change


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("dtype", set_in("facts", "dtype", to="float32")),
        ("mode", set_in("decisions", "preflight", "mode", to="forward-over-reverse")),
        ("method", set_in("decisions", "method", to="hutchinson")),
        ("tensors with probes", set_in("decisions", "exactness", to=[])),
        ("command", set_in("begun", "command", to="diag")),
        ("--rtol", set_in("begun", "given", "rtol", to=0.01)),
        ("probes", set_in("begun", "given", "probes", to=None)),
        ("--examples", given_otherwise),
    ],
)
def test_each_choice_that_must_be_the_same_is_refused_by_name(
    name: str, change: Callable[[Any], None], two: list[Path], tmp_path: Path
) -> None:
    other = told_otherwise(two[1], tmp_path / "other", change)
    for order in ([two[0], other], [other, two[0]]):
        with pytest.raises(UsageError) as refused:
            JoinedLedger(order, pytest.fail)
        assert refused.value.got.startswith(f"{name} ")


def test_machines_may_differ(two: list[Path], tmp_path: Path) -> None:
    """In what they are, in the last digits, and in how large they found rounding to be."""
    kind = KINDS["a trace of columns and probes"]

    def change(told: Any) -> None:
        told["facts"] |= {"threads": 64, "device": "cuda:0", "device_name": "a GPU"}
        told["facts"] |= {"gradient": "0" * 64, "accuracy": 0.5}
        told["facts"]["loss"] *= 1 + 1e-12
        told["facts"]["gradient_size"] *= 1 - 1e-12
        told["decisions"]["preflight"]["relative_rounding"] = 1e-6

    other = told_otherwise(two[1], tmp_path / "other", change)
    expected = joined(kind, two)
    found = joined(kind, [other, two[0]])
    assert found.trace.estimate == expected.trace.estimate
    assert found.trace.rounding_error > expected.trace.rounding_error


def test_ledgers_of_something_else_than_what_is_here_are_refused(two: list[Path]) -> None:
    other = problem(40)
    with torch.no_grad():
        other.parameters[0].tensor[0, 0] *= 1 + 1e-3
    with pytest.raises(UsageError) as refused:
        hesscli.trace(other, method="split", probes=(0, 32), ledger=JoinedLedger(two, len))  # type: ignore[arg-type]
    assert "something else" in refused.value.what
    assert "weights was" in refused.value.got


@pytest.mark.parametrize(
    ("one", "other", "what"),
    [
        (((0, 4), None), ((0, 4), None), "the same part"),
        (((0, 4), None), ((3, 8), None), "the same part"),
        ((4, None), ((3, 8), None), "the same part"),
        (((0, 4), (0, 4)), ((0, 4), (0, 4)), "the same part"),
        (((0, 4), (0, 4)), ((4, 8), (2, 8)), "the same or apart"),
        (((0, 4), (0, 4)), ((4, 8), None), "the same or apart"),
        ((None, (0, 4)), (None, (3, 8)), "the same or apart"),
        ((None, None), (None, None), "the same part"),
    ],
)
def test_parts_that_overlap_are_refused(
    one: tuple[Any, Any], other: tuple[Any, Any], what: str, two: list[Path], tmp_path: Path
) -> None:
    paths = []
    for number, (probes, batches) in enumerate((one, other)):
        given = set_in("begun", "given", to=begun_as(probes, batches)["given"])
        paths.append(told_otherwise(two[0], tmp_path / f"{number}", given))
    with pytest.raises(UsageError, match=what) as refused:
        JoinedLedger(paths, pytest.fail)
    assert all(str(path) in refused.value.got for path in paths)


def test_what_is_no_part_is_refused(two: list[Path], tmp_path: Path) -> None:
    alone = set_in("begun", to=begun_as(None, None, command="spectrum", joins=False))
    with pytest.raises(UsageError, match="no part of a sum") as refused:
        JoinedLedger([told_otherwise(two[0], tmp_path / "alone", alone)], pytest.fail)
    assert "spectrum" in refused.value.got
    kind, path = KINDS["a trace"], tmp_path / "to a tolerance"
    kind.run(rtol=0.5, ledger=kept_in(path))
    with pytest.raises(UsageError, match="to a tolerance"):
        joined(kind, [path])
    with pytest.raises(UsageError, match="not one ledger"):
        JoinedLedger([tmp_path], pytest.fail)
    damaged = tmp_path / "damaged"
    damaged.write_bytes(two[0].read_bytes()[:-1])
    for place in (damaged, tmp_path / "nowhere"):
        with pytest.raises(UsageError, match="cannot be read"):
            JoinedLedger([two[0], place], pytest.fail)


def test_a_part_is_not_overwritten_in_silence(tmp_path: Path) -> None:
    """Neither one that is done, nor one that its budget has ended."""
    done = part(KINDS["a trace"], tmp_path / "trace.ledger", (0, 4))
    ended = {"finished": False, "at_budget": True}
    cut = told_otherwise(done, tmp_path / "cut.ledger", lambda told: told.update(ended))
    for path in (done, cut):
        before = path.read_bytes()
        with pytest.raises(UsageError) as refused:
            kept_in(path, (4, 8))
        assert "another --dir" in refused.value.hint
        assert f"rm {path}" in refused.value.hint
        assert path.read_bytes() == before


# -- As people type it -----------------------------------------------------------------------------


FEW = ("--method", "hutchinson", "--confidence", "90%")


def document(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "trace.json").read_text())
    for name in ("cost", "files", "sha256"):
        del found[name]
    del found["method"]["note"]
    return found


def test_processes_that_share_the_work_come_to_one_result(tmp_path: Path) -> None:
    """With other numbers of threads; a join makes no product."""
    line = ("trace", SUNSPOTS, *FEW)
    for threads, (name, span) in enumerate({"a": "0:4", "b": "4:8"}.items(), 1):
        parts = (*line, "--probes", span, "--dir", name)
        run = hesscli_run(*parts, cwd=tmp_path, OMP_NUM_THREADS=str(threads))
        assert run.returncode == 0, run.stderr
    whole = hesscli_warm(*line, "--probes", 8, "--dir", "all", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    run = hesscli_warm("join", "b/trace.ledger", "a", *SPEC, "--dir", "joined", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "joined: probes 0:4 from a/trace.ledger" in run.stderr
    found, expected = document(tmp_path / "joined"), document(tmp_path / "all")
    estimate = found["trace"].pop("estimate")
    assert estimate == pytest.approx(expected["trace"].pop("estimate"), rel=1e-12)
    assert found["trace"]["confidence"] == 0.9
    assert found["problem"] == expected["problem"]
    assert {path.name for path in (tmp_path / "joined").iterdir()} == {
        path.name for path in (tmp_path / "all").iterdir()
    }


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two parts, and the sample's own files."""
    folder = tmp_path_factory.mktemp("parts")
    shutil.copytree(SUNSPOTS.parent, folder / "mine")
    for name, span in (("a", "0:8"), ("b", "8:16")):
        line = ("trace", "mine/model.pt", *FEW, "--batches", span, "--probes", 2, "--dir", name)
        run = hesscli_warm(*line, cwd=folder)
        assert run.returncode == 0, run.stderr
        assert "8 of 16 batches" in run.stderr
    return folder


def test_a_join_goes_where_it_is_told_and_shows_what_is_asked(parts: Path) -> None:
    shown = ("--layer", "head", "--out", "json", "--dir", "-")
    run = hesscli_warm("join", "a", "b", *shown, cwd=parts)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert [layer["name"] for layer in found["layers"]] == ["head"]
    line = ("trace", "mine/model.pt", *FEW, "--probes", 2, *shown)
    expected = json.loads(hesscli_warm(*line, cwd=parts).stdout)
    for document in (found, expected):
        del document["cost"], document["method"]["note"]
    assert found == expected


def test_a_part_says_that_the_others_are_missing(parts: Path) -> None:
    """More of its own probes, or other examples, would not do."""
    line = ("trace", "mine/model.pt", *FEW, "--batches", "0:4", "--probes", 2, "--rtol", "1%")
    run = hesscli_warm(*line, "--dir", "part", cwd=parts)
    assert run.returncode == ExitCode.TOLERANCE, run.stderr
    said = " ".join(run.stdout.split())
    assert "was not reached by 4 of 16 batches; hesscli join adds the others" in said


def test_a_part_needs_a_place_for_its_ledger(parts: Path) -> None:
    run = hesscli_warm("trace", "mine/model.pt", "--probes", "0:4", "--dir", "-", cwd=parts)
    assert run.returncode == ExitCode.USAGE
    assert "a part is of use with its ledger alone" in run.stderr


def test_what_is_to_be_joined_must_be_named(tmp_path: Path) -> None:
    run = hesscli_warm("join", cwd=tmp_path)
    assert run.returncode == ExitCode.USAGE
    assert "LEDGER" in three_lines(run.stderr)[0]


def test_the_next_part_does_not_take_the_folder_of_another(parts: Path) -> None:
    line = ("trace", "mine/model.pt", *FEW, "--batches", "8:16", "--probes", 2, "--dir", "a")
    run = hesscli_warm(*line, cwd=parts)
    assert run.returncode == ExitCode.USAGE
    what, _, advice = three_lines(run.stderr)
    assert "a part of a result is kept" in what
    assert "another --dir" in advice


def test_a_ledger_lets_no_code_run_that_lies_elsewhere(parts: Path, tmp_path: Path) -> None:
    """The spec that it names is as one that lies beside a checkpoint."""
    named = set_in("begun", "given", "spec", to=str(parts / "mine" / "hesscli.toml"))
    found = set_in("begun", "checkpoint", to=str(parts / "mine" / "model.pt"))
    for name in "ab":
        (tmp_path / name).mkdir()
        once = told_otherwise(parts / name / "trace.ledger", tmp_path / "once", found)
        told_otherwise(once, tmp_path / name / "trace.ledger", named)
    run = hesscli_warm("join", "a", "b", "--dir", "-", cwd=tmp_path)
    assert run.returncode == ExitCode.INPUT
    assert "runs code" in run.stderr
    trusted = ("--spec", parts / "mine" / "hesscli.toml")
    for how in (trusted, ("--trust",)):
        run = hesscli_warm("join", "a", "b", "--dir", "-", *how, cwd=tmp_path)
        assert run.returncode == 0, run.stderr


def test_another_checkpoint_is_refused_by_name(parts: Path, tmp_path: Path) -> None:
    shutil.copytree(parts, tmp_path / "copy")
    saved = torch.load(tmp_path / "copy" / "mine" / "model.pt", weights_only=True)
    saved["head.bias"] *= 1 + 1e-12
    torch.save(saved, tmp_path / "copy" / "other.pt")
    other = ("--checkpoint", "other.pt", "--spec", "mine/hesscli.toml")
    run = hesscli_warm("join", "a", "b", *other, "--dir", "-", cwd=tmp_path / "copy")
    assert run.returncode == ExitCode.USAGE, run.stderr
    what, got, advice = run.stderr.splitlines()[-3:]
    assert "something else" in what
    assert "checkpoint was" in got
    assert "--checkpoint FILE" in advice


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (("diag", "--batches", "8:4"), "--batches must be a range"),
        (("trace", "--batches", "0:2", "--method", "hutchinson"), "needs a number"),
        (("trace", "--batches", "0:1000"), "one of those that there are"),
        (("spectrum", "--probes", "0:4"), "no range, since later ones need the first"),
    ],
)
def test_ranges_that_mean_nothing_are_refused(
    line: tuple[str, ...], what: str, tmp_path: Path
) -> None:
    command, *more = line
    run = hesscli_warm(command, SUNSPOTS, *more, "--dir", "part", cwd=tmp_path)
    assert run.returncode == ExitCode.USAGE, run.stderr
    assert what in run.stderr
