"""What a pass has shown of channels: what they scale, what binds them, what stops them."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["map", "embedding", "gain", "norm", "tensor"]
"""What channels are of."""


@dataclass(frozen=True)
class Flow:
    """How a tensor depends on some channels: each of its numbers on one.

    Attributes:
        labels: the channel of each number.
        degree: the power of the channel's factor that it has.
        linear: whether nothing but linear maps was on the way.
    """

    labels: Tensor
    degree: float = 1.0
    linear: bool = True

    def through(self, labels: Tensor, *, degree: float = 1.0, linear: bool = True) -> Flow:
        """The same further on."""
        return Flow(labels.contiguous(), self.degree * degree, self.linear and linear)


@dataclass(frozen=True)
class Action:
    """Entries of a parameter that a channel's factor multiplies, to some power.

    Attributes:
        entries: flat.
        channels: of each.
        exponent: of the factor.
        use: the operation that reads them.
        shift: they are added, so that a constant could be.
    """

    entries: Tensor
    channels: Tensor
    exponent: float
    use: int
    shift: bool = False


@dataclass(frozen=True)
class Shift:
    """Channels to all of which one constant could be added, or to each one of its own.

    Attributes:
        name: of the family.
        rows: channels ``(rows, ·)`` that get the same.
    """

    name: str
    rows: Tensor


@dataclass(frozen=True)
class Normed:
    """A norm over channels, with a gain for each.

    Attributes:
        row: channels ``(n,)`` that it is over.
        gain: entries of theirs.
        bias: of the same; None where there is none.
        channels: of what comes out.
        has_mean: whether a mean is taken away first.
    """

    row: Tensor
    gain: Tensor
    bias: Tensor | None
    channels: Tensor
    has_mean: bool


@dataclass(frozen=True)
class Anchor:
    """A batch norm whose statistics are fixed.

    Attributes:
        channels: ``(n,)`` that go in.
        gain: entries of theirs.
        bias: of the same.
        shift: mean over deviation.
    """

    channels: Tensor
    gain: Tensor
    bias: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Heads:
    """Scores of attention.

    Attributes:
        queries: channels ``(heads, r)``.
        keys: those that they meet, alike.
    """

    queries: Tensor
    keys: Tensor


@dataclass
class Seen:
    """What a pass has shown.

    Attributes:
        sources: what every channel belongs to: the kind of it.
        source_of: its number, for each channel.
        actions: on entries.
        same: pairs of channels that must have one factor.
        merged: pairs that must besides, without being parts of one sum.
        rows: pairs of channels that matrices may mix.
        map_rows: those that may where no head keeps them apart.
        inverse: channels whose factor is the inverse of what they are paired with.
        marks: what channels went through.
        broken: what no factor goes through.
        shifts: of constants.
        norms: over channels, with gains.
        gained: pairs of a channel that goes into a norm, and of its gain's.
        heads: that attend.
        anchors: with fixed statistics.
        uses: entries that an operation reads, one after the other.
    """

    sources: list[Kind] = field(default_factory=list)
    source_of: list[Tensor] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)
    same: list[Tensor] = field(default_factory=list)
    merged: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    map_rows: list[Tensor] = field(default_factory=list)
    inverse: list[Tensor] = field(default_factory=list)
    marks: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    broken: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    shifts: list[Shift] = field(default_factory=list)
    norms: list[Normed] = field(default_factory=list)
    gained: list[Tensor] = field(default_factory=list)
    heads: list[Heads] = field(default_factory=list)
    anchors: list[Anchor] = field(default_factory=list)
    uses: list[Tensor] = field(default_factory=list)
    num_channels: int = 0
    _firsts: list[int] = field(default_factory=list)

    def new(self, kind: Kind, count: int) -> Tensor:
        """Channels of a source of their own."""
        first = self.num_channels
        self.num_channels += count
        self.source_of.append(torch.full((count,), len(self.sources), device="cpu"))
        self._firsts.append(first)
        self.sources.append(kind)
        return torch.arange(first, first + count, device="cpu")

    def source(self, labels: Tensor) -> int:
        """The number of the source that channels are of, by the first of them."""
        return bisect_right(self._firsts, int(labels.reshape(-1)[0])) - 1

    def used(self, entries: Tensor) -> int:
        """An operation that reads entries."""
        self.uses.append(distinct(entries))
        return len(self.uses) - 1

    def act(
        self, entries: Tensor, channels: Tensor, exponent: float, use: int, *, shift: bool = False
    ) -> None:
        """Let channels scale entries, each once."""
        entry, channel = _pairs(entries.reshape(-1), channels.expand_as(entries).reshape(-1))
        self.same.append(_linked(entry, channel))
        self.actions.append(Action(entry, channel, exponent, use, shift))

    def are_paired(self, entries: Tensor, channels: Tensor) -> bool:
        """Whether each entry meets one channel, and each channel one entry."""
        pairs = _pairs(entries.reshape(-1), channels.expand_as(entries).reshape(-1))
        return all(len(torch.unique(side)) == pairs.shape[1] for side in pairs)

    def mark(self, name: str, *flows: Flow) -> None:
        """Take note of what channels go through."""
        self.marks[name] += [distinct(flow.labels) for flow in flows]

    def stop(self, cause: str, flows: Sequence[Flow]) -> None:
        """No factor of these gets any further."""
        self.broken[cause] += [distinct(flow.labels) for flow in flows]

    def require(self, one: Tensor, other: Tensor, into: list[Tensor]) -> bool:
        """Let two have the same factors, number by number; whether they had not."""
        one, other = one.reshape(-1), other.expand_as(one).reshape(-1)
        unlike = one != other
        pairs = _pairs(one[unlike], other[unlike])
        into.append(pairs)
        return bool(pairs.shape[1])

    def mixable(self, rows: Tensor, into: list[Tensor]) -> None:
        """Let the channels of each row be mixed, as far as these rows say."""
        rows = torch.unique(rows, dim=0)
        into.append(torch.stack([rows[:, :-1].reshape(-1), rows[:, 1:].reshape(-1)]))


def distinct(numbers: Tensor) -> Tensor:
    """Each of some numbers once, in order; they lie close, so that nothing need be sorted."""
    if not numbers.numel():
        return numbers.reshape(-1)
    first, last = (int(end) for end in numbers.aminmax())
    there = torch.zeros(last - first + 1, dtype=torch.bool, device="cpu")
    there[numbers.reshape(-1) - first] = True
    return there.nonzero()[:, 0] + first


def _pairs(one: Tensor, other: Tensor) -> Tensor:
    """Each pair of numbers once, ``(2, ·)``, in their order."""
    if not one.numel():
        return torch.zeros(2, 0, dtype=torch.long, device="cpu")
    width = int(other.max()) + 1
    found = torch.unique(one * width + other)
    return torch.stack([found // width, found % width])


def _linked(entries: Tensor, channels: Tensor) -> Tensor:
    """Pairs of channels that one and the same entry has."""
    repeated = entries[1:] == entries[:-1]
    return torch.stack([channels[:-1][repeated], channels[1:][repeated]])
