"""Weights in .safetensors, and in shards of any kind that an index joins."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from hesscli.errors import InputError

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
