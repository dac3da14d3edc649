"""The ``hesscli`` program: its commands, and what each error means to the shell."""

from __future__ import annotations

import errno
import inspect
import os
import platform
import re
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from hesscli import __version__, world
from hesscli.cli.answer import answer
from hesscli.cli.console import Console, interrupts
from hesscli.cli.process import age, results_alone, yield_waiting_cores
from hesscli.cli.usage import Typed, Usage
from hesscli.commands import COMMANDS, Command
from hesscli.errors import (
    ExitCode,
    HesscliError,
    InputError,
    UnsoundError,
    UsageError,
    first_line,
)
from hesscli.heap import keep_freed_memory

EXAMPLES = """\
Examples:

  hesscli init model.pt                  write a spec to fill in
  hesscli check model.pt                 is it sound, and what will a run cost?
  hesscli trace model.pt --rtol 2%       the Hessian's trace, with error bars
  hesscli diag model.pt                  its diagonal, layer by layer and in pictures
  hesscli ihvp model.pt                  which weights and layers matter, and how sure is that?
  hesscli spectrum model.pt              its eigenvalues: the largest, and the density of all
  hesscli trace --out json | jq .trace   for scripts

A checkpoint is read without running code in it. A spec is code: one that
is found, and not named by --spec, must lie inside the working folder's
tree, or be let run by --trust.
"""


_ENDED_BY = (128 + signal.SIGTERM, 128 + signal.SIGHUP)
"""Exit codes of runs that a scheduler or a closed terminal has ended."""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hesscli {__version__}")
        raise typer.Exit


def _hesscli(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Say the version."),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def program() -> Any:
    """All commands of the registry, as typer has them."""
    app = typer.Typer(
        name="hesscli",
        help="A curvature microscope for trained PyTorch networks.",
        epilog=EXAMPLES,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_hesscli)
    for name, command in COMMANDS.items():
        usage: Usage = resolve_name(command.usage)
        declare = app.command(name, cls=Typed, help=usage.help, epilog=usage.examples)
        declare(_function(command, usage))
    return typer.main.get_command(app)


def _function(command: Command, usage: Usage) -> Callable[..., ExitCode]:
    """A command as a function, whose signature has the options that it takes."""

    def run(context: typer.Context, checkpoint: Path | None = None, **given: Any) -> ExitCode:
        console: Console = context.obj
        if "quiet" in given:  # error reports follow it too
            console = replace(console, quiet=given["quiet"], verbose=given["verbose"])
            context.find_root().obj = console
        if usage.run is not None:  # nothing that ranks could share
            return ExitCode.OK if world.is_silent() else usage.run(console, checkpoint, given)
        return answer(command, usage, console, checkpoint, given)

    first = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    parameters = [first, *(option.parameter for option in usage.options)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: the words after the program's name; default those of this process.

    Returns:
        The exit code.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    began = time.monotonic() - (age() if argv is None else 0.0)
    commands = program()
    if "_HESSCLI_COMPLETE" in os.environ:
        commands.main(prog_name="hesscli")  # answers the shell that completes, and exits
    keep_freed_memory()
    yield_waiting_cores()
    with results_alone(for_good=argv is None):
        console = Console.open(began)
        code = int(ExitCode.OK)
        try:
            code = _run(commands, args, console)
            console.flush()
        except BrokenPipeError:  # the reader has left, and has what it wanted
            console.abandon()
        except OSError:  # nor can it be said what could not be written
            console.abandon()
            code = code or int(ExitCode.USAGE)
    if argv is None and code in _ENDED_BY:
        # Python ends by SIGINT where an interrupt has passed through exec(), whichever it was.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code


def _run(commands: Any, args: list[str], console: Console) -> int:
    context, came = None, list[int]()
    try:
        with interrupts() as came:
            context = commands.make_context("hesscli", list(args), obj=console)
            with context:
                code = commands.invoke(context)
            console.flush()
    except typer.Exit as finished:
        return finished.exit_code
    except BrokenPipeError:
        raise
    except BaseException as error:  # SystemExit too, for it can only be the user's code's
        if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
            raise error.__context__ from None  # or rich's, which typer prints help with
        if isinstance(error, SystemExit) and context is None and not error.code:
            return int(ExitCode.OK)  # of --show-completion, which has answered
        if came and not isinstance(error, HesscliError):
            error = KeyboardInterrupt()  # a library that was being imported may make it another
        # A command may have replaced the console by one that is quieter or more verbose.
        code = report(error, context.obj if context else console, args)
    if code == ExitCode.INTERRUPTED and came:
        return 128 + came[0]
    return int(code or ExitCode.OK)


def report(error: BaseException, console: Console, args: Sequence[str]) -> ExitCode:
    """Say what went wrong, and give the exit code that stands for it."""
    if isinstance(error, KeyboardInterrupt):
        with suppress(OSError):
            console.note("interrupted before there was a result")
        return ExitCode.INTERRUPTED
    known = explain(error, args, verbose=console.verbose)
    with suppress(OSError):  # a full disk: the code says it still
        console.error(known)
    return known.exit_code


def explain(error: BaseException, args: Sequence[str], *, verbose: bool) -> HesscliError:
    """Any error in three lines for people."""
    if isinstance(error, HesscliError):
        return error
    if isinstance(error, TyperException):
        return _misuse(error, args)
    if _is_out_of_memory(error):
        return UnsoundError(
            "there is not enough memory",
            first_line(error),
            "smaller batches with --batch-size, another --device, or fewer --examples",
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return UsageError("the disk is full", first_line(error), "free some space, then run again")
    if frames := _frames_of_the_user(error):
        return InputError(
            "the model, its data or its loss raised an error that it had not raised before",
            f"{type(error).__name__}: {first_line(error)}",
            "correct it there: its own lines are below",
            frames,
        )
    versions = f"hesscli {__version__}, torch {version('torch')}"
    return HesscliError(
        f"hesscli has a bug, or met something it does not know: {type(error).__name__}",
        first_line(error) or "no message",
        f"{'a' if verbose else '-v for the traceback, and a'} bug report that names {versions}, "
        f"Python {platform.python_version()} and {platform.platform(terse=True)}",
        tuple("".join(traceback.format_exception(error)).splitlines()) if verbose else (),
    )


def _misuse(error: TyperException, args: Sequence[str]) -> UsageError:
    near = getattr(error, "possibilities", None) or []
    message = error.message if near else error.format_message()
    what, _, suggestion = message.partition(" Did you mean ")
    near = near or re.findall("'([^']+)'", suggestion)
    command = ["hesscli", *(args[:1] if args[0] in COMMANDS else [])]
    return UsageError(
        what[:1].lower() + what[1:].removesuffix("."),
        shlex.join(["hesscli", *args]),
        " or ".join(near) if near else f"{' '.join(command)} --help",
    )


def _frames_of_the_user(error: BaseException) -> tuple[str, ...]:
    """Lines of the user's code that hesscli called and that failed; empty where it was hesscli."""
    if "hesscli.problem.factory" not in sys.modules:  # nothing of the user's is loaded
        return ()
    from hesscli.problem.factory import is_blamed_on_user, user_frames

    return user_frames(error) if is_blamed_on_user(error) else ()


def _is_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    return (
        isinstance(error, MemoryError)
        or (torch is not None and isinstance(error, torch.OutOfMemoryError))
        or "DefaultCPUAllocator" in first_line(error)  # a plain RuntimeError on a CPU
    )
