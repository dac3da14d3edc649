"""What modules see in a forward pass: their inputs, and the graph's edges behind their outputs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from hesscli.torch_private import saved


@dataclass(frozen=True)
class Call:
    """One call of a module.

    ``edge`` is where the graph left the module, so that what is done to the output afterwards,
    in place or not, does not matter. ``turned`` is the number of examples where a position's come
    one after the other, and not an example's positions; ``input`` is as if they did.
    """

    input: Tensor
    edge: GradientEdge
    shape: torch.Size
    turned: int = 0

    def by_example(self, count: int) -> Call:
        """The same, read as a position's examples after the other, so many of them."""
        return replace(self, input=_turned(self.input, count), turned=count)

    def arranged(self, gradient: Tensor) -> Tensor:
        """A gradient in the output, in the order of the input's rows."""
        return _turned(gradient, self.turned) if self.turned else gradient

    def rows_each(self, count: int) -> int | None:
        """Rows for each of so many examples, or None where they are no multiple."""
        if self.input.dim() == 0 or not len(self.shape):
            return None
        if self.turned:
            return 1 if len(self.input) == count else None
        if self.shape[0] != len(self.input):
            return None
        each, rest = divmod(len(self.input), count)
        return None if rest else each


def _turned(values: Tensor, count: int) -> Tensor:
    """Rows by example: of ``(P, N, ...)``, or of ``(P·N, ...)``; as they are where they fit not."""
    if values.dim() > 2 and values.shape[1] == count:
        return values.transpose(0, 1)
    if values.dim() > 1 and len(values) % count == 0:
        return values.reshape(-1, count, *values.shape[1:]).transpose(0, 1)
    return values


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


# -- Weights that no module of their own is called for, as in torch's attention --------------------


class BareLinear(nn.Module):
    """Stands for a weight, and perhaps a bias, that ``functional.linear`` is given as they are."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias


class Tied(BareLinear):
    """Stands for a weight that several modules have: linear ones, and embeddings that look it up.

    The input of a lookup is whole numbers.
    """

    def __init__(self, weight: Tensor, homes: Sequence[nn.Module]) -> None:
        super().__init__(weight, None)
        found = {module.padding_idx for module in homes if isinstance(module, nn.Embedding)}
        self.padding_idx = found.pop() if len(found) == 1 else None


def found_in_graph(outputs: Tensor, bare: Collection[BareLinear]) -> Calls:
    """What a graph has kept of the uses of some weights, as calls.

    Products with their transposes, and lookups of their rows.
    """
    calls: Calls = {module: [] for module in bare}
    by_weight = {id(module.weight): module for module in bare}
    for node in _nodes(outputs):
        if (name := _INPUT.get(node.name())) is None:
            continue
        looks_up = node.name() == _LOOKUP
        source = node.next_functions[0 if looks_up else -1][0]
        if not looks_up and source is not None:
            source = source.next_functions[0][0] if source.name() == "TBackward0" else None
        module = by_weight.get(id(getattr(source, "variable", None)))
        if module is not None:
            input, (rows, columns) = saved(node, name, None).detach(), module.weight.shape
            shape = (*input.shape, columns) if looks_up else (len(input), rows)
            calls[module].append(Call(input, GradientEdge(node, 0), torch.Size(shape)))
    return calls


_LOOKUP = "EmbeddingBackward0"
_INPUT = {"AddmmBackward0": "mat1", "MmBackward0": "self", _LOOKUP: "indices"}
"""What autograd calls the input of an operation."""


def _nodes(outputs: Tensor) -> Iterator[Node]:
    """All of a tensor's graph."""
    pending = [get_gradient_edge(outputs).node] if outputs.requires_grad else []
    entered = set(pending)
    while pending:
        node = pending.pop()
        yield node
        new = {source for source, _ in node.next_functions if source is not None} - entered
        entered |= new
        pending += new
