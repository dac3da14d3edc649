"""Is the problem sound, and what will the commands cost?"""

from __future__ import annotations

from dataclasses import replace
from pkgutil import resolve_name

from hesscli import world
from hesscli.commands import COMMANDS
from hesscli.diagnostics.arguments import as_asked
from hesscli.diagnostics.plans import Asked, Pilot, measured_pace, planned
from hesscli.diagnostics.run import Clock, Run, started
from hesscli.diagnostics.symmetry_places import PLACES, Places
from hesscli.diagnostics.window import WindowOptions
from hesscli.engines.symmetry.identities import Residuals, worst_of
from hesscli.errors import UnsoundError
from hesscli.problem.precision import doubled
from hesscli.problem.problem import Problem
from hesscli.results import Check, CheckResult, Observe, Plan
from hesscli.vocabulary import USUAL_BUDGET, USUAL_CONFIDENCE


@as_asked
def check(
    problem: Problem,
    *,
    matrix: str = "hessian",
    rtol: float | None = None,
    atol: float | None = None,
    confidence: float = USUAL_CONFIDENCE,
    budget: float | None = USUAL_BUDGET,
    method: str = "auto",
    window: WindowOptions | None = None,
    seed: int = 0,
    mode: str = "auto",
    symmetry: bool = False,
    observe: Observe | None = None,
) -> CheckResult:
    """Preflight, and a plan of time and memory from a few measured products.

    Args:
        problem: model, loss and frozen examples.
        matrix: as for :func:`hesscli.trace`, and so the other arguments.
        rtol: relative tolerance that is planned for; default each command's own.
        atol: absolute tolerance that is planned for.
        confidence: of the planned interval.
        budget: seconds that the planned commands would be given, and that this may take.
        method: as for :func:`hesscli.trace`.
        window: that ``ihvp`` would be given.
        seed: of the pilot's probes.
        mode: autodiff mode.
        symmetry: whether products are to be tried on null directions of the model's own symmetries.
        observe: told of the phases.

    Raises:
        UnsoundError: the problem's curvature would mean nothing.
        KeyboardInterrupt: the observer wanted no more.
    """
    asked = Asked(
        rtol=rtol,
        atol=atol,
        confidence=confidence,
        method=method,
        window=window or WindowOptions(),
        seed=seed,
    )
    with started(problem, matrix, mode, Clock(budget, observe)) as run:
        flight = run.flight
        if symmetry:
            flight = replace(flight, checks=(*flight.checks, _of_symmetry(run, seed)))
        pace, product_bytes = measured_pace(run.operator)
        pilot = Pilot(run, asked, pace)
        commands = tuple(
            planned(name, resolve_name(command.plan), pilot)
            for name, command in COMMANDS.items()
            if command.plan
        )
    return CheckResult(
        preflight=flight,
        plan=Plan(
            gradient_seconds=pace.gradient.seconds,
            product_seconds=pace.products(2, 1).seconds / 2,
            product_bytes=product_bytes,
            parameter_bytes=problem.parameters.size * problem.dtype.itemsize,
            kept_bytes=problem.data.nbytes,
            ranks=world.launched(),
            commands=commands,
        ),
        **run.header(),
    )


def _of_symmetry(run: Run, seed: int) -> Check:
    """Whether products respect the symmetries that gradient and loss have, on one batch.

    Raises:
        UnsoundError: they do not, and so are not those of the loss.
    """
    name = "null directions of symmetry"
    with doubled(run.problem):
        places = Places(run, seed)
        tried = [places.at(number) for number, (_, made) in enumerate(PLACES) if made]
        if run.flight.mode == "finite-difference":
            return Check(name=name, state="skipped", detail="central differences are too rough")
        sizes = [Residuals(*each) for each, _ in tried]
        every = [
            (family, worst_of([Residuals(*found[number]) for _, found in tried], sizes))
            for number, family in enumerate(places.families)
        ]
        respected = [
            (family, one)
            for family, one in every
            if not family.told.eps
            and max(one.gradient, one.finite) <= places.bound
            and ((one.hessian or 0.0) <= places.bound or not places.only_the_loss_has(one))
        ]
    if not respected:
        return Check(name=name, state="not applicable", detail="no family of them was found")
    family, worst = max(respected, key=lambda each: each[1].hessian or 0.0)
    value = worst.hessian or 0.0
    if not value <= places.bound:
        raise UnsoundError(
            "products do not respect a symmetry that loss and gradient have",
            f"{family.told.name} of {', '.join(family.told.layers[:3])} is off by {value:.1e}",
            "another --mode; or a second derivative in the model that is that of its first",
        )
    directions = sum(family.num_directions for family, _ in respected)
    detail = f"{len(respected)} families, {directions} directions"
    return Check(name=name, state="passed", detail=detail, value=value, bound=places.bound)
