"""Which weights and layers matter: saliency, leverage, and what pruning and rounding do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hesscli.diagnostics.choice import Choice, Draw
from hesscli.diagnostics.keeping import UNKEPT, Ledger
from hesscli.diagnostics.measurement import Estimation, Goal, Pace, Tolerance, Work, drive
from hesscli.diagnostics.plans import Pilot
from hesscli.diagnostics.predictions import (
    SCALES,
    Measured,
    Predictions,
    order_of,
    perturbing,
    verifying,
)
from hesscli.diagnostics.reporting import (
    chosen,
    described,
    estimation,
    expected,
    warnings_of_samples,
)
from hesscli.diagnostics.run import Clock, Run, started
from hesscli.diagnostics.saliency import (
    GROUPS,
    Repeated,
    Repeats,
    rank_correlation,
    repeats,
    require_rows,
    saliencies,
    saliency_edges,
    saliency_report,
)
from hesscli.diagnostics.solve import (
    RELATIVE,
    DampedSolution,
    Solved,
    Solving,
    sweep,
    sweeps,
)
from hesscli.diagnostics.trace import standing
from hesscli.diagnostics.window import (
    FEWEST_ROWS,
    WindowOptions,
    collect,
    collecting,
    inverting,
    rows_to_be_had,
)
from hesscli.engines.estimator import Reading
from hesscli.engines.mfac import GradientWindow
from hesscli.errors import UsageError
from hesscli.meter import Spent
from hesscli.problem.problem import Problem
from hesscli.results import (
    HOLDS_WITHIN,
    LARGE_RESIDUAL,
    LOW_LEVERAGE,
    DampingPoint,
    IhvpResult,
    LayerSensitivity,
    MethodReport,
    Observe,
    Perturbation,
    RankingReport,
    ScaledChange,
    Snapshot,
    SolveReport,
    Status,
)
from hesscli.state import Rows, Saved, State
from hesscli.vocabulary import USUAL_BUDGET, USUAL_RTOL

# -- The steps of a sensitivity study, each of which may be the last -------------------------------


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


@dataclass(frozen=True)
class Ranked:
    """Saliencies of all weights ``(d,)``, and those from fewer rows: no ranking without."""

    saliency: Tensor
    repeats: Repeats


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

    ``reading`` has the layers' traces, for HAWQ's form, by the estimator of ``choice``, which is
    made when it is needed; ``measured`` each layer's loss differences ``(changes, scales)``, each
    off by ``rounding`` at most.
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
        self.right = self.problem.prove().gradient if right is None else right
        self.refine, self.seed, self.rank = refine, seed, rank
        self.solving: Solving | None = None
        self.sweep: tuple[DampingPoint, ...] = ()
        self.ranked: Ranked | None = None
        self.choice: Choice | None = None
        self.reading: Reading | None = None
        self.predictions: Predictions | None = None
        self.measured: list[Array] | None = None
        self.rounding = 0.0
        self.status: Status = "converged"
        self._repeated, self._damped = Repeated(), list[DampedSolution]()
        self._traces: Estimation | None = None
        self._measuring: Measured | None = None
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
        found, start = self.weights.clone(), 0
        for parameter in self.problem.parameters:
            place = slice(start, start + parameter.numel)
            if not self.collected.depends_on(place):
                found[place] = 0
            start = place.stop
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
            self._saved.get("cut_short", False),
        )
        self.solving = Solving(self.run.operator, self.collected.fisher, self.right, self.refine)
        self._restore("solving", self.solving)
        yield from self.solving.steps()
        if self.rank is not None:
            yield from self._ranked()
            yield from self._traced()
            yield from self._predicted(self.rank)
        if not self._swept:
            self.sweep = yield from sweep(
                self.run.operator, self.collected, self.mattering, self.right, self._damped
            )
            self._swept, self._damped = True, []
        if self.rank is not None and self.rank.verify:
            yield from self._verified()

    def state_dict(self) -> State:
        """The rows, and what each stage has found; what can be made of the rows is not in it."""
        ranked, damped = self.ranked, [one.direction[None] for one in self._damped]
        vectors = ranked and (ranked.saliency, ranked.repeats.one, ranked.repeats.other)
        return {
            "window": self.empty.state_dict(),
            "cut_short": self.solving is not None and self.collected.cut_short,
            "solving": _state_of(self.solving),
            "repeated": asdict(self._repeated),
            "ranked": vectors and Rows(*(each[None] for each in vectors)),
            "traces": _state_of(self._traces),
            "status": self.status,
            "predictions": _state_of(self.predictions),
            "predicted_all": self._predicted_all,
            "damped": [asdict(one.point) for one in self._damped],
            "directions": Rows(*damped) if damped else None,
            "sweep": [asdict(point) for point in self.sweep],
            "swept": self._swept,
            "measuring": _state_of(self._measuring),
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from where another was: each stage takes its own when it comes to it."""
        self._saved = state
        self.empty.load_state_dict(state["window"])
        self._repeated = Repeated(**state["repeated"])
        if state["ranked"] is not None:
            saliency, one, other = _vectors(state["ranked"], self.problem.device)
            means, levels = np.array(self._repeated.means), np.array(self._repeated.quantiles)
            self.ranked = Ranked(saliency, Repeats(means, levels, one, other))
        self.status, self._predicted_all = state["status"], state["predicted_all"]
        if state["directions"] is not None:
            points = [DampingPoint(**point) for point in state["damped"]]
            directions = _vectors(state["directions"], self.problem.device)
            self._damped = list(map(DampedSolution, points, directions))
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
        window = collecting(problem, options, self._rows_in_time(rows, pace), pace)
        inversion = inverting(problem, options, rows)
        again = Spent(seconds=inversion.spent.seconds)
        yield window
        yield inversion
        yield Work(phase="refining", spent=pace.products(1))
        if rank is not None:
            yield Work(phase="ranking", spent=again.times(GROUPS))
            goal, miss, probes = self._tracing
            choice = self.choice or chosen(self.run, "auto", Draw(self.seed))
            yield from expected(self.run, choice, goal, miss, pace, probes)
            yield perturbing(problem, pace)
        if sweeps(problem.parameters.size):
            count = len(RELATIVE)
            yield Work(phase="inverting", spent=again.times(count) + pace.products(count))
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
        if self.ranked is not None:
            return
        places = self.problem.parameters.layer_places()
        saliency = saliencies(self.mattering, self.collected.fisher.diagonal())
        watch = self.run.clock.watch("ranking")
        again = yield from repeats(self.collected, self.mattering, places, self._repeated, watch)
        self.ranked = Ranked(saliency, again)

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
        self.predictions = Predictions(self.run.operator, self.ranked.saliency)
        self._restore("predictions", self.predictions)
        if not self._predicted_all:
            self.status = yield from self.predictions.to_tolerance(rank.rtol)
            self._predicted_all = True

    def _verified(self) -> Iterator[Snapshot]:
        """In float64 where the preflight has seen the model run in it."""
        assert self.predictions is not None  # they come before
        measured = self._measuring = Measured(self.run.operator)
        self._restore("measuring", measured)
        exact = self.problem.precision.is_float64
        self.measured = yield from measured.changes(self.predictions.layers, exact)
        self.rounding = measured.rounding


def _state_of(stage: Saved | None) -> State | None:
    return None if stage is None else stage.state_dict()


def _vectors(rows: Rows, device: torch.device) -> list[Tensor]:
    """A copy of each."""
    return [row.to(device, copy=True) for part in rows.since(0) for row in part]


# -- What a study found, as its result -------------------------------------------------------------


def report(study: SensitivityStudy, source: str) -> IhvpResult:
    """All that is known, in numbers.

    Args:
        study: as far as it came.
        source: what x is called.
    """
    run, solved = study.run, study.solved
    found = None if study.ranked is None else _Layers(study, study.ranked)
    layers = () if found is None else tuple(found.reports())
    return IhvpResult(
        status=study.status,
        method=MethodReport(
            name="mfac",
            rtol=study.refine if study.rank is None else study.rank.rtol,
            seed=study.seed,
            mode=run.flight.mode,
            attention_kernel=run.flight.attention_kernel,
            note=study.collected.reason,
        ),
        cost=run.cost(),
        window=study.collected.report(),
        solve=SolveReport(
            vector=source,
            vector_norm=float(study.right.norm()),
            norm=float(solved.direction.norm()),
            refinement=solved.refinement,
        ),
        residual=solved.residual,
        ranking=None if found is None else found.ranking(),
        sweep=study.sweep,
        layers=layers,
        saliency={} if study.ranked is None else _by_name(study, study.ranked.saliency),
        direction=_by_name(study, solved.direction),
        **run.header(_warnings(study, layers)),
    )


class _Layers:
    """The layers of a study, each with its own numbers."""

    def __init__(self, study: SensitivityStudy, ranked: Ranked) -> None:
        self.study, self.places = study, study.problem.parameters.layer_places()
        self.saliency, self.repeats = ranked.saliency, ranked.repeats
        self.sizes = study.weights.abs()
        self.leverage = study.collected.fisher.leverage()
        self.edges = saliency_edges(self.saliency)
        self.means = np.array([float(self.saliency[place].mean()) for place in self.places])
        self.order = [int(i) for i in np.argsort(-self.means, kind="stable")]
        self.above = self.repeats.above(self.means)
        self.errors = self.repeats.relative_errors()
        self.level_errors = self.repeats.quantile_errors()

    def ranking(self) -> RankingReport:
        """The order, and how sure it is."""
        names = self.study.problem.layer_names
        return RankingReport(
            layers=tuple(names[i] for i in self.order),
            above=tuple(tuple(float(self.above[i, j]) for j in self.order) for i in self.order),
            half_correlation=rank_correlation(self.repeats.one, self.repeats.other),
        )

    def reports(self) -> Iterator[LayerSensitivity]:
        """Every layer, in the model's order."""
        parameters = self.study.problem.parameters
        for i, (name, place) in enumerate(zip(parameters.layers, self.places, strict=True)):
            owned, rank = parameters.in_layer(name), self.order.index(i)
            after = self.order[rank + 1 :]
            yield LayerSensitivity(
                name=name,
                num_parameters=place.stop - place.start,
                parameters=described(owned),
                saliency=saliency_report(
                    self.saliency[place], self.errors[i], self.level_errors[i], self.edges
                ),
                leverage=float(self.leverage[place].median()),
                magnitude_correlation=rank_correlation(self.saliency[place], self.sizes[place]),
                half_correlation=rank_correlation(
                    self.repeats.one[place], self.repeats.other[place]
                ),
                rank=rank + 1,
                above_next=float(self.above[i, after[0]]) if after else None,
                perturbations=tuple(_perturbations(self.study, i)),
            )


def _perturbations(study: SensitivityStudy, position: int) -> Iterator[Perturbation]:
    """A layer's changes, with all that is known of them; none before two batches were seen."""
    predictions, reading = study.predictions, study.reading
    if predictions is None or reading is None or predictions.seen < 2:
        return
    layer = predictions.layers[position]
    known, mean_curvature = predictions.of(layer), float(reading.estimate[position]) / layer.size
    for row, change in enumerate(layer.changes()):
        measured = None if study.measured is None else study.measured[position][row]
        linear, quadratic = float(known.linear[row]), float(known.quadratic[row])
        predicted = [scale * linear + scale**2 * quadratic for scale in SCALES]
        off = None if measured is None else measured - np.array(predicted)
        yield Perturbation(
            kind=change.kind,
            level=change.level,
            granularity=change.granularity,
            squared_norm=float(known.squared_norm[row]),
            linear=linear,
            quadratic=quadratic,
            stderr=float(known.bar[row]),
            hawq=mean_curvature * float(known.squared_norm[row]) / 2,
            measured=None if measured is None else float(measured[0]),
            changes=()
            if measured is None
            else tuple(
                ScaledChange(scale=scale, predicted=expected, measured=float(found))
                for scale, expected, found in zip(SCALES, predicted, measured, strict=True)
            ),
            order=None if off is None else order_of(off, study.rounding),
            holds=None
            if off is None
            else bool(abs(off[0]) <= HOLDS_WITHIN * (abs(linear) + abs(quadratic))),
        )


def _by_name(study: SensitivityStudy, vector: Tensor) -> dict[str, Any]:
    """A flat vector as numpy arrays by parameter, in the parameters' own precision."""
    return study.problem.parameters.by_name(vector, study.problem.dtype)


def _warnings(study: SensitivityStudy, layers: Sequence[LayerSensitivity]) -> Iterator[str]:
    """What a careful reader of the numbers must know."""
    collected = study.collected
    if study.reading is not None:
        yield from warnings_of_samples(study.problem, study.reading)
    if collected.reason:
        yield f"{collected.kind} rows, since {collected.reason}"
    if collected.cut_short:
        yield f"no time for more than {collected.window.count} rows: more --budget"
    elif collected.window.count < collected.window.capacity:
        yield (
            f"only {collected.window.count} rows of kind {collected.kind} are to be had from "
            f"{study.problem.data.count} examples"
        )
    if study.rank is not None and study.ranked is None:
        yield "no time for a ranking of layers: more --budget, or a smaller --window"
    elif study.rank is not None and (study.predictions is None or study.predictions.seen < 2):
        yield "no time for predictions of what pruning and rounding do: more --budget"
    if study.rank is not None and study.rank.verify and study.measured is None:
        yield "no time to measure the losses that --verify asks for: more --budget"
    yield from _solve_warnings(study)
    ranked = [layer for layer in layers if layer.saliency.mean > 0]
    low = [layer.name for layer in ranked if layer.ranked_by == "magnitude"]
    if low:
        yield (
            f"leverage below {LOW_LEVERAGE:.0%} in {', '.join(low[:5])} ({len(low)} layers): "
            "this ranking is magnitude; more rows, smaller --blocks or less --damping"
        )
    changes = [change for layer in layers for change in layer.perturbations]
    broken = sum(change.holds is False for change in changes)
    if broken:
        yield (
            f"{broken} of {len(changes)} changes are too large for their predictions, which are "
            f"off by more than {HOLDS_WITHIN:.0%} of |linear| + |quadratic| there"
        )


def _solve_warnings(study: SensitivityStudy) -> Iterator[str]:
    """Of the solution's certificate."""
    refinement, off = study.solved.refinement, study.solved.residual.operator
    name = study.solved.residual.operator_name
    if refinement is None:
        if off is not None and off > LARGE_RESIDUAL:
            yield (
                f"y solves the window's system, not the {name}'s: there its residual is {off:.3g} "
                f"times as long as the vector; --refine 1e-3 solves with the {name} itself"
            )
    elif refinement.negative_curvature is not None:
        yield (
            f"the {name} + damping has negative curvature ({refinement.negative_curvature:.3g}): "
            "the solve ended there; --matrix ggn, or more --damping"
        )
    elif not refinement.converged:
        yield (
            f"refinement ended at residual {refinement.residual:.2g}, not "
            f"{refinement.tolerance:.2g}: more --budget, or --dtype float64"
        )


# -- Which weights and layers matter: saliency, leverage, and what pruning and rounding do ---------


def sensitivity(
    problem: Problem,
    *,
    matrix: str = "hessian",
    window: WindowOptions | None = None,
    rtol: float = USUAL_RTOL["ihvp"],
    budget: float | None = USUAL_BUDGET,
    refine: float | None = None,
    verify: bool = False,
    seed: int = 0,
    mode: str = "auto",
    observe: Observe | None = None,
    ledger: Ledger = UNKEPT,
) -> IhvpResult:
    """Which weights and layers matter, and what pruning or rounding a layer does to the loss.

    Args:
        problem: model, loss and frozen examples.
        matrix: whose quadratic form predicts losses, and against which residuals are taken:
            ``hessian``, ``ggn``, ``fisher`` or ``empirical-fisher``.
        window: which gradients stand for the matrix that is inverted.
        rtol: two standard errors of a prediction beside |linear| + |quadratic|: batches are seen
            until all predictions have it.
        budget: seconds; None for no limit.
        refine: relative residual to which conjugate gradients solve for the gradient.
        verify: measure the loss with each change applied.
        seed: of sampled rows.
        mode: autodiff mode; ``auto`` takes the cheapest that passes the preflight.
        observe: told how far the run is; returning True ends it at its result so far.
        ledger: keeps the run, so that it can go on from there.

    Raises:
        UsageError: rows, blocks or a window that cannot be, or a matrix that there is not.
        UnsoundError: the problem's curvature would mean nothing, or all gradients are zero.
        BudgetError: the time was not enough for a solution.
        KeyboardInterrupt: stopped before there was a result.
    """
    options, rank = _sized(window, problem, ledger), Ranking(rtol, verify)
    ledger.recognise({"--rtol": rtol})
    with (
        options.empty(problem) as empty,
        started(problem, matrix, mode, Clock(budget, observe), ledger) as run,
    ):
        study = SensitivityStudy(run, options, empty, None, refine, seed, rank)
        study.finish(drive(run.clock, study, run.ledger))
        return report(study, "gradient")


def ihvp(
    problem: Problem,
    vector: Tensor | Array | None = None,
    *,
    matrix: str = "hessian",
    window: WindowOptions | None = None,
    budget: float | None = USUAL_BUDGET,
    refine: float | None = None,
    seed: int = 0,
    mode: str = "auto",
    source: str = "vector",
    observe: Observe | None = None,
    ledger: Ledger = UNKEPT,
) -> IhvpResult:
    """Y with (F̂ + λI) y = x, and its residuals against F̂ and against the matrix itself.

    Args:
        problem: model, loss and frozen examples.
        vector: x ``(d,)``; None for the gradient of the loss.
        source: what the report calls it.
        matrix: as for :func:`sensitivity`, and so the other arguments.
        window: which gradients stand for the matrix.
        budget: seconds; None for no limit.
        refine: relative residual to which conjugate gradients solve with matrix + λI.
        seed: of sampled rows.
        mode: autodiff mode.
        observe: told how far the run is.
        ledger: keeps the run.

    Returns:
        A result without layers; ``direction`` holds y by parameter.

    Raises:
        UsageError: a vector of another length, and as for :func:`sensitivity`.
        UnsoundError: as for :func:`sensitivity`; so is BudgetError.
        KeyboardInterrupt: the observer wanted no more.
    """
    options = _sized(window, problem, ledger)
    given = None if vector is None else _checked(problem, vector)
    with (
        options.empty(problem) as empty,
        started(problem, matrix, mode, Clock(budget, observe), ledger) as run,
    ):
        study = SensitivityStudy(run, options, empty, given, refine, seed)
        study.finish(drive(run.clock, study, run.ledger))
        return report(study, "gradient" if given is None else source)


def _sized(window: WindowOptions | None, problem: Problem, ledger: Ledger) -> WindowOptions:
    """With as many rows as there was memory for when the run began."""
    options = window or WindowOptions()
    return replace(options, size=ledger.decided("rows", lambda: options.count(problem)))


def _checked(problem: Problem, vector: Tensor | Array) -> Tensor:
    tensor = torch.as_tensor(vector, dtype=torch.float64, device=problem.device)
    if tuple(tensor.shape) != (problem.parameters.size,):
        raise UsageError(
            f"the vector must have {problem.parameters.size} entries, one a parameter",
            f"shape {tuple(tensor.shape)}",
            "the gradient, flattened in the order of the parameters",
        )
    return tensor


# -- What ``hesscli ihvp`` will take ---------------------------------------------------------------


def plan(pilot: Pilot) -> Iterator[Work]:
    """A sensitivity study through the window that is asked for.

    Raises:
        UsageError: the window does not fit, or too few rows are to be had.
    """
    options, rank = pilot.asked.window, Ranking(USUAL_RTOL["ihvp"], verify=False)
    with options.empty(pilot.run.problem) as empty:
        study = SensitivityStudy(pilot.run, options, empty, None, None, pilot.asked.seed, rank)
        study.choice = pilot.choice("auto")
        yield from study.expected(pilot.pace)
