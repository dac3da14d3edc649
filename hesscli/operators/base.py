"""Operators: curvature matrices as weighted means of batch terms, seen only through products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Self, overload

import numpy as np
import torch
from torch import Tensor

from hesscli import world
from hesscli.errors import UnsoundError, UsageError
from hesscli.meter import OnStep, go_on
from hesscli.operators.bias import Bias
from hesscli.operators.curvature import Curvature
from hesscli.operators.preflight import bias_of, checked
from hesscli.operators.products import Apply
from hesscli.parameters import Parameters
from hesscli.problem.objective import WeightedBatch
from hesscli.problem.precision import doubled
from hesscli.results import Preflight
from hesscli.sums import is_finite, shared_sum
from hesscli.vocabulary import Mode

BLOCK_BYTES = 1 << 26
"""Bytes of probes that are held at once (and as many of products)."""
_MADE, _READ = 1, 4
"""Vectors that are made for a product, in half of float64's width in parts and as one, and that
are gone through where it is added to others."""


@dataclass
class LiveTerm:
    """One batch's matrix on one retained graph, which is made by the first product.

    It is made anew where the problem has computed in another type since: autograd then knows its
    leaves no more, and would give zeros.

    The first product must be finite: an operation without a second derivative where it stands,
    such as the norm of 0, spoils all of them.
    """

    batch: WeightedBatch
    operator: Operator
    counted: int | None = None
    """How often the problem had changed its type when its graph, which another process had made
    and counted, was still good."""
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

    @property
    def _share(self) -> float:
        """Work of a pass beside that of one over all kept examples."""
        return self.operator.problem.share_of(self.batch.count)

    def is_made_at(self, retypings: int) -> bool:
        """Whether its graph serves, or will where it is counted, after so many changes of type."""
        return retypings == (self.counted if self._apply is None else self._made)

    def apply(self, block: Tensor, on_step: OnStep = go_on) -> Tensor:
        """Products with a block of vectors: ``(k, d)`` to ``(k, d)``, in the problem's dtype.

        Args:
            block: the vectors.
            on_step: called between two products, where they are not made together; may end it.

        Raises:
            UnsoundError: the first product is not finite.
        """
        operator, share = self.operator, self._share
        with operator.problem.forward_context():
            is_first = self._apply is None
            if self._apply is None or self._made != operator.problem.retypings:
                self._apply = operator.live(self.batch, side_by_side=operator.at_once > 1)
                self._made = operator.problem.retypings
                if self.counted != self._made:
                    operator.meter.add(operator.cost[0], share)
                self.counted = None
            products, made = list[Tensor](), 0
            try:
                for rows in torch.split(block, operator.at_once):
                    if products:
                        on_step()
                    products.append(operator.problem.together(self._apply, rows))
                    made += len(rows)
            finally:
                part = self.batch.count / operator.problem.data.count
                operator.meter.add(made * operator.cost[1], share, products=made * part)
                size = operator.parameters.size
                operator.meter.add(operator.problem.vectors(_MADE * made, _READ * made, size))
        product = torch.cat(products) if len(products) > 1 else products[0]
        if is_first and not is_finite(product):
            raise _not_finite(operator, self.batch, block)
        return product


class Operator(Curvature):
    """A symmetric d × d matrix of a :class:`Problem`: Σ weight_b · A_b + decay · I.

    It is a :class:`Source` to engines. Products are put to the test before the first, once for a
    problem, as those of a command are. ``A @ V`` takes ``(d,)`` or ``(d, k)``, as a tensor or an
    array, and gives the same kind.
    """

    def check(self) -> Preflight:
        """Put the products to the test, unless that was done before.

        Raises:
            UnsoundError: the problem's curvature would mean nothing, or not in this mode.
        """
        return checked(self.problem, type(self), self._wanted)

    @property
    def mode(self) -> Mode:
        """Autodiff mode of the products."""
        return self.check().mode if self._wanted == "auto" else self._wanted

    @property
    def dtype(self) -> torch.dtype:
        """The problem's present type."""
        return self.problem.dtype

    @property
    def device(self) -> torch.device:
        """The device of the problem."""
        return self.problem.device

    @property
    def masses(self) -> Sequence[float]:
        """Weight masses of all batches."""
        return self.problem.masses

    @property
    def counts(self) -> Sequence[int]:
        """Examples in each of all batches."""
        return self.problem.data.counts

    @property
    def indices(self) -> Sequence[int]:
        """The batches that weigh something."""
        return self.problem.indices

    @property
    def sampling_fraction(self) -> float | None:
        """Kept examples over available ones, None where that is not known."""
        return self.problem.sampling_fraction

    @property
    def independent(self) -> bool:
        """Whether examples are independent of each other."""
        return self.problem.couples_examples is None

    @property
    def shape(self) -> tuple[int, int]:
        """Its rows and columns, (d, d)."""
        return self.parameters.size, self.parameters.size

    def batches(self, among: Sequence[int] | None = None) -> Iterator[LiveTerm]:
        """The terms, one at a time: a term's graph is freed when the next is taken.

        Args:
            among: the numbers of some batches; default all that weigh something.

        Raises:
            UnsoundError: the products did not pass their checks.
        """
        self.check()
        for index in self.indices if among is None else among:
            yield LiveTerm(self.problem.batch(index), self)

    def shared(self) -> Iterator[LiveTerm]:
        """This rank's terms, of batches that are best computed as one: for sums over all.

        Raises:
            UnsoundError: the products did not pass their checks.
        """
        self.check()
        for group in world.share(self.problem.joint()):
            yield LiveTerm(self.problem.batch(*group), self)

    def restrict(self, *patterns: str) -> Operator:
        """The diagonal block of the parameters that globs select, as ``--params`` takes them.

        Raises:
            UsageError: a glob matches no parameter, or none is left.
        """
        return self.block(self.parameters.select(*patterns))

    def block(self, parameters: Parameters) -> Self:
        """The diagonal block of some parameters; its work is counted with this operator's."""
        return self._as(parameters, in_full=self._in_full)

    def in_full(self) -> Self:
        """The same matrix with products in the type of the weights, without autocast."""
        return self if self.autocast is None else self._as(self.parameters, in_full=True)

    def bias(self, on_step: OnStep = go_on) -> Bias | None:
        """What autocast does to the products, measured once for a matrix; None where there is none.

        Args:
            on_step: called after each product that is made to find out; may end it.
        """
        return bias_of(self, on_step)

    def _as(self, parameters: Parameters, *, in_full: bool) -> Self:
        """The same with other settings; its work is counted with this one's."""
        return type(self)(
            self.problem,
            parameters=parameters,
            mode=self._wanted,
            meter=self.meter,
            in_full=in_full,
        )

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
        """Products with rows ``(k, d)``, summed over the batches in float64.

        Of many ranks each makes those of its share of the batches, and all have the sum.
        """
        differs = self.mode == "finite-difference"
        with doubled(self.problem) if differs else nullcontext():
            rows = block.to(self.problem.device, self.problem.dtype)
            size = self.block_size
            blocks = [rows[start : start + size] for start in range(0, len(rows), size)]
            total = torch.zeros_like(rows, dtype=torch.float64)
            if self.decay:
                total.add_(rows, alpha=self.decay)
            with self.meter.pooled():
                return shared_sum(self.shared(), total, lambda term: map(term.apply, blocks))

    def foreseen(self, groups: Sequence[Sequence[int]], probes: int) -> float:
        """Gradients that so many products take with each of some terms, on a graph of its own.

        Args:
            groups: the numbers of the batches of each term.
            probes: for each term a product.
        """
        problem, (graph, product) = self.problem, self.cost
        vectors = probes * problem.vectors(_MADE, _READ, self.parameters.size)
        return problem.share_in(groups) * (graph + probes * product) + len(groups) * vectors

    @property
    def block_size(self) -> int:
        """Vectors that are handed to a term at once."""
        bytes_each: int = self.parameters.size * self.problem.dtype.itemsize
        return max(1, min(32, BLOCK_BYTES // max(1, bytes_each)))

    def to_dense(self) -> Tensor:
        """The whole matrix from unit vectors, float64 ``(d, d)`` on the CPU; for small d."""
        identity = torch.eye(self.parameters.size, dtype=self.problem.dtype, device="cpu")
        return self.apply(identity).T.contiguous().cpu()


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
            return is_finite(operator.live(problem.batch(batch.index))(block.double()))
    except Exception:  # of any kind: the code is the user's, made for another type
        return False
