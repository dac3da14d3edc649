"""Running a model: place, kernels, buffers, type and parameters, each put back afterwards."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hesscli import randomness
from hesscli.arithmetic import in_full_precision
from hesscli.errors import InputError, UnsoundError, UsageError, first_line
from hesscli.problem.weight_norm import exact_norms
from hesscli.torch_private import apply_to_tensors, held_buffers, held_parameters

# -- A model on a device and in a floating type, while the user's own stays where and as it is -----


def placed(
    model: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Module:
    """The model itself where it is so already, else a copy of it that is.

    Raises:
        InputError: it would have to be copied and cannot be.
        UsageError: there is no such device.
    """
    try:
        wanted = None if device is None else torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts that it has it
        count = torch.cuda.device_count()
        raise UsageError(
            "no such device",
            f"{device}; {count} CUDA devices are visible",
            "no device, and it is the model's; or cpu",
        ) from error
    tensors = [*model.parameters(), *model.buffers()]
    if all(_is_placed(tensor, wanted, dtype) for tensor in tensors):
        return model
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        raise InputError(
            "the model cannot be copied, so that yours would be changed",
            first_line(error) or type(error).__name__,
            "hand over a model that has the --dtype and is on the --device already",
        ) from error
    return cast(twin, device, dtype)


def cast(
    model: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Module:
    """The same model, moved and converted; complex buffers stay complex."""
    model.to(device)
    if dtype is not None:
        apply_to_tensors(model, lambda tensor: converted(tensor, dtype))
    return model


def converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in a floating type, or in the complex type of the same precision."""
    return tensor.to(_type_in(tensor, dtype))


def _type_in(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    if tensor.is_complex():
        return dtype.to_complex()
    return dtype if tensor.is_floating_point() else tensor.dtype


def require_real(model: nn.Module) -> None:
    """Refuse complex parameters, of which derivatives are another matter.

    Raises:
        UnsoundError: there is one.
    """
    found = [name for name, parameter in model.named_parameters() if parameter.is_complex()]
    if found:
        raise UnsoundError(
            "complex parameters are not supported",
            f"{', '.join(found[:5])} ({len(found)} tensors)",
            "a parameter with a last dimension of 2, and torch.view_as_complex(it) in forward",
        )


def _is_placed(tensor: Tensor, device: torch.device | None, dtype: torch.dtype | None) -> bool:
    if device is not None and tensor.device != device:
        return False
    return dtype is None or tensor.dtype == _type_in(tensor, dtype)


# -- Running a model: kernels, buffers, floating type and parameters, each put back afterwards -----


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Kernels that can be differentiated twice, and tensors that no forward pass changes.

    Fused attention has neither double backward nor forward mode, and neither has cuDNN's
    recurrent kernel a double backward. What is meant to be in float64 is.

    Raises:
        UnsoundError: an embedding has rescaled its own weights, which are put back.
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if device.type == "cuda":
            recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())
            stack.enter_context(in_full_precision(cudnn=not recurrent))
            if any(parameter.dtype == torch.float64 for parameter in model.parameters()):
                stack.enter_context(exact_norms())
        stack.enter_context(_unchanged_buffers(model))
        stack.enter_context(_unscaled_embeddings(model))
        yield


@contextmanager
def retyped(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Compute in another floating type; the original tensors come back untouched."""
    tensors = [*model.parameters(), *model.buffers()]
    originals = [(t, t.data) for t in tensors if t.is_floating_point() or t.is_complex()]
    try:
        for tensor, data in originals:
            tensor.data = converted(data, dtype)
        yield
    finally:
        for tensor, data in originals:
            tensor.data = data


@contextmanager
def standing_in(model: nn.Module, theta: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Let ``theta`` stand in for the parameters that it names, wherever modules hold them.

    None leaves the model as it is.

    Each module is visited once: ``torch.func.functional_call`` visits one that is registered
    under two names twice, and then puts the stand-in back in place of the parameter.
    """
    if theta is None:
        yield
        return
    stand_ins = {id(p): theta[name] for name, p in model.named_parameters() if name in theta}
    held = [
        (held_parameters(module), name, parameter)
        for module in model.modules()
        for name, parameter in held_parameters(module).items()
        if id(parameter) in stand_ins
    ]
    try:
        for parameters, name, parameter in held:
            parameters[name] = stand_ins[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for parameters, name, parameter in held:
            parameters[name] = parameter


def flat_gradient(value: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Of a live scalar, float64 ``(d,)``, with zeros where it reaches nothing."""
    slopes = torch.autograd.grad(value, tensors, allow_unused=True, materialize_grads=True)
    return torch.cat([slope.to_dense().double().reshape(-1) for slope in slopes])


@contextmanager
def moved(tensors: Sequence[Tensor], relative: float) -> Iterator[None]:
    """Weights a little off where they are, by a fixed draw, and put back."""
    if not relative:
        yield
        return
    with _restored(tensors):
        _move(tensors, relative)
        yield


@contextmanager
def written(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Other values in the same weights, which have their own again afterwards."""
    with _restored(tensors):
        _copy(values, tensors)
        yield


@contextmanager
def _restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    originals = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        _copy(originals, tensors)


@torch.no_grad()
def _copy(values: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


@torch.no_grad()
def _move(tensors: Sequence[Tensor], relative: float) -> None:
    for number, tensor in enumerate(tensors):
        noise = randomness.at(
            [(0, tensor.numel())],
            randomness.uneven,
            randomness.key(0x5417, number),
            dtype=tensor.dtype,
            device=tensor.device,
        )
        size = float(tensor.square().mean().sqrt()) if tensor.numel() else 0.0
        tensor.add_(noise.view(tensor.shape), alpha=relative * (size + 0.1))


@contextmanager
def _unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Let modules in train mode write their running statistics into copies."""
    swapped: list[tuple[nn.Module, str, Tensor]] = []
    for module in model.modules():
        if module.training:
            for name, buffer in held_buffers(module).items():
                if buffer is not None:
                    swapped.append((module, name, buffer))
                    held_buffers(module)[name] = buffer.clone()
    try:
        yield
    finally:
        for module, name, buffer in swapped:
            held_buffers(module)[name] = buffer


@contextmanager
def _unscaled_embeddings(model: nn.Module) -> Iterator[None]:
    """Put back what ``max_norm`` does to the rows that are read, and refuse to go on."""
    kept = [
        (f"{name} ({type(module).__name__})".lstrip(), module, module.weight.detach().clone())
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
    ]
    changed = []
    try:
        yield
    finally:
        for name, module, weight in kept:
            if not torch.equal(module.weight, weight):
                changed.append(f"{name}, max_norm = {module.max_norm:g}")
                with torch.no_grad():
                    module.weight.copy_(weight)
    if changed:
        raise UnsoundError(
            "the model changes its own weights as it runs",
            "; ".join(changed),
            "rescale its rows once, before hesscli, or train and analyse it without max_norm",
        )
