"""What modules see in a forward pass: their inputs, and the graph's edges behind their outputs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge


@dataclass(frozen=True)
class Call:
    """One call of a module.

    ``edge`` is where the graph left the module, so that what is done to the output afterwards,
    in place or not, does not matter.
    """

    input: Tensor
    edge: GradientEdge
    shape: torch.Size


Calls = dict[nn.Module, list[Call]]


@contextmanager
def captured(
    modules: Collection[nn.Module], shared: Collection[nn.Module], count: int
) -> Iterator[Calls]:
    """Record the calls of ``modules`` meanwhile.

    Args:
        modules: whose calls.
        shared: those whose output serves all examples, as that of an embedding of positions does;
            it is repeated for each of them, so that each has a gradient of its own.
        count: examples in the batch.
    """
    calls: Calls = {module: [] for module in modules}

    def record(
        module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        given = args[0] if args else kwargs.get("input")
        if not isinstance(given, Tensor) or not isinstance(output, Tensor):
            return None
        if not output.requires_grad:
            return None
        spread = module in shared
        if spread:
            given, output = _repeated(given, count), _repeated(output, count)
        calls[module].append(Call(given.detach(), get_gradient_edge(output), output.shape))
        return output if spread else None

    hooks = [module.register_forward_hook(record, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _repeated(tensor: Tensor, count: int) -> Tensor:
    """One row an example, as broadcasting would make them."""
    single = tensor if tensor.dim() and len(tensor) == 1 else tensor[None]
    return single.expand(count, *single.shape[1:])
