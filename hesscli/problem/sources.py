"""Where examples come from: datasets, loaders and iterables of the user's, or a file's tensors."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from hesscli.problem.batches import Batch, is_sliceable


class TensorRows(Sequence[Batch]):
    """Tensors with one row an example, fetched by index lists without per-row work."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

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
                "the data file cannot be read", f"{path}: {error}", "[data] file = '...'"
            ) from None
        if not is_sliceable(tensors):
            shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in zip(names, tensors, strict=True))
            raise InputError("the data's row counts differ", shapes, "one row an example")
        return cls(*tensors)

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: Any) -> Batch:
        return tuple(t[index] for t in self.tensors)


def unwrapped(source: Any) -> tuple[Any, Callable[[list[Any]], Batch] | None]:
    """A map-style dataset with its collate function, or an iterable and None."""
    if isinstance(source, DataLoader):
        # Any other sampler, or batches made elsewhere, says which examples the user means.
        plain = type(source.sampler) in (SequentialSampler, RandomSampler)
        plain = plain and type(source.batch_sampler) is BatchSampler
        if plain and hasattr(source.dataset, "__getitem__") and hasattr(source.dataset, "__len__"):
            return source.dataset, source.collate_fn
        return source, None
    if isinstance(source, TensorRows) or (
        hasattr(source, "__getitem__")
        and hasattr(source, "__len__")
        and not isinstance(source, (list, tuple, dict, str))
    ):
        return source, default_collate
    if isinstance(source, Iterable) and not isinstance(source, (dict, str)):
        return source, None
    raise InputError(
        "not a data source",
        f"{type(source).__name__}",
        "a map-style dataset, or an iterable of batches",
    )


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
