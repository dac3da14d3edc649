"""Estimates of a matrix's traces, batch by batch and layer by layer, as a table that grows."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from hesscli import world
from hesscli.engines.entries import BatchSum, Stream
from hesscli.engines.hutchinson.table import Array
from hesscli.meter import Meter
from hesscli.operators.source import Source
from hesscli.parameters import LayerSums, Parameters
from hesscli.state import State

T = TypeVar("T")


@dataclass(frozen=True)
class Visit:
    """What has been given by a batch, or some: new rows of their cells, and entries if wanted."""

    rows: dict[int, Array]
    entries: BatchSum | None = None


class Cells:
    """What all engines have that estimate a diagonal.

    Args:
        operator: the matrix.
        first: number of the first estimate, so that runs can be split by them.
        batches: the numbers of those that it goes through, default all that weigh something.
        whole: the network's parameters where the operator has but some of them; the table's
            columns are the whole's layers.
        stream: takes the estimates of single entries, where they are wanted.

    ``cells[b]`` is ``(estimates, L + 1)``: a batch's traces by layer, and in the last column
    their sum, without weight decay.
    """

    phase: str
    """What the engine does, in words."""
    least: int
    """Estimates that a batch must have to count: two for an error bar, one where it is exact."""

    def __init__(
        self,
        operator: Source,
        *,
        first: int = 0,
        batches: Sequence[int] | None = None,
        whole: Parameters | None = None,
        stream: Stream | None = None,
    ) -> None:
        self.operator, self.first, self.stream = operator, first, stream
        self.indices = operator.indices if batches is None else batches
        self._sums = LayerSums(operator.parameters, whole)
        empty: Array = np.empty((0, self._sums.num_layers + 1))
        self.cells = dict.fromkeys(self.indices, empty)

    @property
    def meter(self) -> Meter:
        """The meter of the operator."""
        return self.operator.meter

    @property
    def streams(self) -> list[Stream]:
        """The streams that keep single entries, if any do."""
        return [] if self.stream is None else [self.stream]

    @property
    def count(self) -> int:
        """Estimates that every batch in the table has."""
        return min((len(self.cells[i]) for i in self.seen), default=0)

    @property
    def seen(self) -> list[int]:
        """Batches that count in the table."""
        return [i for i in self.indices if len(self.cells[i]) >= self.least]

    def aligned(self, indices: Sequence[int]) -> list[Array]:
        """The cells of some batches, of equal length where entries are kept.

        Entries know nothing of a round that is not complete but is not the first.
        """
        common = self.count if self._together else None
        return [self.cells[i][:common] for i in indices]

    def state_dict(self) -> State:
        """The table by batch and estimate, and the entries: of whole batches, at every step."""
        return {
            "batches": list(self.indices),
            "estimates": [len(self.cells[i]) for i in self.indices],
            "cells": np.concatenate([self.cells[i] for i in self.indices]),
            "stream": None if self.stream is None else self.stream.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Be where an engine of the same matrix was."""
        self.cells.update(_rows(state))
        if self.stream is not None:
            self.stream.load_state_dict(state["stream"])

    def join(self, state: State) -> None:
        """Add other batches, or other estimates of the same; these are those that it goes through.

        Where entries are kept, what they have of complete rounds is all that counts.
        """
        rows = _rows(state)
        if self.stream is not None:
            whole = self.stream.count_of(state["stream"])
            rows = {batch: each[:whole] for batch, each in rows.items()}
        if self.least == 1:  # exact: once is enough
            rows = {batch: each for batch, each in rows.items() if not len(self.cells[batch])}
        rows = {batch: each for batch, each in rows.items() if len(each)}
        for batch, each in rows.items():
            self.cells[batch] = np.concatenate([self.cells[batch], each])
        self.indices = [i for i in self.operator.indices if len(self.cells[i])]
        if self.stream is not None and rows:
            self.stream.join(state["stream"], len(self.cells[next(iter(rows))]))

    def _through(
        self, places: Sequence[T], visit: Callable[[T], Generator[None, None, Visit]]
    ) -> Iterator[None]:
        """Visit batches, or some at once, each rank by itself; all have what each has found.

        Yields before each turn and within a visit; stopping on the way loses that turn.
        """
        for turn in world.turns(places):
            yield
            yield from self._turn(turn, visit)

    def _turn(
        self, turn: Sequence[T], visit: Callable[[T], Generator[None, None, Visit]]
    ) -> Iterator[None]:
        place = world.own(turn)
        with self.meter.pooled():
            found = yield from world.abreast(None if place is None else visit(place))
            every = world.gathered({} if found is None else found.rows)
        for batch, rows in (one for each in every for one in each.items()):
            self.cells[batch] = np.concatenate([self.cells[batch], rows])
        if self.stream is not None and found is not None and found.entries is not None:
            self.stream.keep(found.entries)
        self.meter.keep()

    @property
    def _together(self) -> bool:
        """Whether only what all batches have counts."""
        return self.stream is not None


def _rows(state: State) -> dict[int, Array]:
    """The table that was saved, by batch."""
    ends = np.cumsum(state["estimates"])[:-1]
    return dict(zip(state["batches"], np.split(np.array(state["cells"]), ends), strict=True))
