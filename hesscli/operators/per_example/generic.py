"""Per-example gradients of any parameter: one example at a time, by vmap where it goes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hesscli.memory import is_out_of_memory
from hesscli.operators.products import gradient
from hesscli.pairing import paired
from hesscli.parameters import Parameter
from hesscli.problem.batches import Batch, filled, rows, tensors_of
from hesscli.problem.objective import WeightedBatch
from hesscli.problem.problem import Problem

GRADIENT_BYTES = 1 << 26
"""Bytes of per-example gradients that are held at once."""
MAX_EXAMPLES = 32
"""Examples that are mapped at once, whose activations are held too."""


class Generic:
    """Per-example products, and their squares, for the parameters that no site speaks for."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self._mappable = problem, True

    def sums(
        self, batch: WeightedBatch, columns: Tensor, parameters: Sequence[Parameter]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Sums over examples of gradients, and over examples and columns of their squares.

        Args:
            batch: the examples.
            columns: ``(N, C, ...)``, what to backpropagate from each example's outputs.
            parameters: what to differentiate by.

        Returns:
            For each parameter float64 tensors of its shape.
        """
        totals = [torch.zeros_like(p.tensor, dtype=torch.float64) for p in parameters]
        squares = [torch.zeros_like(total) for total in totals]
        for chunk in self.each(batch, columns, parameters):
            for part, total, square in zip(chunk, totals, squares, strict=True):
                total += part.sum(0, dtype=torch.float64)
                square += part.square().sum(0, dtype=torch.float64)
        return totals, squares

    def each(
        self, batch: WeightedBatch, columns: Tensor, parameters: Sequence[Parameter]
    ) -> Iterator[list[Tensor]]:
        """Gradients ``(n, ...)`` of some examples and columns at a time, by parameter.

        Arguments are those of :meth:`sums`; examples come in order, their columns side by side.
        """
        each = sum(p.numel for p in parameters) * columns.element_size() * columns.shape[1]
        size = min(MAX_EXAMPLES, max(1, GRADIENT_BYTES // max(1, each)))
        for start in range(0, len(columns), size):
            part, wanted = rows(batch.data, start, start + size), columns[start : start + size]
            mapped = self._mapped(part, wanted, parameters) if self._mappable else None
            if mapped is not None:
                yield mapped
                continue
            for i in range(len(wanted)):
                yield from self._alone(rows(part, i, i + 1), wanted[i], parameters)

    def _mapped(
        self, batch: Batch, columns: Tensor, parameters: Sequence[Parameter]
    ) -> list[Tensor] | None:
        """All examples at once, or None for good where the model does not go through vmap."""
        names = [p.name for p in parameters]

        def products(example: tuple[Tensor, ...], wanted: Tensor) -> list[Tensor]:
            alone = filled(batch, (tensor[None] for tensor in example))

            def outputs(*theta: Tensor) -> Tensor:
                return self.problem.outputs(alone, dict(zip(names, theta, strict=True)))

            pull = torch.func.vjp(outputs, *(p.tensor.detach() for p in parameters))[1]
            pulled = [pull(column[None]) for column in wanted]
            return [torch.stack(parts) for parts in zip(*pulled, strict=True)]

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of operations that vmap maps one by one
                mapped = torch.func.vmap(products, randomness="same")(
                    tuple(tensors_of(batch)), columns
                )
        except Exception as error:  # of any kind: what vmap cannot do shows in many ways
            if is_out_of_memory(error):
                raise
            self._mappable = False
            return None
        return [part.detach().flatten(0, 1) for part in mapped]

    def _alone(
        self, batch: Batch, columns: Tensor, parameters: Sequence[Parameter]
    ) -> Iterator[list[Tensor]]:
        """One example, one column after the other."""
        outputs = self.problem.outputs(batch)
        for column in columns:
            value = paired([outputs], [column[None]])
            parts = gradient(value, [p.tensor for p in parameters], retain_graph=True)
            yield [part[None] for part in parts]
