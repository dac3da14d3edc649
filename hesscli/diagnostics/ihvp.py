"""Which weights and layers matter: saliency, leverage, and what pruning and rounding do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hesscli.diagnostics.arguments import as_asked
from hesscli.diagnostics.keeping import UNKEPT, Ledger
from hesscli.diagnostics.measurement import Work, drive
from hesscli.diagnostics.perturbations import kinds_of
from hesscli.diagnostics.plans import Pilot
from hesscli.diagnostics.predictions import SCALES, order_of
from hesscli.diagnostics.reporting import described, warnings_of_samples
from hesscli.diagnostics.run import Clock, started
from hesscli.diagnostics.saliency import (
    Ranked,
    rank_correlation,
    reported,
    saliency_edges,
    saliency_report,
)
from hesscli.diagnostics.sensitivity_study import Array, Ranking, SensitivityStudy
from hesscli.diagnostics.window import WindowOptions, raising_leverage
from hesscli.errors import UsageError
from hesscli.problem.problem import Problem
from hesscli.results import (
    HOLDS_WITHIN,
    LARGE_RESIDUAL,
    LOW_LEVERAGE,
    IhvpResult,
    LayerSensitivity,
    Observe,
    Perturbation,
    RankingReport,
    ScaledChange,
    SolveReport,
    WindowReport,
)
from hesscli.vocabulary import USUAL_BUDGET, USUAL_RTOL

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
    if found is not None:
        run.operator.meter.add(study.problem.algebra(reported([x.num_parameters for x in layers])))
    window = study.collected.report()
    return IhvpResult(
        status=study.status,
        method=run.method(
            "mfac",
            study.seed,
            "; ".join(filter(None, (study.collected.reason, _types(study)))),
            rtol=study.refine if study.rank is None else study.rank.rtol,
        ),
        cost=run.cost(),
        window=window,
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
        **run.header(_warnings(study, window, layers)),
    )


def _types(study: SensitivityStudy) -> str:
    """In which type it was computed, where another was asked for."""
    mixed = study.run.operator.autocast is not None
    return "solves and predictions in float32, which has the digits for them" if mixed else ""


class _Layers:
    """The layers of a study, each with its own numbers."""

    def __init__(self, study: SensitivityStudy, ranked: Ranked) -> None:
        self.study, self.places = study, study.problem.parameters.layer_places()
        self.saliency, self.repeats = ranked.saliency, ranked.repeats
        self.sizes = study.weights.abs()
        self.leverage = 1 - study.collected.fisher.damping * ranked.diagonal
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
            half_correlation=rank_correlation(*self.repeats.halves),
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
                half_correlation=rank_correlation(*self.repeats.halves[:, place]),
                rank=rank + 1,
                above_next=float(self.above[i, after[0]]) if after else None,
                perturbations=tuple(_perturbations(self.study, i)),
            )


def _perturbations(study: SensitivityStudy, position: int) -> Iterator[Perturbation]:
    """A layer's changes, with all that is known of them."""
    predictions, reading = study.predictions, study.reading
    if predictions is None or reading is None or not predictions.ready:
        return
    layer = predictions.layers[position]
    known, mean_curvature = predictions.of(layer), float(reading.estimate[position]) / layer.size
    measuring = study.measuring
    every = [] if measuring is None else measuring.of(predictions.layers)
    losses: list[Array] = [*every[position]] if every else []
    for row, change in enumerate(kinds_of(layer.parameters)):
        measured = losses[row] if row < len(losses) else None
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
            order=None if off is None or measuring is None else order_of(off, measuring.rounding),
            holds=None
            if off is None
            else bool(abs(off[0]) <= HOLDS_WITHIN * (abs(linear) + abs(quadratic))),
        )


def _unmeasured(layers: Sequence[LayerSensitivity]) -> Iterator[str]:
    """What --verify asks for and there was no time for."""
    changes = [change for layer in layers for change in layer.perturbations]
    missing = sum(change.measured is None for change in changes)
    if missing or not changes:
        which = f"{missing} of {len(changes)}" if 0 < missing < len(changes) else "the"
        yield f"no time to measure {which} losses that --verify asks for: more --budget"


def _by_name(study: SensitivityStudy, vector: Tensor) -> dict[str, Any]:
    """A flat vector as numpy arrays by parameter, in the parameters' own precision."""
    return study.problem.parameters.by_name(vector, study.problem.dtype)


def _warnings(
    study: SensitivityStudy, window: WindowReport, layers: Sequence[LayerSensitivity]
) -> Iterator[str]:
    """What a careful reader of the numbers must know."""
    collected = study.collected
    if study.reading is not None:
        yield from warnings_of_samples(study.problem, study.reading)
    if collected.reason:
        yield (
            f"the window holds gradients of kind {collected.kind}, whose mean square is not the "
            f"Gauss-Newton matrix, since {collected.reason}"
        )
    if collected.cut_short:
        yield f"no time for more than {collected.window.count} rows: more --budget"
    elif collected.window.count < collected.window.capacity:
        yield (
            f"the window of gradients has {collected.window.count} rows and room for "
            f"{collected.window.capacity}: {study.problem.data.count} examples give no more of "
            f"kind {collected.kind}"
        )
    if study.rank is not None and study.ranked is None:
        yield "no time for a ranking of layers: more --budget, or a smaller --window"
    elif study.rank is not None and not (study.predictions and study.predictions.ready):
        yield "no time for predictions of what pruning and rounding do: more --budget"
    if study.rank is not None and study.rank.verify:
        yield from _unmeasured(layers)
    yield from _solve_warnings(study)
    ranked = [layer for layer in layers if layer.saliency.mean > 0]
    low = {layer.name: layer.leverage for layer in ranked if layer.ranked_by == "magnitude"}
    if low:
        absolute = collected.options.absolute
        cure = raising_leverage([*low.values()], window, absolute=absolute)
        yield (
            f"leverage below {LOW_LEVERAGE:.0%} in {', '.join([*low][:5])} ({len(low)} layers): "
            f"this ranking is magnitude; {cure}"
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


@as_asked
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


@as_asked
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
