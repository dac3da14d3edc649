"""A trace as a picture: a bar for each layer, and beside it the trace per parameter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from hesscli.render import words
from hesscli.render.figures import canvas
from hesscli.render.figures.rows import Rows
from hesscli.results import LayerTrace, TraceResult

_PER_PARAMETER = 2.1
"""The second panel's width in inches."""
_DOT = 5.5
"""Its dots' width in points."""


@canvas.styled
def trace_figure(result: TraceResult) -> Figure:
    """Draw the trace of each layer, and beside it the trace per parameter.

    Layers run in model order from top to bottom. With many, the largest are drawn and the rest
    are summed in a note; pale marks are layers whose interval includes 0.

    Args:
        result: the answer of ``hesscli trace``.

    Returns:
        The figure, for ``save_figure`` or for one's own canvas.
    """
    layers = words.largest(result.layers, canvas.MOST_LAYERS, words.trace_size)
    rows = Rows(_title(result), canvas.provenance(result), [layer.name for layer in layers])
    dots = rows.panel()
    _draw_traces(rows, layers)
    _draw_per_parameter(dots, layers)
    left, width = rows.room(1.5 * canvas.GAP + _PER_PARAMETER)
    rows.put(rows.axes, left, width)
    rows.put(dots, canvas.WIDTH - canvas.SIDE - _PER_PARAMETER, _PER_PARAMETER)
    notes = [*_notes(result, layers), *_hidden_lines(dots, layers)]
    canvas.note(rows.figure, notes)
    return rows.figure


def _title(result: TraceResult) -> str:
    trace, half_width = result.trace, words.half_width(result.trace.interval)
    value = words.with_error(trace.estimate, half_width)
    title = f"Trace of the {words.matrix_name(result.problem)}: {value}"
    if trace.interval[0] < trace.interval[1]:
        low, high = (words.rounded_pair(end, half_width)[0] for end in trace.interval)
        title += f"   ({words.percent(trace.confidence)} interval {low} to {high})"
    return title


def _draw_traces(rows: Rows, layers: list[LayerTrace]) -> None:
    axes = rows.axes
    axes.set_xlim(*_limits([0.0, *(end for layer in layers for end in _ends(layer))]))
    for row, layer in enumerate(layers):
        axes.barh(row, layer.estimate, height=0.62, color=_colour(layer))
        canvas.whisker(axes, row, layer.interval)
    rows.columns({"": [words.with_error(x.estimate, words.half_width(x.interval)) for x in layers]})
    axes.axvline(0, color=canvas.QUIET, linewidth=0.8)
    canvas.plain_ticks(axes, 5)
    axes.set_xlabel("trace")
    axes.grid(axis="x")


def _draw_per_parameter(axes: Axes, layers: list[LayerTrace]) -> None:
    values = [words.per_parameter(layer) for layer in layers]
    shares = [max(layer.num_parameters, 1) for layer in layers]
    ends = [end / n for layer, n in zip(layers, shares, strict=True) for end in _ends(layer)]
    _scale(axes, values, ends)
    logarithmic = axes.get_xscale() != "linear"
    scale = f",\n{canvas.log_scale(axes.xaxis)}" if logarithmic else ""
    axes.set_xlabel(f"trace per parameter{scale}")
    for row, (layer, value, n) in enumerate(zip(layers, values, shares, strict=True)):
        canvas.whisker(axes, row, (layer.interval[0] / n, layer.interval[1] / n))
        axes.plot(value, row, "o", markersize=_DOT, color=_colour(layer), zorder=3)
    axes.grid(axis="x")


def _scale(axes: Axes, values: list[float], ends: list[float]) -> None:
    """Linear where all values can be told apart on a line, else logarithmic, signs kept."""
    sizes = [abs(value) for value in values if value]
    if not sizes or max(sizes) / min(sizes) <= 30:
        axes.set_xlim(*_limits([0.0, *ends]))
        canvas.plain_ticks(axes, 3)
        return
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


def _hidden_lines(dots: Axes, layers: list[LayerTrace]) -> list[str]:
    """Say where lines are that are not seen, if any."""
    for layer in layers:
        n, (low, high) = max(layer.num_parameters, 1), layer.interval
        ends = dots.transData.transform([(low / n, 0.0), (high / n, 0.0)])[:, 0]
        if low < high and 72 * (ends[1] - ends[0]) / dots.figure.dpi < _DOT:
            return ["Lines that are shorter than their dot lie behind it."]
    return []


def _colour(layer: LayerTrace) -> str:
    return canvas.PALE if words.includes_zero(layer.interval) else canvas.ACCENT


def _ends(layer: LayerTrace) -> tuple[float, ...]:
    return tuple(end for end in (layer.estimate, *layer.interval) if math.isfinite(end))


def _limits(values: list[float]) -> tuple[float, float]:
    """The range of some values with a little air, but none below or above zero alone."""
    low, high = min(values), max(values)
    air = 0.04 * (high - low) or 1.0
    return (low - air if low < 0 else 0.0), (high + air if high > 0 else 0.0 if low < 0 else air)


# -- Which pictures an answer has, by the names of their files -------------------------------------


def figures(result: TraceResult, _asked: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """The trace, layer by layer."""
    yield "trace", trace_figure(result)
