"""The registry: every command of hesscli, and where its parts are. Importing it loads nothing else.

A new command is one entry here, and the files that it names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command, and its parts as ``module:name``.

    Attributes:
        usage: how it is typed, a :class:`hesscli.cli.usage.Usage`.
        result: the class of its answer, whose documents the schema describes; empty, as are the
            others, where ``usage`` says all that it does.
        measure: the function that answers in Python.
        plan: from a pilot to the stages of the work that it will be, for ``check``; empty where
            nothing is planned.
        table: from an answer, and ``full=True`` for every layer in full detail, to a table.
        figures: from an answer, and what was asked by the names of options, to pictures by the
            names of their files; empty where it has none.
    """

    usage: str
    result: str = ""
    measure: str = ""
    plan: str = ""
    table: str = ""
    figures: str = ""


COMMANDS: dict[str, Command] = {
    "check": Command(
        usage="hesscli.cli.check:USAGE",
        result="hesscli.results.check:CheckResult",
        measure="hesscli.diagnostics.check:check",
        table="hesscli.render.tables.check:check_table",
    ),
    "init": Command(usage="hesscli.cli.init:USAGE"),
    "trace": Command(
        usage="hesscli.cli.trace:USAGE",
        result="hesscli.results.trace:TraceResult",
        measure="hesscli.diagnostics.trace:trace",
        plan="hesscli.diagnostics.trace:plan",
        table="hesscli.render.tables.trace:trace_table",
        figures="hesscli.render.figures.trace:figures",
    ),
    "diag": Command(
        usage="hesscli.cli.diag:USAGE",
        result="hesscli.results.diag:DiagResult",
        measure="hesscli.diagnostics.diag:diagonal",
        plan="hesscli.diagnostics.diag:plan",
        table="hesscli.render.tables.diag:diag_table",
        figures="hesscli.render.figures.diag:figures",
    ),
    "ihvp": Command(
        usage="hesscli.cli.ihvp:USAGE",
        result="hesscli.results.ihvp:IhvpResult",
        measure="hesscli.diagnostics.ihvp:sensitivity",
        plan="hesscli.diagnostics.ihvp:plan",
        table="hesscli.render.tables.ihvp:ihvp_table",
        figures="hesscli.render.figures.ihvp:figures",
    ),
    "spectrum": Command(
        usage="hesscli.cli.spectrum:USAGE",
        result="hesscli.results.spectrum:SpectrumResult",
        measure="hesscli.diagnostics.spectrum:spectrum",
        plan="hesscli.diagnostics.spectrum:plan",
        table="hesscli.render.tables.spectrum:spectrum_table",
        figures="hesscli.render.figures.spectrum:figures",
    ),
    "symmetry": Command(
        usage="hesscli.cli.symmetry:USAGE",
        result="hesscli.results.symmetry:SymmetryResult",
        measure="hesscli.diagnostics.symmetry:symmetries",
        plan="hesscli.diagnostics.symmetry:plan",
        table="hesscli.render.tables.symmetry:symmetry_table",
        figures="hesscli.render.figures.symmetry:figures",
    ),
    "prune": Command(
        usage="hesscli.cli.prune:USAGE",
        result="hesscli.results.prune:PruneResult",
        measure="hesscli.diagnostics.prune:prune",
        plan="hesscli.diagnostics.prune:plan",
        table="hesscli.render.tables.prune:prune_table",
        figures="hesscli.render.figures.prune:figures",
    ),
    "join": Command(usage="hesscli.cli.join:USAGE"),
    "schema": Command(usage="hesscli.cli.schema:USAGE"),
}


def results() -> dict[str, Any]:
    """The class of each command's answer, by the command."""
    named = {name: command.result for name, command in COMMANDS.items() if command.result}
    return {name: resolve_name(result) for name, result in named.items()}
