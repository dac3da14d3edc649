"""Histograms with common edges: their bins by sign, and as one line of block characters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from hesscli.render import words
from hesscli.results import Histogram

# -- Histograms with common edges: their bins by sign, without empty ends --------------------------


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
    """The value below which a share of the entries lies, as far as the bins tell."""
    wanted = level * sum(histogram.counts)
    for bin, count in enumerate(histogram.counts):
        if count and wanted <= count:
            low, high = histogram.edges[bin], histogram.edges[bin + 1]
            return low + (high - low) * wanted / count if sign(histogram.edges, bin) else 0.0
        wanted -= count
    return 0.0


# -- Histograms in one line of block characters each, all on one axis ------------------------------


_MOST_CELLS = 16
_HEIGHTS = "▁▂▃▄▅▆▇█"
_STYLES = {-1: "red", 0: "dim", 1: "cyan"}


@dataclass(frozen=True)
class Cell:
    """One character: a run of neighbouring bins on one side of zero, or the bin around it."""

    bins: range
    sign: int


def cells_for(edges: tuple[float, ...]) -> tuple[Cell, ...]:
    """The cells that show histograms with these edges.

    Each cell but the outermost and that around zero holds the same number of bins.
    """
    groupings = (_cells(edges, size) for size in range(1, len(edges)))
    return next((cells for cells in groupings if len(cells) <= _MOST_CELLS), ())


def axis_marks(cells: tuple[Cell, ...]) -> str:
    """Mark where zero is, and on which sides of it there are entries."""
    marks = ["0" if cell.sign == 0 else " " for cell in cells]
    if cells and cells[0].sign < 0:
        marks[0] = "-"
    if cells and cells[-1].sign > 0:
        marks[-1] = "+"
    return "".join(marks)


def sparkline(histogram: Histogram, cells: tuple[Cell, ...]) -> Text:
    """A line of blocks as high as the logarithms of the counts, the highest of them full."""
    counts = [sum(histogram.counts[bin] for bin in cell.bins) for cell in cells]
    full = math.log1p(max(counts, default=0))
    line = Text()
    for cell, count in zip(cells, counts, strict=True):
        height = math.ceil(len(_HEIGHTS) * math.log1p(count) / full) if count else 0
        line.append(_HEIGHTS[height - 1] if height else " ", style=_STYLES[cell.sign])
    return line


@dataclass(frozen=True)
class Sparklines:
    """Histograms as lines on one axis, what marks the axis above them, and how far it goes."""

    lines: list[Text]
    marks: str
    axis: str


def sparklines(histograms: Sequence[Histogram]) -> Sparklines:
    """Histograms with common edges as lines, without the ends that are empty in all."""
    spectra = trimmed(histograms)
    edges = spectra[0].edges if spectra else ()
    cells = cells_for(edges)
    low = edges[0] if edges and sign(edges, 0) else 0.0
    ends = " to ".join(words.number(end, 2) for end in (low, edges[-1])) if edges else ""
    lines = [sparkline(histogram, cells) for histogram in spectra]
    axis = f"from {ends}, log scales" if ends else "empty"
    return Sparklines(lines, axis_marks(cells), axis)


def _cells(edges: tuple[float, ...], size: int) -> tuple[Cell, ...]:
    """Group the bins from zero outwards, so many to a cell."""
    negative, zero, positive = (side(edges, sign) for sign in (-1, 0, 1))
    below = range(negative.stop, negative.start, -size)
    above = range(positive.start, positive.stop, size)
    return (
        *(Cell(range(max(stop - size, 0), stop), -1) for stop in reversed(below)),
        *([Cell(zero, 0)] if zero else []),
        *(Cell(range(start, min(start + size, positive.stop)), 1) for start in above),
    )
