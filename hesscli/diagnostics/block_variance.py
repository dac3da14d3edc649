"""What does AdaHessian's block averaging keep of a layer's diagonal, and what does it buy?

With t the n true entries, t̄_b their mean in block b of n_b and t̄ that of all, the variance of
the entries splits into that of the block means, which averaging keeps, and that of the entries
around them, which it loses:

    between = Σ_b n_b (t̄_b − t̄)² / n        within = Σ_i (t_i − t̄_b(i))² / n

What it buys is that the same part of the noise, Σ_i (e_i − ē_b(i))² / n, is lost with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hesscli.engines.diagonal import Array, Diagonal, share, share_interval, student
from hesscli.engines.hutchinson.blocks import Blocks
from hesscli.results import BlockReport, Interval
from hesscli.vocabulary import BlockRule

_SAFE = 0.9
"""A share of the structure that is as good as all of it."""
_HARMFUL = 0.5
_NARROW = 0.3
"""Width of an interval of the share that still says something."""


class LayerBlocks:
    """The blocks of a layer, whose vectors ``(…, d)`` hold its tensors one after the other.

    They cover the tensors of rank 2 and more; a layer without any is kept entry by entry. The
    maps are linear, and their squared norms are mean squares over blocks or entries.

    Args:
        shapes: of the layer's tensors.
        rule: how to cut them.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], rule: BlockRule) -> None:
        blocks = [Blocks.of(shape, rule) for shape in shapes]
        self._numels = [math.prod(shape) for shape in shapes]
        cut = [i for i, block in enumerate(blocks) if block.rule != "none"]
        self._covered = [(i, blocks[i]) for i in cut] or list(enumerate(blocks))
        sizes = torch.cat([block.sizes() for _, block in self._covered]).double()
        self.count, self.size = len(sizes), int(sizes.sum())
        self._shares = sizes / self.size
        self.rule = " + ".join(dict.fromkeys(block.rule for _, block in self._covered))

    def entries(self, vectors: Tensor) -> Tensor:
        """The entries that the blocks cover."""
        parts = [part.reshape(*vectors.shape[:-1], -1) for _, part in self._parts(vectors)]
        return torch.cat(parts, dim=-1).div_(math.sqrt(self.size))

    def means(self, vectors: Tensor) -> Tensor:
        """The block means, each block counting once."""
        return self._means(vectors) / math.sqrt(self.count)

    def between(self, vectors: Tensor) -> Tensor:
        """The block means around the mean of all, each block counting by its size."""
        means = self._means(vectors)
        return (means - (means @ self._shares)[..., None]) * self._shares.sqrt()

    def within(self, vectors: Tensor) -> Tensor:
        """The entries around their block's mean."""
        parts = [
            (part - block.average(part)).reshape(*vectors.shape[:-1], -1)
            for block, part in self._parts(vectors)
        ]
        return _in_a_row(parts).div_(math.sqrt(self.size))

    def _means(self, vectors: Tensor) -> Tensor:
        return torch.cat([block.means(part) for block, part in self._parts(vectors)], dim=-1)

    def _parts(self, vectors: Tensor) -> list[tuple[Blocks, Tensor]]:
        parts = torch.split(vectors, self._numels, dim=-1)
        lead = vectors.shape[:-1]
        return [(block, parts[i].reshape((*lead, *block.shape))) for i, block in self._covered]


def _in_a_row(parts: list[Tensor]) -> Tensor:
    """Side by side, a single one without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def block_report(
    diagonal: Diagonal,
    shapes: Sequence[Sequence[int]],
    rule: BlockRule,
    *,
    confidence: float,
    probe_noise: Tensor | None = None,
    num_probes: float | None = None,
) -> BlockReport:
    """Report on a layer's blocks.

    Args:
        diagonal: the layer's entries alone.
        shapes: of the layer's tensors, in the order of the entries.
        rule: how to cut them.
        confidence: of the intervals.
        probe_noise: replicates ``(G, d)`` of the error of an estimate by probes, where
            ``diagonal`` itself is exact or has other noise as well; default its own.
        num_probes: how many independent products of one probe that estimate is a mean of. The
            verdict is then about the noise of a single one, which is what an optimizer's step
            sees; without it, about the share kept alone.
    """
    blocks = LayerBlocks(shapes, rule)
    between = diagonal.squared_norm(blocks.between)
    within = diagonal.squared_norm(blocks.within)
    lost = within.interval(confidence)
    probed = diagonal if probe_noise is None else replace(diagonal, noise=probe_noise)
    entry_noise = probed.squared_norm(blocks.entries).bias
    block_noise = probed.squared_norm(blocks.means).bias
    if blocks.count == blocks.size:
        explained, kept = 1.0, (1.0, 1.0)
        verdict = "nothing to average: one entry per block"
    else:
        explained, kept = share(between, within), share_interval(between, within, confidence)
        removed = None
        if probed.noise is not None and num_probes is not None:
            around = within if probe_noise is None else probed.squared_norm(blocks.within)
            removed = _mean_interval(num_probes * around.biases, confidence)
        verdict = _verdict(explained, kept, lost, removed)
    return BlockReport(
        rule=blocks.rule,
        count=blocks.count,
        between_variance=between.estimate,
        between_interval=between.interval(confidence),
        within_variance=within.estimate,
        within_interval=lost,
        noise_variance=None if probed.noise is None else block_noise,
        noise_reduction=entry_noise / block_noise if block_noise > 0 else None,
        explained=explained,
        explained_interval=kept,
        verdict=verdict,
    )


def _mean_interval(draws: Array, confidence: float) -> Interval:
    quantile = student(len(draws), len(draws), (1 - confidence) / 2)
    width = quantile * float(draws.std(ddof=1)) / math.sqrt(len(draws))
    return max(float(draws.mean()) - width, 0.0), float(draws.mean()) + width


def _verdict(explained: float, kept: Interval, lost: Interval, removed: Interval | None) -> str:
    """Averaging is safe where it loses little, or less than the noise it removes.

    Args:
        explained: share of the structure that is kept.
        kept: its interval.
        lost: interval of the within-variance.
        removed: interval of the noise variance that averaging takes from a single probe.
    """
    keeps = f"averaging keeps {explained:.1%} of the structure"
    if kept[0] >= _SAFE:
        return f"safe: {keeps}"
    if removed is not None and lost[1] < removed[0]:
        probes = int(removed[0] / lost[1])
        count = f"{probes:,}".replace(",", " ")
        return f"safe while noisy: up to {count} probes it removes more noise than structure"
    if removed is not None and lost[0] > removed[1]:
        return f"harmful: {keeps}, and removes less noise than that loss"
    if kept[1] - kept[0] > _NARROW:
        return f"cannot tell: the interval of the share kept is {kept[0]:.0%} to {kept[1]:.0%}"
    if removed is not None:
        return f"even: {keeps}, and removes about as much noise as it loses"
    return f"{'harmful unless noisy' if kept[1] <= _HARMFUL else 'mixed'}: {keeps}"
