"""How the process treats the machine: its memory, cores, and standard streams."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

# -- How the process treats the machine: its memory, and the cores that it shares ------------------


_IMPORTED = time.monotonic()


def yield_waiting_cores() -> None:
    """Let threads that wait for others sleep instead of spinning.

    Must be called before torch is loaded, whose OpenMP runtime reads this once. On two cores with
    one other busy process, spinning made a run of 11 seconds take 103. What the user has set in
    the environment stands.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@contextmanager
def lasting() -> Iterator[None]:
    """Keep the collector of cycles off the modules that are loaded here, until the process ends.

    Modules last as long as the process does, and yet it goes through torch's several times as
    they load and again at the end: 0.5 of the 1.6 seconds of ``python -c 'import torch'``. Where
    torch is there already, somebody else's program is, and its objects are its own affair.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def age() -> float:
    """Seconds since this process began; since hesscli was imported where the system tells not."""
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            began = int(file.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - began, 0.0)
    except (OSError, ValueError, AttributeError, IndexError):
        return time.monotonic() - _IMPORTED


# -- Standard output for results alone: whatever else writes to it lands on standard error ---------


@contextmanager
def results_alone(*, for_good: bool) -> Iterator[None]:
    """Make ``sys.stdout`` a stream of its own, and descriptor 1 a second name of 2.

    Libraries in C write to the descriptor, past Python. Nothing is done where ``sys.stdout`` is
    no file or another one, as within a test.

    Args:
        for_good: the process ends with this, so that what is printed as it ends, or was left in
            a buffer until then, goes to standard error too.
    """
    before = sys.stdout
    if not _is_first_descriptor(before):
        yield
        return
    with suppress(OSError):  # a full disk shows where there is something to say
        before.flush()
    kept = os.dup(1)
    results = open(kept, "w", encoding=before.encoding)  # noqa: SIM115 - closed below
    _join(2, 1)
    sys.stdout = results
    try:
        yield
    finally:
        with suppress(OSError):
            before.flush()
        if for_good:
            sys.stdout = sys.stderr
        else:
            _flush_libraries()
            _join(kept, 1)
            sys.stdout = before
        with suppress(OSError):  # it has been told by now, or was abandoned
            results.close()


def _is_first_descriptor(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.fileno() == 1
    except (OSError, ValueError, AttributeError):
        return False


def _join(source: int, target: int) -> None:
    """Let a descriptor stand for another, or for nothing where that is closed."""
    try:
        os.dup2(source, target)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, target)
        os.close(nowhere)


def _flush_libraries() -> None:
    """Write out what libraries in C still hold back."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).fflush(None)
