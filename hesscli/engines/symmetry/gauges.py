"""Families whose generators depend on more than what they move."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscli.engines.symmetry.families import Scaling, Told, normal, total_of
from hesscli.engines.symmetry.seen import distinct


@dataclass(frozen=True)
class Shear:
    """Constants that are added to some entries, and what maps make of them taken from others.

    Its generators are linear in the weights of the maps and no gradients, so that there is no
    charge.

    Args:
        told: what it is.
        index: entries ``(m,)`` to which constants are added.
        channel: which constant, each.
        target: entries ``(k,)`` from which is taken
        weight: the entry by which each constant is multiplied, times
        factor: a number, and
        by: which constant, each.
        size: constants.
    """

    told: Told
    index: Tensor
    channel: Tensor
    target: Tensor
    weight: Tensor
    by: Tensor
    factor: Tensor
    size: int

    @property
    def num_directions(self) -> int:
        """One for each constant."""
        return self.size

    @property
    def num_charges(self) -> int:
        """None."""
        return 0

    @property
    def entries(self) -> Tensor:
        """All that is moved."""
        return distinct(torch.cat([self.index, self.target]))

    def draw(self, generator: torch.Generator, size: float) -> Tensor:
        """Constants."""
        return normal((self.size,), generator) * size

    def far(self, generator: torch.Generator) -> Tensor:
        """Larger constants."""
        return self.draw(generator, 10.0)

    def tangent(self, coefficients: Tensor, theta: Tensor) -> Tensor:
        """The constants, and less what they become."""
        made = self.factor * theta[self.weight] * coefficients[self.by]
        moved = torch.zeros_like(theta).index_add_(0, self.index, coefficients[self.channel])
        return moved.index_add_(0, self.target, -made)

    def transposed(self, coefficients: Tensor, _theta: Tensor, vector: Tensor) -> Tensor:
        """What weights have of the entries that are taken from."""
        back = -self.factor * coefficients[self.by] * vector[self.target]
        return torch.zeros_like(vector).index_add_(0, self.weight, back)

    def moved(self, coefficients: Tensor, theta: Tensor) -> Tensor:
        """θ and the tangent: the weights stay."""
        return theta + self.tangent(coefficients, theta)

    def moments(self, theta: Tensor, vector: Tensor) -> Tensor:
        """⟨v, Xθ⟩ of each constant."""
        sums = theta.new_zeros(self.size).index_add_(0, self.channel, vector[self.index])
        made = self.factor * theta[self.weight] * vector[self.target]
        return sums.index_add_(0, self.by, -made)

    def lengths(self, theta: Tensor) -> Tensor:
        """‖Xθ‖ of each constant."""
        squares = theta.new_zeros(self.size)
        squares.index_add_(0, self.channel, torch.ones_like(self.channel, dtype=theta.dtype))
        place = self.target * self.size + self.by
        places, which = torch.unique(place, return_inverse=True)
        made = theta.new_zeros(len(places))
        made.index_add_(0, which, self.factor * theta[self.weight])
        return squares.index_add_(0, places % self.size, made.square()).sqrt()

    def charges(self, theta: Tensor) -> Tensor:
        """None."""
        return theta.new_zeros(0)


@dataclass(frozen=True)
class Conjugated:
    """Entries ``(n, ·)`` on which a matrix acts between a diagonal one and its inverse.

    Attributes:
        entries: that are moved.
        gain: entries ``(n,)`` of that diagonal; None of the identity.
        inverse: whether its inverse comes first.
    """

    entries: Tensor
    gain: Tensor | None = None
    inverse: bool = False

    def diagonal(self, theta: Tensor) -> Tensor:
        """What is ahead of the matrix, from the right."""
        if self.gain is None:
            return theta.new_ones(len(self.entries))
        return theta[self.gain].reciprocal() if self.inverse else theta[self.gain]


@dataclass(frozen=True)
class Turning:
    """Rotations of a residual stream, of which norms see nothing but what they are turned into.

    What writes to the stream is turned; a gain γ stays, its bias becomes γ R γ⁻¹ β, and the columns
    of what reads it become W γ R⁻¹ γ⁻¹. Layer norm besides sees no mean: rotations then keep it.
    As they are antisymmetric, there is no charge.

    Args:
        told: what it is.
        frame: orthonormal vectors ``(n, r)``, in whose planes tests turn.
        parts: all that is moved.
        num_directions: of all planes that there are.
    """

    told: Told
    frame: Tensor
    parts: tuple[Conjugated, ...]
    num_directions: int

    @property
    def num_charges(self) -> int:
        """None."""
        return 0

    @property
    def entries(self) -> Tensor:
        """All that is moved."""
        return distinct(torch.cat([part.entries.reshape(-1) for part in self.parts]))

    @property
    def _planes(self) -> Tensor:
        rank = self.frame.shape[1]
        return torch.triu_indices(rank, rank, 1, device="cpu")

    def draw(self, generator: torch.Generator, size: float) -> Tensor:
        """A random antisymmetric matrix ``(r, r)`` in the frame."""
        rank = self.frame.shape[1]
        drawn = normal((rank, rank), generator) * (size / math.sqrt(rank))
        return drawn - drawn.T

    def far(self, generator: torch.Generator) -> Tensor:
        """Half turns, or so."""
        return self.draw(generator, 2.0)

    def _added(self, matrix: Tensor, theta: Tensor) -> Tensor:
        """What is added where the identity becomes 1 + the frame's ``matrix``."""
        result = torch.zeros_like(theta)
        for part in self.parts:
            diagonal = part.diagonal(theta)[:, None]
            seen = self.frame.T @ (diagonal * theta[part.entries])
            added = (self.frame @ (matrix @ seen)) / diagonal
            result = result.index_add(0, part.entries.reshape(-1), added.reshape(-1))
        return result

    def tangent(self, coefficients: Tensor, theta: Tensor) -> Tensor:
        """Aθ, between gains."""
        return self._added(coefficients, theta)

    def transposed(self, coefficients: Tensor, theta: Tensor, vector: Tensor) -> Tensor:
        """By autograd: it goes through gains too."""
        with torch.enable_grad():
            leaf = theta.detach().requires_grad_()
            return torch.autograd.grad(self._added(coefficients, leaf) @ vector, leaf)[0]

    def moved(self, coefficients: Tensor, theta: Tensor) -> Tensor:
        """exp(A) θ, between gains."""
        turned = torch.linalg.matrix_exp(coefficients)
        return theta + self._added(
            turned - torch.eye(len(turned), dtype=turned.dtype, device="cpu"), theta
        )

    def moments(self, theta: Tensor, vector: Tensor) -> Tensor:
        """⟨v, Xθ⟩ of each plane of the frame."""
        rank = self.frame.shape[1]
        total = theta.new_zeros(rank, rank)
        for part in self.parts:
            diagonal = part.diagonal(theta)[:, None]
            behind = self.frame.T @ (vector[part.entries] / diagonal)
            total += behind @ (self.frame.T @ (diagonal * theta[part.entries])).T
        one, other = self._planes
        return (total - total.T)[one, other]

    def lengths(self, theta: Tensor) -> Tensor:
        """‖Xθ‖ of each plane of the frame."""
        rank = self.frame.shape[1]
        squares = theta.new_zeros(rank, rank)
        for part in self.parts:
            diagonal = part.diagonal(theta)[:, None]
            seen = self.frame.T @ (diagonal * theta[part.entries])
            gram, metric = seen @ seen.T, self.frame.T @ (self.frame / diagonal.square())
            crossed = torch.outer(metric.diagonal(), gram.diagonal())
            squares += crossed + crossed.T - 2 * metric * gram
        one, other = self._planes
        return squares[one, other].clamp_min(0.0).sqrt()

    def charges(self, theta: Tensor) -> Tensor:
        """None."""
        return theta.new_zeros(0)

    def generator(self, number: int) -> Tensor:
        """The coefficients of one plane."""
        one, other = self._planes[:, number]
        result = torch.zeros(
            self.frame.shape[1], self.frame.shape[1], dtype=torch.float64, device="cpu"
        )
        result[one, other], result[other, one] = 1.0, -1.0
        return result


@dataclass(frozen=True)
class MeanFree:
    """What maps may have along 1/γ behind a layer norm, whose numbers over γ have no mean.

    W becomes W γ exp(ε 1ᵀ) γ⁻¹, and the norm's bias what undoes it there: one direction for each
    channel. No charge.

    Args:
        told: what it is.
        gain: entries ``(n,)`` of γ.
        bias: of β.
        readers: entries ``(n, ·)`` of maps, by the channels that they read.
    """

    told: Told
    gain: Tensor
    bias: Tensor
    readers: tuple[Tensor, ...]

    @property
    def num_directions(self) -> int:
        """One for each channel."""
        return len(self.gain)

    @property
    def num_charges(self) -> int:
        """None."""
        return 0

    @property
    def entries(self) -> Tensor:
        """All that is moved."""
        return distinct(torch.cat([self.bias, *(part.reshape(-1) for part in self.readers)]))

    def draw(self, generator: torch.Generator, size: float) -> Tensor:
        """ε, whose sum is about so large."""
        return normal((len(self.gain),), generator) * (size / math.sqrt(len(self.gain)))

    def far(self, generator: torch.Generator) -> Tensor:
        """Larger."""
        return self.draw(generator, 1.5)

    def _added(self, ahead: Tensor, back: Tensor, theta: Tensor) -> Tensor:
        """What is added to W by 1 + ahead 1ᵀ, and to β by 1 + back 1ᵀ, between gains."""
        gain, result = theta[self.gain], torch.zeros_like(theta)
        for part in self.readers:
            added = torch.outer(gain.reciprocal(), ahead @ (gain[:, None] * theta[part]))
            result = result.index_add(0, part.reshape(-1), added.reshape(-1))
        return result.index_add(0, self.bias, gain * back * (theta[self.bias] / gain).sum())

    def tangent(self, coefficients: Tensor, theta: Tensor) -> Tensor:
        """W γ ε 1ᵀ γ⁻¹ and −γ ε 1ᵀ γ⁻¹ β."""
        return self._added(coefficients, -coefficients, theta)

    def transposed(self, coefficients: Tensor, theta: Tensor, vector: Tensor) -> Tensor:
        """By autograd: it goes through gains too."""
        with torch.enable_grad():
            leaf = theta.detach().requires_grad_()
            return torch.autograd.grad(self.tangent(coefficients, leaf) @ vector, leaf)[0]

    def moved(self, coefficients: Tensor, theta: Tensor) -> Tensor:
        """By exp(ε 1ᵀ) = 1 + (eˢ − 1)/s ε 1ᵀ, s being the sum of ε, and by its inverse."""
        total = float(coefficients.sum())
        ahead, back = ((math.expm1(s) / s if s else 1.0) for s in (total, -total))
        return theta + self._added(ahead * coefficients, -back * coefficients, theta)

    def moments(self, theta: Tensor, vector: Tensor) -> Tensor:
        """⟨v, Xθ⟩ of each channel."""
        gain, mean = theta[self.gain], (theta[self.bias] / theta[self.gain]).sum()
        found = -vector[self.bias] * mean
        for part in self.readers:
            found = found + theta[part] @ (gain.reciprocal() @ vector[part])
        return gain * found

    def lengths(self, theta: Tensor) -> Tensor:
        """‖Xθ‖ of each channel."""
        gain, mean = theta[self.gain], (theta[self.bias] / theta[self.gain]).sum()
        own = total_of(theta[part].square().sum(1) for part in self.readers)
        return gain.abs() * (own * gain.reciprocal().square().sum() + mean.square()).sqrt()

    def charges(self, theta: Tensor) -> Tensor:
        """None."""
        return theta.new_zeros(0)


@dataclass(frozen=True)
class MeanFreeRows:
    """The same of maps that have a bias of their own, or norms that have none: row by row.

    A row of W gets u/γ, and its bias gives what that makes of the norm's, u Σ β/γ.

    Args:
        told: what it is.
        gain: entries ``(n,)`` of γ.
        bias: of β; None where there is none.
        readers: entries ``(n, m)`` of maps, by the channels that they read.
        own: entries ``(m,)`` of the biases of these rows; None where there is no β.
    """

    told: Told
    gain: Tensor
    bias: Tensor | None
    readers: Tensor
    own: Tensor | None

    @property
    def num_directions(self) -> int:
        """One for each row."""
        return self.readers.shape[1]

    @property
    def num_charges(self) -> int:
        """None."""
        return 0

    @property
    def entries(self) -> Tensor:
        """All that is moved."""
        own = [] if self.own is None else [self.own]
        return distinct(torch.cat([self.readers.reshape(-1), *own]))

    def draw(self, generator: torch.Generator, size: float) -> Tensor:
        """U."""
        return normal((self.num_directions,), generator) * size

    def far(self, generator: torch.Generator) -> Tensor:
        """Larger."""
        return self.draw(generator, 3.0)

    def _mean(self, theta: Tensor) -> Tensor:
        """Σ β/γ."""
        if self.bias is None:
            return theta.new_zeros(())
        return (theta[self.bias] / theta[self.gain]).sum()

    def tangent(self, coefficients: Tensor, theta: Tensor) -> Tensor:
        """U γ⁻¹ᵀ, and −u Σ β/γ."""
        added = torch.outer(theta[self.gain].reciprocal(), coefficients)
        result = torch.zeros_like(theta).index_add(0, self.readers.reshape(-1), added.reshape(-1))
        if self.own is None:
            return result
        return result.index_add(0, self.own, -coefficients * self._mean(theta))

    def transposed(self, coefficients: Tensor, theta: Tensor, vector: Tensor) -> Tensor:
        """By autograd."""
        with torch.enable_grad():
            leaf = theta.detach().requires_grad_()
            return torch.autograd.grad(self.tangent(coefficients, leaf) @ vector, leaf)[0]

    def moved(self, coefficients: Tensor, theta: Tensor) -> Tensor:
        """θ and the tangent: gains and β stay."""
        return theta + self.tangent(coefficients, theta)

    def moments(self, theta: Tensor, vector: Tensor) -> Tensor:
        """⟨v, Xθ⟩ of each row."""
        found = theta[self.gain].reciprocal() @ vector[self.readers]
        return found if self.own is None else found - vector[self.own] * self._mean(theta)

    def lengths(self, theta: Tensor) -> Tensor:
        """‖Xθ‖ of each row: all alike."""
        square = theta[self.gain].reciprocal().square().sum() + self._mean(theta).square()
        return square.sqrt().expand(self.num_directions)

    def charges(self, theta: Tensor) -> Tensor:
        """None."""
        return theta.new_zeros(0)


@dataclass(frozen=True)
class Anchored:
    """Channels that are scaled ahead of a norm whose statistics are fixed.

    Maps get a factor and gains its inverse, while β − (μ/σ) γ stays: so what the mean had of the
    gain is made up for. Its generator is no gradient, and there is no charge.

    Args:
        scaling: of the maps and the gains.
        bias: entries ``(m,)`` of β,
        gain: those of their γ, and
        shift: μ/σ, each.
    """

    scaling: Scaling
    bias: Tensor
    gain: Tensor
    shift: Tensor

    @property
    def told(self) -> Told:
        """What it is."""
        return self.scaling.told

    @property
    def num_directions(self) -> int:
        """One for each channel."""
        return self.scaling.size

    @property
    def num_charges(self) -> int:
        """None."""
        return 0

    @property
    def entries(self) -> Tensor:
        """All that is moved."""
        return distinct(torch.cat([self.scaling.entries, self.bias]))

    def draw(self, generator: torch.Generator, size: float) -> Tensor:
        """Logarithms of factors."""
        return self.scaling.draw(generator, size)

    def far(self, generator: torch.Generator) -> Tensor:
        """Those of large ones."""
        return self.scaling.far(generator)

    def _with_bias(self, change: Tensor) -> Tensor:
        """A change of γ brings μ/σ times it to β."""
        return change.index_add(0, self.bias, self.shift * change[self.gain])

    def tangent(self, coefficients: Tensor, theta: Tensor) -> Tensor:
        """Each entry times its rate, and what β gets."""
        return self._with_bias(self.scaling.tangent(coefficients, theta))

    def transposed(self, coefficients: Tensor, theta: Tensor, vector: Tensor) -> Tensor:
        """What β gets goes back to γ first."""
        back = vector.index_add(0, self.gain, self.shift * vector[self.bias])
        return self.scaling.transposed(coefficients, theta, back)

    def moved(self, coefficients: Tensor, theta: Tensor) -> Tensor:
        """Each entry times its factor, and β with what γ has become."""
        return theta + self._with_bias(self.scaling.moved(coefficients, theta) - theta)

    def moments(self, theta: Tensor, vector: Tensor) -> Tensor:
        """⟨v, Xθ⟩ of each channel."""
        back = vector.index_add(0, self.gain, self.shift * vector[self.bias])
        return self.scaling.moments(theta, back)

    def lengths(self, theta: Tensor) -> Tensor:
        """‖Xθ‖ of each channel."""
        channel = torch.zeros(len(theta), dtype=torch.long, device="cpu")
        channel[self.scaling.index] = self.scaling.channel
        own = self.scaling.lengths(theta).square()
        added = (self.shift * theta[self.gain]).square()
        return own.index_add(0, channel[self.gain], added).sqrt()

    def charges(self, theta: Tensor) -> Tensor:
        """None."""
        return theta.new_zeros(0)
