"""Errors that people read: what is wrong, what was got, what to try, and the exit code."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the process returns; the README's table says the same."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    INPUT = 3
    UNSOUND = 4
    TOLERANCE = 5
    INTERRUPTED = 130


class HesscliError(Exception):
    """An error in three lines.

    Args:
        what: what is wrong, in one line.
        got: what was found, with the name of the thing it was found in.
        hint: what to try next.
        frames: the user's own traceback lines, shown below the three lines.
    """

    exit_code = ExitCode.UNEXPECTED

    def __init__(self, what: str, got: str, hint: str, frames: tuple[str, ...] = ()) -> None:
        super().__init__(what, got, hint, frames)
        self.what, self.got, self.hint, self.frames = what, got, hint, frames

    def __str__(self) -> str:
        lines = (self.what, f"  got: {self.got}", f"  try: {self.hint}", *self.frames)
        return "\n".join(lines)


class UsageError(HesscliError):
    """An option or argument that cannot be meant."""

    exit_code = ExitCode.USAGE


class InputError(HesscliError):
    """A checkpoint, spec or data set that is missing, unreadable or does not match."""

    exit_code = ExitCode.INPUT


class UnsoundError(HesscliError):
    """A problem whose curvature would mean nothing: non-finite, random or not differentiable."""

    exit_code = ExitCode.UNSOUND
