"""Frozen data: examples drawn once, kept as they came, and cut at random into batches.

Loaders may shuffle and augment; what is analysed is fixed here, so that every product sees the
same matrix, and hashed, so that a report says which examples it speaks of.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

from hesscli.errors import InputError, UsageError
from hesscli.problem.batches import (
    Batch,
    is_sliceable,
    leaves_of,
    map_leaves,
    map_tensors,
    rows,
    size_of,
    tensors_of,
)
from hesscli.results import Observe, Snapshot

DEFAULT_EXAMPLES = 4096
MIN_GROUPS = 16
"""Random batches at least, so that error bars from data have degrees of freedom."""


@dataclass(frozen=True)
class Selection:
    """How many examples to keep: at random out of all, or the ``first`` of an iterable."""

    count: int | None = DEFAULT_EXAMPLES
    first: bool = False

    @classmethod
    def parse(cls, text: str | int) -> Selection:
        """From ``N``, ``"all"`` or ``"first:N"``.

        Raises:
            UsageError: anything else, or a count below one.
        """
        if text == "all":
            return cls(None)
        number = str(text).removeprefix("first:")
        if not number.isdecimal() or int(number) < 1:
            raise UsageError(
                "examples must be a number, all, or first:N", repr(text), "examples=4096"
            )
        return cls(int(number), number != str(text))


@dataclass(frozen=True)
class FrozenData:
    """Kept batches on the CPU.

    ``available`` is the number of examples that the loader has, None where it was not seen to
    the end. ``sliceable`` says that rows are examples; else a batch is the smallest unit.
    """

    batches: tuple[Batch, ...]
    counts: tuple[int, ...]
    available: int | None
    sliceable: bool
    sha256: str

    @property
    def count(self) -> int:
        """Number of kept examples."""
        return sum(self.counts)

    @property
    def nbytes(self) -> int:
        """Memory that the kept examples take."""
        return sum(t.nbytes for batch in self.batches for t in tensors_of(batch))


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


def freeze(
    source: Any,
    selection: Selection,
    *,
    batch_size: int,
    seed: int,
    whole_batches: bool = False,
    observe: Observe | None = None,
) -> FrozenData:
    """Draw, fetch and keep examples.

    Args:
        source: a map-style dataset, a DataLoader, or any iterable of batches.
        selection: how many, and whether at random.
        batch_size: at most so many in a batch; fewer where that gives under 16 batches.
        seed: of the draw and of the cut into batches.
        whole_batches: keep an iterable's batches as they come (the batch is the unit).
        observe: told the number of examples read.

    Raises:
        InputError: the source is empty, or no data source.
    """
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 0xDA7A])))
    source, collate = _unwrapped(source)
    report = _Reporter(observe)
    batches: list[Batch]
    available: int | None
    with _seeded(seed):
        if collate is not None:
            batches, available = _from_dataset(
                source, collate, selection, batch_size, generator, report
            )
        elif whole_batches:
            batches, available = _whole_batches(_read(source, report), selection, generator)
        else:
            batches, available = _from_stream(
                _read(source, report), selection, batch_size, generator
            )
    if not batches:
        raise InputError("the data set is empty", "no example", "[data] factory or file with rows")
    return FrozenData(
        batches=tuple(batches),
        counts=tuple(size_of(batch) for batch in batches),
        available=available,
        sliceable=all(is_sliceable(batch) for batch in batches),
        sha256=_digest(batches),
    )


def _unwrapped(source: Any) -> tuple[Any, Callable[[list[Any]], Batch] | None]:
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


def _from_dataset(
    dataset: Any,
    collate: Callable[[list[Any]], Batch],
    selection: Selection,
    batch_size: int,
    generator: np.random.Generator,
    report: _Reporter,
) -> tuple[list[Batch], int]:
    available: int = len(dataset)
    count = min(selection.count or available, available)
    chosen = np.arange(count) if selection.first else generator.permutation(available)[:count]
    batches: list[Batch] = []
    done = 0
    for group in _groups(generator.permutation(chosen), batch_size):
        if isinstance(dataset, TensorRows):
            batches.append(dataset[torch.from_numpy(group)])
        else:
            batches.append(_owned(_as_tensors(collate([dataset[int(i)] for i in group]))))
        done += len(group)
        report(done, count)
    return batches, available


def _from_stream(
    stream: Iterator[Batch],
    selection: Selection,
    batch_size: int,
    generator: np.random.Generator,
) -> tuple[list[Batch], int | None]:
    """Single examples of one pass; whole batches where those cannot be taken apart."""
    reservoir = _Reservoir(selection.count, selection.first, generator)
    for batch in stream:
        if not is_sliceable(batch):
            if reservoir.seen:
                raise InputError(
                    "the iterable's batches differ in kind",
                    f"after {reservoir.seen} examples, a batch without one row an example",
                    "one row an example in every tensor of every batch",
                )
            return _whole_batches(itertools.chain([batch], stream), selection, generator)
        for i in range(size_of(batch)):
            if not reservoir.offer(rows(batch, i, i + 1)):
                return _regrouped(reservoir.kept, batch_size, generator), None
    return _regrouped(reservoir.kept, batch_size, generator), reservoir.seen


def _whole_batches(
    stream: Iterator[Batch], selection: Selection, generator: np.random.Generator
) -> tuple[list[Batch], int | None]:
    """Whole batches of one pass, as many as hold the wanted number of examples."""
    head = list(itertools.islice(stream, 1))
    wanted = selection.count
    capacity = None if wanted is None or not head else -(-wanted // size_of(head[0]))
    reservoir = _Reservoir(capacity, selection.first, generator)
    available = 0
    for batch in itertools.chain(head, stream):
        if not reservoir.offer(batch):
            return reservoir.kept, None
        available += size_of(batch)
    return reservoir.kept, available


class _Reservoir:
    """At most ``capacity`` items of a stream: the first, or at random (Vitter 1985, algorithm R).

    Vitter, "Random sampling with a reservoir", ACM TOMS 11 (1985), section 2.
    """

    def __init__(self, capacity: int | None, first: bool, generator: np.random.Generator) -> None:
        self.capacity, self.first, self.generator = capacity, first, generator
        self.kept: list[Batch] = []
        self.seen = 0

    def offer(self, item: Batch) -> bool:
        """Take or leave the next item; False where no later one can be taken."""
        full = len(self.kept) == self.capacity
        if full and self.first:
            return False
        slot = int(self.generator.integers(self.seen + 1)) if full else self.seen
        if self.capacity is None or slot < self.capacity:
            self.kept[slot : slot + 1] = [_owned(item)]
        self.seen += 1
        return True


def _regrouped(
    examples: list[Batch], batch_size: int, generator: np.random.Generator
) -> list[Batch]:
    order = generator.permutation(len(examples))
    groups = _groups(order, batch_size) if len(order) else []
    return [_stacked([examples[i] for i in group]) for group in groups]


def _groups(order: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Groups of nearly equal size: at most ``batch_size``, and at least 16 where there can be."""
    if not len(order):
        return []
    wanted = max(-(-len(order) // batch_size), min(MIN_GROUPS, len(order)))
    return np.array_split(order, wanted)


def _stacked(examples: list[Batch]) -> Batch:
    first = examples[0]
    columns = [list(tensors_of(example)) for example in examples]
    try:
        joined = iter([torch.cat(column) for column in zip(*columns, strict=True)])
    except (RuntimeError, ValueError) as error:
        raise InputError(
            "the iterable's examples differ in shape",
            str(error).splitlines()[0],
            "pad them to one shape, or give a map-style dataset through a DataLoader",
        ) from None
    return map_tensors(lambda _: next(joined), first)


def _read(source: Iterable[Batch], report: _Reporter) -> Iterator[Batch]:
    done = 0
    for raw in source:
        batch = _as_tensors(raw)
        yield batch
        done += size_of(batch)
        report(done, None)


def _as_tensors(batch: Batch) -> Batch:
    """The batch with its arrays as tensors, so that they are cut and hashed as tensors are."""
    batch = map_leaves(
        lambda leaf: torch.tensor(leaf) if isinstance(leaf, np.ndarray) else leaf, batch
    )
    if next(tensors_of(batch), None) is None:
        raise InputError("a batch holds no tensor", type(batch).__name__, "batches of tensors")
    return batch


def _owned(batch: Batch) -> Batch:
    """A copy on the CPU that nobody else writes to."""

    def own(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)

    return map_tensors(own, batch)


def _digest(batches: Sequence[Batch]) -> str:
    """SHA-256 over order, shapes, types and bytes of the kept tensors, and over other values."""
    digest = hashlib.sha256()
    for leaf in leaves_of(batches):
        if isinstance(leaf, Tensor):
            digest.update(f"{tuple(leaf.shape)}{leaf.dtype}".encode())
            digest.update(leaf.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(leaf, (str, int, float)):
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


class _Reporter:
    def __init__(self, observe: Observe | None) -> None:
        self.observe = observe

    def __call__(self, done: int, total: int | None) -> None:
        if self.observe is not None:
            self.observe(Snapshot(phase="reading data", done=done, total=total))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
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
