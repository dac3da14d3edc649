"""Checkpoints: the weights of a trained model from files of any kind, and vectors like them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from hesscli.errors import InputError, missing_file, shorten
from hesscli.parameters import Parameters
from hesscli.problem.torch_files import (
    FoundWeights,
    is_archive,
    is_program,
    read_pickle,
    read_program,
    verify_archive,
)

# -- Weights in .safetensors, and in shards of any kind that an index joins ------------------------


INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
_MOST_NAMED = 5
# Of an index and of a header: what a network has is far below, and a parser's memory bounded.
_MOST_ENTRIES = 400_000
_MOST_TENSORS = 1 << 16


def only_checkpoint(folder: Path) -> Path:
    """The index of a folder, or its single file of weights."""
    names = sorted(entry.name for entry in folder.iterdir())
    for suffix in (INDEX_SUFFIXES[0], ".safetensors", INDEX_SUFFIXES[1], ".bin"):
        fitting = [name for name in names if name.endswith(suffix)]
        if len(fitting) == 1:
            return folder / fitting[0]
        if fitting:
            got = f"{folder}: {', '.join(fitting[:_MOST_NAMED])}"
            raise InputError("the folder holds several checkpoints", got, "name one of them")
    got = f"{folder}: {', '.join(names[:_MOST_NAMED]) or 'nothing'}"
    raise InputError("the folder holds no .safetensors checkpoint", got, "name the file itself")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file."""
    try:
        with safe_open(path, framework="pt") as file:
            count = len(file.keys())
        if count > _MOST_TENSORS:
            got = f"{path}: {count:,} tensors"
            hint = f"files of at most {_MOST_TENSORS:,} tensors, joined by an index"
            raise InputError("more tensors than a network has", got, hint)
        return load_file(path, device="cpu")
    except SafetensorError as error:
        hint = "copy or download it again: it is damaged"
        raise InputError("not a whole .safetensors file", f"{path}: {error}", hint) from error


def shards_of(index: Path) -> dict[Path, list[str]]:
    """The shard files that an index names, each with the tensors it should hold."""
    hint = "write it again with save_pretrained, or name a single .safetensors file"
    content = index.read_bytes()
    if sum(map(content.count, (b",", b"[", b"{"))) > _MOST_ENTRIES:
        got = f"{index}: more than {_MOST_ENTRIES:,} entries"
        raise InputError("not an index of shards", got, hint)
    try:
        weight_map = json.loads(content)["weight_map"]
        entries = sorted((str(shard), str(name)) for name, shard in weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        got = f"{index}: no weight_map in JSON"
        raise InputError("not an index of shards", got, hint) from error
    shards: dict[Path, list[str]] = {}
    for shard, name in entries:
        # Judged by the name alone: caches link the files themselves to elsewhere.
        if Path(shard).is_absolute() or ".." in Path(shard).parts or "\0" in shard:
            got = f"{index}: {shard!r}"
            raise InputError("the index names a file outside its folder", got, hint)
        shards.setdefault(index.parent / shard, []).append(name)
    return shards


def join_shards(
    shards: Mapping[Path, list[str]], index: Path, read: Callable[[Path], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors of all shards; each must hold what the index says.

    Args:
        shards: names of tensors by the file that should hold them.
        index: where that is said.
        read: gives the tensors of one file.
    """
    state: dict[str, Tensor] = {}
    for shard, names in shards.items():
        if not shard.is_file():
            hint = f"copy it beside {index.name}: {len(shards)} shards belong together"
            raise InputError("a shard of the checkpoint is missing", str(shard), hint)
        tensors = read(shard)
        if absent := [name for name in names if name not in tensors]:
            hint = "index and shards are of different checkpoints: copy them again"
            raise InputError("a shard lacks tensors of the index", f"{shard}: {absent[0]}", hint)
        state |= {name: tensors[name] for name in names}
    return state


# -- Checkpoints: the weights of a trained model from a file, and their way into a module ----------


_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", *INDEX_SUFFIXES, ".pt2")
# torch.save files that are no zip begin with this number, pickled.
_LEGACY_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")


_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_forward_module)\."
)


@dataclass(frozen=True)
class Checkpoint:
    """Weights as they lie in a file, by name and on the CPU.

    ``module`` is the model itself, where a trusted file carried one. ``notes`` are what the
    reader should be told: what else the file held that could be taken for the model, and that
    it has no checksums. ``said`` is what it says of how the model was built, and ``optimizers``
    are the states of those that trained it.
    """

    path: Path
    sha256: str
    state: dict[str, Tensor]
    module: nn.Module | None = None
    notes: tuple[str, ...] = ()
    said: Mapping[str, Any] = field(default_factory=dict)
    optimizers: tuple[Mapping[str, Any], ...] = ()


def read_checkpoint(path: Path, *, trust: bool = False, key: str | None = None) -> Checkpoint:
    """Read a checkpoint; nothing in it is run unless it is trusted.

    Args:
        path: a torch.save file, a .safetensors file, an index or a folder of either, or a .pt2.
        trust: whether code in the file may run.
        key: which of several sets of weights in a torch.save file is meant, dotted where nested.

    Raises:
        InputError: it is not there, not whole, or holds no one set of weights that is meant.
    """
    if not path.exists():
        raise missing_file("checkpoint", path, suffixes=_SUFFIXES)
    if path.is_dir():
        path = only_checkpoint(path)
    if not path.is_file():
        raise InputError("the checkpoint is not a file", str(path), "copy it to a file first")
    try:
        found, files = _read(path, trust, key)
        digest = _sha256(files)
    except OSError as error:
        reason = f"{path}: {(error.strerror or str(error)).lower()}"
        raise InputError("the checkpoint cannot be read", reason, "check the file") from error
    plain = plain_names(found.weights)
    state = {
        plain[name]: _usable(name, value, path)
        for name, value in found.weights.items()
        if isinstance(value, Tensor)  # a module may keep extra state of any kind
    }
    return Checkpoint(path, digest, state, found.module, found.notes, found.said, found.optimizers)


def _read(path: Path, trust: bool, key: str | None) -> tuple[FoundWeights, list[Path]]:
    """The weights, and the files that they came from."""
    if not path.name.endswith(INDEX_SUFFIXES):
        return _read_file(path, trust, key), [path]
    shards = shards_of(path)
    notes: list[str] = []

    def read(shard: Path) -> Mapping[str, Tensor]:
        found = _read_file(shard, trust, None)
        notes.extend(found.notes)
        return found.weights

    weights = join_shards(shards, path, read)
    return FoundWeights(weights, None, tuple(notes)), [path, *sorted(shards)]


def _read_file(path: Path, trust: bool, key: str | None) -> FoundWeights:
    """The weights of one file; the content decides what it is, not the name."""
    with path.open("rb") as file:
        head = file.read(64)
    notes: tuple[str, ...] = ()
    if (is_zip := is_archive(path)) and not verify_archive(path):
        notes = (f"{path.name} was saved without checksums: damage to it would not show",)
    if is_program(path):
        found = read_program(path, trust=trust)
    elif head[8:9] == b"{":
        found = FoundWeights(read_safetensors(path))
    elif is_zip or _LEGACY_MAGIC in head:
        return read_pickle(path, trust=trust, key=key).noted(notes)
    else:
        raise _not_a_checkpoint(path, head)
    if key is not None:
        hint = "take key out of [checkpoint_keys] in the spec"
        raise InputError("the checkpoint holds one set of weights", f"{path}: no {key!r}", hint)
    return found.noted(notes)


def _not_a_checkpoint(path: Path, head: bytes) -> InputError:
    what, hint = "not a checkpoint", f"give one of {', '.join(_SUFFIXES)}"
    if not head:
        return InputError("the checkpoint is empty", f"{path}: 0 bytes", "copy it again")
    if head.startswith(b"PK\x03\x04"):
        got = f"{path}: a zip archive without its end"
        return InputError("the checkpoint is cut short", got, "copy or download it again")
    if head.startswith(b"version https://git-lfs"):
        return InputError(what, f"{path}: a git-lfs pointer", "fetch the file with `git lfs pull`")
    if head.startswith(b"\x80"):
        hint = "write it with torch.save(model.state_dict(), ...)"
        return InputError(what, f"{path}: a pickle that torch.save did not write", hint)
    if head.lstrip().startswith(b"<"):
        hint = "download the file itself, not the page that shows it"
        return InputError(what, f"{path}: a web page", hint)
    return InputError(what, f"{path}: begins with {head[:12]!r}", hint)


def _sha256(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _usable(name: str, value: Tensor, path: Path) -> Tensor:
    """The tensor as it is, on the CPU: what is sparse stays so until its shape is seen to fit."""
    if value.is_meta or value.is_quantized:
        kind = "no data" if value.is_meta else "quantised data"
        hint = "save the floating point weights, from a model that is on a real device"
        got = f"{path}: {shorten(name, 120)}: {kind}"
        raise InputError("the checkpoint's tensors cannot be used", got, hint)
    return value.detach().cpu()


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Each name without what wrappers put into it: data parallelism, compilation, sharding.

    All stay as they are where two would become one.
    """
    plain = {name: _WRAPPERS.sub("", name) for name in names}
    while plain and all(name.startswith("module.") for name in plain.values()):
        plain = {name: short.removeprefix("module.") for name, short in plain.items()}
    return plain if len(set(plain.values())) == len(plain) else {name: name for name in plain}


# -- A vector over the parameters, from a file with one tensor a parameter -------------------------


def load_vector(path: Path, parameters: Parameters) -> Tensor:
    """The file's tensors as one vector, float64 ``(d,)``.

    Raises:
        InputError: the file is missing or unreadable, or its tensors are not the parameters'.
    """
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise InputError(
            "file not found", str(path), "--vector gradient, or a .safetensors file"
        ) from None
    except (OSError, SafetensorError) as error:
        raise InputError(
            "the vector cannot be read", f"{path}: {error}", "a .safetensors file"
        ) from None
    wanted = {p.name: tuple(p.tensor.shape) for p in parameters}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != given:
        raise InputError(
            "the vector's tensors are not the parameters'",
            f"{path}: {_difference(wanted, given)}",
            "one tensor for each trainable parameter, with its name and shape",
        )
    vector = parameters.flatten([tensors[name].to(torch.float64) for name in parameters.names])
    if not torch.isfinite(vector).all():
        raise InputError("the vector is not finite", str(path), "a vector without NaN or infinity")
    return vector


def _difference(wanted: dict[str, tuple[int, ...]], given: dict[str, tuple[int, ...]]) -> str:
    """The first names that are missing, unexpected or of another shape."""
    missing = [f"no {name}" for name in wanted if name not in given]
    unexpected = [f"unexpected {name}" for name in given if name not in wanted]
    misshapen = [
        f"{name} of shape {given[name]}, not {shape}"
        for name, shape in wanted.items()
        if name in given and given[name] != shape
    ]
    found = [*missing, *unexpected, *misshapen]
    return ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
