"""A trace as people read it in a terminal, from the proof down to the cost."""

from __future__ import annotations

import math

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hesscli.render import words
from hesscli.render.shared import (
    cost_line,
    error_budget,
    listed,
    listing_notes,
    method_line,
    noises,
    proof_line,
    status_line,
    trace_lines,
)
from hesscli.render.terminal import GAP, Bar, Name, Plainable, facts, ruled_table
from hesscli.results import LayerTrace, TraceResult


def trace_table(result: TraceResult, full: bool = False) -> RenderableType:
    """Lay out the answer of ``hesscli trace``.

    Args:
        result: the answer; its totals are those of the network, whichever layers it has.
        full: list every layer, however many there are.

    Returns:
        Something that a rich console prints at any width and in any encoding.
    """
    visible = listed(result.layers, full)
    notes = listing_notes(visible, result)
    return Plainable(
        Group(
            proof_line(result.problem),
            GAP,
            *trace_lines(result),
            *error_budget(result, "error budget"),
            GAP,
            _layer_table(result, visible),
            *([facts(notes, style="dim")] if notes else []),
            GAP,
            status_line(result, "the interval", _shortfall(result)),
            cost_line(result.cost),
            method_line(result),
        )
    )


def _layer_table(result: TraceResult, layers: list[LayerTrace]) -> Table:
    confidence = words.percent(result.trace.confidence)
    table = ruled_table()
    table.add_column("layer")
    for heading in ("parameters", "trace", f"± ({confidence})", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    table.add_column("per param.", justify="right", no_wrap=True)
    largest = max((abs(layer.estimate) for layer in layers), default=0.0)
    for layer in layers:
        _add_layer(table, layer, result.trace.estimate, largest)
    return table


def _add_layer(table: Table, layer: LayerTrace, total: float, largest: float) -> None:
    value, error = words.rounded_pair(layer.estimate, words.half_width(layer.interval))
    uncertain = words.includes_zero(layer.interval)
    table.add_row(
        Name(layer.name),
        Text(words.count(layer.num_parameters)),
        Text(value),
        Text(error),
        Text(words.percent(layer.estimate / total) if total else ""),
        Bar(_ratio(layer.estimate, largest)),
        Text(words.number(words.per_parameter(layer))),
        style="dim" if uncertain else "",
    )


def _ratio(value: float, largest: float) -> float:
    return value / largest if largest and math.isfinite(value / largest) else 0.0


def _shortfall(result: TraceResult) -> str:
    """What would have reached the tolerance, or which one was reached."""
    found = noises(result)
    largest = f"{found[0].source} is largest: {found[0].remedy}; " if found else ""
    error = words.half_width(result.trace.interval)
    accept = words.number(error, 2) if math.isfinite(error) else "any size"
    return f"{largest}or accept ± {accept}"
