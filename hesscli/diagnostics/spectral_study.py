"""The matrices whose spectra are explored: the whole one, its dense form, and layers' blocks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from hesscli import world
from hesscli.diagnostics.measurement import Pace, Work
from hesscli.diagnostics.run import Run
from hesscli.diagnostics.spectral_runs import (
    MEASURED,
    SHORTEST,
    STEPS,
    Exploration,
    SpectralPlan,
    basis_bytes,
    needed_bytes,
    room_for_graphs,
    shorter,
)
from hesscli.errors import UsageError
from hesscli.memory import available_bytes
from hesscli.meter import Spent
from hesscli.parameters import Parameters
from hesscli.problem.precision import tolerance
from hesscli.problem.problem import Problem
from hesscli.results import Snapshot, Status
from hesscli.state import Rows, State
from hesscli.units import human_bytes

_COLUMNS = 32  # of a dense matrix, between two looks at the clock
_FORMING = "forming the matrix"
_TIMED, _MOST_TIMED = 4, 1 << 22
"""Vectors, and the most of their entries, with which orthogonalisation is timed."""
_LATE = 0.5
"""Share of the budget."""
_WORSE: tuple[Status, ...] = ("exact", "converged", "budget", "interrupted")


class SpectralStudy:
    """What is explored, one matrix after another; each may be the last."""

    def __init__(self, run: Run, plan: SpectralPlan, layers: tuple[str, ...], exact: bool) -> None:
        self.run, self.operator = run, run.operator
        measured = run.flight.product_rounding
        usual = tolerance(self.operator.problem.precision.narrowest)
        self.plan = replace(plan, rounding=usual if measured is None else measured)
        parameters = self.operator.parameters
        self.blocks = {
            layer: self.operator.block(Parameters(parameters.in_layer(layer))) for layer in layers
        }
        self.exact = exact
        self.dense: Tensor | None = None
        self._columns, self._formed_columns = torch.empty(0, 0, device="cpu"), 0
        self.found: dict[str, Exploration] = {}
        self.cut: Status | None = None

    lasting = False

    @cached_property
    def whole(self) -> Exploration:
        """The exploration of the whole matrix; made when it is needed, since it takes memory."""
        fits, measured = self.run.pace(), MEASURED

        def enough(steps: int) -> bool:
            ahead = self._products(steps + 1) - steps + measured
            return steps >= SHORTEST and not fits(ahead)

        return Exploration(
            self.operator,
            self.plan,
            enough if self.plan.shorter else None,
            late=self._is_late,
            on_step=self._look,
        )

    @property
    def products(self) -> float:
        """Products that were made so far."""
        return self.operator.meter.products

    @property
    def ready(self) -> bool:
        """Whether there is an eigenvalue."""
        return self.whole.ready

    def steps(self) -> Iterator[Snapshot]:
        """The whole matrix, its dense form, and then the blocks of layers."""
        yield from self._explored(self.whole)
        if self.exact and self.dense is None:
            yield from self._formed()
        for layer in self.blocks:
            if layer not in self.found:
                self.found[layer] = self._of_block(layer)
            yield from self._explored(self.found[layer])

    def _look(self) -> None:
        """Look at the time within a product, which can be made again."""
        self.run.clock.look(Snapshot(phase="iterating"))

    def _is_late(self) -> bool:
        """Whether so much of the budget is spent that it may end what is under way."""
        return self.run.clock.spent >= _LATE

    def _of_block(self, layer: str) -> Exploration:
        """As many steps as were made with the whole, where there was no time for more."""
        plan = self.plan
        if self.whole.shortened:
            plan = replace(plan, steps=self.whole.lanczos.count)
        return Exploration(self.blocks[layer], plan, late=self._is_late, on_step=self._look)

    def state_dict(self) -> State:
        """Of all explorations so far, and the dense matrix as far as it is formed."""
        formed = self._formed_columns
        return {
            "whole": self.whole.state_dict(),
            "columns": Rows(self._columns[:formed]) if formed else None,
            "dense": None if self.dense is None else Rows(self.dense),
            "found": {layer: found.state_dict() for layer, found in self.found.items()},
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from where another of the same matrices was."""
        self.whole.load_state_dict(state["whole"])
        size = self.operator.parameters.size
        if state["dense"] is not None:
            self.dense = torch.empty(size, size, dtype=torch.float64, device="cpu")
            state["dense"].copy_to(self.dense)
        elif state["columns"] is not None:
            self._formed_columns = len(state["columns"])
            self._columns = torch.empty(size, size, dtype=torch.float64, device="cpu")
            state["columns"].copy_to(self._columns)
        for layer, found in state["found"].items():
            self.found[layer] = self._of_block(layer)
            self.found[layer].load_state_dict(found)

    def finish(self, cut: Status | None) -> None:
        """Read off what there is.

        Args:
            cut: what ended it before its own end.
        """
        self.cut = cut
        self.found = {layer: found for layer, found in self.found.items() if found.ready}
        for found in (self.whole, *self.found.values()):
            if not found.finished:
                found.finish(cut)

    def expected(self, pace: Pace) -> Iterator[Work]:
        """Runs of as many steps as there is time for, if they may be fewer."""
        plan, why, size = self.plan, "", self.operator.parameters.size
        if (steps := self._steps_in_time(pace)) < plan.steps:
            plan, why = replace(plan, steps=steps), " for want of time"
        elif plan.shorter and plan.steps < min(STEPS, size):
            why = " for want of memory"
        problem = self.run.problem
        held = needed_bytes(problem, plan.steps, plan.probes)
        yield Work(
            phase="iterating",
            spent=self._runs(plan, pace),
            num_bytes=held + self._graph_bytes(plan, pace),
            note=f"{plan.steps} steps{why}, each of which keeps a vector: "
            f"{human_bytes(basis_bytes(problem, plan.steps))}, at most {human_bytes(held)} "
            f"with restarts{_on_each()}",
        )
        if self.exact:
            yield Work(phase=_FORMING, spent=pace.products(size, -(-size // _COLUMNS)))
        for layer, block in self.blocks.items():
            count = plan.products(block.parameters.size)
            yield Work(phase=f"iterating on {layer}", spent=pace.products(count, count))

    def _steps_in_time(self, pace: Pace) -> int:
        """Of the first run, so that the later ones are made too; at most as planned."""
        budget, most = self.run.clock.budget, self.plan.steps
        if budget is None or not self.plan.shorter:
            return most
        left, fewest = budget - self.run.before.seconds, min(SHORTEST, most)
        plans = (replace(self.plan, steps=steps) for steps in range(most, fewest, -1))
        fitting = (plan.steps for plan in plans if self._runs(plan, pace).seconds <= left)
        return next(fitting, fewest)

    def _runs(self, plan: SpectralPlan, pace: Pace) -> Spent:
        """On the whole matrix: products, and vectors made orthogonal to all before them, twice."""
        count = plan.products(self.operator.parameters.size)
        kept = self._graph_bytes(plan, pace) == pace.graph_bytes
        rows = plan.steps**2 + (plan.probes - 1) * shorter(plan.steps) ** 2
        orthogonal = Spent(seconds=rows * self._row_seconds).dealt(world.size())
        return pace.products(count, 1 if kept else count) + orthogonal

    def _graph_bytes(self, plan: SpectralPlan, pace: Pace) -> int:
        """What graphs take that are kept from one product to the next, as many as fit."""
        if self.operator.mode != "double-backward":
            return 0
        return max(0, min(pace.graph_bytes, room_for_graphs(self.operator, plan)))

    @cached_property
    def _row_seconds(self) -> float:
        """What a vector takes to be made orthogonal to another, by one rank."""
        problem, size = self.operator.problem, self.operator.parameters.size
        entries = min(size, _MOST_TIMED)
        rows = torch.ones(_TIMED, entries, dtype=problem.dtype, device=problem.device)
        vector, times = torch.ones_like(rows[0]), []
        for _ in range(3):
            began = time.perf_counter()
            vector -= (rows @ vector) @ rows
            float(vector[0])
            times.append(time.perf_counter() - began)
        return min(times) / _TIMED * size / len(vector)

    @property
    def status(self) -> Status:
        """How the whole study ended."""
        missing = len(self.found) < len(self.blocks) or (self.exact and self.dense is None)
        if self.cut is not None and missing:
            return self.cut
        every = (self.whole, *self.found.values())
        return max((self.status_of(found) for found in every), key=_WORSE.index)

    def status_of(self, found: Exploration) -> Status:
        """How one matrix was left: exact only on every example, with rounding that was measured."""
        is_exact = self.operator.problem.sampling_fraction == 1 and self.operator.autocast is None
        if found.status == "exact" and not (is_exact and self.run.flight.product_rounding):
            return "converged"
        return found.status

    def _explored(self, found: Exploration) -> Iterator[Snapshot]:
        """One matrix, with the progress of all."""
        if found.finished:
            return
        for snapshot in found.steps():
            steps = self.whole.lanczos.count if self.whole.shortened else self.plan.steps
            total = float(self._products(steps))
            yield replace(snapshot, done=min(self.products, total), total=total)
        found.finish(None)

    def _products(self, steps: int) -> int:
        """In all, with so many steps in each first run."""
        plan, size = replace(self.plan, steps=steps), self.operator.parameters.size
        sizes = (size, *(block.parameters.size for block in self.blocks.values()))
        return sum(map(plan.products, sizes)) + (size if self.exact else 0)

    def _formed(self) -> Iterator[Snapshot]:
        """The dense matrix, a few columns at a time."""
        size = self.operator.parameters.size
        if not self._formed_columns:
            self._columns = torch.empty(size, size, dtype=torch.float64, device="cpu")
        for start in range(self._formed_columns, size, _COLUMNS):
            stop = min(start + _COLUMNS, size)
            unit = torch.zeros(stop - start, size, dtype=torch.float64, device="cpu")
            unit[:, start:stop].fill_diagonal_(1.0)
            self._columns[start:stop] = self.operator.in_full().apply(unit).cpu()
            self._formed_columns = stop
            self.operator.meter.keep()
            yield Snapshot(phase=_FORMING, done=float(stop), total=float(size))
        self.dense = self._columns.add_(self._columns.T.clone()).div_(2)
        self._columns, self._formed_columns = torch.empty(0, 0, device="cpu"), 0


# -- What ``hesscli spectrum`` will take, and whether it fits --------------------------------------


_SPARE = 0.9
"""Of the free memory, what may be taken: there is more to do than to hold vectors."""

_MOST_STEPS = 512


def most_steps(problem: Problem, probes: int, wanted: int = _MOST_STEPS) -> int:
    """As many as are wanted and fit; by default no more than can be orthogonalised soon."""
    return max(1, _fitting(problem, probes, wanted, _room(problem)))


def _room(problem: Problem) -> int:
    return int(_SPARE * available_bytes(problem.device))


def _fitting(problem: Problem, probes: int, most: int, room: int) -> int:
    """Steps that fit into so many bytes; 0 where none do."""
    fit = (steps for steps in range(most, 0, -1) if needed_bytes(problem, steps, probes) <= room)
    return next(fit, 0)


def require_room(problem: Problem, plan: SpectralPlan) -> None:
    """See that the vectors fit into memory, before any of it is taken.

    Raises:
        UsageError: they do not; the hint names a run that does.
    """
    room, needed = _room(problem), needed_bytes(problem, plan.steps, plan.probes)
    if needed <= room:
        return
    raise UsageError(
        "the Lanczos vectors do not fit in the memory that is free",
        f"{plan.steps} steps of {problem.parameters.size} parameters take "
        f"{human_bytes(basis_bytes(problem, plan.steps))}, {human_bytes(needed)} with restarts"
        f"{_on_each()}, and there is room for {human_bytes(room)}",
        _proposal(problem, plan, room),
    )


def _on_each() -> str:
    """Whose bytes these are."""
    return f", on each of {world.size()} ranks" if world.size() > 1 else ""


def _proposal(problem: Problem, plan: SpectralPlan, room: int) -> str:
    """Fewer steps, or fewer start vectors, that fit; or as many ranks as have room."""
    offers = []
    for starts in dict.fromkeys((plan.probes, 1)):
        if steps := _fitting(problem, starts, plan.steps, room):
            fewer = " --probes 1" if starts == 1 != plan.probes else ""
            offers.append(f"--steps {steps}{fewer}")
    if (spare := room - basis_bytes(problem, 1, ranks=1)) > 0:
        ranks = -(-needed_bytes(problem, plan.steps, plan.probes, ranks=1) // spare)
        offers.append(f"{ranks} ranks with as much memory each")
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
