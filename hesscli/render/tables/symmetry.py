"""Symmetries as people read them in a terminal: each family, and whether it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from hesscli.render import words
from hesscli.render.families import family_lines, layers_label
from hesscli.render.tables.shared import cost_lines, listing_notes, proof_line, status_text
from hesscli.render.terminal import GAP, Column, FittedRows, Plainable, facts
from hesscli.results import Drift, Orbit, OrbitPoint, SymmetryFamily, SymmetryResult

_MANY = 40
"""Families that all get a row."""
_LABEL = 24
"""Characters that a family's label has room for, at least."""
_CAUSED = 48
"""Characters of layers for which a cause is told."""
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
    if not flat.directions:
        return
    details = [f"{words.percent(flat.share)} of {words.count(result.problem.num_parameters)}"]
    if flat.independent is not None and flat.independent < flat.directions:
        details.append(f"{words.count(flat.independent)} of them independent")
    if flat.independent is None:
        details.append("at most: they are too many to tell how many are independent")
    if flat.gauss_newton == (flat.independent or flat.directions):
        details.append("of the Gauss-Newton matrix everywhere")
    elif flat.gauss_newton is not None:
        details.append(
            f"of the Gauss-Newton matrix {words.count(flat.gauss_newton)} everywhere: "
            "the loss alone undoes the others"
        )
    details.append(
        f"of the Hessian {words.count(flat.everywhere)} everywhere and the others where the "
        f"gradient is 0: it is {words.number(result.problem.gradient_norm, 2)}"
    )
    yield facts(details, indent=2, style="dim")


def _rows(families: tuple[SymmetryFamily, ...]) -> FittedRows:
    return _families(
        "family",
        [(one.name, one.layers) for one in families],
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


def _families(
    heading: str,
    families: Sequence[tuple[str, Sequence[str]]],
    columns: Sequence[Column],
    styles: Sequence[str] = (),
) -> FittedRows:
    """Rows of kinds of families, and the layers that they act on."""

    def fitted(width: int) -> list[str]:
        return [family_lines(*family, width) for family in families]

    names = [f"{kind}: {', '.join(layers)}" for kind, layers in families]
    longest = max(map(len, names), default=0)
    return FittedRows(heading, fitted(longest), columns, styles=styles, fitted=fitted, least=_LABEL)


def _size(residual: float | None) -> str:
    return "" if residual is None else f"{residual:.0e}"


def _causes(families: tuple[SymmetryFamily, ...]) -> Iterator[RenderableType]:
    """What breaks those that do not hold, and what holds for the loss alone, each once."""
    told = dict[tuple[str, str], list[str]]()
    for one in families:
        if said := _cause(one):
            told.setdefault((one.name, said), []).append(one.layer)
    for (name, said), layers in told.items():
        yield Text(f"{name} of {layers_label(layers, _CAUSED)}: {said}", style="dim")


def _cause(family: SymmetryFamily) -> str:
    if family.status == "holds":
        undone = family.gauss_newton_directions == 0
        return "the loss alone undoes it, and the Gauss-Newton matrix has it not" if undone else ""
    said = "; ".join(family.causes) or "cause unknown"
    if family.exponent is not None:
        said += f", ever less as the scale grows: by its power {-family.exponent:.2f}"
    return said


def _drifts(result: SymmetryResult) -> Iterator[RenderableType]:
    """What became of charges at the last end, and what was to be expected."""
    drifts = result.drifts[:_MANY]
    if not drifts:
        return
    yield GAP
    yield _families(
        f"charges at {words.shorten(Path(result.later[-1].path).name, 32)}",
        [(one.name, (one.layer,)) for one in drifts],
        [
            Column(2, "charges", [words.count(one.charges) for one in drifts]),
            Column(3, "size", [words.number(one.size) for one in drifts]),
            Column(6, "change", [words.number(one.changes[-1]) for one in drifts]),
            Column(5, "predicted", [_maybe(one.predicted_change) for one in drifts]),
            Column(4, "off by", [_off(one) for one in drifts]),
        ],
    )
    if any(one.error is not None for one in drifts):
        told = ["off by: found less predicted, relative to the change", "± rounding of the steps"]
        yield facts(told, style="dim")


def _off(drift: Drift) -> str:
    error = _size(drift.error)
    return error if drift.rounding is None else f"{error} ± {_size(drift.rounding)}"


def _orbit(result: SymmetryResult) -> Iterator[RenderableType]:
    """Between what sharpness lies where the loss is the same, and what stays."""
    orbit = result.orbit
    if orbit is None:
        return
    first = orbit.points[0]
    off = max(abs(point.loss - first.loss) for point in orbit.points) / (abs(first.loss) or 1.0)
    yield GAP
    yield FittedRows(
        "by random rescalings",
        ["trace", "largest eigenvalue"],
        [
            Column(6, "as it is", _sharpness(first)),
            Column(5, "least", _sharpness(*_extremes(orbit, min))),
            Column(5, "most", _sharpness(*_extremes(orbit, max))),
            Column(
                4,
                "of D H D",
                [
                    words.with_error(first.companion, first.companion_error),
                    words.with_error(first.largest_companion, first.largest_companion_error),
                ],
            ),
            Column(
                3,
                "which stays to",
                [_size(_moved(orbit, "companion")), _size(_moved(orbit, "largest_companion"))],
            ),
        ],
    )
    yield facts(
        [
            f"the loss is the same to {_size(off)}",
            "D is diagonal with the weights",
            f"{words.count(orbit.probes, 'probe')}, ± (95%), and "
            f"{words.count(orbit.steps, 'step')} of Lanczos' method, ± its residual",
            f"on {words.count(orbit.examples, 'example')}",
        ],
        style="dim",
    )


def _sharpness(trace: OrbitPoint, largest: OrbitPoint | None = None) -> list[str]:
    """The trace of one point, and the eigenvalue of another, with their errors."""
    other = largest or trace
    return [
        words.with_error(trace.trace, trace.trace_error),
        words.with_error(other.largest, other.largest_error),
    ]


def _extremes(orbit: Orbit, choose: Callable[..., OrbitPoint]) -> tuple[OrbitPoint, OrbitPoint]:
    """Where the trace, and where the eigenvalue is least or most."""
    return (
        choose(orbit.points, key=lambda point: point.trace),
        choose(orbit.points, key=lambda point: point.largest),
    )


def _moved(orbit: Orbit, name: str) -> float:
    """By how much what should stay has changed, relative to its size."""
    first, *others = (float(getattr(point, name)) for point in orbit.points)
    return max(abs(other - first) for other in others) / (abs(first) or 1.0)


def _maybe(value: float | None) -> str:
    return "" if value is None else words.number(value)


def _ending(result: SymmetryResult) -> str:
    if result.status == "exact":
        made = "every family was tested at every place"
        return f"{made}; of random rescalings there are estimates" if result.orbit else made
    if result.status == "interrupted":
        return "stopped early; what holds does so in the tests made so far"
    return "the budget ended the tests; what holds does so in those made so far"
