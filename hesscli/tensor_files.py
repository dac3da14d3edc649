"""A safetensors file, written without a copy in memory, that has the hash of all its bytes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hesscli.errors import UsageError

_UNHASHED = "0" * 64
_CHUNK = 1 << 24
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def chunks(tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's bytes: of one on the CPU where they are, else copied a few at a time."""
    flat = tensor.detach().contiguous().flatten()
    step = max(1, _CHUNK // flat.element_size())
    for start in range(0, len(flat), step):
        yield flat[start : start + step].cpu().view(torch.uint8).numpy().data


@dataclass(frozen=True)
class Blocks:
    """A tensor to be written, in blocks of its rows: they may be made while others are written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: Iterable[Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Blocks:
        """One that is there."""
        return cls(tensor.dtype, tuple(tensor.shape), [tensor])

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(stream: BinaryIO, tensors: Mapping[str, Blocks], told: str = "") -> str:
    """Write tensors as safetensors does, without a copy of them in memory.

    Args:
        stream: of a new file, which can be written anywhere.
        tensors: by name.
        told: what the metadata say besides.

    Returns:
        The SHA-256 of the file, with zeros in the place where it has it itself.
    """
    header: dict[str, Any] = {"__metadata__": {"sha256": _UNHASHED, "told": told}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    hashed = hashlib.sha256()
    for piece in (len(text).to_bytes(8, "little"), text):
        stream.write(piece)
        hashed.update(piece)
    for tensor in tensors.values():
        for block in tensor.rows:
            for chunk in chunks(block):
                stream.write(chunk)
                hashed.update(chunk)
    digest = hashed.hexdigest()
    stream.seek(8 + text.index(_UNHASHED.encode()))
    stream.write(digest.encode())
    return digest


def read_tensors(
    path: Path, digest: str | None = None, *, told_alone: bool = False
) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file, and what is told besides, once its bytes are seen to be right.

    Args:
        path: the file.
        digest: what another file has of its hash.
        told_alone: without the tensors.

    Raises:
        DamagedError: they are not.
    """
    try:
        with path.open("rb") as stream:
            length = stream.read(8)
            text = stream.read(min(int.from_bytes(length, "little"), path.stat().st_size))
            told = json.loads(text)["__metadata__"]
            hashed = hashlib.sha256(length + text.replace(told["sha256"].encode(), b"0" * 64, 1))
            while chunk := stream.read(_CHUNK):
                hashed.update(chunk)
        if not hashed.hexdigest() == told["sha256"] == (digest or told["sha256"]):
            raise DamagedError(path, "its bytes are not those that were written")
        with safe_open(path, framework="pt") as tensors:
            names = () if told_alone else tensors.keys()
            return {name: tensors.get_tensor(name) for name in names}, told["told"]
    except FileNotFoundError:
        raise DamagedError(path, "there is no such file") from None
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError
    ) as error:  # fmt: skip
        raise DamagedError(path, f"it is no whole file of tensors ({error})") from None


class DamagedError(UsageError):
    """A ledger, or a file that belongs to it, that nobody has written so."""

    def __init__(self, path: Path, got: str) -> None:
        super().__init__(
            f"the ledger cannot be read: {path}",
            got,
            "the same command without --resume, which begins anew",
        )
