"""Which transformations of the parameters leave the loss of every batch as it is?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import astuple, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hesscli.diagnostics import orbit
from hesscli.diagnostics.arguments import as_asked
from hesscli.diagnostics.charges import Way, by_family, drifts, listed, strays, way_to
from hesscli.diagnostics.keeping import UNKEPT, Kept, Ledger
from hesscli.diagnostics.measurement import Pace, Work, drive
from hesscli.diagnostics.plans import Pilot
from hesscli.diagnostics.reporting import described
from hesscli.diagnostics.run import Clock, Run, started
from hesscli.engines.symmetry.families import Family, Scaling, Translation, normal, rank_of
from hesscli.engines.symmetry.finding import candidates
from hesscli.engines.symmetry.identities import (
    ROUNDING,
    Place,
    Residuals,
    largest_moment,
    residuals_of,
    worst_of,
)
from hesscli.engines.symmetry.watch import Watch
from hesscli.errors import BudgetError, UnsoundError, UsageError
from hesscli.memory import room_for_more
from hesscli.meter import FORWARD
from hesscli.operators.base import LiveTerm
from hesscli.operators.gauss_newton import GaussNewton
from hesscli.operators.products import flatten, gradient
from hesscli.problem.ends import End, read_end
from hesscli.problem.forward import moved
from hesscli.problem.objective import WeightedBatch
from hesscli.problem.precision import doubled, tolerance
from hesscli.problem.problem import Problem
from hesscli.results import (
    Check,
    FlatReport,
    LayerSymmetry,
    Observe,
    Snapshot,
    Status,
    SymmetryFamily,
    SymmetryResult,
)
from hesscli.units import human_bytes
from hesscli.vocabulary import USUAL_BUDGET, TrainedWith

_FINDING, _TESTING, _RESCALING = "finding symmetries", "testing symmetries", "rescaling"
_WATCHED = 2
"""Examples of the pass in which families are found."""
_PLACES = ((0.0, True), (0.0, False), (0.1, True), (0.1, False))
"""How far from the weights each test is made, relative to their size, and whether with products:
symmetry is a matter of the function and not of a point, which may be too special to tell."""
_SCALES, _STEP = 40, 4.0
"""At most so many scales are looked at for one where the breaking can be measured, so far apart."""
_WINDOW = (1e-9, 1e-5)
"""Relative breaking between rounding, and where the next power of eps would be seen."""
_LEAST_POWER = 0.5
"""An eps enters with the scale's first power, or its second: less is not of a power at all."""
_FAR, _GONE = 5.0, 1e-4
"""Where the scale is e to this, and to its double, eps has no more than that share in the loss."""
_NOT_OF_THE_LOSS = "products that are not of the loss, whose gradient has the symmetry"
_OF_THE_LOSS_ALONE = "outputs that it changes: the loss has it, and this matrix has not"
_Numbers = tuple[Any, ...]
"""The fields of residuals, in their order."""


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
        matrix: whose products are tested; ``ggn`` and ``fisher`` have Gξ = 0 everywhere.
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


_BYTES_EACH = 160
"""That a parameter takes while families are looked for: 128 were seen at 27 million of them."""


def found_in(problem: Problem) -> list[Family]:
    """Families that a pass over a few examples suggests, and no test has been put to.

    Raises:
        UsageError: there is no memory for that.
    """
    size, room = problem.parameters.size, room_for_more(problem.device)
    if _BYTES_EACH * size > room:
        raise UsageError(
            "families of so large a network do not fit in the memory that is free",
            f"{size} parameters take {human_bytes(_BYTES_EACH * size)} while they are looked "
            f"through, and there is room for {human_bytes(room)}",
            f"--params for at most {room // _BYTES_EACH} of them, or more memory",
        )
    places = [place.start for place in problem.parameters.places()]
    watch = Watch(problem.parameters.tensors, places)
    batch = problem.sample(_WATCHED)
    with problem.forward_context(), torch.enable_grad(), watch:
        problem.evaluate(batch.data)
    return candidates(watch, problem.parameters)


class Testing(Kept):
    """Families, and their residuals at the places where they have been tested so far.

    Args:
        run: the matrix; its problem computes in float64 as far as it can.
        seed: of random elements.
    """

    kept = ("moments", "found", "sizes", "exponents", "orbit")

    def __init__(self, run: Run, seed: int) -> None:
        self.run, self.seed = run, seed
        self.moments = list[float]()
        """Each family's ⟨∇L, ξ⟩ / |ξ| on all data: what breaks it may be in any batch."""
        self.found = list[list[_Numbers]]()
        self.sizes = list[_Numbers]()
        self.exponents = dict[str, float | None]()
        """By the number of a family; None where nothing falls."""
        self.orbit = list[orbit.Measured]()

    # -- what is tested --------------------------------------------------------------------------

    @cached_property
    def families(self) -> list[Family]:
        """Those that a pass over a few examples suggests."""
        self.run.operator.meter.add(FORWARD, _WATCHED / self.run.problem.data.count)
        return found_in(self.run.problem)

    @property
    def theta(self) -> Tensor:
        """The weights as they are, float64."""
        parameters = self.run.problem.parameters
        return parameters.flatten([t.detach().double().cpu() for t in parameters.tensors])

    @cached_property
    def bound(self) -> float:
        """What may still be rounding."""
        return tolerance(self.run.problem.precision.narrowest)

    @cached_property
    def indices(self) -> list[int]:
        """The batches of the places, as far apart as they can be."""
        every = self.run.problem.indices
        return [every[number * len(every) // len(_PLACES)] for number in range(len(_PLACES))]

    # -- the work --------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether every family was tested somewhere."""
        return bool(self.found)

    def expected(self, pace: Pace) -> Iterator[Work]:
        """Gradients and losses of some batches, and products of some of these."""
        problem, count = self.run.problem, len(self.families)
        counts = [problem.data.counts[i] for i in self.indices]
        shares = [count / problem.data.count for count in counts]
        chosen = [i for i, (_, is_made) in enumerate(_PLACES) if is_made]
        made = sum(shares[i] for i in chosen)
        gradients = (1 + FORWARD * 2 * count) * sum(shares)
        gradients += self.has_outputs * FORWARD * (1 + count) * made
        work = pace.gradient.times(gradients) + pace.products((count + 1) * made, made)
        part = sum(counts[i] for i in chosen) / problem.data.count
        work = replace(work, products=(count + 1) * part)
        told = f"{count} families: {part * (count + 1):.1f} products and {gradients:.1f} gradients"
        yield Work(phase=_TESTING, spent=work, note=f"{told} besides")
        if orbit.can_be_rescaled([one for one in self.families if not one.told.causes]):
            points = (orbit.POINTS + 1) * shares[0]
            work = pace.products(orbit.PRODUCTS * points, points)
            part = (orbit.POINTS + 1) * counts[0] / problem.data.count
            work = replace(work, products=orbit.PRODUCTS * part)
            yield Work(phase=_RESCALING, spent=work)

    def steps(self) -> Iterator[Snapshot]:
        """A place each, then what eps breaks, and how the trace is changed by what holds."""
        self.run.clock.within_budget(Snapshot(phase=_FINDING))
        with self.run.operator.meter.uncounted() if self.found else nullcontext():
            self.families  # noqa: B018 - they are found now, and were counted if they were before
        if self.families and not self.moments:
            self.moments = self._on_all_data()
        for place in range(len(self.found), len(_PLACES)):
            sizes, found = self.at(place)
            self.sizes.append(sizes)
            self.found.append(found)
            self.run.operator.meter.keep()
            yield Snapshot(phase=_TESTING, done=float(place + 1), total=float(len(_PLACES)))
        for number, family in enumerate(self.families):
            if (
                family.told.eps
                and isinstance(family, Scaling)
                and str(number) not in self.exponents
                and self.report(number).status != "holds"
            ):
                self.exponents[str(number)] = self._exponent(family)
                self.run.operator.meter.keep()
                yield Snapshot(phase=_TESTING)
        yield from self._rescaling()

    def _rescaling(self) -> Iterator[Snapshot]:
        families = orbit.can_be_rescaled(self.holding)
        batch = self.run.problem.batch(self.indices[0])
        for number in range(len(self.orbit), orbit.POINTS + 1 if families else 0):
            found = orbit.measured(self.run.operator, batch, families, number, self.seed)
            self.orbit.append(found)
            self.run.operator.meter.keep()
            yield Snapshot(phase=_RESCALING, done=float(number), total=float(orbit.POINTS))

    def _on_all_data(self) -> list[float]:
        """The largest moments of each family by the proof's gradient."""
        problem, theta = self.run.problem, self.theta
        proof = problem.prove()
        slope = proof.gradient.cpu() - problem.weight_decay * theta
        self.run.operator.meter.add(proof.again)
        return [largest_moment(family, theta, slope) for family in self.families]

    def at(self, number: int) -> tuple[_Numbers, list[_Numbers]]:
        """What is usual at one place, and each family's residuals there."""
        problem, (relative, is_made) = self.run.problem, _PLACES[number]
        generator = torch.Generator().manual_seed(self.seed * len(_PLACES) + number)
        batch = problem.batch(self.indices[number])
        snapshot = Snapshot(phase=_TESTING, done=float(number), total=float(len(_PLACES)))
        with moved(problem.parameters.tensors, relative):
            place = self._place(batch, is_made, generator)
            results = list[_Numbers]()
            for family in self.families:
                results.append(astuple(residuals_of(family, place, generator)))
                self.run.clock.look(snapshot)
            return astuple(place.sizes), results

    def _place(self, batch: WeightedBatch, is_made: bool, generator: torch.Generator) -> Place:
        theta = self.theta
        value, found = self._gradient(batch)
        product = self._product(batch) if is_made else None
        spread = 0.0
        if product is not None:
            vector = normal((len(theta),), generator)
            spread = float(product(vector / vector.norm()).norm())
        hessian = self.run.operator.name == "hessian"
        return Place(
            theta,
            lambda there: self._loss(batch, there),
            value,
            found,
            product,
            spread,
            turns=hessian,
            reading=partial(self._read, batch) if is_made and self.has_outputs else None,
        )

    @property
    def has_outputs(self) -> bool:
        """Whether the loss is one of outputs, so that there is a Gauss-Newton matrix."""
        return self.run.problem.hidden_outputs is None

    def _share(self, batch: WeightedBatch) -> float:
        return batch.count / self.run.problem.data.count

    def _gradient(self, batch: WeightedBatch) -> tuple[float, Tensor]:
        problem = self.run.problem
        value = problem.evaluate(batch.data)
        found = flatten(gradient(value, problem.parameters.tensors)).double().cpu()
        self.run.operator.meter.add(problem.gradient_cost, self._share(batch))
        return float(value.detach()), found

    def _loss(self, batch: WeightedBatch, theta: Tensor) -> float:
        """The loss of a batch at other weights."""
        self.run.operator.meter.add(FORWARD, self._share(batch))
        return float(self.run.problem.evaluate(batch.data, self._named(theta)).detach())

    def _read(self, batch: WeightedBatch, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of a batch at other weights, and the slope of the Gauss-Newton loss in them."""
        problem = self.run.problem
        self.run.operator.meter.add(FORWARD, self._share(batch))
        outputs = problem.outputs(batch.data, self._named(theta)).detach().requires_grad_()
        with problem.forward_context():
            value = problem.loss.natural.mean(outputs.clone(), batch.data)  # it may write in them
            return outputs.detach(), gradient(value, [outputs])[0]

    def _named(self, theta: Tensor) -> dict[str, Tensor]:
        """Parameters from a flat vector."""
        problem = self.run.problem
        parts = problem.parameters.split(theta.to(problem.device, problem.dtype))
        return dict(zip(problem.parameters.names, parts, strict=True))

    def _product(self, batch: WeightedBatch) -> _Product:
        return _Product(LiveTerm(batch, self.run.operator))

    # -- what eps breaks -------------------------------------------------------------------------

    def _exponent(self, family: Scaling) -> float | None:
        """With which power of the scale the breaking falls; None where it cannot be measured."""
        problem = self.run.problem
        batch, theta = problem.batch(self.indices[0]), self.theta
        ones = theta.new_ones(family.size)

        def breaking(scale: float) -> tuple[float, float, float]:
            there = family.moved(math.log(scale) * ones, theta)
            parts = problem.parameters.split(there.to(problem.device, problem.dtype))
            leaves = [part.detach().clone().requires_grad_() for part in parts]
            named = dict(zip(problem.parameters.names, leaves, strict=True))
            found = flatten(gradient(problem.evaluate(batch.data, named), leaves)).double().cpu()
            self.run.operator.meter.add(problem.gradient_cost, self._share(batch))
            moment = float(family.moments(there, found).norm())
            usual = float(found.norm()) * float(family.lengths(there).norm())
            terms = float((family.exponent * (there * found)[family.index]).abs().sum())
            return moment, moment / usual if usual else 0.0, moment / terms if terms else 0.0

        scale, direction = 1.0, 0.0
        for _ in range(_SCALES):
            _, relative, cancelled = breaking(scale)  # rounding is of the terms that cancel
            wanted = (relative > _WINDOW[1]) - (cancelled < _WINDOW[0])
            if not wanted or (direction and wanted != direction):
                break
            direction = wanted
            scale *= _STEP**wanted
        sizes = [breaking(scale * factor)[0] for factor in (1.0, 1.5, 2.25)]
        far = (family.moved(power * _FAR * ones, theta) for power in (1, 2))
        one, other = (self._loss(batch, there) for there in far)
        if not all(sizes) or not abs(one - other) <= _GONE * abs(one):
            return None
        slopes = [math.log(one / other) / math.log(1.5) for one, other in pairwise(sizes)]
        return sum(slopes) / len(slopes)

    # -- what came of it -------------------------------------------------------------------------

    @property
    def holding(self) -> list[Family]:
        """The families that hold by what is known so far."""
        standing = (self.report(number).status for number in range(len(self.families)))
        return [x for x, status in zip(self.families, standing, strict=True) if status == "holds"]

    @property
    def of_gauss_newton(self) -> bool:
        """Whether products are with the Gauss-Newton matrix."""
        return isinstance(self.run.operator, GaussNewton)

    def is_undone(self, found: Residuals) -> bool:
        """Whether the loss alone undoes what a family does, which G = JᵀAJ then need not have."""
        return found.gauss_newton is None or not found.gauss_newton <= self.bound

    def only_the_loss_has(self, found: Residuals) -> bool:
        """Whether products are those of that matrix, and so need not respect a family."""
        return self.of_gauss_newton and self.is_undone(found)

    def report(self, number: int) -> SymmetryFamily:
        """Where one family stands."""
        family, told = self.families[number], self.families[number].told
        sizes = [Residuals(*each) for each in self.sizes]
        worst = worst_of([Residuals(*place[number]) for place in self.found], sizes)
        proof = self.run.problem.prove()
        usual = max(sum(proof.lengths), *(one.gradient for one in sizes)) or 1.0
        whole = self.moments[number] / usual
        if not whole <= max(self.bound, proof.rounding):
            worst = replace(worst, gradient=max(worst.gradient, whole))
        exponent = self.exponents.get(str(number))
        product = worst.hessian or 0.0
        if self.run.flight.mode == "finite-difference":  # too rough to tell, as the others are not
            product = float(self.only_the_loss_has(worst))
        judged = worst.gradient, worst.finite, product
        bound = ROUNDING if told.eps else self.bound  # an eps may break it by less than the other
        passes = all(residual <= bound for residual in judged)  # which nan is not
        status = "holds" if passes else "broken"
        if told.eps and not passes and (exponent or 0.0) > _LEAST_POWER:
            status = "asymptotic"
        own = max(worst.gradient, worst.finite) <= self.bound
        causes = (*["eps"] * told.eps, *told.causes)
        if own and not passes and not told.eps:
            alone = self.only_the_loss_has(worst)
            causes = (_OF_THE_LOSS_ALONE,) if alone else (*causes, _NOT_OF_THE_LOSS)
        null = family.num_directions if status == "holds" else 0
        kept = self.of_gauss_newton or not self.is_undone(worst)
        return SymmetryFamily(
            name=told.name,
            layer=told.layers[0],
            layers=told.layers,
            status=status,  # type: ignore[arg-type]
            causes=() if status == "holds" else causes,
            directions=family.num_directions,
            null_directions=null,
            gauss_newton_directions=null * kept if self.has_outputs else None,
            charges=family.num_charges if status == "holds" else 0,
            gradient_residual=worst.gradient,
            hessian_residual=worst.hessian,
            finite_residual=worst.finite,
            gauss_newton_residual=worst.gauss_newton,
            exponent=exponent if status == "asymptotic" else None,
        )


def check_of_symmetry(run: Run, seed: int) -> Check:
    """Whether products respect the symmetries that gradient and loss have, on one batch.

    Raises:
        UnsoundError: they do not, and so are not those of the loss.
    """
    name = "null directions of symmetry"
    with doubled(run.problem):
        testing = Testing(run, seed)
        tried = [testing.at(number) for number, (_, made) in enumerate(_PLACES) if made]
        if run.flight.mode == "finite-difference":
            return Check(name=name, state="skipped", detail="central differences are too rough")
        sizes = [Residuals(*each) for each, _ in tried]
        every = [
            (family, worst_of([Residuals(*found[number]) for _, found in tried], sizes))
            for number, family in enumerate(testing.families)
        ]
        respected = [
            (family, one)
            for family, one in every
            if not family.told.eps
            and max(one.gradient, one.finite) <= testing.bound
            and ((one.hessian or 0.0) <= testing.bound or not testing.only_the_loss_has(one))
        ]
    if not respected:
        return Check(name=name, state="not applicable", detail="no family of them was found")
    family, worst = max(respected, key=lambda each: each[1].hessian or 0.0)
    value = worst.hessian or 0.0
    if not value <= testing.bound:
        raise UnsoundError(
            "products do not respect a symmetry that loss and gradient have",
            f"{family.told.name} of {', '.join(family.told.layers[:3])} is off by {value:.1e}",
            "another --mode; or a second derivative in the model that is that of its first",
        )
    directions = sum(family.num_directions for family, _ in respected)
    detail = f"{len(respected)} families, {directions} directions"
    return Check(name=name, state="passed", detail=detail, value=value, bound=testing.bound)


class _Product:
    """A batch's matrix times a vector."""

    def __init__(self, term: LiveTerm) -> None:
        self._term = term

    def __call__(self, vector: Tensor) -> Tensor:
        problem = self._term.operator.problem
        row = vector[None].to(problem.device, problem.dtype)
        return self._term.apply(row)[0].double().cpu()


# -- What is said of all families together ---------------------------------------------------------


def _answer(
    testing: Testing, status: Status, ends: Sequence[End], way: Way, warnings: Iterable[str]
) -> SymmetryResult:
    """What has been found, and what became of charges at other ends."""
    run, theta = testing.run, testing.theta
    problem = run.problem
    families = [testing.report(number) for number in range(len(testing.families))]
    charted = drifts(problem, testing.families, families, theta, ends, way)
    return SymmetryResult(
        status=status,
        method=run.method(
            "identities in float64",
            testing.seed,
            f"{len(testing.found)} of {len(_PLACES)} places; holds is within {testing.bound:.0e}",
        ),
        cost=run.cost(),
        flat=_flat(testing, families),
        families=tuple(families),
        charges=tuple(listed(testing.families, families, theta, charted)),
        orbit=orbit.report(testing.orbit, problem.data.counts[testing.indices[0]]),
        later=tuple(end.file for end in ends),
        drifts=tuple(one.report for one in charted.values()),
        charge_values=by_family(testing.families, families, theta),
        layers=tuple(_layers(problem, families)),
        **run.header((*warnings, *_warnings(problem))),
    )


def _flat(testing: Testing, reports: Sequence[SymmetryFamily]) -> FlatReport:
    holding, theta = testing.holding, testing.theta
    of_gauss_newton = sum(report.gauss_newton_directions or 0 for report in reports)
    directions = sum(family.num_directions for family in holding)
    independent = rank_of(holding, theta)
    count = directions if independent is None else independent
    return FlatReport(
        directions=directions,
        independent=independent,
        share=count / len(theta),
        everywhere=sum(x.num_directions for x in holding if isinstance(x, Translation)),
        gauss_newton=of_gauss_newton if testing.has_outputs else None,
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
