"""Sensitivities made by hand, for tests of what is shown of them.

Numbers follow from a layer's size, curvature and slope as they would in a small network, so that
predicted changes span decades, some are negative, and large ones are predicted badly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from example_results import ENVIRONMENT, problem, trace_result

from hesscli.results import (
    DampingPoint,
    Histogram,
    IhvpResult,
    LayerSensitivity,
    MethodReport,
    ParameterReport,
    Perturbation,
    Quantile,
    RankingReport,
    ResidualReport,
    SaliencyReport,
    ScaledChange,
    SolveReport,
    WindowReport,
)

# Two bins to a decade.
SALIENCY_EDGES = tuple(10 ** (half / 2) for half in range(-28, 1))
_SPREAD = 0.9  # decades, one standard deviation
_BITS = (8.0, 6.0, 4.0, 3.0, 2.0)


def saliency_histogram(median: float, count: int) -> Histogram:
    """So many weights, spread about a median as the logarithm of a Gaussian is."""
    shares = [
        0.5 * (1 + math.erf((math.log10(edge / median)) / (_SPREAD * math.sqrt(2))))
        for edge in SALIENCY_EDGES
    ]
    below = [round(count * share) for share in shares]
    counts = tuple(high - low for low, high in pairwise(below))
    return Histogram(edges=SALIENCY_EDGES, counts=counts)


def saliency(median: float, count: int, relative_stderr: float) -> SaliencyReport:
    steps = ((0.05, -1.48), (0.25, -0.61), (0.5, 0.0), (0.75, 0.61), (0.95, 1.48))
    return SaliencyReport(
        mean=9 * median,
        stderr=9 * median * relative_stderr,
        quantiles=tuple(
            Quantile(level=level, value=value, stderr=value * relative_stderr)
            for level, value in ((level, median * 10**step) for level, step in steps)
        ),
        histogram=saliency_histogram(median, count),
    )


def perturbation(
    linear: float, quadratic: float, *, cubic: float | None = None, **changes: Any
) -> Perturbation:
    """A change whose loss is measured where the cubic term, which predictions miss, is given."""
    measured, scaled = None, tuple[ScaledChange, ...]()
    if cubic is not None:
        scaled = tuple(
            ScaledChange(
                scale=scale,
                predicted=scale * linear + scale**2 * quadratic,
                measured=scale * linear + scale**2 * quadratic + scale**3 * cubic,
            )
            for scale in (1.0, 0.5, 0.25)
        )
        measured = scaled[0].measured
    size = abs(linear) + abs(quadratic)
    usual: dict[str, Any] = {
        "kind": "round",
        "level": 4.0,
        "granularity": "channel",
        "squared_norm": 0.31,
        "linear": linear,
        "quadratic": quadratic,
        "stderr": 0.02 * abs(quadratic),
        "hawq": 0.8 * quadratic,
        "measured": measured,
        "changes": scaled,
        "order": None if cubic is None else 3.0,
        "holds": None if cubic is None else abs(cubic) <= 0.1 * size,
    }
    return Perturbation(**(usual | changes))


def perturbations(
    number: int, curvature: float, slope: float, verify: bool
) -> tuple[Perturbation, ...]:
    """Pruning and rounding of a layer of Gaussian weights with a given curvature each."""
    variance, found = 2.0 / math.sqrt(number), []
    kinds = [("prune", share, "weight", 0.35 * share**3) for share in (0.1, 0.5, 0.9)]
    for granularity, span in (("tensor", 8.0), ("channel", 5.5)):
        grids = ((bits, (span / (2**bits - 1)) ** 2 / 12) for bits in _BITS)
        kinds += [("round", bits, granularity, min(error, 0.9)) for bits, error in grids]
    for index, (kind, level, granularity, error) in enumerate(kinds):
        square = number * variance * error
        quadratic = 0.5 * curvature * square
        found.append(
            perturbation(
                slope * math.cos(2.3 * index + number) * math.sqrt(square),
                quadratic,
                cubic=-0.9 * quadratic * math.sqrt(error) if verify else None,
                kind=kind,
                level=level,
                granularity=granularity,
                squared_norm=square,
                hawq=quadratic * (0.7 + 0.2 * math.sin(index)),
            )
        )
    return tuple(found)


def sensitivity(
    name: str,
    number: int,
    median: float,
    *,
    curvature: float = 0.02,
    slope: float = 2e-4,
    relative_stderr: float = 0.06,
    verify: bool = True,
    **changes: Any,
) -> LayerSensitivity:
    usual: dict[str, Any] = {
        "name": name,
        "num_parameters": number,
        "parameters": (ParameterReport(name=f"{name}.weight", shape=(number,)),),
        "saliency": saliency(median, number, relative_stderr),
        "leverage": 0.87,
        "magnitude_correlation": 0.74,
        "half_correlation": 0.93,
        "rank": 1,
        "above_next": 0.997,
        "perturbations": perturbations(number, curvature, slope, verify),
    }
    return LayerSensitivity(**(usual | changes))


def sensitivities(verify: bool = True) -> tuple[LayerSensitivity, ...]:
    """A small convolutional network, in its own order."""
    rows: tuple[tuple[str, int, float, float, float, dict[str, Any]], ...] = (
        ("conv1", 400, 6.1e-6, 0.16, 3e-4, {"rank": 2, "above_next": 0.93}),
        ("norm1", 32, 8.4e-5, 0.55, 1e-3, {"rank": 1, "above_next": 0.9996, "leverage": 0.99}),
        ("conv2", 4608, 3.3e-7, 0.019, 2e-4, {"rank": 4, "above_next": 0.58}),
        (
            "norm2",
            64,
            4.5e-6,
            0.57,
            8e-4,
            {"rank": 3, "above_next": 0.988, "relative_stderr": 0.45, "half_correlation": 0.61},
        ),
        (
            "conv3",
            13824,
            2.1e-8,
            0.005,
            3e-3,
            {
                "rank": 6,
                "above_next": None,
                "leverage": 0.31,
                "magnitude_correlation": 0.984,
                "half_correlation": None,
            },
        ),
        ("head", 490, 2.9e-7, 0.0082, 1e-3, {"rank": 5, "above_next": 0.9991, "leverage": 0.64}),
    )
    return tuple(
        sensitivity(name, size, median, curvature=curved, slope=slope, verify=verify, **more)
        for name, size, median, curved, slope, more in rows
    )


def many_sensitivities(number: int, verify: bool = True) -> list[LayerSensitivity]:
    """Layers with long names whose rank is not their place, every seventh without leverage."""
    ranks = [1 + (7 * index) % number for index in range(number)]  # number is no multiple of 7
    return [
        sensitivity(
            f"transformer.encoder.layers.{index}.self_attention.in_projection",
            1000 * (1 + index),
            1e-4 * 10 ** (-0.1 * rank),
            curvature=0.01 * 10 ** (-2 * math.sin(index)),
            slope=1e-3 * math.cos(index),
            verify=verify,
            rank=rank,
            above_next=None if rank == number else 0.5 + 0.49 * abs(math.sin(rank)),
            leverage=0.42 if index % 7 == 3 else 0.9,
        )
        for index, rank in enumerate(ranks)
    ]


def ranking(layers: Sequence[LayerSensitivity]) -> RankingReport:
    ordered = sorted(layers, key=lambda layer: layer.rank)
    size = len(ordered)
    return RankingReport(
        layers=tuple(layer.name for layer in ordered),
        above=tuple(
            tuple(0.5 if i == j else 0.9 if i < j else 0.1 for j in range(size))
            for i in range(size)
        ),
        half_correlation=0.91,
    )


SWEEP = tuple(
    DampingPoint(
        relative=relative,
        absolute=relative * 3.2e-4,
        span_share=share,
        cosine=cosine,
        leverage=leverage,
        rank_correlation=correlation,
        operator_residual=residual,
    )
    for relative, share, cosine, leverage, correlation, residual in (
        (1e-1, 0.31, 0.72, 0.12, 0.81, 0.21),
        (1e-2, 0.43, 0.66, 0.48, 0.94, 0.47),
        (1e-3, 0.62, 0.71, 0.81, 1.0, 0.83),
        (1e-4, 0.66, 0.89, 0.96, 0.97, 1.9),
        (1e-5, 0.67, 0.98, 0.995, 0.95, 4.4),
        (1e-6, 0.67, None, 0.999, 0.95, 13.0),
    )
)

WINDOW = WindowReport(
    rows=512,
    row_kind="sampled",
    damping=3.2e-7,
    relative_damping=1e-3,
    blocks="auto",
    largest_block=128,
    dtype="float32",
    num_bytes=40 * 2**20,
    file=None,
)


def ihvp_result(layers: Sequence[LayerSensitivity] | None = None, **changes: Any) -> IhvpResult:
    chosen, like = sensitivities() if layers is None else tuple(layers), trace_result()
    usual: dict[str, Any] = {
        "status": "converged",
        "problem": problem(num_parameters=19418, num_examples=2000, num_examples_available=2000),
        "method": MethodReport(
            name="mfac",
            seed=0,
            probe_distribution="none",
            probe_design="none",
            num_probes=0,
            looks=1,
            mode="double-backward",
            attention_kernel="math",
        ),
        "cost": like.cost,
        "window": WINDOW,
        "solve": SolveReport(vector="gradient", vector_norm=0.0123, norm=34.51, refinement=None),
        "residual": ResidualReport(window=2.3e-7, operator=0.83, operator_name="hessian"),
        "ranking": ranking(chosen) if chosen else None,
        "sweep": SWEEP,
        "layers": chosen,
        "environment": ENVIRONMENT,
        "hesscli_version": "0.1.0",
        "files": {"json": "hesscli-out/fashion-model/ihvp.json"},
    }
    return IhvpResult(**(usual | changes))
