"""In which floating type code really computes, and what rounding may do in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tolerance(dtype: torch.dtype) -> float:
    """Relative error that may still be rounding: eps to the power 0.6, which is 4e-10 in float64.

    Sums of many terms err by a few to a hundred eps (0.25 to 10 were seen in products); what is
    wrong in kind was off by 6.5e-6 and more (7e-5 is the tolerance in float32).
    """
    return float(torch.finfo(dtype).eps ** 0.6)


class Narrowing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches for operations that turn float64 values into a narrower type, ``narrowest``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.narrowest = torch.float64

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would import its compiler, two seconds, to keep it away from this class."""
        return False

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.float64 in _types(args):
            met = {self.narrowest, *_types(result)}  # a comparison's result has none
            self.narrowest = max(met, key=lambda dtype: torch.finfo(dtype).eps)
        return result


def _types(tree: Any) -> set[torch.dtype]:
    """Floating types of a tree's tensors."""
    leaves = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return {leaf.dtype for leaf in leaves if leaf.is_floating_point()}
