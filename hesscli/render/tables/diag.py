"""A diagonal as people read it in a terminal, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.text import Text

from hesscli.render import words
from hesscli.render.bins import sparklines
from hesscli.render.tables.shared import (
    ending,
    error_budget,
    listed,
    more_work,
    probes_drawn,
    proof_line,
    quantiles,
    trace_lines,
    trace_notes,
)
from hesscli.render.terminal import (
    GAP,
    Column,
    Facts,
    FittedRows,
    Name,
    Plainable,
    after_gap,
    facts,
    grid,
)
from hesscli.results import BlockReport, DiagResult, Entry, Interval, LayerDiagonal

# -- One layer's diagonal in full detail -----------------------------------------------------------


def layer_details(layer: LayerDiagonal) -> Iterator[RenderableType]:
    """A heading, and under it quantiles, largest entries and what block averages keep."""
    yield _heading(layer)
    rows: list[tuple[str, RenderableType]] = [("entries", _moments(layer))]
    if layer.quantiles:
        rows.append(("quantiles", facts(quantiles(layer.quantiles))))
    if layer.largest:
        rows.append(("largest", _largest(layer.largest)))
    if words.is_averaged(layer.block):
        rows.append(("variance", _variances(layer.block)))
    rows.append(("blocks", Group(*_blocks(layer.block))))
    yield grid(rows, unbroken=(0,), dim=(0,), indent=2)


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
        negative += f" ± {words.percent(words.bar(layer.negative_stderr))}"
    return facts(
        (
            f"mean {words.with_error(layer.mean, words.bar(layer.mean_stderr))}",
            f"std {words.with_error(layer.std, words.bar(layer.std_stderr))}",
            negative,
        )
    )


def _largest(entries: tuple[Entry, ...]) -> RenderableType:
    rows = []
    for entry in entries:
        place = f"[{', '.join(map(str, entry.index))}]" if entry.index else ""
        bar = words.bar(entry.stderr)
        rows.append((Name(entry.parameter + place), words.with_error(entry.estimate, bar)))
    return grid(rows, unbroken=(1,))


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
    visible = listed(result.layers, full, words.trace_size)
    detailed = full or (result.num_hidden is not None and len(result.layers) <= _FEW_LAYERS)
    notes = trace_notes(visible, result)
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
            *ending(
                result,
                "the relative error",
                f"{more_work(result)} halves the probe noise" if result.method.num_probes else "",
                words.percent(result.diagonal.relative_error_bound),
                probes_drawn(result.method),
            ),
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
    spectra = sparklines([layer.histogram for layer in layers])
    means = [words.rounded_pair(layer.mean, words.bar(layer.mean_stderr)) for layer in layers]
    yield FittedRows(
        "layer",
        [layer.name for layer in layers],
        [
            Column(2, "entries", [words.count(layer.num_parameters) for layer in layers]),
            Column(6, "mean", [mean for mean, _ in means]),
            Column(4, "± (95%)", [error for _, error in means]),
            Column(1, "std", [_std(layer) for layer in layers]),
            Column(5, "< 0", [words.percent(layer.negative_fraction) for layer in layers]),
            Column(7, f"spectrum\n{spectra.marks}", spectra.lines, "left"),
            Column(3, "blocks\nkeep", [_kept(layer) for layer in layers]),
        ],
        styles=["dim" if words.includes_zero(layer.interval) else "" for layer in layers],
    )
    yield facts([f"spectrum: {spectra.axis}", *listing], style="dim")


def _std(layer: LayerDiagonal) -> str:
    return words.rounded_pair(layer.std, words.bar(layer.std_stderr))[0] if layer.std else "0"


def _kept(layer: LayerDiagonal) -> str:
    return words.percent(layer.block.explained) if words.is_averaged(layer.block) else "-"


def _verdicts(layers: list[LayerDiagonal]) -> Iterator[RenderableType]:
    """What AdaHessian's averages would do to each layer that has blocks."""
    rows = [
        (Name(layer.name), layer.block.rule, layer.block.verdict)
        for layer in layers
        if words.is_averaged(layer.block)
    ]
    if rows:
        yield GAP
        yield Text("AdaHessian's block averages", style="dim")
        yield grid(rows, unbroken=(1,))


def _details(layers: list[LayerDiagonal]) -> Iterator[RenderableType]:
    for layer in layers:
        yield from after_gap(layer_details(layer))
