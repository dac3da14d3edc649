"""A trace as a picture: a bar for each layer, and beside it the trace per parameter."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from hesscli.render import words
from hesscli.render.figures import canvas
from hesscli.results import LayerTrace, TraceResult

# In inches: below the axes, the second panel, and the gap between columns.
_BOTTOM, _PER_PARAMETER, _GAP = 0.95, 2.1, 0.18


def trace_figure(result: TraceResult) -> Figure:
    """Draw the trace of each layer, and beside it the trace per parameter.

    Layers run in model order from top to bottom. With many, the largest are drawn and the rest
    are summed in a note; pale marks are layers whose interval includes 0.

    Args:
        result: the answer of ``hesscli trace``.

    Returns:
        The figure, for ``save_figure`` or for one's own canvas.
    """
    layers = words.largest(result.layers, canvas.MOST_LAYERS)
    row = 0.34 if len(layers) <= 30 else 0.24
    height = canvas.TOP + _BOTTOM + row * max(len(layers), 2)
    with canvas.style():
        figure = canvas.page(height, _title(result), canvas.provenance(result))
        bars = figure.add_axes((0.3, 0.1, 0.3, 0.7))
        dots = figure.add_axes((0.7, 0.1, 0.2, 0.7), sharey=bars)
        _draw_traces(bars, layers)
        _draw_per_parameter(dots, layers)
        _arrange(figure, bars, dots)
        canvas.note(figure, _notes(result, layers))
    return figure


def _title(result: TraceResult) -> str:
    trace, half_width = result.trace, words.half_width(result.trace.interval)
    value = words.with_error(trace.estimate, half_width)
    title = f"Trace of the {words.matrix_name(result.problem)}: {value}"
    if trace.interval[0] < trace.interval[1]:
        low, high = (words.rounded_pair(end, half_width)[0] for end in trace.interval)
        title += f"   ({words.percent(trace.confidence)} interval {low} to {high})"
    return title


def _draw_traces(axes: Axes, layers: list[LayerTrace]) -> None:
    axes.set_xlim(*_limits([0.0, *(end for layer in layers for end in _ends(layer))]))
    for row, layer in enumerate(layers):
        axes.barh(row, layer.estimate, height=0.62, color=_colour(layer))
        canvas.whisker(axes, row, layer.interval)
        value = words.with_error(layer.estimate, words.half_width(layer.interval))
        canvas.beside(axes, row, value, _GAP)
    axes.axvline(0, color=canvas.QUIET, linewidth=0.8)
    canvas.name_rows(axes, [layer.name for layer in layers])
    canvas.plain_ticks(axes, 5)
    axes.set_xlabel("trace")
    axes.grid(axis="x")


def _draw_per_parameter(axes: Axes, layers: list[LayerTrace]) -> None:
    values = [words.per_parameter(layer) for layer in layers]
    shares = [max(layer.num_parameters, 1) for layer in layers]
    ends = [end / n for layer, n in zip(layers, shares, strict=True) for end in _ends(layer)]
    axes.set_xlabel("trace per parameter" + _scale(axes, values, ends))
    for row, (layer, value, n) in enumerate(zip(layers, values, shares, strict=True)):
        canvas.whisker(axes, row, (layer.interval[0] / n, layer.interval[1] / n))
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
        canvas.plain_ticks(axes, 3)
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
    ticks = canvas.apart(axes, ticks, 0.24)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    return ", log scale"


def _arrange(figure: Figure, bars: Axes, dots: Axes) -> None:
    """Give the names the room they need, and the bars what is left."""
    left = canvas.SIDE + canvas.names_width(bars) + 0.1
    right = canvas.WIDTH - canvas.SIDE - _PER_PARAMETER
    tall = figure.get_figheight() - canvas.TOP - _BOTTOM
    numbers = max((text.get_window_extent().width for text in bars.texts), default=0.0)
    width = right - left - numbers / figure.dpi - 2.5 * _GAP
    canvas.place(figure, bars, left, _BOTTOM, width, tall)
    canvas.place(figure, dots, right, _BOTTOM, _PER_PARAMETER, tall)


def _notes(result: TraceResult, layers: list[LayerTrace]) -> list[str]:
    confidence = words.percent(result.trace.confidence)
    notes = [f"Lines are {confidence} intervals."]
    if any(words.includes_zero(layer.interval) for layer in layers):
        notes.append("Pale: the interval includes 0.")
    hidden = len(result.layers) - len(layers)
    if hidden:
        rest = sum(layer.estimate for layer in result.layers)
        rest -= sum(layer.estimate for layer in layers)
        notes.append(f"And {words.count(hidden, 'smaller layer')}: sum {words.number(rest)}.")
    return notes


def _colour(layer: LayerTrace) -> str:
    return canvas.PALE if words.includes_zero(layer.interval) else canvas.ACCENT


def _ends(layer: LayerTrace) -> tuple[float, ...]:
    return tuple(end for end in (layer.estimate, *layer.interval) if math.isfinite(end))


def _limits(values: list[float]) -> tuple[float, float]:
    """The range of some values with a little air, but none below or above zero alone."""
    low, high = min(values), max(values)
    air = 0.04 * (high - low) or 1.0
    return (low - air if low < 0 else 0.0), (high + air if high > 0 else 0.0 if low < 0 else air)
