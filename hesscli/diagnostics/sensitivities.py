"""What a study found, as its result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

import hesscli
from hesscli.diagnostics.predictions import SCALES, order_of
from hesscli.diagnostics.ranking import QUANTILES, quantiles
from hesscli.diagnostics.ranks import rank_correlation
from hesscli.diagnostics.reporting import described, warnings_of_products, warnings_of_samples
from hesscli.diagnostics.study import Ranked, Study
from hesscli.diagnostics.surroundings import environment, peak_bytes
from hesscli.results import (
    HOLDS_WITHIN,
    LARGE_RESIDUAL,
    LOW_LEVERAGE,
    Cost,
    Histogram,
    IhvpRun,
    LayerSensitivity,
    MethodReport,
    Perturbation,
    Quantile,
    RankingReport,
    SaliencyReport,
    ScaledChange,
    SolveReport,
)

Array = NDArray[np.float64]

_BINS_A_DECADE = 2
_MOST_DECADES = 16


def report(study: Study, source: str, seed: int) -> IhvpRun:
    """All that is known, in numbers.

    Args:
        study: as far as it came.
        source: what x is called.
        seed: of the rows.
    """
    problem, solved = study.problem, study.solved
    found = None if study.ranked is None else _Layers(study, study.ranked)
    layers = () if found is None else tuple(found.reports())
    return IhvpRun(
        status=study.status,
        problem=problem.report(study.opening.operator.name),
        method=MethodReport(
            name="mfac",
            seed=seed,
            probe_distribution="none",
            probe_design="none",
            num_probes=0,
            looks=1,
            mode=study.opening.flight.mode,
            attention_kernel=study.opening.flight.attention_kernel,
            note=study.collected.reason,
        ),
        cost=Cost(
            products=study.products,
            gradients=study.gradients,
            seconds=study.clock.seconds,
            peak_bytes=peak_bytes(problem.device),
        ),
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
        environment=environment(problem.device),
        hesscli_version=hesscli.__version__,
        warnings=(*problem.warnings, *_warnings(study, layers)),
        saliency={} if study.ranked is None else _by_name(study, study.ranked.saliency),
        direction=_by_name(study, solved.direction),
    )


class _Layers:
    """The layers of a study, each with its own numbers."""

    def __init__(self, study: Study, ranked: Ranked) -> None:
        self.study, self.places = study, study.problem.parameters.layer_places()
        self.saliency, self.repeats = ranked.saliency, ranked.repeats
        self.sizes = study.weights.abs()
        self.leverage = study.collected.fisher.leverage()
        self.edges = _edges(self.saliency)
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
                saliency=self._saliency(i, self.saliency[place]),
                leverage=float(self.leverage[place].median()),
                magnitude_correlation=rank_correlation(self.saliency[place], self.sizes[place]),
                half_correlation=rank_correlation(
                    self.repeats.one[place], self.repeats.other[place]
                ),
                rank=rank + 1,
                above_next=float(self.above[i, after[0]]) if after else None,
                perturbations=tuple(_perturbations(self.study, i)),
            )

    def _saliency(self, i: int, values: Tensor) -> SaliencyReport:
        levels = zip(QUANTILES, quantiles(values).tolist(), self.level_errors[i], strict=True)
        counts = np.histogram(values.cpu().numpy(), self.edges)[0]
        return SaliencyReport(
            mean=float(self.means[i]),
            stderr=_finite(self.means[i] * self.errors[i]),
            quantiles=tuple(
                Quantile(level=level, value=value, stderr=_finite(value * error))
                for level, value, error in levels
            ),
            histogram=Histogram(
                edges=tuple(self.edges.tolist()), counts=tuple(int(n) for n in counts)
            ),
        )


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _edges(saliency: Tensor) -> Array:
    """Edges at equal ratios, over all saliencies that are not zero and not absurdly small."""
    positive = saliency[saliency > 0]
    if not len(positive):
        return np.array([1e-1, 1.0])
    top = math.floor(math.log10(float(positive.max()))) + 1
    bottom = max(math.floor(math.log10(float(positive.min()))), top - _MOST_DECADES)
    return np.logspace(bottom, top, _BINS_A_DECADE * (top - bottom) + 1)


def _perturbations(study: Study, position: int) -> Iterator[Perturbation]:
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


def _by_name(study: Study, vector: Tensor) -> dict[str, Any]:
    """A flat vector as numpy arrays by parameter, in the parameters' own precision."""
    parameters = study.problem.parameters
    parts = parameters.split(vector.to(study.problem.dtype).cpu())
    return {p.name: part.numpy() for p, part in zip(parameters, parts, strict=True)}


def _warnings(study: Study, layers: Sequence[LayerSensitivity]) -> Iterator[str]:
    """What a careful reader of the numbers must know."""
    collected, flight = study.collected, study.opening.flight
    yield from warnings_of_products(study.problem, flight)
    if study.reading is not None:
        yield from warnings_of_samples(study.problem, study.reading)
    if collected.reason:
        yield f"{collected.kind} rows, since {collected.reason}"
    if collected.window.count < collected.window.capacity:
        yield (
            f"only {collected.window.count} rows of kind {collected.kind} are to be had from "
            f"{study.problem.data.count} examples"
        )
    yield from _solve_warnings(study)
    ranked = [layer for layer in layers if layer.saliency.mean > 0]
    low = [layer.name for layer in ranked if layer.leverage < LOW_LEVERAGE]
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


def _solve_warnings(study: Study) -> Iterator[str]:
    """Of the solution's certificate."""
    refinement, off = study.solved.refinement, study.solved.residual.operator
    name = study.solved.residual.operator_name
    if refinement is None:
        if off is not None and off > LARGE_RESIDUAL:
            yield (
                f"the window knows too little of the {name}: residual {off:.2g} of the vector; "
                "--refine 1e-3 solves with the matrix itself"
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
