"""Results made by hand, for tests of what is shown of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hesscli.results import (
    Check,
    CheckpointReport,
    CheckResult,
    Cost,
    Environment,
    Estimate,
    LayerTrace,
    MethodReport,
    ParameterReport,
    Plan,
    PlannedCommand,
    Preflight,
    ProblemReport,
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
            checks=(
                Check(name="finite", passed=True, detail="loss and gradient are finite"),
                Check(name="symmetry", passed=False, detail="u'Hv = v'Hu", value=0.032, bound=1e-4),
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
