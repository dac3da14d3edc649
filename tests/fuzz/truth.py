"""The user's own objective, differentiated twice in float64; hesscli has no part in it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations

from fuzz.blocks import Planted
from fuzz.grammar import Subject

Tap = Callable[[Any], Any]


@dataclass(frozen=True)
class Truth:
    """A loss with its derivatives, by the model's own parameters in order.

    ``residual`` is the diagonal of Σ ∂L/∂z ∇²z, None where a loss is no function of outputs.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    loss: float
    gradient: Tensor
    hessian: Tensor
    residual: Tensor | None

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.hessian).all())

    @property
    def diagonal(self) -> Tensor:
        return self.hessian.diagonal()

    def of(self, names: Sequence[str], vector: Tensor) -> Tensor:
        """A vector's entries of some parameters."""
        parts = dict(zip(self.names, vector.split(self.sizes), strict=True))
        return torch.cat([parts[name] for name in names])


def truth(subject: Subject) -> Truth:
    """Loss, gradient, Hessian, and the residual's diagonal, of an honest copy in float64."""
    model = honest(subject.model)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tensors = list(named.values())
    with sdpa_kernel(SDPBackend.MATH):
        value = objective(subject, model)
        gradient, hessian = dense(value, tensors)
        residual = None
        if subject.objective.by != "step" and subject.penalty is None:
            residual = dense(fixed_slope(subject, model), tensors)[1].diagonal().clone()
    return Truth(
        names=tuple(named),
        sizes=tuple(p.numel() for p in tensors),
        loss=float(value.detach()),
        gradient=gradient,
        hessian=hessian,
        residual=residual,
    )


def objective(subject: Subject, model: nn.Module, tap: Tap = lambda outputs: outputs) -> Tensor:
    """The user's whole objective: a sum or a mean by mass over the user's own batches."""
    batches = subject.batches
    if not subject.coupled and len(batches) > 1:
        batches = ((_joined([x for x, _ in batches]), _joined([y for _, y in batches])),)
    terms, masses = [], []
    for x, y in batches:
        x, y = in_double(x), in_double(y)
        outputs = model(x, y)["logits"] if subject.objective.by == "model" else model(x)
        summed, mass = subject.objective.total(tap(outputs), y)
        terms.append(summed)
        masses.append(mass)
    value = torch.stack(terms).sum() / (1 if subject.objective.sums else sum(masses))
    if subject.penalty is not None:
        value = value + subject.penalty(model)
    if subject.weight_decay:
        trained = (p for p in model.parameters() if p.requires_grad)
        value = value + subject.weight_decay / 2 * sum(p.square().sum() for p in trained)
    return value


def fixed_slope(subject: Subject, model: nn.Module) -> Tensor:
    """⟨∂L/∂z, z(θ)⟩ with ∂L/∂z held fixed, whose Hessian is H − G."""
    outputs: list[Tensor] = []
    leaves: list[Tensor] = []

    def cut(tensor: Tensor) -> Tensor:
        outputs.append(tensor)
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1]

    value = objective(subject, model, lambda tree: mapped(cut, tree))
    slopes = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return sum((z * slope).sum() for z, slope in zip(outputs, slopes, strict=True))


def honest(model: nn.Module) -> nn.Module:
    """A copy in float64 without what misleads autograd, torch's fused weight norm included."""
    twin = copy.deepcopy(model).double()
    for module in twin.modules():
        if isinstance(module, Planted):
            module.honest = True
        if isinstance(module, parametrizations._WeightNorm):
            module.forward = _weight_norm  # its double backward errs
    return twin


def _weight_norm(length: Tensor, direction: Tensor) -> Tensor:
    return direction * (length / direction.square().sum(1, keepdim=True).sqrt())


def dense(value: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian, row by row."""
    count = sum(t.numel() for t in tensors)
    if not value.requires_grad:
        return torch.zeros(count), torch.zeros(count, count)
    slope = _flat(_gradient(value, tensors, create_graph=True))
    zero = torch.zeros_like(slope)
    rows = [
        _flat(_gradient(entry, tensors, retain_graph=True)) if entry.requires_grad else zero
        for entry in slope
    ]
    return slope.detach(), torch.stack(rows).detach()


def _gradient(value: Tensor, tensors: Sequence[Tensor], **how: bool) -> list[Tensor]:
    grads = torch.autograd.grad(value, tensors, allow_unused=True, materialize_grads=True, **how)
    return [g.to_dense() if g.is_sparse else g for g in grads]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def in_double(tree: Any) -> Any:
    return mapped(lambda t: t.double() if t.is_floating_point() else t, tree)


def _joined(trees: list[Any]) -> Any:
    return torch.cat(trees)


def mapped(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The same tree with a function of each tensor: tuples, dicts, lists, data classes."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: mapped(function, value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return getattr(tree, "_make", type(tree))([mapped(function, value) for value in tree])
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        fields = {f.name: getattr(tree, f.name) for f in dataclasses.fields(tree)}
        return type(tree)(**{name: mapped(function, value) for name, value in fields.items()})
    return tree
