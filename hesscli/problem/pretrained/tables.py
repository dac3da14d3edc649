"""Data files as columns: text, JSON lines, CSV, Parquet, and what `datasets` has or can load."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hesscli.errors import InputError, first_line, missing_file, nearest
from hesscli.problem.pretrained.folder import require

TEXT = "text"
_LABELS = ("labels", "label", "target")
_MOST_NAMED = 8


@dataclass(frozen=True)
class Table:
    """Columns of equal length.

    Attributes:
        place: where they came from.
        sha256: of the file, or of what `datasets` knows the data by.
        columns: values by name; a plain text is one value of the column ``text``.
        is_plain: it is a plain text.
    """

    place: str
    sha256: str
    columns: Mapping[str, Sequence[Any]]
    is_plain: bool = False

    def texts(self, name: str | None, labels: str | None, *, pairs: bool) -> Sequence[Any]:
        """The column that was named; else ``text``, or the only one that holds text.

        Args:
            name: of the column.
            labels: of another.
            pairs: whether two texts may make an example.

        Raises:
            InputError: there is no such column, or there are several.
        """
        if name is not None:
            return self._column(name, "--text")
        if TEXT in self.columns:
            return self.columns[TEXT]
        others = (labels, *(_LABELS if labels is None else ()))
        found = [k for k, values in self.columns.items() if _is_text(values) and k not in others]
        if len(found) == 1:
            return self.columns[found[0]]
        what = "which column holds the text is not clear"
        longest = max(found, key=lambda name: sum(map(len, self.columns[name])), default="COLUMN")
        both = " --text ".join(found) if pairs and len(found) == 2 else ""
        hint = (
            f"--text {both} for pairs, or --text {longest} alone" if both else f"--text {longest}"
        )
        raise InputError(what, self._told(), hint)

    def labels(self, name: str | None) -> Sequence[Any]:
        """The column that was named; else one that is called so.

        Raises:
            InputError: there is none.
        """
        if name is not None:
            return self._column(name, "--labels")
        found = next((known for known in _LABELS if known in self.columns), None)
        if found is None:
            what = "the model needs labels, and no column is called so"
            raise InputError(what, self._told(), "--labels COLUMN")
        return self.columns[found]

    def _column(self, name: str, option: str) -> Sequence[Any]:
        if name not in self.columns:
            close = nearest(name, self.columns)
            hint = f"{option} {close or next(iter(self.columns), 'COLUMN')}"
            raise InputError(f"the data has no column {name!r}", self._told(), hint)
        return self.columns[name]

    def _told(self) -> str:
        if self.is_plain:
            return f"{self.place}, a plain text; .jsonl, .csv and .parquet have columns"
        names = list(self.columns)
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        return f"{self.place}: columns {', '.join(names[:_MOST_NAMED])}{more}"


def _is_text(values: Sequence[Any]) -> bool:
    return bool(len(values)) and isinstance(values[0], str)


def read_table(place: str) -> Table:
    """Read a data file, a folder that `datasets` saved, or a data set that it has in its cache.

    Raises:
        InputError: it is not there, is of no known kind, or cannot be read.
    """
    path = Path(place)
    if path.is_file():
        read = _READERS.get(path.suffix.lower())
        if read is None:
            got = f"{path}, which ends in {path.suffix!r}"
            raise InputError("data of an unknown kind", got, f"one of {', '.join(_READERS)}")
        try:
            columns = read(path)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except (OSError, ValueError, csv.Error, RecursionError) as error:
            got = f"{path}: {first_line(error)}"
            raise InputError("the data cannot be read", got, "the file whole, in UTF-8") from error
        return Table(place, digest, columns, is_plain=path.suffix.lower() == ".txt")
    if path.suffix.lower() in _READERS:
        raise missing_file("data", path, suffixes=tuple(_READERS))
    return _of_datasets(place)


def _read_text(path: Path) -> dict[str, list[Any]]:
    return {TEXT: [path.read_text(encoding="utf-8")]}


def _read_json_lines(path: Path) -> dict[str, list[Any]]:
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number}: {first_line(error)}") from None
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is no object, but a {type(row).__name__}")
                rows.append(row)
    return _by_column(rows)


def _read_csv(path: Path) -> dict[str, list[Any]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter=delimiter, strict=True))
    if any(None in row for row in rows):
        raise ValueError("a line has more fields than the first one names")
    return _by_column(rows)


def _read_parquet(path: Path) -> dict[str, list[Any]]:
    require("pyarrow", "a .parquet file")
    import pyarrow.parquet

    return dict(pyarrow.parquet.read_table(path).to_pydict())


_READERS: dict[str, Callable[[Path], dict[str, list[Any]]]] = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def _by_column(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Columns of what may not be in every row; None there."""
    kept = list(rows)
    names = dict.fromkeys(name for row in kept for name in row)
    return {name: [row.get(name) for row in kept] for name in names}


def _of_datasets(place: str) -> Table:
    """A folder that ``save_to_disk`` wrote, or ``NAME`` or ``NAME:SPLIT`` from the cache."""
    path = Path(place)
    if path.is_dir() and not any((path / n).exists() for n in ("state.json", "dataset_dict.json")):
        got = f"{path}, a folder that `datasets` did not save"
        hint = f"a file ({', '.join(_READERS)}), or for images a folder of folders, one a class"
        raise InputError("data of an unknown kind", got, hint)
    require("datasets", f"data that is no file, {place}")
    import datasets

    name, _, split = place.partition(":")
    offline, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, True
    try:
        loaded = datasets.load_from_disk(place) if path.is_dir() else datasets.load_dataset(name)
    except Exception as error:  # of any kind: they come from all over the library
        got = f"{place}: {first_line(error) or type(error).__name__}"
        hint = "a file, a folder that save_to_disk wrote, or a data set that was loaded once before"
        raise InputError("no such data", got, f"{hint}: nothing is downloaded") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    if isinstance(loaded, datasets.DatasetDict):
        splits = list(loaded)
        if not split and len(splits) == 1:
            (split,) = splits
        if split not in loaded:
            named = f"{place}/{splits[0]}" if path.is_dir() else f"{name}:{splits[0]}"
            got = f"{place}: {', '.join(splits)}"
            raise InputError("which split is meant is not clear", got, f"--data {named}")
        loaded = loaded[split]
    digest = hashlib.sha256(loaded._fingerprint.encode()).hexdigest()
    columns = {column: loaded.with_format(None)[column] for column in loaded.column_names}
    return Table(place, digest, columns)
