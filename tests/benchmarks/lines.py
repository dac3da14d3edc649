"""Finished pieces of a long queue, one line of JSON each.

Those of the repository lie beside this file and stay as they are; new ones are appended in
hesscli-out, whence they can be moved. Whoever is interrupted loses the piece at work alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FRESH = ROOT / "hesscli-out"
Piece = TypeVar("Piece")


class Lines(dict[Piece, dict[str, Any]], Generic[Piece]):
    """What was found, by piece.

    Args:
        name: of the files.
        kind: a frozen dataclass of what tells one piece from another.
        folder: of new ones.
    """

    def __init__(self, name: str, kind: type[Piece], folder: Path = FRESH) -> None:
        super().__init__()
        self._fresh = folder / name
        names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
        for path in (HERE / name, self._fresh):
            for text in path.read_text().splitlines() if path.exists() else ():
                try:
                    line = json.loads(text)
                except json.JSONDecodeError:
                    continue  # cut off while it was written
                self[kind(**{name: line.pop(name) for name in names})] = line

    def keep(self, piece: Piece, found: dict[str, Any]) -> None:
        """Append a piece that is done."""
        self[piece] = found
        self._fresh.parent.mkdir(parents=True, exist_ok=True)
        with self._fresh.open("a") as file:
            file.write(json.dumps(asdict(piece) | found) + "\n")  # type: ignore[call-overload]
