"""Families of symmetries, and what the tests of each find at some places."""

from __future__ import annotations

import math
from dataclasses import astuple
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hesscli.diagnostics.run import Run
from hesscli.engines.symmetry.families import Family, Scaling, normal
from hesscli.engines.symmetry.finding import candidates
from hesscli.engines.symmetry.identities import (
    UNITS,
    Place,
    Residuals,
    largest_moment,
    residuals_of,
)
from hesscli.engines.symmetry.watch import Watch
from hesscli.errors import UsageError
from hesscli.memory import room_for_more
from hesscli.meter import FORWARD
from hesscli.operators.base import LiveTerm
from hesscli.operators.gauss_newton import GaussNewton
from hesscli.operators.products import flatten, gradient
from hesscli.operators.terms import Terms
from hesscli.problem.forward import moved
from hesscli.problem.named_losses import BinaryCrossEntropy, CrossEntropy
from hesscli.problem.objective import Sample, WeightedBatch
from hesscli.problem.precision import tolerance
from hesscli.problem.problem import Problem
from hesscli.results import Snapshot
from hesscli.units import human_bytes

TESTING = "testing symmetries"
_WATCHED = 2
"""Examples of the pass in which families are found."""
PLACES = ((0.0, True), (0.0, False), (0.1, True), (0.1, False))
"""How far from the weights each test is made, relative to their size, and whether with products:
symmetry is a matter of the function and not of a point, which may be too special to tell."""
_SCALES, _STEP = 40, 4.0
"""At most so many scales are looked at for one where the breaking can be measured, so far apart."""
_WINDOW = (1e-9, 1e-5)
"""Relative breaking between rounding, and where the next power of eps would be seen."""
_FAR, _GONE = 5.0, 1e-4
"""Where the scale is e to this, and to its double, eps has no more than that share in the loss."""
Numbers = tuple[Any, ...]
"""The fields of residuals, in their order."""

# -- What is tested --------------------------------------------------------------------------------

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


# -- The tests -------------------------------------------------------------------------------------


class Places:
    """Families, and the batches and weights at which each is tested.

    Args:
        run: the matrix; its problem computes in float64 as far as it can.
        seed: of random elements.
    """

    def __init__(self, run: Run, seed: int) -> None:
        self.run, self.seed = run, seed

    @cached_property
    def families(self) -> list[Family]:
        """Those that a pass over a few examples suggests."""
        self.run.operator.meter.add(FORWARD, self.run.problem.share_of(_WATCHED))
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
        return [every[number * len(every) // len(PLACES)] for number in range(len(PLACES))]

    @property
    def has_outputs(self) -> bool:
        """Whether the loss is one of outputs, so that there is a Gauss-Newton matrix."""
        return self.run.problem.hidden_outputs is None

    @property
    def may_be_sure(self) -> bool:
        """Whether the loss is of probabilities, which may all be as good as 1 or 0."""
        return isinstance(self.run.problem.loss, (CrossEntropy, BinaryCrossEntropy))

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

    # -- what is found ---------------------------------------------------------------------------

    def on_all_data(self) -> list[float]:
        """The largest moments of each family by the proof's gradient."""
        problem, theta = self.run.problem, self.theta
        proof = problem.prove()
        slope = proof.gradient.cpu() - problem.weight_decay * theta
        self.run.operator.meter.add(proof.again)
        return [largest_moment(family, theta, slope) for family in self.families]

    def at(self, number: int) -> tuple[Numbers, list[Numbers]]:
        """What is usual at one place, and each family's residuals there."""
        problem, (relative, is_made) = self.run.problem, PLACES[number]
        generator = torch.Generator().manual_seed(self.seed * len(PLACES) + number)
        batch = problem.batch(self.indices[number])
        snapshot = Snapshot(phase=TESTING, done=float(number), total=float(len(PLACES)))
        with moved(problem.parameters.tensors, relative):
            place = self._place(batch, is_made, generator)
            results = list[Numbers]()
            for family in self.families:
                results.append(astuple(residuals_of(family, place, generator)))
                self.run.clock.look(snapshot)
            return astuple(place.sizes), results

    def _place(self, batch: WeightedBatch, is_made: bool, generator: torch.Generator) -> Place:
        theta, vector = self.theta, None
        value, found = self._gradient(batch)
        product = self._product(batch) if is_made else None
        spread = 0.0
        if product is not None:
            vector = normal((len(theta),), generator)
            vector /= vector.norm()
            spread = float(product(vector).norm())
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
            least=self._least(batch, vector),
        )

    def _least(self, batch: WeightedBatch, vector: Tensor | None) -> tuple[float, float]:
        """Of what cancels where a softmax is sure of every example, a share for its rounding.

        Its slope in the logits is a probability less 1 or 0: next to nothing then, and rounded as
        1 is. What other losses' slopes are rounded as, nobody knows, and a share of too much would
        hide what breaks a family.
        """
        problem, operator = self.run.problem, self.run.operator
        if not self.may_be_sure:
            return 0.0, 0.0
        terms = Terms(operator, Sample(problem, (batch.data,), (1.0,), separable=False))
        share = UNITS * torch.finfo(problem.precision.narrowest).eps / self.bound
        operator.meter.add(problem.gradient_cost, self._share(batch))
        slope = share * terms.slope
        if vector is None:
            return slope, 0.0
        operator.meter.add(sum(operator.cost), self._share(batch))
        return slope, share * terms.size_of(vector.to(problem.device, problem.dtype))

    # -- what the loss is asked, and counted -----------------------------------------------------

    def _share(self, batch: WeightedBatch) -> float:
        return self.run.problem.share_of(batch.count)

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
            value = problem.loss.natural.mean(outputs, batch.data)
            return outputs.detach(), gradient(value, [outputs])[0]

    def _named(self, theta: Tensor) -> dict[str, Tensor]:
        """Parameters from a flat vector."""
        problem = self.run.problem
        parts = problem.parameters.split(theta.to(problem.device, problem.dtype))
        return dict(zip(problem.parameters.names, parts, strict=True))

    def _product(self, batch: WeightedBatch) -> _Product:
        return _Product(LiveTerm(batch, self.run.operator))

    # -- what eps breaks -------------------------------------------------------------------------

    def exponent(self, family: Scaling) -> float | None:
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


class _Product:
    """A batch's matrix times a vector."""

    def __init__(self, term: LiveTerm) -> None:
        self._term = term

    def __call__(self, vector: Tensor) -> Tensor:
        problem = self._term.operator.problem
        row = vector[None].to(problem.device, problem.dtype)
        return self._term.apply(row)[0].double().cpu()
