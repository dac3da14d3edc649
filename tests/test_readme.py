"""What README shows is what happens."""

from __future__ import annotations

import doctest
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from reference import REFERENCE, reference

from hesscli.commands import COMMANDS
from hesscli.problem.spec import read_spec

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert doctest.testfile(str(ROOT / "README.md"), module_relative=False).failed == 0


@pytest.mark.parametrize(
    "module",
    [
        "operators.hessian",
        "diagnostics.prune",
        "operators.dense",
        "engines.root_mean_square",
        "optim.adahessian",
        "optim.mfac",
    ],
)
def test_docstring_examples(module: str) -> None:
    result = doctest.testmod(import_module(f"hesscli.{module}"), optionflags=doctest.ELLIPSIS)
    assert result.attempted
    assert not result.failed


def test_the_spec_shown_is_the_samples() -> None:
    shown = tomllib.loads(README.split("```toml\n")[1].split("```")[0])
    spec = ROOT / "samples" / "fashion" / "hesscli.toml"
    shipped = tomllib.loads(spec.read_text(encoding="utf-8"))
    assert shown == {key: value for key, value in shipped.items() if key != "held_out"}
    assert read_spec(spec).model is not None


def test_every_exit_code_is_named() -> None:
    from hesscli.errors import ExitCode

    told = README.split("Exit codes:")[1]
    assert all(f"{code:d} " in told for code in ExitCode)


def test_every_command_is_named() -> None:
    assert all(f"hesscli {name}" in README for name in COMMANDS)


def test_the_reference_of_options_is_what_help_shows() -> None:
    assert REFERENCE.read_text(encoding="utf-8") == reference(), "make reference"
