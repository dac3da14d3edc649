"""What results share: which problem, how, at what cost, which layers, and with what caution."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, BinaryIO, Literal, Self

from hesscli import __version__

SCHEMA_VERSION: Literal[1] = 1


class _NullWhereUnknown:
    """Lets documents have one null for an interval without ends, not two."""

    @staticmethod
    def __get_pydantic_core_schema__(source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import core_schema

        ends = handler(source)
        written = core_schema.plain_serializer_function_ser_schema(
            lambda interval: None if interval == (-math.inf, math.inf) else interval,
            return_schema=core_schema.nullable_schema(ends),
        )
        return {**ends, "serialization": written}


Interval = Annotated[tuple[float, float], _NullWhereUnknown]
Reduction = Literal["mean", "sum"]
Status = Literal["exact", "converged", "budget", "data-limited", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """How far a run is, for a progress bar, a budget or Ctrl-C.

    ``phase`` is what it does, in words. ``done`` and ``total`` are in examples while data is read
    and in full-data products after; None where unknown.
    """

    phase: str
    done: float | None = None
    total: float | None = None
    estimate: float | None = None
    interval: Interval | None = None
    seconds: float = 0.0


Observe = Callable[[Snapshot], bool]
"""Called with each snapshot; returning True stops the run at its result so far."""


def tell(observe: Observe | None, snapshot: Snapshot) -> None:
    """Call an observer, if there is one, where there is no result so far.

    Raises:
        KeyboardInterrupt: it wants no more.
    """
    if observe is not None and observe(snapshot):
        raise KeyboardInterrupt


@dataclass(frozen=True, kw_only=True)
class CheckpointReport:
    """Which file was analysed."""

    path: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Which data a folder's model was given."""

    path: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ProblemReport:
    """The proof that this is the user's model, and what exactly was analysed.

    ``loss`` and ``gradient_norm`` are over the kept examples and include weight decay; those of
    a sum are scaled to all available examples.
    ``total_weight`` is their weight mass (examples, unmasked tokens or class weights).
    ``data`` and ``tokenizer_sha256`` are of a Hugging Face folder, ``num_tokens`` of what language
    models read, padding left out.
    ``restricted_to`` has the globs of ``--params`` where the matrix is not of all parameters: the
    others are among the frozen ones.
    """

    checkpoint: CheckpointReport | None
    model_class: str = ""
    data: DataReport | None = None
    tokenizer_sha256: str | None = None
    num_parameters: int
    num_unreached: int
    num_frozen: int
    restricted_to: tuple[str, ...] | None = None
    num_examples: int
    num_examples_available: int | None
    num_tokens: int | None = None
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
    # What follows is of probes, which not every method draws.
    probe_distribution: str = "none"
    probe_design: str = "none"
    num_probes: int = 0
    looks: int = 1
    # Where only a part of the batches was measured, of how many.
    batches_measured: int | None = None
    # Where there was no time for batches one by one: how many they were taken as.
    batches_joined: int | None = None
    # The error that would end the run, of the value's size or whatever that is.
    rtol: float | None = None
    atol: float | None = None
    mode: str
    attention_kernel: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What it took, the proof and all checks included.

    ``products`` are matrix-vector products over all kept examples; ``gradients`` counts the
    same work in full-data gradients (forward 1/3, backward 2/3), independent of the clock: a pass
    over a few examples by its operations, what it multiplies, the numbers that it makes and the
    weights that it reads, priced as on one core, in float64 as what that takes; what is done with
    vectors as long as the parameters; and with a window's rows, by its size and that of its blocks.
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
class Layer:
    """A module that owns tensors."""

    name: str
    num_parameters: int
    parameters: tuple[ParameterReport, ...]


@dataclass(frozen=True, kw_only=True)
class LayerTrace(Layer):
    """The trace of one layer's diagonal block; a layer is the module that owns the tensors."""

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


IN_FILES = {"document": False}
"""Metadata of fields with numpy arrays by parameter, which go to files and not into documents."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What every command's answer has, whatever else it holds.

    ``files`` are the paths of what was written, by what each file is; ``sha256`` has the sum of
    each but the document itself, by which :func:`hesscli.read` knows that they belong together.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    command: str
    hesscli_version: str = __version__
    status: str
    problem: ProblemReport
    environment: Environment
    files: dict[str, str] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def tensors(self) -> dict[str, dict[str, Any]]:
        """Arrays by the names of the files that they go to, the main ones first."""
        return {}

    def copies(self) -> dict[str, tuple[str, Callable[[BinaryIO], None]]]:
        """Other files by what each is: its name, and what writes it to a new file."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Answer(Header):
    """What every answer has that took work which may end before its goal.

    ``num_hidden`` are the layers that :meth:`only` left out; None where it chose none.
    """

    status: Status
    method: MethodReport
    cost: Cost
    layers: tuple[Layer, ...]
    num_hidden: int | None = field(default=None, metadata={"document": False})

    @property
    def num_layers(self) -> int:
        """How many there are, those included that were left out."""
        return len(self.layers) + (self.num_hidden or 0)

    @property
    def end(self) -> str:
        """How it ended, and what a reader of one line is not to miss."""
        mode = ", in training mode" if self.problem.training_mode else ""
        many = f", {len(self.warnings)} in .warnings" if self.warnings else ""
        return f"{self.status}{mode}{many}"

    def only(self, names: Collection[str] | None) -> Self:
        """The answer with no layers but those of these names, or with all where it is None."""
        if names is None:
            return self
        kept = tuple(layer for layer in self.layers if layer.name in names)
        return replace(self, layers=kept, num_hidden=len(self.layers) - len(kept))


_LAST = ("layers", "environment", "files", "sha256", "warnings")


def documented(result: type[Header]) -> list[str]:
    """Name the fields of a document, in its order: what is shared stands around the rest."""
    names = [one.name for one in fields(result) if one.metadata.get("document", True)]
    return sorted(names, key=lambda name: _LAST.index(name) if name in _LAST else -1)
