"""What autograd's graph does not say of its operations: their modules, and writes into views."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunction
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from hesscli.problem.batches import tensors_of
from hesscli.problem.blame import label

COPY_SLICES = "torch::autograd::CopySlices"
"""Autograd's node for any operation that writes into a view."""


@dataclass
class Recording:
    """Of a forward pass.

    Attributes:
        places: which module an operation belongs to, the innermost.
        writes: the name of the function that wrote into a view, ``"relu_"``.
    """

    places: dict[Node, str] = field(default_factory=dict)
    writes: dict[Node, str] = field(default_factory=dict)


@contextmanager
def recorded(model: nn.Module) -> Iterator[Recording]:
    """Meanwhile, note what the model does."""
    recording, running = Recording(), list[str]()

    def claim(tree: Any) -> None:
        """What was recorded since the last call is of the module that is running now."""
        nodes = [t.grad_fn for t in tensors_of(tree)] if running else []
        while nodes:
            node = nodes.pop()
            if node is not None and node not in recording.places:
                recording.places[node] = running[-1]
                nodes += [source for source, _ in node.next_functions]

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            claim((args, kwargs))
            running.append(name)

        return hook

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        claim(output)
        running.pop()

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # takes no such hooks
            continue
        entering = enter(label(name, module))
        handles.append(module.register_forward_pre_hook(entering, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        with _Writes(recording.writes):
            yield recording
    finally:
        for handle in handles:
            handle.remove()


class _Writes(TorchFunctionMode):
    """Notes who made each write into a view: of functions that make one, and no more, at once."""

    def __init__(self, writes: dict[Node, str]) -> None:
        super().__init__()
        self.writes = writes

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run it, and compare what its first argument is a view of before and after."""
        before = _last_write(args)
        result = function(*args, **(kwargs or {}))
        after = _last_write(args)
        if after is not None and after is not before and after.name() == COPY_SLICES:
            is_only_write = after.next_functions[0][0] is before
            self.writes[after] = getattr(function, "__name__", "") if is_only_write else ""
        return result


def _last_write(args: tuple[Any, ...]) -> Node | None:
    """The last operation on the memory of the first argument."""
    if not args or not isinstance(args[0], Tensor):
        return None
    with DisableTorchFunction():
        base = args[0] if args[0]._base is None else args[0]._base
        return base.grad_fn
