"""Checkpoints: the weights of a trained model from a file, and their way into a module."""

from __future__ import annotations

import hashlib
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hesscli.errors import InputError, UnsoundError
from hesscli.problem.nearest import missing_file
from hesscli.problem.pickles import is_program, read_pickle, read_program
from hesscli.problem.shards import (
    INDEX_SUFFIX,
    join_shards,
    only_checkpoint,
    read_safetensors,
    shards_of,
)
from hesscli.problem.weights import Found

_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", INDEX_SUFFIX, ".pt2")
_MOST_NAMED = 5
# torch.save files that are no zip begin with this number, pickled.
_LEGACY_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")


@dataclass(frozen=True)
class Checkpoint:
    """Weights as they lie in a file, by name and on the CPU.

    ``module`` is the model itself, where a trusted file carried one. ``notes`` say what else
    the file held that could be taken for the model.
    """

    path: Path
    sha256: str
    state: dict[str, Tensor]
    module: nn.Module | None = None
    notes: tuple[str, ...] = ()


def read_checkpoint(path: Path, *, trust: bool = False) -> Checkpoint:
    """Read a checkpoint; nothing in it is run unless it is trusted.

    Args:
        path: a torch.save file, a .safetensors file or index or a folder of one, or a .pt2.
        trust: whether code in the file may run.
    """
    if not path.exists():
        raise missing_file("checkpoint", path, suffixes=_SUFFIXES)
    if path.is_dir():
        path = only_checkpoint(path)
    if not path.is_file():
        raise InputError("the checkpoint is not a file", str(path), "copy it to a file first")
    try:
        found, files = _read(path, trust)
        digest = _sha256(files)
    except OSError as error:
        reason = f"{path}: {(error.strerror or str(error)).lower()}"
        raise InputError("the checkpoint cannot be read", reason, "check the file") from error
    plain = _plain_names(found.weights)
    state = {
        plain[name]: _dense(name, value, path)
        for name, value in found.weights.items()
        if isinstance(value, Tensor)  # a module may keep extra state of any kind
    }
    return Checkpoint(path, digest, state, found.module, found.notes)


def _read(path: Path, trust: bool) -> tuple[Found, list[Path]]:
    """The weights, and the files that they came from; the content decides, not the name."""
    if path.name.endswith(INDEX_SUFFIX):
        shards = shards_of(path)
        return Found(join_shards(shards, path)), [path, *sorted(shards)]
    with path.open("rb") as file:
        head = file.read(64)
    if is_program(path):
        return read_program(path, trust=trust), [path]
    if head[8:9] == b"{":
        return Found(read_safetensors(path)), [path]
    if zipfile.is_zipfile(path) or _LEGACY_MAGIC in head:
        return read_pickle(path, trust=trust), [path]
    raise _not_a_checkpoint(path, head)


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


def _dense(name: str, value: Tensor, path: Path) -> Tensor:
    if value.is_meta or value.is_quantized:
        kind = "no data" if value.is_meta else "quantized data"
        hint = "save the floating point weights, from a model that is on a real device"
        raise InputError("the checkpoint's tensors cannot be used", f"{path}: {name}: {kind}", hint)
    return value.detach().cpu() if value.layout == torch.strided else value.detach().to_dense()


def _plain_names(names: Iterable[str]) -> dict[str, str]:
    """Each name without what data parallelism and compilation put before it."""
    plain = {name: name.replace("_orig_mod.", "") for name in names}
    while plain and all(name.startswith("module.") for name in plain.values()):
        plain = {name: short.removeprefix("module.") for name, short in plain.items()}
    return plain


def floating_dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    """The precision to analyse in: float64 where most of the weights have it, else float32."""
    sizes = {torch.float64: 0, torch.float32: 0}
    for value in state.values():
        if value.is_floating_point():
            sizes[torch.float64 if value.dtype == torch.float64 else torch.float32] += value.numel()
    return torch.float64 if sizes[torch.float64] > sizes[torch.float32] else torch.float32


def load_state(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy the weights into a model, in the model's precision; every name must fit.

    A name may be missing only where the model ties it to one that is there.
    """
    own = {name: value for name, value in _tensors(model).items() if not is_lazy(value)}
    actual = {plain: name for name, plain in _plain_names(model.state_dict()).items()}
    state = {actual.get(name, name): value for name, value in checkpoint.state.items()}
    misfits = {
        name: f"{name} {_describe(value)}, expected {_describe(own[name])}"
        for name, value in state.items()
        if name in own and not _fits(value, own[name])
    }
    fitting = {name: value for name, value in state.items() if name not in misfits}
    try:
        result = model.load_state_dict(fitting, strict=False)
    except RuntimeError as error:
        got = f"{checkpoint.path}: {str(error).splitlines()[0]}"
        raise InputError("the model refuses the checkpoint", got, "check the factory") from error
    twins = _twins(model)
    missing = [
        name
        for name in result.missing_keys
        if name not in misfits and not state.keys() & twins.get(name, set())
    ]
    if missing or result.unexpected_keys or misfits:
        raise _mismatch(checkpoint, missing, result.unexpected_keys, misfits, own)
    _require_equal_twins(state, twins, checkpoint)
    _require_finite(model, checkpoint)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named = model.state_dict(keep_vars=True)
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def _fits(value: Tensor, target: Tensor) -> bool:
    same_kind = value.is_floating_point() == target.is_floating_point()
    return same_kind and value.is_complex() == target.is_complex() and value.shape == target.shape


def _describe(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _twins(model: nn.Module) -> dict[str, set[str]]:
    """For each tied name, all names of the same tensor; files may keep only one of them."""
    names: dict[int, set[str]] = defaultdict(set)
    for name, value in _tensors(model).items():
        names[id(value)].add(name)
    return {name: tied for tied in names.values() if len(tied) > 1 for name in tied}


def _mismatch(
    checkpoint: Checkpoint,
    missing: list[str],
    unexpected: list[str],
    misfits: Mapping[str, str],
    own: Mapping[str, Tensor],
) -> InputError:
    parts = (
        (
            "missing",
            [f"{name} {list(own[name].shape)}" if name in own else name for name in missing],
        ),
        ("unexpected", [f"{name} {list(checkpoint.state[name].shape)}" for name in unexpected]),
        ("misshapen", list(misfits.values())),
    )
    listed = "; ".join(f"{len(names)} {kind}: {_first(names)}" for kind, names in parts if names)
    return InputError(
        "the checkpoint does not fit the model",
        f"{checkpoint.path}: {listed}",
        _prefix_hint(missing, unexpected)
        or "check [model] factory and kwargs in the spec against the training code",
    )


def _first(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _prefix_hint(missing: list[str], unexpected: list[str]) -> str | None:
    """What to do where all names are off by one common prefix."""
    if not missing or not unexpected:
        return None
    for longer, shorter, owner in (
        (unexpected, set(missing), "checkpoint"),
        (missing, set(unexpected), "model"),
    ):
        parts = longer[0].split(".")
        for prefix in (".".join(parts[:depth]) + "." for depth in range(1, len(parts))):
            # Not quite equal where a module makes up for a missing name itself, as batch norm does.
            rest = {name.removeprefix(prefix) for name in longer if name.startswith(prefix)}
            if len(rest) == len(longer) and (rest <= shorter or rest >= shorter):
                return (
                    f"only the {owner}'s names begin with {prefix!r}: rename them in the file, "
                    "or let [model] factory return the module that was saved"
                )
    return None


def _require_equal_twins(
    state: Mapping[str, Tensor], twins: Mapping[str, set[str]], checkpoint: Checkpoint
) -> None:
    for name, tied in twins.items():
        for other in sorted(tied & state.keys()):
            if name in state and not torch.equal(state[name], state[other]):
                raise InputError(
                    "the model ties weights that differ in the checkpoint",
                    f"{checkpoint.path}: {name} and {other}",
                    "check whether the trained model tied them",
                )


def _require_finite(model: nn.Module, checkpoint: Checkpoint) -> None:
    """A mask among the buffers may hold infinities; weights may not, and nothing may be NaN."""
    broken = {name: ~value.isfinite() for name, value in model.named_parameters()}
    broken |= {name: value.isnan() for name, value in model.named_buffers()}
    counts = {name: int(where.sum()) for name, where in broken.items()}
    listed = [
        f"{name} ({count} of {broken[name].numel()})" for name, count in counts.items() if count
    ]
    if listed:
        raise UnsoundError(
            "the checkpoint has weights that are not finite",
            f"{checkpoint.path}: {_first(listed)}",
            "use a checkpoint from before the training diverged",
        )
