"""Where examples come from: datasets, loaders and iterables of the user's, or a file's tensors."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from hesscli.errors import InputError
from hesscli.problem.batches import BATCH_SIZE, Batch, is_sliceable, split_batch, tensor_of


class Examples:
    """A map-style data set: rows by index, and what makes a batch of them.

    Args:
        dataset: with ``__len__`` and ``__getitem__``.
        collate: makes a batch of a list of rows; default torch's, for which lists of numbers
            become tensors first.
        batch_size: of the loader that it came in, if that has one.
        in_order: that loader does not shuffle.
        drop_last: that loader leaves a last smaller batch out.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Batch] | None = None,
        batch_size: int | None = None,
        *,
        in_order: bool = False,
        drop_last: bool = False,
    ) -> None:
        self.dataset, self.batch_size = dataset, batch_size
        self.in_order, self.drop_last = in_order, drop_last
        plain = collate is None or collate is default_collate
        self.collate: Callable[[list[Any]], Batch] = _stacked if plain or not collate else collate

    def __len__(self) -> int:
        size = len(self.dataset)
        if self.in_order and self.drop_last and self.batch_size:
            return size // self.batch_size * self.batch_size or size
        return size

    def fetch(self, indices: Iterable[int]) -> list[Any]:
        """Rows as the data set gives them."""
        return [self.dataset[int(i)] for i in indices]


class TensorRows(Examples):
    """Tensors with one row an example, fetched by index lists without per-row work."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__(tensors)
        self.tensors = tensors
        self.collate = self._rows

    @classmethod
    def from_file(cls, path: Path, inputs: Sequence[str], targets: str | None) -> TensorRows:
        """Named tensors of a safetensors file, inputs first.

        Raises:
            InputError: the file is unreadable, lacks a name, or its row counts differ.
        """
        from safetensors import SafetensorError, safe_open

        names = [*inputs, *([] if targets is None else [targets])]
        try:
            with safe_open(path, framework="pt") as file:
                found = sorted(file.keys())
                missing = [name for name in names if name not in found]
                if missing:
                    raise InputError(
                        f"{path.name} has no tensor {missing[0]!r}",
                        f"tensors {', '.join(found)}",
                        "[data] inputs and targets as named in the file",
                    )
                tensors = [file.get_tensor(name) for name in names]
        except (OSError, SafetensorError) as error:
            raise InputError(
                "the data file cannot be read",
                f"{path}: {error}",
                "a .safetensors file, or of another kind [data] factory = 'data:dataset'",
            ) from None
        if not is_sliceable(tensors):
            shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in zip(names, tensors, strict=True))
            raise InputError("the data's row counts differ", shapes, "one row an example")
        return cls(*tensors)

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: Any) -> Batch:
        return tuple(t[index] for t in self.tensors)

    def fetch(self, indices: Iterable[int]) -> list[Any]:
        """The indices themselves: rows are taken when a batch is made."""
        return [int(i) for i in indices]

    def _rows(self, indices: list[Any]) -> Batch:
        return self[torch.tensor(indices, dtype=torch.long, device="cpu")]


def as_source(
    source: Any, collate: Callable[[list[Any]], Batch] | None = None, *, steps: bool = False
) -> Examples | Iterable[Batch]:
    """Examples that can be asked for by number, or batches as they come.

    Args:
        source: a map-style data set, a DataLoader, a list of examples or of batches, a pair of
            arrays ``(X, y)``, or any iterable of batches.
        collate: makes a batch of a list of rows, instead of the loader's or torch's.
        steps: batches go to a function of the user's as they are, so that a list holds batches.

    Raises:
        InputError: it is none of these.
    """
    if isinstance(source, DataLoader):
        return _of_loader(source, collate)
    if isinstance(source, Examples):
        return source
    if isinstance(source, tuple) and len(source) > 1 and all(map(_is_array, source)):
        return _columns(source)
    if isinstance(source, (list, tuple)):
        examples = collate is not None or (not steps and _holds_examples(source))
        return Examples(source, collate) if examples else source
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        if not isinstance(source, (dict, str)):
            return Examples(source, collate)
    elif isinstance(source, Iterable):
        return source if collate is None else _batched(source, collate)
    raise InputError(
        "not a data source",
        f"{type(source).__name__}",
        "a map-style dataset, a pair of arrays (X, y), or an iterable of batches",
    )


def _of_loader(
    loader: DataLoader[Any], collate: Callable[[list[Any]], Batch] | None
) -> Examples | Iterable[Batch]:
    # Any other sampler, or batches made elsewhere, says which examples the user means.
    plain = type(loader.sampler) in (SequentialSampler, RandomSampler)
    plain = plain and type(loader.batch_sampler) is BatchSampler
    if isinstance(loader.sampler, RandomSampler):
        every = loader.sampler.num_samples == len(loader.sampler.data_source)
        plain = plain and every and not loader.sampler.replacement
    if plain and hasattr(loader.dataset, "__getitem__") and hasattr(loader.dataset, "__len__"):
        return Examples(
            loader.dataset,
            collate or loader.collate_fn,
            loader.batch_size,
            in_order=type(loader.sampler) is SequentialSampler,
            drop_last=loader.drop_last,
        )
    return loader


def _columns(arrays: tuple[Any, ...]) -> TensorRows:
    """A pair of arrays ``(X, y)`` as rows."""
    tensors = [tensor_of(array) for array in arrays]
    if len({len(tensor) for tensor in tensors}) > 1:
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise InputError(
            "inputs and targets as a pair of arrays need as many rows each",
            f"arrays of shape {shapes}",
            "(X, y) with one row an example; batches go in a list, [(inputs, targets), ...]",
        )
    return TensorRows(*tensors)


def _batched(rows: Iterable[Any], collate: Callable[[list[Any]], Batch]) -> Iterator[Batch]:
    iterator = iter(rows)
    while group := list(itertools.islice(iterator, BATCH_SIZE)):
        yield collate(group)


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0


def _holds_examples(items: Sequence[Any]) -> bool:
    """Whether a list holds examples and not batches."""
    if not items:
        return False
    pair = _vector_pair(items[0])
    return _is_example(items[0]) or (
        pair is not None and all(_vector_pair(item) == pair for item in items)
    )


def _vector_pair(item: Any) -> tuple[Any, ...] | None:
    """Shapes of an input and a vector that is its target, of lengths that no batch has."""
    if not isinstance(item, (tuple, list)) or len(item) != 2 or not all(map(_is_array, item)):
        return None
    shapes = tuple(tuple(array.shape) for array in item)
    return shapes if len(shapes[1]) == 1 and shapes[0][0] != shapes[1][0] else None


def _is_example(item: Any) -> bool:
    """Whether an item of a list is one example: its target is one number, or all is flat lists."""
    try:
        inputs, target = split_batch(item)
    except InputError:
        return False
    if isinstance(target, (Tensor, np.ndarray)):
        return not target.ndim
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    return isinstance(target, (int, float, np.generic)) or all(map(_is_flat, [*values, target]))


def _is_flat(value: Any) -> bool:
    """Whether something is a list of numbers."""
    return isinstance(value, list) and all(isinstance(x, (int, float)) for x in value)


def _stacked(items: list[Any]) -> Batch:
    """Torch's collate function, lists of numbers made tensors before.

    Raises:
        InputError: the rows differ in shape, or hold what torch does not stack.
    """
    try:
        return default_collate([_numbers_as_tensors(item) for item in items])
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise InputError(
            "the examples cannot be put together into a batch",
            str(error).splitlines()[0][:160],
            'a collate function that pads them: collate = "data:collate" under [data], or a '
            "DataLoader's collate_fn",
        ) from None


def _numbers_as_tensors(item: Any, *, top: bool = True) -> Any:
    """A row with its lists of numbers as tensors; the row itself may be a list or tuple."""
    if isinstance(item, Mapping):
        return {key: _numbers_as_tensors(value, top=False) for key, value in item.items()}
    if not isinstance(item, (list, tuple)) or not item:
        return item
    if not top and isinstance(item, list):
        try:
            return torch.tensor(item, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            pass
    make = getattr(item, "_make", type(item))
    return make([_numbers_as_tensors(value, top=False) for value in item])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Global generators, which augmentation and shuffling draw from, seeded and then put back."""
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % (1 << 32))
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)
