"""What a run hands over to be kept, so that another can go on from it; who keeps it is not here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from hesscli import world
from hesscli.errors import UsageError
from hesscli.meter import Meter
from hesscli.shards import SharedRows
from hesscli.state import Parted, Rows, State, Stateful, Timed, joined

if TYPE_CHECKING:
    from hesscli.ledger import FileLedger


class Kept:
    """Work whose state is some of its attributes, and over once it has ended."""

    kept: ClassVar[tuple[str, ...]]
    """Their names."""
    lasting = False

    def state_dict(self) -> State:
        """These attributes."""
        return {name: getattr(self, name) for name in self.kept}

    def load_state_dict(self, state: State) -> None:
        """Have those of another."""
        for name in self.kept:
            setattr(self, name, state[name])


class Ledger(Protocol):
    """Where a run is kept."""

    def attach(self, clock: Timed, meter: Meter) -> None:
        """Keep what these say as well, and let them go on from what was kept."""

    def recognise(self, facts: Mapping[str, Any]) -> None:
        """Take note of what the run is of.

        Raises:
            UsageError: what was kept is of another.
        """

    def decided(self, name: str, decide: Callable[[], Any]) -> Any:
        """What was decided before; or it is decided now, as plain values, and kept."""

    def begin(self, work: Stateful) -> None:
        """Keep this work too, and let it go on from what was kept."""

    def step(self) -> None:
        """The work is between two steps."""

    def cut(self, at_budget: bool) -> None:
        """It ends here, between two steps, with more to do: at its budget, or interrupted."""

    def end(self) -> None:
        """It has come to its own end."""

    def close(self) -> None:
        """So has the run, or it was cut."""


class Unkept:
    """Keeps nothing."""

    def attach(self, _clock: Timed, _meter: Meter) -> None:
        """Nothing was kept."""

    def recognise(self, _facts: Mapping[str, Any]) -> None:
        """Any will do."""

    def decided(self, _name: str, decide: Callable[[], Any]) -> Any:
        """It is decided now."""
        return decide()

    def begin(self, _work: Stateful) -> None:
        """It begins anew."""

    def step(self) -> None:
        """Nothing is to be done."""

    end = close = step

    def cut(self, _at_budget: bool) -> None:
        """Nothing is written."""


UNKEPT = Unkept()


class SharedLedger:
    """The ledger of a run on many ranks: rank 0 writes it, and all go on from what it has.

    What was decided on rank 0 counts for all. Facts must be the same on every rank. Rows of which
    each rank has its columns are made whole one at a time, when rank 0 writes them, and those of a
    file are told one at a time, so that nobody has all of them.

    Args:
        file: of rank 0, where the run is kept.
    """

    def __init__(self, file: FileLedger | None) -> None:
        self._file = file
        self._is_kept = world.any_of(file is not None)
        self._works: list[Stateful] = []
        if file is not None:
            file.whole = _asked_for

    def attach(self, clock: Timed, meter: Meter) -> None:
        """Keep what these say as well, and let them go on from what was kept."""
        self._meter = meter
        if self._file is not None:
            self._file.attach(clock, meter)
        clock.earlier = world.decided(clock.earlier)

    def recognise(self, facts: Mapping[str, Any]) -> None:
        """Take note of what the run is of.

        Raises:
            UsageError: ranks are of different runs, or what was kept is of another.
        """
        require_alike(facts)
        with world.apart():
            if self._file is not None:
                self._file.recognise(facts)

    def decided(self, name: str, decide: Callable[[], Any]) -> Any:
        """What was decided before; or all find it now, and what rank 0 found is kept."""
        known = self._file is not None and self._file.has_decided(name)
        found = None if world.any_of(known) else decide()
        if self._file is not None:
            found = self._file.decided(name, lambda: found)
        return world.decided(found)

    def begin(self, work: Stateful) -> None:
        """Keep this work too, and let it go on from what was kept."""
        saved = None if self._file is None else self._file.saved(len(self._works))
        self._works.append(work)
        told = _told(saved)
        if self._file is not None:
            if saved is not None and told is not None:
                saved["state"] = told["state"]
            self._file.begin(work)
        elif told is not None:
            self._meter.go_back(tuple(told["counted"]))
            work.load_state_dict(told["state"])

    def step(self) -> None:
        """Write what there is where that is due on rank 0, once it has all of it."""
        with world.apart():
            is_due = self._file is not None and self._file.is_due()
        if self._is_kept and world.any_of(is_due):
            self._settle()
            self._write(None if self._file is None else self._file.write)

    def cut(self, at_budget: bool) -> None:
        """It ends here, between two steps, with more to do: at its budget, or interrupted."""
        self._settle()
        self._write(None if self._file is None else partial(self._file.cut, at_budget))

    def end(self) -> None:
        """It has come to its own end."""
        if self._file is not None:
            self._file.end()

    def close(self) -> None:
        """So has the run, or it was cut."""
        self._write(None if self._file is None else self._file.close)

    def _settle(self) -> None:
        """Let states be whole: they are, where every rank asks for them at once."""
        if self._is_kept:
            for work in self._works:
                work.state_dict()

    def _write(self, write: Callable[[], None] | None) -> None:
        """Let rank 0 write, which asks the others for their part of what it has a part of."""
        with world.apart():
            if write is not None:
                try:
                    write()
                finally:
                    world.decided(None)
            elif self._is_kept:
                rows: Mapping[str, Rows] = {}
                while (asked := world.decided(None)) is not None:
                    place, number = asked
                    rows = rows or self._rows()
                    next(rows[place].since(number))

    def _rows(self) -> Mapping[str, Rows]:
        """By the places that they have in a file."""
        works = [{"state": work.state_dict()} for work in self._works]
        return Parted.of({"work": works}).rows


def _asked_for(place: str, rows: Rows, first: int) -> Iterator[Tensor]:
    """Rows from a number on, of which the others give their part where they are shared."""
    if not isinstance(rows, SharedRows):
        yield from rows.since(first)
        return
    for number in range(first, len(rows)):
        world.decided((place, number))
        yield next(rows.since(number))


_AT_ONCE = 1 << 24
"""Bytes of rows that are told at once, of one at least."""


class _ToldRows(Rows):
    """Rows that rank 0 has, and the others their shapes: all go through them together."""

    def since(self, first: int) -> Iterator[Tensor]:
        """The rows from ``first`` on, of which nobody but rank 0 has more than a block at once."""
        for part in super().since(first):
            for block in part.split(max(1, _AT_ONCE // max(1, part[0].nbytes))):
                told = block if world.is_first() else torch.empty_like(block, device="cpu")
                yield world.completed(told, [slice(0, len(told))])


def _told(saved: State | None) -> State | None:
    """What rank 0 has of some work that was kept, if it was, on every rank."""
    if world.decided(saved is None):
        return None
    mine = Parted() if saved is None else Parted.of(saved)
    shapes = {place: [part.to("meta") for part in rows.parts] for place, rows in mine.rows.items()}
    plain, arrays, shapes = world.decided((mine.plain, mine.arrays, shapes))
    parts = {place: rows.parts for place, rows in mine.rows.items()} if mine.rows else shapes
    found: State = joined(plain, arrays, {place: _ToldRows(*each) for place, each in parts.items()})
    return found


def require_alike(facts: Mapping[str, Any]) -> None:
    """See that all ranks are of one run.

    Raises:
        UsageError: they are not; what differs is named.
    """
    every = world.gathered(dict(facts))
    for name in every[0]:
        for rank, other in enumerate(every):
            if name not in _OWN and other[name] != every[0][name]:
                raise UsageError(
                    "the ranks are not of one run",
                    f"{name} is {every[0][name]} on rank 0, and {other[name]} on rank {rank}",
                    "the same files, versions and kind of machine for every rank",
                )


_OWN = {"device"}
"""Facts that each rank has its own of."""
