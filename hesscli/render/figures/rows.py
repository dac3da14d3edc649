"""Pictures made of rows: names at the left, panels of the rows, and columns of text beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hesscli.render import bins, words
from hesscli.render.figures import canvas
from hesscli.render.figures.canvas import GAP, INK, MOST_LAYERS, SIDE, WIDTH, write
from hesscli.results import Histogram, Interval

# Inches of a row for at most so many: bars, and shapes, which want more where there are few.
BARS = ((1, 0.68), (30, 0.34), (MOST_LAYERS, 0.24))
SHAPES = ((4, 0.8), (12, 0.55), (30, 0.38), (MOST_LAYERS, 0.23))
_AFTER_NAMES = 0.1


class Rows:
    """A page of named rows from top to bottom, each a unit high about its own number.

    Args:
        title: as of a page.
        subtitle: as of a page.
        names: of the rows.
        heights: of a row in inches, as all lengths here, for at most so many rows; the last for
            more.
        above: between the headings and the rows.
        below: for the labels of the x axis and the note.
        longest: characters of a name; longer ones are cut.

    Attributes:
        figure: the page.
        axes: the panel that the names stand beside.
        tall: the height of the panels.
    """

    def __init__(
        self,
        title: str,
        subtitle: Sequence[str],
        names: Sequence[str],
        heights: Sequence[tuple[int, float]] = BARS,
        *,
        above: float = 0.0,
        below: float = 0.95,
        longest: int = 44,
    ) -> None:
        row = next((row for most, row in heights if len(names) <= most), heights[-1][1])
        self.tall, self.below, self._columns = row * max(len(names), 1), below, 0.0
        height = canvas.TOP + above + self.tall + below
        self.figure: Figure = canvas.page(height, title, subtitle)
        self.axes = self.figure.add_axes((0.3, 0.1, 0.3, 0.7))
        self.axes.set_ylim(len(names) - 0.4, -0.6)
        self.axes.set_yticks(range(len(names)), words.shorten_all(names, longest))

    def panel(self) -> Axes:
        """Another panel of the same rows."""
        axes = self.figure.add_axes((0.7, 0.1, 0.2, 0.7), sharey=self.axes)
        axes.tick_params(labelleft=False)
        return axes

    def columns(self, texts: Mapping[str, Sequence[str]]) -> None:
        """Write columns to the right of the first panel, by heading with one text for each row."""
        for heading, column in texts.items():
            self._columns += GAP
            points = self._columns * 72
            written = [
                write(
                    self.axes,
                    text,
                    (1, row),
                    (points, 0),
                    ("axes fraction", "data"),
                    va="center_baseline",
                )
                for row, text in enumerate(column)
            ]
            written.append(write(self.axes, heading, (1, 1), (points, 5), color=canvas.QUIET))
            widest = max(text.get_window_extent().width for text in written)
            self._columns += widest / self.figure.dpi

    def room(self, taken: float = 0.0, *, names: float = 0.0) -> tuple[float, float]:
        """What names and columns leave for panels.

        Args:
            taken: by whatever else stands in the rows.
            names: the least that the names take.

        Returns:
            Where it begins, and how wide it is.
        """
        left = SIDE + max(canvas.names_width(self.figure, self.axes), names) + _AFTER_NAMES
        return left, WIDTH - SIDE - left - self._columns - taken

    def put(self, axes: Axes, left: float, width: float) -> None:
        """Put a panel at its place."""
        canvas.place(self.figure, axes, left, self.below, width, self.tall)


# -- How entries spread, in a row ------------------------------------------------------------------


# In rows: where a histogram stands below its row's middle, how tall it is, and its mark.
_BASE, _TALL, _MARK = 0.28, 0.74, 0.4
# Where logarithmic heights begin, so that a single entry is seen.
LEAST = 0.5


def draw_shape(axes: Axes, row: int, histogram: Histogram, colours: Mapping[int, str]) -> None:
    """A histogram with logarithmic heights up to its own highest, in one colour for each sign."""
    base, full = row + _BASE, math.log(max((1, *histogram.counts)) / LEAST)
    logarithms = [math.log(max(count, LEAST) / LEAST) for count in histogram.counts]
    heights = [base - _TALL * logarithm / full for logarithm in logarithms]
    draw_bins(axes, histogram.edges, heights, base, colours)


def draw_bins(
    axes: Axes,
    edges: tuple[float, ...],
    heights: Sequence[float],
    base: float,
    colours: Mapping[int, str],
) -> None:
    """A silhouette on each side of zero, and between them what is around it."""
    axes.axhline(base, color=canvas.LINE, linewidth=0.8)
    for sign, colour in colours.items():
        if side := bins.side(edges, sign):
            tops, ends = heights[side.start : side.stop], edges[side.start : side.stop + 1]
            axes.stairs(tops, ends, baseline=base, fill=True, color=colour)


def draw_spread(axes: Axes, row: int, ends: Interval, middle: float | None) -> None:
    """Below a row's shape where most of the entries lie, and their median."""
    mark_spread(axes, row + _MARK, ends, middle)


def mark_spread(axes: Axes, height: float, ends: Interval, middle: float | None) -> None:
    """A line from one end to the other, and a dot at the middle."""
    canvas.whisker(axes, height, ends)
    if middle is not None:
        axes.plot(middle, height, "o", markersize=3.5, color=INK, zorder=3)


def mark_mean(axes: Axes, row: int, mean: float) -> None:
    """A diamond beside the median's dot."""
    style: Any = {"markerfacecolor": "white", "markeredgecolor": INK}
    axes.plot(mean, row + _MARK, "D", markersize=4.5, zorder=3, **style)
