"""Errors that people read: what is wrong, what was got, what to try, and the exit code."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches
from enum import IntEnum
from pathlib import Path

LONGEST_LINE = 1000
LONGEST_HINT = 2000


class ExitCode(IntEnum):
    """What the process returns; the README's table says the same."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    INPUT = 3
    UNSOUND = 4
    TOLERANCE = 5
    INTERRUPTED = 130


def printable(text: str) -> str:
    r"""Text without a character that a terminal would obey: each is spelled, as in ``\x1b``.

    These are the control characters but for line feeds, and those that turn the direction of
    writing.
    """
    if text.isprintable():
        return text
    return "".join(
        char
        if char == "\n" or (unicodedata.category(char) != "Cc" and char not in _TURNING)
        else char.encode("unicode_escape").decode()
        for char in text
    )


_TURNING = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def shorten(text: str, longest: int) -> str:
    """A text of bearable length, its middle left out where it is longer."""
    if len(text) <= longest:
        return text
    return f"{text[: 2 * longest // 3]} … {text[-longest // 4 :]}"


def first_line(message: object) -> str:
    """The first line of what an exception or a warning says, empty where it says nothing.

    It may say nothing because its ``__str__`` raises in turn.
    """
    try:
        text = str(message)
    except Exception:
        return ""
    return shorten(next(iter(text.strip().splitlines()), ""), LONGEST_LINE)


class HesscliError(Exception):
    """An error in three lines, each of bearable length; names come from files, and may be odd.

    Args:
        what: what is wrong, in one line.
        got: what was found, with the name of the thing it was found in.
        hint: what to try next.
        frames: the user's own traceback lines, shown below the three lines.
    """

    exit_code = ExitCode.UNEXPECTED

    def __init__(self, what: str, got: str, hint: str, frames: tuple[str, ...] = ()) -> None:
        super().__init__(what, got, hint, frames)
        self.what, self.got = (
            printable(shorten(line, LONGEST_LINE)).replace("\n", "\\n") for line in (what, got)
        )
        self.hint, self.frames = printable(shorten(hint, LONGEST_HINT)), frames

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


class BudgetError(HesscliError):
    """The time was not enough for any result."""

    exit_code = ExitCode.TOLERANCE


# -- Near names, for errors that say what was probably meant ---------------------------------------


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a mistyped one is closest to, if any is close."""
    return next(iter(get_close_matches(name, list(known), n=1)), None)


def missing_file(kind: str, path: Path, *, suffixes: tuple[str, ...] = ("",)) -> InputError:
    """The error for a file that is not there; it names its nearest neighbours.

    Args:
        kind: what the file should have been, such as "checkpoint".
        path: where it was looked for.
        suffixes: the endings that such files have.
    """
    folder = path.parent
    if not folder.is_dir():
        return InputError(f"{kind} not found", str(path), f"check the folder: no folder {folder}")
    names = sorted(entry.name for entry in folder.iterdir())
    alike = [name for name in names if name.endswith(suffixes)]
    close = get_close_matches(path.name, alike, n=3) or alike[:3]
    hint = f"in {folder} there is {', '.join(close)}" if close else f"look in {folder} for its name"
    return InputError(f"{kind} not found", str(path), hint)
