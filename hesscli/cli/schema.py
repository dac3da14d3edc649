"""``hesscli schema``: the JSON Schema of what ``--out json`` prints."""

from __future__ import annotations

import json

import typer

from hesscli.cli.console import Console
from hesscli.errors import ExitCode

EXAMPLES = """\
Examples:

  hesscli schema > hesscli.schema.json
"""


def schema(context: typer.Context) -> ExitCode:
    """Print the JSON Schema of every command's document."""
    from hesscli.render.document import schema as describe

    console: Console = context.obj
    console.write(json.dumps(describe(), indent=2) + "\n")
    return ExitCode.OK
