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
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from hesscli.render import words
from hesscli.results import Interval
from hesscli.storage import write_atomically

# -- What all pictures share: colours and style, the page with its headings, axes, and files -------


MOST_LAYERS = 60
ACCENT, PALE, INK, QUIET, LINE = "#1f6fb4", "#a9cbe6", "#1b2733", "#5d6b78", "#d5dbe1"
NEGATIVE = "#c8502f"
AMBER = "#d99a1c"
# On top of matplotlib's defaults, so that a user's own style file changes nothing here.
_STYLE: list[Any] = [
    "default",
    {
        "font.size": 10,
        "text.color": INK,
        "text.parse_math": False,
        "axes.edgecolor": LINE,
        "axes.labelcolor": QUIET,
        "axes.axisbelow": True,
        "axes.unicode_minus": False,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "grid.color": LINE,
        "grid.linewidth": 0.6,
        "xtick.color": LINE,
        "xtick.labelcolor": QUIET,
        "xtick.labelsize": 9,
        "ytick.labelcolor": INK,
        "ytick.major.size": 0,
        "svg.hashsalt": "hesscli",
    },
]

# The page in inches: its width, its left and right margin, what the headings take, and the
# room for the note below.
WIDTH, SIDE, TOP = 11.0, 0.4, 1.05
_NOTE = 0.17


def style() -> Any:
    """The context in which every picture is drawn."""
    return matplotlib.style.context(_STYLE)


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


def provenance(result: words.Answer) -> tuple[str, ...]:
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
    figure.text(SIDE / WIDTH, _NOTE / figure.get_figheight(), text, color=QUIET, fontsize=9)


def place(
    figure: Figure, axes: Axes, left: float, bottom: float, width: float, height: float
) -> None:
    """Put axes at a place in inches from the page's lower left corner."""
    tall = figure.get_figheight()
    axes.set_position((left / WIDTH, bottom / tall, width / WIDTH, height / tall))


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """One row for each name from top to bottom, each a unit high about its own number."""
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), words.shorten_all(names, 44))


def names_width(axes: Axes) -> float:
    """The inches that the names of the rows take."""
    widths = [label.get_window_extent().width for label in axes.get_yticklabels()]
    return float(max(widths, default=0.0)) / axes.figure.dpi


def beside(axes: Axes, row: float, text: str, inches: float) -> Annotation:
    """Write next to a row, so many inches to the right of the frame."""
    return axes.annotate(
        text,
        (1, row),
        (inches * 72, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="center_baseline",
        fontsize=9,
    )


def columns(axes: Axes, gap: float, texts: dict[str, list[str]]) -> float:
    """Write columns of text to the right of the rows, each under its heading.

    Args:
        axes: whose rows they belong to.
        gap: inches to the left of each column.
        texts: by heading, one for each row.

    Returns:
        The inches that they take.
    """
    taken = 0.0
    for heading, column in texts.items():
        taken += gap
        written = [beside(axes, row, text, taken) for row, text in enumerate(column)]
        written.append(
            axes.annotate(
                heading,
                (1, 1),
                (taken * 72, 5),
                xycoords="axes fraction",
                textcoords="offset points",
                color=QUIET,
                fontsize=9,
            )
        )
        taken += max(text.get_window_extent().width for text in written) / axes.figure.dpi
    return taken


def whisker(axes: Axes, row: float, interval: Interval) -> None:
    """The interval, cut at the frame where it is wider than that or unbounded."""
    left, right = axes.get_xlim()
    low, high = max(interval[0], left), min(interval[1], right)
    if low < high:
        axes.plot((low, high), (row, row), color=INK, linewidth=1.1, solid_capstyle="butt")


def plain_ticks(axes: Axes, most: int) -> None:
    """Complete numbers at the ticks, not a power of ten set apart in a corner."""
    axes.xaxis.set_major_locator(MaxNLocator(most))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))


def apart(axes: Axes, ticks: Iterable[float], distance: float) -> list[float]:
    """The ticks that keep a distance, as a share of the axis; earlier ones come first."""
    kept: dict[float, float] = {}
    for tick in ticks:
        across = (axes.transScale + axes.transLimits).transform((tick, 0.0))[0]
        if 0 <= across <= 1 and all(abs(across - other) > distance for other in kept.values()):
            kept[tick] = across
    return list(kept)


def save_figure(figure: Figure, folder: Path, name: str) -> dict[str, Path]:
    """Write a figure as PNG and SVG, byte for byte the same each time.

    Args:
        figure: the figure.
        folder: an existing folder.
        name: the file name without its ending.

    Returns:
        The paths by kind, ``png`` and ``svg``.
    """
    with style():
        return {
            "png": write_atomically(
                folder / f"{name}.png", _writer(figure, "png", dpi=160, metadata={"Software": None})
            ),
            "svg": write_atomically(
                folder / f"{name}.svg", _writer(figure, "svg", metadata={"Date": None})
            ),
        }


def _writer(figure: Figure, kind: str, **options: Any) -> Callable[[BinaryIO], None]:
    return partial(figure.savefig, format=kind, **options)


# -- An axis of sizes: logarithmic on either side of zero, as far as there is anything -------------


_AIR = 1.3
_LABEL = 0.55  # inches from one label's middle to the next


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


def label_sizes(axes: Axes, edges: tuple[float, ...], width: float) -> None:
    """Label zero and round sizes as they have room on an axis of so many inches."""
    low, high = axes.get_xlim()
    least = min((abs(edge) for edge in edges if edge), default=1.0)
    last, first = (math.floor(math.log10(size)) for size in (max(-low, high), least))
    powers = [10.0**power for power in range(last, first - 1, -1)]
    digits = (1, 2, 5) if len(powers) < 4 else (1,)
    sizes = [digit * power for digit in digits for power in powers]
    signed = [sign * size for size in sizes if size >= 0.999 * least for sign in (1, -1)]
    kept = apart(axes, [0.0, *signed], _LABEL / width)
    axes.set_xticks(kept, [f"{tick:g}" for tick in kept])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", length=0)
    axes.spines["bottom"].set_visible(False)
