"""Symmetries as a picture: by how much each family breaks, and how many directions it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hesscli.render import words
from hesscli.render.figures import canvas
from hesscli.render.figures.rows import Rows
from hesscli.results import SymmetryFamily, SymmetryResult

_LEGEND = 0.3
"""Inches between the headings and the rows."""
_LEAST, _MOST = 1e-18, 10.0
_RESIDUALS = (
    ("gradient_residual", "o", "gradient"),
    ("hessian_residual", "s", "product"),
    ("finite_residual", "D", "loss, by a finite transformation"),
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
    names = [f"{one.name}: {words.ends(one.layers)}" for one in families]
    if not families:
        names = [layer.name for layer in result.layers][: canvas.MOST_LAYERS]
    above = _LEGEND if families else 0.0
    rows = Rows(_title(result), canvas.provenance(result), names, above=above)
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
    canvas.note(rows.figure, _notes() + canvas.not_drawn(hidden, "family", "more "))
    return rows.figure


def _title(result: SymmetryResult) -> str:
    held = sum(one.status == "holds" for one in result.families)
    return (
        f"Symmetries: {held} of {len(result.families)} families hold, with "
        f"{words.count(result.flat.directions, 'null direction')}"
    )


def _draw(axes: Axes, families: tuple[SymmetryFamily, ...]) -> None:
    axes.set_xscale("log")
    axes.set_xlim(_LEAST, _MOST)
    for row, family in enumerate(families):
        for attribute, marker, _ in _RESIDUALS:
            value = getattr(family, attribute)
            if value is not None:
                place = min(max(value, _LEAST), _MOST)
                axes.plot(place, row, marker, color=_COLOURS[family.status], markersize=5)
    ticks = [10.0**power for power in range(-18, 1, 6)]
    axes.set_xticks(ticks, [f"{tick:.0e}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("residual, relative to what would be usual")
    axes.grid(axis="x")


def _notes() -> list[str]:
    return ["What is rounding lies at the left; pale families are broken."]


# -- Which pictures an answer has, by the names of their files -------------------------------------


def figures(result: SymmetryResult, _asked: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """The residuals, family by family."""
    yield "symmetry", residual_figure(result)
