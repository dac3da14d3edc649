"""What the C library keeps of the memory that was freed, for what is asked for next."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # glibc's malloc.h
_NEVER = 2**31 - 1


class _Told(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


@cache
def _glibc() -> tuple[Callable[[int, int], int], Callable[[], _Told]] | None:
    """How to set it, and what it tells; None where the library is another, or tells nothing."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL("libc.so.6")
        library.mallinfo2.restype = _Told
        return library.mallopt, library.mallinfo2
    except (OSError, AttributeError):
        return None


def keep_freed_memory() -> None:
    """Stop glibc from giving freed temporaries back to the kernel after every probe.

    Each product frees its temporaries and the next asks for them again; by default they go back
    and forth through page faults, a fifth of a product's time on a CPU, and vectors of millions of
    entries do so whatever threshold is set. The peak stays the same. Does nothing where the C
    library is another, or does not tell what it keeps.
    """
    if (functions := _glibc()) is not None:
        set_to, _ = functions
        set_to(_TRIM_THRESHOLD, _NEVER)
        set_to(_MMAP_MAX, 0)


def kept_bytes() -> int:
    """Memory that is the process's and free for what it asks for next."""
    if (functions := _glibc()) is None:
        return 0
    _, told = functions
    return int(told().fordblks)
