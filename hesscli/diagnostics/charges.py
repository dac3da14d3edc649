"""Charges at one end of a training run, at the others, and as they are predicted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from hesscli.engines.symmetry.drift import Prediction
from hesscli.engines.symmetry.families import Family
from hesscli.problem.ends import End, steps_of
from hesscli.problem.problem import Problem
from hesscli.results import Charge, Drift, SymmetryFamily
from hesscli.vocabulary import TrainedWith

_LISTED = 256
"""Charges of a family that a document lists at most: files have all."""


@dataclass(frozen=True)
class Drifted:
    """A family's charges at the last end, and what was predicted for them."""

    report: Drift
    later: Tensor
    predicted: Tensor | None


def drifts(
    problem: Problem,
    families: Sequence[Family],
    reports: Sequence[SymmetryFamily],
    theta: Tensor,
    ends: Sequence[End],
    trained_with: TrainedWith | None,
) -> dict[int, Drifted]:
    """What became of the charges of families that hold, by their numbers."""
    chosen = {
        number: (family, report)
        for number, (family, report) in enumerate(zip(families, reports, strict=True))
        if ends and report.status == "holds" and report.charges
    }
    foretold = _foretold(problem, [family for family, _ in chosen.values()], theta, trained_with)
    found = dict[int, Drifted]()
    for (number, (family, report)), expected in zip(chosen.items(), foretold, strict=True):
        before, after = family.charges(theta), [family.charges(end.theta) for end in ends]
        change = float((after[-1] - before).norm())
        error = None if expected is None else float((after[-1] - expected).norm())
        drift = Drift(
            name=report.name,
            layer=report.layer,
            charges=report.charges,
            size=float(before.norm()),
            changes=tuple(float((each - before).norm()) for each in after),
            predicted_change=None if expected is None else float((expected - before).norm()),
            error=error / change if error is not None and change else error,
        )
        found[number] = Drifted(drift, after[-1], expected)
    return found


def _foretold(
    problem: Problem, families: Sequence[Family], theta: Tensor, trained_with: TrainedWith | None
) -> list[Tensor | None]:
    """Charges of each family after what is known of the steps; None where that is too little."""
    nothing: list[Tensor | None] = [None] * len(families)
    if not families or trained_with is None or trained_with.optimizer != "sgd":
        return nothing
    if trained_with.updates is None and None in (trained_with.steps, trained_with.lr):
        return nothing
    how = trained_with.wd, trained_with.momentum
    ways = [Prediction(family, theta, *how) for family in families]
    for rate, update in steps_of(problem, trained_with):
        for way in ways:
            way.step(rate, update)
    return [way.charges for way in ways]


def listed(
    families: Sequence[Family],
    reports: Sequence[SymmetryFamily],
    theta: Tensor,
    drifted: Mapping[int, Drifted],
) -> Iterator[Charge]:
    """Charges one by one, of families that do not have too many."""
    for number, (family, report) in enumerate(zip(families, reports, strict=True)):
        if report.status != "holds" or report.charges > _LISTED:
            continue
        values = family.charges(theta).tolist()
        nothing: list[float | None] = [None] * len(values)
        end = drifted.get(number)
        later = nothing if end is None else end.later.tolist()
        expected = nothing if end is None or end.predicted is None else end.predicted.tolist()
        for value, after, foretold in zip(values, later, expected, strict=True):
            yield Charge(
                name=report.name, layer=report.layer, value=value, later=after, predicted=foretold
            )


def by_family(
    families: Sequence[Family], reports: Sequence[SymmetryFamily], theta: Tensor
) -> dict[str, np.ndarray]:
    """All charges at the first end, by family."""
    return {
        f"{report.name}: {', '.join(report.layers)}": family.charges(theta).numpy()
        for family, report in zip(families, reports, strict=True)
        if report.status == "holds" and report.charges
    }
