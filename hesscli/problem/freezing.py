"""Freezing: examples drawn once, kept as they came, and cut at random into batches.

Loaders may shuffle and augment; what is analysed is fixed here, so that every product sees the
same matrix, and hashed, so that a report says which examples it speaks of.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hesscli.errors import InputError
from hesscli.problem.batches import (
    BATCH_SIZE,
    Batch,
    filled,
    form_of,
    is_sliceable,
    joined,
    leaves_of,
    map_tensors,
    owned,
    rows,
    size_of,
    tensor_of,
    tensors_of,
)
from hesscli.problem.independence import MIN_GROUPS, Part, sliced
from hesscli.problem.sources import Examples, as_source, seeded
from hesscli.results import Observe, Snapshot, tell
from hesscli.vocabulary import Selection

# -- What was kept ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class FrozenData:
    """Kept batches on the CPU.

    ``available`` is the number of examples that the loader has, None where it was not seen to
    the end. ``sliceable`` says that rows are examples; else a batch is the smallest unit.
    ``changing`` says that some came out otherwise when they were fetched again. ``together`` is
    how many examples the user has in a batch, where these were cut anew; 0 where they are as they
    were.
    """

    batches: tuple[Batch, ...]
    counts: tuple[int, ...]
    available: int | None
    sliceable: bool
    sha256: str
    changing: bool = False
    together: int = 0

    @property
    def count(self) -> int:
        """Number of kept examples."""
        return sum(self.counts)

    @property
    def fraction(self) -> float | None:
        """Kept examples over available ones; None where the loader was not seen to the end."""
        return None if self.available is None else self.count / self.available

    @property
    def nbytes(self) -> int:
        """Memory that the kept examples take."""
        return sum(t.nbytes for batch in self.batches for t in tensors_of(batch))


def digest_of(batches: Sequence[Batch]) -> str:
    """SHA-256 over order, shapes, types and bytes of the kept tensors, and over other values."""
    digest = hashlib.sha256()
    for leaf in leaves_of(batches):
        if isinstance(leaf, Tensor):
            digest.update(f"{tuple(leaf.shape)}{leaf.dtype}".encode())
            digest.update(leaf.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(leaf, (str, int, float)):
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


# -- A fair choice among items whose number is not known before the last was seen ------------------


class Reservoir:
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
            self.kept[slot : slot + 1] = [owned(item)]
        self.seen += 1
        return True


# -- From whatever gives examples to kept batches --------------------------------------------------


SAMPLED_GROUPS = 64
"""Groups at least, where some of the examples were left out and examples are independent: heavy
tails, which the rest may have too, do not show in 16."""
_FETCHED_TWICE = 4
"""Examples that are fetched a second time, to see whether they change."""
_PUT_TOGETHER_TWICE = 16
"""Examples that are put together a second time, to see whether that draws something."""
_TOGETHER = 8
"""Single examples that are put together to see whether they mix."""


class Trial(Protocol):
    """What is shown the user's own batches and tells whether they may be cut anew."""

    @property
    def separable(self) -> bool:
        """Whether all that was seen may be."""

    @property
    def wants_more(self) -> bool:
        """Whether one more batch would tell anything."""

    def see(self, batch: Batch, part: Part) -> None:
        """One batch, and what makes parts of it."""

    def grows(self, batch: Batch, own: int) -> bool:
        """Whether a larger batch makes what its pieces of the user's own size make."""


def freeze(
    source: Any,
    selection: Selection,
    *,
    batch_size: int | None,
    seed: int,
    trial: Trial,
    collate: Callable[[list[Any]], Batch] | None = None,
    steps: bool = False,
    observe: Observe | None = None,
) -> FrozenData:
    """Draw, fetch and keep examples.

    Batches are first made as the user makes them: by the loader, or of ``batch_size``. Where the
    trial finds that examples are independent, they are cut anew, at random into at least 16, or
    64 where some are left out; no larger than the user's where larger ones make something else.

    Args:
        source: as :func:`hesscli.problem.sources.as_source` takes it.
        selection: how many, and whether at random.
        batch_size: at most so many in a batch; default the loader's own where batches stay as
            they are, else 128.
        seed: of the draw and of the cut into batches.
        trial: is shown the batches as the user makes them.
        collate: makes a batch of rows, instead of the loader's or torch's.
        steps: batches go to a function of the user's as they are.
        observe: told the number of examples read; returning True stops the run.

    Raises:
        InputError: the source is empty, or no data source.
        KeyboardInterrupt: the observer wanted no more.
    """
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 0xDA7A])))
    found = as_source(source, collate, steps=steps)
    report = _Reporter(observe)
    with seeded(seed):
        if isinstance(found, Examples):
            kept = _from_examples(found, selection, batch_size, generator, trial, report)
        else:
            kept = _from_stream(_read(found, report), selection, batch_size, generator, trial)
    if not kept.batches:
        raise InputError("the data set is empty", "no example", "[data] factory or file with rows")
    return FrozenData(
        batches=tuple(kept.batches),
        counts=tuple(kept.counts),
        available=kept.available,
        sliceable=kept.sliceable,
        sha256=digest_of(kept.batches),
        changing=kept.changing or _changes_behind(found),
        together=batch_size or kept.own,
    )


@dataclass(frozen=True)
class _Kept:
    """What was read: batches, how many examples each holds, and how many there were.

    ``own`` is how many the user has in a batch.
    """

    batches: list[Batch]
    counts: list[int]
    available: int | None
    sliceable: bool
    own: int
    changing: bool = False

    @classmethod
    def of(cls, batches: list[Batch], available: int | None, own: int) -> _Kept:
        """Kept batches of which nothing else is known."""
        counts = [size_of(batch) for batch in batches]
        return cls(batches, counts, available, all(map(is_sliceable, batches)), own)


def _cut(order: np.ndarray, batch_size: int | None, available: int | None) -> list[np.ndarray]:
    """An order of examples in groups of nearly equal size, as many as error bars need."""
    least = MIN_GROUPS if available in (None, len(order)) else SAMPLED_GROUPS
    wanted = max(-(-len(order) // (batch_size or BATCH_SIZE)), min(least, len(order)))
    return np.array_split(order, wanted) if len(order) else []


def _from_examples(
    examples: Examples,
    selection: Selection,
    batch_size: int | None,
    generator: np.random.Generator,
    trial: Trial,
    report: _Reporter,
) -> _Kept:
    """Batches as the user makes them, until examples are found to be independent."""
    available = len(examples)
    count = min(selection.count or available, available)
    chosen = np.arange(count) if selection.first else generator.permutation(available)[:count]
    order = generator.permutation(chosen)
    size = batch_size or examples.batch_size or BATCH_SIZE
    own = _users_groups(examples, order, size, generator)
    fetch = _Fetching(examples, report, count)
    batches: list[Batch] = []
    for group in own:
        if batches and not (fetch.one_row_each and trial.wants_more):
            break
        batches.append(fetch(group, trial))
    if size == 1 and count > 1 and fetch.one_row_each:
        fetch(order[:_TOGETHER], trial)
    if not (fetch.one_row_each and trial.separable):
        batches += [fetch(group) for group in own[len(batches) :]]
        if examples.drop_last and len(own) > 1 and len(own[-1]) < size:
            own, batches = own[:-1], batches[:-1]
        counts = [len(group) for group in own]
        return _Kept(batches, counts, available, fetch.one_row_each, size, fetch.changing)
    fetched = np.concatenate(own[: len(batches)]) if len(order) else order

    def made(groups: list[np.ndarray]) -> list[Batch]:
        cut = _regrouped(batches, fetched, groups) if groups else []
        return [fetch(group) for group in groups] if cut is None else cut

    regrouped = _cut_anew(order, batch_size, available, size, made, trial)
    counts = [size_of(batch) for batch in regrouped]
    return _Kept(regrouped, counts, available, fetch.one_row_each, size, fetch.changing)


def _cut_anew(
    order: np.ndarray,
    batch_size: int | None,
    available: int | None,
    own: int,
    made: Callable[[list[np.ndarray]], list[Batch]],
    trial: Trial,
) -> list[Batch]:
    """Batches that :func:`_cut` has, or no larger than the user's where larger ones are others."""
    batches = made(_cut(order, batch_size, available))
    largest = max(batches, key=size_of, default=None)
    is_larger = batch_size is None and largest is not None and size_of(largest) > own
    if is_larger and not trial.grows(largest, own):
        return made(_cut(order, own, available))
    return batches


def _users_groups(
    examples: Examples, order: np.ndarray, size: int, generator: np.random.Generator
) -> list[np.ndarray]:
    """Which examples the user puts together: neighbours where the loader does not shuffle."""
    if not examples.in_order:
        return [order[start : start + size] for start in range(0, len(order), size)]
    every = np.arange(len(examples))
    groups = [every[start : start + size] for start in range(0, len(every), size)]
    wanted = -(-len(order) // size)
    picked = range(wanted) if wanted == len(groups) else generator.permutation(len(groups))[:wanted]
    return [groups[i] for i in sorted(picked)]


class _Fetching:
    """Fetches groups of examples as batches.

    ``one_row_each`` says that every tensor so far had one row an example, ``changing`` that a
    few examples came out otherwise when they were fetched twice, or put together twice. Where
    putting them together draws something, parts of a batch are cut out of it.
    """

    def __init__(self, examples: Examples, report: _Reporter, total: int) -> None:
        self.examples, self.report, self.total = examples, report, total
        self.one_row_each, self.changing, self._draws = True, False, False
        self._done = 0

    def __call__(self, group: np.ndarray, trial: Trial | None = None) -> Batch:
        items = self.examples.fetch(group)
        if not self._done:
            self._draws = self._draws_together(items[:_PUT_TOGETHER_TWICE])
            self.changing = self._draws or _changes(self.examples, group, items)
        batch = owned(self._batch(items))
        self.one_row_each = (
            self.one_row_each and is_sliceable(batch) and size_of(batch) == len(group)
        )
        if trial is not None and self.one_row_each:
            trial.see(batch, sliced(batch) if self._draws else self._part(items))
        self._done = min(self._done + len(group), self.total)
        self.report(self._done, self.total)
        return batch

    def _part(self, items: list[Any]) -> Part:
        return lambda places: self._batch([items[i] for i in places])

    def _draws_together(self, items: list[Any]) -> bool:
        """Whether the same examples make another batch when they are put together again."""
        first, second = (leaves_of(self._batch(items)) for _ in range(2))
        return any(not _same(*pair) for pair in zip(first, second, strict=False))

    def _batch(self, items: list[Any]) -> Batch:
        """Put together by the user's own function: padding is part of it."""
        return _as_tensors(self.examples.collate(items))


def _changes(examples: Examples, group: Sequence[int] | np.ndarray, items: list[Any]) -> bool:
    """Whether a few examples are others when they are fetched again."""
    again = examples.fetch(group[:_FETCHED_TWICE])
    before = leaves_of(items[:_FETCHED_TWICE])
    return any(not _same(*pair) for pair in zip(before, leaves_of(again), strict=False))


def _changes_behind(stream: Examples | Iterable[Batch]) -> bool:
    """The same of a data set that a loader reads in an order of its own."""
    dataset = getattr(stream, "dataset", None)
    if isinstance(stream, Examples) or not hasattr(dataset, "__getitem__"):
        return False
    examples = Examples(dataset)
    try:
        return _changes(examples, [0], examples.fetch([0]))
    except Exception:  # it is asked by keys of another kind
        return False


def _same(one: Any, other: Any) -> bool:
    """Whether two leaves are equal; what cannot be told counts as equal."""
    if not isinstance(one, (Tensor, np.ndarray, np.generic, int, float)):
        return True
    first, second = tensor_of(one), tensor_of(other)
    if first.layout != torch.strided:
        return True
    equal = (first == second) | ((first != first) & (second != second))
    return first.shape == second.shape and bool(equal.all())


def _from_stream(
    stream: Iterator[Batch],
    selection: Selection,
    batch_size: int | None,
    generator: np.random.Generator,
    trial: Trial,
) -> _Kept:
    """Single examples of one pass where they are independent, else whole batches."""
    head: list[Batch] = []
    seen = 0
    for batch in stream:
        head.append(owned(batch))
        seen += size_of(batch)
        if not is_sliceable(batch) or (selection.count is not None and seen >= selection.count):
            break
    if not all(map(is_sliceable, head)):
        return _whole(head, stream, selection, generator)
    for batch in head:
        trial.see(batch, sliced(batch))
    alike = len({form_of(batch) for batch in head}) <= 1
    if alike and len(head) > 1 and all(size_of(batch) == 1 for batch in head):
        together = joined(head[:_TOGETHER])
        trial.see(together, sliced(together))
    if not alike or not trial.separable:
        return _whole(head, stream, selection, generator)
    own = max(map(size_of, head), default=1)
    reservoir = Reservoir(selection.count, selection.first, generator)
    for batch in itertools.chain(head, stream):
        if (form := form_of(batch)) != (first := form_of(head[0])):
            raise InputError(
                "the iterable's batches differ in kind",
                f"after {reservoir.seen} examples, tensors {form}; before {first}",
                "one row an example in every tensor, padded to one shape",
            )
        for i in range(size_of(batch)):
            if not reservoir.offer(rows(batch, i, i + 1)):
                return _of_examples(reservoir.kept, None, batch_size, own, generator, trial)
    return _of_examples(reservoir.kept, reservoir.seen, batch_size, own, generator, trial)


def _of_examples(
    examples: list[Batch],
    available: int | None,
    batch_size: int | None,
    own: int,
    generator: np.random.Generator,
    trial: Trial,
) -> _Kept:
    def made(groups: list[np.ndarray]) -> list[Batch]:
        return [joined([examples[i] for i in group]) for group in groups]

    order = generator.permutation(len(examples))
    return _Kept.of(_cut_anew(order, batch_size, available, own, made, trial), available, own)


def _whole(
    head: list[Batch], stream: Iterator[Batch], selection: Selection, generator: np.random.Generator
) -> _Kept:
    """Whole batches of one pass, as many as hold the wanted number of examples."""
    wanted = selection.count
    capacity = None if wanted is None or not head else -(-wanted // size_of(head[0]))
    reservoir = Reservoir(capacity, selection.first, generator)
    available = 0
    for batch in itertools.chain(head, stream):
        if not reservoir.offer(batch):
            return _Kept.of(reservoir.kept, None, 1)
        available += size_of(batch)
    return _Kept.of(reservoir.kept, available, 1)


def _regrouped(
    batches: list[Batch], order: np.ndarray, groups: list[np.ndarray]
) -> list[Batch] | None:
    """Rows that were fetched in an order, cut anew; None where they are others or do not fit."""
    places = {int(index): place for place, index in enumerate(order)}
    if len({form_of(batch) for batch in batches}) > 1 or len(order) != sum(map(len, groups)):
        return None
    columns = [torch.cat(column) for column in zip(*map(tensors_of, batches), strict=True)]
    regrouped = []
    for group in groups:
        if not places.keys() >= set(group.tolist()):
            return None
        rows_of = torch.tensor([places[int(index)] for index in group], device="cpu")
        regrouped.append(filled(batches[0], [column[rows_of] for column in columns]))
    return regrouped


def _read(source: Iterable[Batch], report: _Reporter) -> Iterator[Batch]:
    done = 0
    for raw in source:
        batch = _as_tensors(raw)
        yield batch
        done += size_of(batch)
        report(done, None)


def _as_tensors(batch: Batch) -> Batch:
    """The batch with its arrays as tensors, so that they are cut and hashed as tensors are.

    Raises:
        InputError: it holds no tensor, or one without rows in memory.
    """
    batch = map_tensors(torch.tensor, batch, np.ndarray)
    tensors = list(tensors_of(batch))
    if not tensors:
        raise InputError(
            "a batch holds no tensor",
            type(batch).__name__,
            "batches of tensors, in tuples, lists or dicts; a collate function makes them",
        )
    if odd := [t for t in tensors if t.layout != torch.strided]:
        kind = "sparse" if "sparse" in str(odd[0].layout) else "nested"
        raise InputError(
            f"a batch holds a {kind} tensor",
            f"{odd[0].layout} of shape {tuple(odd[0].shape)}",
            "x.to_dense() in the data set or its collate function"
            if kind == "sparse"
            else "tensors padded to one length",
        )
    return batch


class _Reporter:
    def __init__(self, observe: Observe | None) -> None:
        self.observe = observe

    def __call__(self, done: int, total: int | None) -> None:
        tell(self.observe, Snapshot(phase="reading data", done=done, total=total))
