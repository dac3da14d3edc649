"""The ledger of a command's run: beside its files, and under their name."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from hesscli.cli.console import Console
from hesscli.cli.usage import Given
from hesscli.errors import UsageError

if TYPE_CHECKING:
    from hesscli.ledger import FileLedger
    from hesscli.locks import Hold
    from hesscli.problem.problem import Problem

MAY_CHANGE = ("budget", "rtol", "atol")
"""Options that may be others when a run goes on: how far it is to come, and by when."""


def ledger_in(
    held: Hold | None, name: str, console: Console, problem: Problem, asked: Given, resume: bool
) -> FileLedger | None:
    """The ledger of a run in a folder; None where there are to be no files.

    Args:
        held: the folder that the run's files go to.
        name: of its files, without an ending.
        console: to say what becomes of it.
        problem: what is measured.
        asked: what the measurement is told.
        resume: go on from what there is.

    Raises:
        UsageError: there is nothing to go on from, or a run would be lost.
    """
    from hesscli.ledger import FileLedger
    from hesscli.problem.factory import code_in_use

    if held is None:
        if resume:
            raise UsageError(
                "--resume goes on from a ledger, which lies where a run's files go",
                "--dir -, which writes none",
                "--resume with the --dir that the run had, or no --dir for the usual one",
            )
        return None
    facts: dict[str, Any] = {name: version(name) for name in ("hesscli", "numpy", "scipy")}
    facts["spec"] = problem.spec_sha256
    facts |= code_in_use()
    facts |= {
        f"--{name.replace('_', '-')}": str(value) if isinstance(value, tuple) else value
        for name, value in asked.items()
        if name not in MAY_CHANGE
    }
    path = held.folder / f"{name}.ledger"
    return FileLedger(path, facts, resume=resume, say=console.warn, check=held.check)
