"""Memory and time as people read them, wherever they are said."""

from __future__ import annotations

import math


def human_bytes(size: float) -> str:
    """Write an amount of memory, as in ``512 MiB``."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        units = size / 1024**power
        if units >= 0.9995:
            return f"{units:.1f} {unit}" if units < 9.95 else f"{units:.0f} {unit}"
    return f"{size:.0f} B"


def human_seconds(seconds: float) -> str:
    """Write a time that was measured, as in ``12 ms``, ``3.4 s`` or ``1 h 10 min``."""
    if seconds < 0.0995:
        return f"{_two_digits(1000 * seconds)} ms"
    if seconds < 59.5:
        return f"{_two_digits(seconds)} s"
    if seconds < 3599.5:
        return _two_units(seconds, 60, "min", "s")
    return _two_units(seconds / 60, 60, "h", "min")


def duration(seconds: float) -> str:
    """Write a time as a clock shows it and options take it: ``8s``, ``3m20s``, ``2h05m``."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


_MORE_WORK = 4.0
"""Times as long as what was done: checks and proofs come before the first two probes."""

_LEAST_MORE = 10.0
"""Seconds: whoever has spent none yet knows of none, and torch takes some to start."""


def larger_budget(spent: float, done: float = 1.0) -> str:
    """What would do where a time was spent and there is no result.

    Args:
        spent: seconds.
        done: share of what was being done.
    """
    wanted = max(_MORE_WORK * spent / min(max(done, 0.1), 1.0), _LEAST_MORE)
    scale = 10.0 ** math.floor(math.log10(wanted))
    # To one digit that people would choose: 1, 2 or 5, and zeros.
    rounded = next(math.ceil(step * scale) for step in (1, 2, 5, 10) if step * scale >= wanted)
    return f"a --budget that is {rounded} s larger, or fewer --examples"


def _two_digits(value: float) -> str:
    return f"{value:#.2g}".rstrip(".") if value else "0"


def _two_units(amount: float, factor: int, large: str, small: str) -> str:
    whole, rest = divmod(round(amount), factor)
    return f"{whole} {large} {rest} {small}" if rest else f"{whole} {large}"
