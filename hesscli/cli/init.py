"""``hesscli init``: a spec to fill in, from what the checkpoint holds."""

from __future__ import annotations

import inspect
import shlex
from dataclasses import replace
from pathlib import Path

import typer

from hesscli.cli import options
from hesscli.cli.answer import write_text
from hesscli.cli.console import Console
from hesscli.cli.usage import Given, Panel, Usage
from hesscli.errors import ExitCode, UsageError


def run(console: Console, checkpoint: Path | None, given: Given) -> ExitCode:
    """Write the spec, or print it.

    Raises:
        UsageError: a spec is there already, is not needed, or cannot be written.
    """
    assert checkpoint is not None  # it is required
    spec = spec_path(checkpoint)
    if spec.exists() and not (given["force"] or given["stdout"]):
        raise UsageError(
            "a spec is there already",
            str(spec),
            "--force to replace it, or --stdout to print the new one",
        )
    from hesscli.problem.pretrained.folder import is_pretrained
    from hesscli.problem.template import write_template

    if is_pretrained(checkpoint) and not (given["force"] or given["stdout"]):
        raise UsageError(
            "a Hugging Face folder needs no spec",
            str(checkpoint),
            f"hesscli trace {shlex.quote(str(checkpoint))} --data corpus.txt; for another loss or "
            "other data --force or --stdout, and a spec to fill in",
        )
    with console.working():
        text = write_template(checkpoint, trust=given["trust"])
    if given["stdout"]:
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


USAGE = Usage(
    help="Write a spec for a checkpoint: which model, which data, which loss.",
    examples="""\
Examples:

  hesscli init model.pt              writes model.toml beside it
  hesscli init model.pt --stdout     prints the spec instead
""",
    options=(
        replace(
            options.CHECKPOINT,
            default=inspect.Parameter.empty,
            declared=typer.Argument(
                metavar="CHECKPOINT",
                help="A .pt, .pth, .safetensors or .pt2 file, or a folder of one.",
            ),
        ),
        options.TRUST,
        Panel(None).switch("--force", help="Replace a spec that is there."),
        Panel(None).switch("--stdout", help="Print the spec and write no file."),
        options.QUIET,
        options.VERBOSE,
    ),
    run=run,
)
