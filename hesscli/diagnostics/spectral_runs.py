"""Lanczos runs under a clock: a long one for the eigenvalues, short ones for the rest.

One long run beats many short ones: what it counts has no noise. The runs after it are made in the
complement of the eigenvectors that it has counted. They show how noisy the rest is, and whether an
eigenvalue has copies, which one start vector cannot see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hesscli import world
from hesscli.engines.lanczos import Lanczos
from hesscli.engines.quadrature import Measure, measure
from hesscli.engines.ritz import (
    Counted,
    Group,
    KrylovRun,
    Ritz,
    copies,
    counted,
    standing_alone,
    with_copies,
)
from hesscli.memory import available_bytes
from hesscli.meter import OnStep, go_on
from hesscli.operators.base import Operator
from hesscli.operators.retained import Retained
from hesscli.problem.problem import Problem
from hesscli.randomness import key
from hesscli.results import ConvergencePoint, Snapshot, Status
from hesscli.state import State

STEPS, PROBES = 64, 5
SHORTER = 4
"""A run for the rest has so many times fewer steps than the first."""
SHORTEST = 8
_READ_EVERY = 16  # steps, once there are many: a reading takes the third power of their number
_BACK = 0.75
"""Where it is looked whether the largest eigenvalues have been the same for some steps."""
_FIRST_MEASURED = 4
"""Steps after which the rounding of products may be measured with the largest Ritz vector, lest a
run that is cut short has to spend products that it has no time for."""
_MIXED, MEASURED = 4, 2
"""Ritz vectors by which it is measured once there are many, and products in which they are."""
_GRAPHS_SHARE = 4
"""Graphs may take this part of the memory that is free then."""
_HANDLED, _SWEEPS = 12, 2
"""Vectors that are gone through in a step, and for each row of the basis that there is by then."""
_NEXT_START = 0x5BEC7
"""Separates the start vectors of later runs from the first."""


@dataclass(frozen=True)
class SpectralPlan:
    """How long and how often to iterate.

    ``goal`` is the relative bar of the ``count`` largest eigenvalues that is wanted; the first run
    ends with it if it is ``early``. Where it is ``shorter``, it ends in time for all later ones.
    ``rounding`` is a product's, beside the largest.
    """

    steps: int
    probes: int
    count: int
    goal: float
    early: bool
    seed: int
    shorter: bool = False
    rounding: float = 0.0

    def products(self, size: int) -> int:
        """At most, for a matrix of so many rows."""
        first = min(self.steps, size)
        return first if first == size else first + (self.probes - 1) * shorter(first)


def basis_bytes(problem: Problem, steps: int, ranks: int | None = None) -> int:
    """A vector for each step, in the type of the products: what each rank has of it.

    Args:
        problem: of so many parameters.
        steps: of Lanczos' method.
        ranks: default those that there are.
    """
    columns = -(-problem.parameters.size // (ranks or world.size()))
    return steps * columns * problem.dtype.itemsize


def needed_bytes(problem: Problem, steps: int, probes: int, ranks: int | None = None) -> int:
    """At most: later runs leave out as many vectors as the first made, or fewer.

    Of many ranks each has the vector whole, besides, with which the product is made.
    """
    ranks = ranks or world.size()
    later = 0 if probes == 1 else steps + shorter(steps)
    whole = 0 if ranks == 1 else basis_bytes(problem, 1, 1)
    return basis_bytes(problem, steps + later, ranks) + whole


def room_for_graphs(operator: Operator, plan: SpectralPlan) -> int:
    """Bytes that graphs may take beside the vectors."""
    needed = needed_bytes(operator.problem, plan.steps, plan.probes)
    return (available_bytes(operator.problem.device) - needed) // _GRAPHS_SHARE


class Exploration:
    """What is found of a matrix's spectrum: by a long run, and short ones for the rest.

    Args:
        operator: the matrix.
        plan: how long.
        enough: whether so many steps of the first run must do, for want of time.
        late: whether time may be up before they are made.
        on_step: called after each batch of a product; may end it.
    """

    def __init__(
        self,
        operator: Operator,
        plan: SpectralPlan,
        enough: Callable[[int], bool] | None = None,
        late: Callable[[], bool] = lambda: False,
        on_step: OnStep = go_on,
    ) -> None:
        self.operator, self.plan, self.size = operator, plan, operator.parameters.size
        self.enough, self.late, self.shortened = enough, late, False
        self.product = Retained(operator, room_for_graphs(operator, plan), on_step)
        reserve = min(plan.steps, STEPS) if plan.early else plan.steps
        self.lanczos = self._run(plan.seed, reserve)
        self.status: Status = "budget"
        self.runs: list[KrylovRun] = []
        self.halves: list[KrylovRun] = []
        self.known: tuple[Counted, ...] = ()
        self.convergence: list[ConvergencePoint] = []
        self.rounding_measured, self.finished = False, False
        self._first_over = False
        self._number = 1  # of the later run that is made, or comes next
        self._later: Lanczos | None = None
        self._half: Ritz | None = None
        self._begun: State | None = None
        self._copies: list[Tensor] = []

    def steps(self) -> Iterator[Snapshot]:
        """Steps of all runs.

        Raises:
            UnsoundError: a product is not finite.
        """
        if not self._first_over:
            yield from self._first()
            self._allow_for_rounding(_MIXED)
            self._first_over = True
        yield from self._others()
        if reached(self):
            self.status = "converged"

    @property
    def ready(self) -> bool:
        """Whether there is an eigenvalue."""
        return self.lanczos.count > 0

    def finish(self, cut: Status | None) -> None:
        """Read off what there is.

        Args:
            cut: what ended it before its own end.
        """
        if cut == "interrupted":
            self.status = cut
        self._read()
        if not self.rounding_measured:
            self._allow_for_rounding(1)
        self.product.forget()
        if self.runs[0].complete:
            self.status = "exact"
        self.finished = True

    @property
    def ritz(self) -> Ritz:
        """The Ritz values of the first run."""
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

    def _snapshot(self) -> Snapshot:
        top, bar = float(self.ritz.values[-1]), float(self.ritz.residuals[-1])
        return Snapshot(phase="iterating", estimate=top, interval=(top - bar, top + bar))

    def _first(self) -> Iterator[Snapshot]:
        """Steps of the long run."""
        lanczos = self.lanczos
        while not self._is_enough():
            lanczos.step()
            self._count(lanczos)
            if lanczos.count <= STEPS or lanczos.count % _READ_EVERY == 0:
                self._read()
            if not self.rounding_measured and lanczos.count >= _FIRST_MEASURED and self.late():
                self._allow_for_rounding(1)
            self.operator.meter.keep()
            yield self._snapshot()
        self._read()

    def _count(self, lanczos: Lanczos) -> None:
        """A step's work beside its product: its row, and twice or thrice all that were before."""
        problem, read = self.operator.problem, _HANDLED + _SWEEPS * lanczos.count
        wide = problem.dtype.itemsize / torch.float64.itemsize
        self.operator.meter.add(problem.vectors(wide, wide * read, lanczos.size))

    def _is_enough(self) -> bool:
        """Whether the long run has all its steps, or reached its goal, or has no more time."""
        lanczos, plan = self.lanczos, self.plan
        if lanczos.count >= plan.steps or lanczos.done:
            return True
        if not lanczos.count:
            return False
        if plan.early and reached(self):
            return True
        self.shortened = self.enough is not None and self.enough(lanczos.count)
        return self.shortened

    def _allow_for_rounding(self, count: int) -> None:
        """Measure the rounding of products with the largest Ritz vectors; all bars count it.

        Of a mixture of m vectors with signs the error is ‖Σ ± e_j‖ / √m. Over all signs that is
        the root mean square of the vectors' own, of which none is more than √m times as long.
        Two mixtures whose signs are orthogonal do not both take away what errors have in common.
        """
        largest = np.argsort(-np.abs(self.ritz.values))[:count]
        signs = np.ones((min(len(largest), MEASURED), len(largest)))
        signs[1:, 1::2] = -1
        coordinates = self.ritz.coordinates[:, largest] @ signs.T / math.sqrt(len(largest))
        mixed = replace(self.ritz, coordinates=coordinates)
        vectors = self.lanczos.columns.whole(self.lanczos.vectors(mixed, slice(None)))
        self.lanczos.allow(math.sqrt(len(largest)) * self.product.rounding(vectors))
        self.rounding_measured = True
        self.convergence.pop()
        self.runs.clear()
        self._read()

    def _read(self) -> None:
        """Let the first run be what it is now."""
        if self.runs and len(self.ritz.values) == self.lanczos.count:
            return
        ritz = self.lanczos.ritz()
        self.runs[:1] = [KrylovRun(ritz, self.size)]
        self.known = counted(ritz)
        top = slice(None, -self.plan.count - 1, -1)
        self.convergence.append(
            ConvergencePoint(
                steps=len(ritz.values),
                values=tuple(ritz.values[top].tolist()),
                residuals=tuple(ritz.residuals[top].tolist()),
            )
        )

    def _others(self) -> Iterator[Snapshot]:
        """The short runs, each in the complement of all eigenvectors that were counted before."""
        if self._number >= self.plan.probes:
            return
        steps = shorter(self.lanczos.count)
        rows = self.lanczos.vectors(self.ritz, _taken(standing_alone(self.ritz)))
        while self._number < self.plan.probes:
            size = self.size - len(rows) - sum(map(len, self._copies))
            if not size:
                return
            seed = key(_NEXT_START, self.plan.seed, self._number)
            lanczos = self._run(seed, steps, (rows, *self._copies))
            if self._begun is not None:
                lanczos.load_state_dict(self._begun)
            self._later, self._begun = lanczos, None
            if self._half is None:
                yield from self._to(lanczos, max(min(steps, size) // 2, 1))
                self._half = _light(lanczos.ritz())
            yield from self._to(lanczos, min(steps, size))
            whole, before = lanczos.ritz(), self.known
            self.halves.append(KrylovRun(self._half, size, before))
            self.runs.append(KrylovRun(_light(whole), size, before))
            self._number, self._later, self._half = self._number + 1, None, None
            if again := copies(before, whole):
                self.known = with_copies(before, whole)
                self._copies.append(lanczos.vectors(whole, _taken(again)))

    def _run(self, seed: int, steps: int, apart: Sequence[Tensor] = ()) -> Lanczos:
        """With room for so many steps, in the complement of some vectors."""
        problem = self.operator.problem
        return Lanczos(
            self.product,
            self.size,
            seed=seed,
            dtype=problem.dtype,
            device=problem.device,
            reserve=steps,
            rounding=self.plan.rounding,
            apart=apart,
            shared=True,
        )

    def _to(self, lanczos: Lanczos, count: int) -> Iterator[Snapshot]:
        """So many steps in all."""
        while lanczos.count < count:
            lanczos.step()
            self._count(lanczos)
            self.operator.meter.keep()
            yield self._snapshot()

    def state_dict(self) -> State:
        """All runs: of those that are over the readings, of those that are not the bases."""
        later = None if self._later is None else self._later.state_dict()
        return {
            "status": self.status,
            "finished": self.finished,
            "shortened": self.shortened,
            "rounding_measured": self.rounding_measured,
            "first_over": self._first_over,
            "lanczos": self.lanczos.state_dict(),
            "product": self.product.state_dict(),
            "runs": [_told(run) for run in self.runs],
            "halves": [_told(run) for run in self.halves],
            "known": [asdict(one) for one in self.known],
            "convergence": [asdict(point) for point in self.convergence],
            "number": self._number,
            "half": None if self._half is None else asdict(self._half),
            "later": {str(self._number): later},
            "copies": self.lanczos.columns.rows(*self._copies) if self._copies else None,
            "copied": [len(block) for block in self._copies],
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from where another of the same matrix and plan was."""
        self.status, self.finished = state["status"], state["finished"]
        self.shortened, self._first_over = state["shortened"], state["first_over"]
        self.rounding_measured = state["rounding_measured"]
        self.lanczos.load_state_dict(state["lanczos"])
        self.product.load_state_dict(state["product"])
        self.runs = [_run(told) for told in state["runs"]]
        self.halves = [_run(told) for told in state["halves"]]
        if self.runs and len(self.ritz.values) == self.lanczos.count:
            self.runs[0] = KrylovRun(self.lanczos.ritz(), self.size)
        self.known = tuple(Counted(**one) for one in state["known"])
        self.convergence = [
            ConvergencePoint(
                steps=point["steps"],
                values=tuple(point["values"]),
                residuals=tuple(point["residuals"]),
            )
            for point in state["convergence"]
        ]
        self._number = state["number"]
        self._half = None if state["half"] is None else Ritz(**state["half"])
        self._begun = state["later"][str(self._number)]
        if state["copies"] is not None:
            own = self.lanczos.columns.own
            rows = torch.cat([block[:, own] for block in state["copies"].since(0)])
            self._copies = list(torch.split(rows, state["copied"]))


def shorter(steps: int) -> int:
    """Steps of a run for the rest, after a first one of so many."""
    return max(steps // SHORTER, min(SHORTEST, steps))


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


def _taken(groups: Sequence[Group]) -> list[int]:
    return [index for group in groups for index in group.indices]


def _told(run: KrylovRun) -> State:
    """Without vectors."""
    return asdict(replace(run, ritz=_light(run.ritz)))


def _run(told: State) -> KrylovRun:
    deflated = tuple(Counted(**one) for one in told["deflated"])
    return KrylovRun(Ritz(**told["ritz"]), told["dimension"], deflated)


def _light(ritz: Ritz) -> Ritz:
    """A reading of Ritz values without their vectors."""
    return replace(ritz, coordinates=np.empty((0, len(ritz.values))))
