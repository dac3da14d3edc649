"""From what a pass adds and reads to constants that parameters may give to each other."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from hesscli.engines.symmetry.constants import ABSENT, Addend, Constants, Reading, distinct_places
from hesscli.engines.symmetry.families import Family, Told, Translation
from hesscli.engines.symmetry.gauges import Shear

Tell = Callable[[str, np.ndarray, bool], Told]
"""Of a name, entries, and whether one of them is padded."""


@dataclass(frozen=True)
class _Term:
    """Entries of an adder that are read in all the same places.

    Attributes:
        adder: its number.
        entries: distinct, in order.
        readings: where.
    """

    adder: int
    entries: np.ndarray
    readings: tuple[int, ...]


class Moving:
    """Constants that may be moved.

    Args:
        constants: what a pass has shown.
        size: of the flat vector.
        tell: what a family is.
    """

    def __init__(self, constants: Constants, size: int, tell: Tell) -> None:
        self.constants, self._size, self._tell = constants, size, tell

    @cached_property
    def taken(self) -> np.ndarray:
        """For each weight of a map the bias that could take back what it makes, or −1."""
        found = np.full(self._size, -1)
        for made, adder in enumerate(self.constants.adders):
            if adder.made_by is None:
                continue
            weights = self.constants.readings[adder.made_by].weights
            taker = self._taker(made, None)
            if weights is not None and taker is not None and len(taker) == len(weights):
                own = np.array([taker[each] for each in sorted(taker)])
                rows = weights.numpy().reshape(len(weights), -1)
                there = rows != ABSENT
                found[rows[there]] = np.broadcast_to(own[:, None], rows.shape)[there]
        return found

    @cached_property
    def _found(self) -> dict[int, list[tuple[int, Addend]]]:
        """For each adder the readings that it is part of."""
        found = defaultdict[int, list[tuple[int, Addend]]](list)
        for number, reading in enumerate(self.constants.readings):
            for addend in reading.addends:
                found[addend.adder].append((number, addend))
        return found

    @cached_property
    def terms(self) -> dict[bytes, list[_Term]]:
        """Entries by where they are read, adder by adder."""
        by_place = defaultdict[bytes, list[_Term]](list)
        for adder, readings in self._found.items():
            places = [np.unique(distinct_places(a.entries)[0]) for _, a in readings]
            every = np.unique(np.concatenate(places))
            every = every[every != ABSENT]
            seen = np.zeros((len(every), len(readings)))
            for column, (_, addend) in enumerate(readings):
                seen[np.isin(every, places[column]), column] = addend.factor
            kinds, kind = np.unique(seen, axis=0, return_inverse=True)
            for number, factors in enumerate(kinds):
                read = [(readings[c][0], float(factors[c])) for c in np.flatnonzero(factors)]
                entries = every[kind.ravel() == number]
                if read:
                    term = _Term(adder, entries, tuple(place for place, _ in read))
                    by_place[repr(sorted(read)).encode()].append(term)
        return by_place

    def families(self) -> Iterator[Family]:
        """From one parameter to another that is read where it is, and through maps to theirs."""
        for terms in self.terms.values():
            own = [t for t in terms if self.constants.adders[t.adder].made_by is None]
            joined = dict[int, int]()
            for one, other in itertools.combinations(own, 2):
                yield from self._exchanged(one, other, joined)
            if own:
                yield from self._through(own[0])

    # -- between two that are read alike ---------------------------------------------------------

    def _exchanged(self, one: _Term, other: _Term, joined: dict[int, int]) -> Iterator[Family]:
        """One direction for each part of both that are always together, and were not before."""
        links = [
            self._meeting(self.constants.readings[number], one.adder, other.adder)
            for number in one.readings
        ]
        groups = defaultdict[tuple[int, int], list[np.ndarray]](list)
        for part in _parts(np.concatenate(links, axis=1)):
            signs = np.isin(part, one.entries), np.isin(part, other.entries)
            both = (signs[0] ^ signs[1]).all() and signs[0].any() and signs[1].any()
            if both and _joins(part, joined):
                ahead = self._whole(one.adder, part[signs[0]])
                ordered = np.concatenate([ahead, self._whole(other.adder, part[signs[1]])])
                groups[len(ahead), len(ordered)].append(ordered)
        if not groups:
            return
        told = self._told(
            "bias against bias", np.concatenate([one.entries, other.entries]), one, other
        )
        tensors, signs_of = list[torch.Tensor](), list[torch.Tensor]()
        for (count, size), rows in groups.items():
            tensors.append(torch.from_numpy(np.stack(rows)))
            signs_of.append(1.0 - 2.0 * (torch.arange(size, device="cpu") >= count).double())
        yield Translation(told, tuple(tensors), tuple(signs_of))

    def _told(self, name: str, entries: np.ndarray, *terms: _Term) -> Told:
        padded = any(self.constants.adders[term.adder].is_padded for term in terms)
        return self._tell(name, entries, padded)

    def _whole(self, adder: int, entries: np.ndarray) -> np.ndarray:
        """Of a table all entries of the columns of which these are the first."""
        table = self.constants.adders[adder].table
        if table is None:
            return entries
        columns = np.searchsorted(table[0].numpy(), entries)
        return np.asarray(table[:, torch.from_numpy(columns)].T.numpy().reshape(-1))

    def _meeting(self, reading: Reading, one: int, other: int) -> np.ndarray:
        """Pairs of entries that are added to the same number."""
        pairs = [
            _pairs(*distinct_places(a.entries, b.entries))
            for a in reading.addends
            for b in reading.addends
            if a.adder == one and b.adder == other
        ]
        return np.concatenate(pairs, axis=1)

    # -- through maps ----------------------------------------------------------------------------

    def _through(self, term: _Term) -> Iterator[Family]:
        readings = [(number, self.constants.readings[number]) for number in term.readings]
        if any(reading.weights is None for _, reading in readings):
            return
        made = {a.made_by: n for n, a in enumerate(self.constants.adders) if a.made_by is not None}
        takers = [self._taker(made[number], term) for number, _ in readings]
        if any(taker is None for taker in takers):
            return
        channel = self._channels(term, [reading for _, reading in readings])
        if not channel:
            return
        rows = list[tuple[np.ndarray, ...]]()
        for (_, reading), taker in zip(readings, takers, strict=True):
            assert taker is not None
            assert reading.weights is not None
            if len(taker) < len(reading.weights):
                return  # some outcomes are not read
            rows += self._taken(reading, taker, term, channel)
        if not rows:
            return
        target, weight, by, factor = (np.concatenate(each) for each in zip(*rows, strict=True))
        own = np.array(sorted(channel))
        numbers, by_place = np.unique(np.array([channel[e] for e in own]), return_inverse=True)
        by_place = by_place.ravel().repeat(len(self._whole(term.adder, own)) // len(own))
        own = self._whole(term.adder, own)
        kept = np.isin(by, numbers)
        told = self._told("bias through maps", np.concatenate([own, target[kept]]), term)
        yield Shear(
            told,
            torch.from_numpy(own),
            torch.from_numpy(by_place),
            torch.from_numpy(target[kept]),
            torch.from_numpy(weight[kept]),
            torch.from_numpy(np.searchsorted(numbers, by[kept])),
            torch.from_numpy(factor[kept].astype(np.float64)),
            len(numbers),
        )

    def _taker(self, made: int, term: _Term | None) -> dict[int, int] | None:
        """The entry of a parameter that is read where each of a map's outcomes is."""
        found = dict[int, int]()
        for terms in self.terms.values():
            for outcome in (t for t in terms if t.adder == made):
                own = [
                    t
                    for t in terms
                    if self.constants.adders[t.adder].made_by is None
                    and (term is None or t.adder != term.adder)
                ]
                if not own:
                    return None
                reading = self.constants.readings[outcome.readings[0]]
                pairs = self._meeting(reading, made, own[0].adder)
                pairs = pairs[:, np.isin(pairs[0], outcome.entries)]
                if not np.isin(pairs[1], own[0].entries).all():
                    return None
                for one, other in pairs.T:
                    if found.setdefault(int(one), int(other)) != other:
                        return None
        return found if len(set(found.values())) == len(found) and found else None

    def _channels(self, term: _Term, readings: list[Reading]) -> dict[int, int]:
        """Which entries get the same, so that each input of each map gets one constant."""
        links, first = list[np.ndarray](), int(term.entries.max()) + 1
        for reading in readings:
            assert reading.inputs is not None
            for addend in reading.addends:
                if addend.adder == term.adder:
                    entries, inputs = distinct_places(addend.entries, reading.inputs)
                    links.append(_pairs(entries, first + inputs))
            first += int(reading.inputs.max()) + 1
        channel = dict[int, int]()
        for number, part in enumerate(_parts(np.concatenate(links, axis=1))):
            if part[0] != ABSENT:
                channel |= dict.fromkeys(part[np.isin(part, term.entries)].tolist(), number)
        return channel

    def _taken(
        self, reading: Reading, taker: dict[int, int], term: _Term, channel: dict[int, int]
    ) -> list[tuple[np.ndarray, ...]]:
        """What each taker gets: entries of it and of weights, the constant's number, a factor."""
        assert reading.weights is not None
        assert reading.inputs is not None
        weights = reading.weights.numpy().reshape(
            len(reading.weights), reading.weights.shape[1], -1
        )
        made = sorted(taker)
        scale = np.ones(len(weights)) if reading.scale is None else reading.scale.numpy()
        rows = list[tuple[np.ndarray, ...]]()
        for addend in (a for a in reading.addends if a.adder == term.adder):
            inputs, every = distinct_places(reading.inputs, addend.entries)
            which, at = np.unique(inputs, return_index=True)
            entries = every[at]
            for column, entry in zip(which, entries, strict=True):
                if int(entry) not in channel:
                    continue
                single = reading.scale is not None
                outputs = [int(column)] if single else range(len(weights))
                few = weights[outputs, 0 if single else column]
                target = np.array([taker[made[output]] for output in outputs])
                there = few != ABSENT
                rows.append(
                    (
                        np.broadcast_to(target[:, None], few.shape)[there],
                        few[there],
                        np.full(int(there.sum()), channel[int(entry)]),
                        np.broadcast_to((scale[outputs] * addend.factor)[:, None], few.shape)[
                            there
                        ],
                    )
                )
        return rows


def _joins(part: np.ndarray, joined: dict[int, int]) -> bool:
    """Whether entries were not all in one set, as from now on they are."""
    labels = {joined.get(int(entry), int(entry)) for entry in part}
    if len(labels) == 1:
        return False
    first = min(labels)
    joined |= dict.fromkeys((e for e, label in joined.items() if label in labels), first)
    joined |= dict.fromkeys(part.tolist(), first)
    return True


def _pairs(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Each pair of entries once, ``(2, ·)``; absent ones count as such."""
    width = int(other.max()) + 2
    found = np.unique((one + 1) * width + other + 1)
    return np.stack([found // width - 1, found % width - 1])


def _parts(pairs: np.ndarray) -> list[np.ndarray]:
    """Connected parts of a graph, each in order."""
    numbers, index = np.unique(pairs, return_inverse=True)
    one, other = index.reshape(2, -1)
    graph = coo_array((np.ones(len(one)), (one, other)), shape=(len(numbers),) * 2)
    label = connected_components(graph, directed=False)[1]
    order = np.argsort(label, kind="stable")
    starts = np.flatnonzero(np.diff(label[order])) + 1
    return [numbers[part] for part in np.split(order, starts)]
