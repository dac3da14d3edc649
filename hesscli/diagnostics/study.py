"""The steps of a sensitivity study, each of which may be the last."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hesscli.diagnostics.clock import Clock
from hesscli.diagnostics.collecting import Collected
from hesscli.diagnostics.method import Draw
from hesscli.diagnostics.opening import PROOF_GRADIENTS, Opening
from hesscli.diagnostics.predictions import Measured, Predictions
from hesscli.diagnostics.ranking import Repeats, repeats, saliencies
from hesscli.diagnostics.solving import Solved
from hesscli.diagnostics.sweep import sweep
from hesscli.diagnostics.trace import estimation
from hesscli.engines.estimator import Reading
from hesscli.engines.stopping import Tolerance
from hesscli.problem.problem import Problem
from hesscli.results import DampingPoint, Status

Array = NDArray[np.float64]

_TRACE_PRODUCTS = 128
"""Of single batches, for the layers' traces where they are not exact: they serve for comparison."""
_MOST_PROBES = 8
_ANY = Tolerance(math.inf, None)


@dataclass(frozen=True)
class Ranked:
    """Saliencies of all weights ``(d,)``, and those from fewer rows: no ranking without."""

    saliency: Tensor
    repeats: Repeats


@dataclass
class Study:
    """What is known so far.

    Args:
        opening: the matrix that the user cares about.
        collected: the window.
        right: x of the solve.
        solved: its y.
        clock: the time limit, and whom to tell.

    ``reading`` has the layers' traces, for HAWQ's form; ``measured`` each layer's loss
    differences ``(changes, scales)``, each off by ``rounding`` at most.
    """

    opening: Opening
    collected: Collected
    right: Tensor
    solved: Solved
    clock: Clock
    status: Status = "converged"
    sweep: tuple[DampingPoint, ...] = ()
    ranked: Ranked | None = None
    reading: Reading | None = None
    predictions: Predictions | None = None
    measured: list[Array] | None = None
    rounding: float = 0.0
    _products: float = 0.0
    _gradients: float = field(default=PROOF_GRADIENTS)

    @property
    def problem(self) -> Problem:
        """What is studied."""
        return self.opening.operator.problem

    @property
    def products(self) -> float:
        """Products with the whole matrix so far; those with a layer's count by their share."""
        meters = self.opening.operator.meter.products + self._products
        return meters + (self.predictions.products if self.predictions else 0.0)

    @property
    def gradients(self) -> float:
        """Work so far in full-data gradients."""
        known = self.opening.operator.meter.gradients + self._gradients + self.collected.gradients
        return known + (self.predictions.gradients if self.predictions else 0.0)

    @cached_property
    def weights(self) -> Tensor:
        """All weights, flat and float64 ``(d,)``."""
        parameters = self.problem.parameters
        return parameters.flatten([t.detach().double() for t in parameters.tensors])

    @cached_property
    def mattering(self) -> Tensor:
        """The weights, with zeros for each tensor on which no row of the window depends.

        Damping alone would rank such a tensor, by its size, and the loss does not know of it.
        """
        found, start = self.weights.clone(), 0
        for parameter in self.problem.parameters:
            place = slice(start, start + parameter.numel)
            if not self.collected.depends_on(place):
                found[place] = 0
            start = place.stop
        return found

    def solve_only(self) -> None:
        """The dampings of one solve."""
        with self._until_stopped():
            self._sweep()

    def run(self, rtol: float, verify: bool, seed: int) -> None:
        """Everything, or as much as time and the observer allow."""
        places = self.problem.parameters.layer_places()
        saliency = saliencies(self.mattering, self.collected.fisher.diagonal())
        self.ranked = Ranked(saliency, repeats(self.collected, self.mattering, places))
        with self._until_stopped():
            self._sweep()
            self._trace(seed)
            self.predictions = Predictions(self.opening.operator, saliency)
            self.status = self.predictions.to_tolerance(rtol, self.clock)
            if verify:
                self._verify(self.predictions)

    @contextmanager
    def _until_stopped(self) -> Iterator[None]:
        """Keep what there is when the observer wants no more."""
        try:
            yield
        except KeyboardInterrupt:
            self.status = "interrupted"
        refinement = self.solved.refinement
        if self.status == "converged" and refinement is not None and not refinement.converged:
            self.status = "budget"

    def _sweep(self) -> None:
        self.sweep = sweep(
            self.opening.operator, self.collected, self.mattering, self.right, self.clock
        )

    def _trace(self, seed: int) -> None:
        """Traces of all layers, without probes where that is possible."""
        choice, run = estimation(self.opening, "auto", Draw(seed), _ANY, 0.05, self.clock)
        probes = max(2, _TRACE_PRODUCTS // self.problem.num_batches)
        outcome = run.fixed(min(probes, _MOST_PROBES))
        self.reading = outcome.reading
        self._products += outcome.estimator.products
        self._gradients += choice.gradients + outcome.estimator.gradients
        if outcome.status == "interrupted":
            raise KeyboardInterrupt

    def _verify(self, predictions: Predictions) -> None:
        """In float64 where the preflight has seen the model run in it."""
        measured = Measured(self.problem, self.clock)
        self.measured = measured.changes(predictions.layers, self.problem.precision.is_float64)
        self.rounding = measured.rounding
        self._gradients += measured.gradients
        if self.measured is None:
            self.status = "budget"
