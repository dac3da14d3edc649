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

from collections.abc import Iterator

from torch import Tensor

from hesscli import randomness
from hesscli.errors import HesscliError, UsageError
from hesscli.meter import Meter
from hesscli.operators.gauss_newton import require_examples
from hesscli.operators.per_example.passes import ExampleGradients
from hesscli.operators.per_example.squares import DEVICE_BYTES
from hesscli.operators.products import flatten, gradient
from hesscli.problem.batches import rows as rows_of_batch
from hesscli.problem.output_hessian import columns_at, has_factor, scores_at
from hesscli.problem.problem import Problem
from hesscli.vocabulary import RowKind

BLOCK_BYTES = 1 << 24
"""Bytes of rows that are made at once on a CPU, unless the fewest take more."""
_FEWEST = 4
"""Rows that are made at once at least: each pass reads all weights."""
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
        columns = columns_at if kind.name == "sampled" else scores_at
        room = BLOCK_BYTES if problem.device.type == "cpu" else DEVICE_BYTES
        each = sum(tensor.nbytes for tensor in problem.parameters.tensors)
        self._passes = ExampleGradients(
            problem,
            problem.parameters,
            columns,
            self.meter,
            instead="--rows microbatch:N",
            most=max(_FEWEST, room // max(1, each)),
        )
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
        if self.kind.name == "sampled":
            return float("inf")
        return sum(map(self._rows_of, self.problem.indices))

    def take(self, count: int, first: int = 0) -> Iterator[Tensor]:
        """Rows ``first`` to ``count``, or as many as there are, in blocks ``(k, d)``.

        Args:
            count: of all rows.
            first: where a block began when it was as many rows; what is repeated for the sake of
                the others is not counted again.
        """
        end, row, draw = int(min(count, self.available)), 0, 0
        make = self._means if self.kind.name == "microbatch" else self._examples
        if 0 < first < end and make == self._examples:
            with self.meter.uncounted():
                self._passes.prepare()
        while row < end:
            for index in self.problem.indices:
                had, wanted = max(0, first - row), min(self._rows_of(index), end - row)
                if had < wanted:
                    yield from make(index, draw, had, wanted)
                row += wanted
            draw += 1

    def _size(self, index: int) -> int:
        """Examples in a row: all of a batch where that is the smallest unit whose loss is known."""
        known = self.problem.separable and self.problem.loss.shows_examples
        if self.kind.name == "microbatch" and not known:
            return self.problem.data.counts[index]
        return self.kind.size

    def _rows_of(self, index: int) -> int:
        """How many a batch gives, before it is drawn from again."""
        return -(-self.problem.data.counts[index] // self._size(index))

    def _examples(self, index: int, draw: int, first: int, last: int) -> Iterator[Tensor]:
        """Gradients of some of a batch's examples, each pulled back from its outputs."""
        stream = randomness.key(_DRAWS, self.seed, index, draw)
        scale = (self.problem.data.count / self.problem.total_weight) ** 0.5
        for start, live in self._passes.of((index,), first, last):
            ((_, column),) = live.columns.draw(stream, start)  # a factor's, and so with a plus
            yield live.each(scale * column)

    def _means(self, index: int, draw: int, first: int, last: int) -> Iterator[Tensor]:
        """Gradients of the mean loss of a few examples, one at a time."""
        batch, size = self.problem.batch(index), self._size(index)
        for start in range(first * size, last * size, size):
            data = batch.data
            if size < batch.count:
                data = rows_of_batch(data, start, start + size)
            share = self.problem.share_of(min(size, batch.count - start))
            self.meter.add(self.problem.gradient_cost, share)
            with self.problem.forward_context(), self.problem.recomputing():
                parts = gradient(self.problem.evaluate(data), self.problem.parameters.tensors)
            yield flatten(parts).detach()[None]
