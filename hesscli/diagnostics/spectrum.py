"""Where do the eigenvalues lie, which are largest, and which layers are in their vectors?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

import hesscli
from hesscli.diagnostics.clock import Clock
from hesscli.diagnostics.exploring import PROBES, STEPS, Exploration, Plan
from hesscli.diagnostics.opening import PROOF_GRADIENTS, opened
from hesscli.diagnostics.reporting import described, warnings_of_products
from hesscli.diagnostics.spectral_plan import most_steps, require_dense, require_room
from hesscli.diagnostics.spectral_reports import (
    condition,
    dense_spectrum,
    density,
    eigenvalues,
    functions,
    listed,
    outliers,
)
from hesscli.diagnostics.spectral_study import Study
from hesscli.diagnostics.surroundings import environment, peak_bytes
from hesscli.engines.quadrature import Array
from hesscli.errors import UsageError
from hesscli.problem.classification import CrossEntropy
from hesscli.problem.problem import Problem
from hesscli.results import (
    Cost,
    DenseSpectrum,
    LayerSpectrum,
    MethodReport,
    Observe,
    SpectrumRun,
)

EXACT_LIMIT = 5000
_GOAL = 0.01
"""The relative bar of an eigenvalue that is called known, where no other was asked for."""


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
    budget: float | None = 600.0,
    seed: int = 0,
    mode: str = "auto",
    observe: Observe | None = None,
) -> SpectrumRun:
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

    Raises:
        UsageError: what does not fit into memory, or a matrix that this problem does not have.
        UnsoundError: the problem's curvature would mean nothing.
        KeyboardInterrupt: stopped before there was any eigenvalue.
    """
    size = problem.parameters.size
    if steps is None:
        steps = STEPS if rtol is None else most_steps(problem, probes)
    plan = _plan(size, k, steps, probes, rtol, seed)
    require_room(problem, plan)
    if exact:
        require_dense(problem, exact_limit)
    clock = Clock(budget, observe)
    with opened(problem, matrix, mode, clock) as opening:
        study = Study(opening, plan, clock, tuple(layers), exact)
        study.run()
        return _result(study, problem, clock, bandwidth, damping, vectors)


def _plan(size: int, k: int, steps: int, probes: int, rtol: float | None, seed: int) -> Plan:
    if min(k, steps, probes) < 1:
        raise UsageError(
            "k, steps and probes are numbers from 1",
            f"k = {k}, steps = {steps}, probes = {probes}",
            "k=10, steps=64, probes=5",
        )
    return Plan(
        steps=min(steps, size),
        probes=probes,
        count=k,
        goal=_GOAL if rtol is None else rtol,
        early=rtol is not None,
        seed=seed,
    )


def _result(
    study: Study,
    problem: Problem,
    clock: Clock,
    bandwidth: float | None,
    damping: float,
    vectors: bool,
) -> SpectrumRun:
    found, flight = study.whole, study.opening.flight
    indices = listed(found.ritz, study.plan.count)
    of_all = functions(found)
    return SpectrumRun(
        status=study.status,
        problem=problem.report(study.operator.name),
        method=MethodReport(
            name="lanczos",
            seed=study.plan.seed,
            probe_distribution="gaussian",
            probe_design="shared",
            num_probes=len(found.runs),
            looks=1,
            mode=flight.mode,
            attention_kernel=flight.attention_kernel,
            note=_note(found),
        ),
        cost=Cost(
            products=study.products,
            gradients=PROOF_GRADIENTS + study.gradients,
            seconds=clock.seconds,
            peak_bytes=peak_bytes(problem.device),
        ),
        steps=found.lanczos.count,
        eigenvalues=tuple(eigenvalues(found, indices)),
        density=density(found, bandwidth),
        negative_mass=of_all.negative_mass.value,
        functions=of_all,
        outliers=outliers(found, _classes(problem)),
        condition=condition(found, damping, study.operator.decay) if _is_psd(study) else None,
        convergence=tuple(found.convergence),
        exact=_dense_of(study, found, slice(None)),
        layers=tuple(_layers(study, indices, bandwidth)),
        environment=environment(problem.device),
        hesscli_version=hesscli.__version__,
        warnings=(*problem.warnings, *_warnings(problem, study)),
        vectors=_vectors(study, indices) if vectors else {},
    )


def _note(found: Exploration) -> str:
    """What was run."""
    first = f"{found.lanczos.count} steps"
    if found.runs[0].complete:
        return f"{first}: all eigenvalues there are"
    others = [len(run.ritz.values) for run in found.runs[1:]]
    counted = sum(one.copies for one in found.known)
    rest = f", then {len(others)} × {others[0]} without what it had counted" if others else ""
    return f"{first}{rest}; {counted} eigenvalues counted one by one"


def _is_psd(study: Study) -> bool:
    return study.operator.name != "hessian"


def _classes(problem: Problem) -> int | None:
    """How many classes the labels can have; None where they are none."""
    if problem.prove().accuracy is None or not isinstance(problem.loss, CrossEntropy):
        return None
    with torch.no_grad():
        outputs = problem.outputs(problem.sample(1).data)
    return int(problem.loss.logits(outputs).shape[1])


def _layers(study: Study, indices: list[int], bandwidth: float | None) -> Iterator[LayerSpectrum]:
    """Each layer's part in the listed vectors, and its own block's spectrum if it was explored."""
    parameters = study.operator.parameters
    shares = _participation(study, indices)
    for column, layer in enumerate(parameters.layers):
        owned, own = parameters.in_layer(layer), study.found.get(layer)
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
            functions=None if own is None else functions(own),
            exact=None if own is None else _dense_of(study, own, _places(study, layer)),
        )


def _participation(study: Study, indices: list[int]) -> Array:
    """Squared lengths of the listed vectors in each layer ``(vectors, layers)``."""
    parameters = study.operator.parameters
    index = parameters.layer_index().repeat_interleave(torch.tensor(parameters.sizes))
    shares = np.zeros((len(indices), len(parameters.layers)))
    for row, which in enumerate(indices):
        vector = study.whole.lanczos.vectors(study.whole.ritz, [which])[0].cpu()
        sums = torch.zeros(len(parameters.layers), dtype=torch.float64)
        shares[row] = sums.index_add_(0, index, vector.square()).numpy()
    return shares


def _vectors(study: Study, indices: list[int]) -> dict[str, np.ndarray]:
    """By parameter, in its shape with the listed vectors along a first dimension."""
    parameters = study.operator.parameters
    rows = study.whole.lanczos.vectors(study.whole.ritz, indices).to(study.operator.problem.dtype)
    parts = rows.cpu().split_with_sizes(parameters.sizes, dim=1)
    return {
        p.name: part.reshape(len(indices), *p.tensor.shape).contiguous().numpy()
        for p, part in zip(parameters, parts, strict=True)
    }


def _places(study: Study, layer: str) -> Array:
    """The rows of the whole matrix that belong to a layer."""
    owned = study.operator.parameters.in_layer(layer)
    return np.concatenate([np.arange(p.offset, p.offset + p.numel) for p in owned])


def _dense_of(study: Study, found: Exploration, rows: Array | slice) -> DenseSpectrum | None:
    """The eigenvalues of a diagonal block of the dense matrix, where it was formed."""
    if study.dense is None:
        return None
    block = study.dense.numpy()[rows][:, rows]
    return dense_spectrum(np.linalg.eigvalsh(block), found.measure)


def _warnings(problem: Problem, study: Study) -> Iterator[str]:
    """What a careful reader of the numbers must know."""
    yield from warnings_of_products(problem, study.opening.flight)
    if problem.sampling_fraction != 1:
        yield (
            f"eigenvalues are those of the {problem.data.count} examples that were kept: no bar "
            "here is for others"
        )
    if not study.whole.runs[0].complete and len(study.whole.runs) == 1:
        yield "one start vector: sums over all eigenvalues have no error bar"
    missing = [layer for layer in study.blocks if layer not in study.found]
    if missing:
        yield f"no time for {', '.join(missing[:5])} ({len(missing)} layers)"
