"""Near names, for errors that say what was probably meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from hesscli.errors import InputError


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
