"""Signed columns of the Hessian of a loss in the model's outputs: A = Σ ± s sᵀ for each example.

Where a factor of A is known in closed form, its columns are taken, all with a plus. A loss of
the user's own has A by automatic differentiation: examples do not depend on each other, so that
one product serves all of them. A may then be indefinite. Where it is small, its columns are its
eigenvectors, positive ones first. A random estimate needs no factor: with independent signs r
and any positive D, E[(D r) (A D⁻¹ r)ᵀ] = A, and a product of two is a difference of two squares,
4uv = (u + v)² − (u − v)². With D² the lengths of A's rows, u = v for a positive diagonal A, and
nearly so for that of a softmax, as if the columns of a factor had been drawn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from hesscli import streams
from hesscli.errors import UsageError, first_line
from hesscli.problem.batches import Batch, size_of
from hesscli.problem.factors import Factor, ScoreFactor, factor_of, has_closed_form
from hesscli.problem.losses import Loss

Signed = tuple[float, Tensor]
"""A sign and a column of every example, in the outputs' shape."""

_SIZES = 4
"""Products by which the lengths of A's rows are estimated."""
_STREAM = 0x0A11
"""Separates these products' vectors from other streams."""


class Columns(ABC):
    """Signed columns of the output Hessian on one batch.

    ``num_columns`` is how many of them, and so backward passes, the exact Hessian takes; with
    more than ``most`` it is not made.
    """

    most = 1024

    @property
    @abstractmethod
    def num_columns(self) -> int:
        """As above."""

    @abstractmethod
    def column(self, index: int) -> Signed:
        """One column of every example."""

    @abstractmethod
    def draw(self, stream: int, first: int = 0) -> list[Signed]:
        """Random columns, E[Σ ± s sᵀ] = A, as a function of a stream's key.

        ``first`` is the place of the first example in the stream, so that a batch may be cut.
        """


def columns_at(loss: Loss, outputs: Tensor, batch: Batch) -> Columns:
    """The columns at a batch's outputs.

    Raises:
        UsageError: the loss has no second derivative in them, by example.
        UnsoundError: a weight of a named loss is negative.
    """
    if has_closed_form(loss):
        return FactorColumns(factor_of(loss, outputs, batch))
    return AutodiffColumns(loss, outputs, batch)


def scores_at(loss: Loss, outputs: Tensor, batch: Batch) -> Columns:
    """The one column of the empirical Fisher matrix at a batch's outputs."""
    return FactorColumns(ScoreFactor(loss, outputs, batch))


class FactorColumns(Columns):
    """Those of a factor, A = S Sᵀ."""

    def __init__(self, factor: Factor) -> None:
        self._factor = factor

    @property
    def num_columns(self) -> int:
        """Those of S."""
        return self._factor.num_columns

    def column(self, index: int) -> Signed:
        """One of S."""
        return 1.0, self._factor.column(index)

    def draw(self, stream: int, first: int = 0) -> list[Signed]:
        """S r."""
        return [(1.0, self._factor.draw(stream, first))]


class OutputHessian:
    """Products with the Hessians of all examples' numerators, each in its own outputs.

    Args:
        loss: additive over examples.
        outputs: ``(N, ...)``.
        batch: the examples.

    Raises:
        UsageError: outputs are not one row an example, or there is no second derivative.
    """

    def __init__(self, loss: Loss, outputs: Tensor, batch: Batch) -> None:
        if not outputs.dim() or len(outputs) != size_of(batch):
            raise UsageError(
                "the loss's Hessian in the model's outputs needs one row of them an example",
                f"outputs of shape {tuple(outputs.shape)} for {size_of(batch)} examples",
                "the Hessian as a whole: --method hutchinson",
            )
        self.name, self.outputs = loss.name, outputs.detach().requires_grad_()
        with torch.enable_grad():
            mass = float(loss.masses(batch).sum())
            total = loss.natural.mean(self.outputs, batch) * mass
            self.slope = self._differentiated(total, None)

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """A v of every example, in the outputs' shape."""
        if not self.slope.requires_grad:  # linear in the outputs
            return torch.zeros_like(self.slope)
        return self._differentiated(self.slope, vectors)

    def _differentiated(self, value: Tensor, weights: Tensor | None) -> Tensor:
        try:
            (found,) = torch.autograd.grad(
                value,
                [self.outputs],
                weights,
                retain_graph=True,
                create_graph=weights is None,
                allow_unused=True,
                materialize_grads=True,
            )
        except RuntimeError as error:
            raise UsageError(
                "the loss's Hessian in the model's outputs is not known",
                f"the loss {self.name}: {first_line(error)}",
                "the Hessian as a whole: --method hutchinson",
            ) from None
        return found


class AutodiffColumns(Columns):
    """Those of a loss of the user's own: eigenvectors, each times the root of its eigenvalue."""

    most = 256

    def __init__(self, loss: Loss, outputs: Tensor, batch: Batch) -> None:
        self._hessian = OutputHessian(loss, outputs, batch)
        self._shape = outputs.shape

    @property
    def num_columns(self) -> int:
        """Eigenvalues other than zero, or A's side where it is too large to be decomposed."""
        if len(self._support) > self.most:
            return len(self._support)
        _, _, positive, negative = self._decomposed
        return positive + negative

    def column(self, index: int) -> Signed:
        """Positive ones come first; zero where an example has fewer."""
        values, vectors, positive, _ = self._decomposed
        sign, place = (1.0, -1 - index) if index < positive else (-1.0, index - positive)
        roots = (sign * values[:, place]).clamp_min(0).sqrt()
        column = torch.zeros(len(roots), self._lengths.shape[1], dtype=roots.dtype)
        column = column.to(roots.device)
        column[:, self._support] = roots[:, None] * vectors[:, :, place]
        return sign, column.to(self._lengths).view(self._shape)

    def draw(self, stream: int, first: int = 0) -> list[Signed]:
        """(D r ± A D⁻¹ r) / 2."""
        roots = self._lengths.sqrt()
        count, size = roots.shape
        flat = streams.rademacher(
            stream, first * size, count * size, dtype=roots.dtype, device=roots.device
        )
        signs = flat.view(count, size)
        left = signs * roots
        spread = torch.where(roots > 0, signs / roots, 0)
        right = (self._hessian @ spread.view(self._shape)).reshape(count, size)
        plus, minus = (left + right) / 2, (left - right) / 2
        drawn = [(1.0, plus.view(self._shape))]
        rounding = 8 * torch.finfo(roots.dtype).eps * plus.abs()
        if bool((minus.abs() > rounding).any()):
            drawn.append((-1.0, minus.view(self._shape)))
        return drawn

    @cached_property
    def _lengths(self) -> Tensor:
        """About the lengths of A's rows, ``(N, M)``, and zero only where a row is zero.

        Of signs the mean square is exact for a diagonal A; of Gaussian entries no product is zero
        by chance.
        """
        like = self._hessian.slope.detach()
        size = like[0].numel()
        total = torch.zeros(len(like), size, dtype=like.dtype, device=like.device)
        for number in range(_SIZES):
            key = streams.key(_STREAM, number)
            signs = streams.rademacher(key, 0, size, dtype=like.dtype, device=like.device)
            total += self._times(signs).square()
        normal = streams.gaussian(
            streams.key(_STREAM, _SIZES), 0, size, dtype=like.dtype, device=like.device
        )
        lengths = (total / _SIZES).sqrt()
        return torch.where(lengths > 0, lengths, self._times(normal).abs())

    @cached_property
    def _support(self) -> Tensor:
        """Places of the outputs that A says anything of, on any example."""
        return (self._lengths > 0).any(0).nonzero()[:, 0]

    @cached_property
    def _decomposed(self) -> tuple[Tensor, Tensor, int, int]:
        """Eigenvalues ``(N, m)`` ascending, vectors, and how many are positive and negative."""
        like, side = self._lengths, len(self._support)
        rows = []
        for place in self._support.tolist():
            unit = torch.zeros(like.shape[1], dtype=like.dtype, device=like.device)
            unit[place] = 1
            rows.append(self._times(unit)[:, self._support])
        matrix = torch.stack(rows, 1) if rows else like.new_zeros(len(like), 0, 0)
        matrix = matrix.double()
        values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
        largest = values.abs().amax(1, keepdim=True) if side else values
        known = values.abs() > side * torch.finfo(like.dtype).eps * largest
        values = torch.where(known, values, 0)
        counts = [int((sign * values > 0).sum(1).max()) if side else 0 for sign in (1, -1)]
        return values, vectors, counts[0], counts[1]

    def _times(self, vector: Tensor) -> Tensor:
        """A v of every example for one v of them all, ``(N, M)``."""
        spread = vector.expand(len(self._hessian.slope), -1).reshape(self._shape)
        return (self._hessian @ spread).reshape(len(spread), -1)
