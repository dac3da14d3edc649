"""Which transformations of the parameters leave the loss of every batch as it is?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from hesscli.diagnostics import orbit
from hesscli.diagnostics.arguments import as_asked
from hesscli.diagnostics.charges import Way, by_family, drifts, listed, strays, way_to
from hesscli.diagnostics.keeping import UNKEPT, Ledger
from hesscli.diagnostics.measurement import Work, drive
from hesscli.diagnostics.plans import Pilot
from hesscli.diagnostics.reporting import described
from hesscli.diagnostics.run import Clock, started
from hesscli.diagnostics.symmetry_places import PLACES
from hesscli.diagnostics.symmetry_study import Testing
from hesscli.engines.symmetry.families import Family, Translation, rank_of
from hesscli.errors import BudgetError
from hesscli.problem.ends import End, read_end
from hesscli.problem.precision import doubled
from hesscli.problem.problem import Problem
from hesscli.results import (
    FlatReport,
    LayerSymmetry,
    Observe,
    Status,
    SymmetryFamily,
    SymmetryResult,
)
from hesscli.vocabulary import USUAL_BUDGET, TrainedWith


@as_asked
def symmetries(
    problem: Problem,
    *,
    matrix: str = "hessian",
    budget: float | None = USUAL_BUDGET,
    seed: int = 0,
    mode: str = "auto",
    later: Sequence[Path | str] | None = None,
    trained_with: TrainedWith | None = None,
    observe: Observe | None = None,
    ledger: Ledger = UNKEPT,
) -> SymmetryResult:
    """Symmetries of the data loss: null directions, charges, and what breaks them.

    Families are found by watching how a forward pass uses the parameters, and each is tested in
    float64 on several batches, at the weights and off them: by ⟨∇L, ξ⟩ = 0, by
    Hξ = −(∂ξ/∂θ)ᵀ∇L, and by a finite transformation. What passes all three holds.

    Args:
        problem: model, loss and frozen examples. Weight decay is left out: it breaks every family
            that scales.
        matrix: whose products are tested; of ``ggn`` and ``fisher`` Gξ = 0 everywhere, but for what
            the loss alone undoes.
        budget: seconds; None for no limit.
        seed: of random elements of the groups.
        mode: autodiff mode of the products.
        later: checkpoints of the same run, in their order, whose charges are compared.
        trained_with: how the last of these came from the problem's weights; what it leaves open
            is read from the log, or from the optimizer's state in the last checkpoint.
        observe: told how far the run is; returning True ends it at its result so far.
        ledger: keeps the run, so that it can go on from there.

    Raises:
        InputError: a later checkpoint, or a log of updates, that is not of this model.
        UsageError: a matrix that this problem does not have.
        UnsoundError: the problem's curvature would mean nothing.
        BudgetError: there was no time for one test.
        KeyboardInterrupt: stopped before there was one.
    """
    ends = [read_end(problem, path) for path in later or ()]
    way = way_to(problem, ends, trained_with)
    warnings = (*way.warnings(trained_with, bool(ends)), *strays(problem, ends, way))
    with started(problem, matrix, mode, Clock(budget, observe), ledger) as run, doubled(problem):
        testing = Testing(run, seed)
        status = drive(run.clock, testing, run.ledger) or "exact"
        return _answer(testing, status, ends, way, warnings)


# -- What is said of all families together ---------------------------------------------------------


def _answer(
    testing: Testing, status: Status, ends: Sequence[End], way: Way, warnings: Iterable[str]
) -> SymmetryResult:
    """What has been found, and what became of charges at other ends."""
    run, places = testing.run, testing.places
    problem, theta = run.problem, places.theta
    families = [testing.report(number) for number in range(len(testing.families))]
    charted = drifts(problem, testing.families, families, theta, ends, way)
    return SymmetryResult(
        status=status,
        method=run.method(
            "identities in float64",
            testing.seed,
            f"{len(testing.found)} of {len(PLACES)} places; holds is within {places.bound:.0e}",
        ),
        cost=run.cost(),
        flat=_flat(testing, families),
        families=tuple(families),
        charges=tuple(listed(testing.families, families, theta, charted)),
        orbit=orbit.report(testing.orbit, problem.data.counts[places.indices[0]]),
        later=tuple(end.file for end in ends),
        drifts=tuple(one.report for one in charted.values()),
        charge_values=by_family(testing.families, families, theta),
        layers=tuple(_layers(problem, families)),
        **run.header((*warnings, *_warnings(problem))),
    )


def _flat(testing: Testing, reports: Sequence[SymmetryFamily]) -> FlatReport:
    holding, theta = testing.holding, testing.places.theta
    both = zip(testing.families, reports, strict=True)
    kept = [family for family, report in both if report.gauss_newton_directions]
    independent = rank_of(holding, theta)

    def count(families: Sequence[Family]) -> int:
        """Those that are independent; all of them where that is too much work."""
        rank = independent if len(families) == len(holding) else rank_of(families, theta)
        return sum(family.num_directions for family in families) if rank is None else rank

    return FlatReport(
        directions=sum(family.num_directions for family in holding),
        independent=independent,
        share=count(holding) / len(theta),
        everywhere=count([x for x in holding if isinstance(x, Translation)]),
        gauss_newton=count(kept) if testing.places.has_outputs else None,
    )


def _layers(problem: Problem, reports: Sequence[SymmetryFamily]) -> Iterator[LayerSymmetry]:
    holding = [report for report in reports if report.status == "holds"]
    for name in problem.parameters.layers:
        owned = problem.parameters.in_layer(name)
        yield LayerSymmetry(
            name=name,
            num_parameters=sum(p.numel for p in owned),
            parameters=described(owned),
            families=sum(name in report.layers for report in holding),
            null_directions=sum(x.null_directions for x in holding if x.layer == name),
        )


def _warnings(problem: Problem) -> Iterator[str]:
    if problem.weight_decay:
        yield "weight decay breaks every family that scales: the data loss alone is tested"
    if not problem.precision.is_float64:
        narrow = str(problem.precision.narrowest).removeprefix("torch.")
        yield f"tested in {narrow}: what breaks a family by less than its rounding is not seen"


# -- What ``hesscli symmetry`` will take -----------------------------------------------------------


_LOOKED_THROUGH = 1 << 25
"""Parameters that are looked through in about ten seconds."""


def plan(pilot: Pilot) -> Iterator[Work]:
    """Tests of what a pass suggests.

    Raises:
        BudgetError: that alone would take long.
    """
    if (size := pilot.run.problem.parameters.size) > _LOOKED_THROUGH:
        raise BudgetError(
            "families of a large network are not looked for in a plan",
            f"{size} parameters to look through",
            "hesscli symmetry, or --params for some of them",
        )
    with doubled(pilot.run.problem):
        yield from Testing(pilot.run, pilot.asked.seed).expected(pilot.pace)
