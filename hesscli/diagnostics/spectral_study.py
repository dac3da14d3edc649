"""The matrices whose spectra are explored: the whole one, its dense form, and layers' blocks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hesscli.diagnostics.clock import Clock
from hesscli.diagnostics.exploring import Exploration, Plan, explore
from hesscli.diagnostics.opening import Opening
from hesscli.parameters import Parameters
from hesscli.problem.precision import tolerance
from hesscli.results import Status

_COLUMNS = 32  # of a dense matrix, between two looks at the clock
_WORSE: tuple[Status, ...] = ("exact", "converged", "budget", "interrupted")


class Study:
    """What is explored, one matrix after another; each may be the last."""

    def __init__(
        self, opening: Opening, plan: Plan, clock: Clock, layers: tuple[str, ...], exact: bool
    ) -> None:
        self.opening, self.clock, self.operator = opening, clock, opening.operator
        measured = opening.flight.product_rounding
        usual = tolerance(self.operator.problem.precision.narrowest)
        self.plan = replace(plan, rounding=usual if measured is None else measured)
        parameters = self.operator.parameters
        self.blocks = {
            layer: self.operator.block(Parameters(parameters.in_layer(layer))) for layer in layers
        }
        self.exact = exact
        self.dense: Tensor | None = None
        self.found: dict[str, Exploration] = {}
        self.cut_short: Status | None = None

    @property
    def products(self) -> float:
        """So far."""
        return sum(op.meter.products for op in (self.operator, *self.blocks.values()))

    @property
    def gradients(self) -> float:
        """So far."""
        return sum(op.meter.gradients for op in (self.operator, *self.blocks.values()))

    def run(self) -> None:
        """The whole matrix, its dense form, and then the blocks of layers."""
        self.whole = explore(self.operator, self.plan, self.clock, 0.0, self._total())
        try:
            if self.exact and self._goes_on():
                self._form()
            for layer, block in self.blocks.items():
                if not self._goes_on():
                    break
                self.found[layer] = explore(
                    block, self.plan, self.clock, self.products, self._total()
                )
        except KeyboardInterrupt:
            self.cut_short = "interrupted"

    @property
    def status(self) -> Status:
        """Of all of it."""
        if self.cut_short is not None:
            return self.cut_short
        every = (self.whole, *self.found.values())
        return max((self.status_of(found) for found in every), key=_WORSE.index)

    def status_of(self, found: Exploration) -> Status:
        """Of one matrix: exact only on every example, with rounding that was measured."""
        whole = self.operator.problem.sampling_fraction == 1
        if found.status == "exact" and not (whole and self.opening.flight.product_rounding):
            return "converged"
        return found.status

    def _goes_on(self) -> bool:
        """Whether there is time for more."""
        if any(found.status == "interrupted" for found in (self.whole, *self.found.values())):
            return False
        if self.clock.out_of_time:
            self.cut_short = "budget"
        return self.cut_short is None

    def _total(self) -> float:
        """Products in all, as planned."""
        size = self.operator.parameters.size
        sizes = (size, *(block.parameters.size for block in self.blocks.values()))
        return float(sum(map(self.plan.products, sizes)) + (size if self.exact else 0))

    def _form(self) -> None:
        """The dense matrix, a few columns at a time."""
        size = self.operator.parameters.size
        dense = torch.empty(size, size, dtype=torch.float64)
        for start in range(0, size, _COLUMNS):
            stop = min(start + _COLUMNS, size)
            unit = torch.zeros(stop - start, size, dtype=torch.float64)
            unit[:, start:stop].fill_diagonal_(1.0)
            dense[start:stop] = self.operator.apply(unit).cpu()
            self.clock.tell("forming the matrix", done=float(stop), total=float(size))
            if self.clock.out_of_time and stop < size:
                self.cut_short = "budget"
                return
        self.dense = dense.add_(dense.T.clone()).div_(2)
