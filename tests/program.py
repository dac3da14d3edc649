"""The program as a subprocess, and how its errors read."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import hesscli
from hesscli.cli.app import main

HESSCLI = [sys.executable, "-m", "hesscli"]
SUNSPOTS = Path(hesscli.__file__).parent.parent / "samples" / "sunspots" / "model.pt"
SPEC = ("--spec", str(SUNSPOTS.parent / "hesscli.toml"))
"""Tests run elsewhere, from where a spec that merely lies beside a checkpoint is not used."""


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, without what changes colours and widths."""
    kept = {k: v for k, v in os.environ.items() if not re.search("COLOR|COLUMNS|TTY|GITHUB", k)}
    return {**kept, "OMP_NUM_THREADS": "1", **changes}


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
        timeout=120,
    )


def three_lines(stderr: str) -> tuple[str, str, str]:
    what, got, hint = stderr.splitlines()
    assert what.startswith("error: ")
    assert got.startswith("  got: ")
    assert hint.startswith("  try: ")
    return what.removeprefix("error: "), got.removeprefix("  got: "), hint.removeprefix("  try: ")


def hesscli_warm(*args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same in this process, which saves the start: for what a fresh one would not change."""
    line = words(args)
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(line)
    printed, said = (stream.buffer.getvalue().decode() for stream in (out, err))
    return subprocess.CompletedProcess(line, code, printed, said)
