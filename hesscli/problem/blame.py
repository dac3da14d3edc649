"""Naming the module of a model that is to blame: found by running modules and comparing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hesscli.errors import UnsoundError, first_line
from hesscli.problem.batches import map_tensors, tensors_of
from hesscli.problem.forward import standing_in

Run = Callable[[], object]
"""A forward pass of the model."""

Attempt = Callable[[nn.Module, Any, Any], None]
"""Tries something on one module with its arguments and keywords; raises where it cannot be."""


def label(name: str, module: nn.Module) -> str:
    """How a module is named to people; the model itself goes by its type."""
    return f"{name} ({type(module).__name__})" if name else type(module).__name__


def differing_module(
    model: nn.Module, first: Run, second: Run, same: Callable[[Tensor, Tensor], bool]
) -> str | None:
    """The first module, inner ones first, whose outputs in two runs are not the same."""
    pairs = zip(_recorded(model, first), _recorded(model, second), strict=False)
    for (name, before), (_, after) in pairs:
        if not all(same(a, b) for a, b in zip(before, after, strict=False)):
            return name
    return None


def failing_module(model: nn.Module, run: Run, attempt: Attempt) -> str | None:
    """The innermost module on which an attempt fails, with the arguments that it has in a run."""
    calls: list[tuple[str, nn.Module, Any]] = []
    with _watching(model, lambda n, m, given, _: calls.append((n, m, given))):
        run()
    for name, module, (args, kwargs) in calls:
        try:
            attempt(module, args, kwargs)
        except Exception:
            return label(name, module)
    return None


def no_gradient(model: nn.Module, run: Run, error: Exception) -> UnsoundError:
    """The refusal of a model whose loss has no gradient by autograd, its module named."""
    culprit = failing_module(model, run, differentiate) or label("", model)
    return UnsoundError(
        "the gradient of the loss cannot be computed",
        f"{culprit} ({first_line(error) or type(error).__name__})",
        "checkpointing with use_reentrant=False"
        if "reentrant" in str(error)
        else "the module named there in plain differentiable torch operations",
    )


def differentiate(module: nn.Module, args: Any, kwargs: Any) -> None:
    """A gradient of something of the module's outputs."""
    leaves, total = _scalar(module, args, kwargs)
    if total.requires_grad:
        torch.autograd.grad(total, leaves, allow_unused=True)


def differentiate_twice(module: nn.Module, args: Any, kwargs: Any) -> None:
    """A gradient of the gradient, by double backward."""
    leaves, total = _scalar(module, args, kwargs)
    if total.requires_grad:
        slopes = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
        curved = _sum_of_squares(s for s in slopes if s is not None)
        if curved.requires_grad:
            torch.autograd.grad(curved, leaves, allow_unused=True)


def differentiate_forward(module: nn.Module, args: Any, kwargs: Any) -> None:
    """A directional derivative of the gradient, by forward-over-reverse."""
    named = {name: p.detach() for name, p in module.named_parameters()}
    given = [t.detach() for t in tensors_of((args, kwargs)) if t.is_floating_point()]

    def total(theta: dict[str, Tensor], inputs: list[Tensor]) -> Tensor:
        left = iter(inputs)
        new_args, new_kwargs = map_tensors(
            lambda t: next(left).clone() if t.is_floating_point() else t, (args, kwargs)
        )
        with standing_in(module, theta):
            return _sum_of_squares(tensors_of(module(*new_args, **new_kwargs)))

    if named or given:
        point = (named, given)
        tangents = map_tensors(torch.ones_like, point)
        slope = torch.func.grad(total, argnums=(0, 1))
        torch.func.vmap(lambda _: torch.func.jvp(slope, point, tangents)[1], randomness="same")(
            torch.zeros(1, device="cpu")
        )


def _scalar(module: nn.Module, args: Any, kwargs: Any) -> tuple[list[Tensor], Tensor]:
    """Inputs and parameters as leaves, and a number that depends on every output."""
    leaves: list[Tensor] = [p for p in module.parameters() if p.requires_grad]

    def fresh(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        leaves.append(t.detach().clone().requires_grad_())
        return leaves[-1].clone()  # no leaf, so that the module may work in place

    with torch.enable_grad():
        args, kwargs = map_tensors(fresh, (args, kwargs))
        return leaves, _sum_of_squares(tensors_of(module(*args, **kwargs)))


def _sum_of_squares(tensors: Iterator[Tensor]) -> Tensor:
    squares = [t.square().sum() for t in tensors if t.is_floating_point()]
    return torch.stack(squares).sum() if squares else torch.zeros((), device="cpu")


def _recorded(model: nn.Module, run: Run) -> list[tuple[str, list[Tensor]]]:
    calls: list[tuple[str, list[Tensor]]] = []

    def watch(name: str, module: nn.Module, _: Any, output: Any) -> None:
        calls.append((label(name, module), [t.detach().clone() for t in tensors_of(output)]))

    with _watching(model, watch):
        run()
    return calls


@contextmanager
def _watching(
    model: nn.Module, watch: Callable[[str, nn.Module, Any, Any], None]
) -> Iterator[None]:
    """Call ``watch(name, module, (args, kwargs), output)`` as modules finish, inner ones first."""

    def hook(name: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        return lambda module, args, kwargs, output: watch(name, module, (args, kwargs), output)

    handles = [
        module.register_forward_hook(hook(name), with_kwargs=True)
        for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
