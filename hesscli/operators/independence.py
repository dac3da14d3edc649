"""What the test of independent examples found, as a check."""

from __future__ import annotations

import math

from hesscli.errors import UsageError
from hesscli.operators.base import Operator
from hesscli.problem.problem import Problem
from hesscli.results import Check, CheckState


def check_independence(problem: Problem, make: type[Operator]) -> Check:
    """What was found when the data was frozen.

    Raises:
        UsageError: examples are mixed, and the operator is made of per-example gradients.
    """
    found = problem.independence
    if found.unseen is not None:
        return _check("not applicable", f"{found.unseen}: the batch is the unit")
    if found.mixes is None:
        detail = "an example's output and loss do not depend on its batch"
        return _check("passed", detail, found.change, found.bound)
    if make.per_example:
        raise UsageError(
            "per-example gradients do not exist here",
            f"{found.mixes} mixes the examples of a batch",
            "--matrix ggn or hessian",
        )
    told = f"{found.mixes} mixes them: the batch is the unit"
    return _check("not applicable", told, found.change, found.bound)


def _check(
    state: CheckState, detail: str, value: float = math.inf, bound: float | None = None
) -> Check:
    known = math.isfinite(value)
    return Check(
        name="independent examples",
        state=state,
        detail=detail,
        value=value if known else None,
        bound=bound if known else None,
    )
