"""Quadratic forms of changes that lie in one layer each, all of a batch's on one graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hesscli.operators.base import LiveTerm, Operator
from hesscli.operators.products import FORM_PASSES, Forms
from hesscli.parameters import Parameters
from hesscli.problem.objective import WeightedBatch


@dataclass(frozen=True)
class Layers:
    """An operator's parameters by layer, and what quadratic forms of changes within them take.

    By double backward all layers share the graph of a batch, and of a product no more is made
    than lies between the loss and the layer. Other modes have no graph to share: each layer's
    products are those of an operator of its own.
    """

    operator: Operator
    owned: Sequence[Parameters]

    @property
    def is_shared(self) -> bool:
        """Whether they have one graph."""
        return self.operator.mode == "double-backward"

    @property
    def graphs(self) -> int:
        """How many are made of a batch."""
        return 1 if self.is_shared else len(self.owned)

    @cached_property
    def costs(self) -> list[float]:
        """Gradients that a form takes on its graph, in each layer."""
        operator = self.operator
        if not self.is_shared:
            return [operator.cost[1]] * len(self.owned)
        ways = operator.problem.ways_back([own.tensors for own in self.owned])
        return [FORM_PASSES[operator.kind] * way for way in ways]

    def at_once(self, layer: int) -> int:
        """Of a layer's changes, how many are worth handing over in one block."""
        return 1 if self.is_shared else self.operator.block(self.owned[layer]).block_size


class LayerForms:
    """δᵀA_b δ of one batch's matrix.

    Args:
        layers: of A.
        batch: b.
        is_counted: whether its graph was made and counted before, by another process.
    """

    def __init__(self, layers: Layers, batch: WeightedBatch, *, is_counted: bool = False) -> None:
        self.layers, self.batch, self._is_counted = layers, batch, is_counted
        self._share = layers.operator.problem.share_of(batch.count)

    def __call__(self, layer: int, changes: Tensor) -> Tensor:
        """Forms, float64 ``(k,)``, of changes of a layer ``(k, its size)``.

        Raises:
            UnsoundError: a product with one of them is not finite.
        """
        operator, owned = self.layers.operator, self.layers.owned
        problem = operator.problem
        rows = changes.to(problem.device, problem.dtype)
        if not self.layers.is_shared:
            return self._apart(layer, rows)
        first = operator.parameters.names.index(owned[layer].names[0])
        with problem.forward_context():
            found = self._together(slice(first, first + len(owned[layer])), rows)
        work = len(rows) * self.layers.costs[layer]
        products = len(rows) * self.batch.count / problem.data.count
        operator.meter.add(work, self._share, products=products)
        # A product that is not finite is made once more, to be refused as any.
        return found if bool(torch.isfinite(found).all()) else self._apart(layer, rows)

    def _apart(self, layer: int, rows: Tensor) -> Tensor:
        term = LiveTerm(self.batch, self.layers.operator.block(self.layers.owned[layer]))
        return (term.apply(rows).double() * rows.double()).sum(1)

    @cached_property
    def _together(self) -> Forms:
        """On one graph."""
        operator = self.layers.operator
        if not self._is_counted:
            operator.meter.add(operator.cost[0], self._share)
        return operator.live_forms(self.batch)
