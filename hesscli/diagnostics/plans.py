"""What commands will take: each says it itself, from first steps on a few batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

from hesscli import world
from hesscli.diagnostics.choice import DEFLATION_STEPS, Choice, Draw
from hesscli.diagnostics.estimation import Goal
from hesscli.diagnostics.looks import Tolerance
from hesscli.diagnostics.measurement import Pace, Work
from hesscli.diagnostics.reporting import chosen, expected
from hesscli.diagnostics.run import Run
from hesscli.diagnostics.window import WindowOptions
from hesscli.engines.entries import Entries, needed_bytes
from hesscli.engines.hutchinson.designs import REGIME_PROBES, Probes
from hesscli.errors import BudgetError, UsageError
from hesscli.memory import peak_bytes, room_for_more
from hesscli.meter import Spent, now
from hesscli.operators.base import Operator
from hesscli.operators.products import flatten, gradient
from hesscli.randomness import key
from hesscli.results import PlannedCommand
from hesscli.torch_private import storages_kept
from hesscli.units import duration
from hesscli.vocabulary import USUAL_RTOL

# -- How fast products are: timed on one batch -----------------------------------------------------


_REPEATS = 3
_TIMING = 0.5
"""Seconds from which on nothing is timed again: what is slow is timed well the first time."""
_PRODUCTS = 2
"""That are made on one graph, unless a vector takes so much that a block has but one."""


def measured_pace(operator: Operator) -> tuple[Pace, int]:
    """Of gradients and products over all data, and the bytes that a product of a batch keeps.

    One batch is timed, and others take as much longer as they are priced. Forward mode does not
    let its memory be watched: it carries what a gradient keeps once more for each vector.
    """
    problem = operator.problem
    batch = problem.batch(problem.indices[0])
    forward = operator.mode == "forward-over-reverse"
    beside = 0 if forward else operator.at_once
    many = min(max(_PRODUCTS, beside), operator.block_size)
    block = Probes(operator, 0, "fresh", "rademacher").block(batch.index, 0, many)
    kept = dict[int, int]()

    def timed(watching: Callable[[], AbstractContextManager[Any]]) -> tuple[float, ...]:
        ticks = [now(problem.device)]
        seen = watching() if forward else nullcontext()
        with seen, problem.forward_context(), problem.recomputing():
            flatten(gradient(problem.evaluate(batch.data), operator.parameters.tensors))
        ticks.append(now(problem.device))
        with nullcontext() if forward else watching(), problem.forward_context():
            products = operator.live(batch, side_by_side=beside > 1)
            ticks.append(now(problem.device))
            products(block)
        ticks.append(now(problem.device))
        return tuple(after - before for before, after in pairwise(ticks))

    began = time.perf_counter()
    rounds = [timed(partial(storages_kept, kept))]
    while len(rounds) <= _REPEATS and time.perf_counter() - began < _TIMING:
        rounds.append(timed(nullcontext))
    (graph, each), alone = operator.cost, problem.share_of(batch.count)
    first, second, third = (
        sorted(times)[len(times) // 2] / alone for times in zip(*rounds[1:] or rounds, strict=True)
    )
    held = (1 + forward * many) * sum(kept.values())
    pace = Pace(
        gradient=Spent(gradients=problem.gradient_cost, seconds=first),
        graph=Spent(gradients=graph, seconds=second),
        product=Spent(products=1.0, gradients=each, seconds=third / many),
        graph_bytes=round(held * problem.data.count / batch.count),
        joint=problem.joint_share,
        apart=problem.share_in([(index,) for index in problem.indices]),
    )
    gain = world.gain(len(problem.indices))
    pace = replace(
        pace, **{name: getattr(pace, name).dealt(gain) for name in ("gradient", "graph", "product")}
    )
    return pace, held + 2 * block.nbytes


# -- First steps of estimators, on a few batches, and what commands plan from them -----------------


PILOT_BATCHES, PILOT_CELLS = 16, 8
"""Batches at most, and quadratic forms at least: few batches have more probes each."""
_SHARE, _LONGEST = 0.05, 30.0
"""Of the budget, and seconds, that a pilot may take."""
_PILOT_SEED = 0x91707
"""The pilot's probes are its own: a plan must not be made of the numbers that it plans."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What commands would be asked for, by the names of their options; None is not typed."""

    rtol: float | None
    atol: float | None
    confidence: float
    method: str
    window: WindowOptions
    seed: int

    def tolerance(self, command: str) -> Tolerance:
        """A command's, which is its usual one where none is typed."""
        usual = self.rtol is None and self.atol is None
        return Tolerance(USUAL_RTOL[command] if usual else self.rtol, self.atol)


class Pilot:
    """What commands plan from; what none of them needs is not done.

    Args:
        run: the matrix.
        asked: of the commands.
        pace: of its products.
    """

    def __init__(self, run: Run, asked: Asked, pace: Pace) -> None:
        self.run, self.asked, self.pace = run, asked, pace
        self._choices = dict[str, Choice]()

    def estimated(self, goal: Goal) -> Iterator[Work]:
        """What the method takes that is asked for, to the confidence that is.

        Args:
            goal: as it will be seen from many probes.

        Raises:
            UsageError: the problem does not allow the method.
        """
        choice, miss = self.choice(self.asked.method), 1 - self.asked.confidence
        return expected(self.run, choice, goal, miss, self.pace)

    def choice(self, method: str) -> Choice:
        """An estimator that has seen a few batches, or one if it is exact.

        Raises:
            UsageError: the problem does not allow the method.
        """
        if method not in self._choices:
            batches, probes = self._extent
            problem = self.run.problem
            fits = needed_bytes(problem.parameters.size) <= room_for_more(problem.device)
            draw = Draw(
                key(_PILOT_SEED, self.asked.seed),
                entries=Entries(problem.parameters, problem.device) if fits else None,
                batches=problem.indices[:batches],
                pilot=True,
            )
            choice, on_step = chosen(self.run, method, draw), self.run.clock.watch("pilot")
            for _ in choice.estimator.extend(probes):
                on_step()
                if choice.estimator.exact and choice.estimator.coverage():
                    break
            if choice.rethink is not None:
                looking = REGIME_PROBES * (len(problem.parameters.layers) + 2) + 3 * DEFLATION_STEPS
                rethink = replace(
                    choice.rethink,
                    draw=replace(draw, seed=self.asked.seed),  # it decides as the run will
                    fits=self._fits,
                    designs=self._affordable(looking) >= 1,
                    foretells=True,
                )
                choice = replace(choice, rethink=rethink)
            self._choices[method] = choice
        return self._choices[method]

    @cached_property
    def _extent(self) -> tuple[int, int]:
        """Batches, and probes of each, for which there is time."""
        affordable = self._affordable(2)
        batches = min(len(self.run.problem.indices), PILOT_BATCHES, max(affordable, 2))
        return batches, max(2, min(-(-PILOT_CELLS // batches), 2 * affordable // batches))

    def _affordable(self, products: int) -> int:
        """Batches for each of which so many products may be made."""
        budget, batches = self.run.clock.budget, len(self.run.problem.indices)
        limit = _LONGEST if budget is None else min(_LONGEST, _SHARE * budget)
        return int(limit * batches / max(self.pace.products_apart(products).seconds, 1e-9))

    def _fits(self, products: int) -> bool:
        """Whether the run has time for so many."""
        seconds, budget = self.pace.products(products).seconds, self.run.clock.budget
        return budget is None or self.run.before.seconds + seconds <= budget


# -- A command's plan, as it is reported -----------------------------------------------------------


Planner = Callable[[Pilot], Iterable[Work]]
"""A command's own, which the registry names."""


def planned(command: str, plan: Planner, pilot: Pilot) -> PlannedCommand:
    """What a command takes, proof and checks included; nothing where it will be refused.

    Args:
        command: its name.
        plan: its own.
        pilot: that it plans from.
    """
    held, before = peak_bytes(pilot.run.problem.device), pilot.run.before
    try:
        stages = tuple(plan(pilot))
    except UsageError as error:
        return _nothing(command, held, f"refused: {error.what}, {error.got}; {error.hint}")
    except BudgetError as error:
        return _nothing(command, held, f"no time to plan it: {error.got}; {error.hint}")
    total = sum((stage.spent for stage in stages), before)
    batches, budget = len(pilot.run.problem.indices), pilot.run.clock.budget
    notes = [
        *(stage.note for stage in stages),
        _cut(stages, before, budget),
        _wanted(total, batches, budget),
    ]
    return PlannedCommand(
        command=command,
        products=total.products,
        gradients=total.gradients,
        seconds=total.seconds,
        peak_bytes=held + sum(stage.num_bytes for stage in stages),
        note="; ".join(filter(None, notes)),
    )


def _nothing(command: str, held: int, why: str) -> PlannedCommand:
    return PlannedCommand(
        command=command, products=0.0, gradients=0.0, seconds=0.0, peak_bytes=held, note=why
    )


def _wanted(total: Spent, batches: int, budget: float | None) -> str:
    """How many ranks would be in time where these are not, if any number would."""
    if budget is None or total.seconds <= budget:
        return ""
    now = world.gain(batches)
    for ranks in range(world.launched() + 1, batches + 1):
        seconds = total.seconds - total.shared * (1 - now / world.gain(batches, ranks))
        if seconds <= budget:
            return (
                f"{ranks} ranks, each on a core or GPU of its own, would take {duration(seconds)}"
            )
    return ""


def _cut(stages: Sequence[Work], before: Spent, budget: float | None) -> str:
    """What is lost where a plan takes longer than it will be given."""
    ends = before.seconds
    for number, stage in enumerate(stages):
        began, ends = ends, ends + stage.spent.seconds
        if budget is None or ends <= budget:
            continue
        share = max(0.0, budget - began) / stage.spent.seconds
        missing = dict.fromkeys(later.phase for later in stages[number + 1 :])
        without = f", without {' and '.join(missing)}" if missing else ""
        return (
            f"beyond --budget {duration(budget)}, which ends it after {share:.0%} of "
            f"{stage.phase}{without}"
        )
    return ""
