"""The ledger of a command's run: beside its files, and under their name."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hesscli.cli.console import Console
from hesscli.cli.options import SHOWN, TRUST
from hesscli.cli.usage import Given, Usage
from hesscli.errors import UsageError

if TYPE_CHECKING:
    from hesscli.ledger import FileLedger
    from hesscli.locks import Hold
    from hesscli.problem.problem import Problem

MAY_CHANGE = ("budget", "rtol", "atol")
"""Options that may be others when a run goes on: how far it is to come, and by when."""
LOADED = ("examples", "batch_size", "weight_decay", "device", "dtype", "checkpoint_activations")
"""Options that may be others where that changes nothing: what they make of a problem must not."""
RANGES = ("probes", "batches")
"""Options by which a run is of a part of the work."""


def ledger_in(
    held: Hold | None,
    name: str,
    console: Console,
    problem: Problem,
    asked: Given,
    given: Given,
    begun: Mapping[str, Any],
) -> FileLedger | None:
    """The ledger of a run in a folder; None where there are to be no files.

    Args:
        held: the folder that the run's files go to.
        name: of its files, without an ending.
        console: to say what becomes of it.
        problem: what is measured.
        asked: what the measurement is told.
        given: all that was typed.
        begun: how, for who has nothing but the ledger.

    Raises:
        UsageError: there is nothing to go on from, or a run would be lost.
    """
    from hesscli.ledger import FileLedger

    resume = given["resume"]
    part = any(isinstance(asked.get(name), tuple) for name in RANGES)
    if held is None:
        if part:
            raise UsageError(
                "a part is of use with its ledger alone, which lies where a run's files go",
                "--dir -, which writes none",
                "another --dir, or none for the usual one; --probes N for a run that is no part",
            )
        if resume:
            raise UsageError(
                "--resume goes on from a ledger, which lies where a run's files go",
                "--dir -, which writes none",
                "--resume with the --dir that the run had, or no --dir for the usual one",
            )
        return None
    return FileLedger(
        held.folder / f"{name}.ledger",
        facts_of(problem, asked),
        resume=resume,
        say=console.warn,
        loaded=_typed(given, LOADED),
        begun=begun,
        part=part,
        check=held.check,
    )


def facts_of(problem: Problem, asked: Given) -> dict[str, Any]:
    """What a run is of, beside what its problem says: versions, code and options.

    Args:
        problem: what is measured.
        asked: what the measurement is told.
    """
    from hesscli.problem.factory import code_in_use

    facts: dict[str, Any] = {name: version(name) for name in ("hesscli", "numpy", "scipy")}
    facts |= problem.origin.facts
    facts["--params"] = problem.restricted_to
    facts |= code_in_use()
    return facts | _typed(asked, [name for name in asked if name not in MAY_CHANGE])


def begun_as(
    command: str, usage: Usage, checkpoint: Path | None, problem: Problem, given: Given
) -> dict[str, Any]:
    """How a run was begun, for who has nothing but its ledger.

    Args:
        command: its name.
        usage: how that is typed.
        checkpoint: as it was typed.
        problem: what is measured.
        given: all else that was typed.
    """
    found = problem.checkpoint
    shown = {option.name for option in (*SHOWN, TRUST)}
    return {
        "command": command,
        "joins": {option.name for option in usage.options} >= set(RANGES),
        "checkpoint": checkpoint,
        "found": None if found is None else Path(found.path).resolve(),
        "host": platform.node(),
        "given": {name: value for name, value in given.items() if name not in shown},
    }


def _typed(given: Given, names: Iterable[str]) -> dict[str, Any]:
    """Options by what they are called on a command line."""
    values = ((f"--{name.replace('_', '-')}", given[name]) for name in names)
    return {name: str(value) if isinstance(value, tuple) else value for name, value in values}
