"""Krylov-deflated probes: the large directions exactly, random vectors for what is left.

With Q an orthonormal basis, diag A = diag(A QQᵀ) + diag(A (I − QQᵀ)): the first part is
Σ_i (A q_i) ⊙ q_i, from products that finding Q has made already; probes of the second have only
‖A (I − QQᵀ)‖ for noise, which is small once Q holds the outliers (Chen & Hallman 2023,
"Krylov-aware stochastic trace estimation", arXiv 2205.01736; Meyer et al. 2021, Hutch++, arXiv
2010.09649). Both are linear in A, so that each batch has its own share of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from hesscli.engines.entries import Stream
from hesscli.engines.hutchinson.designs import Design
from hesscli.engines.hutchinson.statistics import Array
from hesscli.engines.lanczos import Lanczos
from hesscli.engines.layers import LayerSums
from hesscli.operators.base import Operator, Term
from hesscli.parameters import Parameters


class Deflated(Design):
    """v ⊙ A (I − QQᵀ) v with Q from a few steps of Lanczos' method.

    Args:
        operator: the matrix.
        steps: of Lanczos' method, a product over all the data each.
        seed: of its start.
        stream: takes the entries that Q gives, where they are wanted.
        whole: whose layers the tables' columns are.
    """

    name = "deflated"

    def __init__(
        self,
        operator: Operator,
        steps: int,
        seed: int,
        stream: Stream | None,
        whole: Parameters,
    ) -> None:
        self.operator, self.steps, self.seed, self.stream = operator, steps, seed, stream
        self._sums = LayerSums(operator.parameters, whole)
        self._offsets: dict[int, Array] = {}
        self._basis: Tensor | None = None

    def prepare(self) -> Iterator[None]:
        """Make the basis, once; what a run that was broken off has left is dropped."""
        if self._basis is not None:
            return
        self._offsets.clear()
        if self.stream is not None:
            self.stream.drop_round()
        lanczos = Lanczos(
            self._product,
            self.operator.parameters.size,
            seed=self.seed,
            dtype=self.operator.problem.dtype,
            device=self.operator.problem.device,
            reserve=self.steps,
        )
        for _ in range(min(self.steps, self.operator.parameters.size)):
            lanczos.step()
            yield
        if self.stream is not None:
            self.stream.close_round(1)
        self._basis = lanczos.basis

    def estimates(self, term: Term, block: Tensor) -> Tensor:
        """One product a probe."""
        assert self._basis is not None  # prepared
        basis = self._basis.to(block.dtype)
        return block * term.apply(block - (block @ basis.T) @ basis)

    def offset(self, batch: int) -> Array:
        """Traces of a batch's A QQᵀ, by layer and in all."""
        return self._offsets[batch]

    def _product(self, vector: Tensor) -> Tensor:
        """A q without weight decay; each batch's part of the diagonal is kept on the way."""
        problem = self.operator.problem
        row = vector[None].to(problem.dtype)
        total = torch.zeros_like(vector)
        for term in self.operator.batches():
            product = term.apply(row).double()
            part = product * vector
            offset = self._sums(part)[0].cpu().numpy()
            self._offsets[term.index] = self._offsets.get(term.index, np.zeros(())) + offset
            if self.stream is not None:
                self.stream.add_exact(term.index, term.weight, part[0])
            total.add_(product[0], alpha=term.weight)
        return total
