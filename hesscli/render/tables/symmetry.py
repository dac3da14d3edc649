"""Symmetries as people read them in a terminal: each family, and whether it holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from hesscli.render import words
from hesscli.render.tables.shared import cost_lines, listing_notes, proof_line, status_text
from hesscli.render.terminal import GAP, Column, FittedRows, Plainable, facts
from hesscli.results import SymmetryFamily, SymmetryResult

_MANY = 40
"""Families that all get a row."""
_STYLES = {"holds": "", "asymptotic": "yellow", "broken": "dim"}


def symmetry_table(result: SymmetryResult, full: bool = False) -> RenderableType:
    """Lay out the answer of ``hesscli symmetry``.

    Args:
        result: the answer.
        full: list every family, however many there are.

    Returns:
        Something that a rich console prints at any width and in any encoding.
    """
    families = result.families if full else result.families[:_MANY]
    hidden = len(result.families) - len(families)
    notes = [f"and {words.count(hidden)} more: see the JSON"] if hidden else []
    notes += listing_notes(result.layers, result, "layer", "counts are of all")
    rows = [_rows(families)] if families else [Text(_nothing(result), style="dim")]
    return Plainable(
        Group(
            proof_line(result.problem),
            GAP,
            *_flat(result),
            GAP,
            *rows,
            *([facts(notes, style="dim")] if notes else []),
            *_causes(families),
            *_drifts(result),
            *_orbit(result),
            GAP,
            status_text(result.status, _ending(result)),
            *cost_lines(result),
        )
    )


def _nothing(result: SymmetryResult) -> str:
    where = " that acts on these layers" if result.num_hidden is not None else ""
    return f"no family of transformations was found{where}"


def _flat(result: SymmetryResult) -> Iterator[RenderableType]:
    flat = result.flat
    line = Text("null directions  ")
    line.append(words.count(flat.directions), style="bold")
    yield line
    details = [f"{words.percent(flat.share)} of {words.count(result.problem.num_parameters)}"]
    if flat.independent is not None and flat.independent < flat.directions:
        details.append(f"{words.count(flat.independent)} of them independent")
    if flat.independent is None:
        details.append("if all are independent")
    details.append("of the Gauss-Newton matrix everywhere")
    details.append(
        f"of the Hessian {words.count(flat.everywhere)} everywhere and the others where the "
        f"gradient is 0: it is {words.number(result.problem.gradient_norm, 2)}"
    )
    yield facts(details, indent=2, style="dim")


def _rows(families: tuple[SymmetryFamily, ...]) -> FittedRows:
    return FittedRows(
        "family",
        [f"{one.name}: {words.ends(one.layers)}" for one in families],
        [
            Column(6, "", [one.status for one in families], "left"),
            Column(5, "directions", [words.count(one.directions) for one in families]),
            Column(4, "charges", [words.count(one.charges) for one in families]),
            Column(3, "gradient", [_size(one.gradient_residual) for one in families]),
            Column(2, "product", [_size(one.hessian_residual) for one in families]),
            Column(1, "loss", [_size(one.finite_residual) for one in families]),
        ],
        styles=[_STYLES[one.status] for one in families],
    )


def _size(residual: float | None) -> str:
    return "" if residual is None else f"{residual:.0e}"


def _causes(families: tuple[SymmetryFamily, ...]) -> Iterator[RenderableType]:
    """What breaks those that do not hold, each cause once."""
    told = dict[tuple[str, str], list[str]]()
    for one in families:
        if one.status != "holds":
            said = "; ".join(one.causes) or "cause unknown"
            if one.exponent is not None:
                said += f", ever less as the scale grows: by its power {-one.exponent:.2f}"
            told.setdefault((one.name, said), []).append(one.layer)
    for (name, said), layers in told.items():
        yield Text(f"{name} of {words.few(layers, layers)}: {said}", style="dim")


def _drifts(result: SymmetryResult) -> Iterator[RenderableType]:
    """What became of charges at the last end, and what was to be expected."""
    drifts = result.drifts[:_MANY]
    if not drifts:
        return
    yield GAP
    yield FittedRows(
        f"charges at {words.shorten(Path(result.later[-1].path).name, 32)}",
        [f"{one.name}: {one.layer}" for one in drifts],
        [
            Column(2, "charges", [words.count(one.charges) for one in drifts]),
            Column(3, "size", [words.number(one.size) for one in drifts]),
            Column(6, "change", [words.number(one.changes[-1]) for one in drifts]),
            Column(5, "predicted", [_maybe(one.predicted_change) for one in drifts]),
            Column(4, "off by", ["" if one.error is None else _size(one.error) for one in drifts]),
        ],
    )


def _orbit(result: SymmetryResult) -> Iterator[RenderableType]:
    """Between what the trace lies where the loss is the same, and what stays."""
    if result.orbit is None:
        return
    first, *others = result.orbit.points
    least, *_, most = sorted(result.orbit.points, key=lambda point: point.trace)
    yield GAP
    line = Text("trace by random rescalings  ")
    ends = (words.with_error(point.trace, point.trace_error) for point in (least, most))
    line.append(" to ".join(ends), style="bold")
    yield line
    off = max(abs(point.loss - first.loss) for point in others) / (abs(first.loss) or 1.0)
    moved = max(abs(point.companion - first.companion) for point in others)
    yield facts(
        [
            f"{words.with_error(first.trace, first.trace_error)} at the weights as they are",
            f"the loss is the same to {_size(off)}",
            f"Σ θ² ∂²L/∂θ² stays {words.with_error(first.companion, first.companion_error)} to "
            f"{_size(moved / (abs(first.companion) or 1.0))}",
            f"{words.count(result.orbit.probes, 'probe')} on "
            f"{words.count(result.orbit.examples, 'example')}, ± (95%)",
        ],
        indent=2,
        style="dim",
    )


def _maybe(value: float | None) -> str:
    return "" if value is None else words.number(value)


def _ending(result: SymmetryResult) -> str:
    if result.status == "exact":
        return "every family was tested at every place"
    if result.status == "interrupted":
        return "stopped early; what holds does so in the tests made so far"
    return "the budget ended the tests; what holds does so in those made so far"
