"""Sensitivities as people read them in a terminal: the window, the solve, and the layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from hesscli.render import words
from hesscli.render.bins import sparklines
from hesscli.render.tables.shared import (
    cost_lines,
    ending,
    larger_budget,
    listed,
    listing_notes,
    proof_line,
    quantiles,
    status_text,
)
from hesscli.render.terminal import (
    GAP,
    Column,
    Facts,
    FittedRows,
    Plainable,
    after_gap,
    facts,
    grid,
)
from hesscli.results import (
    HOLDS_WITHIN,
    LARGE_RESIDUAL,
    LOW_LEVERAGE,
    DampingPoint,
    IhvpResult,
    LayerSensitivity,
    Perturbation,
    Refinement,
    WindowReport,
)
from hesscli.units import human_bytes

# -- What a terminal shows of a window of gradients, the solve with it, and other dampings ---------


_ROWS = {
    "sampled": "gradients of sampled labels, for the Gauss-Newton matrix",
    "example": "gradients of single examples, for the empirical Fisher matrix",
    "microbatch": "mean gradients of a few examples, for a part of the empirical Fisher matrix",
}


def window_lines(result: IhvpResult) -> Iterator[RenderableType]:
    """Which gradients stand for the matrix, and how they are damped."""
    window = result.window
    line = Text("window  ").append(words.seen_by(result), style="bold")
    line.append(f", damping {words.number(window.damping)}")
    yield line.append(f" ({window.relative_damping:.3g} of its mean diagonal)")
    details = [_ROWS.get(window.row_kind.partition(":")[0], window.row_kind)]
    details += [_blocks(window, result.problem.num_parameters), window.dtype]
    details.append(human_bytes(window.num_bytes) + (" on disk" if window.file else ""))
    yield facts(details, indent=2, style="dim")


def _blocks(window: WindowReport, parameters: int) -> str:
    if window.largest_block >= parameters:
        return "in one block"
    return f"in diagonal blocks of at most {words.count(window.largest_block)} entries"


def solve_lines(result: IhvpResult) -> Iterator[RenderableType]:
    """The solution's length, and how well it solves the system with either matrix."""
    solve, residual = result.solve, result.residual
    line = Text(f"(window + damping) y = {solve.vector}  ")
    line.append(f"‖y‖ {words.number(solve.norm)}", style="bold")
    yield line.append(f", ‖{solve.vector}‖ {words.number(solve.vector_norm)}")
    if solve.refinement is not None:
        yield facts(_refined(solve.refinement), indent=2)
    matrix = words.matrix_name(result.problem)
    rows = (
        ("window + damping", _known(residual.window), _window_remark(result)),
        (f"{matrix} + damping", _known(residual.operator), _operator_remark(result)),
    )
    yield Text("relative residual of y against", style="dim")
    yield grid(rows, unbroken=(0, 1), right=(1,), indent=2)


def _known(residual: float | None) -> str:
    return "unknown" if residual is None else words.number(residual, 2)


def _window_remark(result: IhvpResult) -> str:
    if result.solve.refinement is not None:
        return "y was refined for the matrix below"
    return "" if result.residual.window is None else "rounding alone"


def _operator_remark(result: IhvpResult) -> str:
    residual, matrix = result.residual.operator, words.matrix_name(result.problem)
    if residual is None or result.solve.refinement is not None or residual <= LARGE_RESIDUAL:
        return ""
    return f"large: --refine 1e-3 would solve with the {matrix} itself, not the window"


def _refined(refinement: Refinement) -> tuple[str, ...]:
    work = words.count(refinement.iterations, "iteration")
    if refinement.negative_curvature is not None:
        curvature = words.number(refinement.negative_curvature, 2)
        return (
            f"refinement ended after {work}",
            f"the matrix + damping curves downwards there ({curvature})",
            "a larger --damping, or --matrix ggn",
        )
    tolerance = words.number(refinement.tolerance, 2)
    if refinement.converged:
        return (f"refined to {tolerance} in {work} of conjugate gradients",)
    return (f"refinement did not reach {tolerance} in {work} of conjugate gradients",)


def sweep_table(result: IhvpResult) -> Iterator[RenderableType]:
    """One row for each damping, that of the run marked."""
    points, own = result.sweep, result.window.relative_damping
    if not points:
        return
    yield Text("what other dampings make of it", style="dim")
    yield FittedRows(
        "relative",
        [_damping(point, own) for point in points],
        [
            Column(2, "damping", [words.number(point.absolute, 2) for point in points]),
            Column(5, "y in\nspan", [_share(point.span_share) for point in points]),
            Column(3, "cosine\nto next", [words.correlation(point.cosine) for point in points]),
            Column(6, "median\nleverage", [words.probability(point.leverage) for point in points]),
            Column(
                4, "rank\ncorr.", [words.correlation(point.rank_correlation) for point in points]
            ),
            Column(7, "residual", [_number(point.operator_residual) for point in points]),
        ],
        styles=tuple("bold" if is_own(point, own) else "" for point in points),
    )
    yield facts(
        (
            "y in span: share of ‖y‖ that the rows span",
            "cosine: of y to that of the next row",
            "rank corr.: of saliencies with this run's",
            f"residual: against {words.matrix_name(result.problem)} + damping",
        ),
        style="dim",
    )


def is_own(point: DampingPoint, relative: float) -> bool:
    """Tell whether a point of the sweep is at the run's own damping."""
    return math.isclose(point.relative, relative, rel_tol=1e-6)


def _damping(point: DampingPoint, own: float) -> str:
    return f"{point.relative:g}" + (" (run)" if is_own(point, own) else "")


def _share(share: float | None) -> str:
    return "-" if share is None else words.percent(share)


# -- One row for each layer's saliencies, and one for what changes of its weights do ---------------


# The changes that stay where there is little room, with what was measured of the first two.
_HEADLINES = (("round", 4.0), ("prune", 0.5), ("round", 3.0), ("round", 8.0), ("prune", 0.9))
_WITH_MEASURED = 2


def saliency_rows(layers: list[LayerSensitivity], listing: list[str]) -> Iterator[RenderableType]:
    """Rank, mean, certainty and spread of each layer's saliencies.

    Args:
        layers: by rank.
        listing: which layers have no row, in words.
    """
    spectra = sparklines([layer.saliency.histogram for layer in layers])
    means = [
        words.rounded_pair(layer.saliency.mean, words.bar(layer.saliency.stderr))
        for layer in layers
    ]
    yield Text("layers by mean saliency: a ranking, not a loss change", style="dim")
    yield FittedRows(
        "layer",
        [layer.name for layer in layers],
        [
            Column(2, "weights", [words.count(layer.num_parameters) for layer in layers]),
            Column(9, "mean\nsaliency", [mean for mean, _ in means]),
            Column(6, "± (95%)", [error for _, error in means]),
            Column(7, "above\nnext", [words.probability(layer.above_next) for layer in layers]),
            Column(8, "leverage", [words.probability(layer.leverage) for layer in layers]),
            Column(8, "ranking\nis", [layer.ranked_by for layer in layers]),
            Column(3, "halves", [words.correlation(x.half_correlation) for x in layers]),
            Column(1, "|w|", [words.correlation(x.magnitude_correlation) for x in layers]),
            Column(5, "spread", spectra.lines, "left"),
        ],
        numbers=tuple(str(layer.rank) for layer in layers),
        styles=tuple("dim" if x.ranked_by == "magnitude" else "" for x in layers),
    )
    notes = [
        "above next: probability of a higher mean",
        "leverage: median share that data and not damping decides",
        "halves, |w|: rank correlation of two half-windows, and with |w|",
        f"spread: {spectra.axis}",
    ]
    yield facts([*notes, *listing], style="dim")
    yield from _magnitude_warning(layers)


def _magnitude_warning(layers: list[LayerSensitivity]) -> Iterator[Text]:
    """Say where the ranking says no more than the weights themselves."""
    names = [layer.name for layer in layers if layer.ranked_by == "magnitude"]
    if names:
        which, limit = words.few(names, [x.name for x in layers]), words.percent(LOW_LEVERAGE)
        said = f"{which}: leverage below {limit}, this ranking is magnitude |w|"
        yield Text(said, style="yellow")


def change_rows(result: IhvpResult, layers: list[LayerSensitivity]) -> Iterator[RenderableType]:
    """What is predicted of pruning or rounding a layer, beside what was measured."""
    columns = list(_change_columns(layers))
    if not columns:
        return
    yield Text(
        f"predicted change of the loss ({words.number(result.problem.loss, 4)}) "
        "where one layer is rounded or pruned",
        style="dim",
    )
    yield FittedRows(
        "layer",
        [layer.name for layer in layers],
        columns,
        numbers=tuple(str(layer.rank) for layer in layers),
    )
    changes = [change for layer in layers for change in layer.perturbations]
    notes = ["one grid a channel", "prune: the least salient weights set to zero"]
    if any(change.holds is False for change in changes):
        limit = words.percent(HOLDS_WITHIN)
        notes.append(f"!: off by more than {limit} of |linear| + |quadratic|")
    certainty = _least_certain(layers)
    if certainty:
        notes.append(f"two standard errors: at most {words.percent(certainty)} of a prediction")
    yield facts(notes, style="dim")


def _least_certain(layers: Iterable[LayerSensitivity]) -> float | None:
    """The largest two standard errors of a prediction as a share of its size."""
    changes = (change for layer in layers for change in layer.perturbations)
    shares = [2 * change.stderr / change.size() for change in changes if change.size()]
    return max((share for share in shares if math.isfinite(share)), default=None)


def _change_columns(layers: Sequence[LayerSensitivity]) -> Iterator[Column]:
    for kind, level in _kinds(layers):
        place = _HEADLINES.index((kind, level)) if (kind, level) in _HEADLINES else len(_HEADLINES)
        found = [_change(layer, kind, level) for layer in layers]
        heading = f"{level:g} bit" if kind == "round" else f"prune\n{words.percent(level)}"
        rank = 2 * (len(_HEADLINES) - place)
        yield Column(rank, heading, [*map(_predicted, found)])
        if place < _WITH_MEASURED and any(
            change and change.measured is not None for change in found
        ):
            yield Column(rank - 1, "measured", [*map(_measured, found)])


def _kinds(layers: Iterable[LayerSensitivity]) -> list[tuple[str, float]]:
    """Rounding from fine to coarse, then pruning from little to much."""
    kinds = {(str(change.kind), change.level) for layer in layers for change in layer.perturbations}
    rounded = sorted((kind for kind in kinds if kind[0] == "round"), key=lambda kind: -kind[1])
    return rounded + sorted(kind for kind in kinds if kind[0] == "prune")


def _change(layer: LayerSensitivity, kind: str, level: float) -> Perturbation | None:
    """The change of a layer, with one grid a channel where there are two."""
    found = [c for c in layer.perturbations if (c.kind, c.level) == (kind, level)]
    return min(found, key=lambda change: change.granularity == "tensor", default=None)


def _predicted(change: Perturbation | None) -> str:
    return "-" if change is None else words.number(change.predicted, 2)


def _measured(change: Perturbation | None) -> str:
    if change is None or change.measured is None:
        return "- "
    return words.number(change.measured, 2) + ("!" if change.holds is False else " ")


# -- One layer's sensitivity in full detail --------------------------------------------------------


_HOLDS = {True: "yes", False: "no", None: "-"}


def layer_details(layer: LayerSensitivity) -> Iterator[RenderableType]:
    """A heading, and under it quantiles and every change of the layer."""
    yield Facts(
        (
            Text(words.shorten(layer.name, 60), style="bold"),
            Text(words.count(layer.num_parameters, "weight")),
            Text(f"rank {layer.rank}"),
            Text(_leverage(layer)),
        )
    )
    yield facts(_correlations(layer), indent=2)
    if layer.saliency.quantiles:
        yield facts(quantiles(layer.saliency.quantiles), indent=2)
    if layer.perturbations:
        yield Padding(_changes(layer.perturbations), (0, 0, 0, 2), expand=False)


def _leverage(layer: LayerSensitivity) -> str:
    share = f"leverage {words.percent(layer.leverage)}"
    if layer.ranked_by == "magnitude":
        return f"{share}: this ranking is magnitude"
    return share


def _correlations(layer: LayerSensitivity) -> Iterator[str]:
    saliency = layer.saliency
    yield f"mean saliency {words.with_error(saliency.mean, words.bar(saliency.stderr))}"
    yield f"half-windows agree to {words.correlation(layer.half_correlation)}"
    yield f"rank correlation with |w| {words.correlation(layer.magnitude_correlation)}"


def _changes(changes: tuple[Perturbation, ...]) -> FittedRows:
    columns = [
        Column(8, "linear", [_number(change.linear) for change in changes]),
        Column(7, "quadratic", [_number(change.quadratic) for change in changes]),
        Column(1, "sum", [_number(change.predicted) for change in changes]),
        Column(5, "± (95%)", [_number(words.bar(change.stderr)) for change in changes]),
        Column(3, "HAWQ", [_number(change.hawq) for change in changes]),
    ]
    if any(change.measured is not None for change in changes):
        columns.append(Column(6, "measured", [_number(change.measured) for change in changes]))
    if any(change.holds is not None for change in changes):
        columns.append(Column(4, "holds", [_HOLDS[change.holds] for change in changes]))
        columns.append(Column(2, "order", [_order(change) for change in changes]))
    return FittedRows("change", [words.change_name(change) for change in changes], columns)


def _number(value: float | None) -> str:
    return "-" if value is None else words.number(value, 2)


def _order(change: Perturbation) -> str:
    return "-" if change.order is None else f"{change.order:.1f}"


# -- Sensitivities as people read them in a terminal: the window, the solve, and the layers --------


def ihvp_table(result: IhvpResult, full: bool = False) -> RenderableType:
    """Lay out the answer of ``hesscli ihvp``.

    Args:
        result: the answer; its ranks are those among all layers, whichever it has.
        full: list every layer, however many there are, and every change of each.

    Returns:
        Something that a rich console prints at any width and in any encoding.
    """
    selected = sorted(result.layers, key=lambda layer: layer.rank)
    visible = listed(selected, full, lambda layer: -layer.rank)
    return Plainable(
        Group(
            proof_line(result.problem),
            GAP,
            *window_lines(result),
            GAP,
            *solve_lines(result),
            *_layers(result, visible, _listing(result, visible)),
            *(_details(visible) if full else ()),
            *after_gap(sweep_table(result)),
            *_ending(result),
        )
    )


def _layers(
    result: IhvpResult, visible: list[LayerSensitivity], listing: list[str]
) -> Iterator[RenderableType]:
    if visible:
        yield from after_gap(saliency_rows(visible, listing))
        yield from after_gap(change_rows(result, visible))


def _details(layers: list[LayerSensitivity]) -> Iterator[RenderableType]:
    for layer in layers:
        yield from after_gap(layer_details(layer))


def _listing(result: IhvpResult, visible: list[LayerSensitivity]) -> list[str]:
    """Say how sure the whole ranking is, and which layers have no row."""
    notes = []
    if result.ranking is not None and result.ranking.half_correlation is not None:
        agreement = words.correlation(result.ranking.half_correlation)
        notes.append(f"over all weights, half-windows agree to {agreement}")
    return notes + listing_notes(visible, result, "lower layer", "ranks are among them all")


def _ending(result: IhvpResult) -> tuple[RenderableType, ...]:
    if result.status == "converged" and not result.layers and result.solve.refinement is None:
        return GAP, status_text("converged", "solved with the window"), *cost_lines(result)
    subject = "each prediction" if result.layers else "the residual"
    return ending(result, subject, *_shortfall(result))


def _shortfall(result: IhvpResult) -> tuple[str, str]:
    """What would have helped, and which tolerance was reached."""
    longer = f"{larger_budget(result.cost.seconds)} (four times as long)"
    refinement = result.solve.refinement
    if refinement is not None and not refinement.converged:
        if refinement.negative_curvature is not None:
            return "with a larger --damping, or --matrix ggn, the solve can go on", ""
        return longer, f"--refine {refinement.residual:.1e}"
    certainty = _least_certain(result.layers)
    return longer, f"--rtol {words.percent(certainty)}" if certainty else ""
