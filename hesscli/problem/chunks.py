"""Cross-entropy over many classes: its derivatives in closed form, a few targets at a time.

With many classes nothing is as large as the logits, and automatic differentiation of
``F.cross_entropy`` keeps several things of that size for a product: log-probabilities, the slope
before and after the softmax, and their tangents. But a target's loss is C·lse(z) − ⟨τ, z⟩, with
τ its weighted and smoothed classes and C their sum, so that its slope is C p − τ and its Hessian
C (diag(p) − ppᵀ): the logits are enough to make either again, and they are there already.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from hesscli.torch_private import is_transformed

CHUNK = 1 << 22
"""Logits that are worked on at once; as many or fewer are left to torch."""


@dataclass(frozen=True)
class Targets:
    """What logits ``(M, K, ...)`` are compared with, as ``F.cross_entropy`` takes it.

    Args:
        values: classes ``(M, ...)``, or probabilities in the shape of the logits.
        class_weights: ``(K,)`` or None, in the logits' type.
        ignore_index: the class that is no target.
        label_smoothing: share of all classes in a target.
    """

    values: Tensor
    class_weights: Tensor | None
    ignore_index: int
    label_smoothing: float

    def of(self, logits: Tensor) -> Tensor:
        """Loss of each target, weighted and not divided."""
        return functional.cross_entropy(
            logits,
            self.values.to(logits.dtype) if self.values.is_floating_point() else self.values,
            weight=self.class_weights,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="none",
        )

    def __getitem__(self, rows: slice) -> Targets:
        return replace(self, values=self.values[rows])

    def sums(self, logits: Tensor) -> Tensor:
        """C of each target, in the shape of classes: 0 where it is ignored."""
        weights, smoothing = self._weights(logits), self.label_smoothing
        if self.values.is_floating_point():
            return (self._smoothed(logits) * _by_class(weights, logits)).sum(1)
        kept = self.values != self.ignore_index
        chosen = weights[self.values.where(kept, 0)]
        return kept * ((1 - smoothing) * chosen + smoothing * weights.mean())

    def taken_from(self, slope: Tensor, logits: Tensor) -> Tensor:
        """Take τ from a slope ``(M, K, ...)``, in place."""
        weights, smoothing = self._weights(logits), self.label_smoothing
        if self.values.is_floating_point():
            return slope.sub_(self._smoothed(logits) * _by_class(weights, logits))
        kept = self.values != self.ignore_index
        classes = self.values.where(kept, 0)
        if smoothing:
            spread = _by_class(weights * (smoothing / len(weights)), logits)
            slope.sub_(spread * kept[:, None])
        chosen = (1 - smoothing) * weights[classes] * kept
        return slope.scatter_add_(1, classes[:, None], -chosen[:, None])

    def _weights(self, logits: Tensor) -> Tensor:
        return (
            logits.new_ones(logits.shape[1]) if self.class_weights is None else self.class_weights
        )

    def _smoothed(self, logits: Tensor) -> Tensor:
        spread = self.label_smoothing / logits.shape[1]
        return (1 - self.label_smoothing) * self.values.to(logits.dtype) + spread


def _by_class(weights: Tensor, logits: Tensor) -> Tensor:
    return weights.view(-1, *[1] * (logits.dim() - 2))


def losses(logits: Tensor, targets: Targets) -> Tensor:
    """Loss of each target, twice differentiable, with logits ``(N, K, ...)``."""
    known = logits.dtype in (torch.float32, torch.float64)
    if logits.numel() <= CHUNK or not known or is_transformed():
        return targets.of(logits)
    shape = logits.shape
    if logits.dim() > 2 and (rows := _as_rows(logits)) is not None:
        values = targets.values
        soft = values.is_floating_point()
        flat = values.movedim(1, -1).flatten(0, -2) if soft else values.flatten()
        logits, targets = rows, replace(targets, values=flat)
    found: Tensor = _Losses.apply(logits, targets)  # type: ignore[no-untyped-call]
    return found.view(shape[:1] + shape[2:])


def curved(logits: Tensor, sums: Tensor, vectors: Tensor, found: Tensor) -> None:
    """Write c (diag(p) − ppᵀ) v of each target into ``found``.

    Args:
        logits: ``(N, K, ...)``.
        sums: c, ``(N, ...)``.
        vectors: v, in the shape of the logits.
        found: in that shape too, as a view of what it is written into.
    """
    flat = [_as_rows(each) for each in (logits, vectors, found)]
    if all(each is not None for each in flat):
        (logits, vectors, found), sums = cast("list[Tensor]", flat), sums.flatten()
    for rows in _chunks(logits):
        found[rows] = _curved(logits[rows].softmax(1), vectors[rows], sums[rows])


class _Losses(torch.autograd.Function):
    """Losses of all targets; keeps the logits, which are there."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Targets) -> Tensor:
        ctx.targets = targets
        ctx.save_for_backward(logits)
        return torch.cat([targets[rows].of(logits[rows]) for rows in _chunks(logits)])

    @staticmethod
    def backward(ctx: Any, pulled: Tensor) -> tuple[Tensor, None]:
        return _Slope.apply(pulled, *ctx.saved_tensors, ctx.targets), None  # type: ignore[no-untyped-call]


class _Slope(torch.autograd.Function):
    """(C p − τ) times what is pulled back of each target; keeps the logits."""

    @staticmethod
    def forward(ctx: Any, pulled: Tensor, logits: Tensor, targets: Targets) -> Tensor:
        ctx.targets = targets
        ctx.save_for_backward(pulled, logits)
        slope = torch.empty_like(logits)
        for rows in _chunks(logits):
            slope[rows] = _slope(logits[rows], targets[rows]).mul_(pulled[rows][:, None])
        return slope

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, vectors: Tensor) -> tuple[Tensor | None, Tensor, None]:
        pulled, logits = ctx.saved_tensors
        needs_pulled = ctx.needs_input_grad[0]
        along = torch.empty_like(pulled) if needs_pulled else None
        found = torch.empty_like(logits)
        for rows in _chunks(logits):
            part, targets, vector = logits[rows], ctx.targets[rows], vectors[rows]
            if along is not None:
                along[rows] = (_slope(part, targets) * vector).sum(1)
            sums = pulled[rows] * targets.sums(part)
            found[rows] = _curved(part.softmax(1), vector, sums)
        return along, found, None


def _slope(logits: Tensor, targets: Targets) -> Tensor:
    chances = logits.softmax(1)
    return targets.taken_from(chances.mul_(targets.sums(logits)[:, None]), logits)


def _curved(chances: Tensor, vectors: Tensor, sums: Tensor) -> Tensor:
    """C p ∘ (v − ⟨p, v⟩)."""
    centred = vectors - (chances * vectors).sum(1, keepdim=True)
    return centred.mul_(chances).mul_(sums[:, None])


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Rows of which about so many logits are together."""
    size = max(1, CHUNK // max(1, logits[0].numel()))
    for start in range(0, len(logits), size):
        yield slice(start, start + size)


def _as_rows(logits: Tensor) -> Tensor | None:
    """``(N, K, ...)`` as ``(M, K)``, where that is a view: of outputs whose classes come last."""
    last = logits.movedim(1, -1)
    return last.flatten(0, -2) if last.is_contiguous() else None
