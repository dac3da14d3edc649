"""Autodiff modes: pure functions that turn a live graph into matrix-vector products.

Each returns ``apply(V)`` for a block ``V`` of shape ``(k, d)`` (one probe a row) and keeps what
the probes of one batch can share. Double backward on a retained graph costs 1 gradient for the
graph and 2 for each probe; forward-over-reverse repeats the primal, 3 a probe; central
differences are 2 gradients a probe, for operations that no autodiff mode gets through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from hesscli.meter import BACKWARD, FORWARD
from hesscli.pairing import paired, weightless
from hesscli.vocabulary import Mode

Kind = Literal["hessian", "sandwich"]

Apply = Callable[[Tensor], Tensor]
Tensors = Sequence[Tensor]
Function = Callable[[Tensors | None], Tensor]
"""A live function of the parameters: at given tensors, or where the model stands (None)."""
Middle = Callable[[Tensor], Apply]
"""Products with A where a function has this value, without its graph."""
Forms = Callable[[slice, Tensor], Tensor]
"""vᵀAv, float64 ``(k,)``, of rows ``(k, ·)`` over some consecutive tensors, 0 in the others."""

_Passes = tuple[float, float]
_PASSES: dict[Kind, dict[Mode, tuple[_Passes, _Passes]]] = {
    "hessian": {
        "double-backward": ((1, 1), (0, 3)),
        "forward-over-reverse": ((0, 0), (1, 4)),
        "finite-difference": ((0, 0), (2, 2)),
    },
    "sandwich": {
        "double-backward": ((1, 1), (0, 2)),
        "forward-over-reverse": ((1, 0), (1, 3 / 2)),
        "finite-difference": ((1, 0), (3, 1)),
    },
}
"""For a batch's graph and for each product: forward passes through the whole model, and passes as
long as that back. A tangent is carried only from where the parameters are."""


_AGAIN: dict[Kind, dict[Mode, tuple[_Passes, _Passes]]] = {
    "hessian": {
        "double-backward": ((1, 0), (1, 1)),
        "finite-difference": ((0, 0), (2, 0)),
    },
    "sandwich": {
        "double-backward": ((1, 0), (2, 1)),
        "finite-difference": ((0, 0), (1, 0)),
    },
}
"""What comes to that where blocks are run again for each way back, and for its own derivative."""


def work(
    kind: Kind, mode: Mode, way_back: float = BACKWARD, *, again: bool = False
) -> tuple[float, float]:
    """Gradients for a batch's graph and for each product.

    Args:
        kind: of the matrix.
        mode: of the products.
        way_back: what a pass back to the parameters takes; default to all of the model's.
        again: blocks are run again for it.
    """
    graph, product = _PASSES[kind][mode]
    if again:
        more = _AGAIN[kind][mode]
        graph, product = (
            (one[0] + other[0], one[1] + other[1])
            for one, other in zip((graph, product), more, strict=True)
        )
    return graph[0] * FORWARD + graph[1] * way_back, product[0] * FORWARD + product[1] * way_back


STEP = 1e-5
"""Step of central differences along a unit direction, in float64: rounding and curvature of the
gradient meet there, and longer steps cross more kinks."""


def gradient(
    value: Tensor, tensors: Tensors, *, create_graph: bool = False, retain_graph: bool = False
) -> list[Tensor]:
    """Gradient of a scalar, zeros where the parameter is not reached."""
    if not value.requires_grad:
        return [torch.zeros_like(tensor, requires_grad=False) for tensor in tensors]
    parts = torch.autograd.grad(
        value,
        tensors,
        create_graph=create_graph,
        retain_graph=retain_graph or create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return [_dense(part) for part in parts]


def flatten(parts: Tensors) -> Tensor:
    """One vector from the parts' entries, sparse parts made dense."""
    return torch.cat([_dense(part).reshape(-1) for part in parts])


def _dense(part: Tensor) -> Tensor:
    return part.to_dense() if part.is_sparse else part


def unflatten(vector: Tensor, like: Tensors) -> list[Tensor]:
    """Views of a flat vector in the shapes of ``like``."""
    pieces = torch.split(vector, [t.numel() for t in like])
    return [piece.view(t.shape) for piece, t in zip(pieces, like, strict=True)]


def vector_jacobian(outputs: Tensors, tensors: Tensors, weights: Tensors) -> Tensors:
    """``Σ weightsᵀ ∂outputs/∂tensors``, keeping the graph for the next call.

    Outputs that depend on nothing, as the gradient of a last bias can, count as constant.
    """
    live = [(o, w) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
    if not live:
        return [torch.zeros_like(tensor, requires_grad=False) for tensor in tensors]
    parts: Tensors = torch.autograd.grad(
        paired(*zip(*live, strict=True)),
        tensors,
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return parts


def vector_jacobians(outputs: Tensors, tensors: Tensors, weights: Tensors) -> Tensors:
    """:func:`vector_jacobian` of ``(k, …)`` weights each, all in one pass back."""
    many = len(weights[0])
    live = [(o, w) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
    parts: Sequence[Tensor | None] = [None] * len(tensors)
    if live:
        own, slopes = zip(*live, strict=True)
        parts = torch.autograd.grad(
            own, tensors, slopes, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    return [
        tensor.new_zeros(many, *tensor.shape) if part is None else part
        for part, tensor in zip(parts, tensors, strict=True)
    ]


def _split_rows(block: Tensor, like: Tensors) -> list[Tensor]:
    """Of a block ``(k, d)`` views in the shapes ``(k, …)`` of ``like``."""
    pieces = torch.split(block, [t.numel() for t in like], dim=1)
    return [piece.view(-1, *t.shape) for piece, t in zip(pieces, like, strict=True)]


def _flat_rows(parts: Tensors) -> Tensor:
    return torch.cat([_dense(part).reshape(len(part), -1) for part in parts], dim=1)


def _rows(product: Callable[[Tensor], Tensors], block: Tensor) -> Tensor:
    """A block's products ``(k, d)``, each of which is made in parts: as one is copied, it goes."""
    rows = torch.empty(block.shape, dtype=block.dtype, device=block.device)
    for row, vector in zip(rows, block, strict=True):
        parts, end = [*product(vector)], len(row)
        while parts:
            part = _dense(parts.pop()).reshape(-1)
            row[end - len(part) : end].copy_(part)
            end -= len(part)
    return rows


# -- Hessian of a scalar -----------------------------------------------------------------------


def hessian_double_backward(function: Function, tensors: Tensors) -> Apply:
    """Hv as the gradient of ⟨gradient, v⟩; the gradient's graph serves all probes."""
    graph = weightless(gradient(function(None), tensors, create_graph=True))

    def product(vector: Tensor) -> Tensors:
        return vector_jacobian(graph, tensors, unflatten(vector, tensors))

    return partial(_rows, product)


def hessian_side_by_side(function: Function, tensors: Tensors) -> Apply:
    """The same, the graph gone through once for all vectors of a block."""
    graph = weightless(gradient(function(None), tensors, create_graph=True))
    return lambda block: _flat_rows(vector_jacobians(graph, tensors, _split_rows(block, tensors)))


def hessian_forward_over_reverse(function: Function, tensors: Tensors) -> Apply:
    """Hv as the directional derivative of the gradient, all probes in one vmap."""
    primals = tuple(t.detach() for t in tensors)

    def product(vector: Tensor) -> Tensor:
        tangents = tuple(unflatten(vector, tensors))
        slope = torch.func.grad(lambda theta: function(theta))
        return flatten(torch.func.jvp(slope, (primals,), (tangents,))[1])

    return lambda block: torch.func.vmap(product, randomness="same")(block).detach()


def hessian_finite_difference(function: Function, tensors: Tensors, step: float = STEP) -> Apply:
    """Hv by central differences of the gradient along the unit direction of v."""

    def at_current() -> Tensor:
        return flatten(gradient(function(None), tensors)).detach()

    def product(vector: Tensor) -> Tensors:
        return [central_difference(at_current, tensors, vector, step)]

    return partial(_rows, product)


# -- Jᵀ A J through an intermediate value -------------------------------------------------------


def sandwich_double_backward(function: Function, tensors: Tensors, at: Middle) -> Apply:
    """Jᵀ A J v, with J v by differentiating u ↦ Jᵀu, which is linear in u."""
    value, middle, dummy, slopes = _pushing(function, tensors, at)
    pulled = weightless(slopes)

    def product(vector: Tensor) -> Tensors:
        (pushed,) = vector_jacobian(pulled, [dummy], unflatten(vector, tensors))
        return vector_jacobian([value], tensors, [middle(pushed.view_as(value))])

    return partial(_rows, product)


def sandwich_side_by_side(function: Function, tensors: Tensors, at: Middle) -> Apply:
    """The same, the graphs gone through once for all vectors of a block."""
    value, middle, dummy, slopes = _pushing(function, tensors, at)
    pulled = weightless(slopes)

    def products(block: Tensor) -> Tensor:
        (pushed,) = vector_jacobians(pulled, [dummy], _split_rows(block, tensors))
        weights = torch.stack([middle(each.view_as(value)) for each in pushed])
        return _flat_rows(vector_jacobians([value], tensors, [weights]))

    return products


def _pushing(
    function: Function, tensors: Tensors, at: Middle
) -> tuple[Tensor, Apply, Tensor, list[Tensor]]:
    """The value, products with A there, u, and Jᵀu with its graph."""
    value = function(None)
    middle = at(value.detach())
    dummy = value.detach().new_zeros(()).expand_as(value).requires_grad_()  # takes no memory
    return value, middle, dummy, gradient(paired([value], [dummy]), tensors, create_graph=True)


def sandwich_forward_over_reverse(function: Function, tensors: Tensors, at: Middle) -> Apply:
    """Jᵀ A J v, with J v by forward mode."""
    primals = tuple(t.detach() for t in tensors)
    value = function(None)
    middle = at(value.detach())

    def product(vector: Tensor) -> Tensors:
        tangents = tuple(unflatten(vector, tensors))
        pushed = torch.func.jvp(lambda theta: function(theta), (primals,), (tangents,))[1]
        return vector_jacobian([value], tensors, [middle(pushed.detach())])

    return partial(_rows, product)


def sandwich_finite_difference(
    function: Function, tensors: Tensors, at: Middle, step: float = STEP
) -> Apply:
    """Jᵀ A J v, with J v by central differences of the value."""
    value = function(None).detach()
    middle = at(value)

    def at_current() -> Tensor:
        return function(None).detach().reshape(-1)  # the model may differentiate on its way

    def product(vector: Tensor) -> Tensors:
        pushed = central_difference(at_current, tensors, vector, step).view_as(value)
        return gradient(paired([function(None)], [middle(pushed)]), tensors)

    return partial(_rows, product)


# -- Quadratic forms of changes of some of the tensors ------------------------------------------


FORM_PASSES: dict[Kind, float] = {"hessian": 2.0, "sandwich": 1.0}
"""For each form on a graph that is there: passes as long as the way back to its tensors."""


def hessian_forms(function: Function, tensors: Tensors) -> Forms:
    """vᵀHv; of the gradient's graph no more is gone through than lies on the way to v's tensors."""
    graph = gradient(function(None), tensors, create_graph=True)

    def forms(chosen: slice, block: Tensor) -> Tensor:
        own = tensors[chosen]
        return torch.stack([form(own, graph[chosen], unflatten(v, own)) for v in block])

    def form(own: Tensors, slopes: Tensors, parts: Tensors) -> Tensor:
        products = vector_jacobian(slopes, own, parts)
        return torch.stack([_inner(*pair) for pair in zip(parts, products, strict=True)]).sum()

    return forms


def sandwich_forms(function: Function, tensors: Tensors, at: Middle) -> Forms:
    """(Jv)ᵀ A (Jv): nothing is pulled back."""
    value, middle, dummy, pulled = _pushing(function, tensors, at)

    def form(chosen: slice, vector: Tensor) -> Tensor:
        tangents = unflatten(vector, tensors[chosen])
        (pushed,) = vector_jacobian(pulled[chosen], [dummy], tangents)
        return _inner(pushed, middle(pushed.view_as(value)))

    return lambda chosen, block: torch.stack([form(chosen, vector) for vector in block])


def _inner(one: Tensor, other: Tensor) -> Tensor:
    return (one.detach().double() * other.detach().double()).sum()


FORMS: dict[Kind, Callable[..., Forms]] = {"hessian": hessian_forms, "sandwich": sandwich_forms}
"""By double backward."""


BUILDERS: dict[Kind, dict[Mode, Callable[..., Apply]]] = {
    "hessian": {
        "double-backward": hessian_double_backward,
        "forward-over-reverse": hessian_forward_over_reverse,
        "finite-difference": hessian_finite_difference,
    },
    "sandwich": {
        "double-backward": sandwich_double_backward,
        "forward-over-reverse": sandwich_forward_over_reverse,
        "finite-difference": sandwich_finite_difference,
    },
}

SIDE_BY_SIDE: dict[Kind, Callable[..., Apply]] = {
    "hessian": hessian_side_by_side,
    "sandwich": sandwich_side_by_side,
}
"""By double backward, once for all vectors of a block."""

BATCHED: frozenset[tuple[Kind, Mode]] = frozenset({("hessian", "forward-over-reverse")})
"""Whose products with a block are made together."""


def central_difference(
    evaluate: Callable[[], Tensor], tensors: Tensors, vector: Tensor, step: float
) -> Tensor:
    """Directional derivative of ``evaluate`` along ``vector``; the tensors are put back."""
    length = float(vector.norm())
    if not length:
        return torch.zeros_like(evaluate())
    direction = unflatten(vector, tensors)
    originals = [t.detach().clone() for t in tensors]
    try:
        _write(tensors, originals, direction, step / length)
        ahead = evaluate()
        _write(tensors, originals, direction, -step / length)
        behind = evaluate()
    finally:
        _write(tensors, originals, direction, 0.0)
    return (ahead - behind).mul_(length / (2 * step))


@torch.no_grad()
def _write(tensors: Tensors, originals: Tensors, direction: Tensors, step: float) -> None:
    for tensor, original, part in zip(tensors, originals, direction, strict=True):
        tensor.copy_(original)
        if step:
            tensor.add_(part, alpha=step)
