"""Whether an example's output and loss depend on the others of its batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from hesscli.errors import UsageError
from hesscli.operators.base import Operator
from hesscli.operators.precision import doubled
from hesscli.problem.batches import Batch, rows
from hesscli.problem.blame import differing_module, label
from hesscli.problem.precision import tolerance
from hesscli.problem.problem import Problem
from hesscli.results import Check

_SAMPLE = 4


def check_independence(problem: Problem, make: type[Operator], precision: torch.dtype) -> Check:
    """Take half of a few examples by themselves; where they change, the batch is the unit.

    Args:
        problem: what is analysed.
        make: the operator's class.
        precision: the type that the model computes in.

    Raises:
        UsageError: they change, and the operator is made of per-example gradients.
    """
    unseen = _why_unseen(problem)
    if unseen is not None:
        return _check(f"not seen: {unseen}; the batch is the unit")
    with doubled(problem) if precision == torch.float64 else nullcontext(), torch.no_grad():
        value, culprit = _coupling(problem, tolerance(precision))
    if culprit is None:
        detail = "an example's output and loss do not depend on its batch"
        return _check(detail, value, tolerance(precision))
    if make.per_example:
        raise UsageError(
            "per-example gradients do not exist here",
            f"{culprit} mixes the examples of a batch",
            "--matrix ggn or hessian",
        )
    return _check(f"no: {culprit} mixes them; the batch is the unit", value, tolerance(precision))


def _check(detail: str, value: float | None = None, bound: float | None = None) -> Check:
    known = value is not None and math.isfinite(value)
    return Check(
        name="independent examples",
        passed=True,
        detail=detail,
        value=value if known else None,
        bound=bound if known else None,
    )


def _why_unseen(problem: Problem) -> str | None:
    if problem.hidden_outputs is not None:
        return problem.hidden_outputs
    if not problem.data.sliceable:
        return "a batch's tensors are no rows of examples"
    if problem.sample(_SAMPLE).count == 1:
        return "one example a batch"
    return None


def _coupling(problem: Problem, bound: float) -> tuple[float, str | None]:
    """The largest relative change, and what is to blame if it is above a bound."""
    if problem.couples_examples is not None:
        return math.inf, problem.couples_examples
    sample = problem.sample(_SAMPLE)
    half = rows(sample.data, 0, sample.count // 2)

    def same(together: Tensor, alone: Tensor) -> bool:
        return not _change_of_rows(together, alone) > bound

    change = _or_infinite(
        lambda: _change_of_rows(problem.outputs(sample.data), problem.outputs(half))
    )
    if not change <= bound:
        module = None
        if math.isfinite(change):
            module = differing_module(
                problem.model,
                lambda: problem.outputs(sample.data),
                lambda: problem.outputs(half),
                same,
            )
        return change, module or label("", problem.model)
    by_loss = _or_infinite(lambda: _change_of_loss(problem, sample.data))
    if not by_loss <= bound:
        return by_loss, f"the loss {problem.loss.name}"
    return max(change, by_loss), None


def _or_infinite(measure: Callable[[], float]) -> float:
    """What code that refuses fewer examples does to them: all that there is."""
    try:
        return measure()
    except Exception:
        return math.inf


def _change_of_rows(together: Tensor, alone: Tensor) -> float:
    """Of the first rows; a tensor without a row an example says nothing."""
    if not together.dim() or together.shape[1:] != alone.shape[1:]:
        return 0.0
    return _relative(together[: len(alone)], alone)


def _change_of_loss(problem: Problem, batch: Batch) -> float:
    """Of the mean loss, when it is put together from each example's own."""
    loss = problem.loss
    each = loss.numerators(problem.outputs(batch), batch).sum()
    return _relative(problem.evaluate(batch), each / float(loss.masses(batch).sum()))


def _relative(value: Tensor, other: Tensor) -> float:
    scale = torch.maximum(value.norm(), other.norm()).clamp_min(1e-30)
    return float((value - other).norm() / scale)
