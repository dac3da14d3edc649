"""Charges at one end of a training run, at the others, and as they are predicted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from hesscli.engines.symmetry.drift import Descent, Prediction, rounding_of
from hesscli.engines.symmetry.families import Family
from hesscli.problem.ends import End, Updates, eps_of, settings_in, steps_of, velocity_at
from hesscli.problem.problem import Problem
from hesscli.results import Charge, Drift, SymmetryFamily
from hesscli.vocabulary import TrainedWith

_LISTED = 256
"""Charges of a family that a document lists at most: files have all."""


@dataclass(frozen=True)
class Way:
    """What is known of how the last end came from the first.

    Attributes:
        settings: that were typed, or else those in the log, or in the last checkpoint.
        log: what each step added, if there is one.
        eps: of the coarsest type that steps were made in.
    """

    settings: TrainedWith
    log: Updates | None = None
    eps: float = 0.0

    @property
    def steps(self) -> int:
        """How many there were."""
        return len(self.log) if self.log is not None else self.settings.steps or 0

    @property
    def is_known(self) -> bool:
        """Whether it says enough to predict something."""
        has_steps = self.log is not None or self.settings.steps is not None
        return has_steps and self.settings.optimizer == "sgd"

    def warnings(self, asked: TrainedWith | None, has_ends: bool) -> Iterator[str]:
        """Why not all charges are predicted, where they are not."""
        optimizer = self.settings.optimizer
        if not has_ends:
            if asked is not None:
                yield "--trained-with is of use with a later checkpoint, and there is none"
        elif optimizer == "mixed":
            yield (
                "the optimizer has groups of parameters with unlike settings, between which "
                "charges move: nothing is predicted"
            )
        elif optimizer not in (None, "sgd"):
            name = "the optimizer" if optimizer == "other" else optimizer
            yield (
                f"{name} keeps no charges, for its steps are no gradients: that they "
                "drift is no fault, and nothing is predicted"
            )
        elif self.log is not None:
            rate, rates = self.settings.lr, self.log.rates
            if rate is not None and rates is not None and not np.allclose(rates, rate, atol=0):
                yield (
                    f"lr={rate:g} was typed and counts at each step, not the log's "
                    + " to ".join(f"{each:g}" for each in sorted({min(rates), max(rates)}))
                )
        else:
            yield (
                "quadratic charges drift by what each step adds to them: they are predicted by a "
                "log of the updates alone, --trained-with lr=X,updates=FILE"
            )


def strays(problem: Problem, ends: Sequence[End], way: Way) -> Iterator[str]:
    """Say where a log, by which something is predicted, is not of what led to the last end.

    The problem's weights are in their own type, not yet in float64.
    """
    if way.log is None or not ends or not way.is_known:
        return
    parameters, late = problem.parameters, ends[-1]
    theta = parameters.flatten([t.detach().double().cpu() for t in parameters.tensors])
    if gap := way.log.gap(theta, late.theta):
        first = Path(problem.checkpoint.path).name if problem.checkpoint else "the first weights"
        last, change = Path(late.file.path).name, float((late.theta - theta).norm())
        yield (
            f"the log does not lead from {first} to {last}: its {len(way.log)} steps end "
            f"{gap:.1e} beside {last}, which is {change:.1e} from {first}: no prediction counts"
        )


def way_to(problem: Problem, ends: Sequence[End], asked: TrainedWith | None) -> Way:
    """All that is known of how the last of some ends came to be.

    Raises:
        InputError: there is a log, and it is not of this model.
    """
    settings = asked or TrainedWith()
    log = Updates(settings.updates, problem.parameters) if settings.updates and ends else None
    if log is not None:
        settings = settings.over(log.settings)
    if ends:
        in_file = settings_in(ends[-1])
        has_rates = log is not None and log.rates is not None
        settings = settings.over(in_file._replace(lr=None) if has_rates else in_file)
    if settings.optimizer is None and asked is not None:
        settings = settings._replace(optimizer="sgd")
    return Way(settings, log, eps_of(problem.parameters.tensors) if log is None else log.eps)


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
    way: Way,
) -> dict[int, Drifted]:
    """What became of the charges of families that hold, by their numbers."""
    chosen = {
        number: (family, report)
        for number, (family, report) in enumerate(zip(families, reports, strict=True))
        if ends and report.status == "holds" and report.charges
    }
    foretold = _foretold(problem, [family for family, _ in chosen.values()], theta, way)
    found = dict[int, Drifted]()
    for (number, (family, report)), expected in zip(chosen.items(), foretold, strict=True):
        before, after = family.charges(theta), [family.charges(end.theta) for end in ends]
        change = float((after[-1] - before).norm())
        error = None if expected is None else float((after[-1] - expected).norm())
        rounding = None if expected is None else rounding_of(family, theta, way.eps, way.steps)
        drift = Drift(
            name=report.name,
            layer=report.layer,
            charges=report.charges,
            size=float(before.norm()),
            changes=tuple(float((each - before).norm()) for each in after),
            predicted_change=None if expected is None else float((expected - before).norm()),
            error=error / change if error is not None and change else error,
            rounding=rounding / change if rounding is not None and change else rounding,
        )
        found[number] = Drifted(drift, after[-1], expected)
    return found


def _foretold(
    problem: Problem, families: Sequence[Family], theta: Tensor, way: Way
) -> list[Tensor | None]:
    """Charges of each family after what is known of the steps; None where that is too little."""
    if not families or not way.is_known:
        return [None] * len(families)
    settings = way.settings
    descent = Descent(
        decay=settings.wd or 0.0,
        momentum=settings.momentum or 0.0,
        dampening=settings.dampening or 0.0,
        nesterov=bool(settings.nesterov),
        velocity=velocity_at(problem) if settings.momentum else None,
    )
    predictions = [Prediction(family, theta, descent) for family in families]
    for rate, update in steps_of(settings, way.log):
        for prediction in predictions:
            prediction.step(rate, update)
    return [prediction.charges for prediction in predictions]


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
