"""Freezing: examples drawn once, kept as they came, and cut at random into batches.

Loaders may shuffle and augment; what is analysed is fixed here, so that every product sees the
same matrix, and hashed, so that a report says which examples it speaks of.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hesscli.errors import InputError
from hesscli.problem.batches import (
    Batch,
    is_sliceable,
    map_leaves,
    map_tensors,
    owned,
    rows,
    size_of,
    tensors_of,
)
from hesscli.problem.data import FrozenData, Selection, digest_of
from hesscli.problem.reservoir import Reservoir
from hesscli.problem.sources import TensorRows, seeded, unwrapped
from hesscli.results import Observe, Snapshot

MIN_GROUPS = 16
"""Random batches at least, so that error bars from data have degrees of freedom."""


@dataclass(frozen=True)
class Grouping:
    """How examples are cut into batches: of nearly equal size, at least 16 where there can be.

    ``exact`` keeps to the batch size, the last batch apart: a model that mixes the examples of
    a batch is another function on smaller ones.
    """

    batch_size: int
    exact: bool = False

    def cut(self, order: np.ndarray) -> list[np.ndarray]:
        """An order of examples in groups of at most ``batch_size``."""
        if self.exact:
            starts = range(0, len(order), self.batch_size)
            return [order[start : start + self.batch_size] for start in starts]
        if not len(order):
            return []
        wanted = max(-(-len(order) // self.batch_size), min(MIN_GROUPS, len(order)))
        return np.array_split(order, wanted)


def freeze(
    source: Any,
    selection: Selection,
    *,
    batch_size: int,
    seed: int,
    exact_size: bool = False,
    whole_batches: bool = False,
    observe: Observe | None = None,
) -> FrozenData:
    """Draw, fetch and keep examples.

    Args:
        source: a map-style dataset, a DataLoader, or any iterable of batches.
        selection: how many, and whether at random.
        batch_size: at most so many in a batch; fewer where that gives under 16 batches.
        seed: of the draw and of the cut into batches.
        exact_size: just ``batch_size`` in each batch but the last, however few that makes.
        whole_batches: keep an iterable's batches as they come (the batch is the unit).
        observe: told the number of examples read; returning True stops the run.

    Raises:
        InputError: the source is empty, or no data source.
        KeyboardInterrupt: the observer wanted no more.
    """
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 0xDA7A])))
    grouping = Grouping(batch_size, exact_size)
    source, collate = unwrapped(source)
    report = _Reporter(observe)
    batches: list[Batch]
    available: int | None
    with seeded(seed):
        if collate is not None:
            batches, available = _from_dataset(
                source, collate, selection, grouping, generator, report
            )
        elif whole_batches:
            batches, available = _whole_batches(_read(source, report), selection, generator)
        else:
            batches, available = _from_stream(_read(source, report), selection, grouping, generator)
    if not batches:
        raise InputError("the data set is empty", "no example", "[data] factory or file with rows")
    return FrozenData(
        batches=tuple(batches),
        counts=tuple(size_of(batch) for batch in batches),
        available=available,
        sliceable=all(is_sliceable(batch) for batch in batches),
        sha256=digest_of(batches),
    )


def _from_dataset(
    dataset: Any,
    collate: Callable[[list[Any]], Batch],
    selection: Selection,
    grouping: Grouping,
    generator: np.random.Generator,
    report: _Reporter,
) -> tuple[list[Batch], int]:
    available: int = len(dataset)
    count = min(selection.count or available, available)
    chosen = np.arange(count) if selection.first else generator.permutation(available)[:count]
    batches: list[Batch] = []
    done = 0
    for group in grouping.cut(generator.permutation(chosen)):
        if isinstance(dataset, TensorRows):
            batches.append(dataset[torch.from_numpy(group)])
        else:
            batches.append(owned(_as_tensors(collate([dataset[int(i)] for i in group]))))
        done += len(group)
        report(done, count)
    return batches, available


def _from_stream(
    stream: Iterator[Batch],
    selection: Selection,
    grouping: Grouping,
    generator: np.random.Generator,
) -> tuple[list[Batch], int | None]:
    """Single examples of one pass; whole batches where those cannot be taken apart."""
    reservoir = Reservoir(selection.count, selection.first, generator)
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
                return _regrouped(reservoir.kept, grouping, generator), None
    return _regrouped(reservoir.kept, grouping, generator), reservoir.seen


def _whole_batches(
    stream: Iterator[Batch], selection: Selection, generator: np.random.Generator
) -> tuple[list[Batch], int | None]:
    """Whole batches of one pass, as many as hold the wanted number of examples."""
    head = list(itertools.islice(stream, 1))
    wanted = selection.count
    capacity = None if wanted is None or not head else -(-wanted // size_of(head[0]))
    reservoir = Reservoir(capacity, selection.first, generator)
    available = 0
    for batch in itertools.chain(head, stream):
        if not reservoir.offer(batch):
            return reservoir.kept, None
        available += size_of(batch)
    return reservoir.kept, available


def _regrouped(
    examples: list[Batch], grouping: Grouping, generator: np.random.Generator
) -> list[Batch]:
    groups = grouping.cut(generator.permutation(len(examples)))
    return [_stacked([examples[i] for i in group]) for group in groups]


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


class _Reporter:
    def __init__(self, observe: Observe | None) -> None:
        self.observe = observe

    def __call__(self, done: int, total: int | None) -> None:
        snapshot = Snapshot(phase="reading data", done=done, total=total)
        if self.observe is not None and self.observe(snapshot):
            raise KeyboardInterrupt
