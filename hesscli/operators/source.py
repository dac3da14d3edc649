"""What engines know of a matrix: a weighted mean of terms, seen through products and no more.

An operator of a problem is such a source, and so is anything that makes products on a graph of
its own, as an optimizer's step has one: a single batch of weight mass 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hesscli.meter import Meter, OnStep, go_on
from hesscli.operators.bias import Bias
from hesscli.parameters import Parameters


class Term(Protocol):
    """One batch's matrix."""

    @property
    def index(self) -> int:
        """The batch's number."""

    @property
    def weight(self) -> float:
        """The batch's share of the weight mass."""

    def apply(self, block: Tensor, on_step: OnStep = go_on) -> Tensor:
        """Products with a block of vectors, ``(k, d)`` to ``(k, d)``.

        Args:
            block: the vectors.
            on_step: called between two products, where they are not made together; may end it.
        """


class Source(Protocol):
    """A symmetric d × d matrix: the mean of its batches' terms by their mass, and decay · I."""

    @property
    def parameters(self) -> Parameters:
        """The parameters whose rows and columns these are."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of vectors and products."""

    @property
    def device(self) -> torch.device:
        """Where vectors and products are."""

    @property
    def decay(self) -> float:
        """The multiple of the identity, which is in no term."""

    @property
    def meter(self) -> Meter:
        """Counts the products."""

    @property
    def block_size(self) -> int:
        """Vectors that a term is best given at once."""

    @property
    def masses(self) -> Sequence[float]:
        """The weight mass of every batch, with or without a term."""

    @property
    def counts(self) -> Sequence[int]:
        """The examples in every batch."""

    @property
    def indices(self) -> Sequence[int]:
        """The batches that weigh something, and so have a term."""

    @property
    def sampling_fraction(self) -> float | None:
        """The batches' examples over all that there are; None where nobody knows how many."""

    @property
    def independent(self) -> bool:
        """Whether no example depends on the others of its batch."""

    def batches(self, among: Sequence[int] | None = None) -> Iterator[Term]:
        """The terms of some batches, or of all that have one, in their order."""

    def in_full(self) -> Source:
        """The same matrix with products in the type of the weights, without autocast."""

    def bias(self, on_step: OnStep = go_on) -> Bias | None:
        """What autocast does to the products; None where there is none.

        Args:
            on_step: called after each product that is made to find out; may end it.
        """


class Columns(Protocol):
    """Signed columns s of A = Σ ± s sᵀ, the middle of Jᵀ A J, for each example of a pass."""

    @property
    def num_columns(self) -> int:
        """How many, all of them."""

    @property
    def most(self) -> int:
        """How many columns may be asked for one by one, at most."""

    def column(self, index: int) -> tuple[float, Tensor]:
        """The sign and one column of every example, in the outputs' shape."""

    def draw(self, stream: int, first: int = 0) -> list[tuple[float, Tensor]]:
        """Random columns, E[Σ ± s sᵀ] = A; ``first`` is the first example's place in a stream."""


class Pass(Protocol):
    """Some examples on one graph."""

    @property
    def columns(self) -> Columns:
        """Columns of A at the examples' outputs."""

    @property
    def block_size(self) -> int:
        """Columns that are best squared at once."""

    def pull(self, columns: Sequence[Tensor]) -> Any:
        """Backward passes from some columns, for :meth:`norms` and :meth:`squares`."""

    def norms(self, pulled: Any) -> Tensor:
        """Σ over columns s of ‖J_iᵀ s_i‖² by example and parameter, float64 ``(N, tensors)``."""

    def squares(self, pulled: Any) -> Tensor:
        """Σ over examples and columns s of (J_iᵀ s_i)², flat float64 ``(d,)``."""


class Passes(Protocol):
    """The examples of a matrix Jᵀ A J, batch by batch."""

    @property
    def columns(self) -> Columns:
        """Columns of A for a few examples, which say how many there are."""

    def relative_rounding(self) -> float | None:
        """Error of a layer's traces relative to their size, at most; None where nobody knows."""

    def of(self, batches: Sequence[int]) -> Iterator[tuple[int, Pass]]:
        """Parts of a batch, or of some as one, each with the place of its first example."""

    def joint(self, among: Sequence[int]) -> Sequence[tuple[int, ...]]:
        """Which of some batches are best computed as one."""


class ByExample(Source, Protocol):
    """A matrix Jᵀ A J whose single examples can be told apart."""

    def passes(self) -> Passes:
        """Passes over its examples.

        Raises:
            UsageError: they have no gradient of their own, or A is not known.
        """
