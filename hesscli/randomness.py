"""Random probes as a pure function of (seed, batch, probe, entry).

A counter-based hash instead of a generator: the same signs on any device, dtype, thread count
and world size, in any order and after any resume, and nothing to store. The mixing function is
splitmix64's finaliser (Steele, Lea, Flood: Fast splittable pseudorandom number generators,
OOPSLA 2014, section 3), with its state the keyed counter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, Protocol

import torch
from torch import Tensor

Distribution = Literal["rademacher", "gaussian"]

SHARED = (1 << 64) - 1
"""The batch number that stands for all batches when they share their probes."""

_AT_ONCE = 1 << 20
"""Entries that are drawn at once: a sampler needs some times their memory."""
_NORMALS = 1 << 15
"""Normal entries that are made at once: as many as a processor keeps by it on the way."""
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1
_STRIDE = (math.sqrt(5) - 1) / 2


def key(*words: int) -> int:
    """One 64-bit key from any number of words, each mixed in turn."""
    state = 0
    for word in words:
        state = _mix((state + (word & _MASK) + _GOLDEN) & _MASK)
    return state


def rademacher(
    stream: int, offset: int, size: int, *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Signs ``(size,)`` for entries ``offset … offset + size``; one hash gives 64 of them."""
    first = offset // 64
    words = (offset + size + 63) // 64 - first
    hashed = _hash(stream, first, words, device).view(torch.uint8)
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    signs = (2 * bits - 1).to(dtype).index_select(0, hashed.int())  # eight for each byte
    start = offset - 64 * first
    return signs.view(-1)[start : start + size]


def gaussian(
    stream: int, offset: int, size: int, *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Standard normal entries ``(size,)`` by Box-Muller, two hashes for each entry."""
    drawn = torch.empty(size, dtype=dtype, device=device)
    for start in range(0, size, _NORMALS):
        into = drawn[start : start + _NORMALS]
        hashed = _hash(stream, 2 * (offset + start), 2 * len(into), device).view(-1, 2)
        uniform = ((hashed >> 11) & ((1 << 53) - 1)).to(torch.float64).add_(0.5).mul_(2.0**-53)
        radius = uniform[:, 0].log().mul_(-2).sqrt_()
        into.copy_(radius.mul_((2 * math.pi * uniform[:, 1]).cos_()))
    return drawn


def uneven(
    stream: int, offset: int, size: int, *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Signs times sizes of ½ to 1½ ``(size,)``: as cheap as signs, but few do not cancel.

    Multiples of the golden section are spread evenly between whole numbers, and no two agree.
    """
    signs = rademacher(stream, offset, size, dtype=torch.float64, device=device)
    places = torch.arange(offset, offset + size, dtype=torch.float64, device=device)
    return signs.mul_(places.mul_(_STRIDE).frac_().add_(0.5)).to(dtype)


class Sampler(Protocol):
    """Draws entries ``offset … offset + size`` of a stream, as the functions above do."""

    def __call__(
        self, stream: int, offset: int, size: int, /, *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Entries ``(size,)``."""


SAMPLERS: dict[Distribution, Sampler] = {"rademacher": rademacher, "gaussian": gaussian}


def at(
    runs: Iterable[tuple[int, int]],
    sample: Sampler,
    stream: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """One vector of the entries of some (offset, size), each drawn for its place in the whole."""
    runs = list(runs)
    drawn, filled = torch.empty(sum(size for _, size in runs), dtype=dtype, device=device), 0
    for offset, size in runs:
        for start in range(0, size, _AT_ONCE):
            count = min(_AT_ONCE, size - start)
            piece = sample(stream, offset + start, count, dtype=dtype, device=device)
            drawn[filled : filled + count] = piece
            filled += count
    return drawn


def _mix(word: int) -> int:
    word = ((word ^ (word >> 30)) * _MIX1) & _MASK
    word = ((word ^ (word >> 27)) * _MIX2) & _MASK
    return word ^ (word >> 31)


def _hash(stream: int, first: int, count: int, device: torch.device) -> Tensor:
    """Splitmix64 of the counters ``first … first + count``: int64 ``(count,)``."""
    word = torch.arange(first, first + count, dtype=torch.int64, device=device)
    word.mul_(_signed(_GOLDEN)).add_(_signed(stream))
    word.bitwise_xor_(_shift(word, 30)).mul_(_signed(_MIX1))
    word.bitwise_xor_(_shift(word, 27)).mul_(_signed(_MIX2))
    return word.bitwise_xor_(_shift(word, 31))


def _shift(word: Tensor, bits: int) -> Tensor:
    """Logical right shift: int64's own is arithmetic."""
    return (word >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
