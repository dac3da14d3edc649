"""Where do the eigenvalues lie, which are largest, and which layers are in their vectors?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.special import stdtrit

from hesscli.diagnostics.arguments import as_asked
from hesscli.diagnostics.keeping import UNKEPT, Ledger
from hesscli.diagnostics.measurement import Work, drive
from hesscli.diagnostics.plans import Pilot
from hesscli.diagnostics.reporting import described
from hesscli.diagnostics.run import Clock, started
from hesscli.diagnostics.spectral_runs import PROBES, STEPS, Exploration, SpectralPlan
from hesscli.diagnostics.spectral_study import (
    SpectralStudy,
    most_steps,
    require_dense,
    require_room,
)
from hesscli.engines.quadrature import FUNCTIONS, Function, Measure, evaluate, smoothed
from hesscli.engines.ritz import Array, Counted, Ritz, standing_alone
from hesscli.errors import UsageError
from hesscli.problem.named_losses import CrossEntropy
from hesscli.problem.problem import Problem
from hesscli.results import (
    Condition,
    DenseSpectrum,
    Eigenvalue,
    LayerSpectrum,
    Observe,
    Outliers,
    SpectralDensity,
    SpectralFunction,
    SpectralFunctions,
    SpectrumResult,
)
from hesscli.vocabulary import USUAL_BUDGET

# -- What an exploration of a spectrum says, as results --------------------------------------------


APART = 1.5
"""A step of the staircase is wide if one eigenvalue is so many times the next."""
_ROUND_OFF = 1e-9  # relative: a change of depth that says nothing
_MISS = 0.05


def listed(ritz: Ritz, count: int) -> list[int]:
    """The Ritz values to report: so many from the top, then from the bottom, descending."""
    total = len(ritz.values)
    top = range(total - 1, max(total - count, 0) - 1, -1)
    bottom = range(min(count, total - len(top)) - 1, -1, -1)
    return [*top, *bottom]


def eigenvalues(found: Exploration, indices: list[int]) -> Iterator[Eigenvalue]:
    """The listed Ritz values with their bars."""
    ritz = found.ritz
    settled = {i for group in standing_alone(ritz) for i in group.indices}
    for position, index in enumerate(indices):
        value, bar = float(ritz.values[index]), float(ritz.residuals[index])
        yield Eigenvalue(
            value=value,
            residual=bar,
            end="top" if position < found.plan.count else "bottom",
            settled=index in settled,
            copies=_copies(found.known, value, bar),
            vector_error=_vector_error(ritz, index) if index in settled else None,
        )


def _copies(known: tuple[Counted, ...], value: float, bar: float) -> int:
    return max((one.copies for one in known if one.is_at(value, bar)), default=1)


def _vector_error(ritz: Ritz, index: int) -> float | None:
    """Davis & Kahan: sin of the angle ≤ residual / distance to the other eigenvalues."""
    others = np.delete(np.arange(len(ritz.values)), index)
    distances = np.abs(ritz.values[others] - ritz.values[index]) - ritz.residuals[others]
    distance, bar = float(distances.min(initial=np.inf)), float(ritz.residuals[index])
    return bar / distance if bar < distance else None


def density(found: Exploration, bandwidth: float | None) -> SpectralDensity:
    """The density over all runs."""
    measure = found.measure
    smooth = smoothed(measure, len(found.runs), bandwidth)
    return SpectralDensity(
        grid=tuple(smooth.grid.tolist()),
        values=tuple(smooth.values.tolist()),
        bandwidth=smooth.bandwidth,
        scale=smooth.scale,
        nodes=tuple(measure.values.tolist()),
        weights=tuple(measure.weights.tolist()),
        isolated=tuple(measure.isolated.tolist()),
    )


def functions(found: Exploration, dense: DenseSpectrum | None = None) -> SpectralFunctions:
    """Sums over all eigenvalues, with error bars where several runs allow them.

    No bars under autocast: its bias is known of single eigenvalues, not of sums of small ones.

    Args:
        found: by Lanczos' method.
        dense: all eigenvalues, where they are known; then nothing is estimated.
    """
    if dense is not None:
        known = np.array(dense.eigenvalues)
        ones = np.ones_like(known)
        return SpectralFunctions(**{n: _known(f(known, ones)) for n, f in FUNCTIONS.items()})
    values = {n: _function(found, function) for n, function in FUNCTIONS.items()}
    if found.operator.autocast is not None:
        values = {n: replace(value, stderr=None, interval=None) for n, value in values.items()}
    return SpectralFunctions(**values)


def _known(value: float | None) -> SpectralFunction:
    if value is None:
        return SpectralFunction(value=None, stderr=None, depth_change=0.0)
    return SpectralFunction(value=value, stderr=0.0, depth_change=0.0, interval=(value, value))


def _function(found: Exploration, function: Function) -> SpectralFunction:
    """The mean over the runs; no bar where depth matters more than the start vector."""
    if found.runs[0].complete:
        return _known(evaluate(function, found.measure, found.size))
    each = _values(found.by_run, function, found.size)
    if each is None:
        return SpectralFunction(value=None, stderr=None, depth_change=None)
    value = float(each.mean())
    half = _values(found.by_half, function, found.size)
    if half is None or not len(half):
        return SpectralFunction(value=value, stderr=None, depth_change=None)
    stderr = float(each.std(ddof=1)) / math.sqrt(len(each))
    change = float((each[1:] - half).mean())
    settled = abs(change) <= max(stderr, _ROUND_OFF * abs(value))
    if not settled:
        return SpectralFunction(value=value, stderr=None, depth_change=change)
    half_width = float(stdtrit(len(each) - 1, 1 - _MISS / 2)) * stderr
    interval = (value - half_width, value + half_width)
    return SpectralFunction(value=value, stderr=stderr, depth_change=change, interval=interval)


def _values(measures: list[Measure], function: Function, size: int) -> Array | None:
    """A function of each measure; None where one of them has none."""
    values = [evaluate(function, measure, size) for measure in measures]
    known = [value for value in values if value is not None]
    return np.array(known) if len(known) == len(values) else None


def outliers(found: Exploration, classes: int | None) -> Outliers:
    """How many of the largest eigenvalues lie above the widest step of the staircase."""
    stairs = _stairs(found)
    ratios = stairs[:-1] / stairs[1:]
    at = None if classes is None or len(ratios) < classes - 1 else float(ratios[classes - 2])
    if not len(ratios) or ratios.max() < APART:
        return Outliers(count=0, ratio=None, classes=classes, class_ratio=at)
    widest = int(ratios.argmax())
    return Outliers(count=widest + 1, ratio=float(ratios[widest]), classes=classes, class_ratio=at)


def _stairs(found: Exploration) -> Array:
    """The positive eigenvalues that stand alone at the top, and the next; descending."""
    values = [value for one in found.known for value in [one.value] * one.copies]
    others = found.measure.values[~found.measure.isolated]
    below = float(others.max(initial=0.0))
    top = sorted((value for value in values if value > max(below, 0.0)), reverse=True)
    return np.array([*top, below] if below > 0 else top)


def condition(found: Exploration, relative: float, decay: float) -> Condition | None:
    """Condition number of matrix plus damping; None if it is zero, or not positive semidefinite."""
    ritz = found.ritz
    mean = float(found.measure.weights @ found.measure.values)
    if not mean > 0 or float((ritz.values + ritz.residuals).min()) < 0:
        return None
    damping = relative * mean
    least = max(float((ritz.values + ritz.residuals).min()), decay)
    if found.runs[0].complete:
        lowest = max(float((ritz.values - ritz.residuals).min()), decay, 0.0)
    else:
        lowest = decay
    largest, bar = float(ritz.values[-1]), float(ritz.residuals[-1])
    return Condition(
        damping=damping,
        relative_damping=relative,
        interval=(
            max((largest - bar + damping) / (max(least, 0.0) + damping), 1.0),
            (largest + bar + damping) / (lowest + damping),
        ),
    )


def dense_spectrum(known: Array, found: Measure) -> DenseSpectrum:
    """All eigenvalues, and the distance of the estimate from them."""
    size = float(np.abs(known).mean())
    return DenseSpectrum(
        eigenvalues=tuple(known.tolist()),
        distance=_wasserstein(known, found) / size if size else None,
    )


def _wasserstein(known: Array, found: Measure) -> float:
    """∫ |F − G| between two distribution functions."""
    places = np.sort(np.concatenate([known, found.values]))
    below = np.searchsorted(np.sort(known), places[:-1], side="right") / len(known)
    sums = np.concatenate([[0.0], np.cumsum(found.weights)])
    estimated = sums[np.searchsorted(found.values, places[:-1], side="right")]
    return float(np.abs(below - estimated) @ np.diff(places))


# -- Where do the eigenvalues lie, which are largest, and which layers are in their vectors? -------


EXACT_LIMIT = 5000
_GOAL = 0.01
"""The relative bar of an eigenvalue that is called known, where no other was asked for."""


@as_asked
def spectrum(
    problem: Problem,
    *,
    matrix: str = "hessian",
    k: int = 10,
    steps: int | None = None,
    probes: int = PROBES,
    rtol: float | None = None,
    bandwidth: float | None = None,
    damping: float = 1e-3,
    layers: Sequence[str] = (),
    vectors: bool = False,
    exact: bool = False,
    exact_limit: int = EXACT_LIMIT,
    budget: float | None = USUAL_BUDGET,
    seed: int = 0,
    mode: str = "auto",
    observe: Observe | None = None,
    ledger: Ledger = UNKEPT,
) -> SpectrumResult:
    """Largest and smallest eigenvalues with error bars, and the density of all of them.

    Args:
        problem: model, loss and frozen examples.
        matrix: ``hessian``, ``ggn``, ``fisher`` or ``empirical-fisher``.
        k: how many eigenvalues to list from either end.
        steps: products from the first start vector, each of which keeps a vector; default 64,
            or as many as ``rtol`` takes.
        probes: start vectors; those after the first have a quarter of the steps each.
        rtol: end the first run once the ``k`` largest eigenvalues have bars this small beside
            them.
        bandwidth: of the density, beside an eigenvalue's size; None chooses.
        damping: of the condition number, in units of the mean eigenvalue.
        layers: names of layers whose own blocks are explored too, each like the whole.
        vectors: keep the eigenvectors of the listed eigenvalues.
        exact: form the dense matrix as well, for all its eigenvalues.
        exact_limit: parameters above which that is refused.
        budget: seconds; None for no limit.
        seed: of the start vectors.
        mode: autodiff mode; ``auto`` takes the cheapest that passes the preflight.
        observe: told how far the run is; returning True ends it at its result so far.
        ledger: keeps the run, so that it can go on from there.

    Raises:
        UsageError: what does not fit into memory, or a matrix that this problem does not have.
        UnsoundError: the problem's curvature would mean nothing.
        BudgetError: the time was not enough for a result.
        KeyboardInterrupt: stopped before there was any eigenvalue.
    """
    plan = _plan(problem, k, steps, probes, rtol, seed)
    require_room(problem, plan)
    if exact:
        require_dense(problem, exact_limit)
    plan = replace(plan, steps=ledger.decided("steps", lambda: plan.steps))
    ledger.recognise({"--layer": list(layers), "--rtol": rtol})
    with started(problem, matrix, mode, Clock(budget, observe), ledger) as run:
        study = SpectralStudy(run, plan, tuple(layers), exact)
        study.finish(drive(run.clock, study, run.ledger))
        return _result(study, bandwidth, damping, vectors)


def _plan(
    problem: Problem, k: int, steps: int | None, probes: int, rtol: float | None, seed: int
) -> SpectralPlan:
    """What is asked for; steps that are not fit into memory, and into time by being fewer."""
    if probes < 1:
        raise UsageError("a spectrum needs a start vector", f"probes={probes}", "probes=5")
    usual = most_steps(problem, probes, STEPS) if rtol is None else most_steps(problem, probes)
    return SpectralPlan(
        steps=min(usual if steps is None else steps, problem.parameters.size),
        probes=probes,
        count=k,
        goal=_GOAL if rtol is None else rtol,
        early=rtol is not None,
        seed=seed,
        shorter=steps is None and rtol is None,
    )


def _result(
    study: SpectralStudy,
    bandwidth: float | None,
    damping: float,
    vectors: bool,
) -> SpectrumResult:
    found, run = study.whole, study.run
    indices = listed(found.ritz, study.plan.count)
    dense = _dense_of(study, found, slice(None))
    of_all = functions(found, dense)
    return SpectrumResult(
        status=study.status,
        method=run.method(
            "lanczos",
            study.plan.seed,
            _note(found) + _types(found),
            probe_distribution="gaussian",
            probe_design="shared",
            num_probes=len(found.runs),
            rtol=study.plan.goal,
        ),
        cost=run.cost(),
        steps=found.lanczos.count,
        eigenvalues=tuple(eigenvalues(found, indices)),
        density=density(found, bandwidth),
        negative_mass=of_all.negative_mass.value,
        functions=of_all,
        outliers=outliers(found, _classes(run.problem)),
        condition=condition(found, damping, study.operator.decay) if _is_psd(study) else None,
        convergence=tuple(found.convergence),
        exact=dense,
        layers=tuple(_layers(study, indices, bandwidth)),
        vectors=_vectors(study, indices) if vectors else {},
        **run.header(_warnings(run.problem, study)),
    )


def _note(found: Exploration) -> str:
    """Which Lanczos runs were made, in words."""
    first = f"{found.lanczos.count} steps"
    if found.runs[0].complete:
        return f"{first}: all eigenvalues there are"
    others = [len(run.ritz.values) for run in found.runs[1:]]
    counted = sum(one.copies for one in found.known)
    rest = f", then {len(others)} × {others[0]} without what it had counted" if others else ""
    return f"{first}{rest}; {counted} eigenvalues counted one by one"


def _types(found: Exploration) -> str:
    """In which type products were made, where that is not the weights'."""
    mixed = found.operator.autocast is not None
    return "; products in bfloat16, whose bias is in the bars" if mixed else ""


def _is_psd(study: SpectralStudy) -> bool:
    return study.operator.name != "hessian"


def _classes(problem: Problem) -> int | None:
    """How many classes the labels can have; None where they are none."""
    if problem.prove().accuracy is None or not isinstance(problem.loss, CrossEntropy):
        return None
    with torch.no_grad():
        outputs = problem.outputs(problem.sample(1).data)
    return int(problem.loss.logits(outputs).shape[1])


def _layers(
    study: SpectralStudy, indices: list[int], bandwidth: float | None
) -> Iterator[LayerSpectrum]:
    """Each layer's part in the listed vectors, and its own block's spectrum if it was explored."""
    parameters = study.operator.parameters
    shares = _participation(study, indices)
    for column, layer in enumerate(parameters.layers):
        owned, own = parameters.in_layer(layer), study.found.get(layer)
        dense = None if own is None else _dense_of(study, own, _places(study, layer))
        yield LayerSpectrum(
            name=layer,
            num_parameters=sum(p.numel for p in owned),
            parameters=described(owned),
            participation=tuple(shares[:, column].tolist()),
            status=None if own is None else study.status_of(own),
            eigenvalues=None
            if own is None
            else tuple(eigenvalues(own, listed(own.ritz, own.plan.count))),
            density=None if own is None else density(own, bandwidth),
            functions=None if own is None else functions(own, dense),
            exact=dense,
        )


_TILE = 1 << 18
"""Columns of the basis that are looked at once, so that it is read but once for all vectors."""


def _participation(study: SpectralStudy, indices: list[int]) -> Array:
    """Squared lengths of the listed vectors in each layer ``(vectors, layers)``."""
    parameters, whole = study.operator.parameters, study.whole
    shares = np.zeros((len(indices), len(parameters.layers)))
    for layer, place in enumerate(parameters.layer_places()):
        for start in range(place.start, place.stop, _TILE):
            tile = slice(start, min(start + _TILE, place.stop))
            rows = whole.lanczos.vectors(whole.ritz, indices, tile)
            shares[:, layer] += rows.square_().sum(1).cpu().numpy()
    return whole.lanczos.columns.summed(torch.from_numpy(shares)).numpy()


def _vectors(study: SpectralStudy, indices: list[int]) -> dict[str, np.ndarray]:
    """By parameter, in its shape with the listed vectors along a first dimension."""
    parameters = study.operator.parameters
    lanczos = study.whole.lanczos
    rows = lanczos.columns.whole(lanczos.vectors(study.whole.ritz, indices))
    parts = rows.to(study.operator.problem.dtype).cpu().split_with_sizes(parameters.sizes, dim=1)
    return {
        p.name: part.reshape(len(indices), *p.tensor.shape).contiguous().numpy()
        for p, part in zip(parameters, parts, strict=True)
    }


def _places(study: SpectralStudy, layer: str) -> Array:
    """The rows of the whole matrix that belong to a layer."""
    owned = study.operator.parameters.in_layer(layer)
    return np.concatenate([np.arange(p.offset, p.offset + p.numel) for p in owned])


def _dense_of(
    study: SpectralStudy, found: Exploration, rows: Array | slice
) -> DenseSpectrum | None:
    """The eigenvalues of a diagonal block of the dense matrix, where it was formed."""
    if study.dense is None:
        return None
    block = study.dense.numpy()[rows][:, rows]
    return dense_spectrum(np.linalg.eigvalsh(block), found.measure)


def _warnings(problem: Problem, study: SpectralStudy) -> Iterator[str]:
    """What a careful reader of the numbers must know."""
    if problem.sampling_fraction != 1:
        yield (
            f"eigenvalues are those of the {problem.data.count} examples that were kept: no bar "
            "here is for others"
        )
    if study.operator.autocast is not None:
        yield "sums over all eigenvalues have no error bar in bfloat16: --dtype float32"
    elif study.dense is None and not study.whole.runs[0].complete and len(study.whole.runs) == 1:
        yield "one start vector: sums over all eigenvalues have no error bar"
    if study.whole.shortened:
        yield (
            f"{study.whole.lanczos.count} steps, since there was no time for {study.plan.steps} "
            "and the runs after them: more --budget"
        )
    elif study.plan.shorter and study.plan.steps < min(STEPS, study.whole.size):
        yield f"{study.plan.steps} steps, since memory holds no more: more of it, or --probes 1"
    missing = [layer for layer in study.blocks if layer not in study.found]
    if missing:
        yield f"no time for {', '.join(missing[:5])} ({len(missing)} layers)"


# -- What ``hesscli spectrum`` will take -----------------------------------------------------------


def plan(pilot: Pilot) -> Iterator[Work]:
    """The default runs.

    Raises:
        UsageError: their vectors do not fit into memory.
    """
    run = pilot.run
    usual = _plan(run.problem, 1, None, PROBES, None, pilot.asked.seed)
    require_room(run.problem, usual)
    return SpectralStudy(run, usual, (), exact=False).expected(pilot.pace)
