"""What ``hesscli spectrum`` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from hesscli.results.header import IN_FILES, Answer, Interval, Layer, Status

_VECTOR_ERROR = 0.1


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

    @property
    def has_vector(self) -> bool:
        """Whether its vector is known so well that the layers' parts in it mean something."""
        return self.vector_error is not None and self.vector_error <= _VECTOR_ERROR


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

    ``stderr`` is between start vectors, and ``interval`` holds at 95% by Student's quantile for
    as many. They are None where there is one start vector only, or where the depth of the runs
    matters more: ``depth_change`` is what their second half changed. Of a dense matrix that was
    formed all is known.
    """

    value: float | None
    stderr: float | None
    depth_change: float | None

    interval: Interval | None = None


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
class LayerSpectrum(Layer):
    """A layer's part in the listed eigenvectors and, where asked for, its own block's spectrum.

    ``participation`` has for each listed eigenvalue of the whole matrix the share of its vector's
    squared length that lies in this layer.
    """

    participation: tuple[float, ...]
    status: Status | None
    eigenvalues: tuple[Eigenvalue, ...] | None
    density: SpectralDensity | None
    functions: SpectralFunctions | None
    exact: DenseSpectrum | None


@dataclass(frozen=True, kw_only=True)
class SpectrumResult(Answer):
    """The answer of ``hesscli spectrum``: the top eigenvalues, then the bottom ones, descending.

    ``steps`` were made from the first start vector.
    """

    command: Literal["spectrum"] = "spectrum"
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
    vectors: dict[str, Any] = field(default_factory=dict, repr=False, metadata=IN_FILES)
    """By parameter, in its shape after one more dimension in front: a vector for each of
    ``eigenvalues``. Empty where they were not asked for."""

    def tensors(self) -> dict[str, dict[str, Any]]:
        """Eigenvectors, where they were asked for."""
        return {"spectrum_vectors": self.vectors} if self.vectors else {}

    def __str__(self) -> str:
        """One honest line."""
        top = self.eigenvalues[0]
        mass = "unknown" if self.negative_mass is None else f"{self.negative_mass:.2g}"
        return (
            f"spectrum({self.problem.matrix}): an eigenvalue in {top.value:.6g} ± "
            f"{top.residual:.2g}, {self.outliers.count} stand apart, negative mass {mass}, "
            f"{self.steps} steps, {self.method.num_probes} start vectors, "
            f"{self.cost.products:.3g} products, {self.end}"
        )
