"""``hesscli init``: a spec to fill in, from what the checkpoint holds."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from hesscli.cli import options
from hesscli.cli.answer import loudness, write_text
from hesscli.errors import ExitCode, UsageError

EXAMPLES = """\
Examples:

  hesscli init model.pt              writes model.toml beside it
  hesscli init model.pt --stdout     prints the spec instead
"""


def init(
    context: typer.Context,
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="A .pt, .pth, .safetensors or .pt2 file, or a folder of one."
        ),
    ],
    trust: options.Trust = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a spec that is there.")] = False,
    stdout: Annotated[
        bool, typer.Option("--stdout", help="Print the spec and write no file.")
    ] = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> ExitCode:
    """Write a spec for a checkpoint: which model, which data, which loss."""
    console = loudness(context, quiet=quiet, verbose=verbose)
    spec = spec_path(checkpoint)
    if spec.exists() and not (force or stdout):
        raise UsageError(
            "a spec is there already",
            str(spec),
            "--force to replace it, or --stdout to print the new one",
        )
    from hesscli.problem.template import write_template

    with console.working():
        text = write_template(checkpoint, trust=trust)
    if stdout:
        console.write(text)
        return ExitCode.OK
    try:
        write_text(spec, text)
    except UsageError as error:
        raise UsageError(error.what, error.got, "--stdout to print the spec instead") from error
    console.note(f"wrote {spec}")
    console.note("next: look through its [model], [data] and [loss], above all at each 'a guess';")
    beside = spec.parent.resolve().is_relative_to(Path.cwd())
    named = shlex.join([str(checkpoint), *([] if beside else ["--spec", str(spec)])])
    console.note(f"then `hesscli check {named}` says whether they fit")
    return ExitCode.OK


def spec_path(checkpoint: Path) -> Path:
    """Where the commands look first for a checkpoint's spec."""
    from hesscli.problem.spec import SPEC_NAME, stem_of

    if checkpoint.is_dir():
        return checkpoint / SPEC_NAME
    return checkpoint.with_name(f"{stem_of(checkpoint)}.toml")
