"""Products with a few known vectors on a few examples, by which an operator is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscli import randomness
from hesscli.operators.curvature import Curvature
from hesscli.operators.products import Apply
from hesscli.parameters import Parameters
from hesscli.problem.objective import Objective, Sample, WeightedBatch
from hesscli.sums import inner, is_finite, weighted_sum

FORMS = 2
"""Quadratic forms whose rounding is measured: symmetry takes as many products."""

_PIECE = 1 << 18
"""Entries of a direction that are compared at once."""


class MismatchError(Exception):
    """Something that runs and is wrong."""


def signs(problem: Objective, number: int, parameters: Parameters | None = None) -> Tensor:
    """A Rademacher vector of a fixed stream, for all parameters or some of them."""
    return randomness.at(
        (problem.parameters if parameters is None else parameters).runs,
        randomness.rademacher,
        randomness.key(0x5EED, number),
        dtype=problem.dtype,
        device=problem.device,
    )


@dataclass(frozen=True)
class Crossing:
    """What products with two vectors say of symmetry: vᵀAw, wᵀAv, and the larger length."""

    one: float
    other: float
    length: float


@dataclass(frozen=True)
class Products:
    """A v of a few Rademacher vectors v, rows ``(k, d)``."""

    vectors: Tensor
    values: Tensor

    @property
    def forms(self) -> Tensor:
        """vᵀAv, float64."""
        pairs = zip(self.vectors, self.values, strict=True)
        return torch.tensor([inner(*pair) for pair in pairs], dtype=torch.float64, device="cpu")

    @property
    def crossing(self) -> Crossing:
        """Of the first two."""
        (v, w), (product_v, product_w) = self.vectors[:2], self.values[:2]
        length = float(torch.maximum(product_v.norm(), product_w.norm()))
        return Crossing(inner(v, product_w), inner(w, product_v), length)

    def along(self, direction: Tensor) -> Tensor | None:
        """The product with a unit direction, where that is the first vector's."""
        length = self.vectors[0].norm()
        units = (piece / length for piece in torch.split(self.vectors[0], _PIECE))
        is_first = all(map(torch.equal, torch.split(direction, _PIECE), units))
        return self.values[0] / length if is_first else None


class Product:
    """A v on some examples, without weight decay, for rows ``(k, d)``; its work is counted.

    The graph of examples that are one batch is kept, for as long as nothing moves the weights.

    Args:
        operator: the matrix.
        sample: the examples.
    """

    def __init__(self, operator: Curvature, sample: Sample) -> None:
        self.operator, self.sample = operator, sample
        self._kept: Apply | None = None

    def __call__(self, block: Tensor) -> Tensor:
        """The products with a block of vectors.

        Raises:
            MismatchError: one is not finite.
        """
        graph, each = self.operator.cost
        each, problem = len(block) * each, self.operator.problem

        def product(batch: WeightedBatch) -> Tensor:
            apply, share = self._kept, problem.share_of(batch.count)
            if apply is None:
                apply = self.operator.live(batch)
                self.operator.meter.add(graph, share)
            if len(self.sample.parts) == 1:
                self._kept = apply
            self.operator.meter.add(each, share)
            self.operator.meter.add(problem.vectors(2.0 * len(block)))  # in parts, and as one
            return apply(block)

        with problem.forward_context():
            total = mean(self.sample, block, product)
        if not is_finite(total):
            raise MismatchError("its products are not finite")
        return total

    def with_signs(self) -> Products:
        """With the first few Rademacher vectors."""
        problem = self.operator.problem
        self.operator.meter.add(problem.vectors(2.0 * FORMS))  # by themselves, and as rows
        size = problem.parameters.size
        block = torch.empty(FORMS, size, dtype=problem.dtype, device=problem.device)
        for number, row in enumerate(block):
            row.copy_(signs(problem, number))
        return Products(block, self(block))

    def crossing(self) -> Crossing:
        """Of the same, of which no more than two vectors are there at once."""
        problem, found = self.operator.problem, list[tuple[float, float]]()
        for number in range(2):
            product = self(signs(problem, number)[None])[0]
            found.append((inner(signs(problem, 1 - number), product), float(product.norm())))
        (other, first), (one, second) = found
        return Crossing(one, other, max(first, second))


def mean(sample: Sample, like: Tensor, rows: Callable[[WeightedBatch], Tensor]) -> Tensor:
    """The mean of rows over a sample, which is its one part's own where it has no other."""
    if len(sample.parts) == 1:
        return rows(next(sample.batches()))
    return weighted_sum(sample.batches(), torch.zeros_like(like), lambda batch: [rows(batch)])
