"""What all pictures share: colours and style, the page with its headings, axes, and files.

Figures are made without a window, and the same result gives the same bytes.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib.style
from matplotlib import rc_params_from_file
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from hesscli.render import words
from hesscli.results import Answer, Interval

# -- Colours and style -----------------------------------------------------------------------------


MOST_LAYERS = 60
_STYLE = Path(__file__).with_name("hesscli.mplstyle")
_SHEET: dict[str, Any] = {
    str(key): value
    for key, value in rc_params_from_file(_STYLE, use_default_template=False).items()
}
INK, QUIET, LINE = (str(_SHEET[key]) for key in ("text.color", "axes.labelcolor", "axes.edgecolor"))
ACCENT, PALE, NEGATIVE, AMBER, GREY = "#1f6fb4", "#a9cbe6", "#c8502f", "#d99a1c", "#98a3ae"
DEEP = "#0b2f55"
SMALL: Any = {"fontsize": 9}
_DASHED = (0, (4, 3))
_LINE_POINTS = 13
"""From one line of small text to the next."""

styled = matplotlib.style.context(["default", _SHEET])
"""Decorates what draws or writes a picture."""


# -- The page in inches: its headings, axes at their places, and the note at its foot --------------


# Its width, its left and right margin, what the headings take, and where the note stands.
WIDTH, SIDE, TOP, _NOTE = 11.0, 0.4, 1.05, 0.17
GAP = 0.2
"""Between a frame and what is written beside it."""


def page(height: float, title: str, subtitle: Iterable[str]) -> Figure:
    """An empty page of so many inches with its headings.

    Args:
        height: in inches, headings included.
        title: the answer in one line.
        subtitle: facts about where it comes from.
    """
    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(SIDE / WIDTH, 1 - 0.42 / height, title, fontsize=14, weight="bold")
    figure.text(SIDE / WIDTH, 1 - 0.70 / height, "  ·  ".join(subtitle), color=QUIET)
    for line in figure.texts:
        excess = line.get_window_extent().width / figure.dpi / (WIDTH - 2 * SIDE)
        line.set_fontsize(float(line.get_fontsize()) / max(excess, 1.0))
    return figure


_BELOW = 1.05
"""Inches below the panels, for the labels of their x axis and the note."""


def panels(
    title: str,
    subtitle: Iterable[str],
    heights: Sequence[float],
    *,
    left: float = 0.75,
    right: float = 0.0,
    between: float = 0.5,
    above: float = 0.0,
) -> tuple[Figure, list[Axes]]:
    """A page with panels one below the other, all with the x axis of the first.

    Args:
        title: as of a page.
        subtitle: as of a page.
        heights: of the panels, in inches as all that follows.
        left: for the labels of their heights.
        right: for what is written beside them.
        between: from one panel to the next.
        above: between the headings and the panels.
    """
    tall = sum(heights) + between * (len(heights) - 1)
    figure = page(TOP + above + tall + _BELOW, title, subtitle)
    drawn: list[Axes] = []
    top = _BELOW + tall
    for height in heights:
        axes = figure.add_axes((0.1, 0.1, 0.8, 0.8), sharex=drawn[0] if drawn else None)
        width = WIDTH - 2 * SIDE - left - right
        place(figure, axes, SIDE + left, top - height, width, height)
        drawn.append(axes)
        top -= height + between
    return figure, drawn


def place(
    figure: Figure, axes: Axes, left: float, bottom: float, width: float, height: float
) -> None:
    """Put axes at a place in inches from the page's lower left corner."""
    tall = figure.get_figheight()
    axes.set_position((left / WIDTH, bottom / tall, width / WIDTH, height / tall))


def names_width(figure: Figure, axes: Axes) -> float:
    """The inches that the labels of the y axis take."""
    widths = [label.get_window_extent().width for label in axes.get_yticklabels()]
    return float(max(widths, default=0.0)) / figure.dpi


def provenance(result: Answer) -> tuple[str, ...]:
    """Which model was analysed, on what and with how much work: the facts of a subtitle."""
    problem = result.problem
    checkpoint = Path(problem.checkpoint.path).name if problem.checkpoint else "model in memory"
    return (
        words.shorten(checkpoint, 40),
        words.count(problem.num_parameters, "parameter"),
        words.examples_used(problem),
        words.seen_by(result),
        result.status,
    )


def note(figure: Figure, sentences: Iterable[str]) -> None:
    """Small print at the foot of the page, in two lines where it must be."""
    text = textwrap.fill("  ".join(sentences), 160)
    figure.text(SIDE / WIDTH, _NOTE / figure.get_figheight(), text, color=QUIET, **SMALL)


def not_drawn(number: int, noun: str, which: str = "") -> list[str]:
    """Say how many of a kind a picture leaves out, if any."""
    return [f"{words.count(number, noun)}{which} not drawn."] if number > 0 else []


def legend(figure: Figure, handles: Sequence[Artist], **spacing: float) -> None:
    """What colours and marks stand for, in one line below the headings."""
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(SIDE / WIDTH, 1 - TOP / figure.get_figheight()),
        ncols=len(handles),
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        **{"handlelength": 1, **spacing},
        **SMALL,
    )


def symbol(marker: str, colour: str, label: str, size: float = 6) -> Line2D:
    """A mark as a legend shows it."""
    return Line2D([], [], linestyle="", marker=marker, markersize=size, color=colour, label=label)


# -- What is written and drawn about axes ----------------------------------------------------------


def write(
    axes: Axes,
    text: str,
    at: tuple[float, float],
    points: tuple[float, float],
    coordinates: Any = "axes fraction",
    **style: Any,
) -> Annotation:
    """Write small, so many points from a place."""
    return axes.annotate(
        text, at, points, xycoords=coordinates, textcoords="offset points", **SMALL, **style
    )


def describe(axes: Axes, lines: Iterable[str]) -> None:
    """Write lines to the right of a panel, from its top down; the first is its name."""
    for index, line in enumerate(lines):
        weight = "normal" if index else "bold"
        write(axes, line, (1, 1), (GAP * 72, -9 - 15 * index), weight=weight)


def mark(axes: Axes, x: float, text: str = "") -> None:
    """A dashed upright line at a value, and above it what it stands for."""
    axes.axvline(x, color=QUIET, linewidth=1, linestyle=_DASHED, zorder=1)
    if text:
        write(axes, text, (x, 1), (0, 5), ("data", "axes fraction"), color=QUIET, ha="center")


def mark_inside(axes: Axes, marks: Iterable[tuple[float, str]]) -> None:
    """Lines like that, each with its text beside it, at a height of its own."""
    middle = sum(axes.get_xlim()) / 2
    for line, (x, text) in enumerate(marks):
        mark(axes, x)
        points, align = (4, "left") if x < middle else (-4, "right")
        place = (points, -10 - _LINE_POINTS * line)
        write(axes, text, (x, 1), place, ("data", "axes fraction"), color=QUIET, ha=align)


def whisker(axes: Axes, row: float, interval: Interval) -> None:
    """The interval, cut at the frame where it is wider than that or unbounded."""
    left, right = axes.get_xlim()
    low, high = max(interval[0], left), min(interval[1], right)
    if low < high:
        axes.plot((low, high), (row, row), color=INK, linewidth=1.1, solid_capstyle="butt")


# -- Ticks -----------------------------------------------------------------------------------------


def plain_ticks(axes: Axes, most: int) -> None:
    """Complete numbers at the ticks, not a power of ten set apart in a corner."""
    axes.xaxis.set_major_locator(MaxNLocator(most))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))


def label_heights(axes: Axes, ticks: Sequence[float], labels: Sequence[str] | None = None) -> None:
    """Label the y axis at some heights, and nowhere else."""
    written = [f"{tick:g}" for tick in ticks] if labels is None else labels
    axes.set_yticks(ticks, written, color=QUIET, **SMALL)
    axes.yaxis.set_minor_locator(NullLocator())


def label_counts(axes: Axes, most: float) -> None:
    """Label a logarithmic y axis at powers of ten from one up, at most five."""
    powers = range(math.floor(math.log10(most)) + 1)
    ticks = [10**power for power in powers[:: 1 + len(powers) // 4]]
    label_heights(axes, ticks, [words.count(tick) for tick in ticks])


def label_round(axes: Axes, most: int) -> None:
    """Label a logarithmic y axis at round sizes, about so many at most."""
    low, high = axes.get_ylim()
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        sizes = (digit * 10.0**power for power in powers for digit in digits)
        inside = [size for size in sizes if low <= size <= high]
        if len(inside) <= most:
            break
    label_heights(axes, inside[:: 1 + len(inside) // (most + 1)])


def colour_scale(
    figure: Figure, image: AxesImage, bar: Axes, ticks: Sequence[float], labels: Sequence[str]
) -> None:
    """Show in axes of its own what an image's colours stand for."""
    colours = figure.colorbar(image, cax=bar)
    colours.set_ticks(ticks, labels=labels)
    colours.outline.set_visible(False)
    bar.yaxis.set_minor_locator(NullLocator())
    bar.tick_params(length=0, labelsize=9, labelcolor=QUIET)


def apart(axes: Axes, ticks: Iterable[float], distance: float) -> list[float]:
    """The ticks that keep a distance, as a share of the axis; earlier ones come first."""
    kept: dict[float, float] = {}
    for tick in ticks:
        across = (axes.transScale + axes.transLimits).transform((tick, 0.0))[0]
        if 0 <= across <= 1 and all(abs(across - other) > distance for other in kept.values()):
            kept[tick] = across
    return list(kept)


# -- An axis of sizes: logarithmic on either side of zero, as far as there is anything -------------


_AIR = 1.3
_LABEL = 0.55  # inches from one label's middle to the next


_BESIDE_MARKS = 1.5
_FURTHEST = 1e-8
"""Of the largest change: smaller ones are not told apart on an axis with both signs."""


def axis_edges(values: Iterable[float]) -> tuple[float, ...]:
    """Where an axis of loss changes begins and ends, with room for a mark beyond each of them.

    Where not all are positive, between the two lies the size below which it turns linear.
    """
    drawn = sorted(value for value in values if math.isfinite(value))
    if not drawn:
        return ()
    if drawn[0] > 0:
        return drawn[0] / _BESIDE_MARKS, drawn[-1] * _BESIDE_MARKS
    largest = max(-drawn[0], drawn[-1])
    least = min((abs(value) for value in drawn if value), default=1.0)
    threshold = max(least, _FURTHEST * largest)
    low, high = min(drawn[0], -threshold), max(drawn[-1], threshold)
    return low * _BESIDE_MARKS, -threshold, threshold, high * _BESIDE_MARKS


def scale_by_size(axes: Axes, edges: tuple[float, ...]) -> None:
    """Scale the x axis for some bins: plainly logarithmic where all are positive.

    Else it is linear in the bin around zero, which gets a small share of the axis.
    """
    low, high = (edges[0], edges[-1]) if edges else (0.0, 0.0)
    if low > 0:
        axes.set_xscale("log")
        axes.set_xlim(low / _AIR, high * _AIR)
        return
    threshold = min((abs(edge) for edge in edges if edge), default=1.0)
    left, right = (max(end, threshold) for end in (-low, high))
    decades = math.log10(left / threshold) + math.log10(right / threshold)
    axes.set_xscale("symlog", linthresh=threshold, linscale=max(0.035 * decades, 0.03))
    axes.set_xlim(-left * _AIR, right * _AIR)


def log_scale(axis: Axis) -> str:
    """Say how far a scale is logarithmic: one that goes through zero is linear about it."""
    threshold = getattr(axis.get_transform(), "linthresh", None)
    return "log scale" if threshold is None else log_scale_beyond(threshold)


def log_scale_beyond(threshold: float) -> str:
    """Name a scale that is linear about zero."""
    return f"log scale beyond ± {words.number(threshold, 2)}"


def label_sizes(axes: Axes, edges: tuple[float, ...]) -> None:
    """Label zero and round sizes as they have room on the x axis, which is at its place."""
    low, high = axes.get_xlim()
    least = min((abs(edge) for edge in edges if edge), default=1.0)
    last, first = (math.floor(math.log10(size)) for size in (max(-low, high), least))
    powers = [10.0**power for power in range(last, first - 1, -1)]
    digits = (1, 2, 5) if len(powers) < 4 else (1,)
    sizes = [digit * power for digit in digits for power in powers]
    signed = [sign * size for size in sizes if size >= 0.999 * least for sign in (1, -1)]
    kept = apart(axes, [0.0, *signed], _LABEL / (axes.get_position().width * WIDTH))
    axes.set_xticks(kept, [f"{tick:g}" for tick in kept])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", length=0)
    axes.spines["bottom"].set_visible(False)


# -- Files -----------------------------------------------------------------------------------------


def encoders(figure: Figure) -> dict[str, Callable[[BinaryIO], None]]:
    """What writes a figure to a stream, by kind: byte for byte the same each time.

    Args:
        figure: the figure.

    Returns:
        For ``png`` and ``svg``, a function of a binary stream.
    """
    return {
        "png": partial(_encode, figure, "png", dpi=160, metadata={"Software": None}),
        "svg": partial(_encode, figure, "svg", metadata={"Date": None}),
    }


@styled
def _encode(figure: Figure, kind: str, stream: BinaryIO, **options: Any) -> None:
    figure.savefig(stream, format=kind, **options)
