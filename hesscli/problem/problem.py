"""A Problem: a model, its loss and frozen examples. It knows nothing of curvature."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from hesscli.errors import InputError, UnsoundError
from hesscli.meter import Meter
from hesscli.parameters import Parameters
from hesscli.problem.batches import Batch, first_rows, map_tensors, place, size_of
from hesscli.problem.criteria import as_loss, reading
from hesscli.problem.data import FrozenData
from hesscli.problem.factory import blamed_on_user
from hesscli.problem.forward import Run, placed, require_real, retyped, run_with, undisturbed
from hesscli.problem.freezing import freeze
from hesscli.problem.independence import MODEL_RAISED, IndependenceTest, must_fit
from hesscli.problem.losses import Loss, StepLoss, Summed, UserLoss
from hesscli.problem.precision import Precision, Widened, precision_of
from hesscli.problem.proof import Proof, prove
from hesscli.problem.sampling import Sample
from hesscli.results import CheckpointReport, Observe, ProblemReport, Reduction
from hesscli.vocabulary import Selection

_LOOKED_AT = 32
"""Examples of a batch by which a loss is settled."""


@dataclass(frozen=True)
class WeightedBatch:
    """One batch on the device; ``weight`` is its share of the whole weight mass."""

    index: int
    data: Batch
    weight: float
    count: int


class Problem:
    """A weighted mean loss over frozen examples, plus ½·weight_decay·‖θ‖².

    Args:
        model: analysed in the mode that it is in; its parameters and buffers end as they began,
            and a copy is made where another device or type is asked for.
        loss: a name (``"cross_entropy"``, ...), a torch criterion with mean reduction,
            ``fn(outputs, targets) -> mean loss`` of what the model returned, whole, or a
            :class:`Loss`.
        data: a map-style dataset, a DataLoader, a list of examples or of batches, a pair of arrays
            ``(X, y)``, an iterable of batches, or frozen data as it is.
        output: key, attribute or index of the tensor that a named loss reads, where the model
            returns several; default ``.logits``.
        weight_decay: coefficient of ½‖θ‖² over all trainable parameters.
        examples: how many to keep: ``N``, ``"all"`` or ``"first:N"``.
        reduction: ``"mean"`` or ``"sum"`` over the examples; default what the loss says or does.
        collate: makes a batch of a list of examples, instead of the loader's or torch's.
        batch_size: at most so many examples a batch; just so many where they are not independent
            (default then the loader's own, else 128).
        unseen: the examples were not trained on, so that error bars may speak of new ones.
        device: where to compute; default where the model is.
        dtype: floating type to compute in; default the model's own.
        seed: of the draw of examples.
        checkpoint: which file the model came from.
        warnings: what its reader should be told besides.
        observe: told of examples read.

    Raises:
        HesscliError: empty or unusable data, nothing to analyse, non-finite weights.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Any,
        data: Any,
        *,
        output: str | int | None = None,
        weight_decay: float = 0.0,
        examples: str | int = Selection.usual,
        reduction: Reduction | None = None,
        collate: Callable[[list[Any]], Batch] | None = None,
        batch_size: int | None = None,
        unseen: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        checkpoint: CheckpointReport | None = None,
        warnings: tuple[str, ...] = (),
        observe: Observe | None = None,
    ) -> None:
        model = getattr(model, "_orig_mod", model)  # a compiled module has no double backward
        require_real(model)
        self.model = placed(model, device, dtype)
        self.originals = () if self.model is model else tuple(model.parameters())
        self.loss: Loss = reading(as_loss(loss, reduction=reduction), output)
        self.parameters = Parameters.of(self.model)
        if not len(self.parameters):
            raise InputError(
                "the model has no trainable parameter",
                type(model).__name__,
                "requires_grad=True on what is to be analysed",
            )
        self.device: torch.device = self.parameters[0].tensor.device
        self.dtype: torch.dtype = self.parameters[0].tensor.dtype
        self.retypings = 0  # a graph that was made before one is cut off from the parameters
        self._widened = self._is_widening = False
        self._require_finite_weights()
        self.weight_decay, self.unseen = weight_decay, unseen
        self.checkpoint = checkpoint
        self._proof: Proof | None = None
        self.must_fit = must_fit(data)
        test = IndependenceTest(self.model, self.loss, self.device, self.dtype, self.must_fit)
        if isinstance(data, FrozenData):
            self.data = data
            test.see_frozen(data.batches)
        else:
            self.data = freeze(
                data,
                Selection.parse(examples),
                batch_size=batch_size,
                seed=seed,
                trial=test,
                collate=collate,
                steps=isinstance(self.loss, StepLoss),
                observe=observe,
            )
        self.independence = test.result
        says_nothing = isinstance(self.loss, UserLoss) and self.loss.reduction is None
        self.loss = self.loss.reduced(self.independence.reduction)
        self._batches = self._pinned(self.data.batches)
        with self.forward_context(), blamed_on_user(MODEL_RAISED, self.must_fit):
            few = (self._placed(first_rows(batch, _LOOKED_AT)) for batch in self._batches)
            self.loss = self.loss.settled(self.model, few)
            if self.loss.reduction == "sum":
                self.loss = Summed(self.loss, 1.0)
            self.masses = self._weigh()
        self.total_weight = sum(self.masses)
        if not self.total_weight > 0:
            raise UnsoundError(
                "the examples weigh nothing", f"weight mass {self.total_weight}", "unmasked targets"
            )
        if isinstance(self.loss, Summed):
            whole = self.total_weight / (self.sampling_fraction or 1.0)
            self.loss = Summed(self.loss.unscaled, whole)
        self.warnings = (*warnings, *self.loss.warnings, *self._warnings(batch_size))
        if says_nothing and self.independence.unseen is not None and self.num_batches > 1:
            self.warnings += (
                f"whether the loss {self.loss.name} is a mean or a sum was not seen "
                f"({self.independence.unseen}): it is taken for each batch's mean; "
                'reduction = "sum" under [loss] says otherwise',
            )

    def _weigh(self) -> list[float]:
        counts = self.data.counts
        return [
            self.loss.mass(self.model, self._placed(batch), count)
            for batch, count in zip(self._batches, counts, strict=True)
        ]

    def _warnings(self, batch_size: int | None) -> Iterator[str]:
        """What was done to the user's function, or could not be, before anything is computed."""
        if (mixes := self.couples_examples) is not None:
            joined = "added up" if self.loss.reduction == "sum" else "averaged by their mass"
            yield (
                f"{mixes} mixes the examples of a batch: the batch is the unit, as it was made, "
                f"and batches are {joined}"
            )
            largest = max(self.data.counts)
            if batch_size is not None and largest > batch_size:
                yield (
                    f"batches stay as they came, of up to {largest} examples, though a batch size "
                    f"of {batch_size} was asked for"
                )
        if self.loss.reduction == "sum":
            kept, available = self.data.count, self.data.available
            scaled = "" if kept == available else f", from the {kept} that were kept"
            yield (
                f"the loss {self.loss.name} is a sum over the examples of a batch: numbers are of "
                f"the sum over all {available or kept} examples{scaled}"
            )
        if (rounded := self.independence.rounded) is not None:
            yield rounded
        if self.data.changing:
            yield (
                "examples change each time they are read (random augmentation): "
                f"the {self.data.count} that were kept are one draw of them"
            )

    # -- data ----------------------------------------------------------------------------------

    @property
    def num_batches(self) -> int:
        """Number of frozen batches."""
        return len(self._batches)

    @property
    def sampling_fraction(self) -> float | None:
        """Kept examples over available ones; None where the loader was not seen to the end."""
        available = self.data.available
        return None if available is None else self.data.count / available

    @cached_property
    def indices(self) -> tuple[int, ...]:
        """The batches that weigh something."""
        return tuple(i for i, mass in enumerate(self.masses) if mass > 0)

    def batches(self) -> Iterator[WeightedBatch]:
        """All batches that weigh something, one at a time on the device."""
        return map(self.batch, self.indices)

    def batch(self, index: int) -> WeightedBatch:
        """One batch on the device."""
        data = self._placed(self._batches[index])
        return WeightedBatch(
            index, data, self.masses[index] / self.total_weight, self.data.counts[index]
        )

    def sample(self, count: int) -> WeightedBatch:
        """Examples of one form from all over the batches, as a batch of its own."""
        return next(Sample.of(self, count).batches())

    def batch_of(self, batch: Batch, index: int, weight: float) -> WeightedBatch:
        """Kept examples as a batch on the device, in the present type."""
        return WeightedBatch(index, self._placed(batch), weight, size_of(batch))

    def _placed(self, batch: Batch) -> Batch:
        return place(batch, self.device, self.dtype)

    def _pinned(self, batches: tuple[Batch, ...]) -> tuple[Batch, ...]:
        if self.device.type != "cuda":
            return batches
        return tuple(map_tensors(torch.Tensor.pin_memory, batch) for batch in batches)

    # -- the function --------------------------------------------------------------------------

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """What every forward and backward pass runs in; no buffer of the model changes."""
        with undisturbed(self.model, self.device), self._widening():
            yield

    @contextmanager
    def _widening(self) -> Iterator[None]:
        """Casts and constants widened, where that is wanted now and not done already."""
        if not self._widened or self._is_widening:
            yield
            return
        self._is_widening = True
        try:
            with Widened():
                yield
        finally:
            self._is_widening = False

    def evaluate(self, batch: Batch, theta: Mapping[str, Tensor] | None = None) -> Tensor:
        """Mean loss of a batch, without weight decay, as a live scalar.

        ``theta`` stands in for the parameters that it names; None leaves the model as it is.
        """
        return self._run(lambda model: self.loss.evaluate(model, batch), theta)

    def outputs(self, batch: Batch, theta: Mapping[str, Tensor] | None = None) -> Tensor:
        """Model outputs of a batch as a live tensor."""
        return self._run(lambda model: self.loss.outputs(model, batch), theta)

    def fixed_outputs(self, batch: Batch) -> Tensor:
        """Model outputs of a batch without their graph; models may differentiate on their way."""
        return self.outputs(batch).detach()

    def _run(self, run: Run, theta: Mapping[str, Tensor] | None) -> Tensor:
        with self.forward_context():
            return run(self.model) if theta is None else run_with(self.model, theta, run)

    @contextmanager
    def in_dtype(self, dtype: torch.dtype, *, widened: bool | None = None) -> Iterator[None]:
        """Compute in another floating type meanwhile; the original tensors come back untouched.

        Args:
            dtype: the type.
            widened: in float64, whether what the code casts to less is widened too; default where
                it would not be float64 otherwise.
        """
        if widened is None:
            widened = dtype == torch.float64 and self.precision.widened
        previous = self.dtype, self._widened
        self.retypings += 1
        try:
            with retyped(self.model, dtype):
                self.dtype, self._widened = dtype, widened
                yield
        finally:
            self.dtype, self._widened = previous
            self.retypings += 1

    @cached_property
    def precision(self) -> Precision:
        """What becomes of it where float64 is asked for."""
        return precision_of(self)

    @property
    def is_doubled(self) -> bool:
        """Whether it computes in float64 now, as far as it can."""
        return self.dtype == torch.float64 and (self._widened or not self.precision.widened)

    @property
    def couples_examples(self) -> str | None:
        """What makes an example's output or loss depend on its batch, or None."""
        return self.independence.mixes

    @property
    def separable(self) -> bool:
        """Whether a batch may be taken apart: rows are examples and nothing mixes them."""
        return self.data.sliceable and self.independence.mixes is None

    # -- proof ---------------------------------------------------------------------------------

    def prove(self, observe: Observe | None = None, meter: Meter | None = None) -> Proof:
        """Loss, accuracy, gradient and reach over all kept examples; computed once.

        Args:
            observe: told of each batch; returning True ends it.
            meter: counts it, made now or before, so that equal runs cost the same.

        Raises:
            UnsoundError: a non-finite loss or gradient, or labels out of range.
            KeyboardInterrupt: the observer wanted no more.
        """
        if self._proof is None:
            self._proof = prove(self, observe)
        if meter is not None:
            meter.add(self._proof.gradients)
        return self._proof

    @property
    def hidden_outputs(self) -> str | None:
        """Why the loss is no known function of the model's outputs; None where it is one."""
        if self.loss.hidden is None and self.loss.is_claim:
            return self.prove().hidden_outputs
        return self.loss.hidden

    def _require_finite_weights(self) -> None:
        bad = [n for n, t in self.model.named_parameters() if not torch.isfinite(t).all()]
        if bad:
            raise UnsoundError(
                "the weights are not finite",
                f"NaN or infinity in {', '.join(bad[:5])} ({len(bad)} tensors)",
                "a checkpoint from before the run diverged",
            )

    # -- report --------------------------------------------------------------------------------

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Modules that own trainable parameters, in order."""
        return self.parameters.layers

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Trainable parameters, named as in the checkpoint."""
        return self.parameters.names

    @cached_property
    def manifest_sha256(self) -> str:
        """Hash of which examples were kept, in which batches."""
        text = f"{self.data.sha256}{self.data.counts}{self.data.available}"
        return hashlib.sha256(text.encode()).hexdigest()

    def report(self, matrix: str) -> ProblemReport:
        """What every result says of its problem."""
        proof = self.prove()
        return ProblemReport(
            checkpoint=self.checkpoint,
            num_parameters=self.parameters.size,
            num_unreached=sum(p.numel for p in self.parameters if p.name in proof.unreached),
            num_frozen=sum(p.numel() for p in self.model.parameters() if not p.requires_grad),
            num_examples=self.data.count,
            num_examples_available=self.data.available,
            num_batches=self.num_batches,
            total_weight=self.total_weight,
            loss=proof.loss,
            loss_name=self.loss.name,
            reduction=self.loss.reduction or "mean",
            weight_decay=self.weight_decay,
            accuracy=proof.accuracy,
            gradient_norm=proof.gradient_norm,
            dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.device),
            training_mode=self.model.training,
            matrix=matrix,
            manifest_sha256=self.manifest_sha256,
        )
