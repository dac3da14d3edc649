"""A trace as people read it in a terminal, from the proof down to the cost."""

from __future__ import annotations

import math

from rich.console import Group, RenderableType

from hesscli.render import words
from hesscli.render.tables.shared import (
    ending,
    error_budget,
    listed,
    noises,
    probes_drawn,
    proof_line,
    trace_lines,
    trace_notes,
)
from hesscli.render.terminal import GAP, Bar, Column, FittedRows, Plainable, facts
from hesscli.results import LayerTrace, TraceResult


def trace_table(result: TraceResult, full: bool = False) -> RenderableType:
    """Lay out the answer of ``hesscli trace``.

    Args:
        result: the answer; its totals are those of the network, whichever layers it has.
        full: list every layer, however many there are.

    Returns:
        Something that a rich console prints at any width and in any encoding.
    """
    visible = listed(result.layers, full, words.trace_size)
    notes = trace_notes(visible, result)
    return Plainable(
        Group(
            proof_line(result.problem),
            GAP,
            *trace_lines(result),
            *error_budget(result, "error budget"),
            GAP,
            _layer_rows(visible, result),
            *([facts(notes, style="dim")] if notes else []),
            *ending(result, "the interval", *_shortfall(result), probes_drawn(result.method)),
        )
    )


def _layer_rows(layers: list[LayerTrace], result: TraceResult) -> FittedRows:
    confidence, total = words.percent(result.trace.confidence), result.trace.estimate
    largest = max((abs(layer.estimate) for layer in layers), default=0.0)
    pairs = [words.rounded_pair(x.estimate, words.half_width(x.interval)) for x in layers]
    shares = [words.percent(layer.estimate / total) if total else "" for layer in layers]
    each = [words.number(words.per_parameter(layer)) for layer in layers]
    return FittedRows(
        "layer",
        [layer.name for layer in layers],
        [
            Column(2, "parameters", [words.count(layer.num_parameters) for layer in layers]),
            Column(6, "trace", [value for value, _ in pairs]),
            Column(5, f"± ({confidence})", [error for _, error in pairs]),
            Column(3, "share", shares),
            Column(1, "", [Bar(_ratio(layer.estimate, largest)) for layer in layers], "left"),
            Column(4, "per param.", each),
        ],
        styles=["dim" if words.includes_zero(layer.interval) else "" for layer in layers],
    )


def _ratio(value: float, largest: float) -> float:
    return value / largest if largest and math.isfinite(value / largest) else 0.0


def _shortfall(result: TraceResult) -> tuple[str, str]:
    """What would have reached the tolerance, and which one was reached."""
    found = noises(result)
    largest = f"{found[0].source} is largest: {found[0].remedy}" if found else ""
    error = words.half_width(result.trace.interval)
    return largest, f"± {words.number(error, 2) if math.isfinite(error) else 'any size'}"
