"""An estimator's way to a tolerance: it is read at few looks, and may turn to a better one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal, Protocol

from hesscli.diagnostics.looks import PAST, Standing, first_look, miss_probability, next_look
from hesscli.diagnostics.measurement import Pace, Work
from hesscli.engines.entries import GROUP
from hesscli.engines.estimator import Engine, Estimator, Reading, Rounding, read
from hesscli.engines.unit_vectors import UnitVectors
from hesscli.errors import BudgetError, UsageError
from hesscli.meter import Spent, watched
from hesscli.results import Snapshot, Status
from hesscli.state import State

_SHOW_EVERY = 0.3
"""Seconds between two readings of a growing table for the progress bar."""
_FEWEST = 2
"""Probes of each batch, for an error bar."""
_MOST_FORESEEN = 2.0**40
"""Probes of each batch that a plan has."""

Goal = Callable[[Estimator, Reading], Standing]


@dataclass(frozen=True)
class Turn:
    """A better estimator for the way that is left: its kind, and why it was chosen.

    ``steps`` are Lanczos', where it has some; ``work`` is how much of the plain probes' is
    expected to be left, all of it where nobody has measured that.
    """

    kind: Literal["unit vectors", "stratified", "deflated"]
    why: str
    steps: int = 0
    work: float = 1.0


class Rethink(Protocol):
    """Looks for a better estimator, and makes it."""

    def units(self, estimator: Estimator, probes: int) -> Turn | None:
        """Unit vectors, where they are better than so many probes."""

    def decide(self, estimator: Estimator, needed: float) -> Turn | None:
        """What would be better than so many probes of an estimator, if anything."""

    def take(self, turn: Turn, estimator: Estimator) -> Estimator:
        """The one that it came to, in the place of another."""


@dataclass(frozen=True)
class Outcome:
    """How an estimation ended, and with what.

    ``rounding`` is that of the reading; ``turn`` is why its estimator was changed; ``joined`` that
    it is made of parts; ``cut_turn`` what its last estimator was doing when it was cut off, where
    that says nothing before it is done, so that the one before it is reported.
    """

    status: Status
    estimator: Estimator
    reading: Reading
    looks: int
    rounding: Rounding
    turn: str | None = None
    joined: bool = False
    cut_turn: str | None = None


class Estimation:
    """An estimator's way to a goal, or through a number of probes that was set beforehand.

    Args:
        estimator: to be extended.
        goal: how far a reading is from what is wanted.
        miss: probability with which the interval may miss, all looks together.
        rounding: error of a quadratic form relative to its size.
        rethink: is given the estimator after a first look and the probes that it would take;
            may have a better one.
        probes: of each batch; None to go on until the goal is reached, each look with its share of
            the error budget.
        look: at the time, between two products of a step; may end it.
        fits: whether there is time for so many products; where there is none for those of a batch,
            they are not begun once there is a result. Default: they are.
    """

    def __init__(
        self,
        estimator: Estimator,
        goal: Goal,
        miss: float,
        rounding: Rounding,
        rethink: Rethink | None = None,
        probes: int | None = None,
        look: Callable[[Snapshot], object] = lambda _: None,
        fits: Callable[[float], bool] | None = None,
    ) -> None:
        self.estimator, self.goal, self.miss = estimator, goal, miss
        self.rounding, self.rethink, self.look, self._fits = rounding, rethink, look, fits
        self.probes = 1 if probes is None and estimator.exact else probes
        self._status: Status | None = None
        self._target = 0
        self._looks, self._looked, self._delivered = 0, False, False
        self._asked = rethink is None
        self._joined = self._resumed = False
        self._turn: Turn | None = None
        self._left: tuple[Estimator, float] | None = None
        self._shown: Reading | None = None
        self._shown_at = -math.inf
        self._start = estimator.products

    @property
    def lasting(self) -> bool:
        """Whether a smaller error takes more probes, and nobody has said how many."""
        return self.probes is None

    @property
    def ready(self) -> bool:
        """Whether there are the two probes of two batches that an error bar needs."""
        return self._left is not None or self.estimator.table() is not None

    def steps(self) -> Iterator[Snapshot]:
        """Blocks of products, and looks where they are due."""
        if self._joined:
            self._require_whole()
            self._status = self._settled(self._look())
            return
        if self.probes is not None:
            yield from self._through(self.probes)
            return
        if not self._target:
            self._target = self._first_look()
            self._turn_to(self._units(self._target))
        if not self._looks and not self.estimator.has(_FEWEST):
            yield from self._extend(_FEWEST)  # a result, should time be short
        while self._status is None:
            yield from self._extend(self._target)
            reading = self._look()
            self._status = self._settled(reading)
            if self._status is None:
                self._plan()
            else:
                self._delivered = True

    @property
    def _drawn(self) -> int:
        """Probes of each batch by now, or random columns where there are no probes."""
        return self.estimator.num_probes or self.estimator.draws

    def _plan(self) -> None:
        """How to go on from a look that was not narrow enough."""
        self._looked = self._looks > 1 and not self._delivered
        self._delivered = False
        miss = self._miss_at(self._looks + (not self._looked))
        standing, probes = self._standing(self._read(miss)), self._drawn
        needed = standing.most * self.estimator.balance() * probes
        least = 1 if self.estimator.entries is None else 2  # one alone tells nothing of noise
        self._target = next_look(probes, needed, least)
        if self._turns(standing, needed):
            self._target = self._first_look()

    def expected(self, pace: Pace) -> tuple[Work, ...]:
        """Probes up to the look that will be the last; unit vectors where those are fewer."""
        estimator = self.estimator
        if not estimator.coverage():
            first = self._first_look() if self.probes is None else self.probes
            spent = pace.products_apart(first)
            return (Work(phase=estimator.phase, spent=spent, note="a first look"),)
        probes, note, needed = self._ahead()
        work = Work(phase=estimator.phase, spent=estimator.foreseen(probes), note=note)
        if self.probes is not None or self.rethink is None:
            return (work,)
        first, turn = self._first_look(), None
        with watched(estimator.operator.meter) as deciding:
            if first <= estimator.parameters.size and probes > first:
                turn = self.rethink.decide(estimator, needed)
        turn = turn or self.rethink.units(estimator, probes)
        if turn is None:
            return (Work(phase=work.phase, spent=work.spent + deciding, note=note),)
        return self._after(turn, probes, deciding, pace)

    def _after(self, turn: Turn, probes: int, deciding: Spent, pace: Pace) -> tuple[Work, ...]:
        """A first look, and what comes of the turn in place of so many probes.

        What is known without probes stays as it is, and random columns go with the probes.
        """
        size, first = self.estimator.parameters.size, self._first_look()
        if turn.kind == "unit vectors":
            return (Work(phase=UnitVectors.phase, spent=pace.products(size), note=turn.why),)
        spent = pace.products_apart(first) + deciding
        spent += pace.products(turn.steps, turn.steps)
        spent += self.estimator.foreseen(max(math.ceil(probes * turn.work), first))
        return (Work(phase=self.estimator.phase, spent=spent, note=turn.why),)

    def outcome(self, cut: Status | None) -> Outcome:
        """What there is.

        Args:
            cut: what ended it before its own end.
        """
        if cut is None:
            reading = self._read(self._miss_at(self._looks))
            return self._outcome(self._status or "budget", reading)
        self.estimator.settle()
        if self._left is not None and self.estimator.coverage() < 1:
            done, phase = self.estimator.coverage(), self.estimator.phase
            self.estimator, miss = self._left  # what was known before says more
            under_way = f"{phase}, {done:.0%} of it done"
            return replace(self._outcome(cut, self._read(miss)), cut_turn=under_way)
        self._looks += not self._looked
        reading = self._read(self._miss_at(self._looks))
        # Who goes on after each cut until it says "converged" looks as often as they like.
        reached = cut == "budget" and not self._resumed and self._standing(reading).reached
        return self._outcome("converged" if reached else cut, reading)

    def _through(self, probes: int) -> Iterator[Snapshot]:
        """A number of probes in doubling rounds, so that a run cut short has half of them.

        Rounds end where groups of probes do, wherever they begin.
        """
        half, rounds, first = probes // 2, [probes], self.estimator.first
        while half >= GROUP // 2:
            end = -(-(first + half) // GROUP) * GROUP - first
            if end < rounds[0] - 1:
                rounds.insert(0, end)
            half //= 2
        for self._target in [count for count in rounds if count >= self._target]:
            yield from self._extend(self._target)
        self._status = self._settled(self._look())

    def state_dict(self) -> State:
        """Where it is: a turn as it was decided, and what was known before where that counts."""
        left = self._left if self._left and self.estimator.coverage() < 1 else None
        return {
            "target": self._target,
            "looks": self._looks,
            "looked": self._looked,
            "delivered": self._delivered,
            "asked": self._asked,
            "turn": None if self._turn is None else asdict(self._turn),
            "estimator": self.estimator.state_dict(),
            "left": left
            and {
                "miss": left[1],
                "sources": [source.state_dict() for source in self._only_of(left[0])],
            },
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from where another of the same matrix was, be it to another tolerance.

        What the last look has spent of the error budget stays spent; whether it was enough is
        asked again.
        """
        self._resumed = True
        self._target, self._looks = state["target"], state["looks"]
        self._looked, self._delivered = state["looked"], state["delivered"]
        self._asked = state["asked"]
        before = self.estimator
        if state["turn"] is not None:
            assert self.rethink is not None  # or there would have been no turn
            self._turn = Turn(**state["turn"])
            self.estimator = self.rethink.take(self._turn, before)
        self.estimator.load_state_dict(state["estimator"])
        if state["left"] is not None:
            for source, its in zip(self._only_of(before), state["left"]["sources"], strict=True):
                source.load_state_dict(its)
            self._left = before, state["left"]["miss"]

    def join(self, state: State) -> None:
        """Add what another has found in other batches, or with other probes.

        Raises:
            UsageError: it has stopped where its own error was small enough.
        """
        if self.probes is None:
            raise UsageError(
                "runs to a tolerance are no parts of one: each stops where its own error is small",
                "no --probes",
                "runs over ranges, as of --probes 0:64 and --probes 64:128",
            )
        self.estimator.join(state["estimator"])
        self._joined = True

    def _require_whole(self) -> None:
        """Refuse what was joined where there is no result in it.

        Raises:
            UsageError: there is not.
        """
        if not self.ready:
            raise UsageError(
                "the parts hold no result yet",
                "fewer than two probes of two batches",
                "--resume for those that were cut off",
            )
        if counts := self.estimator.uneven:
            few, many = (pick(counts, key=lambda i: counts[i]) for pick in (min, max))
            raise UsageError(
                "entries need as many probes of each batch as of any other",
                f"{counts[few]} of batch {few}, and {counts[many]} of batch {many}",
                "--resume for a part that was cut off, or a join without the others of its probes",
            )

    def _only_of(self, before: Estimator) -> list[Engine]:
        """Sources that the present estimator has not taken over."""
        return [source for source in before.sources if source not in self.estimator.sources]

    def _look(self) -> Reading:
        """What there is at this look, with what a look spends; one that was made spends no more."""
        if not self._looked:
            self._looks, self._looked = self._looks + 1, True
        return self._read(self._miss_at(self._looks))

    def _first_look(self) -> int:
        return first_look(self.estimator.sharing, len(self.estimator.operator.indices))

    def _ahead(self) -> tuple[int, str, float]:
        """Probes of each batch at the end, what ends it, and how many would reach the goal.

        The estimator may be a pilot's, of a few batches only.
        """
        if self.probes is not None:
            exact = self.estimator.exact
            end = "one pass" if exact else f"{self.probes} probes a batch"
            return self.probes, end, self.probes
        estimator, first = self.estimator, self._first_look()
        counts, every = estimator.operator.counts, estimator.operator.indices
        data = sum(counts[i] for i in every) / sum(counts[i] for i in estimator.indices)
        done = estimator.draws

        def standing(look: int) -> Standing:
            return self._standing(self._read(self._miss_at(look))).after(first / done, data)

        if standing(1).reached:
            return first, f"its tolerance is expected after {first} probes a batch", first
        ahead = standing(2)
        needed = min(ahead.most * first, _MOST_FORESEEN)
        probes = max(math.ceil(PAST * needed), first + 1)
        there = ahead.after(probes / first)
        if there.reached:
            return probes, f"its tolerance is expected after {probes} probes a batch", needed
        if there.hopeless:
            why = f"data noise is most of its error after {probes} probes a batch"
            return probes, why, math.inf
        return probes, f"not even {probes} probes a batch are expected to do", math.inf

    def _miss_at(self, look: int) -> float:
        """What a look may spend: all of it where there is but one."""
        return self.miss if self.probes is not None else miss_probability(self.miss, look)

    def _outcome(self, status: Status, reading: Reading) -> Outcome:
        turn = None if self._turn is None else self._turn.why
        return Outcome(
            status, self.estimator, reading, self._looks, self.rounding, turn, self._joined
        )

    def _turns(self, standing: Standing, needed: float) -> bool:
        """Whether there is a better estimator for the way that is left.

        Designs of probes are looked for once, unit vectors before each look that takes more.
        """
        if self._turn is not None or self.rethink is None:
            return False
        turn, is_limited = None, standing.factor is None and math.isfinite(standing.error)
        if not self._asked:
            ahead = math.inf if is_limited else needed
            turn, self._asked = self.rethink.decide(self.estimator, ahead), True
        turn = turn or self._units(self._target if is_limited else math.ceil(needed))
        before, miss = self.estimator, self._miss_at(self._looks)
        if self._turn_to(turn):
            self._left = before, miss
        return self._turn is not None

    def _units(self, probes: int) -> Turn | None:
        """Unit vectors, where they are better than so many probes."""
        return None if self.rethink is None else self.rethink.units(self.estimator, probes)

    def _turn_to(self, turn: Turn | None) -> bool:
        """Go on with what is better, if anything is."""
        if turn is None or self.rethink is None:
            return False
        self._turn, self.estimator = turn, self.rethink.take(turn, self.estimator)
        return True

    def _settled(self, reading: Reading) -> Status | None:
        """What a look decides."""
        standing = self._standing(reading)
        if self.estimator.exact and reading.fraction == 1 and self.rounding.is_exact:
            return "exact"
        if standing.reached:
            return "converged"
        return "data-limited" if standing.hopeless else None

    def _standing(self, reading: Reading) -> Standing:
        return self.goal(self.estimator, reading)

    def _extend(self, probes: int) -> Iterator[Snapshot]:
        """Bring the estimator to so many probes."""
        miss = self._miss_at(self._looks + (not self._looked))
        self.estimator.operator.meter.keep()
        self._told = self._snapshot(probes, miss)
        for _ in self.estimator.extend(probes, lambda: self.look(self._told)):
            self._told = self._snapshot(probes, miss)
            yield self._told
            if self._is_late():
                raise BudgetError("the budget ended", self._told.phase, "a larger --budget")

    def _is_late(self) -> bool:
        """Whether what comes next would not be done in time, and there is a result."""
        batches = len(self.estimator.indices)
        return self._fits is not None and self.ready and not self._fits(1 / batches)

    def _read(self, miss: float) -> Reading:
        reading = read(self.estimator, miss, self.rounding.relative, self.rounding.bias)
        assert reading is not None  # a round is over, or it is ready
        return reading

    def _snapshot(self, probes: int, miss: float) -> Snapshot:
        """What is done, what is expected, and the estimate so far."""
        if (now := time.monotonic()) - self._shown_at > _SHOW_EVERY:
            self._shown_at = now
            self._shown = read(self.estimator, miss, self.rounding.relative, self.rounding.bias)
        reading = self._shown
        probing = self.estimator.probes is not None
        return Snapshot(
            phase=self.estimator.phase,
            done=self.estimator.products - self._start if probing else self.estimator.coverage(),
            total=self._expected(reading, probes) if probing else self.estimator.reach,
            estimate=None if reading is None else float(reading.estimate[-1]),
            interval=None if reading is None else reading.interval(),
        )

    def _expected(self, reading: Reading | None, probes: int) -> float | None:
        """Products at the look that is expected to be the last."""
        if reading is None or self._looks == 0:
            return None
        needed = PAST * self._standing(reading).most * self._drawn
        return max(float(probes), needed)
