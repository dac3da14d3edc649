"""Histograms with common edges: their bins by sign, without empty ends."""

from __future__ import annotations

from collections.abc import Sequence

from hesscli.results import Histogram


def trimmed(histograms: Sequence[Histogram]) -> list[Histogram]:
    """Cut off the ends that are empty in all."""
    totals = [sum(counts) for counts in zip(*(h.counts for h in histograms), strict=True)]
    taken = [bin for bin, total in enumerate(totals) if total]
    if not taken:
        return [Histogram(edges=(), counts=()) for _ in histograms]
    first, last = taken[0], taken[-1]
    return [
        Histogram(edges=h.edges[first : last + 2], counts=h.counts[first : last + 1])
        for h in histograms
    ]


def sign(edges: tuple[float, ...], bin: int) -> int:
    """The sign of what a bin holds: 0 for the bin around zero, else 1 or -1."""
    return int(edges[bin] > 0) - int(edges[bin + 1] < 0)


def side(edges: tuple[float, ...], wanted: int) -> range:
    """The bins of one sign, which lie together."""
    signs = [sign(edges, bin) for bin in range(len(edges) - 1)]
    start = sum(other < wanted for other in signs)
    return range(start, start + signs.count(wanted))


def quantile(histogram: Histogram, level: float) -> float:
    """Where a share of the entries lies below, as far as the bins tell."""
    wanted = level * sum(histogram.counts)
    for bin, count in enumerate(histogram.counts):
        if count and wanted <= count:
            low, high = histogram.edges[bin], histogram.edges[bin + 1]
            return low + (high - low) * wanted / count if sign(histogram.edges, bin) else 0.0
        wanted -= count
    return 0.0
