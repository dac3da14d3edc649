"""A diagonal as people read it in a terminal, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hesscli.render import bins, words
from hesscli.render.bins import axis_marks, cells_for, sparkline
from hesscli.render.shared import (
    cost_line,
    error_budget,
    listed,
    listing_notes,
    method_line,
    more_work,
    proof_line,
    status_line,
    trace_lines,
)
from hesscli.render.terminal import GAP, Facts, Name, Plainable, facts, ruled_table
from hesscli.results import BlockReport, DiagResult, Entry, Histogram, Interval, LayerDiagonal

# -- One row for each layer's diagonal -------------------------------------------------------------


_NAME_WIDTH = 11
"""A name is cut down to this before a column is given up for it."""
_GAP = 2


@dataclass(frozen=True)
class Column:
    """A heading and its cells; where room is short, the lowest ranks are given up first."""

    rank: int
    heading: str
    cells: list[Text]
    justify: Literal["left", "right"] = "right"

    @property
    def width(self) -> int:
        """How many characters the column takes."""
        return max(len(line) for line in (*self.heading.split("\n"), *map(str, self.cells)))


@dataclass(frozen=True)
class DiagonalRows:
    """A table of layers and their spectra in as many columns as there is room for."""

    layers: list[LayerDiagonal]
    spectra: list[Histogram]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = self._columns()
        while columns and _width(columns) > options.max_width:
            columns.remove(min(columns, key=lambda column: column.rank))
        table = ruled_table()
        table.add_column("layer", vertical="bottom")
        for column in columns:
            table.add_column(
                column.heading, justify=column.justify, no_wrap=True, vertical="bottom"
            )
        for row, layer in enumerate(self.layers):
            uncertain = words.includes_zero(layer.interval)
            values = (column.cells[row] for column in columns)
            table.add_row(Name(layer.name), *values, style="dim" if uncertain else "")
        yield table

    def _columns(self) -> list[Column]:
        layers = self.layers
        cells = cells_for(self.spectra[0].edges) if self.spectra else ()
        spectra = [sparkline(histogram, cells) for histogram in self.spectra]
        means = [words.rounded_pair(layer.mean, layer.mean_stderr) for layer in layers]
        return [
            Column(2, "entries", [Text(words.count(layer.num_parameters)) for layer in layers]),
            Column(6, "mean", [Text(mean) for mean, _ in means]),
            Column(4, "± s.e.", [Text(error) for _, error in means]),
            Column(1, "std", [Text(_std(layer)) for layer in layers]),
            Column(5, "< 0", [Text(words.percent(layer.negative_fraction)) for layer in layers]),
            Column(7, f"spectrum\n{axis_marks(cells)}", spectra, "left"),
            Column(3, "blocks\nkeep", [Text(_kept(layer)) for layer in layers]),
        ]


def _width(columns: list[Column]) -> int:
    return _NAME_WIDTH + sum(_GAP + column.width for column in columns)


def _std(layer: LayerDiagonal) -> str:
    return words.rounded_pair(layer.std, layer.std_stderr)[0] if layer.std else "0"


def _kept(layer: LayerDiagonal) -> str:
    return words.percent(layer.block.explained) if words.is_averaged(layer.block) else "-"


# -- One layer's diagonal in full detail -----------------------------------------------------------


def layer_details(layer: LayerDiagonal) -> Iterator[RenderableType]:
    """A heading, and under it quantiles, largest entries and what block averages keep."""
    yield _heading(layer)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_row("entries", _moments(layer))
    if layer.quantiles:
        table.add_row("quantiles", _quantiles(layer))
    if layer.largest:
        table.add_row("largest", _largest(layer.largest))
    if words.is_averaged(layer.block):
        table.add_row("variance", _variances(layer.block))
    table.add_row("blocks", Group(*_blocks(layer.block)))
    yield Padding(table, (0, 0, 0, 2), expand=False)


def _heading(layer: LayerDiagonal) -> Facts:
    trace = words.with_error(layer.estimate, words.half_width(layer.interval))
    return Facts(
        (
            Text(words.shorten(layer.name, 60), style="bold"),
            Text(words.count(layer.num_parameters, "parameter")),
            Text(f"trace {trace} ({layer.status})"),
        )
    )


def _moments(layer: LayerDiagonal) -> Facts:
    negative = f"negative {words.percent(layer.negative_fraction)}"
    if layer.negative_stderr:
        negative += f" ± {words.percent(layer.negative_stderr)}"
    return facts(
        (
            f"mean {words.with_error(layer.mean, layer.mean_stderr)}",
            f"std {words.with_error(layer.std, layer.std_stderr)}",
            negative,
        )
    )


def _quantiles(layer: LayerDiagonal) -> Facts:
    return facts(
        f"{_level(quantile.level)} {words.with_error(quantile.value, quantile.stderr)}"
        for quantile in layer.quantiles
    )


def _level(level: float) -> str:
    return {0.0: "least", 0.5: "median", 1.0: "greatest"}.get(level, f"{100 * level:g}%")


def _largest(entries: tuple[Entry, ...]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(no_wrap=True)
    for entry in entries:
        place = f"[{', '.join(map(str, entry.index))}]" if entry.index else ""
        value = words.with_error(entry.estimate, entry.stderr)
        table.add_row(Name(entry.parameter + place), Text(value))
    return table


def _variances(block: BlockReport) -> Facts:
    parts = [
        f"between blocks {_with_interval(block.between_variance, block.between_interval)}",
        f"within {_with_interval(block.within_variance, block.within_interval)}",
    ]
    if block.noise_variance is not None:
        parts.append(f"noise of a block's mean {words.number(block.noise_variance, 2)}")
    return facts(parts)


def _blocks(block: BlockReport) -> Iterator[Text]:
    if words.is_averaged(block):
        share = words.share_within(block.explained, block.explained_interval)
        yield Text(f"{words.count(block.count)} by rule {block.rule} keep {share}")
    yield Text(block.verdict)


def _with_interval(value: float, interval: Interval) -> str:
    low, high = (words.number(end, 2) for end in interval)
    return words.number(value, 2) + (f" ({low} to {high})" if low != high else "")


# -- A diagonal as people read it in a terminal, layer by layer ------------------------------------


_FEW_LAYERS = 6


def diag_table(result: DiagResult, full: bool = False) -> RenderableType:
    """Lay out the answer of ``hesscli diag``.

    Args:
        result: the answer; its totals are those of the network, whichever layers it has. A few
            that were chosen are shown in full detail.
        full: list every layer, however many there are, and all in full detail.

    Returns:
        Something that a rich console prints at any width and in any encoding.
    """
    visible = listed(result.layers, full)
    detailed = full or (result.num_hidden is not None and len(result.layers) <= _FEW_LAYERS)
    notes = listing_notes(visible, result)
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
