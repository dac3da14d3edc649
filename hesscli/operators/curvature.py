"""A curvature matrix as its batches' functions, and the products that a mode makes of them."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from hesscli.meter import Meter
from hesscli.operators.kernels import only, twice_differentiable
from hesscli.operators.products import (
    BATCHED,
    BUILDERS,
    FORMS,
    SIDE_BY_SIDE,
    Apply,
    Forms,
    Kind,
    Tensors,
    work,
)
from hesscli.parameters import Parameters
from hesscli.problem.objective import WeightedBatch
from hesscli.problem.problem import Problem
from hesscli.vocabulary import Mode


class Curvature(ABC):
    """A symmetric d × d matrix of a :class:`Problem`, one batch at a time and not put to the test.

    Args:
        problem: model, loss and frozen examples.
        parameters: the rows and columns; default all trainable ones.
        mode: autodiff mode of the products, which must hold; ``auto`` takes the cheapest that does.
        meter: counts the products; default a new one, which blocks of the operator share.
        in_full: products in the type of the weights, even where others are made under autocast.
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
        meter: Meter | None = None,
        in_full: bool = False,
    ) -> None:
        self.problem, self._wanted, self._in_full = problem, mode, in_full
        self.parameters = problem.parameters if parameters is None else parameters
        self.meter = Meter() if meter is None else meter

    @property
    @abstractmethod
    def mode(self) -> Mode:
        """Autodiff mode of the products."""

    @abstractmethod
    def parts(self, batch: WeightedBatch) -> tuple[Any, ...]:
        """One batch's function, the tensors, and what stands between J and Jᵀ if anything."""

    def live(self, batch: WeightedBatch, *, side_by_side: bool = False) -> Apply:
        """Products with one batch's matrix, without weight decay, in this operator's mode.

        Args:
            batch: the examples.
            side_by_side: double backward goes back once for all vectors of a block.
        """
        together = side_by_side and self.mode == "double-backward"
        build = SIDE_BY_SIDE[self.kind] if together else BUILDERS[self.kind][self.mode]
        with self._surroundings():
            apply = build(*self.parts(batch))

        def in_the_same(block: Tensor) -> Tensor:
            with self._surroundings():  # what is run again is run in the same
                return apply(block)

        return in_the_same

    def live_forms(self, batch: WeightedBatch) -> Forms:
        """Quadratic forms of one batch's matrix, likewise, by double backward."""
        with self._surroundings():
            forms = FORMS[self.kind](*self.parts(batch))

        def in_the_same(chosen: slice, block: Tensor) -> Tensor:
            with self._surroundings(), only(self.parameters.tensors[chosen]):
                return forms(chosen, block)

        return in_the_same

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        """Kernels and types that the mode's products are made in."""
        with ExitStack() as stack:
            if self.mode == "double-backward":
                stack.enter_context(twice_differentiable())
            if self.autocast is not None:
                stack.enter_context(self.problem.mixed())
            stack.enter_context(self.problem.recomputing())
            yield

    @property
    def autocast(self) -> torch.dtype | None:
        """The type that products are made in, where it is not that of the weights."""
        return None if self._in_full else self.problem.autocast

    @property
    def cost(self) -> tuple[float, float]:
        """Gradients for a batch's graph, and for each product."""
        again = bool(self.problem.blocks)
        return work(self.kind, self.mode, self.problem.way_back, again=again)

    @property
    def at_once(self) -> int:
        """Vectors of a block that are handed to the model together; it may take fewer itself."""
        if (self.kind, self.mode) in BATCHED:
            return sys.maxsize
        return (self.mode == "double-backward" and self.problem.together.most) or 1

    @property
    def decay(self) -> float:
        """Weight decay: the multiple of the identity that is added to the mean."""
        return self.problem.weight_decay

    def named(self, theta: Tensors | None) -> dict[str, Tensor] | None:
        """Tensors for this operator's parameters by name, as the problem's functions take them."""
        return None if theta is None else dict(zip(self.parameters.names, theta, strict=True))


Make = Callable[..., Curvature]
"""Makes an operator anew, in the mode that is tried and the problem's present type."""
