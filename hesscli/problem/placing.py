"""A model on a device and in a floating type, while the user's own stays where and as it is."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from hesscli.errors import InputError, UnsoundError, first_line


def placed(
    model: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Module:
    """The model itself where it is so already, else a copy of it that is.

    Raises:
        InputError: it would have to be copied and cannot be.
    """
    wanted = None if device is None else torch.empty(0, device=device).device
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
        model._apply(lambda tensor: converted(tensor, dtype))  # type: ignore[no-untyped-call]
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
