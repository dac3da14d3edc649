"""Weights in .safetensors: one file, or shards that an index joins."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hesscli.errors import InputError

INDEX_SUFFIX = ".safetensors.index.json"
_MOST_NAMED = 5


def only_checkpoint(folder: Path) -> Path:
    """The index of a folder, or its single .safetensors file."""
    names = sorted(entry.name for entry in folder.iterdir())
    for suffix in (INDEX_SUFFIX, ".safetensors"):
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
        return load_file(path, device="cpu")
    except SafetensorError as error:
        hint = "copy or download it again: it is damaged"
        raise InputError("not a whole .safetensors file", f"{path}: {error}", hint) from error


def shards_of(index: Path) -> dict[Path, list[str]]:
    """The shard files that an index names, each with the tensors it should hold."""
    hint = "write it again with save_pretrained, or name a single .safetensors file"
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        entries = sorted((str(shard), str(name)) for name, shard in weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        got = f"{index}: no weight_map in JSON"
        raise InputError("not an index of .safetensors files", got, hint) from error
    shards: dict[Path, list[str]] = {}
    for shard, name in entries:
        # Judged by the name alone: caches link the files themselves to elsewhere.
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            got = f"{index}: {shard!r}"
            raise InputError("the index names a file outside its folder", got, hint)
        shards.setdefault(index.parent / shard, []).append(name)
    return shards


def join_shards(shards: Mapping[Path, list[str]], index: Path) -> dict[str, Tensor]:
    """The tensors of all shards; each must hold what the index says."""
    state: dict[str, Tensor] = {}
    for shard, names in shards.items():
        if not shard.is_file():
            hint = f"copy it beside {index.name}: {len(shards)} shards belong together"
            raise InputError("a shard of the checkpoint is missing", str(shard), hint)
        tensors = read_safetensors(shard)
        if absent := [name for name in names if name not in tensors]:
            hint = "index and shards are of different checkpoints: copy them again"
            raise InputError("a shard lacks tensors of the index", f"{shard}: {absent[0]}", hint)
        state |= {name: tensors[name] for name in names}
    return state
