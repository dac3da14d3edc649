"""The Hessian of a loss in the model's outputs: A = S Sᵀ for each example, by factors or columns.

Where a factor of A is known in closed form, its columns are taken, all with a plus. A loss of
the user's own has A by automatic differentiation: examples do not depend on each other, so that
one product serves all of them. A may then be indefinite. Where it is small, its columns are its
eigenvectors, positive ones first. A random estimate needs no factor: with independent signs r
and any positive D, E[(D r) (A D⁻¹ r)ᵀ] = A, and a product of two is a difference of two squares,
4uv = (u + v)² − (u − v)². With D² the lengths of A's rows, u = v for a positive diagonal A, and
nearly so for that of a softmax, as if the columns of a factor had been drawn.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from hesscli import randomness
from hesscli.errors import UnsoundError, UsageError, first_line
from hesscli.pairing import paired
from hesscli.problem import chunks
from hesscli.problem.batches import Batch, size_of
from hesscli.problem.losses import Loss, Summed
from hesscli.problem.named_losses import CrossEntropy, Entrywise, NegativeLogLikelihood

# -- Factors S of the Hessian of a loss in the model's outputs: A = S Sᵀ for each example ----------
# A is the Hessian of one example's *numerator*, its loss times its weight mass, so that the mean
# over the mass is the user's loss whatever its weights. Columns of S have the outputs' shape and
# hold one column an example; backpropagated and squared, they give the Gauss-Newton matrix's
# diagonal without a probe. A random column s with E[s sᵀ] = A gives it without bias.
#
# Random columns are S r with independent signs r. The usual choice, the score p − e_ŷ of a label ŷ
# drawn from the model, has the same second moment, but where the model is sure its square is almost
# always far too small and now and then enormous. With signs the variance of a squared product never
# exceeds twice its squared mean, and with one output it is zero.


class Factor(ABC):
    """A factor of the output Hessian on one batch.

    ``num_columns`` is how many columns, and so backward passes, the exact Hessian takes.
    """

    num_columns: int

    @abstractmethod
    def column(self, index: int) -> Tensor:
        """One column of every example's S, in the outputs' shape."""

    @abstractmethod
    def draw(self, stream: int, first: int = 0) -> Tensor:
        """A random column s of every example, E[s sᵀ] = A, as a function of a stream's key.

        ``first`` is the place of the first example in the stream, so that a batch may be cut.
        """


def has_closed_form(loss: Loss) -> bool:
    """Whether the Hessian of a loss in the model's outputs is known without differentiating it."""
    return isinstance(loss.natural.unscaled, (CrossEntropy, Entrywise))


def has_factor(loss: Loss) -> bool:
    """Whether that Hessian has a factor which says anything."""
    return has_closed_form(loss) and not _is_linear(loss.natural.unscaled)


def factor_of(loss: Loss, outputs: Tensor, batch: Batch) -> Factor:
    """The factor at a batch's outputs.

    Losses are read in natural parameters, as the Gauss-Newton operator reads them: ``nll`` of
    log-probabilities is cross-entropy, which leaves them as they are.

    Raises:
        UsageError: the loss's output Hessian is not known.
        UnsoundError: a weight is negative, so that A has no real factor.
    """
    if isinstance(loss, Summed):
        return MultipliedFactor(factor_of(loss.loss, outputs, batch), loss.multiple)
    natural, outputs = loss.natural, outputs.detach()
    if _is_linear(natural):
        return NoFactor(outputs)
    if isinstance(natural, CrossEntropy):
        return SoftmaxFactor(natural, outputs, batch)
    if isinstance(natural, Entrywise):
        return EntrywiseFactor(natural, outputs, batch)
    raise UsageError(
        "the loss's Hessian in the model's outputs is not known",
        f"[loss] {loss.name!r}",
        "a named loss: cross_entropy, nll, language_model, mse, bce or bce_with_logits",
    )


def _is_linear(loss: Loss) -> bool:
    """Whether a loss has no curvature in the outputs."""
    return isinstance(loss, NegativeLogLikelihood) and loss.is_linear is True


class NoFactor(Factor):
    """Of a loss that is linear in the outputs: A = 0, which takes no column."""

    num_columns = 0

    def __init__(self, outputs: Tensor) -> None:
        self._outputs = outputs

    def column(self, index: int) -> Tensor:
        """Zero, as A is."""
        return torch.zeros_like(self._outputs)

    def draw(self, stream: int, first: int = 0) -> Tensor:
        """Zero, as A is."""
        return torch.zeros_like(self._outputs)


class SoftmaxFactor(Factor):
    """c (diag(p) − ppᵀ) for each target: its Cholesky factor, K − 1 columns in closed form.

    A target's loss is −Σ_k t_k log p_k with weighted and smoothed t, so its Hessian is that of
    log-sum-exp times c = Σ_k t_k. Column j of the factor is
    √(p_j u_{j+1} / u_j) (e_j − p_{>j} / u_{j+1}), u_j = Σ_{k≥j} p_k: class j against the mean of
    the classes after it (Tanabe & Sagae 1992, "An exact Cholesky decomposition and the
    generalized inverse of the variance-covariance matrix of the multinomial distribution").
    Its sums have no cancellation, so that sure predictions keep their digits.
    """

    def __init__(self, loss: CrossEntropy, outputs: Tensor, batch: Batch) -> None:
        self._loss, self._outputs = loss, outputs
        logits = loss.logits(outputs)
        self._chances = logits.softmax(1)
        self._root = _root(_target_weights(loss, logits, batch))
        self._classes = logits.shape[1]
        self.num_columns = (self._classes - 1) * math.prod(logits.shape[2:])

    def column(self, index: int) -> Tensor:
        """Class ``index % (K − 1)`` at position ``index // (K − 1)``, zero elsewhere."""
        position, j = divmod(index, self._classes - 1)
        chances = self._chances.flatten(2) if self._chances.dim() > 2 else self._chances[:, :, None]
        root = self._root.reshape(len(chances), -1)[:, position]
        first, rest = chances[:, j, position], chances[:, j + 1 :, position]
        tiny = torch.finfo(chances.dtype).tiny
        after = rest.sum(1)
        length = root * (first * (after / (first + after).clamp_min(tiny))).sqrt()
        column = torch.zeros_like(chances)
        column[:, j, position] = length
        column[:, j + 1 :, position] = rest * (-length / after.clamp_min(tiny))[:, None]
        return self._as_outputs(column.view_as(self._chances))

    def draw(self, stream: int, first: int = 0) -> Tensor:
        """√c (√p ∘ r − p ⟨√p, r⟩): the K-column factor times signs, without its matrix."""
        signed = self._chances.sqrt() * _signs(stream, first, self._chances)
        drawn = signed.sub_(self._chances * signed.sum(1, keepdim=True))
        return self._as_outputs(drawn.mul_(self._root[:, None]))

    def _as_outputs(self, column: Tensor) -> Tensor:
        """From logits (N, K, ...) to outputs, by the transpose of how the loss reads them."""
        with torch.enable_grad():
            outputs = self._outputs.detach().requires_grad_()
            return torch.autograd.grad(paired([self._loss.logits(outputs)], [column]), outputs)[0]


class EntrywiseFactor(Factor):
    """A diagonal Hessian: one column an output entry, with one entry that is not zero."""

    def __init__(self, loss: Entrywise, outputs: Tensor, batch: Batch) -> None:
        per_entry = 1 if loss.reduction == "sum" else max(1, outputs[0].numel())
        self._root = _root(loss.weighed(loss.curvature(outputs, batch), batch) / per_entry)
        self.num_columns = outputs[0].numel()

    def column(self, index: int) -> Tensor:
        """Output entry ``index`` of every example."""
        column = torch.zeros_like(self._root)
        column.view(len(column), -1)[:, index] = self._root.view(len(column), -1)[:, index]
        return column

    def draw(self, stream: int, first: int = 0) -> Tensor:
        """The root of the curvature with random signs."""
        return self._root * _signs(stream, first, self._root)


class MultipliedFactor(Factor):
    """Of a multiple of A."""

    def __init__(self, factor: Factor, multiple: float) -> None:
        self._factor, self._root = factor, math.sqrt(multiple)
        self.num_columns = factor.num_columns

    def column(self, index: int) -> Tensor:
        """A column of the factor, times the root of the multiple."""
        return self._root * self._factor.column(index)

    def draw(self, stream: int, first: int = 0) -> Tensor:
        """A draw from the factor, times the root of the multiple."""
        return self._root * self._factor.draw(stream, first)


class ScoreFactor(Factor):
    """The one column ∂ℓ_i/∂f_i, whose square is the empirical Fisher matrix's in the outputs.

    As a factor of the numerator's: an example's mass times the square of its own mean loss's
    slope (Kunstner et al. 2019, arXiv 1905.12558, section 2).
    """

    num_columns = 1

    def __init__(self, loss: Loss, outputs: Tensor, batch: Batch) -> None:
        with torch.enable_grad():
            outputs = outputs.detach().requires_grad_()
            slope = torch.autograd.grad(loss.numerators(outputs, batch).sum(), outputs)[0]
        masses = loss.multiple * loss.masses(batch)  # Σ g gᵀ of the terms, not of their multiples
        masses = masses.to(slope).clamp_min(torch.finfo(slope.dtype).tiny)
        self._slope = slope / masses.sqrt().view(-1, *[1] * (slope.dim() - 1))

    def column(self, index: int) -> Tensor:
        """Every example's slope over the root of its mass."""
        return self._slope

    def draw(self, stream: int, first: int = 0) -> Tensor:
        """The column: there is but one."""
        return self._slope


def _target_weights(loss: CrossEntropy, logits: Tensor, batch: Batch) -> Tensor:
    """Σ_k t_k of each target ``(N, ...)``: 0 where masked."""
    return loss.weighed(loss.compared(logits, loss.targets(batch)).sums(logits), batch)


def _signs(stream: int, first: int, like: Tensor) -> Tensor:
    """Signs for examples ``first …`` of a stream."""
    size = like.numel()
    offset = first * like[0].numel()
    signs = randomness.rademacher(stream, offset, size, dtype=like.dtype, device=like.device)
    return signs.view(like.shape)


def _root(curvature: Tensor) -> Tensor:
    if (curvature < 0).any():
        raise UnsoundError(
            "the loss is not convex in the model's outputs",
            f"a target of weight {float(curvature.min()):.3g}",
            "weights and soft targets that are not negative",
        )
    return curvature.sqrt().contiguous()


# -- Signed columns of the Hessian of a loss in the model's outputs: A = Σ ± s sᵀ for each example


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
        """How many columns the factor S has."""
        return self._factor.num_columns

    def column(self, index: int) -> Signed:
        """One column of the factor S."""
        return 1.0, self._factor.column(index)

    def draw(self, stream: int, first: int = 0) -> list[Signed]:
        """One random column, S r."""
        return [(1.0, self._factor.draw(stream, first))]


def softmax_products(
    loss: Loss, outputs: Tensor, batch: Batch
) -> Callable[[Tensor], Tensor] | None:
    """Products with the Hessian of a batch's mean loss in its outputs ``(N, ...)``, which it keeps.

    None where the loss is no cross-entropy.
    """
    natural = loss.natural
    entropy, share = natural.unscaled, natural.share(batch)
    if not isinstance(entropy, CrossEntropy) or _is_linear(entropy):
        return None
    logits, mass = entropy.logits(outputs), float(entropy.masses(batch).sum())
    weights = _target_weights(entropy, logits, batch) * (share / mass if mass else 0.0)

    def product(vectors: Tensor) -> Tensor:
        found = torch.zeros_like(outputs)  # zero where the loss reads nothing
        chunks.curved(logits, weights, entropy.logits(vectors), entropy.logits(found))
        return found

    return product


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
            self.slope = self._differentiated(total, create_graph=True)

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """A v of every example, in the outputs' shape."""
        if not self.slope.requires_grad:  # linear in the outputs
            return torch.zeros_like(self.slope)
        return self._differentiated(paired([self.slope], [vectors]), create_graph=False)

    def _differentiated(self, value: Tensor, *, create_graph: bool) -> Tensor:
        try:
            (found,) = torch.autograd.grad(
                value,
                [self.outputs],
                retain_graph=True,
                create_graph=create_graph,
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
        column = roots.new_zeros(len(roots), self._lengths.shape[1])
        column[:, self._support] = roots[:, None] * vectors[:, :, place]
        return sign, column.to(self._lengths).view(self._shape)

    def draw(self, stream: int, first: int = 0) -> list[Signed]:
        """(D r ± A D⁻¹ r) / 2."""
        roots = self._lengths.sqrt()
        count, size = roots.shape
        flat = randomness.rademacher(
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
            key = randomness.key(_STREAM, number)
            signs = randomness.rademacher(key, 0, size, dtype=like.dtype, device=like.device)
            total += self._times(signs).square()
        normal = randomness.gaussian(
            randomness.key(_STREAM, _SIZES), 0, size, dtype=like.dtype, device=like.device
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
