"""What every command returns: frozen dataclasses whose field names are the JSON keys.

No torch and no numpy here: pictures, tables and documents are made from these alone.
A number that is not known is None (JSON null), never NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA_VERSION: Literal[1] = 1

LOW_LEVERAGE = 0.5
"""Median leverage below which saliencies rank as |w| does."""
HOLDS_WITHIN = 0.1
"""Of |linear| + |quadratic|: how far off a prediction may be that is said to hold."""
LARGE_RESIDUAL = 0.1
"""Against the operator, above which a solve is better refined."""

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
        "iterating",
        "forming the matrix",
        "collecting gradients",
        "inverting",
        "perturbing",
        "verifying",
        "refining",
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
    """The value that a share ``level`` of the entries lie below, and its error where known."""

    level: float
    value: float
    stderr: float | None


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
class WindowReport:
    """The gradients that stand for the matrix F̂ = (1/m) Σ g gᵀ.

    ``damping`` is λ in F̂ + λI, ``relative_damping`` the same in units of tr F̂ / d. F̂ is kept in
    diagonal blocks of at most ``largest_block`` entries.
    """

    rows: int
    row_kind: str
    damping: float
    relative_damping: float
    blocks: str
    largest_block: int
    dtype: str
    num_bytes: int
    file: str | None


@dataclass(frozen=True, kw_only=True)
class ResidualReport:
    """How well y solves the system, as ‖Ay − x‖ / ‖x‖; None where x is zero.

    ``window`` is against F̂ + λI: rounding. ``operator`` is against the matrix ``operator_name``
    plus λI: what the window does not know of it.
    """

    window: float | None
    operator: float | None
    operator_name: str


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """Conjugate gradients on the operator plus λI, with the window as preconditioner.

    ``residual`` is computed anew at the end. ``negative_curvature`` is the Rayleigh quotient of a
    direction along which the operator plus λI curves downwards, where one was met: there the
    solve ends.
    """

    tolerance: float
    iterations: int
    residual: float
    converged: bool
    negative_curvature: float | None


@dataclass(frozen=True, kw_only=True)
class SolveReport:
    """y with (F̂ + λI) y = x; x is the gradient of the loss unless a file gave it."""

    vector: str
    vector_norm: float
    norm: float
    refinement: Refinement | None


@dataclass(frozen=True, kw_only=True)
class ScaledChange:
    """The loss after a perturbation shrunk to ``scale`` of itself, less the loss before."""

    scale: float
    predicted: float
    measured: float


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """A change δ of one layer's weights, and what it does to the loss.

    ``kind`` is ``prune`` (``level`` the share of least salient weights set to zero) or ``round``
    (``level`` in bits, with one grid a ``tensor`` or a ``channel``). The loss is predicted to grow
    by ``linear`` + ``quadratic`` = gᵀδ + ½δᵀAδ; ``stderr`` is of their sum, from the examples
    that were not used. ``hawq`` is ½ (tr A_layer / n) ‖δ‖² (Dong et al. 2020, arXiv 1911.03852).
    ``measured`` is the loss that was found with δ applied; ``changes`` also at shrunken δ.
    ``order`` is the power of the scale with which the error of the prediction falls, and
    ``holds`` whether at full size the error is within 10% of |linear| + |quadratic|.
    """

    kind: Literal["prune", "round"]
    level: float
    granularity: Literal["weight", "tensor", "channel"]
    squared_norm: float
    linear: float
    quadratic: float
    stderr: float
    hawq: float
    measured: float | None
    changes: tuple[ScaledChange, ...]
    order: float | None
    holds: bool | None


@dataclass(frozen=True, kw_only=True)
class SaliencyReport:
    """A layer's optimal-brain-surgeon saliencies w² / (2 [(F̂ + λI)⁻¹]_qq): a ranking, no loss.

    Standard errors are the jackknife's over groups of rows, None where a group decides whether
    there is any; ``histogram`` has edges that all layers share, saliencies of zero left out.
    """

    mean: float
    stderr: float | None
    quantiles: tuple[Quantile, ...]
    histogram: Histogram


@dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """One layer's weights: which matter, and what pruning or rounding them does.

    ``leverage`` is the median share of [F̂ + λI]_qq's inverse that data and not λ decides;
    ``magnitude_correlation`` Spearman's between saliency and |w|; ``half_correlation`` between
    the saliencies of two disjoint half-windows. ``rank`` is by mean saliency, 1 the highest, and
    ``above_next`` the probability that it is higher than that of the next in rank.
    """

    name: str
    num_parameters: int
    parameters: tuple[ParameterReport, ...]
    saliency: SaliencyReport
    leverage: float
    magnitude_correlation: float | None
    half_correlation: float | None
    rank: int
    above_next: float | None
    perturbations: tuple[Perturbation, ...]


@dataclass(frozen=True, kw_only=True)
class DampingPoint:
    """What one λ makes of the window and of y.

    ``span_share`` is the share of ‖y‖ inside the span of the window's rows, ``cosine`` that of y
    to y at the next smaller λ, ``leverage`` the median over all weights, ``rank_correlation``
    Spearman's to the saliencies at the run's own λ, ``operator_residual`` as in the residual.
    """

    relative: float
    absolute: float
    span_share: float | None
    cosine: float | None
    leverage: float
    rank_correlation: float | None
    operator_residual: float | None


@dataclass(frozen=True, kw_only=True)
class RankingReport:
    """How sure the order of layers by mean saliency is.

    ``layers`` are in that order; ``above[i][j]`` is the probability that layer i's mean is higher
    than layer j's. ``half_correlation`` is Spearman's over all weights between two half-windows.
    """

    layers: tuple[str, ...]
    above: tuple[tuple[float, ...], ...]
    half_correlation: float | None


@dataclass(frozen=True, kw_only=True)
class IhvpResult:
    """The answer of ``hesscli ihvp``.

    With a vector given, the solve is all there is: no ``ranking``, and ``layers`` are empty.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    command: Literal["ihvp"] = "ihvp"
    hesscli_version: str
    status: Status
    problem: ProblemReport
    method: MethodReport
    cost: Cost
    window: WindowReport
    solve: SolveReport
    residual: ResidualReport
    ranking: RankingReport | None
    sweep: tuple[DampingPoint, ...]
    layers: tuple[LayerSensitivity, ...]
    environment: Environment
    files: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One honest line."""
        off = self.residual.operator
        return (
            f"ihvp({self.problem.matrix}): {self.window.rows} {self.window.row_kind} rows, "
            f"damping {self.window.damping:.3g}, |y| = {self.solve.norm:.6g}, "
            f"residual {'unknown' if off is None else format(off, '.2g')} against "
            f"{self.residual.operator_name}, {self.cost.gradients:.3g} gradients, {self.status}"
        )


@dataclass(frozen=True, kw_only=True)
class IhvpRun(IhvpResult):
    """An :class:`IhvpResult` with its arrays, which files hold and documents do not.

    ``saliency`` and ``direction`` map each parameter's name to a numpy array of its shape.
    """

    saliency: dict[str, Any] = field(repr=False, metadata={"document": False})
    direction: dict[str, Any] = field(repr=False, metadata={"document": False})


@dataclass(frozen=True, kw_only=True)
class Eigenvalue:
    """A Ritz value: an eigenvalue lies within ``residual`` of it.

    ``end`` says from which end of the spectrum it was listed. One that is ``settled`` stands alone,
    as do all between it and that end: its place among them is known, unless the start vector is
    nearly blind to one of them. ``copies`` are the eigenvalues that were found there.
    ``vector_error`` bounds the sine of the angle between its vector and the true eigenvector, from
    the distance to the next Ritz value; None where that is no bound.
    """

    value: float
    residual: float
    end: Literal["top", "bottom"]
    settled: bool
    copies: int
    vector_error: float | None


@dataclass(frozen=True, kw_only=True)
class SpectralDensity:
    """The density of eigenvalues, whose integral over ``grid`` is 1, and what it is made of.

    ``nodes`` with their ``weights``, which sum to 1, are the spectrum as it was found; those that
    are ``isolated`` stand alone and were counted, 1/d each. In ``values`` they are narrow spikes;
    the others have kernels with a standard deviation of ``bandwidth`` · √(λ² + ``scale``²).
    """

    grid: tuple[float, ...]
    values: tuple[float, ...]
    bandwidth: float
    scale: float
    nodes: tuple[float, ...]
    weights: tuple[float, ...]
    isolated: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class SpectralFunction:
    """A number that depends on all eigenvalues, None where it has no meaning.

    ``stderr`` is between start vectors. It is None where there is one start vector only, or where
    the depth of the runs matters more: ``depth_change`` is what their second half changed.
    """

    value: float | None
    stderr: float | None
    depth_change: float | None


@dataclass(frozen=True, kw_only=True)
class SpectralFunctions:
    """Sums over the eigenvalues.

    ``stable_rank`` is Σλ² / max λ², ``effective_rank`` the exponential of the entropy of the shares
    |λ| / Σ|λ| (Roy & Vetterli 2007), ``negative_mass`` Σ_{λ<0} |λ| / Σ|λ|.
    """

    trace: SpectralFunction
    squared_norm: SpectralFunction
    negative_mass: SpectralFunction
    stable_rank: SpectralFunction
    effective_rank: SpectralFunction


@dataclass(frozen=True, kw_only=True)
class Outliers:
    """The largest eigenvalues that stand apart from those below them.

    ``count`` of them lie above the widest step of the staircase, where one eigenvalue is ``ratio``
    times the next; none where no step is wide. ``class_ratio`` is the step at the number of
    ``classes`` less one, where labels are classes and that many are known.
    """

    count: int
    ratio: float | None
    classes: int | None
    class_ratio: float | None


@dataclass(frozen=True, kw_only=True)
class Condition:
    """The condition number of a positive semidefinite matrix plus ``damping`` on its diagonal.

    It lies in the interval: the smallest eigenvalue is known from above, and is not negative.
    ``relative_damping`` is in units of the mean eigenvalue.
    """

    damping: float
    relative_damping: float
    interval: Interval


@dataclass(frozen=True, kw_only=True)
class ConvergencePoint:
    """The largest Ritz values after so many steps, and their residuals."""

    steps: int
    values: tuple[float, ...]
    residuals: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class DenseSpectrum:
    """All eigenvalues of the dense matrix, and how far the estimated density is from them.

    ``distance`` is the Wasserstein-1 distance between the two over the mean |λ|.
    """

    eigenvalues: tuple[float, ...]
    distance: float | None


@dataclass(frozen=True, kw_only=True)
class LayerSpectrum:
    """A layer's part in the listed eigenvectors and, where asked for, its own block's spectrum.

    ``participation`` has for each listed eigenvalue of the whole matrix the share of its vector's
    squared length that lies in this layer.
    """

    name: str
    num_parameters: int
    parameters: tuple[ParameterReport, ...]
    participation: tuple[float, ...]
    status: Status | None
    eigenvalues: tuple[Eigenvalue, ...] | None
    density: SpectralDensity | None
    functions: SpectralFunctions | None
    exact: DenseSpectrum | None


@dataclass(frozen=True, kw_only=True)
class SpectrumResult:
    """The answer of ``hesscli spectrum``: the top eigenvalues, then the bottom ones, descending.

    ``steps`` were made from the first start vector.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    command: Literal["spectrum"] = "spectrum"
    hesscli_version: str
    status: Status
    problem: ProblemReport
    method: MethodReport
    cost: Cost
    steps: int
    eigenvalues: tuple[Eigenvalue, ...]
    density: SpectralDensity
    negative_mass: float | None
    functions: SpectralFunctions
    outliers: Outliers
    condition: Condition | None
    convergence: tuple[ConvergencePoint, ...]
    exact: DenseSpectrum | None
    layers: tuple[LayerSpectrum, ...]
    environment: Environment
    files: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One honest line."""
        top = self.eigenvalues[0]
        mass = "unknown" if self.negative_mass is None else f"{self.negative_mass:.2g}"
        return (
            f"spectrum({self.problem.matrix}): an eigenvalue in {top.value:.6g} ± "
            f"{top.residual:.2g}, {self.outliers.count} stand apart, negative mass {mass}, "
            f"{self.steps} steps, {self.method.num_probes} start vectors, "
            f"{self.cost.products:.3g} products, {self.status}"
        )


@dataclass(frozen=True, kw_only=True)
class SpectrumRun(SpectrumResult):
    """A :class:`SpectrumResult` with its eigenvectors, which files hold and documents do not.

    ``vectors`` maps each parameter's name to a numpy array with one more dimension in front: one
    vector for each of ``eigenvalues``. Empty where they were not asked for.
    """

    vectors: dict[str, Any] = field(repr=False, metadata={"document": False})


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
