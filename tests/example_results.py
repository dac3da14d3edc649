"""Results made by hand, for tests of what is shown of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hesscli.results import (
    BlockReport,
    Check,
    CheckpointReport,
    CheckResult,
    Cost,
    DiagonalReport,
    DiagResult,
    Entry,
    Environment,
    Estimate,
    Histogram,
    LayerDiagonal,
    LayerTrace,
    MethodReport,
    ParameterReport,
    Plan,
    PlannedCommand,
    Preflight,
    ProblemReport,
    Quantile,
    TraceResult,
)

ENVIRONMENT = Environment(
    python="3.11.4", torch="2.13.0", device_name="AMD EPYC 7763", threads=2, tf32=False
)


def layer(name: str, estimate: float, half_width: float, num_parameters: int = 1000) -> LayerTrace:
    return LayerTrace(
        name=name,
        num_parameters=num_parameters,
        parameters=(ParameterReport(name=f"{name}.weight", shape=(num_parameters // 10, 10)),),
        status="converged",
        estimate=estimate,
        probe_stderr=half_width / 2.2,
        data_stderr=half_width / 4,
        interval=(estimate - half_width, estimate + half_width),
    )


LAYERS = (
    layer("features.conv1", 480.25, 22.4, 160),
    layer("features.conv2", 611.5, 31.2, 4640),
    layer("classifier", 142.4, 9.31, 7850),
)


def problem(**changes: Any) -> ProblemReport:
    usual: dict[str, Any] = {
        "checkpoint": CheckpointReport(path="samples/fashion/model.pt", sha256="ab" * 32),
        "num_parameters": 12650,
        "num_unreached": 0,
        "num_frozen": 0,
        "num_examples": 4096,
        "num_examples_available": 60000,
        "num_batches": 32,
        "total_weight": 4096.0,
        "loss": 0.23141,
        "loss_name": "cross_entropy",
        "weight_decay": 0.0,
        "accuracy": 0.92114,
        "gradient_norm": 0.012345,
        "dtype": "float32",
        "device": "cpu",
        "training_mode": False,
        "matrix": "hessian",
        "manifest_sha256": "cd" * 32,
    }
    return ProblemReport(**(usual | changes))


def estimate(**changes: Any) -> Estimate:
    usual: dict[str, Any] = {
        "estimate": 1234.15,
        "probe_stderr": 24.6,
        "data_stderr": 12.1,
        "label_stderr": None,
        "degrees_of_freedom": 41.2,
        "interval": (1178.1, 1290.2),
        "population_interval": None,
        "confidence": 0.95,
        "gauss_newton": None,
        "residual": None,
        "rounding_error": 0.0123,
    }
    return Estimate(**(usual | changes))


def trace_result(layers: Sequence[LayerTrace] = LAYERS, **changes: Any) -> TraceResult:
    usual: dict[str, Any] = {
        "status": "converged",
        "problem": problem(),
        "method": MethodReport(
            name="hutchinson",
            seed=0,
            probe_distribution="rademacher",
            probe_design="nested",
            num_probes=64,
            looks=4,
            mode="double-backward",
            attention_kernel="math",
        ),
        "cost": Cost(products=64.0, gradients=192.7, seconds=12.34, peak_bytes=512 * 2**20),
        "trace": estimate(),
        "layers": tuple(layers),
        "environment": ENVIRONMENT,
        "hesscli_version": "0.1.0",
        "files": {"json": "hesscli-out/fashion-model/trace.json"},
        "warnings": ("the loader shuffles; the examples were kept once",),
    }
    return TraceResult(**(usual | changes))


def check_result() -> CheckResult:
    return CheckResult(
        problem=problem(),
        preflight=Preflight(
            mode="double-backward",
            attention_kernel="math",
            fallback="encoder.pool (MaxPool3d)",
            relative_rounding=2.3e-7,
            product_rounding=4.1e-7,
            checks=(
                Check(name="finite", state="passed", detail="loss and gradient are finite"),
                Check(name="gradient", state="skipped", detail="float32 has too few"),
                Check(
                    name="symmetry", state="passed", detail="u'Hv = v'Hu", value=3e-12, bound=1e-9
                ),
            ),
        ),
        plan=Plan(
            gradient_seconds=0.42,
            product_seconds=1.03,
            product_bytes=180 * 2**20,
            parameter_bytes=50600,
            kept_bytes=12845056,
            commands=(
                PlannedCommand(
                    command="trace",
                    products=64.0,
                    gradients=193.0,
                    seconds=66.0,
                    peak_bytes=700 * 2**20,
                    note="for a tolerance of 5%",
                ),
            ),
        ),
        environment=ENVIRONMENT,
        hesscli_version="0.1.0",
    )


# Two bins to a decade from 1e-6 to 10 on either side of the bin around zero.
_SIZES = tuple(10 ** (half / 2) for half in range(-12, 3))
EDGES = (*(-size for size in reversed(_SIZES)), *_SIZES)


def histogram(negative: int, zero: int, positive: int, size: float) -> Histogram:
    """On either side of zero half of the entries lie about a size, and a quarter on each side."""
    middle, peak = len(_SIZES) - 1, min(max(math.floor(2 * math.log10(size)) + 13, 2), 13)
    counts = [0] * (len(EDGES) - 1)
    counts[middle] = zero
    for side, number in ((-1, negative), (1, positive)):
        for step in (-1, 1):
            counts[middle + side * (peak + step)] = number // 4
        counts[middle + side * peak] = number - 2 * (number // 4)
    return Histogram(edges=EDGES, counts=tuple(counts))


def block(**changes: Any) -> BlockReport:
    usual: dict[str, Any] = {
        "rule": "kernel",
        "count": 16,
        "between_variance": 4.3e-5,
        "between_interval": (3.5e-5, 5.1e-5),
        "within_variance": 5.7e-5,
        "within_interval": (5.0e-5, 6.4e-5),
        "noise_variance": 1.2e-6,
        "noise_reduction": 8.1,
        "explained": 0.43,
        "explained_interval": (0.38, 0.48),
        "verdict": "harmful: averaging keeps 43.0% of the structure, and removes less noise",
    }
    return BlockReport(**(usual | changes))


NO_BLOCKS = block(
    rule="none",
    count=100,
    within_variance=0.0,
    within_interval=(0.0, 0.0),
    noise_reduction=1.0,
    explained=1.0,
    explained_interval=(1.0, 1.0),
    verdict="nothing to average: one entry per block",
)


def diagonal(
    name: str, mean: float, num_parameters: int = 1000, negative: int = 0, **changes: Any
) -> LayerDiagonal:
    """A layer with entries about the size of their mean, all known to a tenth."""
    size, total = abs(mean), mean * num_parameters
    parameters = (
        ParameterReport(name=f"{name}.weight", shape=(num_parameters // 9, 1, 3, 3)),
        ParameterReport(name=f"{name}.bias", shape=(num_parameters % 9,)),
    )
    usual: dict[str, Any] = {
        "name": name,
        "num_parameters": num_parameters,
        "parameters": parameters,
        "status": "converged",
        "estimate": total,
        "probe_stderr": abs(total) / 20,
        "data_stderr": abs(total) / 40,
        "interval": (total - abs(total) / 10, total + abs(total) / 10),
        "mean": mean,
        "mean_stderr": size / 20,
        "std": 2 * size,
        "std_stderr": size / 10,
        "negative_fraction": negative / max(num_parameters, 1),
        "negative_stderr": 0.001 if negative else 0.0,
        "quantiles": tuple(
            Quantile(level=level, value=factor * mean, stderr=factor * size / 20)
            for level, factor in ((0.05, 0.1), (0.25, 0.4), (0.5, 0.7), (0.75, 1.2), (0.95, 3.0))
        ),
        "histogram": (
            histogram(negative, 0, num_parameters - negative, size)
            if mean
            else histogram(0, num_parameters, 0, 1.0)
        ),
        "largest": (
            Entry(parameter=f"{name}.weight", index=(3, 0, 1, 2), estimate=9 * mean, stderr=size),
            Entry(parameter=f"{name}.bias", index=(7,), estimate=-4 * mean, stderr=size / 2),
        ),
        "block": block(),
    }
    return LayerDiagonal(**(usual | changes))


DIAGONALS = (
    diagonal("features.conv1", 0.21, 160),
    diagonal("features.norm1", 0.0135, 32, negative=1, block=NO_BLOCKS),
    diagonal("classifier", 0.00123, 7850, negative=120),
)


def diagonal_report(layers: Sequence[LayerDiagonal], **changes: Any) -> DiagonalReport:
    """Of the whole network: the sum of the layers' histograms."""
    number = max(sum(layer.num_parameters for layer in layers), 1)
    negative = sum(layer.negative_fraction * layer.num_parameters for layer in layers)
    counts = zip(*(layer.histogram.counts for layer in layers), strict=True)
    total = tuple(map(sum, counts)) or (0,) * (len(EDGES) - 1)
    usual: dict[str, Any] = {
        "norm": 12.34,
        "relative_error": 0.031,
        "relative_error_bound": 0.036,
        "confidence": 0.95,
        "negative_fraction": negative / number,
        "histogram": Histogram(edges=EDGES, counts=total),
        "shrinkage": None,
    }
    return DiagonalReport(**(usual | changes))


def diag_result(layers: Sequence[LayerDiagonal] = DIAGONALS, **changes: Any) -> DiagResult:
    like = trace_result()
    usual: dict[str, Any] = {
        "status": "converged",
        "problem": problem(),
        "method": like.method,
        "cost": like.cost,
        "trace": estimate(gauss_newton=1200.0, residual=34.15),
        "diagonal": diagonal_report(layers),
        "layers": tuple(layers),
        "environment": ENVIRONMENT,
        "hesscli_version": "0.1.0",
        "files": {"json": "hesscli-out/fashion-model/diag.json"},
    }
    return DiagResult(**(usual | changes))
