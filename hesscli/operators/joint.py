"""A matrix by fewer and larger batches than its own, each of which reads all weights but once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from hesscli.meter import Meter, OnStep, go_on
from hesscli.operators.base import LiveTerm, Operator
from hesscli.operators.bias import Bias
from hesscli.parameters import Parameters


class Joint:
    """An operator's :class:`Source` whose terms are of batches that are computed as one.

    Where all are one, its graph is kept from one probe to the next.

    Args:
        operator: the matrix.
        groups: the numbers of the batches of each term, which may be joined; all that weigh
            something. A term is called by its first.
    """

    def __init__(self, operator: Operator, groups: Sequence[Sequence[int]]) -> None:
        self.operator, self.groups = operator, groups
        self.indices = [group[0] for group in groups]
        self.masses, self.counts = [0.0] * len(operator.masses), [0] * len(operator.counts)
        for group in groups:
            self.masses[group[0]] = sum(operator.masses[i] for i in group)
            self.counts[group[0]] = sum(operator.counts[i] for i in group)
        self._only: LiveTerm | None = None

    @property
    def parameters(self) -> Parameters:
        """The operator's."""
        return self.operator.parameters

    @property
    def dtype(self) -> torch.dtype:
        """The problem's present type."""
        return self.operator.dtype

    @property
    def device(self) -> torch.device:
        """The device of the problem."""
        return self.operator.device

    @property
    def decay(self) -> float:
        """Weight decay, which is in no term."""
        return self.operator.decay

    @property
    def meter(self) -> Meter:
        """The operator's."""
        return self.operator.meter

    @property
    def block_size(self) -> int:
        """Vectors that a term is best given at once."""
        return self.operator.block_size

    @property
    def sampling_fraction(self) -> float | None:
        """The batches' examples over all that there are."""
        return self.operator.sampling_fraction

    @property
    def independent(self) -> bool:
        """Whether examples are independent of each other."""
        return self.operator.independent

    @property
    def keeps_graphs(self) -> bool:
        """Whether a term's next probe is made on the graph of the one before."""
        return len(self.groups) == 1

    def batches(self, among: Sequence[int] | None = None) -> Iterator[LiveTerm]:
        """The terms, one at a time.

        Args:
            among: what some of them are called; default all.

        Raises:
            UnsoundError: the products did not pass their checks.
        """
        self.operator.check()
        groups = {group[0]: group for group in self.groups}
        for index in self.indices if among is None else among:
            if not self.keeps_graphs:
                yield LiveTerm(self.operator.problem.batch(*groups[index]), self.operator)
                continue
            self._only = self._only or self._kept(groups[index])
            yield self._only

    def _kept(self, group: Sequence[int]) -> LiveTerm:
        """The only term; where another process had made its graph, that was counted there."""
        problem = self.operator.problem
        counted = problem.retypings if self.meter.earlier else None
        return LiveTerm(problem.batch(*group), self.operator, counted)

    def in_full(self) -> Joint:
        """The same matrix with products in the type of the weights, without autocast."""
        return Joint(self.operator.in_full(), self.groups)

    def bias(self, on_step: OnStep = go_on) -> Bias | None:
        """The operator's."""
        return self.operator.bias(on_step)
