"""A checkpoint once more, with other weights: the same file but for the bytes of these."""

from __future__ import annotations

import json
import mmap
import shutil
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import BinaryIO
from zipfile import ZipFile

import torch
from torch import Tensor

from hesscli.errors import InputError
from hesscli.parameters import Parameter, Parameters
from hesscli.problem.checkpoint import (
    INDEX_SUFFIXES,
    plain_names,
    read_safetensors,
    shards_of,
)
from hesscli.problem.parts import Origin
from hesscli.problem.pretrained.folder import is_pretrained
from hesscli.problem.torch_files import is_archive, is_program, is_unpacked, read_pickle
from hesscli.tensor_files import chunks

_BESIDE = (
    *("*config*.json", "*token*.json", "*template*.json", "*.jinja"),
    *("vocab.*", "merges.txt", "*.model", "*.py"),
)
"""Files beside the weights, in a folder that says how its model is built, that a library reads."""
_CHUNK = 1 << 20
_HINT = (
    "torch.save({k: v.clone() for k, v in model.state_dict().items()}, 'weights.pt') with the "
    "model as it is built here, and that as CHECKPOINT"
)
Writer = Callable[[BinaryIO], None]


class Rewriting:
    """How a checkpoint is written anew: whatever it holds stays, in its order, but some weights.

    Args:
        origin: where the weights came from.
        parameters: those that may change; the model has them as the file does.

    Raises:
        InputError: there is a file that cannot be written so.
    """

    def __init__(self, origin: Origin, parameters: Parameters) -> None:
        assert origin.file is not None
        self._origin, self._parameters = origin, parameters
        self._is_index = origin.file.name.endswith(INDEX_SUFFIXES)
        shards = shards_of(origin.file) if self._is_index else {origin.file: None}
        held = [_File(path, origin, names) for path, names in shards.items()]
        places = _places(origin, held, parameters)
        self._files = {
            file: {name: places[name] for name in file.names if name in places} for file in held
        }
        self._dtypes: dict[int, set[torch.dtype]] = {id(p): set() for p in parameters}
        for file, own in self._files.items():
            weights = file.weights()
            _require_apart(file.path, weights, own)
            for name, parameter in own.items():
                _require_same(file.path, name, weights[name], parameter)
                self._dtypes[id(parameter)].add(weights[name].dtype)

    def rounded(self, vector: Tensor) -> Tensor:
        """Weights ``(d,)`` as they will be when they are read again."""
        parts = list(self._parameters.split(vector))
        for i, parameter in enumerate(self._parameters):
            for dtype in sorted(self._dtypes[id(parameter)], key=str):
                parts[i] = parts[i].to(dtype).to(vector.dtype)
        return torch.cat([part.flatten() for part in parts])

    def files(self, vector: Tensor, name: str) -> dict[str, tuple[str, Writer]]:
        """What to write with other weights ``(d,)``, each once, to a new file on the disk.

        Args:
            vector: the weights.
            name: of the file without its ending, unless it keeps its own: see
                :func:`names_of_copies`.

        Returns:
            Names of files and what writes them, ``checkpoint`` being the one that is to be read.
        """
        parts = zip(self._parameters, self._parameters.split(vector.cpu()), strict=True)
        values = {id(parameter): part for parameter, part in parts}
        path = self._origin.file
        assert path is not None
        found: dict[str, tuple[str, Writer]] = {}
        if self._is_index:
            found["checkpoint"] = (path.name, partial(_copy, path))
        for number, (file, places) in enumerate(self._files.items(), 1):
            changed = {n: values[id(p)] for n, p in places.items()}
            kind = f"checkpoint_{number}" if self._is_index else "checkpoint"
            found[kind] = (_copied_as(self._origin, file.path, name), partial(file.write, changed))
        for number, beside in enumerate(_beside(self._origin), 1):
            found[f"folder_{number}"] = (beside.name, partial(_copy, beside))
        return found


def names_of_copies(origin: Origin, name: str) -> list[str]:
    """What the files that a checkpoint is written to will be called.

    Args:
        origin: where it came from.
        name: of the file without its ending. Shards and their index keep their names, and so does
            all that a library reads of a folder, which is copied whole.
    """
    if (path := origin.file) is None:
        return []
    shards = [path, *shards_of(path)] if path.name.endswith(INDEX_SUFFIXES) else [path]
    return [_copied_as(origin, each, name) for each in shards] + [p.name for p in _beside(origin)]


def _copied_as(origin: Origin, shard: Path, name: str) -> str:
    assert origin.file is not None
    keeps = origin.file.name.endswith(INDEX_SUFFIXES) or _is_librarys(origin)
    return shard.name if keeps else f"{name}{shard.suffix}"


def _is_librarys(origin: Origin) -> bool:
    """Whether a library has found the weights in a folder that says how its model is built."""
    return origin.file is not None and origin.names is None and is_pretrained(origin.file.parent)


def _beside(origin: Origin) -> list[Path]:
    """What else a library reads of such a folder, but for other weights' indexes."""
    if not _is_librarys(origin):
        return []
    assert origin.file is not None
    found = {path for glob in _BESIDE for path in origin.file.parent.glob(glob) if path.is_file()}
    return sorted(path for path in found if not path.name.endswith(INDEX_SUFFIXES))


class _File:
    """One file of weights.

    Args:
        path: of it.
        origin: how its weights were read.
        names: those that count; None for all.

    Raises:
        InputError: it is none that can be written anew.
    """

    def __init__(self, path: Path, origin: Origin, names: list[str] | None) -> None:
        self.path, self._origin = path, origin
        self._require_writable(has_index=names is not None)
        self.names = list(self.weights()) if names is None else names

    def weights(self, path: Path | None = None) -> Mapping[str, Tensor]:
        """By their names in the file, or in another like it; an archive's are its own memory."""
        path = path or self.path
        if not self._is_zip:
            return read_safetensors(path)
        key, trust = self._origin.key, self._origin.trust
        found = read_pickle(path, trust=trust, key=key, mapped=True).weights
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def write(self, changed: Mapping[str, Tensor], stream: BinaryIO) -> None:
        """Write it with other weights."""
        _copy(self.path, stream)
        stream.flush()
        if self._is_zip:
            self._put_into_archive(stream, changed)
        else:
            _put_into_safetensors(stream, changed)

    def _require_writable(self, *, has_index: bool) -> None:
        path, why = self.path, None
        if not path.is_file():
            why = "no file of its own"
        elif has_index and path.parent.resolve() != self._folder().resolve():
            why = "a shard in another folder than the index"
        elif is_program(path):
            why = "a torch.export program"
        self._is_zip = why is None and is_archive(path)
        if why is None and self._is_zip and not is_unpacked(path):
            why = "a packed archive"
        if why is None and not self._is_zip:
            with path.open("rb") as stream:
                if stream.read(9)[8:] != b"{":
                    why = "the format of torch before 1.6"
        if why is not None:
            raise _not_so(path, why)

    def _folder(self) -> Path:
        assert self._origin.file is not None
        return self._origin.file.parent

    def _put_into_archive(self, stream: BinaryIO, changed: Mapping[str, Tensor]) -> None:
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            held = self.weights(Path(stream.name))
        for name, value in changed.items():
            held[name].detach().copy_(value)
        del held
        _renew_checksums(stream)


def _not_so(path: Path, why: str, hint: str = _HINT) -> InputError:
    return InputError("this checkpoint cannot be written anew", f"{path}: {why}", hint)


def _copy(path: Path, stream: BinaryIO) -> None:
    with path.open("rb") as source:
        shutil.copyfileobj(source, stream)


def _put_into_safetensors(stream: BinaryIO, changed: Mapping[str, Tensor]) -> None:
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    header = json.loads(stream.read(length))
    for name, value in changed.items():
        stream.seek(8 + length + header[name]["data_offsets"][0])
        for chunk in chunks(value.to(_TYPES[header[name]["dtype"]])):
            stream.write(chunk)


_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def _places(origin: Origin, files: Sequence[_File], parameters: Parameters) -> dict[str, Parameter]:
    """Which parameter each name of the files is of.

    Raises:
        InputError: one has none.
    """
    names = [name for file in files for name in file.names]
    plain = {short: name for name, short in plain_names(names).items()}
    if origin.names is not None:
        called = origin.names
        pairs = ((called[n], p) for p in parameters for n in p.names if n in called)
        found = {plain[name]: parameter for name, parameter in pairs if name in plain}
    else:
        found = _as_a_library_finds_them(plain, parameters)
        found |= _by_what_they_hold(files, found, _unknown(found, parameters))
    if missing := _unknown(found, parameters):
        assert origin.file is not None
        why = f"{missing[0].name} is not in it by this name"
        spared = " ".join(f"--params '!{p.name}'" for p in missing)
        hint = f"{spared} to let what is not there stay as it is; or --dir -"
        raise _not_so(origin.file, why, hint if _is_librarys(origin) else _HINT)
    return found


def _unknown(found: Mapping[str, Parameter], parameters: Parameters) -> list[Parameter]:
    known = {id(parameter) for parameter in found.values()}
    return [parameter for parameter in parameters if id(parameter) not in known]


def _by_what_they_hold(
    files: Sequence[_File], taken: Mapping[str, Parameter], parameters: Sequence[Parameter]
) -> dict[str, Parameter]:
    """Parameters that a library has renamed: those whose entries one name has, and no other."""
    if not parameters:
        return {}
    pairs = [
        (name, parameter)
        for file in files
        for name, value in file.weights().items()
        if name in file.names and name not in taken
        for parameter in parameters
        if _is_same(value, parameter)
    ]
    names, owners = Counter(name for name, _ in pairs), Counter(id(p) for _, p in pairs)
    return {name: p for name, p in pairs if names[name] == owners[id(p)] == 1}


def _as_a_library_finds_them(
    plain: Mapping[str, str], parameters: Parameters
) -> dict[str, Parameter]:
    """By names of which all may have, or lack, a prefix; what has other values is refused later."""
    owners: dict[str, Parameter] = {}
    for parameter in parameters:
        owners |= dict.fromkeys(plain_names(parameter.names).values(), parameter)
    for prefix in _prefixes(plain, next(iter(owners))):
        found = {plain[prefix + n]: p for n, p in owners.items() if prefix + n in plain}
        if len({id(parameter) for parameter in found.values()}) == len(parameters):
            return found
    return {plain[name]: owners[name] for name in owners if name in plain}


def _prefixes(plain: Mapping[str, str], name: str) -> Iterator[str]:
    """What may stand before all names, nothing first."""
    ends = (short.removesuffix(name) for short in plain if short.endswith(name))
    return iter(dict.fromkeys(("", *ends)))


def _require_apart(path: Path, held: Mapping[str, Tensor], places: Mapping[str, Parameter]) -> None:
    """See that no weight can change with another one, as in a file they may share memory.

    Raises:
        InputError: one would.
    """
    stored: dict[int, list[str]] = {}
    for name, value in held.items():
        if value.layout == torch.strided and value.numel():
            stored.setdefault(value.untyped_storage().data_ptr(), []).append(name)
    for names in stored.values():
        changing = [name for name in names if name in places]
        for name in changing:
            if _lies_on_itself(held[name]):
                raise _not_so(path, f"entries of {name} share memory")
        for one, other in combinations(names, 2):
            owner = places.get(one), places.get(other)
            if owner[0] is not owner[1] and _share(held[one], held[other]):
                raise _not_so(path, f"{one} and {other} are one tensor in it, and not in the model")


def _lies_on_itself(value: Tensor) -> bool:
    extent = 0
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1 and stride <= extent:
            return True
        extent += (size - 1) * stride
    return False


def _share(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one storage have an entry in common."""
    spans = []
    for value in (one, other):
        begin = value.storage_offset()
        steps = zip(value.stride(), value.shape, strict=True)
        spans.append((begin, begin + sum(stride * (size - 1) for stride, size in steps)))
    if spans[0][1] < spans[1][0] or spans[1][1] < spans[0][0]:
        return False
    taken = torch.zeros(max(end for _, end in spans) + 1, dtype=torch.bool, device="cpu")
    taken.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    return bool(taken.as_strided(other.shape, other.stride(), other.storage_offset()).any())


def _require_same(path: Path, name: str, value: Tensor, parameter: Parameter) -> None:
    if not _is_same(value, parameter):
        raise _not_so(path, f"{name} is not {parameter.name} as the model has it")


def _is_same(value: Tensor, parameter: Parameter) -> bool:
    """Whether what a file holds can be written, and is a parameter as the model has it."""
    own = parameter.tensor.detach()
    plain = value.layout == torch.strided and value.dtype in _TYPES.values()
    if not plain or value.shape != own.shape:
        return False
    parts = ((value[:1], own[:1]), (value, own)) if own.dim() else ((value, own),)  # mostly, one
    return all(torch.equal(v.detach().to(o.dtype), o.cpu()) for v, o in parts)


def _renew_checksums(stream: BinaryIO) -> None:
    """Let an archive's checksums be those of its members as they are now.

    A member's CRC-32 stands in the archive's directory, and before the member or behind it.
    """
    stream.seek(0)
    with ZipFile(stream) as archive:
        members, entry = archive.infolist(), archive.start_dir
    has_any = any(member.CRC for member in members)
    for member in members:
        stream.seek(member.header_offset + 26)
        begin = member.header_offset + 30 + sum(struct.unpack("<HH", stream.read(4)))
        stream.seek(begin)
        found, left = 0, member.compress_size
        while left:
            chunk = stream.read(min(_CHUNK, left))
            found, left = zlib.crc32(chunk, found), left - len(chunk)
        if has_any and found != member.CRC:
            behind = begin + member.compress_size
            stream.seek(behind)
            marked = stream.read(4) == b"PK\x07\x08"
            follows = member.flag_bits & 8
            place = behind + 4 * marked if follows else member.header_offset + 14
            for where in (entry + 16, place):
                stream.seek(where)
                stream.write(struct.pack("<I", found))
        stream.seek(entry + 28)
        entry += 46 + sum(struct.unpack("<HHH", stream.read(6)))
