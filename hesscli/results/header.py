"""What every result has: the problem, the method, the cost, the layers and their traces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

SCHEMA_VERSION: Literal[1] = 1

Interval = tuple[float, float]
Mode = Literal["double-backward", "forward-over-reverse", "finite-difference"]
Reduction = Literal["mean", "sum"]
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

    ``loss`` and ``gradient_norm`` are over the kept examples and include weight decay; those of
    a sum are scaled to all available examples.
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
    reduction: Reduction = "mean"
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

    ``interval`` is for the loss over the whole loader (all available examples), without ends where
    nothing is known of those that were left out;
    ``population_interval`` for unseen examples of the same kind, where that can be claimed.
    The standard errors are one sigma; ``rounding_error`` is part of the interval. Where it is
    None nobody could measure it, and the interval has what is usual for the type.
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
    rounding_error: float | None


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
class Environment:
    """Where it ran."""

    python: str
    torch: str
    device_name: str
    threads: int
    tf32: bool
