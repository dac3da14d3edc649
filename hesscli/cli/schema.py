"""``hesscli schema``: the JSON Schema of what ``--out json`` prints."""

from __future__ import annotations

import json
from pathlib import Path

from hesscli.cli.console import Console
from hesscli.cli.usage import Given, Usage
from hesscli.errors import ExitCode


def run(console: Console, _checkpoint: Path | None, _given: Given) -> ExitCode:
    """Print the JSON Schema."""
    from hesscli.render.document import schema

    console.write(json.dumps(schema(), indent=2) + "\n")
    return ExitCode.OK


USAGE = Usage(
    help="Print the JSON Schema of every command's document.",
    examples="""\
Examples:

  hesscli schema > hesscli.schema.json
""",
    options=(),
    run=run,
)
