"""Gradients of single examples, or of a few, as the rows of a window.

Three kinds. ``sampled``: an example's J_iᵀ s_i with a random column s_i of the loss's output
Hessian, E[s_i s_iᵀ] = A_i, scaled so that E[g gᵀ] over examples and columns is the Gauss-Newton
matrix G. ``example``: an example's own gradient, scaled so that E[g gᵀ] is the empirical Fisher
matrix. ``microbatch:N``: the mean gradient of N examples, as M-FAC's authors take them (Frantar,
Kurtic & Alistarh 2021, arXiv 2107.03356, section 4); E[g gᵀ] is then no matrix of the loss, but
about 1/N of the empirical Fisher matrix where the mean gradient is small beside its noise.

Examples come in the order of the frozen batches, which is random, so that the first rows are a
sample of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from hesscli import randomness
from hesscli.errors import HesscliError, UnsoundError, UsageError
from hesscli.meter import FORWARD, Meter
from hesscli.operators.gauss_newton import require_examples
from hesscli.operators.per_example.generic import Generic
from hesscli.operators.per_example.passes import is_close
from hesscli.operators.products import flatten, gradient
from hesscli.problem.batches import rows as rows_of_batch
from hesscli.problem.objective import WeightedBatch
from hesscli.problem.output_hessian import Factor, ScoreFactor, factor_of, has_factor
from hesscli.problem.problem import Problem
from hesscli.vocabulary import RowKind

_PART = 32
"""Examples whose gradients are made at once."""
_DRAWS = 0xF15E2
"""Separates label streams from other uses of a seed."""


def fitting_kind(problem: Problem) -> tuple[RowKind, str]:
    """The kind that says most of a problem's curvature, and why none better; an empty reason.

    Sampled rows where the loss's output Hessian is known, examples' own gradients where they
    can be told apart, and else those of whole batches.
    """
    try:
        require_examples(problem, "ggn")
    except HesscliError as error:
        return RowKind("microbatch", max(problem.data.counts)), f"{error.what}: {error.got}"
    if not has_factor(problem.loss):
        return RowKind("example"), f"the output Hessian of {problem.loss.name!r} is not known"
    return RowKind("sampled"), ""


class Rows:
    """A stream of a problem's rows.

    Args:
        problem: model, loss and frozen examples.
        kind: what a row is.
        seed: of the random columns.
        meter: counts the gradients; default a new one.

    Raises:
        UsageError: the kind needs single examples, or an output Hessian, that are not to be had.
    """

    def __init__(
        self, problem: Problem, kind: RowKind, seed: int = 0, meter: Meter | None = None
    ) -> None:
        self.problem, self.kind, self.seed = problem, kind, seed
        self.meter = Meter() if meter is None else meter
        self._mapper, self._verified = Generic(problem), False
        if kind.name != "microbatch":
            require_examples(problem, "ggn")
        if kind.name == "sampled" and not has_factor(problem.loss):
            raise UsageError(
                "sampled rows need the loss's Hessian in the model's outputs",
                f"[loss] {problem.loss.name!r}, whose is not known",
                "--rows example",
            )

    @property
    def available(self) -> float:
        """How many different rows there are; sampled ones do not end."""
        counts = [self.problem.data.counts[i] for i in self.problem.indices]
        if self.kind.name == "sampled":
            return float("inf")
        if self._whole_batches:
            return len(counts)
        return sum(-(-count // self.kind.size) for count in counts)

    def take(self, count: int, first: int = 0) -> Iterator[Tensor]:
        """Rows ``first`` to ``count``, or as many as there are, in blocks ``(k, d)``.

        Args:
            count: of all rows.
            first: where a block began when it was as many rows.
        """
        end, row, draw = int(min(count, self.available)), 0, 0
        self._verified = self._verified or first > 0
        while row < end:
            for index in self.problem.indices:
                for size, block in self._of_batch(self.problem.batch(index), draw, end - row):
                    if row >= first:
                        yield block()
                    row += size
                if row >= end:
                    return
            draw += 1

    @property
    def _whole_batches(self) -> bool:
        """Whether a batch is the smallest unit whose loss is known."""
        return not (self.problem.separable and self.problem.loss.shows_examples)

    def _of_batch(
        self, batch: WeightedBatch, draw: int, wanted: int
    ) -> Iterator[tuple[int, Callable[[], Tensor]]]:
        """Blocks of rows: how many, and what makes them."""
        if self.kind.name == "microbatch":
            size = batch.count if self._whole_batches else self.kind.size
            for start in list(range(0, batch.count, size))[:wanted]:
                yield 1, partial(self._mean, batch, start, size)
            return
        for start in range(0, min(wanted, batch.count), _PART):
            stop = min(start + _PART, wanted, batch.count)
            yield stop - start, partial(self._examples, batch, start, stop, draw)

    def _mean(self, batch: WeightedBatch, start: int, size: int) -> Tensor:
        """The gradient of the mean loss of a few examples."""
        data = batch.data
        if size < batch.count:
            data = rows_of_batch(data, start, start + size)
        self.meter.add(1.0, min(size, batch.count - start) / self.problem.data.count)
        parts = gradient(self.problem.evaluate(data), self.problem.parameters.tensors)
        return flatten(parts).detach()[None]

    def _examples(self, batch: WeightedBatch, start: int, stop: int, draw: int) -> Tensor:
        """Gradients of some of a batch's examples, each pulled back from its outputs."""
        data, problem = rows_of_batch(batch.data, start, stop), self.problem
        part = WeightedBatch(batch.index, data, batch.weight, stop - start)
        outputs = problem.fixed_outputs(data)
        stream = randomness.key(_DRAWS, self.seed, batch.index, draw)
        column = self._factor(outputs, data).draw(stream, start)
        column = column * (problem.data.count / problem.total_weight) ** 0.5
        self.meter.add(1 + FORWARD, (stop - start) / problem.data.count)
        pulled = self._mapper.each(part, column[:, None], list(problem.parameters))
        block = torch.cat([torch.cat([_by_example(g) for g in chunk], 1) for chunk in pulled])
        if not self._verified:
            self._verify(block, data, column)
        return block

    def _factor(self, outputs: Tensor, data: object) -> Factor:
        make = factor_of if self.kind.name == "sampled" else ScoreFactor
        return make(self.problem.loss, outputs, data)

    def _verify(self, block: Tensor, data: object, column: Tensor) -> None:
        """Raise unless the rows of some examples add up to the gradient of all of them.

        Raises:
            UnsoundError: they do not, so that examples depend on each other.
        """
        value = (self.problem.outputs(data) * column).sum()
        expected = flatten(gradient(value, self.problem.parameters.tensors))
        if not is_close(block.sum(0), expected, block.norm()):
            raise UnsoundError(
                "per-example gradients do not add up to the gradient of the batch",
                f"{len(block)} examples of batch 0",
                "a model whose output for an example depends on nothing but that example, or "
                "--rows microbatch:N",
            )
        self._verified = True


def _by_example(gradients: Tensor) -> Tensor:
    """``(N, ...)`` as ``(N, numel)``, where a parameter has no dimension or no entry too."""
    return gradients.reshape(len(gradients), math.prod(gradients.shape[1:]))
