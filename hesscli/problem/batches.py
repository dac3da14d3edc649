"""Batches as users make them: tensors in tuples, lists and dicts, counted along dimension 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hesscli.errors import InputError

Batch = Any
"""A tensor, or a tuple, list or mapping of batches; other leaves stay as they are."""

_TARGET_KEYS = ("targets", "labels", "target", "label", "y")
BATCH_SIZE = 128
"""Examples a batch at most, where the user does not say."""


def map_tensors(function: Callable[[Any], Tensor], batch: Batch, kind: type[Any] = Tensor) -> Batch:
    """The same tree with ``function`` applied to each tensor; named tuples keep their names.

    ``kind`` is the type of other leaves that are taken in the place of tensors.
    """
    if isinstance(batch, Mapping):
        return {key: map_tensors(function, value, kind) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        make = getattr(batch, "_make", type(batch))
        return make([map_tensors(function, value, kind) for value in batch])
    return function(batch) if isinstance(batch, kind) else batch


def leaves_of(batch: Batch) -> Iterator[Any]:
    """All leaves of a batch, in order."""
    if isinstance(batch, Mapping):
        for value in batch.values():
            yield from leaves_of(value)
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            yield from leaves_of(value)
    else:
        yield batch


def tensors_of(batch: Batch) -> Iterator[Tensor]:
    """All tensors of a batch, in order."""
    return (leaf for leaf in leaves_of(batch) if isinstance(leaf, Tensor))


def size_of(batch: Batch) -> int:
    """Number of examples: the first tensor's dimension 0."""
    first = next(tensors_of(batch), None)
    return 1 if first is None or first.dim() == 0 else len(first)


def tokens_in(batches: Iterable[Batch]) -> int | None:
    """Tokens of batches as language models have them, padding left out; None of others."""
    total = 0
    for batch in batches:
        tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(tokens, Tensor):
            return None
        mask = batch.get("attention_mask")
        total += int(mask.sum()) if isinstance(mask, Tensor) else tokens.numel()
    return total


def shape_of(tensor: Tensor, count: int) -> str:
    """A shape for people, N where it has one row for each of so many examples: "(N, 3)"."""
    sizes = [str(size) for size in tensor.shape]
    if sizes and len(tensor) == count:
        sizes[0] = "N"
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"


def is_sliceable(batch: Batch) -> bool:
    """Whether all leaves are tensors with one row an example, so that rows can be taken apart."""
    leaves = list(leaves_of(batch))
    return all(isinstance(leaf, Tensor) and leaf.dim() for leaf in leaves) and (
        len({len(leaf) for leaf in leaves}) == 1
    )


def form_of(batch: Batch) -> Any:
    """What rows of two batches must share to be put together: keys in order, shapes and types."""
    if isinstance(batch, Mapping):
        return tuple((key, form_of(value)) for key, value in batch.items())
    if isinstance(batch, (tuple, list)):
        return tuple(map(form_of, batch))
    if isinstance(batch, Tensor):
        return tuple(batch.shape[1:]), str(batch.dtype)
    return type(batch).__name__


def rows(batch: Batch, start: int, stop: int) -> Batch:
    """Examples ``start … stop`` of a sliceable batch."""
    return map_tensors(lambda t: t[start:stop], batch)


def first_rows(batch: Batch, count: int) -> Batch:
    """The first examples of a batch, all where it cannot be taken apart."""
    return rows(batch, 0, count) if is_sliceable(batch) else batch


def filled(like: Batch, tensors: Iterable[Tensor]) -> Batch:
    """A batch of a kind, of other tensors in order."""
    left = iter(tensors)
    return map_tensors(lambda _: next(left), like)


def joined(batches: Sequence[Batch]) -> Batch:
    """The rows of batches of one form as one batch."""
    columns = zip(*map(tensors_of, batches), strict=True)
    return filled(batches[0], [torch.cat(column) for column in columns])


def place(batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
    """The batch on ``device``, floating tensors in ``dtype``; other tensors as stored."""
    waits = device.type == "cpu"  # or what is read there may not have come yet

    def move(t: Tensor) -> Tensor:
        return t.to(device, dtype if t.is_floating_point() else t.dtype, non_blocking=not waits)

    return map_tensors(move, batch)


def near(batches: Sequence[Batch], device: torch.device, room: float) -> tuple[Batch, ...]:
    """Frozen batches on a device where they take no more than some room, or pinned beside it.

    Args:
        batches: on the CPU, in the types that they are stored in.
        device: of the model.
        room: bytes.
    """
    taken = sum(tensor.nbytes for batch in batches for tensor in tensors_of(batch))

    def closer(tensor: Tensor) -> Tensor:
        return tensor.to(device) if taken <= room else tensor.pin_memory()

    return tuple(map_tensors(closer, batch) for batch in batches)


def owned(batch: Batch) -> Batch:
    """A copy on the CPU that nobody else writes to."""

    def own(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)

    return map_tensors(own, batch)


def tensor_of(value: Any) -> Tensor:
    """A tensor as it is and where it is; numbers as one on the CPU."""
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")


def split_batch(batch: Batch) -> tuple[tuple[Any, ...] | Mapping[str, Any], Any]:
    """Model inputs and targets: the last of a tuple, or a mapping's targets, labels, ...

    Raises:
        InputError: the batch has no two parts.
    """
    if isinstance(batch, Mapping):
        target = next((k for k in _TARGET_KEYS if k in batch), None)
        rest = {k: v for k, v in batch.items() if k != target}
        inputs = tuple(rest.values()) if len(rest) == 1 else rest
        if target is not None and rest:
            return inputs, batch[target]
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        return tuple(batch[:-1]), batch[-1]
    raise InputError(
        "a batch needs inputs and targets",
        f"a batch of type {type(batch).__name__}",
        "batches (inputs, targets), a dict with 'targets', or [loss] step = 'module:function'",
    )
