"""Operators: curvature matrices as weighted means of batch terms, seen only through products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from hesscli.errors import UnsoundError, UsageError
from hesscli.operators.kernels import twice_differentiable
from hesscli.operators.products import BUILDERS, COST, Apply, Kind, Tensors
from hesscli.parameters import Parameters
from hesscli.problem.precision import doubled
from hesscli.problem.problem import Problem, WeightedBatch
from hesscli.results import Mode, Preflight

BLOCK_BYTES = 1 << 26
"""Bytes of probes that are held at once (and as many of products)."""


@dataclass
class Meter:
    """Work so far, in full-data units: forward 1/3, backward 2/3, by its share of the data."""

    products: float = 0.0
    gradients: float = 0.0


@dataclass
class Term:
    """One batch's matrix on one retained graph, which is made by the first product.

    It is made anew where the problem has computed in another type since: autograd then knows its
    leaves no more, and would give zeros.

    The first product must be finite: an operation without a second derivative where it stands,
    such as the norm of 0, spoils all of them.
    """

    batch: WeightedBatch
    operator: Operator
    _apply: Apply | None = field(default=None, repr=False)
    _made: int = field(default=0, repr=False)

    @property
    def index(self) -> int:
        """The batch's number."""
        return self.batch.index

    @property
    def weight(self) -> float:
        """The batch's share of the weight mass."""
        return self.batch.weight

    def apply(self, block: Tensor) -> Tensor:
        """Products with a block of vectors: ``(k, d)`` to ``(k, d)``, in the problem's dtype.

        Raises:
            UnsoundError: the first product is not finite.
        """
        operator, share = self.operator, self.batch.count / self.operator.problem.data.count
        with operator.problem.forward_context():
            is_first = self._apply is None
            if self._apply is None or self._made != operator.problem.retypings:
                self._apply, self._made = operator.live(self.batch), operator.problem.retypings
                operator.meter.gradients += operator.cost[0] * share
            product = self._apply(block)
        if is_first and not _is_finite(product):
            raise _not_finite(operator, self.batch, block)
        operator.meter.products += len(block) * share
        operator.meter.gradients += len(block) * operator.cost[1] * share
        return product


class Operator(ABC):
    """A symmetric d × d matrix of a :class:`Problem`: Σ weight_b · A_b + decay · I.

    Args:
        problem: model, loss and frozen examples.
        parameters: the rows and columns; default all trainable ones.
        mode: autodiff mode of the products, which must hold; ``auto`` takes the cheapest that does.

    Products are put to the test before the first, once for a problem, as those of a command are.
    ``A @ V`` takes ``(d,)`` or ``(d, k)``, as a tensor or an array, and gives the same kind.
    """

    name: str
    kind: Kind
    per_example = False
    """Whether it is made of the gradients of single examples, which coupled ones do not have."""

    def __init__(
        self,
        problem: Problem,
        *,
        parameters: Parameters | None = None,
        mode: Mode | Literal["auto"] = "auto",
    ) -> None:
        self.problem, self._wanted = problem, mode
        self.parameters = problem.parameters if parameters is None else parameters
        self.meter = Meter()

    def check(self) -> Preflight:
        """Put the products to the test, unless that was done before.

        Raises:
            UnsoundError: the problem's curvature would mean nothing, or not in this mode.
        """
        from hesscli.operators.preflight import checked  # which makes operators itself

        return checked(self.problem, type(self), self._wanted)

    @property
    def mode(self) -> Mode:
        """Autodiff mode of the products."""
        return self.check().mode if self._wanted == "auto" else self._wanted

    @abstractmethod
    def parts(self, batch: WeightedBatch) -> tuple[Any, ...]:
        """One batch's function, the tensors, and what stands between J and Jᵀ if anything."""

    def live(self, batch: WeightedBatch) -> Apply:
        """Products with one batch's matrix, without weight decay, in this operator's mode."""
        build = BUILDERS[self.kind][self.mode]
        if self.mode != "double-backward":
            return build(*self.parts(batch))
        with twice_differentiable():
            apply = build(*self.parts(batch))

        def under_the_same_kernels(block: Tensor) -> Tensor:
            with twice_differentiable():  # activation checkpointing runs the forward again
                return apply(block)

        return under_the_same_kernels

    @property
    def cost(self) -> tuple[float, float]:
        """Gradients for a batch's graph, and for each product."""
        return COST[self.kind][self.mode]

    @property
    def shape(self) -> tuple[int, int]:
        """(d, d)."""
        return self.parameters.size, self.parameters.size

    @property
    def decay(self) -> float:
        """Weight decay: the multiple of the identity that is added to the mean."""
        return self.problem.weight_decay

    def batches(self) -> Iterator[Term]:
        """The terms, one at a time: a term's graph is freed when the next is taken.

        Raises:
            UnsoundError: the products did not pass their checks.
        """
        self.check()
        for batch in self.problem.batches():
            yield Term(batch, self)

    def restrict(self, pattern: str) -> Operator:
        """The diagonal block of the parameters that a glob selects.

        Raises:
            UsageError: no parameter or layer matches.
        """
        return self.block(self.parameters.select(pattern))

    def block(self, parameters: Parameters) -> Operator:
        """The diagonal block of some parameters."""
        return type(self)(self.problem, parameters=parameters, mode=self._wanted)

    @overload
    def __matmul__(self, vectors: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, vectors: np.ndarray) -> np.ndarray: ...
    def __matmul__(self, vectors: Tensor | np.ndarray) -> Tensor | np.ndarray:
        if isinstance(vectors, np.ndarray):
            return (self @ torch.from_numpy(vectors.copy())).numpy()
        if vectors.dim() not in (1, 2) or len(vectors) != self.parameters.size:
            raise UsageError(
                f"the operator is {self.shape[0]} × {self.shape[1]}",
                f"vectors of shape {tuple(vectors.shape)}",
                f"({self.shape[0]},) or ({self.shape[0]}, k)",
            )
        exact = vectors if vectors.is_floating_point() else vectors.double()
        products = self.apply(exact.T if exact.dim() == 2 else exact[None])
        return (products.T if exact.dim() == 2 else products[0]).to(exact)

    def apply(self, block: Tensor) -> Tensor:
        """Products with rows ``(k, d)``, summed over the batches in float64."""
        differs = self.mode == "finite-difference"
        with doubled(self.problem) if differs else nullcontext():
            rows = block.to(self.problem.device, self.problem.dtype)
            total = self.decay * rows.double()
            for term in self.batches():
                for start in range(0, len(rows), self.block_size):
                    part = slice(start, start + self.block_size)
                    total[part] += term.weight * term.apply(rows[part]).double()
        return total

    @property
    def block_size(self) -> int:
        """Vectors that are handed to a term at once."""
        bytes_each: int = self.parameters.size * self.problem.dtype.itemsize
        return max(1, min(32, BLOCK_BYTES // max(1, bytes_each)))

    def to_dense(self) -> Tensor:
        """The whole matrix from unit vectors, float64 ``(d, d)`` on the CPU; for small d."""
        identity = torch.eye(self.parameters.size, dtype=self.problem.dtype)
        return self.apply(identity).T.contiguous().cpu()

    def named(self, theta: Tensors | None) -> dict[str, Tensor] | None:
        """Tensors for this operator's parameters by name, as the problem's functions take them."""
        return None if theta is None else dict(zip(self.parameters.names, theta, strict=True))


def _is_finite(product: Tensor) -> bool:
    """Whether all of it is, in one pass that keeps nothing."""
    return bool(torch.isfinite(product.sum(dtype=torch.float64)))


def _not_finite(operator: Operator, batch: WeightedBatch, block: Tensor) -> UnsoundError:
    """The refusal of products with NaN or infinity, and what would make them finite."""
    got = f"NaN or infinity on batch {batch.index}, though loss and gradient are finite"
    if operator.mode == "finite-difference":
        hint = "a checkpoint from before the run diverged"
    elif _is_finite_in_float64(operator, batch, block):
        hint = "--dtype float64: it overflows in a narrower type"
    else:
        hint = (
            "--mode finite-difference, which takes no second derivative, or no norm or root of "
            "exactly 0 in model or loss"
        )
    return UnsoundError("a curvature product is not finite", got, hint)


def _is_finite_in_float64(operator: Operator, batch: WeightedBatch, block: Tensor) -> bool:
    problem = operator.problem
    if problem.dtype == torch.float64:
        return False
    try:
        with doubled(problem), problem.forward_context():
            return _is_finite(operator.live(problem.batch(batch.index))(block.double()))
    except Exception:  # of any kind: the code is the user's, made for another type
        return False
