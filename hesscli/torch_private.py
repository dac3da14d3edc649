"""What is used of torch without its promise to keep it, each with its reason, in this one place.

``tests/test_torch_private.py`` sees that it is there and does what is assumed of it, on whichever
torch is installed, and that no other module reaches for such a name.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunction
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["DisableTorchFunction", "TorchDispatchMode"]
# TorchDispatchMode: the only way to see each operation that really runs, autocast and scripted
# code included; torch's tutorials use it. DisableTorchFunction: reading an attribute of a tensor
# subclass calls the subclass, which is the user's.

Convolution, RunningNorm = _ConvNd, _NormBase
"""What all convolutions are, and all norms that can keep running statistics."""
COPY_SLICES = "torch::autograd::CopySlices"
"""Autograd's node for any operation that writes into a view."""


def held_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own parameters, to be replaced by tensors that are none.

    ``setattr`` takes only parameters, and ``torch.func.functional_call`` loses those that are
    registered under two names.
    """
    return module._parameters


def held_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own buffers, to be replaced whatever its class's ``__setattr__`` does."""
    return module._buffers


def apply_to_tensors(module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """Replace parameters and buffers: ``Module.to`` cannot spare those of complex type."""
    module._apply(function)  # type: ignore[no-untyped-call]


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was given, for compiled code has no double backward."""
    original = getattr(model, "_orig_mod", model)
    return original if isinstance(original, nn.Module) else model


def is_transformed() -> bool:
    """Whether code runs under ``torch.func``, which goes through no function of one's own.

    One could be written so that it did, at the price of no loops over parts of a tensor.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None


def function_modes() -> list[TorchFunctionMode]:
    """Those in which code runs, the outermost first: autograd leaves them while it goes back."""
    return list(_get_current_function_mode_stack())  # type: ignore[no-untyped-call]


def viewed(tensor: Tensor) -> Tensor:
    """The tensor whose memory this one is a view of; itself where it is none."""
    return tensor if tensor._base is None else tensor._base


def times_written(tensor: Tensor) -> int:
    """How often a tensor was written in place, as autograd counts it."""
    return tensor._version


def stored_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """What takes the memory of a tensor; a sparse one has two, which ``indices()`` would merge."""
    if tensor.layout == torch.strided:
        return (tensor,)
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    return ()


def storages_kept(sizes: dict[int, int]) -> AbstractContextManager[object]:
    """Meanwhile, take note of what graphs of autograd keep.

    Args:
        sizes: takes bytes by address, each storage once.
    """

    def note(tensor: Tensor) -> Tensor:
        for part in stored_parts(tensor):
            storage = part.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)


def saved(node: Node, name: str, default: Any) -> Any:
    """What an operation of autograd's graph has kept of its call, by its argument's name."""
    return getattr(node, f"_saved_{name}", default)
