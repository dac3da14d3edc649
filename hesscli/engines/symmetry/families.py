"""Families of transformations: what each does to a flat vector of parameters, near and far.

A family is a Lie group that acts on some of the entries; its generators X are linear maps, or the
addition of a constant. Where the loss is invariant, ⟨∇L, Xθ⟩ = 0 and H Xθ = −Xᵀ∇L for each of
them, on every batch. A generator that is symmetric has a charge, θᵀXθ, that gradient flow keeps;
one that only turns entries into each other has none (Noether 1918; Kunin et al., ICLR 2021;
Marcotte, Gribonval, Peyré, arXiv 2307.00144).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from hesscli.engines.symmetry.seen import distinct

_FAR = 5.0
"""Logarithm of a factor that goes far."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a family is, in words.

    Attributes:
        name: of its kind.
        layers: that it acts on, in the model's order.
        causes: what is on its way that would break it, if anything is.
        eps: a constant that breaks it, though ever less as the scale grows.
    """

    name: str
    layers: tuple[str, ...]
    causes: tuple[str, ...] = ()
    eps: bool = False


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Independent normal numbers."""
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Independent signs, float64."""
    return 2.0 * torch.randint(0, 2, shape, generator=generator, device="cpu").double() - 1


class Family(Protocol):
    """A group that acts on a flat vector, and its generators one by one."""

    @property
    def told(self) -> Told:
        """What it is."""

    @property
    def num_directions(self) -> int:
        """Generators, and so null directions where it holds."""

    @property
    def num_charges(self) -> int:
        """Numbers that gradient flow keeps where it holds."""

    @property
    def entries(self) -> Tensor:
        """All that it acts on, each once."""

    def draw(self, generator: torch.Generator, size: float) -> Tensor:
        """Coefficients of a random element of the algebra, about so large each."""

    def far(self, generator: torch.Generator) -> Tensor:
        """Those of one that goes as far as float64 lets it be told from rounding."""

    def tangent(self, coefficients: Tensor, theta: Tensor) -> Tensor:
        """Xθ."""

    def transposed(self, coefficients: Tensor, theta: Tensor, vector: Tensor) -> Tensor:
        """(∂Xθ/∂θ)ᵀ v."""

    def moved(self, coefficients: Tensor, theta: Tensor) -> Tensor:
        """exp(X) θ."""

    def moments(self, theta: Tensor, vector: Tensor) -> Tensor:
        """⟨v, Xθ⟩ of each generator, flat."""

    def lengths(self, theta: Tensor) -> Tensor:
        """‖Xθ‖ of each generator, in the order of :meth:`moments`."""

    def charges(self, theta: Tensor) -> Tensor:
        """What gradient flow keeps, flat; linear in θ for translations, else quadratic."""


# -- Channels that are scaled, by powers of one factor each ----------------------------------------


@dataclass(frozen=True)
class Scaling:
    """Each channel's entries times powers of a factor of its own.

    Args:
        told: what it is.
        index: entries ``(m,)``.
        channel: of each.
        exponent: of its channel's factor, each.
        size: channels.
    """

    told: Told
    index: Tensor
    channel: Tensor
    exponent: Tensor
    size: int

    @property
    def num_directions(self) -> int:
        """One for each channel."""
        return self.size

    @property
    def num_charges(self) -> int:
        """One for each channel."""
        return self.size

    @property
    def entries(self) -> Tensor:
        """All that it acts on."""
        return distinct(self.index)

    def draw(self, generator: torch.Generator, size: float) -> Tensor:
        """Logarithms of factors."""
        return normal((self.size,), generator) * size

    def far(self, generator: torch.Generator) -> Tensor:
        """Factors of about 150, and as much below 1: what clips is met somewhere."""
        each = signs((self.size,), generator)
        return -_FAR * each * signs((), generator)  # a single one goes either way

    def _rate(self, coefficients: Tensor, like: Tensor) -> Tensor:
        rates = coefficients[self.channel] * self.exponent
        return torch.zeros_like(like).index_add_(0, self.index, rates)

    def tangent(self, coefficients: Tensor, theta: Tensor) -> Tensor:
        """Each entry times its rate."""
        return self._rate(coefficients, theta) * theta

    def transposed(self, coefficients: Tensor, _theta: Tensor, vector: Tensor) -> Tensor:
        """The same: it is diagonal."""
        return self._rate(coefficients, vector) * vector

    def moved(self, coefficients: Tensor, theta: Tensor) -> Tensor:
        """Each entry times its factor."""
        return self._rate(coefficients, theta).exp() * theta

    def _by_channel(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.size).index_add_(0, self.channel, values)

    def moments(self, theta: Tensor, vector: Tensor) -> Tensor:
        """⟨v, Xθ⟩ of each channel."""
        return self._by_channel(self.exponent * theta[self.index] * vector[self.index])

    def lengths(self, theta: Tensor) -> Tensor:
        """‖Xθ‖ of each channel."""
        return self._by_channel((self.exponent * theta[self.index]).square()).sqrt()

    def charges(self, theta: Tensor) -> Tensor:
        """Σ exponent · θ² of each channel: ‖θ_in‖² − k ‖θ_out‖²."""
        return self._by_channel(self.exponent * theta[self.index].square())


# -- Channels that are mixed with each other -------------------------------------------------------


Algebra = Literal["general", "rotation"]


@dataclass(frozen=True)
class Mixing:
    """Blocks of channels under invertible matrices, which other entries undo.

    Args:
        told: what it is.
        ahead: entries ``(blocks, r, ·)`` that become M θ.
        behind: those that become M⁻ᵀ θ.
        algebra: all matrices, or the rotations of planes (r = 2).
    """

    told: Told
    ahead: tuple[Tensor, ...]
    behind: tuple[Tensor, ...]
    algebra: Algebra = "general"

    @property
    def _shape(self) -> tuple[int, int]:
        blocks, rank = self.ahead[0].shape[:2]
        return blocks, rank

    @property
    def num_directions(self) -> int:
        """r² a block, and one a plane."""
        blocks, rank = self._shape
        return blocks * (1 if self.algebra == "rotation" else rank * rank)

    @property
    def num_charges(self) -> int:
        """Those of symmetric generators: r(r + 1)/2 a block, and none of a rotation."""
        blocks, rank = self._shape
        return 0 if self.algebra == "rotation" else blocks * rank * (rank + 1) // 2

    @property
    def entries(self) -> Tensor:
        """All that it acts on."""
        return distinct(torch.cat([part.reshape(-1) for part in (*self.ahead, *self.behind)]))

    def draw(self, generator: torch.Generator, size: float) -> Tensor:
        """Random matrices ``(blocks, r, r)`` of the algebra."""
        blocks, rank = self._shape
        drawn = normal((blocks, rank, rank), generator) * (size / math.sqrt(rank))
        return drawn - drawn.transpose(1, 2) if self.algebra == "rotation" else drawn

    def far(self, generator: torch.Generator) -> Tensor:
        """Larger matrices."""
        return self.draw(generator, 1.0)

    def _applied(self, matrices: Tensor, inverse: Tensor, vector: Tensor) -> Tensor:
        """What ``ahead`` gets from ``matrices``, and ``behind`` from ``inverse``."""
        result = torch.zeros_like(vector)
        for parts, matrix in ((self.ahead, matrices), (self.behind, inverse)):
            for part in parts:
                result.index_add_(0, part.reshape(-1), (matrix @ vector[part]).reshape(-1))
        return result

    def tangent(self, coefficients: Tensor, theta: Tensor) -> Tensor:
        """M θ, and −Mᵀ θ."""
        return self._applied(coefficients, -coefficients.mT, theta)

    def transposed(self, coefficients: Tensor, _theta: Tensor, vector: Tensor) -> Tensor:
        """Mᵀ v, and −M v."""
        return self._applied(coefficients.mT, -coefficients, vector)

    def moved(self, coefficients: Tensor, theta: Tensor) -> Tensor:
        """exp(M) θ, and its inverse transposed."""
        grown = self._applied(
            torch.linalg.matrix_exp(coefficients), torch.linalg.matrix_exp(-coefficients.mT), theta
        )
        result, entries = theta.clone(), self.entries
        result[entries] = grown[entries]
        return result

    def generator(self, number: int) -> Tensor:
        """The coefficients of one of them."""
        blocks, rank = self._shape
        result = torch.zeros(blocks, rank, rank, dtype=torch.float64, device="cpu")
        if self.algebra == "rotation":
            result[number, 0, 1], result[number, 1, 0] = 1.0, -1.0
        else:
            result.view(-1)[number] = 1.0
        return result

    def moments(self, theta: Tensor, vector: Tensor) -> Tensor:
        """⟨v, Xθ⟩ of each matrix with a single one, or of each rotation."""
        ahead = (vector[part] @ theta[part].mT for part in self.ahead)
        behind = (theta[part] @ vector[part].mT for part in self.behind)
        return self._read(total_of(ahead) - total_of(behind))

    def _read(self, matrices: Tensor) -> Tensor:
        if self.algebra == "rotation":
            return (matrices[:, 0, 1] - matrices[:, 1, 0]).reshape(-1)
        return matrices.reshape(-1)

    def lengths(self, theta: Tensor) -> Tensor:
        """‖Xθ‖ of each."""
        ahead = total_of(theta[part].square().sum(-1) for part in self.ahead)
        behind = total_of(theta[part].square().sum(-1) for part in self.behind)
        if self.algebra == "rotation":
            return (ahead + behind).sum(-1).sqrt()
        return (ahead[:, None, :] + behind[:, :, None]).sqrt().reshape(-1)

    def charges(self, theta: Tensor) -> Tensor:
        """The upper triangles of Σ θθᵀ of those ahead less those behind."""
        rank = self._shape[1]
        if self.algebra == "rotation":
            return theta.new_zeros(0)
        ahead = total_of(theta[part] @ theta[part].mT for part in self.ahead)
        behind = total_of(theta[part] @ theta[part].mT for part in self.behind)
        rows, columns = torch.triu_indices(rank, rank, device="cpu")
        return (ahead - behind)[:, rows, columns].reshape(-1)


def total_of(parts: Iterable[Tensor]) -> Tensor:
    """Their sum."""
    return torch.stack(list(parts)).sum(0)


# -- Directions along which a constant is added ----------------------------------------------------


@dataclass(frozen=True)
class Translation:
    """One number for each direction, added to all of its entries.

    Args:
        told: what it is.
        groups: entries ``(directions, ·)`` of directions of equal size.
        signs: of the entries of each group's directions; None where all are 1.
    """

    told: Told
    groups: tuple[Tensor, ...]
    signs: tuple[Tensor, ...] | None = None

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor | float]]:
        signs = self.signs or (1.0,) * len(self.groups)
        return zip(self.groups, signs, strict=True)

    @property
    def num_directions(self) -> int:
        """All of them."""
        return sum(len(group) for group in self.groups)

    @property
    def num_charges(self) -> int:
        """One for each direction."""
        return self.num_directions

    @property
    def entries(self) -> Tensor:
        """All that it acts on."""
        return distinct(torch.cat([group.reshape(-1) for group in self.groups]))

    def draw(self, generator: torch.Generator, size: float) -> Tensor:
        """What is added along each."""
        return normal((self.num_directions,), generator) * size

    def far(self, generator: torch.Generator) -> Tensor:
        """Larger constants."""
        return self.draw(generator, 10.0)

    def tangent(self, coefficients: Tensor, theta: Tensor) -> Tensor:
        """The constants, whatever θ is."""
        result, sizes = torch.zeros_like(theta), [len(group) for group in self.groups]
        parts = torch.split(coefficients, sizes)
        for (group, sign), added in zip(self._pairs(), parts, strict=True):
            numbers = (added[:, None] * sign).expand_as(group)
            result.index_add_(0, group.reshape(-1), numbers.reshape(-1))
        return result

    def transposed(self, _coefficients: Tensor, _theta: Tensor, vector: Tensor) -> Tensor:
        """0: the tangent does not depend on θ."""
        return torch.zeros_like(vector)

    def moved(self, coefficients: Tensor, theta: Tensor) -> Tensor:
        """θ with the constants."""
        return theta + self.tangent(coefficients, theta)

    def moments(self, _theta: Tensor, vector: Tensor) -> Tensor:
        """The sum of v along each."""
        return torch.cat([(vector[group] * sign).sum(-1) for group, sign in self._pairs()])

    def lengths(self, theta: Tensor) -> Tensor:
        """The root of its number of entries."""
        return torch.cat([theta.new_full((len(g),), g.shape[1] ** 0.5) for g in self.groups])

    def charges(self, theta: Tensor) -> Tensor:
        """The sum of θ along each, by its signs."""
        return self.moments(theta, theta)


def rank_of(families: Sequence[Family], theta: Tensor, most: int = 1 << 24) -> int | None:
    """How many of all their directions are independent at θ; None where that is too much work.

    Args:
        families: that hold.
        theta: where.
        most: numbers that their tangents may have.
    """
    total = sum(family.num_directions for family in families)
    if total * len(theta) > most:
        return None
    if not total:
        return 0
    rows = [row for family in families for row in tangents(family, theta)]
    stacked = torch.stack(rows)
    scaled = stacked / stacked.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return int(torch.linalg.matrix_rank(scaled, rtol=1e-9))


def tangents(family: Family, theta: Tensor) -> list[Tensor]:
    """Xθ of each generator, in the order of moments."""
    like = family.draw(torch.Generator().manual_seed(0), 1.0)
    single = getattr(family, "generator", None) or (lambda number: _unit(like, number))
    return [family.tangent(single(number), theta) for number in range(family.num_directions)]


def _unit(like: Tensor, number: int) -> Tensor:
    result = torch.zeros_like(like)
    result.view(-1)[number] = 1.0
    return result
