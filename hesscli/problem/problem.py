"""A Problem: a model, its loss and frozen examples. It knows nothing of curvature."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hesscli.errors import InputError, UnsoundError, UsageError
from hesscli.parameters import Parameters
from hesscli.problem.batches import Batch, map_tensors, place, rows, tensors_of
from hesscli.problem.blame import is_out_of_memory, no_gradient
from hesscli.problem.data import FrozenData, Selection, freeze
from hesscli.problem.factory import blamed_on_user
from hesscli.problem.losses import Loss, StepLoss, as_loss
from hesscli.results import CheckpointReport, Observe, ProblemReport, Snapshot


@dataclass(frozen=True)
class WeightedBatch:
    """One batch on the device; ``weight`` is its share of the whole weight mass."""

    index: int
    data: Batch
    weight: float
    count: int


@dataclass(frozen=True)
class Proof:
    """What shows that this is the user's model on the user's data.

    ``gradient`` is of the whole loss, float64 ``(d,)``; ``unreached`` names the parameters that
    the loss of no batch depends on.
    """

    loss: float
    accuracy: float | None
    gradient: Tensor
    unreached: tuple[str, ...]

    @property
    def gradient_norm(self) -> float:
        """Euclidean norm of the gradient."""
        return float(self.gradient.norm())


class Problem:
    """A weighted mean loss over frozen examples, plus ½·weight_decay·‖θ‖².

    Args:
        model: analysed in the mode that it is in; its parameters and buffers end as they began.
        loss: a name (``"cross_entropy"``, ...), a torch criterion with mean reduction,
            ``fn(outputs, targets) -> mean loss``, or a :class:`Loss`.
        data: a map-style dataset, a DataLoader, an iterable of batches, or frozen data as it is.
        weight_decay: coefficient of ½‖θ‖² over all trainable parameters.
        examples: how many to keep: ``N``, ``"all"`` or ``"first:N"``.
        batch_size: at most so many examples a batch.
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
        weight_decay: float = 0.0,
        examples: str | int = "4096",
        batch_size: int = 128,
        unseen: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        checkpoint: CheckpointReport | None = None,
        warnings: tuple[str, ...] = (),
        observe: Observe | None = None,
    ) -> None:
        model = getattr(model, "_orig_mod", model)  # a compiled module has no double backward
        self.model = model if dtype is None and device is None else model.to(device, dtype)
        self.loss: Loss = as_loss(loss)
        self.parameters = Parameters.of(self.model)
        if not len(self.parameters):
            raise InputError(
                "the model has no trainable parameter",
                type(model).__name__,
                "requires_grad=True on what is to be analysed",
            )
        self.device = self.parameters[0].tensor.device
        self.dtype = self.parameters[0].tensor.dtype
        self._require_finite_weights()
        self.weight_decay, self.unseen = weight_decay, unseen
        self.checkpoint, self.warnings = checkpoint, warnings
        self.data = (
            data
            if isinstance(data, FrozenData)
            else freeze(
                data,
                Selection.parse(examples),
                batch_size=batch_size,
                seed=seed,
                whole_batches=isinstance(self.loss, StepLoss),
                observe=observe,
            )
        )
        self._batches = self._pinned(self.data.batches)
        with self.forward_context():
            self.masses = [self.loss.mass(self.model, self._placed(b)) for b in self._batches]
        self.total_weight = sum(self.masses)
        if not self.total_weight > 0:
            raise UnsoundError(
                "the examples weigh nothing", f"weight mass {self.total_weight}", "unmasked targets"
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

    def batches(self) -> Iterator[WeightedBatch]:
        """All batches, one at a time on the device; batches of no mass are passed over."""
        for index, mass in enumerate(self.masses):
            if mass > 0:
                yield self.batch(index)

    def batch(self, index: int) -> WeightedBatch:
        """One batch on the device."""
        data = self._placed(self._batches[index])
        return WeightedBatch(
            index, data, self.masses[index] / self.total_weight, self.data.counts[index]
        )

    def sample(self, count: int) -> WeightedBatch:
        """The first examples of the first batch that weighs something, as a batch of its own."""
        index = next(i for i, mass in enumerate(self.masses) if mass > 0)
        batch = self.batch(index)
        if not self.data.sliceable or isinstance(self.loss, StepLoss):
            return batch
        masses = self.loss.masses(batch.data).tolist()
        start = next(i for i, mass in enumerate(masses) if mass > 0)
        part = rows(batch.data, start, start + count)
        return WeightedBatch(index, part, 1.0, min(count, batch.count - start))

    def _placed(self, batch: Batch) -> Batch:
        return place(batch, self.device, self.dtype)

    def _pinned(self, batches: tuple[Batch, ...]) -> tuple[Batch, ...]:
        if self.device.type != "cuda":
            return batches
        return tuple(map_tensors(torch.Tensor.pin_memory, batch) for batch in batches)

    # -- the function --------------------------------------------------------------------------

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Kernels that can be differentiated twice, and buffers that no forward pass changes.

        Fused attention has neither double backward nor forward mode, and neither has cuDNN's
        recurrent kernel a double backward.
        """
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if self.device.type == "cuda" and _has_recurrent(self.model):
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            stack.enter_context(_unchanged_buffers(self.model))
            yield

    def evaluate(self, batch: Batch, theta: Mapping[str, Tensor] | None = None) -> Tensor:
        """Mean loss of a batch, without weight decay, as a live scalar.

        ``theta`` stands in for the parameters that it names; None leaves the model as it is.
        """
        return self._run(lambda model: self.loss.evaluate(model, batch), theta)

    def outputs(self, batch: Batch, theta: Mapping[str, Tensor] | None = None) -> Tensor:
        """Model outputs of a batch as a live tensor."""
        return self._run(lambda model: self.loss.outputs(model, batch), theta)

    def _run(
        self, run: Callable[[nn.Module], Tensor], theta: Mapping[str, Tensor] | None
    ) -> Tensor:
        with self.forward_context():
            if theta is None:
                return run(self.model)
            named = {f"model.{name}": tensor for name, tensor in theta.items()}
            value: Tensor = torch.func.functional_call(_Caller(self.model), named, (run,))
            return value

    @contextmanager
    def in_dtype(self, dtype: torch.dtype) -> Iterator[None]:
        """Compute in another floating type meanwhile; the original tensors come back untouched."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        originals = [(t, t.data) for t in tensors if t.is_floating_point()]
        previous = self.dtype
        try:
            for tensor, data in originals:
                tensor.data = data.to(dtype)
            self.dtype = dtype
            yield
        finally:
            for tensor, data in originals:
                tensor.data = data
            self.dtype = previous

    @cached_property
    def couples_examples(self) -> str | None:
        """The batch norm that makes an example's output depend on its batch, or None."""
        for name, module in self.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
                module.training or module.running_mean is None
            ):
                return f"{name} ({type(module).__name__})"
        return None

    # -- proof ---------------------------------------------------------------------------------

    def prove(self, observe: Observe | None = None) -> Proof:
        """Loss, accuracy, gradient and reach over all kept examples; computed once.

        Raises:
            UnsoundError: a non-finite loss or gradient, or labels out of range.
        """
        if "_proof" not in self.__dict__:
            self._proof = self._prove(observe)
        return self._proof

    def _prove(self, observe: Observe | None) -> Proof:
        tensors = self.parameters.tensors
        gradient = torch.zeros(self.parameters.size, dtype=torch.float64, device=self.device)
        reached = [False] * len(tensors)
        loss = correct = possible = 0.0
        for batch in self.batches():
            with blamed_on_user("the model or its loss raised an error", _FIT):
                right, of = self._count_correct(batch)
                value = self.evaluate(batch.data)
            correct, possible = correct + right, possible + of
            self._require_finite_loss(value, batch)
            if not value.requires_grad:
                raise _detached()
            try:
                parts = torch.autograd.grad(value, tensors, allow_unused=True)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                run = partial(self.evaluate, batch.data)
                raise no_gradient(self.model, run, error) from None
            reached = [r or p is not None for r, p in zip(reached, parts, strict=True)]
            dense = [
                torch.zeros_like(t) if p is None else p.to_dense() if p.is_sparse else p
                for p, t in zip(parts, tensors, strict=True)
            ]
            gradient += batch.weight * self.parameters.flatten(dense).double()
            loss += batch.weight * float(value.detach())
            if observe is not None:
                observe(
                    Snapshot(
                        phase="loss and gradient", done=batch.index + 1, total=self.num_batches
                    )
                )
        self._require_finite_gradient(gradient)
        theta = self.parameters.flatten([t.detach() for t in tensors]).double()
        return Proof(
            loss=loss + 0.5 * self.weight_decay * float(theta @ theta),
            accuracy=correct / possible if possible else None,
            gradient=gradient + self.weight_decay * theta,
            unreached=tuple(p.name for p, r in zip(self.parameters, reached, strict=True) if not r),
        )

    @torch.no_grad()
    def _count_correct(self, batch: WeightedBatch) -> tuple[float, float]:
        """Right and possible predictions; labels are checked before the loss reads them."""
        if not self.loss.exposes_outputs:
            return 0.0, 0.0
        outputs = self.outputs(batch.data)
        self.loss.check(outputs, batch.data)
        pair = self.loss.correct(outputs, batch.data)
        return (0.0, 0.0) if pair is None else (float(pair[0]), float(pair[1]))

    def _require_finite_weights(self) -> None:
        bad = [n for n, t in self.model.named_parameters() if not torch.isfinite(t).all()]
        if bad:
            raise UnsoundError(
                "the weights are not finite",
                f"NaN or infinity in {', '.join(bad[:5])} ({len(bad)} tensors)",
                "a checkpoint from before the run diverged",
            )

    def _require_finite_loss(self, value: Tensor, batch: WeightedBatch) -> None:
        if value.numel() != 1:
            raise InputError(
                "the loss must be one number",
                f"{self.loss.name} gave shape {tuple(value.shape)}",
                "a mean over the batch",
            )
        if not torch.isfinite(value):
            broken = [t for t in tensors_of(batch.data) if not torch.isfinite(t).all()]
            raise UnsoundError(
                "the loss is not finite",
                f"{float(value.detach())} on batch {batch.index}"
                + (" whose inputs hold NaN or infinity" if broken else ""),
                "clean inputs" if broken else "--dtype float64, or a checkpoint that has converged",
            )

    def _require_finite_gradient(self, gradient: Tensor) -> None:
        parts = zip(self.parameters, self.parameters.split(gradient), strict=True)
        bad = [p.name for p, part in parts if not torch.isfinite(part).all()]
        if bad:
            raise UnsoundError(
                "the gradient is not finite",
                f"NaN or infinity in the gradient of {', '.join(bad[:5])} ({len(bad)} tensors)",
                "inputs without infinities, and no sqrt or norm of exactly 0 in model or loss",
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
            weight_decay=self.weight_decay,
            accuracy=proof.accuracy,
            gradient_norm=proof.gradient_norm,
            dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.device),
            training_mode=self.model.training,
            matrix=matrix,
            manifest_sha256=self.manifest_sha256,
        )


_FIT = "[model], [data] and [loss] that fit together; its own lines are below"


def resolve_device(name: str) -> torch.device:
    """A device from ``auto``, ``cpu``, ``cuda`` or ``cuda:i``.

    Raises:
        UsageError: that device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise UsageError(
            "no such device", f"--device {name}; {count} CUDA devices are visible", "--device auto"
        )
    return device


class _Caller(nn.Module):
    """Lets a function of a model run under ``functional_call``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[nn.Module], Tensor]) -> Tensor:
        return run(self.model)


@contextmanager
def _unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Let modules in train mode write their running statistics into copies."""
    swapped: list[tuple[nn.Module, str, Tensor]] = []
    for module in model.modules():
        if module.training:
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    swapped.append((module, name, buffer))
                    module._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for module, name, buffer in swapped:
            module._buffers[name] = buffer


def _has_recurrent(model: nn.Module) -> bool:
    return any(isinstance(module, nn.RNNBase) for module in model.modules())


def _detached() -> UnsoundError:
    return UnsoundError(
        "the loss does not depend on any parameter through autograd",
        "a loss without a gradient",
        "no torch.no_grad(), .detach() or .item() between parameters and loss",
    )
