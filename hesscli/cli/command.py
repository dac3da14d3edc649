"""What every command has: a bare ``--layer``, and a console that knows how much to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

from hesscli.cli.console import Console
from hesscli.errors import ExitCode
from hesscli.results import Observe, Status

if TYPE_CHECKING:
    from hesscli.problem.problem import Problem

EVERY_LAYER = "*"


class Command(TyperCommand):
    """A command on which ``--layer`` may stand without a pattern."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments once each bare ``--layer`` has its pattern."""
        return super().parse_args(ctx, fill_bare_layers(args))


def fill_bare_layers(args: Sequence[str]) -> list[str]:
    """Give each bare ``--layer`` the pattern that takes every layer.

    It is bare where it stands last, before another option, or before an existing file, which
    is the checkpoint.
    """
    end = args.index("--") if "--" in args else len(args)
    following = [*args[1:end], "--"]
    filled = [
        f"--layer={EVERY_LAYER}"
        if arg == "--layer" and (after.startswith("-") or Path(after).is_file())
        else arg
        for arg, after in zip(args[:end], following, strict=False)
    ]
    return [*filled, *args[end:]]


_LOADING = (
    "spec",
    "examples",
    "device",
    "dtype",
    "batch_size",
    "weight_decay",
    "trust",
    "seed",
    "budget",
)


def load_problem(context: typer.Context, console: Console, observe: Observe) -> Problem:
    """The problem that the options of a command name; its warnings are said at once."""
    from hesscli.problem.loading import load

    chosen = {name: context.params[name] for name in _LOADING}
    problem = load(context.params["checkpoint"], observe=observe, **chosen)
    console.warn(*problem.warnings)
    return problem


def say_warnings(console: Console, problem: Problem, warnings: Sequence[str]) -> None:
    """A result's warnings, but for those that were said when the problem was loaded."""
    console.warn(*(text for text in warnings if text not in problem.warnings))


def exit_code(status: Status, *, asked: bool) -> ExitCode:
    """What a run that ended so tells the shell; a tolerance counts if it was ``asked`` for."""
    if status == "interrupted":
        return ExitCode.INTERRUPTED
    missed = status not in ("exact", "converged")
    return ExitCode.TOLERANCE if missed and asked else ExitCode.OK


def loudness(context: typer.Context, *, quiet: bool, verbose: bool) -> Console:
    """The run's console, told how much to say; error reports follow it too."""
    root = context.find_root()
    root.obj = replace(root.obj, quiet=quiet, verbose=verbose)
    console: Console = root.obj
    return console
