"""Runs that are killed, run out of space or meet each other while they write. ``make faults``.

A process is struck where it is about to make a file durable, to give one its name or to remove
one; or at a moment of chance.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
from example_results import diag_result
from rich.console import Console as RichConsole

from hesscli.cli.answer import deliver, output
from hesscli.cli.console import Console
from hesscli.commands import COMMANDS
from hesscli.errors import InputError, UsageError
from hesscli.results.saved import read

# -- Striking --------------------------------------------------------------------------------------


STEPS = ("fsync", "replace", "unlink")


def kill() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def fill_the_disk() -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def lose_the_disk() -> NoReturn:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def interrupt() -> NoReturn:
    raise KeyboardInterrupt


class Steps:
    """Counts the steps of a process, and strikes before one of them."""

    def __init__(self, at: int = 0, strike: Callable[[], NoReturn] = kill) -> None:
        self.taken, self.at, self.strike = 0, at, strike

    def take(self) -> None:
        self.taken += 1
        if self.taken == self.at:
            self.strike()


@contextlib.contextmanager
def steps(at: int = 0, strike: Callable[[], NoReturn] = kill) -> Iterator[Steps]:
    """Within it, the step of that number is not taken but struck; none where it is 0."""
    counted = Steps(at, strike)
    usual = {name: getattr(os, name) for name in STEPS}

    def watched(name: str) -> Callable[..., object]:
        def step(*args: object, **how: object) -> object:
            counted.take()
            return usual[name](*args, **how)

        return step

    try:
        for name in STEPS:
            setattr(os, name, watched(name))
        yield counted
    finally:
        for name, function in usual.items():
            setattr(os, name, function)


def start(work: Callable[[], object]) -> int:
    """Begin work in a fork, which exits with what it returns, 0 for None; its process id."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        code = int(work() or 0)  # type: ignore[call-overload]
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def finish(child: int) -> int:
    """How a fork has ended, as subprocess says it: a signal is below 0."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def forked(work: Callable[[], object]) -> int:
    return finish(start(work))


# -- A set of files that is all of one number ------------------------------------------------------


@dataclass(frozen=True)
class Delivered:
    """What became of a result: what was printed, and the error, if any."""

    stdout: str
    error: UsageError | None


def save(folder: Path, seed: int, count: int = 500) -> Delivered:
    """Do as the program does with a result, of which everything is of this seed."""
    usual = diag_result()
    arrays = {"w": np.full(count, float(seed))}
    result = replace(
        usual, method=replace(usual.method, seed=seed), files={}, entries=arrays, stderr=arrays
    )
    out = io.StringIO()
    streams = {"out": RichConsole(file=out), "err": RichConsole(file=io.StringIO())}
    console = Console(**streams, live=False, began=0.0)
    error = None
    try:
        with output(folder, None, console) as held:
            deliver(replace(COMMANDS["diag"], figures=""), result, console, {"out": "json"}, held)
    except UsageError as refusal:
        error = refusal
    return Delivered(out.getvalue(), error)


def saved_as(folder: Path, seed: int) -> int:
    """The same, as an exit code."""
    error = save(folder, seed).error
    return 0 if error is None else int(error.exit_code)


def seed_in(folder: Path) -> int | None:
    """Of which seed everything in a folder is; None where there is no document.

    Whoever reads a document without its sums must find no mixture either.
    """
    path = folder / "diag.json"
    try:
        saved = read(path)
    except InputError:
        assert not path.exists()
        return None
    values = (np.unique(array) for arrays in saved.arrays.values() for array in arrays.values())
    seeds = {saved.document["method"]["seed"], *np.concatenate([*values])}
    assert len(seeds) == 1
    assert len(saved.arrays) == 2
    return int(seeds.pop())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


SET = {"diag.json", "diag.safetensors", "diag_stderr.safetensors"}


def count_steps(folder: Path) -> int:
    """How many steps it takes to put a set in the place of another."""
    save(folder, 1)
    with steps() as counted:
        save(folder, 2)
    return counted.taken
