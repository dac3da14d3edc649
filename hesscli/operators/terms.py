"""How large the terms of a product are before they cancel, and so how large its rounding.

Where a network is sure of its examples, the slope of the loss in its outputs is p − 1 with p near
1, and so is its curvature. What is left of either after subtraction is small, but its rounding is
that of 1, and reaches the product through the outputs' own derivatives. A loss with slope and
curvature of order one in their place shows how large that can become.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hesscli import randomness
from hesscli.operators.curvature import Curvature
from hesscli.operators.products import BUILDERS, flatten, gradient
from hesscli.operators.trials import mean
from hesscli.problem.batches import tensors_of
from hesscli.problem.objective import Objective, Sample, WeightedBatch

_ROUNDED_TERMS = 16
"""Rounding of a product, in units of eps and of the size of its terms: 2 to 18 were seen."""
_SIGNS = 0x7E125
"""Separates the slopes' signs from other streams."""


class Terms:
    """Of an operator's products on some examples.

    Args:
        operator: the matrix.
        sample: the examples.
    """

    def __init__(self, operator: Curvature, sample: Sample) -> None:
        self.operator, self.sample = operator, sample

    def rounding_of(self, vector: Tensor, precision: torch.dtype) -> float:
        """At most, of the product with a vector; 0 where nothing is known of the outputs.

        Args:
            vector: ``(d,)``.
            precision: the type that the model computes in.
        """
        return _ROUNDED_TERMS * torch.finfo(precision).eps * self.size_of(vector)

    def size_of(self, vector: Tensor) -> float:
        """The length of their product with a vector ``(d,)``; 0 where nothing is known of them."""
        tensors, build = self.operator.parameters.tensors, BUILDERS["hessian"]["double-backward"]

        def product(batch: WeightedBatch) -> Tensor:
            return build(lambda _: self._uncancelled(batch), tensors)(vector[None])

        with self.operator.problem.forward_context():
            total = mean(self.sample, vector[None], product)
        size = float(total.norm())
        return size if size < math.inf else 0.0

    @property
    def slope(self) -> float:
        """The length of the gradient."""
        tensors = self.operator.parameters.tensors
        with self.operator.problem.forward_context():
            values = [b.weight * self._uncancelled(b) for b in self.sample.batches()]
            return float(flatten(gradient(torch.stack(values).sum(), tensors)).norm())

    def _uncancelled(self, batch: WeightedBatch) -> Tensor:
        """½‖f + s‖² of an example's outputs f at f = 0, with signs s: its slope is s, in the mean.

        Second derivatives of f are multiplied with s then, and its first with one another.
        """
        problem = self.operator.problem
        with _outputs_of(problem) as outputs, problem.recomputing():
            loss = problem.evaluate(batch.data)
        terms, share = [loss * 0], 2 * batch.count / self.operator.problem.loss.multiple
        for number, output in enumerate(outputs):
            signs = randomness.rademacher(
                randomness.key(_SIGNS, number),
                0,
                output.numel(),
                dtype=output.dtype,
                device=output.device,
            ).view_as(output)
            terms.append((output - output.detach() + signs).square().sum() / share)
        return torch.stack([term.to(loss.dtype) for term in terms]).sum()


@contextmanager
def _outputs_of(problem: Objective) -> Iterator[list[Tensor]]:
    """Meanwhile, whatever differentiable tensors the model returns."""
    outputs: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        found = [output] if isinstance(output, Tensor) else tensors_of(vars_of(output))
        outputs.extend(t for t in found if t.requires_grad and t.is_floating_point())

    handle = problem.model.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


def vars_of(output: Any) -> Any:
    """An object's attributes, where it is no collection of its own."""
    return vars(output) if hasattr(output, "__dict__") and not hasattr(output, "keys") else output
