"""``hesscli join``: what runs over parts of the same work come to."""

from __future__ import annotations

import inspect
from pathlib import Path
from pkgutil import resolve_name

import typer

from hesscli.cli import options
from hesscli.cli.answer import answer
from hesscli.cli.console import Console
from hesscli.cli.usage import Given, Option, Panel, Usage
from hesscli.commands import COMMANDS
from hesscli.errors import ExitCode


def run(console: Console, checkpoint: Path | None, given: Given) -> ExitCode:
    """Answer as the command would that the ledgers are of, from what they hold.

    Raises:
        UsageError: they are not parts of the same work.
        InputError: the spec lies elsewhere, and was not named: a ledger lets no code run.
    """
    from hesscli.joining import JoinedLedger
    from hesscli.problem.spec_places import require_near

    joined = JoinedLedger(given["ledgers"], console.note)
    command = COMMANDS[joined.command]
    usage: Usage = resolve_name(command.usage)
    own = {name: value for name, value in given.items() if value is not None}
    begun = {**usage.defaults(), **joined.given, **own, "budget": None}
    if given["spec"] is None and begun["spec"] is not None:
        spec, named = Path(begun["spec"]), "that the ledgers name"
        begun["spec"] = require_near(spec, trust=given["trust"], of=named)
    return answer(command, usage, console, checkpoint or joined.checkpoint, begun, joined)


LEDGERS = Option(
    name="ledgers",
    declared=typer.Argument(
        metavar="LEDGER",
        help="Folders of runs over parts, or their .ledger files.",
    ),
    type=list[Path],
    default=inspect.Parameter.empty,
)
CHECKPOINT = Panel("Problem").text(
    "--checkpoint", "FILE", help="Where the checkpoint is now. Default: where it was."
)
USAGE = Usage(
    help="""\
    Join runs over parts, made on as many machines as you like, into one result.

    The parts are ranges of probes, of batches, or of both, with all else the same.
    """,
    examples="""\
Examples:

  hesscli diag model.pt --probes 0:64   --dir part-a    on one machine
  hesscli diag model.pt --probes 64:128 --dir part-b    on another
  hesscli join part-a part-b                            as of --probes 0:128

  hesscli trace model.pt --batches 0:8  --dir part-a    of 16 batches
  hesscli trace model.pt --batches 8:16 --dir part-b
  hesscli join part-a/trace.ledger part-b/trace.ledger --out json
""",
    options=(
        LEDGERS,
        CHECKPOINT,
        options.SPEC,
        options.DATA,
        options.TRUST,
        options.LAYERS,
        *options.OUTPUT,
    ),
    run=run,
)
