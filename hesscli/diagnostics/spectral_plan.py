"""What ``hesscli spectrum`` will take, and whether it fits."""

from __future__ import annotations

from hesscli.diagnostics.clock import beyond
from hesscli.diagnostics.exploring import PROBES, STEPS, Plan, basis_bytes, needed_bytes
from hesscli.diagnostics.opening import PROOF_GRADIENTS
from hesscli.diagnostics.surroundings import peak_bytes
from hesscli.errors import UsageError
from hesscli.memory import available_bytes, gibibytes
from hesscli.operators.base import Operator
from hesscli.problem.problem import Problem
from hesscli.results import PlannedCommand

_SPARE = 0.9
"""Of the free memory, what may be taken: there is more to do than to hold vectors."""

_MOST_STEPS = 512


def most_steps(problem: Problem, probes: int) -> int:
    """As many as a tolerance may take: what fits, and no more than can be orthogonalised soon."""
    room = int(_SPARE * available_bytes(problem.device))
    return max(1, min(_MOST_STEPS, room // needed_bytes(problem.parameters.size, 1, probes)))


def require_room(problem: Problem, plan: Plan) -> None:
    """See that the vectors fit into memory, before any of it is taken.

    Raises:
        UsageError: they do not; the hint names a run that does.
    """
    size, room = problem.parameters.size, int(_SPARE * available_bytes(problem.device))
    needed = needed_bytes(size, plan.steps, plan.probes)
    if needed <= room:
        return
    raise UsageError(
        "the Lanczos vectors do not fit in the memory that is free",
        f"{plan.steps} steps of {size} parameters take {gibibytes(basis_bytes(size, plan.steps))}, "
        f"{gibibytes(needed)} with restarts, and there is room for {gibibytes(room)}",
        _proposal(size, plan.probes, room),
    )


def _proposal(size: int, probes: int, room: int) -> str:
    """Fewer steps, or fewer start vectors, that fit."""
    offers = []
    for starts in dict.fromkeys((probes, 1)):
        if steps := room // needed_bytes(size, 1, starts):
            offers.append(f"--steps {steps}" + (" --probes 1" if starts == 1 != probes else ""))
    return " or ".join(offers) or "--layer for one layer of a smaller network, or more memory"


def require_dense(problem: Problem, limit: int) -> None:
    """See that the dense matrix is wanted, which has d columns of d numbers.

    Raises:
        UsageError: it is larger than the limit, or than the memory that is free.
    """
    size, room = problem.parameters.size, int(_SPARE * available_bytes())
    needed = 3 * 8 * size**2  # itself, its mean with its transpose, and what LAPACK works on
    if size > limit:
        raise UsageError(
            f"--exact is for at most {limit} parameters",
            f"{size}: as many products, and {gibibytes(needed)}",
            f"--exact-limit {size}, or no --exact",
        )
    if needed > room:
        raise UsageError(
            "the dense matrix does not fit in the memory that is free",
            f"{gibibytes(needed)}, and there is room for {gibibytes(room)}",
            "no --exact",
        )


def plan_spectrum(
    operator: Operator, product_seconds: float, budget: float | None
) -> PlannedCommand:
    """Work, time and memory of ``hesscli spectrum`` as it stands.

    Args:
        operator: the matrix.
        product_seconds: of a full-data product.
        budget: seconds that the command will be given.
    """
    size, device = operator.parameters.size, operator.problem.device
    plan = Plan(steps=min(STEPS, size), probes=PROBES, count=0, goal=0.0, early=False, seed=0)
    products = plan.products(size)
    graph, each = operator.cost
    seconds = products * product_seconds
    needed = needed_bytes(size, plan.steps, plan.probes)
    notes = [
        f"{plan.steps} steps, each of which keeps a vector: "
        f"{gibibytes(basis_bytes(size, plan.steps))}, at most {gibibytes(needed)} with restarts"
    ]
    room = int(_SPARE * available_bytes(device))
    if needed > room:
        notes.append(f"more than is free: {_proposal(size, plan.probes, room)}")
    notes.extend(beyond(seconds, budget))
    return PlannedCommand(
        command="spectrum",
        products=float(products),
        gradients=PROOF_GRADIENTS + products * (graph + each),
        seconds=seconds,
        peak_bytes=peak_bytes(device) + needed,
        note="; ".join(notes),
    )
