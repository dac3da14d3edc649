"""Running a model: kernels, buffers, floating type and parameters, each put back afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Run = Callable[[nn.Module], Tensor]
"""A function of a model, such as its loss on a batch."""


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Kernels that can be differentiated twice, and buffers that no forward pass changes.

    Fused attention has neither double backward nor forward mode, and neither has cuDNN's
    recurrent kernel a double backward.
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if device.type == "cuda" and any(isinstance(m, nn.RNNBase) for m in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(_unchanged_buffers(model))
        yield


@contextmanager
def retyped(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Compute in another floating type; the original tensors come back untouched."""
    tensors = [*model.parameters(), *model.buffers()]
    originals = [(t, t.data) for t in tensors if t.is_floating_point()]
    try:
        for tensor, data in originals:
            tensor.data = data.to(dtype)
        yield
    finally:
        for tensor, data in originals:
            tensor.data = data


def run_with(model: nn.Module, theta: Mapping[str, Tensor], run: Run) -> Tensor:
    """Call a function of the model while ``theta`` stands in for the parameters it names."""
    named = {f"model.{name}": tensor for name, tensor in theta.items()}
    value: Tensor = torch.func.functional_call(_Caller(model), named, (run,))
    return value


class _Caller(nn.Module):
    """Lets a function of a model run under ``functional_call``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Run) -> Tensor:
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
