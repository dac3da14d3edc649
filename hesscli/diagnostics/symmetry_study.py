"""Tests of all families, place by place, and where each family stands by them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

from hesscli.diagnostics import orbit
from hesscli.diagnostics.keeping import Kept
from hesscli.diagnostics.measurement import Pace, Work
from hesscli.diagnostics.run import Run
from hesscli.diagnostics.symmetry_places import PLACES, TESTING, Numbers, Places
from hesscli.engines.symmetry.families import Family, Scaling
from hesscli.engines.symmetry.identities import ROUNDING, Residuals, worst_of
from hesscli.meter import FORWARD
from hesscli.results import Snapshot, SymmetryFamily

_FINDING, _RESCALING = "finding symmetries", "rescaling"
_LEAST_POWER = 0.5
"""An eps enters with the scale's first power, or its second: less is not of a power at all."""
_NOT_OF_THE_LOSS = "products that are not of the loss, whose gradient has the symmetry"
_OF_THE_LOSS_ALONE = "outputs that it changes: the loss has it, and this matrix has not"


class Testing(Kept):
    """Families, and their residuals at the places where they have been tested so far.

    Args:
        run: the matrix; its problem computes in float64 as far as it can.
        seed: of random elements.
    """

    kept = ("moments", "found", "sizes", "exponents", "orbit")

    def __init__(self, run: Run, seed: int) -> None:
        self.run, self.seed, self.places = run, seed, Places(run, seed)
        self.moments = list[float]()
        """Each family's ⟨∇L, ξ⟩ / |ξ| on all data: what breaks it may be in any batch."""
        self.found = list[list[Numbers]]()
        self.sizes = list[Numbers]()
        self.exponents = dict[str, float | None]()
        """By the number of a family; None where nothing falls."""
        self.orbit = list[orbit.Measured]()

    @property
    def families(self) -> list[Family]:
        """Those that are tested."""
        return self.places.families

    # -- the work --------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether every family was tested somewhere."""
        return bool(self.found)

    def expected(self, pace: Pace) -> Iterator[Work]:
        """Gradients and losses of some batches, and products of some of these."""
        problem, count = self.run.problem, len(self.families)
        counts = [problem.data.counts[i] for i in self.places.indices]
        shares = [problem.share_of(count) for count in counts]
        chosen = [i for i, (_, is_made) in enumerate(PLACES) if is_made]
        made = sum(shares[i] for i in chosen)
        gradients = (1 + FORWARD * 2 * count) * sum(shares)
        gradients += self.places.has_outputs * FORWARD * (1 + count) * made
        if self.places.may_be_sure:
            gradients += problem.gradient_cost * sum(shares) + sum(self.run.operator.cost) * made
        work = pace.gradient.times(gradients)
        work += pace.graph.times(made) + pace.product.times((count + 1) * made)
        part = sum(counts[i] for i in chosen) / problem.data.count
        work = replace(work, products=(count + 1) * part)
        told = f"{count} families: {part * (count + 1):.1f} products and {gradients:.1f} gradients"
        yield Work(phase=TESTING, spent=work, note=f"{told} besides")
        if orbit.can_be_rescaled([one for one in self.families if not one.told.causes]):
            points = (orbit.POINTS + 1) * shares[0]
            work = pace.graph.times(points) + pace.product.times(orbit.PRODUCTS * points)
            part = (orbit.POINTS + 1) * counts[0] / problem.data.count
            work = replace(work, products=orbit.PRODUCTS * part)
            yield Work(phase=_RESCALING, spent=work)

    def steps(self) -> Iterator[Snapshot]:
        """A place each, then what eps breaks, and how the trace is changed by what holds."""
        self.run.clock.within_budget(Snapshot(phase=_FINDING))
        with self.run.operator.meter.uncounted() if self.found else nullcontext():
            self.families  # noqa: B018 - they are found now, and were counted if they were before
        if self.families and not self.moments:
            self.moments = self.places.on_all_data()
        for place in range(len(self.found), len(PLACES)):
            sizes, found = self.places.at(place)
            self.sizes.append(sizes)
            self.found.append(found)
            self.run.operator.meter.keep()
            yield Snapshot(phase=TESTING, done=float(place + 1), total=float(len(PLACES)))
        for number, family in enumerate(self.families):
            if (
                family.told.eps
                and isinstance(family, Scaling)
                and str(number) not in self.exponents
                and self.report(number).status != "holds"
            ):
                self.exponents[str(number)] = self.places.exponent(family)
                self.run.operator.meter.keep()
                yield Snapshot(phase=TESTING)
        yield from self._rescaling()

    def _rescaling(self) -> Iterator[Snapshot]:
        families = orbit.can_be_rescaled(self.holding)
        batch = self.run.problem.batch(self.places.indices[0])
        for number in range(len(self.orbit), orbit.POINTS + 1 if families else 0):
            found = orbit.measured(self.run.operator, batch, families, number, self.seed)
            self.orbit.append(found)
            self.run.operator.meter.keep()
            yield Snapshot(phase=_RESCALING, done=float(number), total=float(orbit.POINTS))

    # -- what came of it -------------------------------------------------------------------------

    @property
    def holding(self) -> list[Family]:
        """The families that hold by what is known so far."""
        standing = (self.report(number).status for number in range(len(self.families)))
        return [x for x, status in zip(self.families, standing, strict=True) if status == "holds"]

    def report(self, number: int) -> SymmetryFamily:
        """Where one family stands."""
        family, told = self.families[number], self.families[number].told
        sizes = [Residuals(*each) for each in self.sizes]
        worst = worst_of([Residuals(*place[number]) for place in self.found], sizes)
        proof = self.run.problem.prove()
        usual = max(sum(proof.lengths), *(one.gradient for one in sizes)) or 1.0
        whole = self.moments[number] / usual
        if not whole <= max(self.places.bound, proof.rounding):
            worst = replace(worst, gradient=max(worst.gradient, whole))
        exponent = self.exponents.get(str(number))
        product = worst.hessian or 0.0
        if self.run.flight.mode == "finite-difference":  # too rough to tell, as the others are not
            product = float(self.places.only_the_loss_has(worst))
        judged = worst.gradient, worst.finite, product
        # An eps may break it by less than the other bound.
        bound = ROUNDING if told.eps else self.places.bound
        passes = all(residual <= bound for residual in judged)  # which nan is not
        status = "holds" if passes else "broken"
        if told.eps and not passes and (exponent or 0.0) > _LEAST_POWER:
            status = "asymptotic"
        own = max(worst.gradient, worst.finite) <= self.places.bound
        causes = (*["eps"] * told.eps, *told.causes)
        if own and not passes and not told.eps:
            alone = self.places.only_the_loss_has(worst)
            causes = (_OF_THE_LOSS_ALONE,) if alone else (*causes, _NOT_OF_THE_LOSS)
        null = family.num_directions if status == "holds" else 0
        kept = self.places.of_gauss_newton or not self.places.is_undone(worst)
        return SymmetryFamily(
            name=told.name,
            layer=told.layers[0],
            layers=told.layers,
            status=status,  # type: ignore[arg-type]
            causes=() if status == "holds" else causes,
            directions=family.num_directions,
            null_directions=null,
            gauss_newton_directions=null * kept if self.places.has_outputs else None,
            charges=family.num_charges if status == "holds" else 0,
            gradient_residual=worst.gradient,
            hessian_residual=worst.hessian,
            finite_residual=worst.finite,
            gauss_newton_residual=worst.gauss_newton,
            exponent=exponent if status == "asymptotic" else None,
        )
