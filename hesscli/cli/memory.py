"""Let the process keep the memory that it will need again a millisecond later."""

from __future__ import annotations

import ctypes
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
