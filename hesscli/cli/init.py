"""``hesscli init``: a spec to fill in, from what the checkpoint holds."""

from __future__ import annotations

import inspect
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from hesscli.cli import options
from hesscli.cli.answer import write_text
from hesscli.cli.console import Console
from hesscli.cli.usage import Given, Panel, Usage
from hesscli.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from hesscli.problem.builders import Named


def run(console: Console, checkpoint: Path | None, given: Given) -> ExitCode:
    """Write the spec, or print it.

    Raises:
        UsageError: a spec is there already, is not needed, or cannot be written.
    """
    assert checkpoint is not None  # it is required
    from hesscli.problem.builders import of_timm
    from hesscli.problem.pretrained.folder import is_pretrained
    from hesscli.problem.template import template_of, write_template

    checkpoint, network = _meant(checkpoint, given["model"])
    spec = spec_path(checkpoint)
    if spec.exists() and not (given["force"] or given["stdout"]):
        raise UsageError(
            "a spec is there already",
            str(spec),
            "--force to replace it, or --stdout to print the new one",
        )
    wanted = given["force"] or given["stdout"] or network or of_timm(checkpoint)
    if is_pretrained(checkpoint) and not wanted:
        raise UsageError(
            "a Hugging Face folder needs no spec",
            str(checkpoint),
            f"hesscli trace {shlex.quote(str(checkpoint))} --data corpus.txt; for another loss or "
            "other data --force or --stdout, and a spec to fill in",
        )
    with console.working():
        if network is not None and not (given["model"] or checkpoint.exists()):
            template = template_of(network, checkpoint)
        else:
            template = write_template(checkpoint, model=network, trust=given["trust"])
    if given["stdout"]:
        console.write(template.text)
        return ExitCode.OK
    try:
        write_text(spec, template.text)
    except UsageError as error:
        raise UsageError(error.what, error.got, "--stdout to print the spec instead") from error
    console.note(f"wrote {spec}")
    console.warn(*(f"not installed here: {cure}" for cure in template.needs))
    if template.to_fill_in:
        console.note(f"to fill in: {'; '.join(template.to_fill_in)}")
    console.note("next: look through its [model], [data] and [loss], above all at each 'a guess';")
    beside = spec.parent.resolve().is_relative_to(Path.cwd())
    words = shlex.join([str(checkpoint), *([] if beside else ["--spec", str(spec)])])
    console.note(f"then `hesscli check {words}` says whether they fit")
    return ExitCode.OK


def _meant(checkpoint: Path, model: str | None) -> tuple[Path, Named | None]:
    """The file of weights, and the network whose name the user has typed, alone or beside it."""
    from hesscli.problem.builders import named

    network = named(model or str(checkpoint))
    if model is not None:
        if network is None:
            hint = "--model timm:resnet18 or --model torchvision:resnet18"
            raise UsageError("--model is no name of timm's or torchvision's", repr(model), hint)
        return checkpoint, network
    if network is None or checkpoint.exists():
        return checkpoint, None
    return Path(f"{network.name}.pt"), network


def spec_path(checkpoint: Path) -> Path:
    """Where the commands look first for a checkpoint's spec."""
    from hesscli.problem.spec_places import SPEC_NAME, stem_of

    if checkpoint.is_dir():
        return checkpoint / SPEC_NAME
    return checkpoint.with_name(f"{stem_of(checkpoint)}.toml")


USAGE = Usage(
    help="Write a spec for a checkpoint: which model, which data, which loss.",
    examples="""\
Examples:

  hesscli init model.pt              writes model.toml beside it
  hesscli init model.pt --stdout     prints the spec instead
  hesscli init model.pt --model timm:resnet18
                                     of a network that timm builds
  hesscli init torchvision:resnet18  of one without a file of weights yet
""",
    options=(
        replace(
            options.CHECKPOINT,
            default=inspect.Parameter.empty,
            declared=typer.Argument(
                metavar="CHECKPOINT",
                help="A .pt, .pth, .ckpt, .safetensors or .pt2 file, a folder of one, or "
                "timm:NAME or torchvision:NAME.",
            ),
        ),
        Panel(None).text(
            "--model",
            "NAME",
            type=str,
            help="The network's name in a library: timm:NAME or torchvision:NAME. Default: a class "
            "in the Python files beside CHECKPOINT, or what CHECKPOINT itself says.",
        ),
        options.TRUST,
        Panel(None).switch("--force", help="Replace a spec that is there."),
        Panel(None).switch("--stdout", help="Print the spec and write no file."),
        options.QUIET,
        options.VERBOSE,
    ),
    run=run,
)
