"""What every command returns: frozen dataclasses whose field names are the JSON keys.

No torch and no numpy here: pictures, tables and documents are made from these alone.
A number that is not known is None (JSON null), never NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA_VERSION: Literal[1] = 1

Interval = tuple[float, float]
Mode = Literal["double-backward", "forward-over-reverse", "finite-difference"]
Status = Literal["exact", "converged", "budget", "data-limited", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """How far a run is, for a progress bar, a budget or Ctrl-C.

    ``done`` and ``total`` are in examples while data is read and in full-data products after;
    None where unknown.
    """

    phase: Literal[
        "reading data",
        "loss and gradient",
        "preflight",
        "pilot",
        "squaring gradients",
        "probing",
    ]
    done: float | None = None
    total: float | None = None
    estimate: float | None = None
    interval: Interval | None = None
    seconds: float = 0.0


Observe = Callable[[Snapshot], bool]
"""Called with each snapshot; returning True stops the run at its result so far."""


@dataclass(frozen=True, kw_only=True)
class CheckpointReport:
    """Which file was analysed."""

    path: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ProblemReport:
    """The proof that this is the user's model, and what exactly was analysed.

    ``loss`` and ``gradient_norm`` are over the kept examples and include weight decay;
    ``total_weight`` is their weight mass (examples, unmasked tokens or class weights).
    """

    checkpoint: CheckpointReport | None
    num_parameters: int
    num_unreached: int
    num_frozen: int
    num_examples: int
    num_examples_available: int | None
    num_batches: int
    total_weight: float
    loss: float
    loss_name: str
    weight_decay: float
    accuracy: float | None
    gradient_norm: float
    dtype: str
    device: str
    training_mode: bool
    matrix: str
    manifest_sha256: str


@dataclass(frozen=True, kw_only=True)
class MethodReport:
    """How the numbers were made; replaying these with the same thread count repeats them."""

    name: str
    seed: int
    probe_distribution: str
    probe_design: str
    num_probes: int
    looks: int
    mode: str
    attention_kernel: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What it took, from the first product on.

    ``products`` are matrix-vector products over all kept examples; ``gradients`` counts the
    same work in full-data gradients (forward 1/3, backward 2/3), independent of the clock.
    ``peak_bytes`` is the device's peak allocation, or on a CPU the process's peak resident
    memory rounded up to 64 MiB.
    """

    products: float
    gradients: float
    seconds: float
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its error bars, by source.

    ``interval`` is for the loss over the whole loader (all available examples);
    ``population_interval`` for unseen examples of the same kind, where that can be claimed.
    The standard errors are one sigma; ``rounding_error`` is part of the interval.
    """

    estimate: float
    probe_stderr: float
    data_stderr: float | None
    label_stderr: float | None
    degrees_of_freedom: float | None
    interval: Interval
    population_interval: Interval | None
    confidence: float
    gauss_newton: float | None
    residual: float | None
    rounding_error: float


@dataclass(frozen=True, kw_only=True)
class ParameterReport:
    """One tensor, named as in the checkpoint."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class LayerTrace:
    """The trace of one layer's diagonal block; a layer is the module that owns the tensors."""

    name: str
    num_parameters: int
    parameters: tuple[ParameterReport, ...]
    status: Status
    estimate: float
    probe_stderr: float
    data_stderr: float | None
    interval: Interval


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How many diagonal entries lie between neighbouring edges; all layers share the edges."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Quantile:
    """The value that a share ``level`` of the entries lie below, as estimated."""

    level: float
    value: float
    stderr: float


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One diagonal entry: ∂²L/∂θ² of one weight."""

    parameter: str
    index: tuple[int, ...]
    estimate: float
    stderr: float


@dataclass(frozen=True, kw_only=True)
class BlockReport:
    """What AdaHessian's block averaging keeps of a layer's diagonal, and what it buys.

    ``between_variance`` and ``within_variance`` are of the true diagonal: that of the block
    means, and that of the entries around them, both with estimator noise taken out.
    ``explained`` is the share of the two that averaging keeps. ``noise_variance`` is the
    estimator's noise in a block mean, averaged over the blocks, and ``noise_reduction`` how
    many times smaller that is than its noise in an entry; None where no probe was drawn.
    """

    rule: str
    count: int
    between_variance: float
    between_interval: Interval
    within_variance: float
    within_interval: Interval
    noise_variance: float | None
    noise_reduction: float | None
    explained: float
    explained_interval: Interval
    verdict: str


@dataclass(frozen=True, kw_only=True)
class LayerDiagonal(LayerTrace):
    """One layer's diagonal entries: ``estimate`` is their sum, the rest is of single entries.

    ``largest`` are the entries of largest size, at most a few.
    """

    mean: float
    mean_stderr: float
    std: float
    std_stderr: float
    negative_fraction: float
    negative_stderr: float
    quantiles: tuple[Quantile, ...]
    histogram: Histogram
    largest: tuple[Entry, ...]
    block: BlockReport


@dataclass(frozen=True, kw_only=True)
class DiagonalReport:
    """The whole diagonal: its norm, and how far off it is.

    ``relative_error`` is the expected ‖error‖ / ‖diag‖ with noise taken out of the norm,
    ``relative_error_bound`` what it stays below with probability ``confidence``; None where noise
    hides the diagonal. ``shrinkage``
    says for each layer how much of the noisy part was kept, None where nothing was shrunk.
    """

    norm: float
    relative_error: float | None
    relative_error_bound: float | None
    confidence: float
    negative_fraction: float
    histogram: Histogram
    shrinkage: tuple[float, ...] | None


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where it ran."""

    python: str
    torch: str
    device_name: str
    threads: int
    tf32: bool


@dataclass(frozen=True, kw_only=True)
class TraceResult:
    """The answer of ``hesscli trace``."""

    schema_version: Literal[1] = SCHEMA_VERSION
    command: Literal["trace"] = "trace"
    hesscli_version: str
    status: Status
    problem: ProblemReport
    method: MethodReport
    cost: Cost
    trace: Estimate
    layers: tuple[LayerTrace, ...]
    environment: Environment
    files: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One honest line."""
        low, high = self.trace.interval
        return (
            f"trace({self.problem.matrix}) = {self.trace.estimate:.6g}, "
            f"{self.trace.confidence:.0%} interval [{low:.6g}, {high:.6g}], "
            f"{self.problem.num_examples} examples, {self.method.num_probes} probes, "
            f"{self.cost.products:.3g} products, {self.status}"
        )


@dataclass(frozen=True, kw_only=True)
class DiagResult:
    """The answer of ``hesscli diag``."""

    schema_version: Literal[1] = SCHEMA_VERSION
    command: Literal["diag"] = "diag"
    hesscli_version: str
    status: Status
    problem: ProblemReport
    method: MethodReport
    cost: Cost
    trace: Estimate
    diagonal: DiagonalReport
    layers: tuple[LayerDiagonal, ...]
    environment: Environment
    files: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One honest line."""
        report = self.diagonal
        error = "unknown" if report.relative_error is None else f"{report.relative_error:.2g}"
        return (
            f"diag({self.problem.matrix}): {self.problem.num_parameters} entries, "
            f"norm {report.norm:.6g} ± {error} relative, "
            f"{report.negative_fraction:.2%} negative, {self.method.num_probes} probes, "
            f"{self.cost.gradients:.3g} gradients, {self.status}"
        )


@dataclass(frozen=True, kw_only=True)
class DiagonalRun(DiagResult):
    """A :class:`DiagResult` with its arrays, which files hold and documents do not.

    ``entries`` and ``stderr`` map each parameter's name to a numpy array of its shape; entries
    are shrunk where that lowers their error, their standard errors are those without shrinkage.
    """

    entries: dict[str, Any] = field(repr=False, metadata={"document": False})
    stderr: dict[str, Any] = field(repr=False, metadata={"document": False})


@dataclass(frozen=True, kw_only=True)
class Check:
    """One preflight check: what was measured, against which bound."""

    name: str
    passed: bool
    detail: str
    value: float | None = None
    bound: float | None = None


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """The checks, and the autodiff mode that passed them.

    ``fallback`` names the module that ruled a faster mode out, or is None;
    ``relative_rounding`` is the relative error of quadratic forms against float64 (None where
    the model does not run in float64).
    """

    mode: Mode
    attention_kernel: str
    fallback: str | None
    relative_rounding: float | None
    checks: tuple[Check, ...]


@dataclass(frozen=True, kw_only=True)
class PlannedCommand:
    """What one command is expected to take."""

    command: str
    products: float
    gradients: float
    seconds: float
    peak_bytes: int
    note: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Time and memory of one full-data product, and of the commands.

    ``product_bytes`` is what one product of one batch holds beyond model and examples;
    ``kept_bytes`` the frozen examples.
    """

    gradient_seconds: float
    product_seconds: float
    product_bytes: int
    parameter_bytes: int
    kept_bytes: int
    commands: tuple[PlannedCommand, ...]


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """The answer of ``hesscli check``."""

    schema_version: Literal[1] = SCHEMA_VERSION
    command: Literal["check"] = "check"
    hesscli_version: str
    status: Literal["ok"] = "ok"
    problem: ProblemReport
    preflight: Preflight
    plan: Plan
    environment: Environment
    files: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
