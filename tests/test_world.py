"""Ranks that torchrun starts find what one process finds, and speak with one voice."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from program import environment, hesscli_warm, three_lines
from test_lanczos import off_orthonormal
from test_resume import RUNS, cut_off, kept_in, problem, said
from torch import Tensor

import hesscli
from hesscli.ledger import read_ledger
from hesscli.sums import rounding_of_sum
from hesscli.units import human_bytes

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
FROM_TABLES = ("a trace", "shared probes", "probes by layer", "a trace in rounds")
"""Runs whose numbers are made of tables by batch alone."""
ALONE = ("a trace in rounds", "a spectrum", "a spectrum with copies", "sensitivities")
"""Runs that are cut off here, and gone on with by ranks."""

NET = """
import os, signal
from torch import nn
from torch.nn import functional as F
import torch

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))

def data():
    torch.manual_seed(1)
    return torch.randn(35, 3), torch.randint(2, (35,))

calls = 0

def loss(outputs, targets):
    global calls
    calls += 1
    {ending}
    return F.cross_entropy(outputs, targets)
"""
SPEC = """
[model]
factory = "net:Net"
training = true
[data]
factory = "net:data"
batch_size = 8
[loss]
factory = "net:loss"
"""


def folder_with(path: Path, ending: str) -> Path:
    """A model that mixes the examples of a batch, whose loss may end a rank."""
    path.mkdir(exist_ok=True)
    source = NET.replace("{ending}", ending)
    (path / "net.py").write_text(source)
    (path / "hesscli.toml").write_text(SPEC)
    space: dict[str, Any] = {}
    exec(source, space)
    torch.manual_seed(0)
    torch.save(space["Net"]().double().state_dict(), path / "model.pt")
    return path


def torchrun(count: int, *args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TORCHRUN, str(count), *map(str, args)],
        cwd=cwd,
        env=environment(PYTHONPATH=os.pathsep.join([*sys.path])),
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )


@dataclass(frozen=True)
class Ranks:
    """What ranks have found, and what they said."""

    folder: Path
    found: list[dict[str, Any]]
    said: subprocess.CompletedProcess[str]


def ranks_of(count: int, folder: Path) -> Ranks:
    """Let so many ranks do all that is looked at below, once."""
    folder_with(folder, "pass")
    (folder / "alone").mkdir()
    for name in ALONE:
        (make, measure), (phase, at) = RUNS[name], ranks.CUT[name]
        cut_off(measure, make(), at, kept_in(folder / "alone" / f"{name}.ledger"), phase)
    run = torchrun(count, ranks.__file__, folder, cwd=folder)
    assert run.returncode == 0, run.stderr
    files = [folder / f"{rank}.pickle" for rank in range(count)]
    return Ranks(folder, [pickle.loads(file.read_bytes()) for file in files], run)


@pytest.fixture(
    scope="module", params=[2, *(pytest.param(n, marks=pytest.mark.ranks) for n in (3, 4))]
)
def several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return ranks_of(request.param, tmp_path_factory.mktemp("ranks"))


def alone(name: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    make, measure = RUNS[name]
    document, arrays = said(measure(make(), budget=None))
    return json.loads(document), arrays


def from_tables(document: dict[str, Any]) -> dict[str, Any]:
    """All but what it took, and the length of the gradient, which is a vector's."""
    return document | {"cost": None, "problem": document["problem"] | {"gradient_norm": None}}


def require_the_same(name: str, told: tuple[str, dict[str, bytes]]) -> None:
    """See that numbers are those of one process: to the last bit, or within their bounds."""
    (document, arrays), (here, expected) = (json.loads(told[0]), told[1]), alone(name)
    assert document["status"] == here["status"]
    # Which rank measures rounding decides whether a graph is to be made anew for it.
    near = 1e-12 if name in FROM_TABLES else 0.02
    assert document["cost"] == pytest.approx(here["cost"], rel=near)
    assert document["problem"]["loss"] == here["problem"]["loss"]
    if name in FROM_TABLES:
        assert from_tables(document) == from_tables(here)
    for one, other in zip(
        document.get("eigenvalues", ()), here.get("eigenvalues", ()), strict=True
    ):
        assert abs(one["value"] - other["value"]) <= one["residual"] + other["residual"]
    near = 8 * float(np.finfo("float32").eps)
    for one, other in zip(document.get("layers", ()), here.get("layers", ()), strict=True):
        if (its := other.get("saliency")) is not None:
            assert one["saliency"]["mean"] == pytest.approx(its["mean"], rel=near)
            assert one["saliency"]["stderr"] == pytest.approx(its["stderr"], rel=near)
            for level, wanted in zip(one["saliency"]["quantiles"], its["quantiles"], strict=True):
                assert level == pytest.approx(wanted, rel=near)
    for key in expected:  # sums over three batches, or what is made of such a sum
        found, wanted = (np.frombuffer(each[key], "float32") for each in (arrays, expected))
        assert np.abs(found - wanted).max() <= near * np.abs(wanted).max()


@pytest.mark.parametrize("name", ranks.WHOLE)
def test_ranks_find_what_one_process_finds(name: str, several: Ranks) -> None:
    every = [found["whole"][name] for found in several.found]
    assert all(each == every[0] for each in every)
    require_the_same(name, every[0])


@pytest.mark.parametrize("name", ranks.CUT)
def test_one_process_goes_on_with_what_ranks_have_kept(name: str, several: Ranks) -> None:
    make, measure = RUNS[name]
    path = several.folder / f"{name}.ledger"
    assert read_ledger(path)["work"]
    require_the_same(name, said(measure(make(), budget=None, ledger=kept_in(path, resume=True))))


@pytest.mark.parametrize("name", ALONE)
def test_ranks_go_on_with_what_one_process_has_kept(name: str, several: Ranks) -> None:
    require_the_same(name, several.found[0]["resumed"][name])


def test_a_product_sends_one_vector(several: Ranks) -> None:
    operator = hesscli.Hessian(problem())
    size, vector = operator.parameters.size, torch.ones(operator.parameters.size).double()
    exact = operator @ vector
    for found in several.found:
        assert (found["sums"], found["numbers"]) == (3, 3 * size)
        assert found["products"] == pytest.approx(3)
        assert found["alike"]
        bound = 3 * torch.finfo(torch.float64).eps * sum(found["parts"])
        assert float((found["product"] - exact).norm()) <= bound


def test_examples_of_one_batch_are_cut_for_all_ranks(several: Ranks) -> None:
    """Alone they are one again; sums are then rounded in another order, but not the proof's.

    By its loss and gradient a ledger is recognised, by however many ranks it was written.
    """
    here, count = ranks.joined(), len(several.found)
    assert here["groups"] == 1
    for found in several.found:
        assert found["groups"] == count
        assert found["proof"] == here["proof"]
        for name in ("ggn", "top"):
            (one, error), (other, bound) = found[name], here[name]
            assert abs(one - other) <= error + bound


def solved(rows: Tensor, vector: Tensor, damping: float) -> Tensor:
    """(GᵀG/n + λI)⁻¹ x in float64 by Woodbury's identity."""
    rows = rows.double()
    small = rows @ rows.T + len(rows) * damping * torch.eye(len(rows), dtype=torch.float64)
    return (vector - rows.T @ torch.linalg.solve(small, rows @ vector)) / damping


def test_a_window_in_column_shards_solves_as_one_rank_s_does(several: Ranks) -> None:
    here, count = ranks.sharded(), len(several.found)
    rows, vector, damping = here["rows"], here["vector"], here["damping"]
    ends = np.cumsum(ranks.BLOCKS)
    blocks = [slice(end - size, end) for end, size in zip(ends, ranks.BLOCKS, strict=True)]
    truths = [
        solved(rows[:25], vector, damping),
        solved(rows[:25], rows[3].double(), damping),
        *(
            torch.cat([solved(rows[:25, block], x[block], damping) for block in blocks])
            for x in (vector, rows[3].double())
        ),
        solved(rows[2:], vector, damping),
    ]
    assert sum(found["sharded"]["held"] for found in several.found) == here["held"]
    for found in (each["sharded"] for each in several.found):
        assert found["held"] <= 25 * 4 * (9001 // count + 1)
        assert found["damping"] == pytest.approx(damping, rel=1e-14)
        for (mine, error), (alone, its), truth in zip(
            found["solutions"], here["solutions"], truths, strict=True
        ):
            size = float(truth.norm())
            assert 0 < error < 0.01
            assert float((mine - truth).norm()) <= error * size
            assert float((mine - alone).norm()) <= (error + its) * size
        for name in ("diagonal", "blocks' diagonal"):
            allowed = found[f"{name} error"] + here[f"{name} error"]
            assert ((found[name] - here[name]).abs() <= allowed).all()
        for name in ("multiplied", "blocks multiplied"):
            torch.testing.assert_close(found[name], here[name], rtol=0, atol=1e-10)


def test_a_window_in_shards_sends_its_gram_matrix_once_and_as_many_numbers_as_rows(
    several: Ranks,
) -> None:
    """A solve has two lengths besides, where it is not known from the rows: x's and y's."""
    for found in several.found:
        gram, solve = found["sharded"]["numbers"]
        assert gram <= 25 * 25 + 25
        assert solve <= 25 + 3


def test_a_basis_in_column_shards_is_one_rank_s(several: Ranks) -> None:
    here, count = ranks.basis(), len(several.found)
    off = rounding_of_sum(ranks.BASIS[1], torch.float64)
    assert sum(found["basis"]["held"] for found in several.found) == here["held"]
    for found in (each["basis"] for each in several.found):
        assert found["held"] <= 1.15 * here["held"] / count
        assert torch.equal(found["basis"], several.found[0]["basis"]["basis"])
        assert found["kept"]
        rows = found["basis"]
        assert off_orthonormal(rows) <= off
        assert float(rows[:, :3].abs().max()) <= off
        (values, bars), (alone, its) = found["ritz"], here["ritz"]
        assert (np.abs(values - alone) <= bars + its).all()
        distances = np.abs(values[:, None] - found["true"].numpy()).min(axis=1)
        assert (distances <= bars).all()
        halves = torch.tensor_split(found["largest"], [len(found["largest"]) // 2])
        for half, length in zip(halves, found["halves"], strict=True):
            assert abs(float(half.square().sum() - length)) <= off


def test_a_step_sends_one_vector_and_as_many_numbers_as_rows(several: Ranks) -> None:
    """Of each rank: of all rows, at most twice, with the last two before and a length after."""
    rows, size = ranks.BASIS
    for found in several.found:
        numbers = sum(2 + 2 * (3 + step + 1) for step in range(1, rows + 1))
        assert found["basis"]["sent"] <= rows * size + len(several.found) * numbers


def test_a_basis_is_kept_row_by_row(several: Ranks) -> None:
    """What a full disk does not take is written with what comes after."""
    name, full = "a spectrum with copies", "the run goes on, but is not kept"
    assert [told[: len(full)] for told in several.found[0]["kept"][name]] == [full] * 2
    kept = read_ledger(several.folder / f"{name}.ledger")["work"][0]["state"]["whole"]
    rows = torch.cat(list(kept["lanczos"]["rows"].since(0)))
    assert len(rows) == 13
    assert off_orthonormal(rows) <= rounding_of_sum(32, torch.float64)
    assert kept["copied"] == [3, 2]
    assert sum(map(len, kept["copies"].since(0))) == 5


def test_a_bad_row_of_one_rank_is_everybody_s(several: Ranks) -> None:
    for found in several.found:
        assert found["refused"] == [
            "a gradient has the wrong length",
            "a gradient is not finite",
            "0",
        ]


def test_a_check_plans_a_rank_s_share_of_the_window(several: Ranks) -> None:
    """Of 34 rows of 31 float32 numbers; and says how many ranks would hold what does not fit."""
    count = len(several.found)
    for fits, vectors, does_not, _ in (found["plans"] for found in several.found):
        held = human_bytes(31 * -(-31 // count) * 4)
        assert f"31 steps, each of which keeps a vector: {held}, at most " in vectors
        assert vectors.endswith(f"with restarts, on each of {count} ranks")
        assert (
            f"34 rows take 4.1 KiB, {4216 / count / 1024:.1f} KiB on each of {count} ranks" in fits
        )
        assert does_not.startswith("refused: the window is larger than the memory that is free")
        assert f"{count} ranks have room for" in does_not
        assert does_not.endswith("ranks with as much memory each")


def test_replicas_take_one_process_s_steps(several: Ranks) -> None:
    """A batch in parts is summed in another order, of eight terms and as many ranks."""
    alone = ranks.trained()
    for found in several.found:
        for name, expected in alone.items():
            assert torch.equal(found["trained"][name], several.found[0]["trained"][name])
            torch.testing.assert_close(found["trained"][name], expected, rtol=0, atol=1e-11)


def test_whoever_steps_alone_among_others_is_told_once(several: Ranks) -> None:
    """Replicas would drift apart in silence; those that are averaged do not."""
    for found in several.found:
        (told,) = found["warned"]
        assert told.startswith(f"derivatives of {len(several.found)} processes are not averaged")
        assert "replicas=torch.distributed.group.WORLD" in told


def test_what_one_rank_meets_all_meet(several: Ranks) -> None:
    for found in several.found:
        raised, differs = found["told"]
        assert raised.splitlines()[0] == "the loss is not finite"
        assert "threads is 1 on rank 0, and 2 on rank 1" in differs
        assert found["bytes"] == several.found[0]["bytes"]


def test_one_rank_speaks_and_writes(several: Ranks) -> None:
    """Of a sample, and of a model that mixes the examples of batches of which the last is short."""
    told = several.said.stdout.replace("\n}\n{", "\n}\0{").split("\0")
    for document, model in zip(told, (ranks.SUNSPOTS, "model.pt"), strict=True):
        options = ("--method", "hutchinson", "--probes", 4, "--out", "json", "--dir", "-")
        here = hesscli_warm("trace", model, *options, cwd=several.folder)
        found, expected = json.loads(document), json.loads(here.stdout)
        assert found["trace"] == expected["trace"]
        assert found["layers"] == expected["layers"]
    errors = [line for line in several.said.stderr.splitlines() if line.startswith("error")]
    assert errors == ["error: checkpoint not found"]
    assert several.said.stderr.count("wrote ") == 3
    assert all(found["codes"] == [0, 3, 0] for found in several.found)


def test_a_signal_to_one_rank_ends_all_at_what_they_have(several: Ranks) -> None:
    first, *_, last = several.found
    assert (first["came"], last["came"]) == ([], [signal.SIGTERM])
    assert {found["status"] for found in several.found} == {"interrupted"}
    assert {found["probes"] for found in several.found} == {first["probes"]}
    assert 2 <= first["probes"] < 512


@pytest.mark.ranks
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_others_in_three_lines(rank: int, tmp_path: Path) -> None:
    """At once, and with no result."""
    kill = f'if os.environ.get("RANK") == "{rank}" and calls > 40: os.kill(os.getpid(), 9)'
    folder_with(tmp_path, kill)
    began = time.monotonic()
    options = ("--method", "hutchinson", "--probes", 512, "--dir", "out")
    run = torchrun(2, "-m", "hesscli", "trace", "model.pt", *options, cwd=tmp_path)
    assert run.returncode == 1
    assert time.monotonic() - began < 60
    assert not run.stdout
    lines = run.stderr.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("error: "))
    what, got, hint = three_lines("\n".join(lines[start : start + 3]))
    assert what == f"rank {rank} of 2 has ended or answers no more"
    assert got
    assert "--resume" in hint
    assert run.stderr.count("error: ") == 1
    assert not list((tmp_path / "out").glob("*.json"))


@pytest.mark.ranks
def test_a_signal_to_torchrun_ends_all_at_what_they_have(tmp_path: Path) -> None:
    torchrun(2, ranks.__file__, tmp_path, "told to end", cwd=tmp_path)
    found = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in (0, 1)]
    assert [each["came"] for each in found] == [[signal.SIGTERM]] * 2
    assert [each["status"] for each in found] == ["interrupted"] * 2
    assert found[0]["probes"] == found[1]["probes"]


@pytest.mark.ranks
def test_a_rank_that_stands_still_is_waited_for_no_longer_than_is_said(tmp_path: Path) -> None:
    """Here five seconds; torchrun then gives it thirty to end by itself."""
    began = time.monotonic()
    torchrun(2, ranks.__file__, tmp_path, "hung", cwd=tmp_path)
    assert time.monotonic() - began < 90
    found = pickle.loads((tmp_path / "0.pickle").read_bytes())
    assert found["lost"].startswith("rank 1 of 2 has ended or answers no more\n  got: ")


@pytest.mark.ranks
def test_a_budget_ends_all_ranks_in_time(tmp_path: Path) -> None:
    """Start-up is in it, which takes its seconds where others work too."""
    folder_with(tmp_path, "pass")
    options = ("--method", "hutchinson", "--probes", 10**6, "--budget", "20s", "--dir", "-")
    run = torchrun(2, "-m", "hesscli", "trace", "model.pt", *options, "--out", "json", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    document = json.loads(run.stdout)
    assert 2 <= document["method"]["num_probes"] < 10**6
    assert document["status"] in ("budget", "converged")  # by chance within the usual tolerance
