"""Running code in float64 that asks for less: casts, constants and defaults of narrower types.

Models cast to float32 on their way (norms, attention, logits), or hold a constant that has no type
but float32. What autograd differentiates is the function without its rounding, and this is where
that can be seen: a cast to a narrower type becomes one to float64, a narrower tensor that meets a
float64 one is widened first, and what is made of numbers is made in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)
_ITEMS = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__")
_REINTERPRETS = (Tensor.view,)
"""Reads the same bytes as another type, which is no cast."""


class Widened(TorchFunctionMode):
    """Meanwhile, float64 values stay so, and what is new is float64."""

    def __enter__(self) -> Widened:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        torch.set_default_dtype(self._default)

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run it on wider tensors, and let it make wider ones."""
        kwargs = kwargs or {}
        if function in _CASTS:
            return Tensor.double(*args, **kwargs)
        if function in _REINTERPRETS or not (args or kwargs):
            return function(*args, **kwargs)
        kept = 1 if _is_in_place(function) else 0
        meets = _meets_float64((args, kwargs))
        args = (*args[:kept], *(_widened(value, meets) for value in args[kept:]))
        kwargs = {
            name: value if name == "out" else _widened(value, meets)
            for name, value in kwargs.items()
        }
        return function(*args, **kwargs)


def _is_in_place(function: Callable[..., Any]) -> bool:
    """Whether it writes into its first argument, which must stay what it is."""
    name = getattr(function, "__name__", "")
    return name in _ITEMS or (name.endswith("_") and not name.endswith("__"))


def _meets_float64(value: Any) -> bool:
    """Whether there is a float64 tensor among the arguments."""
    if isinstance(value, Tensor):
        return value.dtype in (torch.float64, torch.complex128)
    if isinstance(value, (tuple, list)):
        return any(map(_meets_float64, value))
    return isinstance(value, Mapping) and any(map(_meets_float64, value.values()))


def _widened(value: Any, meets: bool) -> Any:
    """An argument with wider types in it, and wider tensors where they meet one."""
    if isinstance(value, torch.dtype):
        return _WIDER.get(value, value)
    if isinstance(value, Tensor):
        wider = _WIDER.get(value.dtype) if meets else None
        return value if wider is None else value.to(wider)
    if type(value) in (tuple, list):
        return type(value)(_widened(each, meets) for each in value)
    return value
