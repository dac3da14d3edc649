"""Factors S of the Hessian of a loss in the model's outputs: A = S Sᵀ for each example.

A is the Hessian of one example's *numerator*, its loss times its weight mass, so that the mean
over the mass is the user's loss whatever its weights. Columns of S have the outputs' shape and
hold one column an example; backpropagated and squared, they give the Gauss-Newton matrix's
diagonal without a probe. A random column s with E[s sᵀ] = A gives it without bias.

Random columns are S r with independent signs r. The usual choice, the score p − e_ŷ of a label
ŷ drawn from the model, has the same second moment, but where the model is sure its square is
almost always far too small and now and then enormous. With signs the variance of a squared
product never exceeds twice its squared mean, and with one output it is zero.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from hesscli import streams
from hesscli.errors import UnsoundError, UsageError
from hesscli.problem.batches import Batch
from hesscli.problem.classification import CrossEntropy, NegativeLogLikelihood
from hesscli.problem.entrywise import Entrywise
from hesscli.problem.losses import Loss
from hesscli.problem.summed import Summed


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
        """Zero."""
        return torch.zeros_like(self._outputs)

    def draw(self, stream: int, first: int = 0) -> Tensor:
        """Zero."""
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
            return torch.autograd.grad(self._loss.logits(outputs), outputs, column)[0]


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
        """Multiplied by the root."""
        return self._root * self._factor.column(index)

    def draw(self, stream: int, first: int = 0) -> Tensor:
        """Multiplied by the root."""
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
    targets, smoothing = loss.targets(batch), loss.label_smoothing
    weights = torch.ones(logits.shape[1]) if loss.class_weights is None else loss.class_weights
    weights = weights.to(logits)
    if targets.is_floating_point():
        by_class = weights.view(-1, *[1] * (logits.dim() - 2))
        spread = (1 - smoothing) * targets.to(logits) + smoothing / len(weights)
        return loss.weighed((spread * by_class).sum(1), batch)
    kept = targets != loss.ignore_index
    chosen = weights[targets.where(kept, 0)]
    return loss.weighed(kept * ((1 - smoothing) * chosen + smoothing * weights.mean()), batch)


def _signs(stream: int, first: int, like: Tensor) -> Tensor:
    """Signs for examples ``first …`` of a stream."""
    size = like.numel()
    offset = first * like[0].numel()
    signs = streams.rademacher(stream, offset, size, dtype=like.dtype, device=like.device)
    return signs.view(like.shape)


def _root(curvature: Tensor) -> Tensor:
    if (curvature < 0).any():
        raise UnsoundError(
            "the loss is not convex in the model's outputs",
            f"a target of weight {float(curvature.min()):.3g}",
            "weights and soft targets that are not negative",
        )
    return curvature.sqrt().contiguous()
