"""What ``hesscli symmetry`` returns."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from hesscli.results.header import IN_FILES, Answer, CheckpointReport, Layer

Standing = Literal["holds", "broken", "asymptotic"]


@dataclass(frozen=True, kw_only=True)
class SymmetryFamily:
    """One family of transformations, and whether the loss of every batch is left as it is.

    Attributes:
        name: its kind, as the field calls it.
        layer: the first that it acts on.
        layers: all of them.
        status: ``holds``; ``broken``; or ``asymptotic``, which would hold but for an eps: it is
            broken by O(eps), less and less as the scale grows, and has no null direction here.
        causes: what is on its way that can break it, where that is known.
        directions: of the group, each a null direction where it holds.
        null_directions: the same where it holds, else 0.
        gauss_newton_directions: the same where the Gauss-Newton matrix has them too, else 0: none
            of what changes the outputs and the loss alone undoes. None where the loss is none of
            outputs, and there is no such matrix.
        charges: numbers that gradient flow keeps where it holds.
        gradient_residual: |⟨∇L, ξ⟩| / (|∇L| |ξ|), the largest of all directions and batches.
        hessian_residual: |Hξ + (∂ξ/∂θ)ᵀ∇L| / (|Hv| |ξ|) of random ones, v being a random unit
            vector; of another matrix |Gξ| / (|Gv| |ξ|). None where no product was made.
        finite_residual: the change of the loss by a finite transformation, relative to its size.
        gauss_newton_residual: that of the outputs, or of the loss's slope in them if that is less.
            Where slopes stay as they are, AJξ = 0, and so is Gξ = JᵀAJξ. None as above.
        exponent: with which power of the scale the breaking falls; None where that was not asked.
    """

    name: str
    layer: str
    layers: tuple[str, ...]
    status: Standing
    causes: tuple[str, ...]
    directions: int
    null_directions: int
    gauss_newton_directions: int | None
    charges: int
    gradient_residual: float
    hessian_residual: float | None
    finite_residual: float
    gauss_newton_residual: float | None
    exponent: float | None


@dataclass(frozen=True, kw_only=True)
class Charge:
    """A number that gradient flow keeps.

    ``later`` is its value at a second checkpoint and ``predicted`` what is expected there; None
    where there is none, or nothing is known of the way.
    """

    name: str
    layer: str
    value: float
    later: float | None = None
    predicted: float | None = None


@dataclass(frozen=True, kw_only=True)
class Drift:
    """What became of a family's charges, together.

    Attributes:
        name: of the family.
        layer: the first that it acts on.
        charges: how many.
        size: their norm at the first end.
        changes: the norm of the difference from there at each later end.
        predicted_change: what is predicted for the last of these; None where nothing is known of
            the way.
        error: the norm of what was found there less what was predicted, over that of the change.
        rounding: of the error as much as the rounding of weights to their type may be, step after
            step.
    """

    name: str
    layer: str
    charges: int
    size: float
    changes: tuple[float, ...]
    predicted_change: float | None
    error: float | None
    rounding: float | None


@dataclass(frozen=True, kw_only=True)
class OrbitPoint:
    """What is measured after one transformation.

    Attributes:
        loss: of the batch.
        trace: of the Hessian.
        companion: Σ θᵢ² ∂²L/∂θᵢ², which is the trace of D H D, D being diagonal with the weights.
        trace_error: half-widths of 95% intervals.
        companion_error: the same of the companion.
        largest: eigenvalue that Lanczos' method has found.
        largest_companion: the same of D H D.
        largest_error: there is an eigenvalue that is no further away; a larger one was not seen.
        largest_companion_error: the same of D H D.
    """

    loss: float
    trace: float
    companion: float
    trace_error: float
    companion_error: float
    largest: float
    largest_companion: float
    largest_error: float
    largest_companion_error: float


@dataclass(frozen=True, kw_only=True)
class Orbit:
    """Sharpness on a batch at weights whose loss is the same, and what does not change with it.

    ``points`` begin with the weights as they are; the others are random rescalings by all families
    that hold and scale. Traces are from as many ``probes``, and eigenvalues from as many ``steps``
    of Lanczos' method, the same at each point, on so many ``examples``.
    """

    probes: int
    steps: int
    examples: int
    points: tuple[OrbitPoint, ...]


@dataclass(frozen=True, kw_only=True)
class LayerSymmetry(Layer):
    """A layer, and the families that hold and act on it.

    ``null_directions`` are those of families that act on no layer before it, so that all layers'
    add up to the whole.
    """

    families: int
    null_directions: int


@dataclass(frozen=True, kw_only=True)
class FlatReport:
    """How much of the Hessian symmetry makes flat.

    Attributes:
        directions: null directions of all families that hold.
        independent: as many of them as are linearly independent here; None where that was too much
            work, and the count is then the number of directions at most.
        share: of the parameters.
        everywhere: of these, in the same count, those that are null for the Hessian wherever it is
            taken. The others are where the gradient is 0.
        gauss_newton: of these, in the same count, those of families that are null as a whole for
            the Gauss-Newton matrix, wherever it is taken; None where the loss is none of outputs,
            and there is no such matrix.
    """

    directions: int
    independent: int | None
    share: float
    everywhere: int
    gauss_newton: int | None


@dataclass(frozen=True, kw_only=True)
class SymmetryResult(Answer):
    """The answer of ``hesscli symmetry``."""

    command: Literal["symmetry"] = "symmetry"
    flat: FlatReport
    families: tuple[SymmetryFamily, ...]
    charges: tuple[Charge, ...]
    later: tuple[CheckpointReport, ...] = ()
    drifts: tuple[Drift, ...] = ()
    orbit: Orbit | None = None
    layers: tuple[LayerSymmetry, ...]
    charge_values: dict[str, Any] = field(default_factory=dict, repr=False, metadata=IN_FILES)

    def only(self, names: Collection[str] | None) -> Self:
        """With no layers but those of these names, and the families and charges that touch them."""
        if names is None:
            return self
        families = tuple(x for x in self.families if set(names) & set(x.layers))
        kept = {(x.name, x.layer) for x in families}
        return replace(
            super().only(names),
            families=families,
            charges=tuple(x for x in self.charges if (x.name, x.layer) in kept),
            drifts=tuple(x for x in self.drifts if (x.name, x.layer) in kept),
        )

    def tensors(self) -> dict[str, dict[str, Any]]:
        """All charges, by family."""
        return {"symmetry": self.charge_values} if self.charge_values else {}

    def __str__(self) -> str:
        """One honest line."""
        counts = [sum(x.status == status for x in self.families) for status in _STANDINGS]
        told = ", ".join(f"{n} {status}" for n, status in zip(counts, _STANDINGS, strict=True) if n)
        flat = self.flat
        count = f"at most {flat.directions}" if flat.independent is None else flat.independent
        return (
            f"symmetry: {told or 'no family found'}; {count} null directions of "
            f"{self.problem.num_parameters} parameters, {self.end}"
        )


_STANDINGS: tuple[Standing, ...] = ("holds", "asymptotic", "broken")
