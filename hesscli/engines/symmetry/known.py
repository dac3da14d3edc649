"""What is known of the tensors of a pass while it is watched: their channels, or their entries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor

from hesscli.engines.symmetry.seen import Flow, Normed, Seen, Shift, distinct

Key = tuple[Any, ...]
"""A tensor's place in memory and its layout, by which the same numbers are known again."""

SMALL = 1e-2
"""Constants up to this are there for a division's sake."""


def key_of(tensor: Tensor) -> Key:
    """Where it is, as long as it is there."""
    place = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return (*place, tuple(tensor.shape), tensor.stride())


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """All tensors of nested tuples and lists."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for each in tree:
            yield from tensors_in(each)


def varies(numbers: Tensor, dim: int) -> bool:
    """Whether they are not the same all along a dimension."""
    return numbers.shape[dim] > 1 and bool((numbers != numbers.narrow(dim, 0, 1)).any())


def scored(value: Any, scores: dict[Key, Tensor]) -> bool:
    """Whether a value is the scores of some keys."""
    return isinstance(value, Tensor) and key_of(value) in scores


@dataclass(frozen=True)
class Call:
    """One operation, and where to put what is known of its results."""

    func: Any
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    flows: dict[Key, list[Flow]] = field(default_factory=dict)
    entries: dict[Key, Tensor] = field(default_factory=dict)
    scores: dict[Key, Tensor] = field(default_factory=dict)

    def give(self, flows: list[Flow], out: Tensor | None = None) -> None:
        """Let a result have flows."""
        if flows:
            self.flows[key_of(self.result if out is None else out)] = flows


@dataclass
class Known:
    """What is known so far.

    Attributes:
        seen: all that the pass has shown.
        entries: of views of parameters, the place of each number in the flat vector.
        flows: of what was computed.
        scores: of attention, the channels of its keys.
        live: what depends on parameters.
        normal: what was divided by its own size: the channels that this was of.
        halves: pairs of channels of planes, the first of which has been a sum's.
    """

    seen: Seen = field(default_factory=Seen)
    entries: dict[Key, Tensor] = field(default_factory=dict)
    flows: dict[Key, list[Flow]] = field(default_factory=dict)
    scores: dict[Key, Tensor] = field(default_factory=dict)
    live: set[Key] = field(default_factory=set)
    normal: dict[Key, Tensor] = field(default_factory=dict)
    halves: set[tuple[bytes, bytes]] = field(default_factory=set)

    def is_entries(self, value: Any) -> TypeGuard[Tensor]:
        """Whether a value is a view of a parameter."""
        return isinstance(value, Tensor) and key_of(value) in self.entries

    def flows_of(self, value: Any) -> list[Flow]:
        """The flows of a value, if it has any."""
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return []
        return self.flows.get(key_of(value), [])

    def promoted(self, value: Any) -> list[Flow]:
        """The flows of a tensor, a parameter's being those of its last dimension."""
        if not self.is_entries(value):
            return self.flows_of(value)
        entries = self.entries[key_of(value)]
        if not entries.dim():
            return []
        channels = self.seen.new("tensor", entries.shape[-1])
        labels = channels.expand_as(entries)
        self.seen.act(entries, labels, 1.0, self.seen.used(entries), shift=True)
        return [Flow(labels.contiguous())]

    def unknown(self, call: Call) -> None:
        """An operation of which nothing is known: no factor goes through it."""
        for tensor in tensors_in((call.args, tuple(call.kwargs.values()))):
            if self.is_entries(tensor):
                self.seen.used(self.entries[key_of(tensor)])
            self.seen.stop(call.name, self.flows_of(tensor))

    def use_others(self, call: Call) -> None:
        """Let parameters count as read that are no factor's."""
        for tensor in tensors_in(call.args[1:]):
            if self.is_entries(tensor):
                self.seen.used(self.entries[key_of(tensor)])

    def merge(self, labels: Tensor, dims: Sequence[int]) -> tuple[Tensor, bool]:
        """One label along some dimensions, for which all must have one factor."""
        first = labels
        for dim in dims:
            first = first.narrow(dim, 0, 1)
        merged = self.seen.require(labels, first, self.seen.merged)
        return first, merged

    def is_own(self, one: Tensor, other: Tensor) -> bool:
        """Whether two are channels of one source."""
        return self.seen.source(one) == self.seen.source(other)

    def turned(self, one: Tensor, other: Tensor) -> Tensor:
        """The channels that a sum of two channels of a plane stands for, the first or the second.

        Where halves are turned one by one, there are two sums of the same two.
        """
        pair = distinct(one), distinct(other)
        key = pair[0].numpy().tobytes(), pair[1].numpy().tobytes()
        is_second = key in self.halves and not bool(torch.isin(*pair).any())
        self.halves.add(key)
        return other if is_second else one

    def with_constant(self, flows: list[Flow], value: Any, shape: torch.Size) -> list[Flow]:
        """A sum with what has no channels."""
        if isinstance(value, Tensor):
            if value.numel() == 1 and key_of(value) not in self.live:
                value = value.item()
            elif not bool(value.any()) and key_of(value) not in self.live:
                value = 0.0
        if isinstance(value, (int, float)) and abs(value) <= SMALL:
            if value:
                self.seen.mark("eps", *flows)
            return [flow.through(flow.labels.expand(shape)) for flow in flows]
        self.seen.stop("added to what does not scale", flows)
        return []

    def meets_factor(self, flows: Sequence[Flow], factor: Any, shape: torch.Size) -> None:
        """A factor that differs by channel lets each only be scaled by itself."""
        if not isinstance(factor, Tensor) or factor.numel() == 1:
            return
        spread = factor.detach().expand(shape)
        for flow in flows:
            labels = flow.labels.expand(shape)
            if any(varies(labels, d) and varies(spread, d) for d in range(labels.dim())):
                self.seen.mark("diagonal", flow)
                if key_of(factor) in self.live and not self.is_entries(factor):
                    self.seen.mark("gated", flow)

    def normed(
        self, labels: Tensor, gain: Tensor, bias: Any, channels: Tensor, *, has_mean: bool
    ) -> None:
        """Take note of a norm over a last dimension, if it is of the same channels everywhere."""
        entries = self.entries[key_of(gain)].reshape(-1)
        rows = labels.reshape(-1, labels.shape[-1])
        if len(entries) != rows.shape[1] or bool((rows != rows[:1]).any()):
            return
        added = self.entries[key_of(bias)].reshape(-1) if self.is_entries(bias) else None
        if not has_mean:
            self.seen.mark("RMS norm", Flow(rows[0]))
            self.seen.shifts.append(Shift("RMS norm", rows[:1]))
        self.seen.norms.append(Normed(rows[0], entries, added, channels, has_mean))

    def gain(
        self,
        parameter: Tensor,
        other: Any,
        shape: torch.Size,
        degree: float,
        undone: Sequence[Flow] = (),
    ) -> Flow:
        """A parameter that multiplies: its entries are channels, and undo what scales others."""
        entries = self.entries[key_of(parameter)]
        own, place = torch.unique(entries, return_inverse=True)
        follows_norm = isinstance(other, Tensor) and key_of(other) in self.normal
        channels = self.seen.new("norm" if follows_norm else "gain", len(own))
        use = self.seen.used(entries)
        self.seen.act(own, channels, 1.0, use)
        for flow in undone:
            self.seen.act(entries.expand(shape), flow.labels, -flow.degree / degree, use)
            self.seen.mark("scaled", flow)
            self.seen.mark("diagonal", flow)
        if follows_norm and degree == 1:
            labels = self.normal[key_of(other)]
            self.normed(labels, parameter, None, channels, has_mean=False)
            if labels.shape == shape:
                self.seen.require(labels, channels[place].expand(shape), self.seen.gained)
        return Flow(channels[place].expand(shape).contiguous(), degree)
