"""A Problem: a model, its loss and frozen examples. It knows nothing of curvature."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from hesscli.errors import InputError, UnsoundError, UsageError
from hesscli.meter import Meter
from hesscli.parameters import Parameters
from hesscli.problem.batches import Batch, first_rows, place, tokens_in
from hesscli.problem.criteria import as_loss, reading
from hesscli.problem.factory import blamed_on_user
from hesscli.problem.forward import placed, require_real, undisturbed
from hesscli.problem.freezing import FrozenData, freeze
from hesscli.problem.huggingface import HuggingFace
from hesscli.problem.independence import MODEL_RAISED, IndependenceTest, must_fit
from hesscli.problem.losses import Loss, StepLoss, Summed, UserLoss
from hesscli.problem.objective import Objective
from hesscli.problem.parts import Origin
from hesscli.problem.precision import HALF, as_wide, weights_in
from hesscli.problem.pretrained.rows import as_rows
from hesscli.problem.proof import Proof, prove
from hesscli.problem.recomputing import recomputed, require_blocks
from hesscli.problem.restriction import chosen, held_fixed
from hesscli.results import (
    CheckpointReport,
    Observe,
    ProblemReport,
    Reduction,
    Snapshot,
    tell,
)
from hesscli.torch_private import uncompiled
from hesscli.vocabulary import Selection

_LOOKED_AT = 32
"""Examples of a batch by which a loss is settled."""


class Problem(Objective):
    """A weighted mean loss over frozen examples, plus ½·weight_decay·‖θ‖².

    Args:
        model: analysed in the mode that it is in; its parameters and buffers end as they began,
            and a copy is made where another device or type is asked for.
        loss: a name (``"cross_entropy"``, ...), a torch criterion with mean reduction,
            ``fn(outputs, targets) -> mean loss`` of what the model returned, whole, or a
            :class:`Loss`.
        data: a map-style dataset, a DataLoader, a list of examples or of batches, a pair of arrays
            ``(X, y)``, an iterable of batches, or frozen data as it is.
        params: globs of the parameters or modules that the matrix is of, ``!GLOB`` leaving some
            out; the others count as frozen. Default all trainable ones.
        output: key, attribute or index of the tensor that a named loss reads, where the model
            returns several; default ``.logits``.
        weight_decay: coefficient of ½‖θ‖² over all trainable parameters.
        examples: how many to keep: ``N``, ``"all"`` or ``"first:N"``.
        reduction: ``"mean"`` or ``"sum"`` over the examples; default what the loss says or does.
        collate: makes a batch of a list of examples, instead of the loader's or torch's; for the
            loss ``huggingface`` it may be the tokenizer, whose collator then does.
        batch_size: at most so many examples a batch; just so many where they are not independent
            (default then the loader's own, else 128).
        unseen: the examples were not trained on, so that error bars may speak of new ones.
        device: where to compute; default where the model is.
        dtype: floating type to compute in; default the model's own, float32 for half types. With
            ``torch.bfloat16`` products are made under autocast, and all else in float32.
        checkpoint_activations: of the model's repeated blocks keep what they are given alone, and
            run them again for gradients and products.
        seed: of the draw of examples.
        checkpoint: which file the model came from.
        warnings: what its reader should be told besides.
        observe: told of examples read, and of batches that were compared with their parts.

    Raises:
        HesscliError: empty or unusable data, nothing to analyse, non-finite weights.
        UsageError: a glob of ``params`` takes nothing, or nothing is left; there are no blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Any,
        data: Any,
        *,
        params: str | Sequence[str] | None = None,
        output: str | int | None = None,
        weight_decay: float = 0.0,
        examples: str | int = Selection.usual,
        reduction: Reduction | None = None,
        collate: Callable[[list[Any]], Batch] | None = None,
        batch_size: int | None = None,
        unseen: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        checkpoint_activations: bool = False,
        seed: int = 0,
        checkpoint: CheckpointReport | None = None,
        warnings: tuple[str, ...] = (),
        observe: Observe | None = None,
    ) -> None:
        model = uncompiled(model)
        require_real(model)
        weights = _type_of_weights(model, dtype)
        twin = placed(model, device, weights)
        given: Loss = reading(as_loss(loss, reduction=reduction), output)
        trainable = _trainable(twin)
        patterns = (params,) if isinstance(params, str) else tuple(params or ())
        parameters = chosen(twin, trainable, patterns)
        where = trainable[0].tensor.device, trainable[0].tensor.dtype
        _require_finite_weights(twin)
        if isinstance(given, HuggingFace):
            data, collate = as_rows(model, data, collate)
        hint = must_fit(data)
        blocks = require_blocks(twin) if checkpoint_activations else []
        test = IndependenceTest(twin, given, *where, hint, observe)
        with held_fixed(trainable.without(parameters).tensors), recomputed(blocks):
            if isinstance(data, FrozenData):
                test.see_frozen(data.batches)
            else:
                data = freeze(
                    data,
                    Selection.parse(examples),
                    batch_size=batch_size,
                    seed=seed,
                    trial=test,
                    collate=collate,
                    steps=isinstance(given, StepLoss),
                    observe=observe,
                )
            with undisturbed(twin, where[0]), blamed_on_user(MODEL_RAISED, hint):
                reduced = given.reduced(test.result.reduction)
                settled, masses = _weighed(reduced, twin, data, where, observe)
        self.restricted_to = patterns or None
        super().__init__(
            twin,
            parameters,
            settled,
            data,
            test.result,
            masses,
            weight_decay=weight_decay,
            originals=() if twin is model else tuple(model.parameters()),
            must_fit=hint,
            trainable=trainable,
            autocast=None if dtype == weights else dtype,
            blocks=blocks,
        )
        if dtype == torch.bfloat16:
            _require_float64(self)
        self.checkpoint, self.unseen = checkpoint, unseen
        self.origin = Origin()
        self._proof: Proof | None = None
        told = self._warnings(batch_size, isinstance(given, UserLoss) and given.reduction is None)
        self.warnings = (*warnings, *self.loss.warnings, *told)

    def _warnings(self, batch_size: int | None, says_nothing: bool) -> Iterator[str]:
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
        if says_nothing and self.independence.unseen is not None and self.num_batches > 1:
            yield (
                f"whether the loss {self.loss.name} is a mean or a sum was not seen "
                f"({self.independence.unseen}): it is taken for each batch's mean; "
                'reduction = "sum" under [loss] says otherwise'
            )

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

    # -- report --------------------------------------------------------------------------------

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Modules that own parameters of the matrix, in order."""
        return self.parameters.layers

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Parameters of the matrix, named as in the checkpoint."""
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
            model_class=type(self.model).__name__,
            data=self.origin.data,
            tokenizer_sha256=self.origin.tokenizer_sha256,
            num_parameters=self.parameters.size,
            num_unreached=sum(p.numel for p in self.parameters if p.name in proof.unreached),
            num_frozen=sum(p.numel() for p in self.model.parameters()) - self.parameters.size,
            restricted_to=self.restricted_to,
            num_examples=self.data.count,
            num_examples_available=self.data.available,
            num_tokens=tokens_in(self.data.batches),
            num_batches=self.num_batches,
            total_weight=self.total_weight,
            loss=proof.loss,
            loss_name=self.loss.name,
            reduction=self.loss.reduction or "mean",
            weight_decay=self.weight_decay,
            accuracy=proof.accuracy,
            gradient_norm=proof.gradient_norm,
            dtype=str(self.autocast or self.dtype).removeprefix("torch."),
            device=str(self.device),
            training_mode=self.model.training,
            matrix=matrix,
            manifest_sha256=self.manifest_sha256,
        )


def _type_of_weights(model: nn.Module, dtype: torch.dtype | None) -> torch.dtype | None:
    """The type that a model is to have; None where it stays as it is."""
    if dtype is not None:
        return weights_in(dtype)
    tensors = [*model.parameters(), *model.buffers()]
    return as_wide(tensors) if any(tensor.dtype in HALF for tensor in tensors) else None


def _trainable(model: nn.Module) -> Parameters:
    """A model's trainable parameters, of which there are some."""
    found = Parameters.of(model)
    if not len(found):
        raise InputError(
            "the model has no trainable parameter",
            type(model).__name__,
            "requires_grad=True on what is to be analysed",
        )
    return found


def _weighed(
    loss: Loss,
    model: nn.Module,
    data: FrozenData,
    where: tuple[torch.device, torch.dtype],
    observe: Observe | None,
) -> tuple[Loss, list[float]]:
    """The loss, once it has seen what the model returns, and the mass of each batch."""
    few = (place(first_rows(batch, _LOOKED_AT), *where) for batch in data.batches)
    settled = loss.settled(model, few)
    if settled.reduction == "sum":
        settled = Summed(settled, 1.0)
    masses = list[float]()
    for batch, count in zip(data.batches, data.counts, strict=True):
        masses.append(settled.mass(model, place(batch, *where), count))
        tell(observe, Snapshot(phase="weighing batches"))
    total = sum(masses)
    if not total > 0:
        raise UnsoundError("the examples weigh nothing", f"weight mass {total}", "unmasked targets")
    if isinstance(settled, Summed):
        settled = Summed(settled.unscaled, total / (data.fraction or 1.0))
    return settled, masses


def _require_float64(problem: Problem) -> None:
    """Refuse products whose bias nobody could measure.

    Raises:
        UsageError: the model does not compute in float64.
    """
    if problem.precision.is_float64:
        return
    raise UsageError(
        "what bfloat16 does to products is measured in float64",
        problem.precision.why_narrow,
        "--dtype float32",
    )


def _require_finite_weights(model: nn.Module) -> None:
    bad = [n for n, t in model.named_parameters() if not torch.isfinite(t).all()]
    if bad:
        raise UnsoundError(
            "the weights are not finite",
            f"NaN or infinity in {', '.join(bad[:5])} ({len(bad)} tensors)",
            "a checkpoint from before the run diverged",
        )
