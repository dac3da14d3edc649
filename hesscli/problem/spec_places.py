"""Which spec is a checkpoint's: the one that was named, or one found where they usually are."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from textwrap import indent

from hesscli.errors import InputError, missing_file
from hesscli.problem.pretrained.folder import is_pretrained
from hesscli.problem.spec import describe_example, parsed, read_spec

SPEC_NAME = "hesscli.toml"


def find_spec(checkpoint: Path | None, spec: Path | None, *, trust: bool = False) -> Path:
    """The spec to use: the one that was named, else the first found by convention.

    A spec names code to run. One that came with somebody else's checkpoint is not used for having
    been found: it must lie inside the working folder's tree, be named, or be trusted.

    Raises:
        InputError: there is none, or it is not to be used.
    """
    if spec is not None:
        if not spec.is_file():
            raise missing_file("spec", spec, suffixes=(".toml",))
        return spec
    if checkpoint is not None and not checkpoint.exists():
        raise missing_file("checkpoint", checkpoint)
    places = _usual_places(checkpoint)
    for place in places:
        if place.is_file():
            return require_near(place, trust=trust, of="beside the checkpoint")
    raise _no_spec(checkpoint, places)


def require_near(place: Path, *, trust: bool, of: str) -> Path:
    """A spec that nobody has named, where it may be used.

    Args:
        place: of its file.
        trust: it may be, wherever it lies.
        of: which spec it is, for people.

    Raises:
        InputError: it lies outside the working folder's tree, and is not trusted.
    """
    if place.is_file() and not (trust or place.parent.resolve().is_relative_to(Path.cwd())):
        raise _from_elsewhere(place, of)
    return place


def _usual_places(checkpoint: Path | None) -> list[Path]:
    here = Path(SPEC_NAME)
    if checkpoint is None:
        return [here]
    inside = [checkpoint / SPEC_NAME] if checkpoint.is_dir() else []
    if checkpoint.name in ("", ".."):  # such as ``.``
        checkpoint = checkpoint.resolve()
    stem = checkpoint.name
    if checkpoint.is_file():
        stem = stem_of(checkpoint)
    beside = [checkpoint.parent / f"{stem}.toml", checkpoint.parent / SPEC_NAME]
    return list(dict.fromkeys([*inside, *beside, here]))


def specs_of(folder: Path) -> list[Path]:
    """The specs that are of a folder of weights alone: in it, or beside it with its name."""
    beside = folder.parent / f"{folder.name}.toml"
    return [place for place in (folder / SPEC_NAME, beside) if folder.is_dir() and place.is_file()]


def stem_of(checkpoint: Path) -> str:
    """A checkpoint file's name without what says its kind."""
    for suffix in (".safetensors.index.json", ".bin.index.json"):
        if checkpoint.name.endswith(suffix):
            return checkpoint.name.removesuffix(suffix)
    return checkpoint.stem


def _from_elsewhere(place: Path, of: str) -> InputError:
    found = read_spec(place)
    tables = (found.model, found.data, found.loss)
    names = [name for table in tables if table for name in table.code]
    hint = f"--spec {shlex.quote(str(place))} once you have read it and what it names, or --trust"
    if Path(SPEC_NAME).is_file():
        hint += f"; --spec {SPEC_NAME} is your own"
    return InputError(
        f"the spec {of} lies outside the working folder, and a spec runs code",
        f"{place}, which runs {', '.join(names) or 'nothing by itself'}",
        hint,
    )


def _no_spec(checkpoint: Path | None, places: list[Path]) -> InputError:
    what = "no spec found: hesscli must know the model, the data and the loss"
    got = "none of " + ", ".join(map(str, places))
    if checkpoint is not None and is_pretrained(checkpoint):
        hint = (
            "--data corpus.txt: a Hugging Face folder knows its model and loss, and needs no spec"
        )
        return InputError(what, got, hint)
    if others := [place for folder in _folders(places) for place in _specs_in(folder)]:
        named = " or ".join(f"--spec {shlex.quote(str(place))}" for place in others[:3])
        return InputError(what, got, f"{named}, if it is meant for this checkpoint too")
    example = indent(describe_example().rstrip(), "    ")
    hint = f"`hesscli init {checkpoint or 'model.pt'}` writes one; a short one is:\n{example}"
    return InputError(what, got, hint)


def _folders(places: list[Path]) -> list[Path]:
    return list(dict.fromkeys(place.parent for place in places if place.parent.is_dir()))


def _specs_in(folder: Path) -> Iterator[Path]:
    """TOML files that are specs, as far as their tables tell."""
    for place in sorted(folder.glob("*.toml")):
        with suppress(InputError):
            if {"data", "loss"} <= parsed(place).keys():
                yield place
