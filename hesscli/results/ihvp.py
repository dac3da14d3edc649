"""What ``hesscli ihvp`` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from hesscli.results.diag import Histogram, Quantile
from hesscli.results.header import IN_FILES, Answer, Layer

LOW_LEVERAGE = 0.5
"""Median leverage below which saliencies rank as |w| does."""
HOLDS_WITHIN = 0.1
"""Of |linear| + |quadratic|: how far off a prediction may be that is said to hold."""
LARGE_RESIDUAL = 0.1
"""Against the operator, above which a solve is better refined."""


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
    that were not used, scaled so that ±1.96 of it covers 95% from few batches too. ``hawq`` is
    ½ (tr A_layer / n) ‖δ‖² (Dong et al. 2020, arXiv 1911.03852). ``measured`` is the loss that was
    found with δ applied; ``changes`` also at shrunken δ.
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

    @property
    def predicted(self) -> float:
        """By how much the loss is predicted to grow."""
        return self.linear + self.quadratic

    def size(self, scale: float = 1.0) -> float:
        """|linear| + |quadratic| when shrunk to a scale: what errors are measured by."""
        return abs(scale * self.linear) + abs(scale**2 * self.quadratic)


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
class LayerSensitivity(Layer):
    """One layer's weights: which matter, and what pruning or rounding them does.

    ``leverage`` is the median share of [F̂ + λI]_qq's inverse that data and not λ decides;
    ``magnitude_correlation`` Spearman's between saliency and |w|; ``half_correlation`` between
    the saliencies of two disjoint half-windows. ``rank`` is by mean saliency, 1 the highest, and
    ``above_next`` the probability that it is higher than that of the next in rank.
    """

    saliency: SaliencyReport
    leverage: float
    magnitude_correlation: float | None
    half_correlation: float | None
    rank: int
    above_next: float | None
    perturbations: tuple[Perturbation, ...]

    @property
    def ranked_by(self) -> Literal["magnitude", "data"]:
        """What decides how the weights rank: where it is not data, damping makes it |w|."""
        return "magnitude" if self.leverage < LOW_LEVERAGE else "data"


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
class IhvpResult(Answer):
    """The answer of ``hesscli ihvp``.

    With a vector given, the solve is all there is: no ``ranking``, and ``layers`` are empty.
    """

    command: Literal["ihvp"] = "ihvp"
    window: WindowReport
    solve: SolveReport
    residual: ResidualReport
    ranking: RankingReport | None
    sweep: tuple[DampingPoint, ...]
    layers: tuple[LayerSensitivity, ...]
    saliency: dict[str, Any] = field(default_factory=dict, repr=False, metadata=IN_FILES)
    """By parameter, in its shape."""
    direction: dict[str, Any] = field(default_factory=dict, repr=False, metadata=IN_FILES)
    """y, likewise."""

    def tensors(self) -> dict[str, dict[str, Any]]:
        """Saliencies, or where only a solve was asked for what it found."""
        return {"saliency": self.saliency} if self.saliency else {"ihvp": self.direction}

    def __str__(self) -> str:
        """One honest line."""
        off = self.residual.operator
        return (
            f"ihvp({self.problem.matrix}): {self.window.rows} {self.window.row_kind} rows, "
            f"damping {self.window.damping:.3g}, |y| = {self.solve.norm:.6g}, "
            f"residual {'unknown' if off is None else format(off, '.2g')} against "
            f"{self.residual.operator_name}, {self.cost.gradients:.3g} gradients, {self.end}"
        )
