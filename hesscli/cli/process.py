"""How the process treats the machine: its memory, and the cores that it shares."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_NEVER, _LARGEST_ALLOWED = 2**31 - 1, 1 << 25


def keep_freed_memory() -> None:
    """Stop glibc from giving freed temporaries back to the kernel after every probe.

    Each product frees its temporaries and the next asks for them again; by default they go back
    and forth through page faults, a fifth of a product's time on a CPU. The peak stays the same.
    Does nothing where the C library is another.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_TRIM_THRESHOLD, _NEVER)
    mallopt(_MMAP_THRESHOLD, _LARGEST_ALLOWED)


def yield_waiting_cores() -> None:
    """Let threads that wait for others sleep instead of spinning.

    Must be called before torch is loaded, whose OpenMP runtime reads this once. On two cores with
    one other busy process, spinning made a run of 11 seconds take 103. What the user has set in
    the environment stands.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
