"""From what a pass has shown to families of transformations that might leave the loss as it is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from hesscli.engines.symmetry.families import Algebra, Family, Mixing, Scaling, Told, Translation
from hesscli.engines.symmetry.seen import Action, Kind, Seen, Shift
from hesscli.parameters import Parameters

_CAUSES = {
    "clipped": "a clipped activation",
    "padding_idx": "padding_idx, whose row autograd leaves without its gradient",
    "turned": "rotary positions",
    "RMS norm": "an RMS norm, which keeps the mean",
}
_SUMMED = ("map", "embedding", "tensor")
"""Channels that are sums, so that their inputs may each get a constant."""
_TOLD = {"running statistics": "batch norm in evaluation mode, whose statistics are fixed"}
"""What breaks a factor and is worth a word: all else was never expected to let one through."""


def _components(count: int, pairs: Sequence[Tensor]) -> np.ndarray:
    """The number of the part that each channel is in."""
    both = torch.cat([torch.zeros(2, 0, dtype=torch.long, device="cpu"), *pairs], dim=1).numpy()
    graph = coo_array((np.ones(both.shape[1]), (both[0], both[1])), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1])


def _used_again(seen: Seen) -> Iterator[Tensor]:
    """Pairs of channels that must have one factor, for one map is read with the one and the other.

    That is so where a map is used again in the same way; where it is used in another, as a head
    that is tied to an embedding, its rows there are columns here.
    """
    before = defaultdict[tuple[int, int, int, float], list[Action]](list)
    for action in (each for each in seen.actions if len(each.entries)):
        first, last = int(action.entries[0]), int(action.entries[-1])
        before[first, last, len(action.entries), action.exponent].append(action)
    for actions in before.values():
        one, *others = actions
        for other in others:
            if other.use == one.use or not torch.equal(one.entries, other.entries):
                continue
            pairs = torch.unique(torch.stack([one.channels, other.channels]), dim=1)
            if all(len(torch.unique(side)) == pairs.shape[1] for side in pairs):
                yield pairs


@dataclass(frozen=True)
class Part:
    """An action's entries whose factors all have exponents of one sign."""

    number: int
    entries: np.ndarray
    channels: np.ndarray
    exponent: float
    use: int
    shift: bool


class Factors:
    """What a pass leaves open of each channel's factor, and families of those.

    Args:
        seen: the pass.
        parameters: that it was watched with, in this order in the flat vector.
    """

    def __init__(self, seen: Seen, parameters: Parameters) -> None:
        self.seen, self.parameters = seen, parameters
        count = seen.num_channels
        same = [*seen.same, *_used_again(seen)]
        self.channel = _components(count, same)
        self.factor = _components(count, [*same, *seen.merged])
        self.source = torch.cat(
            [torch.zeros(0, dtype=torch.long, device="cpu"), *seen.source_of]
        ).numpy()
        self.sign = np.ones(count)
        for inverse in seen.inverse:
            self.sign[inverse.numpy()] = -1.0
        self._starts = np.array([place.start for place in parameters.places()])

    @cached_property
    def parts(self) -> list[Part]:
        """The actions, cut by sign."""
        found = list[Part]()
        for action in self.seen.actions:
            entries, channels = self._apart(action.entries.numpy(), action.channels.numpy())
            for sign in (1.0, -1.0):
                chosen = self.sign[channels] == sign
                if chosen.any():
                    found.append(
                        Part(
                            len(found),
                            entries[chosen],
                            channels[chosen],
                            sign * action.exponent,
                            action.use,
                            action.shift,
                        )
                    )
        return found

    def _apart(self, entries: np.ndarray, channels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Without what is there once more, because channels have turned out to be the same."""
        if not (entries[1:] == entries[:-1]).any():
            return entries, channels
        pairs = np.stack([entries, self.channel[channels]])
        _, first = np.unique(pairs, axis=1, return_index=True)
        return entries[first], channels[first]

    @cached_property
    def _uses(self) -> np.ndarray:
        """How many operations read each entry."""
        uses = np.zeros(self.parameters.size, dtype=np.int64)
        for entries in self.seen.uses:
            uses[entries.numpy()] += 1
        return uses

    @cached_property
    def _scratch(self) -> np.ndarray:
        """A place for each entry, by which a few are known again."""
        return np.zeros(self.parameters.size, dtype=np.int64)

    @cached_property
    def _labels(self) -> np.ndarray:
        """A number for each channel by which its factor is known."""
        drawn = np.random.default_rng(0).random(self.factor.max(initial=-1) + 1)
        return np.asarray(drawn[self.factor])

    def _by_factor(self, found: dict[str, list[Tensor]]) -> dict[str, np.ndarray]:
        """For each name the factors that have it."""
        sets = dict[str, np.ndarray]()
        for name, channels in found.items():
            has = np.zeros(self.factor.max(initial=-1) + 1, dtype=bool)
            for each in channels:
                has[self.factor[each.numpy()]] = True
            sets[name] = has
        return sets

    @cached_property
    def marks(self) -> dict[str, np.ndarray]:
        """What factors go through."""
        return self._by_factor(self.seen.marks)

    @cached_property
    def broken(self) -> dict[str, np.ndarray]:
        """What factors do not go through."""
        return self._by_factor(self.seen.broken)

    def sets_of(self, sets: dict[str, np.ndarray], factors: np.ndarray) -> set[str]:
        """The names that some factors have."""
        return {name for name, has in sets.items() if has[factors].any()}

    def layers(self, entries: np.ndarray) -> tuple[str, ...]:
        """Layers that have entries, in order."""
        numbers = distinct_of(np.searchsorted(self._starts, entries, side="right") - 1)
        return tuple(dict.fromkeys(self.parameters[int(number)].layer for number in numbers))

    def tell(self, name: str, entries: np.ndarray, is_padded: bool) -> Told:
        """What a family of constants is, and what may break it."""
        causes = [_CAUSES["padding_idx"]] if is_padded else []
        more = entries[self._uses[entries] > 1]
        if len(more):
            causes.append(f"{self._named(more[0])} is used elsewhere too")
        return Told(name=name, layers=self.layers(entries), causes=tuple(causes))

    def _named(self, entry: int) -> str:
        number = int(np.searchsorted(self._starts, entry, side="right") - 1)
        return str(self.parameters[number].name)

    def families(self) -> Iterator[Family]:
        """All of them."""
        for factors, parts in self.groups():
            yield from self._group(factors, parts)
        yield from self._shifts()

    # -- factors ---------------------------------------------------------------------------------

    def groups(self) -> Iterator[tuple[np.ndarray, list[Part]]]:
        """Factors that act on the same parameters in the same way, and what they do."""
        acting = defaultdict[int, list[int]](list)
        for part in self.parts:
            for factor in distinct_of(self.factor[part.channels]):
                acting[int(factor)].append(part.number)
        names = [*self.marks, *self.broken]
        sets = [*self.marks.values(), *self.broken.values()]
        groups = defaultdict[tuple[tuple[int, ...], tuple[str, ...]], list[int]](list)
        for factor, numbers in acting.items():
            has = tuple(name for name, each in zip(names, sets, strict=True) if each[factor])
            groups[tuple(numbers), has].append(factor)
        for (alike, _), factors in groups.items():
            yield np.sort(np.array(factors)), [self.parts[number] for number in alike]

    def _group(self, factors: np.ndarray, parts: list[Part]) -> Iterator[Family]:
        marks, broken = self.sets_of(self.marks, factors), self.sets_of(self.broken, factors)
        undone = any(part.exponent < 0 for part in parts)
        if not (undone or "normalised" in marks) or broken - _TOLD.keys():
            return
        channels = np.isin(self.factor, factors)
        kinds = self.kinds(channels)
        every = [self.within(part, channels) for part in parts]
        told, few = self._told(_name(marks, kinds, undone), every, marks, broken), once(every)
        free = kinds <= {"map", "embedding", "tensor"} and all(abs(p.exponent) == 1 for p in few)
        if free and "turned" in marks:
            yield from self._planes(factors, few, told, marks)
        elif free and undone and not marks & {"diagonal", "activation", "gated", "normalised"}:
            mixed = list(self._mixed(few, told))
            if mixed:
                yield from mixed
                return
        yield self.scaled(factors, few, told)

    def kinds(self, channels: np.ndarray) -> set[Kind]:
        """What some channels, as a mask, are of."""
        return {self.seen.sources[number] for number in distinct_of(self.source[channels])}

    def within(self, part: Part, channels: np.ndarray) -> Part:
        """What is done to some channels."""
        chosen = channels[part.channels]
        entries, own = part.entries[chosen], part.channels[chosen]
        return Part(part.number, entries, own, part.exponent, part.use, part.shift)

    def _told(self, name: str, parts: list[Part], marks: set[str], broken: set[str]) -> Told:
        entries = np.concatenate([part.entries for part in parts])
        causes = [_TOLD[each] for each in sorted(broken)]
        causes += [_CAUSES[each] for each in ("clipped", "padding_idx") if each in marks]
        tied = self._elsewhere(parts)
        if tied:
            causes.append(f"{tied} is used elsewhere too")
        return Told(
            name=name, layers=self.layers(entries), causes=tuple(causes), eps="eps" in marks
        )

    def _elsewhere(self, parts: list[Part]) -> str | None:
        """A parameter that is read by more than what these account for, or not in one way."""
        every = np.concatenate([part.entries for part in parts])
        if (self._uses[every] == 1).all():  # which is that of these
            return None
        self._scratch[every] = np.arange(len(every))
        covered, done, unlike = np.zeros((3, len(every)))
        for use in {part.use for part in parts}:
            own, acted = np.zeros((2, len(every)))
            for part in parts:
                if part.use == use:
                    places = self._scratch[part.entries]
                    rates = part.exponent * self._labels[part.channels]
                    own += np.bincount(places, rates, len(every))
                    acted[places] = 1
            unlike += (acted > 0) & (covered > 0) & (abs(done - own) > 1e-9)
            done, covered = np.where(acted > 0, own, done), covered + acted
        places = self._scratch[every]
        more = every[(self._uses[every] > covered[places]) | (unlike[places] > 0)]
        return self._named(more[0]) if len(more) else None

    def scaled(self, factors: np.ndarray, parts: Sequence[Part], told: Told) -> Scaling:
        """Each factor by itself."""
        numbers = np.concatenate([self.factor[part.channels] for part in parts])
        channel = np.searchsorted(factors, numbers)
        exponent = np.concatenate([np.full(len(p.entries), p.exponent) for p in parts])
        return Scaling(
            told,
            torch.from_numpy(np.concatenate([part.entries for part in parts])),
            torch.from_numpy(channel),
            torch.from_numpy(exponent),
            len(factors),
        )

    # -- matrices --------------------------------------------------------------------------------

    @cached_property
    def _blocks(self) -> np.ndarray:
        """Which block of channels that may be mixed each is in."""
        apart = np.zeros(self.seen.num_channels, dtype=bool)
        for name in ("attended", "paired"):
            for channels in self.seen.marks.get(name, []):
                apart[channels.numpy()] = True
        free = [pairs[:, ~apart[pairs[0].numpy()]] for pairs in self.seen.map_rows]
        return _components(self.seen.num_channels, [*self.seen.same, *self.seen.rows, *free])

    def _mixed(self, parts: list[Part], told: Told) -> Iterator[Family]:
        """Blocks of equal size as one family; none where channels are no counterparts."""
        channels = distinct_of(np.concatenate([part.channels for part in parts]))
        blocks = defaultdict[int, set[int]](set)
        for channel in channels:
            blocks[int(self._blocks[channel])].add(int(self.channel[channel]))
        merged = len(np.unique(self.factor[channels])) < len(np.unique(self.channel[channels]))
        if merged and "turned" not in self.sets_of(self.marks, self.factor[channels]):
            return
        yield from self._matrices([sorted(block) for block in blocks.values()], parts, told)

    def _matrices(
        self,
        blocks: list[list[int]],
        parts: list[Part],
        told: Told,
        algebra: Algebra = "general",
    ) -> Iterator[Family]:
        if all(len(block) == 1 for block in blocks):
            return
        tables = [by_channel(part, self.channel) for part in parts]
        alike = defaultdict[tuple[int, ...], list[list[int]]](list)
        for block in blocks:
            sizes = [{len(table.get(channel, ())) for channel in block} for table in tables]
            if any(len(size) != 1 for size in sizes):
                return
            alike[len(block), *(size.pop() for size in sizes)].append(block)
        for same in alike.values():
            ahead, behind = list[Tensor](), list[Tensor]()
            for table, part in zip(tables, parts, strict=True):
                if same[0][0] in table:
                    rows = np.stack([np.stack([table[c] for c in block]) for block in same])
                    (ahead if part.exponent > 0 else behind).append(torch.from_numpy(rows))
            if ahead and behind:
                yield Mixing(told, tuple(ahead), tuple(behind), algebra)

    def _planes(
        self, factors: np.ndarray, parts: list[Part], told: Told, marks: set[str]
    ) -> Iterator[Family]:
        """What rotary positions leave: the rotations of each plane; and what they break."""
        planes = list[list[int]]()
        for factor in factors:
            plane = np.unique(self.channel[self.factor == factor])
            if len(plane) == 2:
                planes.append([int(each) for each in plane])
        name = f"{told.name} rotation"
        turned = Told(name=name, layers=told.layers, causes=told.causes, eps=told.eps)
        if planes:
            yield from self._matrices(planes, parts, turned, "rotation")
        if "paired" in marks:
            causes = (*told.causes, _CAUSES["turned"])
            whole = Told(name="query-key", layers=told.layers, causes=causes, eps=told.eps)
            yield from self._mixed(parts, whole)

    # -- constants -------------------------------------------------------------------------------

    def _shifts(self) -> Iterator[Family]:
        done = set[tuple[object, ...]]()
        for shift in self.seen.shifts:
            rows = np.unique(self.channel[shift.rows.numpy()], axis=0)
            key = shift.name, rows.tobytes()
            if key in done or rows.shape[1] != len(np.unique(rows[0])):
                continue
            done.add(key)
            family = self._constants(shift) if rows.shape[1] == 1 else self._same(shift.name, rows)
            groups = [group for group in family if group[1].size]
            if groups:
                yield from self._translations(shift, rows, groups)

    def _constants(self, shift: Shift) -> list[tuple[Part, np.ndarray]]:
        """Parameters that are added to channels, each by itself."""
        wanted = np.zeros(self.seen.num_channels, dtype=bool)
        wanted[shift.rows[:, 0].numpy()] = True
        found = [self.within(part, wanted) for part in self.parts if part.shift]
        return [(part, part.entries[:, None]) for part in found if len(part.entries)]

    def _same(self, name: str, rows: np.ndarray) -> list[tuple[Part, np.ndarray]]:
        """Columns of parameters whose rows are the channels of a row."""
        found = list[tuple[Part, np.ndarray]]()
        wanted = np.isin(self.channel, rows)
        for part in self.parts:
            few = self.within(part, wanted)
            if not len(few.entries) or few.exponent != 1:
                continue
            if not few.shift and (name == "group norm" or self._kind(few) not in _SUMMED):
                continue
            table = by_channel(few, self.channel)
            for row in rows:
                columns = [table[int(channel)] for channel in row if int(channel) in table]
                if len(columns) == len(row) and len(set(map(len, columns))) == 1:
                    found.append((few, np.stack(columns).T))
        return found

    def _kind(self, part: Part) -> str:
        return self.seen.sources[int(self.source[part.channels[0]])]

    def _translations(
        self, shift: Shift, rows: np.ndarray, groups: list[tuple[Part, np.ndarray]]
    ) -> Iterator[Family]:
        factors = np.unique(self.factor[np.isin(self.channel, rows)])
        marks, broken = self.sets_of(self.marks, factors), self.sets_of(self.broken, factors)
        ends = {"softmax"} if shift.name == "softmax" else set()
        if broken - ends or (shift.name != "keys" and marks & {"read", "activation", "gated"}):
            return
        causes = [_CAUSES["padding_idx"]] if "padding_idx" in marks else []
        if shift.name == "keys" and "turned" in marks:
            causes.append(_CAUSES["turned"])
        if shift.name == "RMS norm" and "summed" not in marks:
            return  # of which nobody thinks
        if shift.name in ("layer norm", "RMS norm") and "RMS norm" in marks:
            causes.append(_CAUSES["RMS norm"])
        parts = [
            Part(part.number, entries.reshape(-1), part.channels, 1.0, part.use, part.shift)
            for part, entries in groups
        ]
        groups = list({entries.tobytes(): (part, entries) for part, entries in groups}.values())
        tied = self._elsewhere(parts)
        if tied:
            causes.append(f"{tied} is used elsewhere too")
        every = np.concatenate([entries.reshape(-1) for _, entries in groups])
        names = {
            "softmax": "softmax head",
            "keys": "key bias",
            "batch norm": "bias before batch norm",
            "group norm": "bias before group norm",
            "layer norm": "residual shift",
            "RMS norm": "residual shift",
        }
        told = Told(name=names[shift.name], layers=self.layers(every), causes=tuple(causes))
        yield Translation(told, tuple(torch.from_numpy(entries) for _, entries in groups))


def once(parts: Sequence[Part]) -> list[Part]:
    """Without those of a second use that does just what the first does."""
    kept = dict[tuple[object, ...], Part]()
    for part in parts:
        kept.setdefault((part.exponent, part.shift, part.entries.tobytes()), part)
    return list(kept.values())


def distinct_of(numbers: np.ndarray) -> np.ndarray:
    """Each of some numbers from 0 once, in order."""
    there = np.zeros(numbers.max(initial=-1) + 1, dtype=bool)
    there[numbers] = True
    return np.flatnonzero(there)


def by_channel(part: Part, channel: np.ndarray) -> dict[int, np.ndarray]:
    """A part's entries by channel, in their order."""
    own = channel[part.channels]
    order = np.argsort(own, kind="stable")  # entries are in order
    numbers, starts = np.unique(own[order], return_index=True)
    pieces = np.split(part.entries[order], starts[1:])
    return {int(number): piece for number, piece in zip(numbers, pieces, strict=True)}


def _name(marks: set[str], kinds: set[Kind], undone: bool) -> str:
    """What the field calls it."""
    if "paired" in marks:
        return "query-key plane" if "turned" in marks else "query-key"
    if not undone:
        if "batch norm" in marks:
            return "map before batch norm"
        return "residual writers" if "summed" in marks else "map before a norm"
    if kinds <= {"norm", "gain"}:
        return "norm gain" if "norm" in kinds else "gain"
    if "scaled" in marks:
        return "gain"
    if "gated" in marks:
        return "gated unit"
    if "attended" in marks:
        return "value-output"
    return "homogeneous activation" if "activation" in marks else "linear maps"
