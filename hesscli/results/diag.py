"""What ``hesscli diag`` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from hesscli.results.header import IN_FILES, Answer, Estimate, Interval, LayerTrace


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
class EntrySummary:
    """A layer's entries in a few numbers; ``largest`` are those of largest size, at most a few."""

    mean: float
    mean_stderr: float
    std: float
    std_stderr: float
    negative_fraction: float
    negative_stderr: float
    quantiles: tuple[Quantile, ...]
    histogram: Histogram
    largest: tuple[Entry, ...]


@dataclass(frozen=True, kw_only=True)
class LayerDiagonal(EntrySummary, LayerTrace):
    """One layer's diagonal entries: ``estimate`` is their sum, the rest is of single entries.

    ``largest`` are the entries of largest size, at most a few.
    """

    block: BlockReport


@dataclass(frozen=True, kw_only=True)
class DiagonalReport:
    """The whole diagonal: its norm, and how far off it is.

    ``relative_error`` is the expected ‖error‖ / ‖diag‖ with noise taken out of the norm,
    ``relative_error_bound`` what it stays below with probability ``confidence``; None where noise
    hides the diagonal. ``shrinkage`` says for each layer how much of the noisy part was kept, None
    where nothing was shrunk; where it was, the entries' own bars are conservative.
    """

    norm: float
    relative_error: float | None
    relative_error_bound: float | None
    confidence: float
    negative_fraction: float
    histogram: Histogram
    shrinkage: tuple[float, ...] | None


@dataclass(frozen=True, kw_only=True)
class DiagResult(Answer):
    """The answer of ``hesscli diag``."""

    command: Literal["diag"] = "diag"
    trace: Estimate
    diagonal: DiagonalReport
    layers: tuple[LayerDiagonal, ...]
    entries: dict[str, Any] = field(default_factory=dict, repr=False, metadata=IN_FILES)
    """By parameter, in its shape; shrunk where that lowers their error."""
    stderr: dict[str, Any] = field(default_factory=dict, repr=False, metadata=IN_FILES)
    """±1.96 of them cover 95%, however few the draws they were estimated from; or more, where
    entries were shrunk, and they count how far."""

    def tensors(self) -> dict[str, dict[str, Any]]:
        """Entries and their standard errors."""
        return {"diag": self.entries, "diag_stderr": self.stderr}

    def __str__(self) -> str:
        """One honest line."""
        report = self.diagonal
        error = "unknown" if report.relative_error is None else f"{report.relative_error:.2g}"
        return (
            f"diag({self.problem.matrix}): {self.problem.num_parameters} entries, "
            f"norm {report.norm:.6g} ± {error} relative, "
            f"{report.negative_fraction:.2%} negative, {self.method.num_probes} probes, "
            f"{self.cost.gradients:.3g} gradients, {self.end}"
        )
