"""A diagonal as people read it in a terminal, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hesscli.render import bins, words
from hesscli.render.diag_details import layer_details
from hesscli.render.diag_rows import DiagonalRows
from hesscli.render.layout import GAP, Facts, Name, Plainable, facts
from hesscli.render.noises import more_work
from hesscli.render.outcome import (
    cost_line,
    error_budget,
    listed,
    listing_notes,
    method_line,
    status_line,
    trace_lines,
)
from hesscli.render.proof import proof_line
from hesscli.results import DiagResult, LayerDiagonal

_FEW_LAYERS = 6


def diag_table(
    result: DiagResult, shown: tuple[str, ...] | None = None, full: bool = False
) -> RenderableType:
    """Lay out the answer of ``hesscli diag``.

    Args:
        result: the answer.
        shown: the names of the layers to list; all where None. A few are shown in full detail.
            Totals stay those of the network.
        full: list every layer, however many there are, and all in full detail.

    Returns:
        Something that a rich console prints at any width and in any encoding.
    """
    selected = [layer for layer in result.layers if shown is None or layer.name in shown]
    visible = listed(selected, full)
    detailed = full or (shown is not None and len(selected) <= _FEW_LAYERS)
    notes = listing_notes(visible, selected, result.layers)
    return Plainable(
        Group(
            proof_line(result.problem),
            GAP,
            *_diagonal_lines(result),
            *trace_lines(result),
            *error_budget(result, "error budget of the trace"),
            GAP,
            *_layer_rows(visible, notes),
            *(_details(visible) if detailed else _verdicts(visible)),
            GAP,
            status_line(result, "the relative error", _shortfall(result)),
            cost_line(result.cost),
            method_line(result),
        )
    )


def _diagonal_lines(result: DiagResult) -> tuple[Text, Facts]:
    report, problem = result.diagonal, result.problem
    line = Text(f"diagonal of the {words.matrix_name(problem)}  ")
    line.append(f"norm {words.number(report.norm)}", style="bold")
    if report.relative_error != 0:
        line.append(", relative error ").append(words.percent(report.relative_error), style="bold")
        bound, confidence = map(words.percent, (report.relative_error_bound, report.confidence))
        line.append(f" (below {bound} at {confidence})")
    entries = words.count(problem.num_parameters)
    details = [f"{words.percent(report.negative_fraction)} of {entries} entries negative"]
    if report.shrinkage:
        least, most = map(words.percent, (min(report.shrinkage), max(report.shrinkage)))
        details.append(f"shrunk: {least} to {most} of the noisy part kept, bars conservative")
    return line, facts(details, indent=2, style="dim")


def _layer_rows(layers: list[LayerDiagonal], listing: list[str]) -> Iterator[RenderableType]:
    spectra = bins.trimmed([layer.histogram for layer in layers])
    yield DiagonalRows(layers, spectra)
    notes = ["s.e.: one standard error"]
    if spectra and (edges := spectra[0].edges):
        low = edges[0] if bins.sign(edges, 0) else 0.0
        ends = (words.number(end, 2) for end in (low, edges[-1]))
        notes.append(f"spectrum: from {' to '.join(ends)}, log scales")
    yield facts(notes + listing, style="dim")


def _verdicts(layers: list[LayerDiagonal]) -> Iterator[RenderableType]:
    """What AdaHessian's averages would do to each layer that has blocks."""
    averaged = [layer for layer in layers if words.is_averaged(layer.block)]
    if not averaged:
        return
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(no_wrap=True)
    for layer in averaged:
        table.add_row(Name(layer.name), Text(layer.block.rule), Text(layer.block.verdict))
    yield GAP
    yield Text("AdaHessian's block averages", style="dim")
    yield table


def _details(layers: list[LayerDiagonal]) -> Iterator[RenderableType]:
    for layer in layers:
        yield GAP
        yield from layer_details(layer)


def _shortfall(result: DiagResult) -> str:
    """What would have reached the tolerance, or which one was reached."""
    accept = f"accept {words.percent(result.diagonal.relative_error_bound)}"
    if not result.method.num_probes:
        return accept
    return f"{more_work(result)} halves the probe noise; or {accept}"
