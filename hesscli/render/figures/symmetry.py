"""Symmetries as a picture: by how much each family breaks, and how many directions it has."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hesscli.render import words
from hesscli.render.families import family_label
from hesscli.render.figures import canvas
from hesscli.render.figures.rows import Rows
from hesscli.results import Orbit, SymmetryFamily, SymmetryResult

_LEGEND = 0.3
"""Inches between the headings and the rows."""
_LEAST, _MOST = 1e-18, 10.0
_MARGIN = 6.0
"""A factor beyond the outermost marks, so that these are whole."""
_LONGEST = 62
"""Characters of a family's label."""
_RESIDUALS = (
    ("gradient_residual", "o", "gradient (its length)"),
    ("hessian_residual", "s", "product (a random vector's)"),
    ("finite_residual", "D", "loss after a finite transformation (its size)"),
)
_COLOURS = {"holds": canvas.ACCENT, "asymptotic": canvas.INK, "broken": canvas.PALE}


@canvas.styled
def residual_figure(result: SymmetryResult) -> Figure:
    """Draw the three residuals of each family, those that hold in colour.

    Args:
        result: the answer of ``hesscli symmetry``.

    Returns:
        The figure, for ``save_figure`` or for one's own canvas.
    """
    families = result.families[: canvas.MOST_LAYERS]
    names = [family_label(one.name, one.layers, _LONGEST) for one in families]
    if not families:
        names = [layer.name for layer in result.layers][: canvas.MOST_LAYERS]
    above = _LEGEND if families else 0.0
    rows = Rows(_title(result), canvas.provenance(result), names, above=above, longest=_LONGEST)
    if families:
        counts = [words.count(one.directions) for one in families]
        rows.columns({"directions": counts, "": [one.status for one in families]})
        canvas.legend(rows.figure, [canvas.symbol(m, canvas.INK, n) for _, m, n in _RESIDUALS])
    else:
        rows.columns({"": ["no symmetry"] * len(names)})
    left, width = rows.room()
    rows.put(rows.axes, left, width)
    _draw(rows.axes, families)
    hidden = len(result.families) - len(families)
    canvas.note(rows.figure, _notes(families) + canvas.not_drawn(hidden, "family", " more"))
    return rows.figure


def _title(result: SymmetryResult) -> str:
    if not result.families:
        return "Symmetries: no family of transformations was found"
    held = sum(one.status == "holds" for one in result.families)
    return (
        f"Symmetries: {held} of {len(result.families)} families hold, with "
        f"{words.count(result.flat.directions, 'null direction')}"
    )


def _draw(axes: Axes, families: tuple[SymmetryFamily, ...]) -> None:
    axes.set_xscale("log")
    for row, family in enumerate(families):
        for attribute, marker, _ in _RESIDUALS:
            value = getattr(family, attribute)
            if value is not None:
                place = min(max(value, _LEAST), _MOST)
                axes.plot(place, row, marker, color=_COLOURS[family.status], markersize=5)
    _decades(axes, _LEAST / _MARGIN, _MOST * _MARGIN)
    axes.set_xlabel("residual, relative to what stands in brackets" if families else "residual")
    axes.grid(axis="x")


def _decades(axes: Axes, low: float, high: float) -> None:
    """A logarithmic axis with a few powers of ten."""
    axes.set_xlim(low, high)
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    step = max(1, (last - first + 3) // 4)
    ticks = [10.0**power for power in range(first, last + 1, step)]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _notes(families: Sequence[SymmetryFamily]) -> list[str]:
    values = [getattr(one, name) for one in families for name, *_ in _RESIDUALS]
    known = [value for value in values if value is not None]
    if not families:
        return []
    said = ["What is rounding lies at the left; pale families are broken."]
    if any(value < _LEAST for value in known):
        said.append(f"What is below {_LEAST:g} is drawn at {_LEAST:g}.")
    if any(not value <= _MOST for value in known):
        said.append(f"What is above {_MOST:g} is drawn at {_MOST:g}.")
    return said


@canvas.styled
def charge_figure(result: SymmetryResult) -> Figure:
    """Draw how far each family's charges have come at every later end, and what was predicted.

    Args:
        result: the answer of ``hesscli symmetry``, with a later checkpoint at least.

    Returns:
        The figure, for ``save_figure`` or for one's own canvas.
    """
    drifts = result.drifts[: canvas.MOST_LAYERS]
    names = [family_label(one.name, (one.layer,), _LONGEST) for one in drifts]
    ends = words.count(len(result.later), "later checkpoint")
    rows = Rows(
        f"Charges at {ends}",
        canvas.provenance(result),
        names,
        above=_LEGEND if drifts else 0.0,
        longest=_LONGEST,
    )
    rows.columns({"charges": [words.count(one.charges) for one in drifts]})
    has_earlier, is_foretold = len(result.later) > 1, any(d.error is not None for d in drifts)
    kinds = (
        ("o", canvas.PALE, "earlier ends", has_earlier),
        ("o", canvas.ACCENT, "the last" if has_earlier else "found", True),
        ("D", canvas.INK, "predicted for it" if has_earlier else "predicted", is_foretold),
    )
    canvas.legend(
        rows.figure,
        [canvas.symbol(mark, colour, name) for mark, colour, name, is_there in kinds if is_there],
    )
    left, width = rows.room()
    rows.put(rows.axes, left, width)
    rows.axes.set_xscale("log")
    places = list[float]()
    for row, drift in enumerate(drifts):
        size = drift.size or 1.0
        *earlier, last = [max(change / size, _LEAST) for change in drift.changes]
        rows.axes.plot(earlier, [row] * len(earlier), "o", color=canvas.PALE, markersize=4)
        rows.axes.plot(last, row, "o", color=canvas.ACCENT, markersize=6)
        places += [*earlier, last]
        if drift.predicted_change is not None:
            place = max(drift.predicted_change / size, _LEAST)
            style: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": canvas.INK}
            rows.axes.plot(place, row, "D", markersize=8, **style)
            places.append(place)
    if places:
        low, high = math.log10(min(places) / 1.5), math.log10(max(places) * 1.5)
        _decades(rows.axes, 10.0 ** math.floor(low), 10.0 ** math.ceil(high))
    rows.axes.set_xlabel("change of a family's charges, relative to their size at the first end")
    rows.axes.grid(axis="x")
    hidden = len(result.drifts) - len(drifts)
    canvas.note(rows.figure, canvas.not_drawn(hidden, "family", " more"))
    return rows.figure


_SHARPNESS = (
    ("trace", "o", canvas.ACCENT, "trace"),
    ("companion", "o", canvas.PALE, "that of D H D"),
    ("largest", "D", canvas.INK, "largest eigenvalue"),
    ("largest_companion", "D", canvas.PALE, "that of D H D"),
)
_APART = 0.16
"""Between the marks of a row, in rows."""
_SHORTEST = 0.1
"""Where a bar reaches 0 it ends at this share of its number."""


def _seen_by(result: SymmetryResult, orbit: Orbit) -> tuple[str, ...]:
    """The facts of a subtitle: those of the estimates, where the tests were on all examples."""
    return (
        *canvas.provenance(result)[:2],
        words.count(orbit.examples, "example"),
        words.count(orbit.probes, "probe"),
        f"{words.count(orbit.steps, 'step')} of Lanczos' method",
    )


@canvas.styled
def orbit_figure(result: SymmetryResult) -> Figure:
    """Draw sharpness after each random rescaling, and the companions that do not change.

    Args:
        result: the answer of ``hesscli symmetry``, with an orbit.

    Returns:
        The figure, for ``save_figure`` or for one's own canvas.
    """
    orbit = result.orbit
    assert orbit is not None
    names = ["as they are", *(f"rescaling {number}" for number in range(1, len(orbit.points)))]
    rows = Rows(
        "Sharpness where the loss is the same", _seen_by(result, orbit), names, above=_LEGEND
    )
    handles = [canvas.symbol(mark, colour, label) for _, mark, colour, label in _SHARPNESS]
    canvas.legend(rows.figure, handles)
    left, width = rows.room()
    rows.put(rows.axes, left, width)
    rows.axes.set_xscale("log")
    places = list[float]()
    for row, point in enumerate(orbit.points):
        for number, (attribute, mark, colour, _) in enumerate(_SHARPNESS):
            value = abs(getattr(point, attribute))
            error = getattr(point, f"{attribute}_error")
            height = row + _APART * (number - (len(_SHARPNESS) - 1) / 2)
            low = max(value - error, value * _SHORTEST, _LEAST)
            rows.axes.plot([low, value + error], [height] * 2, "-", color=colour, linewidth=1.2)
            rows.axes.plot(max(value, _LEAST), height, mark, color=colour, markersize=4)
            places += [low, value + error]
    _decades(rows.axes, min(places) / 2, max(places) * 2)
    rows.axes.set_xlabel("size: traces ± 95%, eigenvalues ± their residuals")
    rows.axes.grid(axis="x")
    canvas.note(
        rows.figure,
        ["D H D, with D the diagonal matrix of the weights, is what no rescaling changes."],
    )
    return rows.figure


# -- Which pictures an answer has, by the names of their files -------------------------------------


def figures(result: SymmetryResult, _asked: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """The residuals, family by family; what became of charges; and the trace's orbit."""
    yield "symmetry", residual_figure(result)
    if result.drifts:
        yield "symmetry_charges", charge_figure(result)
    if result.orbit is not None:
        yield "symmetry_orbit", orbit_figure(result)
