"""What every run has: a clock, its surroundings, and a matrix that has passed its checks."""

from __future__ import annotations

import hashlib
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch

from hesscli import world
from hesscli.diagnostics.growth import Growth
from hesscli.diagnostics.keeping import UNKEPT, Ledger
from hesscli.errors import BudgetError
from hesscli.memory import peak_bytes
from hesscli.meter import Meter, OnStep, Spent
from hesscli.operators.at_once import vectors_at_once
from hesscli.operators.base import Operator
from hesscli.operators.matrices import matrix_named
from hesscli.operators.preflight import checked, recall
from hesscli.problem.precision import doubled
from hesscli.problem.problem import Problem
from hesscli.results import (
    Check,
    Cost,
    Environment,
    MethodReport,
    Observe,
    Preflight,
    ProblemReport,
    Snapshot,
)
from hesscli.units import larger_budget

# -- A run's time: its limit, and the observer's line ----------------------------------------------


class Stopped(KeyboardInterrupt):
    """The observer wants no more: to everyone else, as if Ctrl-C had been pressed."""


@dataclass
class Clock:
    """Time since the start, and whom to tell.

    Args:
        budget: seconds, or None for no limit.
        observer: called with each snapshot.
        ending: seconds before the budget's end at which work ends, since reading off what it has
            come to will take them.
        earlier: seconds that the run had taken in other processes, which no budget of this one
            pays for.
        growth: looks at memory as this does at time.
        cut_by: what ended the work that was neither time nor anybody, if anything did.
    """

    budget: float | None
    observer: Observe | None
    ending: float = 0.0
    earlier: float = 0.0
    growth: Growth | None = None
    cut_by: str | None = None
    _began: float = field(default_factory=lambda: time.monotonic())
    _agreed: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the start, those before this process included."""
        return self.earlier + self._passed

    @property
    def elapsed(self) -> float:
        """Seconds in this process; of many ranks, by rank 0 when they last looked together."""
        return self._passed if world.size() == 1 or world.is_apart() else self._agreed

    @property
    def _passed(self) -> float:
        return time.monotonic() - self._began

    @property
    def spent(self) -> float:
        """Share of the budget that is spent."""
        return self.elapsed / self.budget if self.budget else 0.0

    @property
    def left(self) -> float:
        """Seconds for more work."""
        return math.inf if self.budget is None else self.budget - self.ending - self.elapsed

    def within_budget(self, snapshot: Snapshot) -> bool:
        """Tell the observer, and look at the time; itself an observer that never wants to stop.

        Raises:
            BudgetError: the time is up.
            Stopped: the observer wants no more.
        """
        observed = replace(snapshot, seconds=self.seconds)
        stop = self.observer is not None and self.observer(observed)
        stop, self._agreed = world.at_the_clock(stop, self._passed)
        if stop:
            raise Stopped
        self.look(snapshot)
        return False

    def look(self, snapshot: Snapshot) -> None:
        """Look at the time, where there is nothing new to tell.

        Raises:
            BudgetError: the time is up.
            Stopped: this rank, of many, has had a signal to end.
        """
        if world.is_apart() and world.at_the_clock(False, 0.0)[0]:
            raise Stopped
        if self.left < 0:
            raise self._no_time_for(snapshot)

    def watch(self, phase: str) -> OnStep:
        """What work of unknown length calls between its steps; raises as :meth:`within_budget`."""
        snapshot = Snapshot(phase=phase)
        self.within_budget(snapshot)
        return partial(self.within_budget, snapshot)

    def _no_time_for(self, snapshot: Snapshot) -> BudgetError:
        """What is said where there is no result by then."""
        done = snapshot.done / snapshot.total if snapshot.done and snapshot.total else 1.0
        return BudgetError(
            "the budget ended before there was a result",
            f"{self.seconds:.1f} s, then still at {snapshot.phase}",
            larger_budget(self.seconds, done),
        )


# -- Where a run happens ---------------------------------------------------------------------------


def environment(device: torch.device) -> Environment:
    """Where it runs: versions, device and threads."""
    cuda = device.type == "cuda"
    return Environment(
        python=platform.python_version(),
        torch=torch.__version__,
        device_name=torch.cuda.get_device_name(device) if cuda else platform.machine(),
        threads=torch.get_num_threads(),
        tf32=False,  # switched off meanwhile
    )


# -- How every diagnostic begins: the proof, the preflight, and the matrix in its working type -----


@dataclass(frozen=True)
class Run:
    """A matrix that has passed its checks, and the time that may be taken with it.

    ``proof`` is the seconds that its gradient took, where it was made for this run, and ``before``
    what it and checks did.
    """

    operator: Operator
    report: ProblemReport
    flight: Preflight
    clock: Clock
    proof: float
    before: Spent
    ledger: Ledger = UNKEPT

    @property
    def problem(self) -> Problem:
        """The problem that is measured."""
        return self.operator.problem

    def method(self, name: str, seed: int, note: str = "", **more: Any) -> MethodReport:
        """How numbers were made by products that have passed the checks.

        Args:
            name: of the method.
            seed: of all that is drawn.
            note: what else there is to say.
            more: further fields of the report.
        """
        flight = self.flight
        kernel = flight.attention_kernel
        return MethodReport(
            name=name, seed=seed, mode=flight.mode, attention_kernel=kernel, note=note, **more
        )

    def header(self, warnings: Iterable[str] = ()) -> dict[str, Any]:
        """The fields that all results share.

        Args:
            warnings: the result's own, which follow those of problem and products.
        """
        problem = self.problem
        clock = self.clock
        memory = filter(None, (clock.growth and clock.growth.warning, clock.cut_by))
        return {
            "problem": self.report,
            "environment": environment(problem.device),
            "warnings": (
                *problem.warnings,
                *warnings_of_products(problem, self.flight),
                *warnings,
                *problem.together.warnings,
                *memory,
            ),
        }

    def pace(self) -> Callable[[float], bool]:
        """Whether so many products more fit into the budget, at their pace from now on."""
        clock, meter = self.clock, self.operator.meter
        began, before = clock.elapsed, meter.products - meter.earlier

        def fits(products: float) -> bool:
            made = meter.products - meter.earlier - before
            if not made:  # nobody knows yet
                return True
            return (clock.elapsed - began) / made * products <= clock.left

        return fits

    def cost(self) -> Cost:
        """What it took so far, the proof included."""
        meter = self.operator.meter
        return Cost(
            products=meter.products,
            gradients=meter.gradients,
            seconds=self.clock.seconds,
            peak_bytes=peak_bytes(self.problem.device),
        )


@contextmanager
def started(
    problem: Problem, matrix: str, mode: str, clock: Clock, ledger: Ledger = UNKEPT
) -> Iterator[Run]:
    """Prove the problem, check its products, and make the matrix.

    The proof is made anew in every process: that loss and gradient are the same to the last bit
    shows that a ledger is of this problem. The checks are not.

    Raises:
        UsageError: a matrix that this problem does not have, or a ledger of another run.
        UnsoundError: the problem's curvature would mean nothing.
        BudgetError: there is no time for that.
        KeyboardInterrupt: the observer wanted no more.
    """
    build, meter = matrix_named(matrix), Meter()
    began = clock.elapsed
    problem.prove(clock.within_budget, meter)
    proof = clock.elapsed - began
    report = problem.report(build.name)  # of the user's own type, whatever differences are in
    ledger.attach(clock, meter)
    if ledger is not UNKEPT:
        ledger.recognise(_facts(problem, report))

    def found() -> dict[str, Any]:
        return asdict(checked(problem, build, mode, meter, clock.watch("preflight")))

    fits = ledger.decided("room for float64", lambda: problem.has_room_for_float64)
    problem.has_room_for_float64 = fits
    flight = _as_kept(ledger.decided("preflight", found))
    recall(problem, build, mode, flight)
    with doubled(problem) if flight.mode == "finite-difference" else nullcontext():
        before = Spent(meter.products, meter.gradients, clock.elapsed)
        operator = build(problem, mode=flight.mode, meter=meter)
        clock.growth = Growth(problem.device)
        if not problem.together.halved:
            problem.together.most = ledger.decided("at once", partial(vectors_at_once, operator))
        yield Run(operator, report, flight, clock, proof, before, ledger)
    ledger.close()


def _facts(problem: Problem, report: ProblemReport) -> dict[str, Any]:
    """What tells runs apart: all that is said of a problem but its place, and where it runs."""
    facts = asdict(report) | asdict(environment(problem.device))
    # The gradient's own last digits are those of a sum over batches, which depend on the ranks.
    lengths = torch.tensor(problem.prove().lengths, dtype=torch.float64, device="cpu")
    del facts["gradient_norm"]
    facts |= {"gradient": _hash([lengths]), "gradient_size": float(lengths.norm())}
    if report.checkpoint is None:
        facts["weights"] = _hash((*problem.model.parameters(), *problem.model.buffers()))
    else:
        facts["checkpoint"] = report.checkpoint.sha256
    facts["examples"] = facts.pop("manifest_sha256")
    del facts["data"]  # a place, and a hash that the origin tells
    return facts


def _hash(tensors: Iterable[Any]) -> str:
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def _as_kept(kept: dict[str, Any]) -> Preflight:
    """A preflight of its plain values, which a ledger has."""
    checks = [{k: v for k, v in one.items() if k != "passed"} for one in kept["checks"]]
    return Preflight(**kept | {"checks": tuple(Check(**one) for one in checks)})


def warnings_of_products(problem: Problem, flight: Preflight) -> Iterator[str]:
    """What proof and preflight have seen of the loss and its products."""
    yield from problem.prove().warnings
    if problem.precision.widened:
        narrow = str(problem.precision.plain).removeprefix("torch.")
        yield f"the model casts to {narrow}: it was checked with those casts made to float64"
    if skipped := [check for check in flight.checks if check.state == "skipped"]:
        names = " and ".join(check.name for check in skipped)
        yield f"not checked: {names}, {skipped[0].detail}"
    if flight.relative_rounding is None:
        own = str(problem.precision.narrowest).removeprefix("torch.")
        yield f"rounding is unknown, and checks were in {own}: {problem.precision.why_narrow}"
    if flight.fallback is not None:
        yield f"slower {flight.mode} products, for {flight.fallback}"
    if flight.mode == "finite-difference":
        yield "products are central differences: no error bar covers what a kink adds to them"
    if unreached := problem.prove().unreached:
        yield f"the loss does not reach {', '.join(unreached[:5])} ({len(unreached)} tensors)"
