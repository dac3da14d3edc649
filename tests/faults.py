"""Runs that are killed, run out of space, meet each other while they write, or never seem to end.

``make faults``. A process is struck where it is about to make a file durable, to give one its name
or to remove one; or at a moment of chance.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import NoReturn

import numpy as np
import torch
from example_results import diag_result
from program import FEW, SUNSPOTS, words
from rich.console import Console as RichConsole
from torch import nn

import hesscli
from hesscli import ledger
from hesscli.cli.answer import deliver, output
from hesscli.cli.app import main
from hesscli.cli.console import Console
from hesscli.commands import COMMANDS
from hesscli.errors import InputError, UsageError
from hesscli.problem.freezing import FrozenData
from hesscli.problem.problem import Problem
from hesscli.results import Answer, Snapshot
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


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within it the system takes no larger file, as on a disk that fills up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


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


# -- The whole program, many times -----------------------------------------------------------------


COMMAND_LINES = {"check": (), **FEW}


def load_all() -> None:
    """What every run needs, torch above all: loaded once, before the forks."""
    for command in COMMAND_LINES:
        parts = COMMANDS[command]
        for part in (parts.measure, parts.table, parts.figures or parts.table):
            resolve_name(part)


def program(command: str, folder: Path, seed: int, *more: object) -> int:
    """Run a command line here, in the place of one that was not finished; its exit code."""
    if "--resume" not in more:
        (folder / f"{command}.ledger").unlink(missing_ok=True)
    more = (*COMMAND_LINES[command], "--seed", seed, "--dir", folder, "--out", "json", "-q", *more)
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        return main(words((command, SUNSPOTS, *more)))


def whole(folder: Path, command: str) -> bool:
    """Whether there is a set; a mixture raises."""
    path = folder / f"{command}.json"
    if not path.exists():
        return False
    read(path)
    return True


def ends_clean(folder: Path, command: str) -> None:
    """After all that went before, a run to its end leaves its set and nothing else."""
    assert forked(lambda: program(command, folder, 0)) == 0
    files = read(folder / f"{command}.json").document["files"].values()
    assert names(folder) == {Path(path).name for path in files}


def killed_at_each_step(command: str, folder: Path) -> str:
    """One run after the other into one folder, each killed a step later than the one before."""
    forked(lambda: program(command, folder, 0))
    total = none = 0
    while True:

        def work(number: int = total + 1) -> int:
            with steps(number):
                return program(command, folder, number)

        if forked(work) != -signal.SIGKILL:
            break
        total += 1
        none += not whole(folder, command)
    ends_clean(folder, command)
    return f"{total} steps: {total - none} times a whole set, {none} times none"


def killed_within(seconds: float, work: Callable[[], object]) -> bool:
    """Kill a fork after so long; whether it had not ended by then."""
    ended, end = os.pipe()
    child = start(work)
    os.close(end)  # the child's own is closed by its end
    select.select([ended], [], [], seconds)
    os.kill(child, signal.SIGKILL)
    os.close(ended)
    return finish(child) == -signal.SIGKILL


def killed_at_random(command: str, folder: Path, kills: int, dice: random.Random) -> str:
    """Killed at moments of chance in as much time as a run takes."""
    began = time.monotonic()
    forked(lambda: program(command, folder, 0))
    lasts, found, died = time.monotonic() - began, 0, 0
    for number in range(kills):
        died += killed_within(dice.uniform(0, lasts), partial(program, command, folder, number))
        found += whole(folder, command)
    ends_clean(folder, command)
    return f"{died} killed: {found} times a whole set, {kills - found} times none"


LONGER = {
    "trace": ("--probes", 24),
    "diag": ("--probes", 24),
    "ihvp": ("--window", 64),
    "spectrum": ("--steps", 32),
    "prune": ("--steps", 4),
}
"""So much work that there is time to be killed in it, at a moment of chance."""


def kept(command: str, folder: Path, *more: object, often: float = 0.01) -> int:
    """The same, of a run that is kept almost at each of its steps."""
    ledger._OFTEN, ledger._SHARE, ledger._SHARE_OF_ROWS = often, 1.0, 1.0
    return program(command, folder, 0, *more)


def answered(folder: Path, command: str) -> tuple[str, dict[str, bytes]]:
    """What a run came to, but for seconds, memory and where it is."""
    saved = read(folder / f"{command}.json")
    document = dict(saved.document)
    for measured in ("seconds", "peak_bytes"):
        del document["cost"][measured]
    files = document.pop("files")
    tensors = {
        Path(path).name: Path(path).read_bytes()
        for path in files.values()
        if path.endswith((".safetensors", ".pt"))
    }
    del document["sha256"]  # of pictures and pages, which tell the time
    return json.dumps(document), tensors


def resumed_after_kills(command: str, folder: Path, kills: int, dice: random.Random) -> str:
    """Killed at moments of chance and gone on with, up to three times, to the bytes of one run."""
    longer, began = LONGER[command], time.monotonic()
    assert forked(lambda: kept(command, folder / "whole", *longer)) == 0
    lasts, died, went_on = time.monotonic() - began, 0, 0
    expected = answered(folder / "whole", command)
    number = 0
    while died < kills:
        into, number = folder / str(number), number + 1
        again = partial(kept, command, into, *longer, "--resume")
        for attempt in range(3):
            if not killed_within(seconds := dice.uniform(0, lasts), again):
                lasts = lasts if attempt else seconds  # the machine has more time than it had
                break
            died += 1
            went_on += (into / f"{command}.ledger").exists()
        assert forked(again) == 0
        assert answered(into, command) == expected
        assert names(into) == names(folder / "whole")
        shutil.rmtree(into)
    return f"{died} killed, {went_on} of them gone on with: {number} times the same bytes"


def resumed_after_each_write(command: str, folder: Path) -> str:
    """Killed before each step of each write in turn, and gone on with."""
    run = partial(kept, command, often=0.03)
    assert forked(lambda: run(folder / "whole")) == 0
    expected, total = answered(folder / "whole", command), 0
    while True:

        def work(number: int = total + 1) -> int:
            with steps(number):
                return run(folder / "cut", "--resume")

        if forked(work) != -signal.SIGKILL:
            break
        total += 1
        assert forked(lambda: run(folder / "cut", "--resume")) == 0
        assert answered(folder / "cut", command) == expected
        assert names(folder / "cut") == names(folder / "whole")
        shutil.rmtree(folder / "cut")
    return f"{total} times the same bytes"


def in_pairs(commands: tuple[str, str], folder: Path, pairs: int) -> str:
    """Two at once in a folder; one may be refused."""
    refused = 0
    for number in range(pairs):
        children = [
            start(lambda command=command, seed=seed: program(command, folder, seed))
            for command, seed in zip(commands, (2 * number, 2 * number + 1), strict=True)
        ]
        codes = [finish(child) for child in children]
        assert set(codes) <= {0, 2}
        assert 0 in codes
        refused += 2 in codes
        named = set()
        for command in commands:
            if whole(folder, command):
                files = read(folder / f"{command}.json").document["files"].values()
                named |= {Path(path).name for path in files}
        assert names(folder) == named
    return f"{pairs} pairs: {refused} times the second was refused, no set was mixed"


def on_disks_that_fill_up(folder: Path) -> str:
    """File systems with room for one set and so much of another, in steps of a page."""
    folder.mkdir()
    save(folder, 1)
    needed = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    failed = total = 0
    for size in range(needed, 3 * needed, 4096):
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "faults", str(folder)]
        if subprocess.run(mount, capture_output=True).returncode:
            return "not tried: this user cannot mount a tmpfs"
        try:
            if save(folder, 1).error is None:
                total += 1
                refused = save(folder, 2).error
                failed += refused is not None
                assert refused is None or "the disk is full" in refused.got
                assert seed_in(folder) == (2 if refused is None else 1)
                assert names(folder) == SET
        finally:
            subprocess.run(["umount", str(folder)], check=True)
    assert 0 < failed < total
    return f"{total} sizes: {failed} times full, and the earlier set stood"


# -- Many products in one run ----------------------------------------------------------------------


def small_problem() -> Problem:
    """A product takes some tenths of a millisecond, and its vectors 9 kB each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 128), nn.Tanh(), nn.Linear(128, 8))
    data = FrozenData(((torch.randn(8, 8), torch.randn(8, 8)),), (8,), 8, True, "by hand")
    return Problem(model, "mse", data)


def long_run(command: str, products: int) -> Callable[..., Answer]:
    """One of about so many products."""
    match command:
        case "spectrum":  # of runs from many start vectors, the later ones of 16 steps
            return partial(hesscli.spectrum, steps=64, probes=(products - 64) // 16 + 1)
        case "diag":
            return partial(hesscli.diagonal, method="hutchinson", probes=products)
    return partial(hesscli.trace, method="hutchinson", probes=products)


LONG = ("trace", "diag", "spectrum")


def stays_flat(command: str, products: int) -> None:
    """Say what a long run takes of memory and open files beside what it did for 100 products."""
    taken, files = [0, 0], set[int]()

    def observe(snapshot: Snapshot) -> bool:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        late = (snapshot.done or 0) > 100
        taken[late] = max(taken[late], pages * os.sysconf("SC_PAGE_SIZE"))
        files.add(len(os.listdir("/proc/self/fd")))
        return False

    result = long_run(command, products)(small_problem(), observe=observe, budget=None)
    early, late = taken
    assert result.cost.products >= products - 16
    assert late <= 1.05 * early, (early, late)
    assert len(files) == 1, files
    each = max(late - early, 0) / products
    made = f"{command}: {result.cost.products:.0f} products"
    print(f"{made}: {late / early:.3f} of the memory, {each:.0f} B each", flush=True)


def stays_flat_alone(command: str, products: int) -> None:
    """In a process of its own: a fork counts pages of libraries only as it touches them."""
    work = f"import faults; faults.stays_flat({command!r}, {products})"
    subprocess.run([sys.executable, "-c", work], cwd=Path(__file__).parent, check=True)


def run_all(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="random moments for each command")
    parser.add_argument("--resumed", type=int, default=25, help="kills that runs go on after")
    parser.add_argument("--pairs", type=int, default=25, help="of each of two kinds")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    dice = random.Random(given.seed)
    for command in LONG:
        stays_flat_alone(command, 10_000)
    load_all()
    with tempfile.TemporaryDirectory() as name:
        top = Path(name).resolve()
        print("tmpfs:", on_disks_that_fill_up(top / "small"), flush=True)
        for command in COMMAND_LINES:
            print(f"{command}:", killed_at_each_step(command, top / command), flush=True)
            told = killed_at_random(command, top / command, given.kills, dice)
            print(f"{command}: {told}", flush=True)
        for command in LONGER:
            kept_top = top / f"{command} kept"
            told = resumed_after_kills(command, kept_top, given.resumed, dice)
            print(f"{command}: {told}", flush=True)
            told = resumed_after_each_write(command, kept_top)
            print(f"{command}: killed before each step of each write, {told}", flush=True)
        for number, commands in enumerate([("diag", "diag"), ("trace", "check")]):
            told = in_pairs(commands, top / f"pairs{number}", given.pairs)
            print(f"{' and '.join(commands)}: {told}", flush=True)


if __name__ == "__main__":
    run_all(sys.argv[1:])
