"""Results as pictures: figures without a window, the same bytes for the same result."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from hesscli.render import words
from hesscli.results import Interval, LayerTrace, TraceResult
from hesscli.storage import write_atomically

_MOST_LAYERS = 60
_ACCENT, _PALE, _INK, _QUIET, _LINE = "#1f6fb4", "#a9cbe6", "#1b2733", "#5d6b78", "#d5dbe1"
# On top of matplotlib's defaults, so that a user's own style file changes nothing here.
_STYLE: list[Any] = [
    "default",
    {
        "font.size": 10,
        "text.color": _INK,
        "text.parse_math": False,
        "axes.edgecolor": _LINE,
        "axes.labelcolor": _QUIET,
        "axes.axisbelow": True,
        "axes.unicode_minus": False,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "grid.color": _LINE,
        "grid.linewidth": 0.6,
        "xtick.color": _LINE,
        "xtick.labelcolor": _QUIET,
        "xtick.labelsize": 9,
        "ytick.labelcolor": _INK,
        "ytick.major.size": 0,
        "svg.hashsalt": "hesscli",
    },
]

# The page in inches: margins, the second panel, and the gap between columns.
_WIDTH, _SIDE, _TOP, _BOTTOM = 11.0, 0.4, 1.05, 0.95
_PER_PARAMETER, _GAP = 2.1, 0.18


def trace_figure(result: TraceResult) -> Figure:
    """Draw the trace of each layer, and beside it the trace per parameter.

    Layers run in model order from top to bottom. With many, the largest are drawn and the rest
    are summed in a note; pale marks are layers whose interval includes 0.

    Args:
        result: the answer of ``hesscli trace``.

    Returns:
        The figure, for ``save_figure`` or for one's own canvas.
    """
    layers = _largest(result.layers)
    row = 0.34 if len(layers) <= 30 else 0.24
    height = _TOP + _BOTTOM + row * max(len(layers), 2)
    with matplotlib.style.context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), facecolor="white")
        FigureCanvasAgg(figure)
        _headings(figure, result)
        bars = figure.add_axes((0.3, 0.1, 0.3, 0.7))
        dots = figure.add_axes((0.7, 0.1, 0.2, 0.7), sharey=bars)
        _draw_traces(bars, layers)
        _draw_per_parameter(dots, layers)
        _arrange(figure, bars, dots)
        figure.text(_SIDE / _WIDTH, 0.17 / height, _note(result, layers), color=_QUIET, fontsize=9)
    return figure


def save_figure(figure: Figure, folder: Path, name: str) -> dict[str, Path]:
    """Write a figure as PNG and SVG, byte for byte the same each time.

    Args:
        figure: the figure.
        folder: an existing folder.
        name: the file name without its ending.

    Returns:
        The paths by kind, ``png`` and ``svg``.
    """
    with matplotlib.style.context(_STYLE):
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


def _largest(layers: tuple[LayerTrace, ...]) -> list[LayerTrace]:
    """The layers to draw, in model order."""
    by_size = sorted(range(len(layers)), key=lambda index: -abs(layers[index].estimate))
    return [layers[index] for index in sorted(by_size[:_MOST_LAYERS])]


def _headings(figure: Figure, result: TraceResult) -> None:
    trace, problem, method = result.trace, result.problem, result.method
    total = words.with_error(trace.estimate, words.half_width(trace.interval))
    title = f"Trace of the {words.matrix_name(problem)}: {total}"
    if trace.interval[0] < trace.interval[1]:
        place = words.half_width(trace.interval)
        low, high = (words.rounded_pair(end, place)[0] for end in trace.interval)
        title += f"   ({words.percent(trace.confidence)} interval {low} to {high})"
    checkpoint = Path(problem.checkpoint.path).name if problem.checkpoint else "model in memory"
    subtitle = "  ·  ".join(
        (
            words.shorten(checkpoint, 40),
            words.count(problem.num_parameters, "parameter"),
            words.examples_used(problem),
            words.count(method.num_probes, "probe"),
            result.status,
        )
    )
    height = figure.get_figheight()
    left = _SIDE / _WIDTH
    figure.text(left, 1 - 0.42 / height, title, fontsize=14, weight="bold")
    figure.text(left, 1 - 0.70 / height, subtitle, color=_QUIET)


def _draw_traces(axes: Axes, layers: list[LayerTrace]) -> None:
    low, high = _limits([0.0, *(end for layer in layers for end in _ends(layer))])
    axes.set_xlim(low, high)
    for row, layer in enumerate(layers):
        axes.barh(row, layer.estimate, height=0.62, color=_colour(layer))
        _whisker(axes, row, layer.interval)
        value = words.with_error(layer.estimate, words.half_width(layer.interval))
        axes.annotate(
            value,
            (1, row),
            (_GAP * 72, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center_baseline",
            fontsize=9,
        )
    axes.axvline(0, color=_QUIET, linewidth=0.8)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_yticks(range(len(layers)), [words.shorten(layer.name, 44) for layer in layers])
    _plain_ticks(axes, 5)
    axes.set_xlabel("trace")
    axes.grid(axis="x")


def _draw_per_parameter(axes: Axes, layers: list[LayerTrace]) -> None:
    values = [words.per_parameter(layer) for layer in layers]
    shares = [max(layer.num_parameters, 1) for layer in layers]
    ends = [end / n for layer, n in zip(layers, shares, strict=True) for end in _ends(layer)]
    axes.set_xlabel("trace per parameter" + _scale(axes, values, ends))
    for row, (layer, value, n) in enumerate(zip(layers, values, shares, strict=True)):
        _whisker(axes, row, (layer.interval[0] / n, layer.interval[1] / n))
        axes.plot(value, row, "o", markersize=5.5, color=_colour(layer), zorder=3)
    axes.tick_params(labelleft=False)
    axes.grid(axis="x")


def _scale(axes: Axes, values: list[float], ends: list[float]) -> str:
    """Linear where all values can be told apart on a line, else logarithmic, signs kept.

    Returns:
        What the axis label has to say about it.
    """
    sizes = [abs(value) for value in values if value]
    if not sizes or max(sizes) / min(sizes) <= 30:
        axes.set_xlim(*_limits([0.0, *ends]))
        _plain_ticks(axes, 3)
        return ""
    first, last = math.floor(math.log10(min(sizes))), math.floor(math.log10(2 * max(sizes)))
    ticks = [10.0**power for power in range(last, first - 1, -1)]
    if min(values) > 0:
        axes.set_xscale("log")
        axes.set_xlim(min(sizes) / 2, 2 * max(sizes))
    else:
        axes.set_xscale("symlog", linthresh=min(sizes))
        axes.set_xlim(min(2 * min(values), 0.0), max(2 * max(values), 0.0))
        ticks = [0.0, *(sign * tick for tick in ticks for sign in (1, -1))]
    ticks = _apart(axes, ticks)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    return ", log scale"


def _apart(axes: Axes, ticks: list[float]) -> list[float]:
    """The ticks whose labels have room on a narrow axis; earlier ones come first."""
    kept: dict[float, float] = {}
    for tick in ticks:
        place = (axes.transScale + axes.transLimits).transform((tick, 0.0))[0]
        if 0 <= place <= 1 and all(abs(place - other) > 0.24 for other in kept.values()):
            kept[tick] = place
    return list(kept)


def _plain_ticks(axes: Axes, most: int) -> None:
    """Complete numbers at the ticks, not a power of ten set apart in a corner."""
    axes.xaxis.set_major_locator(MaxNLocator(most))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))


def _whisker(axes: Axes, row: int, interval: Interval) -> None:
    """The interval, cut at the frame where it is wider than that or unbounded."""
    left, right = axes.get_xlim()
    low, high = max(interval[0], left), min(interval[1], right)
    if low < high:
        axes.plot((low, high), (row, row), color=_INK, linewidth=1.1, solid_capstyle="butt")


def _arrange(figure: Figure, bars: Axes, dots: Axes) -> None:
    """Give the names the room they need, and the bars what is left."""
    names = max((label.get_window_extent().width for label in bars.get_yticklabels()), default=0.0)
    left = _SIDE + names / figure.dpi + 0.1
    right = _WIDTH - _SIDE - _PER_PARAMETER
    height = figure.get_figheight()
    bottom, tall = _BOTTOM / height, 1 - (_TOP + _BOTTOM) / height
    numbers = max((text.get_window_extent().width for text in bars.texts), default=0.0)
    width = right - left - numbers / figure.dpi - 2.5 * _GAP
    bars.set_position((left / _WIDTH, bottom, width / _WIDTH, tall))
    dots.set_position((right / _WIDTH, bottom, _PER_PARAMETER / _WIDTH, tall))


def _note(result: TraceResult, layers: list[LayerTrace]) -> str:
    confidence = words.percent(result.trace.confidence)
    notes = [f"Lines are {confidence} intervals."]
    if any(words.includes_zero(layer.interval) for layer in layers):
        notes.append("Pale: the interval includes 0.")
    hidden = len(result.layers) - len(layers)
    if hidden:
        rest = sum(layer.estimate for layer in result.layers)
        rest -= sum(layer.estimate for layer in layers)
        notes.append(f"And {words.count(hidden, 'smaller layer')}: sum {words.number(rest)}.")
    return "  ".join(notes)


def _colour(layer: LayerTrace) -> str:
    return _PALE if words.includes_zero(layer.interval) else _ACCENT


def _ends(layer: LayerTrace) -> tuple[float, ...]:
    return tuple(end for end in (layer.estimate, *layer.interval) if math.isfinite(end))


def _limits(values: list[float]) -> tuple[float, float]:
    """The range of some values with a little air, but none below or above zero alone."""
    low, high = min(values), max(values)
    air = 0.04 * (high - low) or 1.0
    return (low - air if low < 0 else 0.0), (high + air if high > 0 else 0.0 if low < 0 else air)
