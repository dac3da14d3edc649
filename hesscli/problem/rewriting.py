"""A checkpoint once more, with other weights: the same file but for the bytes of these."""

from __future__ import annotations

import json
import mmap
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO
from zipfile import ZipFile

import torch
from torch import Tensor

from hesscli.errors import InputError
from hesscli.parameters import Parameter, Parameters
from hesscli.problem.checkpoint import (
    INDEX_SUFFIXES,
    only_checkpoint,
    plain_names,
    read_safetensors,
)
from hesscli.problem.parts import Origin
from hesscli.problem.torch_files import is_archive, is_program, is_unpacked, read_pickle
from hesscli.tensor_files import chunks

_CHUNK = 1 << 20
_HINT = "torch.save(model.state_dict(), 'weights.pt') with the same names, and that as CHECKPOINT"


class Rewriting:
    """How a checkpoint is written anew: whatever it holds stays, in its order, but some weights.

    Args:
        path: the checkpoint, or a folder that holds but one.
        parameters: those of its weights that may change; the model has them as the file does.
        origin: how they were found in the file.

    Attributes:
        suffix: of the file's name.

    Raises:
        InputError: the file is none that can be written so.
    """

    def __init__(self, path: Path, parameters: Parameters, origin: Origin) -> None:
        self.path = only_checkpoint(path) if path.is_dir() else path
        self._require_writable()
        self.suffix, self._key, self._trust = self.path.suffix, origin.key, origin.trust
        held = self._weights(self.path)
        self._parameters = parameters
        self._places = _places(self.path, held, parameters)
        for name, parameter in self._places.items():
            _require_same(self.path, name, held[name], parameter)

    def writer(self, vector: Tensor) -> Callable[[BinaryIO], None]:
        """What writes the file with other weights ``(d,)``, once, to a new file on the disk."""
        parts = zip(self._parameters, self._parameters.split(vector.cpu()), strict=True)
        values = {id(parameter): part for parameter, part in parts}
        changed = {name: values[id(parameter)] for name, parameter in self._places.items()}

        def write(stream: BinaryIO) -> None:
            with self.path.open("rb") as source:
                shutil.copyfileobj(source, stream)
            stream.flush()
            if self._is_zip:
                self._put_into_archive(stream, changed)
            else:
                _put_into_safetensors(stream, changed)

        return write

    def _require_writable(self) -> None:
        path, why = self.path, None
        if not path.is_file():
            why = "no file of its own"
        elif path.name.endswith(INDEX_SUFFIXES):
            why = "shards that an index joins"
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
            raise InputError("this checkpoint cannot be written anew", f"{path}: {why}", _HINT)

    def _weights(self, path: Path) -> Mapping[str, Tensor]:
        """By their names in the file; of an archive they are the file's own memory."""
        if not self._is_zip:
            return read_safetensors(path)
        found = read_pickle(path, trust=self._trust, key=self._key, mapped=True).weights
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def _put_into_archive(self, stream: BinaryIO, changed: Mapping[str, Tensor]) -> None:
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            held = self._weights(Path(stream.name))
        for name, value in changed.items():
            held[name].detach().copy_(value)
        del held
        _renew_checksums(stream)


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


def _places(path: Path, held: Mapping[str, Tensor], parameters: Parameters) -> dict[str, Parameter]:
    """Which parameter each name of the file is of; a prefix of all names is left out."""
    plain = {short: name for name, short in plain_names(held).items()}
    owners: dict[str, Parameter] = {}
    for parameter in parameters:
        owners |= dict.fromkeys(plain_names(parameter.names).values(), parameter)
    for prefix in _prefixes(plain, next(iter(owners))):
        found = {plain[prefix + n]: p for n, p in owners.items() if prefix + n in plain}
        if len({id(parameter) for parameter in found.values()}) == len(parameters):
            return found
    missing = next((name for name in owners if name not in plain), "names of its own")
    got = f"{path}: {missing} is not in it by this name"
    raise InputError("this checkpoint cannot be written anew", got, _HINT)


def _prefixes(plain: Mapping[str, str], name: str) -> Iterator[str]:
    """What may stand before all names, nothing first."""
    ends = (short.removesuffix(name) for short in plain if short.endswith(name))
    return iter(dict.fromkeys(("", *ends)))


def _require_same(path: Path, name: str, value: Tensor, parameter: Parameter) -> None:
    own = parameter.tensor.detach().cpu()
    plain = value.layout == torch.strided and value.dtype in _TYPES.values()
    if plain and value.shape == own.shape and torch.equal(value.detach().to(own.dtype), own):
        return
    got = f"{path}: {name} is not {parameter.name} as the model has it"
    raise InputError("this checkpoint cannot be written anew", got, _HINT)


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
