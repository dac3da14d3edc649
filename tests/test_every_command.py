"""What holds for every command that measures, whichever it is: one that is new included."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import jsonschema
import pytest
from program import FEW, SUNSPOTS, hesscli_warm, three_lines
from toy import TOY

import hesscli
from hesscli.cli import options
from hesscli.cli.app import main
from hesscli.cli.usage import Usage
from hesscli.commands import COMMANDS, Command
from hesscli.errors import ExitCode
from hesscli.render.document import schema

LAYERS = {"hidden1", "hidden2", "head"}
MEASURED = [*(name for name, command in COMMANDS.items() if command.figures), "toy"]
_ENDLESS = ("--budget", "none", "--rtol", "0.0001%")
STOPPED = {
    "trace": ("±", "--method", "hutchinson", *_ENDLESS),
    "diag": ("±", "--method", "hutchinson", *_ENDLESS),
    "ihvp": ("perturbing", "--window", 32, *_ENDLESS),
    "spectrum": ("iterating", "--steps", 64, "--budget", "none"),
    "symmetry": ("testing symmetries",),
    "prune": ("comparing methods",),
    "toy": ("taking gradients",),
}
"""What is said when Ctrl-C is pressed and there is something to show, and work that goes on."""


@dataclass(frozen=True)
class Ran:
    """A command that was run with ``--layer head``: what it printed, and its document."""

    command: str
    stdout: str
    document: dict[str, Any]
    folder: Path


@pytest.fixture(autouse=True, scope="module")
def toy() -> Iterator[None]:
    """A command more, by one entry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(COMMANDS, "toy", TOY)
        yield


@pytest.fixture(scope="module", params=MEASURED)
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    command, folder = request.param, tmp_path_factory.mktemp(request.param)
    few = FEW.get(command, ())
    run = hesscli_warm(command, SUNSPOTS, *few, "--dir", ".", "--layer", "head", cwd=folder)
    assert run.returncode == 0, run.stderr
    document = json.loads((folder / f"{command}.json").read_text())
    return Ran(command, run.stdout, document, folder)


def named(text: str) -> set[str]:
    """The sample's layers that a text names, or the tensors of."""
    return {layer for layer in LAYERS if re.search(rf"\b{layer}\b", text)}


def texts(picture: Path) -> str:
    """What is written in a picture, where it is drawn as outlines."""
    return "\n".join(re.findall("<!-- (.*?) -->", picture.read_text(encoding="utf-8")))


def test_layer_restricts_table_pictures_and_document_alike(ran: Ran) -> None:
    assert named(ran.stdout) <= {"head"}
    assert [layer["name"] for layer in ran.document["layers"]] == ["head"]
    files = ran.document["files"].items()
    drawn = [named(texts(ran.folder / path)) for kind, path in files if kind.startswith("svg")]
    assert {"head"} in drawn
    assert all(names <= {"head"} for names in drawn)


def test_a_document_keeps_the_schema_and_says_where_files_are(ran: Ran) -> None:
    jsonschema.validate(ran.document, schema())
    assert ran.document["command"] == ran.command
    written = {Path(path).name for path in ran.document["files"].values()}
    assert written == {path.name for path in ran.folder.iterdir()}


@pytest.mark.parametrize("command", MEASURED)
def test_an_interrupted_run_prints_its_result(command: str, tmp_path: Path) -> None:
    word, *more = STOPPED[command]
    line = (command, SUNSPOTS, *more, "-v", "--out", "json", "--dir", "-")
    run = hesscli_warm(*line, cwd=tmp_path, ctrl_c_at=word)
    assert run.returncode == ExitCode.INTERRUPTED, run.stderr
    document = json.loads(run.stdout)
    assert document["status"] == "interrupted"
    jsonschema.validate(document, schema())


def answer_in(folder: Path, command: str) -> dict[str, Any]:
    """The document, without what was measured of the machine, and without pictures."""
    document: dict[str, Any] = json.loads((folder / f"{command}.json").read_text())
    del document["cost"]["seconds"], document["cost"]["peak_bytes"]
    del document["files"], document["sha256"]
    return document


def test_a_run_that_was_cut_off_is_gone_on_with_and_not_overwritten(
    tmp_path: Path, ran: Ran
) -> None:
    command = ran.command
    word, *_ = STOPPED[command]
    few = (*FEW.get(command, ()), "--layer", "head", "--dir", ".")
    line = (command, SUNSPOTS, *few, "-v")
    word = "probing" if word == "±" else word  # these end before there is a first estimate
    cut = hesscli_warm(*line, cwd=tmp_path, ctrl_c_at=word)
    assert cut.returncode == ExitCode.INTERRUPTED, cut.stderr
    assert (tmp_path / f"{command}.ledger").exists()
    refused = hesscli_warm(command, SUNSPOTS, *few, cwd=tmp_path)
    assert refused.returncode == ExitCode.USAGE
    *_, advice = refused.stderr.splitlines()
    assert "--resume" in advice
    resumed = hesscli_warm(*line, "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert answer_in(tmp_path, command) == answer_in(ran.folder, command)
    assert not (tmp_path / f"{command}.ledger").exists()


def test_a_run_on_other_examples_is_refused_by_the_option(tmp_path: Path) -> None:
    """A batch size that cuts them into others is another run: sums have other last digits."""
    line = ("trace", SUNSPOTS, "--method", "hutchinson", "--dir", ".", "-v", "--batch-size")
    cut = hesscli_warm(*line, 32, "--examples", 99, cwd=tmp_path, ctrl_c_at="probing")
    assert cut.returncode == ExitCode.INTERRUPTED, cut.stderr
    refused = hesscli_warm(*line, 32, "--examples", 98, "--resume", cwd=tmp_path)
    assert refused.returncode == ExitCode.USAGE
    *_, got, hint = refused.stderr.splitlines()
    assert got.startswith("  got: --examples was 99 and is 98; num_examples was 99 and is 98")
    assert hint.startswith("  try: --examples 99,")
    resized = hesscli_warm(*line, 1, "--examples", 99, "--resume", cwd=tmp_path)
    assert resized.returncode == ExitCode.USAGE
    *_, got, hint = resized.stderr.splitlines()
    assert got.startswith("  got: --batch-size was 32 and is 1;")
    assert hint.startswith("  try: --batch-size 32,")
    resumed = hesscli_warm(*line, 32, "--examples", 99, "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr


def test_a_run_of_other_code_is_not_gone_on_with(tmp_path: Path) -> None:
    """Its checks are not made again, so that the code must be what was checked."""
    shutil.copytree(SUNSPOTS.parent, tmp_path / "mine")
    line = ("trace", "mine/model.pt", "--method", "hutchinson", "--dir", ".", "-v")
    cut = hesscli_warm(*line, cwd=tmp_path, ctrl_c_at="probing")
    assert cut.returncode == ExitCode.INTERRUPTED, cut.stderr
    code = tmp_path / "mine" / "net.py"
    code.write_text(code.read_text() + "# nothing else\n")
    refused = hesscli_warm(*line[:-1], "--resume", cwd=tmp_path)
    assert refused.returncode == ExitCode.USAGE
    what, got, _ = refused.stderr.splitlines()[-3:]
    assert "another run" in what
    assert code.name in got


@pytest.mark.parametrize("command", MEASURED)
def test_nothing_is_kept_where_there_are_no_files(command: str, tmp_path: Path) -> None:
    run = hesscli_warm(command, SUNSPOTS, "--resume", "--dir", "-", cwd=tmp_path)
    assert run.returncode == ExitCode.USAGE
    what, got, advice = three_lines(run.stderr)
    assert "--resume" in what
    assert "--dir -" in got
    assert "--dir" in advice


@pytest.mark.parametrize("command", MEASURED)
def test_a_budget_too_small_exits_5_and_says_what_would_do(command: str, tmp_path: Path) -> None:
    run = hesscli_warm(command, SUNSPOTS, "--budget", "0.001s", "--dir", "-", cwd=tmp_path)
    assert (run.returncode, run.stdout) == (ExitCode.TOLERANCE, ""), run.stderr
    _, _, advice = three_lines(run.stderr)
    assert "--budget" in advice


@pytest.mark.parametrize("command", MEASURED)
def test_warnings_of_products_are_said(command: str, tmp_path: Path) -> None:
    few = (*FEW.get(command, ()), "--mode", "finite-difference", "--out", "json", "--dir", "-")
    run = hesscli_warm(command, SUNSPOTS, *few, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "products are central differences" in run.stderr
    assert any("central differences" in told for told in json.loads(run.stdout)["warnings"])


@pytest.mark.parametrize("asked", [(), ("--matrix", "ggn")], ids=["hessian", "ggn"])
def test_plans_are_within_a_factor_of_two_of_the_runs(
    asked: tuple[str, ...], tmp_path: Path
) -> None:
    """In gradients and products, which no machine changes: of every command that there is."""
    shown = (*asked, "--out", "json", "--dir", "-")
    checked = hesscli_warm("check", SUNSPOTS, *shown, cwd=tmp_path)
    planned = json.loads(checked.stdout)["plan"]["commands"]
    assert [plan["command"] for plan in planned] == MEASURED
    for plan in planned:
        run = hesscli_warm(plan["command"], SUNSPOTS, *shown, cwd=tmp_path)
        cost = json.loads(run.stdout)["cost"]
        for work in ("gradients", "products"):
            assert cost[work] / 2 <= plan[work] <= 2 * cost[work], (plan, cost)


def test_a_run_names_the_tolerance_that_it_kept_or_missed(ran: Ran) -> None:
    wanted, status = ran.document["method"]["rtol"], ran.document["status"]
    assert (wanted is None) == (ran.command in ("symmetry", "prune", "toy"))  # they have none
    if wanted is not None and status in ("converged", "budget"):
        assert f"the tolerance of {100 * wanted:g}%" in " ".join(ran.stdout.split())


@pytest.mark.parametrize("command", MEASURED)
def test_help_names_the_command_and_its_options(command: str, capsys) -> None:
    assert main(["--help"]) == 0
    assert f" {command} " in capsys.readouterr().out
    assert main([command, "--help"]) == 0
    told = capsys.readouterr().out
    assert f"hesscli {command}" in told
    for option in ("--budget", "--layer", "--out"):
        assert option in told


@pytest.mark.parametrize("command", [*COMMANDS, "toy"])
def test_every_part_that_the_registry_names_is_there(command: str) -> None:
    entry = COMMANDS[command]
    usage: Usage = resolve_name(entry.usage)
    assert usage.examples.startswith("Examples:\n\n  hesscli ")
    names = [option.name for option in usage.options]
    assert len(names) == len(set(names))
    if not entry.result:
        assert usage.run is not None
        assert entry == Command(usage=entry.usage)
        return
    assert resolve_name(entry.result).command == command
    for part in (entry.measure, entry.table, entry.figures or entry.table):
        assert callable(resolve_name(part))
    loaded = {option.name for option in options.LOADED}
    assert loaded <= set(names)
    assert loaded <= inspect.signature(hesscli.load).parameters.keys()


@pytest.mark.parametrize("command", [*MEASURED, "check"])
def test_options_and_python_mean_the_same_where_nothing_is_said(command: str) -> None:
    usage: Usage = resolve_name(COMMANDS[command].usage)
    parameters = inspect.signature(resolve_name(COMMANDS[command].measure)).parameters
    typed = usage.defaults()
    shared = {
        name: parameter.default
        for name, parameter in parameters.items()
        if name in typed and parameter.default is not inspect.Parameter.empty
    }
    usual = {option.name: option.usual for option in usage.options if option.usual is not None}
    own = {"window", "layers"} & shared.keys()  # another type, made of several options
    assert {name: (typed | usual)[name] for name in shared.keys() - own} == {
        name: shared[name] for name in shared.keys() - own
    }
