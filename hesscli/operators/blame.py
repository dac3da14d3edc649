"""Naming the module that makes a model random, or that an autodiff mode does not get through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hesscli.problem.batches import map_tensors, tensors_of


@contextmanager
def _watching(
    model: nn.Module, watch: Callable[[str, nn.Module, Any, Any], None]
) -> Iterator[None]:
    """Call ``watch(name, module, (args, kwargs), output)`` as modules finish, inner ones first."""
    handles = [
        module.register_forward_hook(
            lambda m, args, kwargs, out, name=name: watch(name, m, (args, kwargs), out),
            with_kwargs=True,
        )
        for name, module in model.named_modules()
        if name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def label(name: str, module: nn.Module) -> str:
    """How a module is named to people."""
    return f"{name} ({type(module).__name__})"


def random_module(model: nn.Module, run: Callable[[], object]) -> str | None:
    """The first module whose output differs between two runs, inner modules first."""
    recordings: list[list[tuple[str, list[Tensor]]]] = []
    for _ in range(2):
        calls: list[tuple[str, list[Tensor]]] = []

        def watch(name: str, module: nn.Module, inputs: Any, output: Any, calls=calls) -> None:
            calls.append((label(name, module), [t.detach().clone() for t in tensors_of(output)]))

        with torch.no_grad(), _watching(model, watch):
            run()
        recordings.append(calls)
    for (name, first), (_, second) in zip(*recordings, strict=False):
        if any(not torch.equal(a, b) for a, b in zip(first, second, strict=False)):
            return name
    return None


def undifferentiable_module(model: nn.Module, run: Callable[[], object]) -> str | None:
    """The innermost module that cannot be differentiated twice by itself."""
    calls: list[tuple[str, nn.Module, Any]] = []
    with torch.no_grad(), _watching(model, lambda n, m, i, o: calls.append((n, m, i))):
        run()
    for name, module, (args, kwargs) in calls:
        try:
            _differentiate_twice(module, args, kwargs)
        except (RuntimeError, NotImplementedError):
            return label(name, module)
    return None


def _differentiate_twice(module: nn.Module, args: Any, kwargs: Any) -> None:
    def leaf(t: Tensor) -> Tensor:
        return t.detach().clone().requires_grad_(t.is_floating_point())

    with torch.enable_grad():
        args, kwargs = map_tensors(leaf, args), map_tensors(leaf, kwargs)
        inputs = [t for t in tensors_of((args, kwargs)) if t.requires_grad]
        leaves = [*inputs, *(p for p in module.parameters() if p.requires_grad)]
        outputs = [t for t in tensors_of(module(*args, **kwargs)) if t.requires_grad]
        if not leaves or not outputs:
            return
        total = torch.stack([t.square().sum() for t in outputs]).sum()
        slopes = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
        live = [s.square().sum() for s in slopes if s is not None and s.requires_grad]
        if live:
            torch.autograd.grad(torch.stack(live).sum(), leaves, allow_unused=True)
