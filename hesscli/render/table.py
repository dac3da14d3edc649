"""A trace as people read it in a terminal, from the proof down to the cost."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hesscli.render import words
from hesscli.render.layout import GAP, Bar, Facts, Name, Plainable, facts, ruled_table
from hesscli.render.proof import proof_line
from hesscli.results import Cost, LayerTrace, TraceResult

_MANY_LAYERS = 40
_LARGEST_LAYERS = 30


def trace_table(
    result: TraceResult, shown: tuple[str, ...] | None = None, full: bool = False
) -> RenderableType:
    """Lay out the answer of ``hesscli trace``.

    Args:
        result: the answer.
        shown: the names of the layers to list; all where None. Totals stay those of the network.
        full: list every layer, however many there are.

    Returns:
        Something that a rich console prints at any width and in any encoding.
    """
    layers = [layer for layer in result.layers if shown is None or layer.name in shown]
    return Plainable(
        Group(
            proof_line(result.problem),
            GAP,
            *_headline(result),
            *_noise_lines(result),
            GAP,
            _layer_table(result, layers, full),
            *_layer_notes(result, layers, full),
            GAP,
            _status(result),
            _cost(result.cost),
            _method(result),
        )
    )


def _headline(result: TraceResult) -> tuple[RenderableType, ...]:
    trace, problem = result.trace, result.problem
    confidence = words.percent(trace.confidence)
    value = words.with_error(trace.estimate, words.half_width(trace.interval))
    line = Text(f"trace of the {words.matrix_name(problem)}  ")
    line.append(value, style="bold").append(f" ({confidence})")
    place = words.half_width(trace.interval)
    low, high = (words.rounded_pair(end, place)[0] for end in trace.interval)
    details = [f"between {low} and {high}"] if low != high else []
    if trace.gauss_newton is not None and trace.residual is not None:
        gauss_newton = words.rounded_pair(trace.gauss_newton, place)[0]
        residual = words.rounded_pair(trace.residual, place)[0]
        details.append(f"Gauss-Newton part {gauss_newton}, the rest {residual}")
    details.append(f"{words.number(trace.estimate / problem.num_parameters)} per parameter")
    if trace.population_interval is not None:
        population = trace.population_interval
        low, high = (words.rounded_pair(end, words.half_width(population))[0] for end in population)
        details.append(f"for unseen examples between {low} and {high}")
    return line, facts(details, indent=2, style="dim")


def _noise_lines(result: TraceResult) -> Iterator[RenderableType]:
    """Where the error comes from, the largest source first, and what would shrink that one."""
    noises = words.noises(result)
    if not noises:
        return
    largest = "largest; " if len(noises) > 1 else ""
    table = Table.grid(padding=(0, 2))
    for index, noise in enumerate(noises):
        size = words.number(noise.size, 2)
        remedy = f"{largest}{noise.remedy}" if index == 0 else ""
        table.add_row(Text(noise.source), Text(f"± {size}", justify="right"), Text(remedy))
    yield GAP
    yield Text("error budget (one standard error each)", style="dim")
    yield Padding(table, (0, 0, 0, 2), expand=False)
    if result.trace.data_stderr and result.problem.num_examples_available is None:
        size = words.number(result.trace.data_stderr, 2)
        yield Text(
            f"  data noise of ± {size} is left out: how many examples there are is not known",
            style="dim",
        )


def _visible(layers: list[LayerTrace], full: bool) -> list[LayerTrace]:
    """The layers to list, in model order."""
    if full or len(layers) <= _MANY_LAYERS:
        return layers
    by_size = sorted(range(len(layers)), key=lambda index: -abs(layers[index].estimate))
    return [layers[index] for index in sorted(by_size[:_LARGEST_LAYERS])]


def _layer_table(result: TraceResult, layers: list[LayerTrace], full: bool) -> Table:
    confidence = words.percent(result.trace.confidence)
    table = ruled_table()
    table.add_column("layer")
    for heading in ("parameters", "trace", f"± ({confidence})", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    table.add_column("per param.", justify="right", no_wrap=True)
    largest = max((abs(layer.estimate) for layer in layers), default=0.0)
    for layer in _visible(layers, full):
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


def _layer_notes(
    result: TraceResult, layers: list[LayerTrace], full: bool
) -> Iterator[RenderableType]:
    visible = _visible(layers, full)
    notes = []
    if len(visible) < len(layers):
        hidden = words.count(len(layers) - len(visible), "smaller layer")
        notes.append(f"{hidden} not listed: see the JSON")
    if len(layers) < len(result.layers):
        every = words.count(len(result.layers), "layer")
        notes.append(f"{words.count(len(layers))} of {every} selected, totals are of them all")
    uncertain = sum(words.includes_zero(layer.interval) for layer in visible)
    if uncertain:
        rows = words.count(uncertain, "dim row")
        notes.append(f"{rows}: the interval includes 0")
    if notes:
        yield facts(notes, style="dim")


def _status(result: TraceResult) -> Text:
    noises = words.noises(result)
    largest = f" {noises[0].source} is largest: {noises[0].remedy};" if noises else ""
    error = words.half_width(result.trace.interval)
    accept = words.number(error, 2) if math.isfinite(error) else "any size"
    meaning = {
        "exact": "no probe noise, and every example was used",
        "converged": "the interval is within the tolerance",
        "budget": f"the tolerance was not reached within the limits;{largest} or accept ± {accept}",
        "data-limited": "data noise alone exceeds the tolerance; "
        + words.more_examples(result.problem),
        "interrupted": "stopped early; the interval is that of the work done so far",
    }[result.status]
    style = "green" if result.status in ("exact", "converged") else "yellow"
    return Text.assemble((result.status, f"bold {style}"), f": {meaning}")


def _cost(cost: Cost) -> Facts:
    return facts(
        (
            f"{words.amount(cost.products)} products",
            f"the work of {words.amount(cost.gradients)} full gradients",
            words.human_seconds(cost.seconds),
            f"{words.human_bytes(cost.peak_bytes)} peak memory",
        )
    )


def _method(result: TraceResult) -> Facts:
    method = result.method
    items = [
        method.name,
        f"{words.count(method.num_probes)} {method.probe_distribution} probes",
        f"{method.probe_design} design",
        f"{method.mode} mode",
        f"seed {method.seed}",
    ]
    return facts(items + ([method.note] if method.note else []), style="dim")
