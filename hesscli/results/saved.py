"""Documents read back with the arrays that belong to them, or refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hesscli.errors import InputError, first_line, missing_file
from hesscli.results.header import SCHEMA_VERSION

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Saved:
    """What a command has written: its document, and its arrays.

    Attributes:
        document: the JSON document, as the schema describes it.
        arrays: of each ``.safetensors`` file the arrays by the names of their tensors; the files
            go by what ``document["files"]`` calls them, as in ``arrays["tensors"]``.
    """

    document: Mapping[str, Any]
    arrays: Mapping[str, Mapping[str, NDArray[Any]]]


def read(path: str | Path) -> Saved:
    """Read a command's document, and the arrays beside it if they are the same run's.

    The document has the SHA-256 of every other file of its set, and all of them are compared,
    pictures too. They are looked for beside the document, so that a folder may be moved. While a
    run puts a new set in the place of this one, either is read, whole, or there is no document.

    Args:
        path: of the document, such as ``hesscli-out/fashion-model/diag.json``.

    Returns:
        The document and the arrays.

    Raises:
        InputError: there is no document, or one of its files is missing or of another run.
    """
    path = Path(path)
    contents = _contents(path)
    while True:
        try:
            return _read(path, contents)
        except InputError:
            before, contents = contents, _contents(path)
            if contents == before:  # else a run has replaced the set meanwhile
                raise


def belonging(path: Path) -> list[Path]:
    """The files beside a document that it names, as far as they are what it says."""
    kept: list[Path] = []
    with suppress(InputError):
        for file, expected in _members(path, _parse(path, _contents(path))).values():
            with suppress(InputError):
                _verified(path, file, expected)
                kept.append(file)
    return kept


# -- What stands in a document about its files -----------------------------------------------------


def _read(path: Path, contents: bytes) -> Saved:
    from safetensors.numpy import load

    document, arrays = _parse(path, contents), {}
    for kind, (file, expected) in _members(path, document).items():
        found = _verified(path, file, expected)
        if file.suffix == ".safetensors" and not kind.startswith("checkpoint"):
            arrays[kind] = load(found)
    return Saved(document, arrays)


def _contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise missing_file("document", path, suffixes=(".json",)) from None
    except OSError as error:
        raise InputError(f"cannot read {path}", _reason(error), _PATH) from error


def _parse(path: Path, contents: bytes) -> dict[str, Any]:
    try:
        document = json.loads(contents)
    except ValueError as error:
        raise InputError(f"{path} is no document of hesscli", first_line(error), _PATH) from error
    if not isinstance(document, dict) or "schema_version" not in document:
        raise InputError(f"{path} is no document of hesscli", "it has no schema_version", _PATH)
    version = document["schema_version"]
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{path} is of another hesscli",
            f"schema_version {version}, where this one knows {SCHEMA_VERSION}",
            f"hesscli {document.get('hesscli_version', '')} to read it",
        )
    return document


def _members(path: Path, document: Mapping[str, Any]) -> dict[str, tuple[Path, str | None]]:
    """Every other file of the set by its kind: where it is, and the sum that it should have."""
    files, sums = document.get("files", {}), document.get("sha256", {})
    for found in (files, sums):
        if not isinstance(found, dict) or not all(isinstance(x, str) for x in found.values()):
            raise InputError(f"{path} is no document of hesscli", "odd files or sha256", _PATH)
    return {
        kind: (path.parent / Path(file).name, sums.get(kind))
        for kind, file in files.items()
        if kind != "json"
    }


def _verified(path: Path, file: Path, expected: str | None) -> bytes:
    """The contents of a file, if it is the one that the document names."""
    try:
        contents = file.read_bytes()
    except OSError as error:
        raise _mixed(path, f"{file.name} cannot be read: {_reason(error)}") from error
    if expected is None:
        raise _mixed(path, f"the document has no SHA-256 of {file.name}")
    if hashlib.sha256(contents).hexdigest() != expected:
        raise _mixed(path, f"{file.name} has another SHA-256 than the document says")
    return contents


def _mixed(path: Path, got: str) -> InputError:
    return InputError(
        f"{path} and the files beside it are not of one run",
        got,
        f"the command that wrote them again, with --dir {path.parent}",
    )


_PATH = "the .json file that a command wrote, as in hesscli-out/fashion-model/trace.json"


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
