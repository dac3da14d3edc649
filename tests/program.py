"""The program as a subprocess, and how its errors read."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import hesscli
from hesscli.cli.app import main

HESSCLI = [sys.executable, "-m", "hesscli"]
SUNSPOTS = Path(hesscli.__file__).parent.parent / "samples" / "sunspots" / "model.pt"
SPEC = ("--spec", str(SUNSPOTS.parent / "hesscli.toml"))
"""Tests run elsewhere, from where a spec that merely lies beside a checkpoint is not used."""
FEW = {
    "trace": ("--method", "hutchinson", "--probes", 4),
    "diag": ("--method", "hutchinson", "--probes", 4),
    "ihvp": ("--window", 32),
    "prune": ("--window", 32),
    "spectrum": ("--steps", 8, "--probes", 2),
}
"""Little work, of the kind that each does."""


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, without what changes colours and widths."""
    kept = {k: v for k, v in os.environ.items() if not re.search("COLOR|COLUMNS|TTY|GITHUB", k)}
    return {"OMP_NUM_THREADS": "1", **kept, **changes}


def words(args: tuple[object, ...]) -> list[str]:
    """A command line; where it names the sample, it names its spec too."""
    return [*map(str, args), *(SPEC if SUNSPOTS in args and "--spec" not in args else ())]


def hesscli_run(*args: object, cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*HESSCLI, *words(args)],
        cwd=cwd,
        env=environment(**changes),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def three_lines(stderr: str) -> tuple[str, str, str]:
    what, got, hint = stderr.splitlines()
    assert what.startswith("error: ")
    assert got.startswith("  got: ")
    assert hint.startswith("  try: ")
    return what.removeprefix("error: "), got.removeprefix("  got: "), hint.removeprefix("  try: ")


class Stream(io.TextIOWrapper):
    """What is written; Ctrl-C is pressed as soon as a word is in it."""

    def __init__(self, word: str | None = None) -> None:
        super().__init__(io.BytesIO(), "utf-8", write_through=True)
        self.word = word

    def write(self, text: str) -> int:
        count = super().write(text)
        if self.word is not None and self.word in text:
            self.word = None
            signal.raise_signal(signal.SIGINT)
        return count

    def written(self) -> str:
        return self.buffer.getvalue().decode()  # type: ignore[attr-defined]


def hesscli_warm(
    *args: object, cwd: Path, ctrl_c_at: str | None = None
) -> subprocess.CompletedProcess[str]:
    """The same in this process, which saves the start: for what a fresh one would not change.

    Args:
        args: the command line.
        cwd: the working folder.
        ctrl_c_at: what the run says on stderr when Ctrl-C is pressed.
    """
    line, out, err = words(args), Stream(), Stream(ctrl_c_at)
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with contextlib.chdir(cwd), streams[0], streams[1]:
            code = main(line)
    finally:
        signal.signal(signal.SIGINT, before)
    return subprocess.CompletedProcess(line, code, out.written(), err.written())
