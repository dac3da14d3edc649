"""What every command has: a bare ``--layer``, the problem, and what happens to a result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import typer
from typer.core import TyperCommand

from hesscli.cli.console import Console
from hesscli.errors import ExitCode, InputError, UsageError
from hesscli.results import (
    CheckpointReport,
    CheckResult,
    DiagResult,
    IhvpResult,
    Observe,
    SpectrumResult,
    Status,
    TraceResult,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

    from hesscli.problem.problem import Problem


# -- What every command has: a bare ``--layer``, and a console that knows how much to say ----------


EVERY_LAYER = "*"


class Command(TyperCommand):
    """A command on which ``--layer`` may stand without a pattern."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments once each bare ``--layer`` has its pattern."""
        return super().parse_args(ctx, fill_bare_layers(args))


def fill_bare_layers(args: Sequence[str]) -> list[str]:
    """Give each bare ``--layer`` the pattern that takes every layer.

    It is bare where it stands last, before another option, or before an existing file, which
    is the checkpoint.
    """
    end = args.index("--") if "--" in args else len(args)
    following = [*args[1:end], "--"]
    filled = [
        f"--layer={EVERY_LAYER}"
        if arg == "--layer" and (after.startswith("-") or Path(after).is_file())
        else arg
        for arg, after in zip(args[:end], following, strict=False)
    ]
    return [*filled, *args[end:]]


_LOADING = (
    "spec",
    "examples",
    "device",
    "dtype",
    "batch_size",
    "weight_decay",
    "trust",
    "seed",
    "budget",
)


def load_problem(context: typer.Context, console: Console, observe: Observe) -> Problem:
    """The problem that the options of a command name; its warnings are said at once."""
    from hesscli.problem.loading import load

    chosen = {name: context.params[name] for name in _LOADING}
    problem = load(context.params["checkpoint"], observe=observe, **chosen)
    console.warn(*problem.warnings)
    return problem


def say_warnings(console: Console, problem: Problem, warnings: Sequence[str]) -> None:
    """A result's warnings, but for those that were said when the problem was loaded."""
    console.warn(*(text for text in warnings if text not in problem.warnings))


def exit_code(status: Status, *, asked: bool) -> ExitCode:
    """What a run that ended so tells the shell; a tolerance counts if it was ``asked`` for."""
    if status == "interrupted":
        return ExitCode.INTERRUPTED
    missed = status not in ("exact", "converged")
    return ExitCode.TOLERANCE if missed and asked else ExitCode.OK


def loudness(context: typer.Context, *, quiet: bool, verbose: bool) -> Console:
    """The run's console, told how much to say; error reports follow it too."""
    root = context.find_root()
    root.obj = replace(root.obj, quiet=quiet, verbose=verbose)
    console: Console = root.obj
    return console


# -- What happens to a result: which layers it shows, its files, and stdout ------------------------


ResultT = TypeVar("ResultT", TraceResult, CheckResult, DiagResult, IhvpResult, SpectrumResult)
NOTHING: Mapping[str, Any] = MappingProxyType({})

CHECKPOINT_SUFFIXES = (".pt", ".pth", ".pt2", ".ckpt", ".bin", ".safetensors")
NO_FILES = Path("-")


def select_layers(patterns: Sequence[str], problem: Problem) -> tuple[str, ...] | None:
    """The layers that any of the patterns takes, in the model's order; None without patterns.

    Raises:
        InputError: a pattern matches nothing and looks like a checkpoint that is not there.
        UsageError: a pattern matches nothing.
    """
    from hesscli.parameters import match_layers

    chosen: set[str] = set()
    for pattern in patterns:
        try:
            chosen.update(match_layers(pattern, problem.layer_names, problem.parameter_names))
        except UsageError:
            if pattern.endswith(CHECKPOINT_SUFFIXES):
                raise InputError(
                    "file not found",
                    f"{pattern} after --layer; no layer has that name either",
                    "the checkpoint's path, or a pattern such as --layer 'conv*'",
                ) from None
            raise
    return tuple(name for name in problem.layer_names if name in chosen) if patterns else None


def prepare_output(folder: Path | None, checkpoint: CheckpointReport | None) -> Path | None:
    """The folder for files, made and tried before the long work; None for no files."""
    from hesscli.storage import prepare_folder

    if folder == NO_FILES:
        return None
    if folder is None:
        path = Path(checkpoint.path).resolve() if checkpoint else Path("model")
        folder = Path("hesscli-out", "-".join(filter(None, (path.parent.name, path.stem))))
    return prepare_folder(folder)


def deliver(
    result: ResultT,
    console: Console,
    *,
    out: str,
    folder: Path | None,
    table: Callable[[], RenderableType],
    figures: Mapping[str, Callable[[], Figure]] = NOTHING,
    tensors: Mapping[str, Mapping[str, Any]] = NOTHING,
) -> None:
    """Write a result's files and print it.

    Args:
        result: what the command found.
        console: where to print.
        out: what stdout carries, ``table`` or ``json``.
        folder: where files go; None for none.
        table: makes what people read.
        figures: draw pictures, by the name of their files.
        tensors: numpy arrays by name, by the name of their file, the main ones first.
    """
    from hesscli.render.document import to_json

    try:
        if folder is not None:
            result = _save(result, console, folder, figures, tensors)
    finally:  # a full disk must not cost the user the numbers
        if out == "json":
            console.write(to_json(result))
        else:
            console.show(table())


def _save(
    result: ResultT,
    console: Console,
    folder: Path,
    figures: Mapping[str, Callable[[], Figure]],
    tensors: Mapping[str, Mapping[str, Any]],
) -> ResultT:
    from hesscli.render.document import to_json

    files = {"json": folder / f"{_file_name(result, result.command)}.json"}
    for name, arrays in tensors.items():
        kind = _kind(result, name, "tensors") if "tensors" in files else "tensors"
        files[kind] = _write_tensors(folder, _file_name(result, name), arrays)
    for name, draw in figures.items():
        from hesscli.render.figures.canvas import save_figure

        saved = save_figure(draw(), folder, _file_name(result, name))
        files |= {_kind(result, name, kind): path for kind, path in saved.items()}
    result = replace(result, files={kind: str(path) for kind, path in files.items()})
    write_text(files["json"], to_json(result))
    for path in files.values():
        console.note(f"wrote {path}")
    return result


def _kind(result: ResultT, name: str, kind: str) -> str:
    """What ``files`` calls a file: the command's main ones by their kind alone."""
    extra = name.removeprefix(result.command).strip("-_")
    return f"{kind}_{extra}" if extra else kind


def _file_name(result: ResultT, name: str) -> str:
    """A file's name without its ending; it carries the matrix where that is not the Hessian."""
    matrix = result.problem.matrix
    return name if matrix == "hessian" else f"{name}-{matrix}"


def _write_tensors(folder: Path, name: str, arrays: Mapping[str, Any]) -> Path:
    from safetensors.numpy import save

    from hesscli.storage import write_atomically

    contents = save(dict(arrays))
    return write_atomically(folder / f"{name}.safetensors", lambda stream: _put(stream, contents))


def _put(stream: BinaryIO, contents: bytes) -> None:
    stream.write(contents)


def write_text(path: Path, text: str) -> None:
    """Write or replace a text file, whole or not at all."""
    from hesscli.storage import write_atomically

    write_atomically(path, lambda stream: _put(stream, text.encode()))
