"""In which floating type code really computes, and what rounding may do in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry

from hesscli.errors import UsageError
from hesscli.problem.batches import tensors_of
from hesscli.torch_private import TorchDispatchMode

_WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
HALF = (torch.float16, torch.bfloat16)
"""Types that weights may be kept in, and that have too few digits for sums of products."""
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


# -- Running code in float64 that asks for less: casts, constants and defaults of narrower types ---


_REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32}


def tolerance(dtype: torch.dtype) -> float:
    """Relative error that may still be rounding: eps to the power 0.6, which is 4e-10 in float64.

    Sums of many terms err by a few to a hundred eps (0.25 to 10 were seen in products); what is
    wrong in kind was off by 6.5e-6 and more (7e-5 is the tolerance in float32).
    """
    return float(torch.finfo(dtype).eps ** 0.6)


# -- Weights in one type, products in another ------------------------------------------------------


def weights_in(dtype: torch.dtype) -> torch.dtype:
    """The type of weights where a type is asked for: float32 where products are in bfloat16.

    Raises:
        UsageError: no type that derivatives can be made in.
    """
    if dtype == torch.bfloat16:
        return torch.float32
    if dtype in (torch.float32, torch.float64):
        return dtype
    if dtype == torch.float16:
        raise UsageError(
            "float16 loses small derivatives, and no error bar would show it",
            "float16, which would need its losses scaled",
            "--dtype bfloat16, which has the range of float32",
        )
    raise UsageError("no such dtype to compute in", str(dtype), "float32, float64 or bfloat16")


def as_wide(tensors: Iterable[Tensor]) -> torch.dtype:
    """The type to analyse weights in: float64 where most of them have it, else float32."""
    sizes = {True: 0, False: 0}
    for tensor in tensors:
        if tensor.is_floating_point():
            sizes[tensor.dtype == torch.float64] += tensor.numel()
    return torch.float64 if sizes[True] > sizes[False] else torch.float32


def read_by_loss(outputs: Tensor) -> Tensor:
    """Outputs as a loss reads them: under autocast in float32, on whatever device."""
    mixed = outputs.dtype in HALF and torch.is_autocast_enabled(outputs.device.type)
    return outputs.float() if mixed else outputs


@dataclass(frozen=True)
class Precision:
    """What becomes of a problem where float64 is asked for.

    Attributes:
        plain: the narrowest type between parameters and loss; where float64 fails, its own.
        narrowest: the same once casts and constants are widened as well, if that helps.
        numbers: that are made for one example on the way to the loss; 0 where float64 fails.
        too_large: what checks in float64 would have taken, where there was no room for them.
    """

    plain: torch.dtype
    narrowest: torch.dtype
    numbers: int
    too_large: str | None = None

    @property
    def widened(self) -> bool:
        """Whether casts and constants have to be widened for it to be float64."""
        return self.plain != self.narrowest

    @property
    def is_float64(self) -> bool:
        """Whether checks in float64 mean anything."""
        return self.narrowest == torch.float64

    @property
    def why_narrow(self) -> str:
        """Why they do not, in words."""
        if self.too_large is not None:
            return f"checks in float64 would take {self.too_large}"
        return f"the model computes in {str(self.narrowest).removeprefix('torch.')}"


class Retyped(Protocol):
    """What computes in one floating type, and can in another."""

    @property
    def is_doubled(self) -> bool:
        """Whether it computes in float64 now, as far as it can."""

    def in_dtype(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        """Compute in another type meanwhile."""


def doubled(problem: Retyped) -> AbstractContextManager[None]:
    """The problem in float64 meanwhile, and what it casts to less too where that is needed."""
    return nullcontext() if problem.is_doubled else problem.in_dtype(torch.float64)


class Narrowing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches for operations that turn float64 values into a narrower type, ``narrowest``.

    ``numbers`` counts what the operations make, and not views: a weight is not made by turning it.
    ``operations`` are those, and ``multiplied`` the pairs of numbers that products multiply.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.narrowest, self.numbers = torch.float64, 0
        self.operations = self.multiplied = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would import its compiler, two seconds, to keep it away from this class."""
        return False

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = _floating(result)
        if not func.is_view:
            self.operations += 1
            self.numbers += sum(tensor.numel() for tensor in made)
            if (counted := flop_registry.get(func.overloadpacket)) is not None:
                self.multiplied += counted(*args, **(kwargs or {}), out_val=result) // 2
        if torch.float64 in map(_real, _floating(args)):
            met = {self.narrowest, *map(_real, made)}  # a comparison's result has none
            self.narrowest = max(met, key=lambda dtype: torch.finfo(dtype).eps)
        return result


def _floating(tree: Any) -> list[Tensor]:
    """A tree's real and complex tensors."""
    return [leaf for leaf in tensors_of(tree) if leaf.is_floating_point() or leaf.is_complex()]


def _real(tensor: Tensor) -> torch.dtype:
    """The type of a tensor's real part."""
    return _REAL.get(tensor.dtype, torch.float64) if tensor.is_complex() else tensor.dtype
