"""A sensitivity study: window, solve, ranking and true losses, each of which may be the last."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hesscli.diagnostics.choice import Choice, Draw
from hesscli.diagnostics.estimation import Estimation, Goal
from hesscli.diagnostics.looks import Tolerance
from hesscli.diagnostics.measurement import Pace, Work
from hesscli.diagnostics.predictions import Measured, Predictions, perturbing, verifying
from hesscli.diagnostics.reporting import chosen, estimation, expected
from hesscli.diagnostics.run import Run
from hesscli.diagnostics.saliency import Inverted, Ranked, ranking, require_rows
from hesscli.diagnostics.solve import RELATIVE, Solved, Solving, sweep, sweeps, swept
from hesscli.diagnostics.trace import standing
from hesscli.diagnostics.window import (
    FEWEST_ROWS,
    WindowOptions,
    collect,
    collecting,
    inverse_work,
    inverting,
    rows_to_be_had,
)
from hesscli.engines.estimator import Reading
from hesscli.engines.mfac import GradientWindow
from hesscli.meter import Algebra
from hesscli.problem.problem import Problem
from hesscli.results import DampingPoint, Snapshot, Status
from hesscli.state import Saved, State

Array = NDArray[np.float64]

_TRACE_PRODUCTS = 128
"""Of single batches, for the layers' traces where they are not exact: they serve for comparison."""
_MOST_PROBES = 8
_ANY, _MISS = Tolerance(math.inf, None), 0.05
_COLLECTING = 0.3
"""Share of the budget after which as many rows as a ranking needs must do."""


@dataclass(frozen=True)
class Ranking:
    """What is predicted of layers: how surely, and whether losses are measured beside it."""

    rtol: float
    verify: bool


class SensitivityStudy:
    """What is known so far, step by step; each may be the last.

    Args:
        run: the matrix that the user cares about.
        options: of the window.
        empty: the window, without rows yet.
        right: x of the solve ``(d,)``; None for the gradient.
        refine: relative residual to which conjugate gradients solve.
        seed: of sampled rows.
        rank: what is predicted of layers, and how surely; None to solve only.

    ``operator`` makes products in the weights' type even under autocast: solves and predictions
    take more digits than bfloat16 has. ``reading`` has the layers' traces, for HAWQ's form, by the
    estimator of ``choice``, which is made when it is needed; ``measuring`` the loss differences
    that have been measured.
    """

    def __init__(
        self,
        run: Run,
        options: WindowOptions,
        empty: GradientWindow,
        right: Tensor | None,
        refine: float | None,
        seed: int,
        rank: Ranking | None = None,
    ) -> None:
        self.run, self.options, self.empty = run, options, empty
        self.operator = run.operator.in_full()
        self.right = self.problem.prove().gradient if right is None else right
        self.refine, self.seed, self.rank = refine, seed, rank
        self.solving: Solving | None = None
        self.sweep: tuple[DampingPoint, ...] = ()
        self.ranked: Ranked | None = None
        self.choice: Choice | None = None
        self.reading: Reading | None = None
        self.predictions: Predictions | None = None
        self.measuring: Measured | None = None
        self.status: Status = "converged"
        self._inverted: Inverted | None = None
        self._traces: Estimation | None = None
        self._predicted_all = self._swept = False
        self._saved: State = {}

    @property
    def problem(self) -> Problem:
        """What is studied."""
        return self.run.problem

    @property
    def solved(self) -> Solved:
        """The solution so far."""
        assert self.solving is not None  # it is ready
        return self.solving.solved

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
        places = list(self.problem.parameters.places())
        reached = self.collected.reached(places)
        unknown = [place for place, is_known in zip(places, reached, strict=True) if not is_known]
        found = self.weights.clone() if unknown else self.weights
        for place in unknown:
            found[place] = 0
        return found

    lasting = False

    @property
    def ready(self) -> bool:
        """Whether there is a solution."""
        return self.solving is not None

    def steps(self) -> Iterator[Snapshot]:
        """The window, the solve, ranking and predictions, other dampings, and true losses."""
        self.collected = yield from collect(
            self.run.operator,
            self.empty,
            self.options,
            self.seed,
            self._is_enough,
            self.run.clock.watch,
            self._saved.get("rows", 0),
            self._saved.get("cut_short", False),
        )
        self.solving = Solving(self.operator, self.collected.fisher, self.right, self.refine)
        if self._saved.get("solving") is None:
            self.solving.count()
        self._restore("solving", self.solving)
        yield from self.solving.steps()
        if self.rank is not None:
            yield from self._ranked()
            yield from self._traced()
            yield from self._predicted(self.rank)
        if not self._swept:
            own = None if self.ranked is None else self.ranked.diagonal
            self.sweep = yield from sweep(
                self.operator, self.collected, self.mattering, self.right, own
            )
            self._swept = True
            self.operator.meter.keep()
            yield Snapshot(phase="inverting")
        if self.rank is not None and self.rank.verify:
            yield from self._verified()

    def state_dict(self) -> State:
        """Rows, but for those of shards, and what stages have found that is not made of them."""
        return {
            "window": self.empty.state_dict(),
            "rows": max(self._saved.get("rows", 0), self.empty.pushes),
            "cut_short": self.solving is not None and self.collected.cut_short,
            "solving": _state_of(self.solving),
            "inverted": _state_of(self._inverted),
            "traces": _state_of(self._traces),
            "status": self.status,
            "predictions": _state_of(self.predictions),
            "predicted_all": self._predicted_all,
            "sweep": [asdict(point) for point in self.sweep],
            "swept": self._swept,
            "measuring": _state_of(self.measuring),
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from where another was: each stage takes its own when it comes to it."""
        self._saved = state
        self.empty.load_state_dict(state["window"])
        self.status, self._predicted_all = state["status"], state["predicted_all"]
        self.sweep = tuple(DampingPoint(**point) for point in state["sweep"])
        self._swept = state["swept"]

    def _restore(self, name: str, stage: Saved) -> None:
        """Let a stage go on from where it was kept, if it had begun."""
        if self._saved.get(name) is not None:
            stage.load_state_dict(self._saved[name])

    def finish(self, cut: Status | None) -> None:
        """Let there be no more.

        Args:
            cut: what ended it before its own end.
        """
        refinement = self.solved.refinement
        if cut is not None:
            self.status = cut
        elif self.status == "converged" and refinement is not None and not refinement.converged:
            self.status = "budget"

    def expected(self, pace: Pace) -> Iterator[Work]:
        """Its stages; batches are seen until all predictions are known, at most all of them.

        Raises:
            UsageError: there are too few rows for a ranking.
        """
        problem, rank, options = self.problem, self.rank, self.options
        rows = rows_to_be_had(problem, options)
        if rank is not None:
            require_rows(rows, self.empty.capacity)
        yield collecting(problem, options, self._rows_in_time(rows, pace), pace)
        inversion = inverting(problem, options, rows)
        yield inversion
        yield Work(phase="refining", spent=pace.products(1))
        if rank is not None:
            yield ranking(problem, options, rows)
            goal, miss, probes = self._tracing
            choice = self.choice or chosen(self.run, "auto", Draw(self.seed))
            yield from expected(self.run, choice, goal, miss, pace, probes)
            yield perturbing(self.operator, pace)
        if sweeps(problem.parameters.size):
            count = len(RELATIVE)
            work = swept(inverse_work(problem, options, rows), with_own=rank is None)
            spent = replace(inversion.spent.times(count), gradients=problem.algebra(work))
            spent += pace.products(count)
            held = count * problem.parameters.size * problem.dtype.itemsize
            yield Work(phase="inverting", spent=spent, num_bytes=held)
        if rank is not None and rank.verify:
            yield verifying(problem, pace)

    def _rows_in_time(self, rows: int, pace: Pace) -> int:
        """As many as :meth:`_is_enough` lets be collected."""
        budget, before = self.run.clock.budget, self.run.before.seconds
        took = collecting(self.problem, self.options, rows, pace).spent.seconds
        if budget is None or before + took <= _COLLECTING * budget:
            return rows
        return min(rows, max(FEWEST_ROWS, int(rows * (_COLLECTING * budget - before) / took)))

    def _is_enough(self, rows: int) -> bool:
        return rows >= FEWEST_ROWS and self.run.clock.spent > _COLLECTING

    def _ranked(self) -> Iterator[Snapshot]:
        require_rows(self.collected.window.count, self.collected.window.capacity)
        places = self.problem.parameters.layer_places()
        self._inverted = Inverted(self.collected, self.mattering, places)
        self._restore("inverted", self._inverted)
        yield from self._inverted.steps(self.run.clock.watch("ranking"), self._count)
        self.ranked = self._inverted.ranked

    def _count(self, work: Algebra) -> None:
        """What is in the state by now."""
        meter = self.run.operator.meter
        meter.add(self.problem.algebra(work))
        meter.keep()

    def _traced(self) -> Iterator[Snapshot]:
        """Traces of all layers, without probes where that is possible."""
        kept = self._saved.get("traces") is not None
        with self.run.operator.meter.uncounted() if kept else nullcontext():
            self.choice = chosen(self.run, "auto", Draw(self.seed))
        traces = self._traces = estimation(self.run, self.choice, *self._tracing)
        self._restore("traces", traces)
        yield from traces.steps()
        self.reading = traces.outcome(None).reading

    @property
    def _tracing(self) -> tuple[Goal, float, int]:
        """To what goal traces are estimated, and from how many probes."""
        probes = min(max(2, _TRACE_PRODUCTS // self.problem.num_batches), _MOST_PROBES)
        return partial(standing, tolerance=_ANY), _MISS, probes

    def _predicted(self, rank: Ranking) -> Iterator[Snapshot]:
        assert self.ranked is not None  # it comes before
        self.predictions = Predictions(self.operator, self.ranked.saliency)
        self._restore("predictions", self.predictions)
        if not self._predicted_all:
            self.status = yield from self.predictions.to_tolerance(rank.rtol)
            self._predicted_all = True

    def _verified(self) -> Iterator[Snapshot]:
        """In float64 where the preflight has seen the model run in it."""
        assert self.predictions is not None  # they come before
        self.measuring = Measured(self.operator)
        self._restore("measuring", self.measuring)
        exact = self.problem.precision.is_float64
        yield from self.measuring.changes(self.predictions.layers, exact)


def _state_of(stage: Saved | None) -> State | None:
    return None if stage is None else stage.state_dict()
