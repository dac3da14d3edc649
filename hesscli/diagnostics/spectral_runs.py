"""Lanczos runs under a clock: a long one for the eigenvalues, short ones for the rest.

One long run beats many short ones: what it counts has no noise. The runs after it start in the
complement of the eigenvectors that it has counted. They show how noisy the rest is, and whether an
eigenvalue has copies, which one start vector cannot see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from hesscli.diagnostics.run import PROOF_GRADIENTS, Clock, Opening, beyond, peak_bytes
from hesscli.engines.lanczos import Lanczos, Ritz
from hesscli.engines.quadrature import (
    Complement,
    Counted,
    Group,
    Measure,
    Run,
    copies,
    counted,
    measure,
    standing_alone,
    with_copies,
)
from hesscli.errors import UsageError
from hesscli.memory import available_bytes
from hesscli.operators.base import Operator, Retained
from hesscli.parameters import Parameters
from hesscli.problem.precision import tolerance
from hesscli.problem.problem import Problem
from hesscli.results import ConvergencePoint, PlannedCommand, Status
from hesscli.streams import key
from hesscli.units import human_bytes

# -- Lanczos runs under a clock: a long one for the eigenvalues, short ones for the rest -----------


STEPS, PROBES = 64, 5
SHORTER = 4
"""A run for the rest has so many times fewer steps than the first."""
_SHORTEST = 8
_READ_EVERY = 16  # steps, once there are many: a reading takes the third power of their number
_BACK = 0.75
"""Where it is looked whether the largest eigenvalues have been the same for some steps."""
_RESTARTS = 3
"""Later runs leave out at most as many vectors as the first made, and reflect them once more."""
_MEASURED = 5
"""Ritz vectors by which the rounding of products is measured."""
_GRAPHS_SHARE = 4
"""Graphs may take this part of the memory that is free then."""
_NEXT_START = 0x5BEC7
"""Separates the start vectors of later runs from the first."""

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Plan:
    """How long and how often to iterate.

    ``goal`` is the relative bar of the ``count`` largest eigenvalues that is wanted; the first run
    ends with it if it is ``early``. ``rounding`` is a product's, beside the largest.
    """

    steps: int
    probes: int
    count: int
    goal: float
    early: bool
    seed: int
    rounding: float = 0.0

    def products(self, size: int) -> int:
        """At most, for a matrix of so many rows."""
        first = min(self.steps, size)
        return first if first == size else first + (self.probes - 1) * shorter(first)


def basis_bytes(size: int, steps: int) -> int:
    """A float64 vector for each step."""
    return 8 * size * steps


def needed_bytes(size: int, steps: int, probes: int) -> int:
    """At most, with what the later runs take."""
    return basis_bytes(size, steps) * (1 if probes == 1 else _RESTARTS)


@dataclass
class Exploration:
    """What was found of a matrix's spectrum so far, and what found it."""

    size: int
    plan: Plan
    lanczos: Lanczos
    status: Status = "budget"
    runs: list[Run] = field(default_factory=list)
    halves: list[Run] = field(default_factory=list)
    known: tuple[Counted, ...] = ()
    convergence: list[ConvergencePoint] = field(default_factory=list)
    rounding_measured: bool = False

    @property
    def ritz(self) -> Ritz:
        """Of the first run."""
        return self.runs[0].ritz

    @property
    def measure(self) -> Measure:
        """The mean over all runs."""
        return measure(self.runs, self.known, self.size)

    @property
    def by_run(self) -> list[Measure]:
        """What each run says by itself of the part that is not counted."""
        return [measure([run], self.known, self.size) for run in self.runs]

    @property
    def by_half(self) -> list[Measure]:
        """The same of the later runs when they had made half of their steps."""
        halves = self.halves[: len(self.runs) - 1]  # Ctrl-C may have come between the two
        return [measure([run], self.known, self.size) for run in halves]


class _OutOfTimeError(Exception):
    """The budget is spent."""


def explore(operator: Operator, plan: Plan, clock: Clock, done: float, total: float) -> Exploration:
    """Iterate as planned, until time is up, or until the observer wants no more.

    Args:
        operator: the matrix.
        plan: how long.
        clock: budget and observer.
        done: products before this, for the progress.
        total: products in all.

    Raises:
        KeyboardInterrupt: stopped before there was anything.
        UnsoundError: a product is not finite.
    """
    size = operator.parameters.size
    free = available_bytes(operator.problem.device) - needed_bytes(size, plan.steps, plan.probes)
    product, began = Retained(operator, free // _GRAPHS_SHARE), operator.meter.products
    reserve = min(plan.steps, STEPS) if plan.early else plan.steps
    found = Exploration(size, plan, _lanczos(operator, product, size, plan, plan.seed, reserve))

    def after_a_step() -> None:
        top, bar = float(found.ritz.values[-1]), float(found.ritz.residuals[-1])
        clock.tell(
            "iterating",
            done=min(done + operator.meter.products - began, total),
            total=total,
            estimate=top,
            interval=(top - bar, top + bar),
        )
        if clock.out_of_time:
            raise _OutOfTimeError

    try:
        _first(found, after_a_step)
        _allow_for_rounding(found, product)
        _others(found, operator, product, after_a_step)
        if reached(found):
            found.status = "converged"
    except _OutOfTimeError:
        pass
    except KeyboardInterrupt:
        if not found.lanczos.count:
            raise
        found.status = "interrupted"
    _read(found)
    if not found.rounding_measured:
        _allow_for_rounding(found, product)
    product.forget()
    if found.runs[0].complete:
        found.status = "exact"
    return found


def shorter(steps: int) -> int:
    """Steps of a run for the rest, after a first one of so many."""
    return max(steps // SHORTER, min(_SHORTEST, steps))


def _first(found: Exploration, after_a_step: Callable[[], None]) -> None:
    """The long run."""
    lanczos, plan = found.lanczos, found.plan
    while lanczos.count < plan.steps and not lanczos.done:
        lanczos.step()
        if lanczos.count <= STEPS or lanczos.count % _READ_EVERY == 0:
            _read(found)
        after_a_step()
        if plan.early and reached(found):
            break
    _read(found)


def _allow_for_rounding(found: Exploration, product: Retained) -> None:
    """Measure the rounding of products with the largest Ritz vectors, and count it in all bars."""
    total = len(found.ritz.values)
    largest = np.argsort(-np.abs(found.ritz.values))[: min(_MEASURED, total)]
    vectors = found.lanczos.vectors(found.ritz, largest.tolist())
    found.lanczos.allow(product.rounding(vectors))
    found.rounding_measured = True
    found.convergence.pop()
    found.runs.clear()
    _read(found)


def _read(found: Exploration) -> None:
    """Let the first run be what it is now."""
    if found.runs and len(found.ritz.values) == found.lanczos.count:
        return
    ritz = found.lanczos.ritz()
    found.runs[:1] = [Run(ritz, found.size)]
    found.known = counted(ritz)
    top = slice(None, -found.plan.count - 1, -1)
    found.convergence.append(
        ConvergencePoint(
            steps=len(ritz.values),
            values=tuple(ritz.values[top].tolist()),
            residuals=tuple(ritz.residuals[top].tolist()),
        )
    )


def reached(found: Exploration) -> bool:
    """Whether the largest eigenvalues are known as well as wanted, and in their order.

    Small bars do not say that none is missing: a start vector can be nearly blind to one. It then
    comes up some steps after the others. So they must stand alone, and have been the same a
    quarter of the steps ago.
    """
    ritz, plan = found.ritz, found.plan
    total, count = len(ritz.values), min(plan.count, found.size)
    values, bars = ritz.values[: -count - 1 : -1], ritz.residuals[: -count - 1 : -1]
    wanted = plan.goal * np.abs(values)
    earlier = [point.values for point in found.convergence if point.steps <= _BACK * total]
    if not earlier or len(earlier[-1]) < count or (bars > wanted).any():
        return False
    settled = set(_taken(standing_alone(ritz)))
    same = np.abs(values - np.array(earlier[-1])) <= wanted
    return bool(same.all()) and settled.issuperset(range(total - count, total))


def _others(
    found: Exploration, operator: Operator, product: Product, after_a_step: Callable[[], None]
) -> None:
    """The short runs, each in the complement of all eigenvectors that were counted before."""
    if found.plan.probes < 2:
        return
    steps = shorter(found.lanczos.count)
    rows = found.lanczos.vectors(found.ritz, _taken(standing_alone(found.ritz)))
    complement = Complement(rows)
    for number in range(1, found.plan.probes):
        if not complement.size:
            return
        seed = key(_NEXT_START, found.plan.seed, number)
        within, size = _within(complement, product), complement.size
        lanczos = _lanczos(operator, within, size, found.plan, seed, steps)
        half, whole = _readings(lanczos, steps, after_a_step)
        before = found.known
        found.halves.append(Run(_light(half), size, before))
        found.runs.append(Run(_light(whole), size, before))
        if again := copies(before, whole):
            found.known = with_copies(before, whole)
            vectors = lanczos.vectors(whole, _taken(again))
            rows = torch.cat([rows, torch.stack([complement.embed(v) for v in vectors])])
            complement = Complement(rows)


def _taken(groups: Sequence[Group]) -> list[int]:
    return [index for group in groups for index in group.indices]


def _readings(lanczos: Lanczos, steps: int, after_a_step: Callable[[], None]) -> Iterator[Ritz]:
    """The readings at half of the steps, and at the end."""
    steps = min(steps, lanczos.size)
    for target in (max(steps // 2, 1), steps):
        while lanczos.count < target:
            lanczos.step()
            after_a_step()
        yield lanczos.ritz()


def _within(complement: Complement, product: Product) -> Product:
    return lambda vector: complement.restrict(product(complement.embed(vector)))


def _light(ritz: Ritz) -> Ritz:
    """Without its vectors."""
    return replace(ritz, coordinates=np.empty((0, len(ritz.values))))


def _lanczos(
    operator: Operator, product: Product, size: int, plan: Plan, seed: int, reserve: int
) -> Lanczos:
    problem = operator.problem
    return Lanczos(
        product,
        size,
        seed=seed,
        dtype=problem.dtype,
        device=problem.device,
        reserve=reserve,
        rounding=plan.rounding,
    )


# -- The matrices whose spectra are explored: the whole one, its dense form, and layers' blocks ----


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
        return self.operator.meter.products

    @property
    def gradients(self) -> float:
        """So far."""
        return self.operator.meter.gradients

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


# -- What ``hesscli spectrum`` will take, and whether it fits --------------------------------------


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
        f"{plan.steps} steps of {size} parameters take "
        f"{human_bytes(basis_bytes(size, plan.steps))}, {human_bytes(needed)} with restarts, "
        f"and there is room for {human_bytes(room)}",
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
            f"{size}: as many products, and {human_bytes(needed)}",
            f"--exact-limit {size}, or no --exact",
        )
    if needed > room:
        raise UsageError(
            "the dense matrix does not fit in the memory that is free",
            f"{human_bytes(needed)}, and there is room for {human_bytes(room)}",
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
        f"{human_bytes(basis_bytes(size, plan.steps))}, at most {human_bytes(needed)} with restarts"
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
