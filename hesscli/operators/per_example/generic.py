"""Per-example gradients of any parameter: one example at a time, by vmap where it goes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hesscli.memory import is_out_of_memory
from hesscli.operators.products import gradient
from hesscli.pairing import paired
from hesscli.parameters import Parameter
from hesscli.problem.batches import Batch, filled, rows, tensors_of
from hesscli.problem.objective import WeightedBatch
from hesscli.problem.problem import Problem
from hesscli.problem.replacing import replacing

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

    def norms(
        self, batch: WeightedBatch, columns: Tensor, parameters: Sequence[Parameter]
    ) -> list[Tensor]:
        """Σ over columns of each example's squared gradient norm, ``(N,)`` float64, by parameter.

        Arguments are those of :meth:`sums`.
        """
        found: list[list[Tensor]] = [[] for _ in parameters]
        for chunk in self.each(batch, columns, parameters):
            for parts, part in zip(found, chunk, strict=True):
                parts.append(part[:, None].flatten(1).square().sum(1, dtype=torch.float64))
        return [torch.cat(parts).view(columns.shape[:2]).sum(1) for parts in found]

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
        """All examples at once, or None for good where the model does not go through vmap.

        Each example has the parameters to itself, so that one plain backward pass tells them
        apart: ``torch.func``'s own loads torch's compiler, which takes longer than torch does.
        """
        names = [p.name for p in parameters]
        owned = [p.tensor.detach().expand(len(columns), *p.tensor.shape) for p in parameters]
        owned = [tensor.requires_grad_() for tensor in owned]

        def alone(example: tuple[Tensor, ...], *theta: Tensor) -> Tensor:
            one = filled(batch, (tensor[None] for tensor in example))
            return self.problem.outputs(one, dict(zip(names, theta, strict=True)))

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of operations that vmap maps one by one
                with replacing({F.embedding: _lookup}):
                    examples = tuple(tensors_of(batch))
                    outputs = torch.func.vmap(alone, randomness="same")(examples, *owned)
                found = [
                    gradient(paired([outputs], [column[:, None]]), owned, retain_graph=True)
                    for column in columns.unbind(1)
                ]
        except Exception as error:  # of any kind: what vmap cannot do shows in many ways
            if is_out_of_memory(error):
                raise
            self._mappable = False
            return None
        return [torch.stack(parts, 1).flatten(0, 1) for parts in zip(*found, strict=True)]

    def _alone(
        self, batch: Batch, columns: Tensor, parameters: Sequence[Parameter]
    ) -> Iterator[list[Tensor]]:
        """One example, one column after the other."""
        outputs = self.problem.outputs(batch)
        for column in columns:
            value = paired([outputs], [column[None]])
            parts = gradient(value, [p.tensor for p in parameters], retain_graph=True)
            yield [part[None] for part in parts]


def _lookup(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *others: Any, **named: Any
) -> Tensor:
    """Without a gradient of padding, in tables of which each example has its own.

    ``torch.func.vmap`` looks up all of them in one long table, of whose paddings it knows one.
    """
    found = F.embedding(input, weight, None, *others, **named)
    if padding_idx is None:
        return found
    padding = input == padding_idx % len(weight)
    return torch.where(padding[..., None], found.detach(), found)
