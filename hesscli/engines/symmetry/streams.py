"""Families of what norms read: turned streams, rows without a mean, and fixed statistics."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from hesscli.engines.symmetry.candidates import Factors, Part, by_channel, once
from hesscli.engines.symmetry.families import Family, Told, normal
from hesscli.engines.symmetry.gauges import Anchored, Conjugated, MeanFree, MeanFreeRows, Turning
from hesscli.engines.symmetry.moving import Moving
from hesscli.engines.symmetry.seen import Anchor, Normed

_MOST = 256
"""Planes are looked at between so many vectors: where channels are more, between random ones."""
_STREAM = {"activation", "gated", "diagonal", "padding_idx"}
"""Marks of channels that cannot be turned into each other."""
_BEHIND = _STREAM | {"normalised", "summed"}
"""Marks of a norm's outcome that is not read by maps alone."""


class Streams:
    """Families of the norms of a pass.

    Args:
        factors: of its channels.
        moving: its constants.
    """

    def __init__(self, factors: Factors, moving: Moving) -> None:
        self.factors, self.moving = factors, moving

    def families(self) -> Iterator[Family]:
        """All of them."""
        for numbers, parts in self.factors.groups():
            yield from self._turned(numbers, parts)
        for norm in self.factors.seen.norms:
            if norm.has_mean:
                yield from self._mean_free(norm)
        for numbers, parts in self.factors.groups():
            yield from self._anchored(numbers, parts)

    # -- turned ----------------------------------------------------------------------------------

    def _turned(self, numbers: np.ndarray, parts: list[Part]) -> Iterator[Family]:
        """A stream that nothing but norms reads."""
        factors = self.factors
        marks = factors.sets_of(factors.marks, numbers)
        broken = factors.sets_of(factors.broken, numbers)
        if len(numbers) != 1 or broken or marks & _STREAM or "normalised" not in marks:
            return
        norms = [n for n in factors.seen.norms if factors.factor[int(n.row[0])] == numbers[0]]
        own = np.unique(factors.channel[factors.factor == numbers[0]])
        if not norms or len(own) < 2 or any(part.exponent != 1 for part in parts):
            return
        whole = np.isin(factors.factor, numbers)
        if not factors.kinds(whole) <= {"map", "embedding", "tensor"}:
            return
        found = list[Conjugated]()
        for part in once([factors.within(part, whole) for part in parts]):
            entries = _rows(by_channel(part, factors.channel), own)
            if entries is None:
                return
            found.append(Conjugated(entries))
        for norm in norms:
            readers = self._readers(norm)
            order = np.argsort(factors.channel[norm.row.numpy()])
            if readers is None or not np.array_equal(factors.channel[norm.row.numpy()][order], own):
                return
            gain = norm.gain[order]
            found += [Conjugated(each[order], gain) for each in readers]
            if norm.bias is not None:
                found.append(Conjugated(norm.bias[order][:, None], gain, inverse=True))
        has_mean = any(norm.has_mean for norm in norms)
        every = torch.cat([part.entries.reshape(-1) for part in found]).numpy()
        rank = len(own) - has_mean
        yield Turning(
            factors.tell("residual rotation", every, False),
            _frame(len(own), has_mean),
            tuple(found),
            rank * (rank - 1) // 2,
        )

    def _readers(self, norm: Normed) -> list[Tensor] | None:
        """Entries ``(n, ·)`` of the maps that read a norm; None where others do."""
        factors = self.factors
        numbers = np.unique(factors.factor[norm.channels.numpy()])
        if factors.sets_of(factors.marks, numbers) & _BEHIND:
            return None
        if factors.sets_of(factors.broken, numbers):
            return None
        chosen = np.zeros(factors.seen.num_channels, dtype=bool)
        chosen[norm.channels.numpy()] = True
        own, found = factors.channel[norm.channels.numpy()], list[Tensor]()
        for part in once([factors.within(part, chosen) for part in factors.parts]):
            if part.exponent != -1 or not len(part.entries):
                continue
            entries = _rows(by_channel(part, factors.channel), own)
            if entries is None:
                return None
            found.append(entries)
        return found

    # -- without a mean --------------------------------------------------------------------------

    def _mean_free(self, norm: Normed) -> Iterator[Family]:
        readers = self._readers(norm)
        if not readers or len(norm.gain) < 2:
            return
        taken = self.moving.taken
        biases = [taken[each[0].numpy()] for each in readers]
        for each, own in zip(readers, biases, strict=True):
            if norm.bias is None or (own >= 0).all():
                moved = np.concatenate([each.numpy().ravel(), own[own >= 0]])
                yield MeanFreeRows(
                    self._told(moved),
                    norm.gain,
                    norm.bias,
                    each,
                    None if norm.bias is None else torch.from_numpy(own),
                )
        if norm.bias is not None and any((own < 0).any() for own in biases):
            every = torch.cat([norm.bias, *(each.reshape(-1) for each in readers)])
            yield MeanFree(self._told(every.numpy()), norm.gain, norm.bias, tuple(readers))

    def _told(self, entries: np.ndarray) -> Told:
        return self.factors.tell("rows without a mean", entries, False)

    # -- fixed statistics ------------------------------------------------------------------------

    def _anchored(self, numbers: np.ndarray, parts: list[Part]) -> Iterator[Family]:
        """Maps ahead of batch norms whose biases can make up for their means."""
        factors = self.factors
        broken = factors.sets_of(factors.broken, numbers)
        clipped = "clipped" in factors.sets_of(factors.marks, numbers)
        if broken != {"running statistics"} or clipped:
            return
        anchors = [
            anchor
            for anchor in factors.seen.anchors
            if np.isin(factors.factor[anchor.channels.numpy()], numbers).any()
        ]
        whole = np.isin(factors.factor, numbers)
        few = once([factors.within(part, whole) for part in parts])
        bias, gain, shift = list[Tensor](), list[Tensor](), list[Tensor]()
        for anchor in anchors:
            kept = np.isin(factors.factor[anchor.channels.numpy()], numbers)
            few.append(_gains(anchor, kept))
            bias.append(anchor.bias[kept])
            gain.append(anchor.gain[kept])
            shift.append(anchor.shift[kept])
        if not anchors:
            return
        every = np.concatenate([*(part.entries for part in few), *bias])
        told = factors.tell("map before fixed statistics", every, False)
        scaling = factors.scaled(numbers, few, told)
        yield Anchored(scaling, torch.cat(bias), torch.cat(gain), torch.cat(shift))


def _gains(anchor: Anchor, kept: np.ndarray) -> Part:
    """Gains, whose factor is the inverse."""
    return Part(-1, anchor.gain.numpy()[kept], anchor.channels.numpy()[kept], -1.0, -1, False)


def _rows(table: dict[int, np.ndarray], own: np.ndarray) -> Tensor | None:
    """A part's entries ``(n, ·)`` by channel; None where it does not act on each alike."""
    found = [table.get(int(channel)) for channel in own]
    if (
        any(each is None for each in found)
        or len({len(each) for each in found if each is not None}) > 1
    ):
        return None
    return torch.from_numpy(np.stack([each for each in found if each is not None]))


def _frame(count: int, has_mean: bool) -> Tensor:
    """Orthonormal vectors ``(count, ·)``, all of them or random ones; orthogonal to (1, …, 1)."""
    ones = torch.ones(count, 1, dtype=torch.float64, device="cpu")
    if count <= _MOST and not has_mean:
        return torch.eye(count, dtype=torch.float64, device="cpu")
    generator = torch.Generator().manual_seed(0)
    size = min(count, _MOST) - has_mean
    drawn = normal((count, size), generator)
    wide = torch.cat([ones, drawn], dim=1) if has_mean else drawn
    frame: Tensor = torch.linalg.qr(wide)[0][:, int(has_mean) :]
    return frame
