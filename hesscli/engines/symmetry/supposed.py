"""What one may suppose to be a symmetry, and is none: it is put to the test like all others.

The size of queries, which softmax sees; that of one map whose outcome is added to others' before a
norm; and what norms of queries and keys leave of the groups between the two, which is nothing. Each
is proposed once for all layers, so that an answer says it in a line.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hesscli.engines.symmetry.candidates import Factors, Part, by_channel, once
from hesscli.engines.symmetry.families import Family, Mixing, Scaling, Told, Translation
from hesscli.engines.symmetry.seen import Heads

_SOFTMAX = "the softmax, which sees the size of scores"
_SUM = "what it is added to, which does not scale with it"
_NORMS = "a norm of queries and keys"


@dataclass(frozen=True)
class _Pair:
    """Maps of queries and keys: channels ``(groups, heads, r)`` and ``(groups, 1, r)``."""

    queries: np.ndarray
    keys: np.ndarray
    planes: tuple[tuple[int, ...], ...]
    """Numbers among r of channels that rotary positions turn into each other."""


class Supposed:
    """Families that attention and residual streams suggest.

    Args:
        factors: of the channels of a pass.
    """

    def __init__(self, factors: Factors) -> None:
        self.factors = factors

    def families(self) -> Iterator[Family]:
        """All of them."""
        yield from self._sizes()
        yield from self._writers()
        yield from self._key_biases()
        yield from self._groups()

    # -- what is where ---------------------------------------------------------------------------

    @cached_property
    def _heads(self) -> list[Heads]:
        """Those whose scores a softmax reads, each attention once."""
        seen = self.factors.seen
        read = [shift.rows.reshape(-1) for shift in seen.shifts if shift.name == "keys"]
        every = torch.cat([torch.zeros(0, dtype=torch.long, device="cpu"), *read])
        found = {
            (heads.queries.numpy().tobytes(), heads.keys.numpy().tobytes()): heads
            for heads in seen.heads
            if bool(torch.isin(heads.keys, every).all())
        }
        return list(found.values())

    def _kind(self, channels: np.ndarray) -> set[str]:
        sources = self.factors.source[channels.reshape(-1)]
        return {self.factors.seen.sources[number] for number in np.unique(sources)}

    @cached_property
    def _behind(self) -> dict[int, list[int]]:
        """Of each gain of a norm the channels that go into it, in their order."""
        found = defaultdict[int, list[int]](list)
        pairs = torch.cat(
            [torch.zeros(2, 0, dtype=torch.long, device="cpu"), *self.factors.seen.gained], dim=1
        )
        for channel, gain in torch.unique(pairs, dim=1).T.tolist():
            found[gain].append(channel)
        return found

    def _maps(self, rows: Tensor) -> np.ndarray | None:
        """Channels ``(heads, r)`` of the maps whose norms have these gains; None if not of maps."""
        found = list[np.ndarray]()
        for row in torch.unique(rows, dim=0).tolist():
            every = [self._behind.get(gain, []) for gain in row]
            if len({len(each) for each in every}) > 1 or not every[0]:
                return None
            found.append(np.array(every).T)
        whole = np.concatenate(found)
        return whole if self._kind(whole) == {"map"} else None

    def _acting(self, channels: np.ndarray) -> list[Part] | None:
        """What is done to channels by the maps that make them; None where more is."""
        mask = np.zeros(self.factors.seen.num_channels, dtype=bool)
        mask[channels.reshape(-1)] = True
        every = [self.factors.within(part, mask) for part in self.factors.parts]
        few = once([part for part in every if len(part.entries)])
        made = (part.exponent == self.factors.sign[part.channels[0]] for part in few)
        return few if few and all(made) else None

    def _told(self, name: str, entries: Sequence[Tensor], cause: str) -> Told:
        every = torch.cat([each.reshape(-1) for each in entries]).numpy()
        return Told(name=name, layers=self.factors.layers(every), causes=(cause,))

    # -- sizes -----------------------------------------------------------------------------------

    def _scaled(
        self, name: str, parts: list[Part], number: np.ndarray, size: int, cause: str
    ) -> Scaling:
        """Channels by their numbers, whatever else would have to be scaled back."""
        index = torch.from_numpy(np.concatenate([part.entries for part in parts]))
        channel = torch.from_numpy(np.concatenate([number[part.channels] for part in parts]))
        told = self._told(name, [index], cause)
        return Scaling(
            told, index, channel, torch.ones(len(index), dtype=torch.float64, device="cpu"), size
        )

    def _sizes(self) -> Iterator[Family]:
        """Each head's queries by themselves."""
        number, size = np.full(self.factors.seen.num_channels, -1), 0
        for heads in self._heads:
            rows = torch.unique(heads.queries, dim=0).numpy()
            if self._kind(rows) == {"map"} and not np.isin(rows, heads.keys.numpy()).any():
                number[rows] = size + np.arange(len(rows))[:, None]
                size += len(rows)
        parts = self._acting(np.flatnonzero(number >= 0)) if size else None
        if parts:
            yield self._scaled("query scale", parts, number, size, _SOFTMAX)

    def _writers(self) -> Iterator[Family]:
        """Each map that writes to a residual stream by itself."""
        factors = self.factors
        for numbers, parts in factors.groups():
            marks = factors.sets_of(factors.marks, numbers)
            if not {"normalised", "summed"} <= marks or factors.sets_of(factors.broken, numbers):
                continue
            whole = np.isin(factors.factor, numbers)
            few = once([factors.within(part, whole) for part in parts])
            sources = np.unique(factors.source[whole])
            if len(sources) > 1 and all(part.exponent == 1 for part in few):
                number = np.searchsorted(sources, factors.source)
                yield self._scaled("single writer", few, number, len(sources), _SUM)

    # -- behind norms of queries and keys --------------------------------------------------------

    @cached_property
    def _pairs(self) -> list[_Pair]:
        found = list[_Pair]()
        for heads in self._heads:
            queries, keys = self._maps(heads.queries), self._maps(heads.keys)
            if queries is None or keys is None or np.isin(queries, keys).any():
                continue
            if len(queries) % len(keys):
                continue
            turned = self.factors.factor[heads.keys[0].numpy()]
            planes = [np.flatnonzero(turned == each).tolist() for each in np.unique(turned)]
            rank = keys.shape[1]
            found.append(
                _Pair(
                    queries.reshape(len(keys), -1, rank),
                    keys[:, None],
                    tuple(tuple(plane) for plane in planes if len(plane) == 2),
                )
            )
        return found

    def _key_biases(self) -> Iterator[Family]:
        biases = list[Tensor]()
        for heads in self._heads:
            maps = self._maps(heads.keys)
            parts = None if maps is None else self._acting(maps)
            biases += [torch.from_numpy(part.entries) for part in parts or () if part.shift]
        if biases:
            every = torch.unique(torch.cat(biases))[:, None]
            yield Translation(self._told("key bias", [every], _NORMS), (every,))

    def _table(self, channels: np.ndarray) -> list[Tensor] | None:
        """Entries ``(groups, r, ·)`` of maps, part by part; None where channels are unlike."""
        groups, _, rank = channels.shape
        number = np.full(self.factors.seen.num_channels, -1)
        number[channels] = (np.arange(groups)[:, None] * rank + np.arange(rank))[:, None]
        found = list[Tensor]()
        for part in self._acting(channels) or ():
            rows = by_channel(part, number)
            if len(rows) != groups * rank or len({len(row) for row in rows.values()}) > 1:
                return None
            stacked = np.stack([rows[each] for each in range(groups * rank)])
            found.append(torch.from_numpy(stacked.reshape(groups, rank, -1)))
        return found or None

    def _groups(self) -> Iterator[Family]:
        """Matrices between queries and keys, and what rotary positions would leave of them."""
        alike = defaultdict[tuple[object, ...], list[tuple[list[Tensor], list[Tensor]]]](list)
        for pair in self._pairs:
            ahead, behind = self._table(pair.queries), self._table(pair.keys)
            if ahead and behind:
                shapes = (tuple(each.shape[1:] for each in side) for side in (ahead, behind))
                alike[(pair.planes, *shapes)].append((ahead, behind))
        for (planes, *_), found in alike.items():
            one, other = (
                tuple(torch.cat(parts) for parts in zip(*side, strict=True))
                for side in zip(*found, strict=True)
            )
            yield Mixing(self._told("query-key", [*one, *other], _NORMS), one, other)
            if planes:
                pairs = torch.tensor(planes, device="cpu")
                yield from self._planes([e[:, pairs] for e in one], [e[:, pairs] for e in other])

    def _planes(self, ahead: list[Tensor], behind: list[Tensor]) -> Iterator[Family]:
        """Entries ``(groups, planes, 2, ·)``: a scale and a rotation of each plane."""
        one, other = (tuple(each.flatten(0, 1) for each in side) for side in (ahead, behind))
        every = [*one, *other]
        planes = [
            torch.arange(len(each), device="cpu").repeat_interleave(each[0].numel())
            for each in every
        ]
        signs = [
            torch.full((each.numel(),), sign, device="cpu").double()
            for side, sign in ((one, 1.0), (other, -1.0))
            for each in side
        ]
        yield Scaling(
            self._told("query-key plane", every, _NORMS),
            torch.cat([each.reshape(-1) for each in every]),
            torch.cat(planes),
            torch.cat(signs),
            len(one[0]),
        )
        yield Mixing(self._told("query-key plane rotation", every, _NORMS), one, other, "rotation")
