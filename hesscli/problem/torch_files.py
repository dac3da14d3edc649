"""Files that torch writes, ``torch.save`` and ``torch.export``, and the weights in them.

Unpickling can run any code. Nothing here does so unless the caller says that the file is trusted.
"""

from __future__ import annotations

import json
import logging
import mmap
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile, ZipInfo

import torch
from torch import Tensor, nn

from hesscli.errors import InputError, first_line, nearest
from hesscli.problem.factory import blamed_on_user, importing_beside

# -- Zip archives that ``torch.save`` wrote: what is in them, and whether it is what was saved -----

_CHUNK = 1 << 20
_SPARE = 64 << 20


def is_archive(path: Path) -> bool:
    """Whether a file ends as a zip archive does.

    Raises:
        InputError: it does, but the end cannot be meant.
    """
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile as error:
        raise _damaged(path, error) from error


def names_in(path: Path) -> list[str]:
    """Names of all members of a zip archive.

    Raises:
        InputError: the archive's directory cannot be read.
    """
    with _opened(path) as archive:
        return archive.namelist()


def is_unpacked(path: Path) -> bool:
    """Whether all members lie in the file as they are, so that it can be mapped."""
    with _opened(path) as archive:
        return all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())


def holds(path: Path, text: bytes, *, member: str) -> bool:
    """Whether a text is in an archive's members of that ending, or in a file that is no archive."""
    if not is_archive(path):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as all_:
            return all_.find(text) >= 0
    with _opened(path) as archive:
        members = [info for info in archive.infolist() if info.filename.endswith(member)]
        return any(text in _content(archive, info) for info in members)


def _content(archive: ZipFile, member: ZipInfo) -> bytes:
    """What a member holds, whether or not it has a checksum: see `verify_archive`."""
    with archive.open(member) as stream:
        stream._expected_crc = None  # type: ignore[attr-defined]
        return stream.read()


def verify_archive(path: Path) -> bool:
    """Check every member against its CRC-32.

    Returns:
        Whether there are any: ``torch.save`` can be told to leave them out.

    Raises:
        InputError: a member is not what was saved, or unpacks to far more than the file.
    """
    size = path.stat().st_size
    with _opened(path) as archive:
        members = archive.infolist()
        if sum(member.compress_size for member in members) > size:
            raise zipfile.BadZipFile("members lie over each other")
        unpacked = sum(member.file_size for member in members)
        if unpacked > 2 * size + _SPARE:
            got = f"{path}: {size:,} bytes that unpack to {unpacked:,}"
            hint = "write it with torch.save, which does not pack"
            raise InputError("the checkpoint is packed too tightly", got, hint)
        if not any(member.CRC for member in members):
            return False
        for member in members:
            with archive.open(member) as stream:
                while stream.read(_CHUNK):
                    pass
    return True


@contextmanager
def _opened(path: Path) -> Iterator[ZipFile]:
    try:
        with ZipFile(path) as archive:
            yield archive
    except (InputError, MemoryError):
        raise
    except Exception as error:  # zipfile has many for what is not as it should be
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    got = f"{path}: {first_line(error) or type(error).__name__}"
    return InputError("the checkpoint is damaged", got, "copy or download it again")


# -- What is unpickled, and what of it is built ----------------------------------------------------


class _Plain:
    """Stands in for a value beside the weights: settings, dates, paths, numpy numbers.

    Such values are never read, so none is built: there is nothing in them to attack, a Windows
    path loads anywhere, and any version of numpy's pickles does.
    """

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _plain_dict(*args: object) -> dict[Any, Any]:
    """Stands in for `defaultdict`, whose items torch's safe unpickler does not set."""
    return {}


_NUMPY_FUNCTIONS = ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
_NUMPY_VALUES = ("ndarray", "dtype", "bool", "bool_", "str_", "bytes_", "longdouble")
_NUMPY_NUMBERS = {
    "float": (16, 32, 64),
    "complex": (64, 128),
    "int": (8, 16, 32, 64),
    "uint": (8, 16, 32, 64),
}
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path", "PurePath")
_PLAIN_NAMES = (
    "argparse.Namespace",
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *(f"numpy.{core}.{name}" for core in ("core", "_core") for name in _NUMPY_FUNCTIONS),
    *(f"numpy.{name}" for name in _NUMPY_VALUES),
    *(f"numpy.{kind}{bits}" for kind, sizes in _NUMPY_NUMBERS.items() for bits in sizes),
    # what a defaultdict makes its values with
    *(f"builtins.{name}" for name in ("list", "dict", "tuple", "int", "float", "str", "bool")),
)
_SAFE: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    *((_Plain, name) for name in _PLAIN_NAMES),
    (_plain_dict, "collections.defaultdict"),
]


_TRUST = "give --trust if you trust whoever made it, or save model.state_dict() instead"


def is_program(path: Path) -> bool:
    """Whether this is a torch.export program, by its name or by what is in the archive."""
    if path.suffix == ".pt2":
        return True
    endings = ("/archive_format", "/models/model.json", "serialized_exported_program.json")
    return is_archive(path) and any(name.endswith(endings) for name in names_in(path))


def read_program(path: Path, *, trust: bool) -> FoundWeights:
    """Load a torch.export program; its weights and sample inputs are unpickled in full."""
    if not trust:
        raise InputError(
            "a torch.export program can run code when it is loaded",
            str(path),
            _TRUST,
        )
    if not is_archive(path):
        hint = "write it with torch.export.save, or name a torch.save file .pt"
        raise InputError("not a torch.export program", f"{path}: not a zip archive", hint)
    hint = "write it again with torch.export.save, by the torch that is used here"
    with _quietly(), blamed_on_user(f"the torch.export program cannot be loaded: {path}", hint):
        program = torch.export.load(path)
        module = program.module()
    _require_free_batch(program, path)
    return FoundWeights(module.state_dict(), module)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without torch.export's own warnings, which carry tracebacks."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)


def _require_free_batch(program: torch.export.ExportedProgram, path: Path) -> None:
    names = set(program.graph_signature.user_inputs)
    inputs = {
        node.name: node.meta["val"].shape
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in names
        if isinstance(node.meta.get("val"), Tensor)
    }
    sizes = [shape[0] for shape in inputs.values() if shape]
    if any(isinstance(size, torch.SymInt) for size in sizes):
        return
    batch = '{0: torch.export.Dim("batch")}'
    shapes = ", ".join(f'"{name}": {batch}' for name, shape in inputs.items() if shape)
    raise InputError(
        "the program was exported for one batch size",
        f"{path}: " + ", ".join(f"{name} {list(shape)}" for name, shape in inputs.items()),
        f"export it again with dynamic_shapes={{{shapes}}}",
    )


def read_pickle(
    path: Path, *, trust: bool, key: str | None = None, mapped: bool = False
) -> FoundWeights:
    """Load a ``torch.save`` file and pick the model's weights, or those at ``key``, out of it.

    Without trust tensors are mapped wherever that is possible, with it where ``mapped`` asks.
    """
    is_zip = is_archive(path)
    if is_zip:
        _require_torch_zip(path)
    # Indices of sparse tensors come from the file: out of bounds, they would read any memory.
    checked = torch.sparse.check_sparse_tensor_invariants()  # type: ignore[no-untyped-call]
    with warnings.catch_warnings(action="ignore"), checked:
        payload = _trusted(path, mapped) if trust else _weights_only(path, is_zip)
    return find_weights(payload, path, key)


def _require_torch_zip(path: Path) -> None:
    names = names_in(path)
    if any(name.endswith("/constants.pkl") for name in names):
        raise InputError(
            "a TorchScript archive does not carry the Python model that derivatives need",
            str(path),
            f"torch.save(torch.jit.load({path.name!r}).state_dict(), 'weights.pt'), "
            "and name the model's class in the spec",
        )
    if not any(name.endswith("/data.pkl") for name in names):
        got = f"{path}: a zip of {', '.join(names[:3]) or 'nothing'}"
        raise InputError("a zip, but not a checkpoint", got, "give a file that torch.save wrote")


def _trusted(path: Path, mapped: bool) -> Any:
    hint = "save model.state_dict() instead; a class must be importable from beside the file"
    what = f"the checkpoint cannot be unpickled: {path}"
    with importing_beside(path.parent), blamed_on_user(what, hint):
        return torch.load(path, map_location="cpu", weights_only=False, mmap=mapped)


def _weights_only(path: Path, is_zip: bool) -> Any:
    # torch's safe unpickler would make one of any length that the file says.
    if holds(path, b"\nbytearray\n", member="/data.pkl"):
        raise InputError("the checkpoint needs a full unpickling", f"{path}: a bytearray", _TRUST)
    # Mapped, so that optimizer tensors cost no memory; packed members cannot be mapped.
    mapped = is_zip and is_unpacked(path)
    try:
        with torch.serialization.safe_globals(_SAFE):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        raise _refused(path, str(error)) from error


def _refused(path: Path, message: str) -> InputError:
    if match := re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", message):
        return InputError(
            f"the checkpoint needs code to load: {match[1]}", f"{path}: a pickle", _TRUST
        )
    if "Unsupported operand" in message or "Can only" in message or "call reduce" in message:
        return InputError("the checkpoint needs a full unpickling", f"{path}: a pickle", _TRUST)
    reason = first_line(message) or "it ends too early"
    hint = "copy or download it again: it is damaged, or torch.save did not write it"
    return InputError("the checkpoint cannot be read", f"{path}: {reason}", hint)


# -- Which of the tensors in a ``torch.save`` file are the model's weights -------------------------

Place = tuple[str, ...]

_USUAL_NAMES = frozenset(
    {"model", "model_state", "model_state_dict", "module", "net", "net_state_dict", "network"}
    | {"parameters", "params", "state", "state_dict", "weights"}
)
AVERAGED = re.compile(r"(^|[_.-])(ema|swa|avg|average|averaged|polyak)([_.-]|$)", re.IGNORECASE)
_BESIDE_MODEL = re.compile(r"optim|sched|scaler|rng|_extra_state$", re.IGNORECASE)
_DEEPEST = 3
_MOST_NAMED = 5


@dataclass(frozen=True)
class FoundWeights:
    """The weights of a checkpoint, and the module itself where the file carried one.

    ``said`` is what else it says of how the model was built, as far as that is plain values;
    ``optimizers`` are the states of those that trained it.
    """

    weights: Mapping[str, Tensor]
    module: nn.Module | None = None
    notes: tuple[str, ...] = ()
    said: Mapping[str, Any] = field(default_factory=dict)
    optimizers: tuple[Mapping[str, Any], ...] = ()

    def noted(self, notes: Sequence[str]) -> FoundWeights:
        """The same with more notes, which come first."""
        return replace(self, notes=(*notes, *self.notes))


class SeveralSetsError(InputError):
    """A file holds several sets of weights, and none of them alone can be meant."""

    def __init__(self, what: str, path: Path, names: Sequence[str]) -> None:
        lines = ", ".join(names[:_MOST_NAMED])
        hint = f"name the one that you mean at the top of the spec: {key_line(names[-1])}"
        super().__init__(what, f"{path}: {lines}", hint)
        self.names = tuple(names)


def key_line(name: str) -> str:
    """The line of a spec that chooses a set of weights."""
    return f"checkpoint_keys = {{ key = {json.dumps(name, ensure_ascii=False)} }}"


def find_weights(payload: object, path: Path, key: str | None = None) -> FoundWeights:
    """Pick the model out of what a file held: alone, or nested beside optimizer and settings.

    An average of the weights is another model: it is never chosen in place of the plain one, but
    by its ``key``.

    Raises:
        SeveralSetsError: it cannot be known which set is meant.
        InputError: there is none, or none at ``key``.
    """
    places = _places(payload, (), set())
    averaged = [place for place in places if any(AVERAGED.search(name) for name in place)]
    plain = {place: held for place, held in places.items() if place not in averaged}
    chosen = _choose(plain, averaged, path) if key is None else _named(places, key, path)
    held = places[chosen]
    notes = tuple(
        f"averaged weights left aside: {_spell(place)}" for place in averaged if key is None
    )
    if isinstance(held, nn.Module):
        return FoundWeights(held.state_dict(), held, notes)
    return FoundWeights(
        held, None, notes, _said(payload), tuple(_optimizers(payload, _DEEPEST, set()))
    )


# What Lightning, timm and other training scripts write beside the weights.
_SAID = (
    *("arch", "version", "hparams_name", "hyper_parameters", "hparams", "module_arguments"),
    *("model_args", "model_kwargs"),
)


def _said(payload: object) -> dict[str, Any]:
    top = payload if isinstance(payload, Mapping) else {}
    return {key: _plain(top[key]) for key in _SAID if key in top}


def _optimizers(node: object, depth: int, seen: set[int]) -> Iterator[Mapping[str, Any]]:
    """What ``torch.optim`` wrote of itself, wherever it lies; no container is entered twice."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, Mapping) and {"state", "param_groups"} <= node.keys():
        yield node
    elif depth and isinstance(node, (Mapping, list, tuple)):
        for inner in node.values() if isinstance(node, Mapping) else node:
            yield from _optimizers(inner, depth - 1, seen)


def _plain(value: object, depth: int = _DEEPEST) -> Any:
    """Numbers, texts, and lists and tables of them; an ellipsis for what is none of these."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case list() | tuple() if depth:
            return [_plain(inner, depth - 1) for inner in value]
        case Mapping() if depth:
            return {str(name): _plain(inner, depth - 1) for name, inner in value.items()}
    return ...


def _places(
    node: object, place: Place, seen: set[int]
) -> dict[Place, dict[str, Tensor] | nn.Module]:
    """Every set of named tensors, by the keys that lead to it first; optimizers are passed over."""
    if id(node) in seen:  # a pickle may hold one dictionary at many places
        return {}
    seen.add(id(node))
    if isinstance(node, nn.Module):
        return {place: node}
    if not isinstance(node, Mapping) or {"state", "param_groups"} <= node.keys():
        return {}
    named = {key: value for key, value in node.items() if isinstance(key, str)}
    tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
    found: dict[Place, dict[str, Tensor] | nn.Module] = {place: tensors} if tensors else {}
    for key, value in named.items():
        if len(place) < _DEEPEST and not _BESIDE_MODEL.search(key):
            found |= _places(value, (*place, key), seen)
    return found


def _choose(plain: Mapping[Place, object], averaged: list[Place], path: Path) -> Place:
    """The one place that can be meant; tensors beside a nested model are not part of it."""
    usual = [place for place in plain if place and _USUAL_NAMES.issuperset(place)]
    inner = [place for place in usual if not any(_within(other, place) for other in usual)]
    candidates = inner or list(plain)
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        what = "the checkpoint holds several sets of weights"
    elif averaged:
        what, candidates = "the checkpoint holds only averaged weights", averaged
    else:
        hint = "save model.state_dict() with torch.save"
        raise InputError("the checkpoint holds no named tensors", str(path), hint)
    raise SeveralSetsError(what, path, [_spell(place) for place in candidates])


def _named(places: Mapping[Place, object], key: str, path: Path) -> Place:
    """The place that a spec names."""
    spelled = {_spell(place): place for place in places}
    if key in spelled:
        return spelled[key]
    close = nearest(key, spelled)
    got = f"{path}: {', '.join(list(spelled)[:_MOST_NAMED]) or 'no named tensors'}"
    hint = key_line(close) if close else "correct key under [checkpoint_keys] in the spec"
    raise InputError(f"the checkpoint holds no weights at {key!r}", got, hint)


def _within(inner: Place, outer: Place) -> bool:
    return len(inner) > len(outer) and inner[: len(outer)] == outer


def _spell(place: Place) -> str:
    return ".".join(place) or "(top level)"
