"""The registry: every command of hesscli, and where its parts are. Importing it loads nothing else.

A new command is one entry here, and the files that it names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any


@dataclass(frozen=True)
class Command:
    """A command, and its parts as ``module:name``.

    Attributes:
        usage: how it is typed, a :class:`hesscli.cli.options.Usage`.
        result: the class of its answer, whose documents the schema describes; empty, as are the
            others, where ``usage`` says all that it does.
        measure: the function that answers in Python.
        table: from an answer, and ``full=True`` for every layer in full detail, to a table.
        figures: from an answer, and what was asked by the names of options, to pictures by the
            names of their files; empty where it has none.
    """

    usage: str
    result: str = ""
    measure: str = ""
    table: str = ""
    figures: str = ""


COMMANDS: dict[str, Command] = {
    "check": Command(
        "hesscli.cli.check:USAGE",
        "hesscli.results.check:CheckResult",
        "hesscli.diagnostics.check:check",
        "hesscli.render.tables.check:check_table",
    ),
    "init": Command("hesscli.cli.init:USAGE"),
    "trace": Command(
        "hesscli.cli.trace:USAGE",
        "hesscli.results.trace:TraceResult",
        "hesscli.diagnostics.trace:trace",
        "hesscli.render.tables.trace:trace_table",
        "hesscli.render.figures.trace:figures",
    ),
    "diag": Command(
        "hesscli.cli.diag:USAGE",
        "hesscli.results.diag:DiagResult",
        "hesscli.diagnostics.diag:diagonal",
        "hesscli.render.tables.diag:diag_table",
        "hesscli.render.figures.diag:figures",
    ),
    "ihvp": Command(
        "hesscli.cli.ihvp:USAGE",
        "hesscli.results.ihvp:IhvpResult",
        "hesscli.diagnostics.ihvp:sensitivity",
        "hesscli.render.tables.ihvp:ihvp_table",
        "hesscli.render.figures.ihvp:figures",
    ),
    "spectrum": Command(
        "hesscli.cli.spectrum:USAGE",
        "hesscli.results.spectrum:SpectrumResult",
        "hesscli.diagnostics.spectrum:spectrum",
        "hesscli.render.tables.spectrum:spectrum_table",
        "hesscli.render.figures.spectrum:figures",
    ),
    "schema": Command("hesscli.cli.schema:USAGE"),
}


def results() -> dict[str, Any]:
    """The class of each command's answer, by the command."""
    named = {name: command.result for name, command in COMMANDS.items() if command.result}
    return {name: resolve_name(result) for name, result in named.items()}
