"""The loop that asks an engine for more probes until the interval is narrow enough."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from hesscli.diagnostics.clock import Clock
from hesscli.engines.hutchinson.engine import Hutchinson
from hesscli.engines.hutchinson.reading import Reading, read
from hesscli.engines.stopping import Tolerance, first_look, miss_probability
from hesscli.results import Status

_SHOW_EVERY = 0.3
"""Seconds between two readings of a growing table for the progress bar."""


@dataclass(frozen=True)
class Outcome:
    """How an estimation ended, and with what."""

    status: Status
    reading: Reading
    looks: int


class Estimation:
    """One engine's way to a tolerance, or through a fixed number of probes.

    Args:
        engine: to be extended.
        tolerance: the half-width that is wanted.
        miss: probability with which the interval may miss, all looks together.
        relative_rounding: error of a quadratic form relative to its size.
        clock: the time limit, and whom to tell.
    """

    def __init__(
        self,
        engine: Hutchinson,
        tolerance: Tolerance,
        miss: float,
        relative_rounding: float,
        clock: Clock,
    ) -> None:
        self.engine, self.tolerance, self.miss, self.clock = engine, tolerance, miss, clock
        self.relative_rounding = relative_rounding
        self._looks = 0
        self._shown: Reading | None = None
        self._shown_at = -math.inf
        self._start = engine.operator.meter.products

    def fixed(self, probes: int) -> Outcome:
        """One look, after a number of probes that was set beforehand.

        Raises:
            KeyboardInterrupt: stopped before there was any estimate.
        """
        stopped = self._extend(probes, self.miss)
        reading = self._read(self.miss)
        reached: Status = "converged" if self._is_narrow(reading) else "budget"
        return Outcome(stopped or reached, reading, 1)

    def to_tolerance(self) -> Outcome:
        """Looks at doubling numbers of probes, each with its share of the error budget.

        Raises:
            KeyboardInterrupt: stopped before there was any estimate.
        """
        probes = first_look(self.engine.design, len(self.engine.indices))
        while True:
            miss = miss_probability(self.miss, self._looks + 1)
            stopped = self._extend(probes, miss)
            self._looks += 1
            reading = self._read(miss)
            status = stopped or self._verdict(reading)
            if status is not None:
                return Outcome(status, reading, self._looks)
            probes *= 2

    def _verdict(self, reading: Reading) -> Status | None:
        if self._is_narrow(reading):
            return "converged"
        hopeless = reading.data_half_width() > self._wanted(reading)
        return "data-limited" if hopeless and reading.is_data_dominated() else None

    def _extend(self, probes: int, miss: float) -> Status | None:
        """Bring the engine to so many probes; a status where it had to stop on the way."""
        try:
            for _ in self.engine.extend(probes):
                self._show(probes, miss)
                if self.clock.out_of_time and self.engine.table() is not None:
                    return "converged" if self._is_narrow(self._read(miss)) else "budget"
        except KeyboardInterrupt:
            if self.engine.table() is None:
                raise
            return "interrupted"
        return None

    def _read(self, miss: float) -> Reading:
        reading = read(self.engine, miss, self.relative_rounding)
        assert reading is not None  # a round is over, or _extend has seen a table
        return reading

    def _wanted(self, reading: Reading) -> float:
        return self.tolerance.half_width(float(reading.estimate[-1]))

    def _is_narrow(self, reading: Reading) -> bool:
        return float(reading.half_width[-1]) <= self._wanted(reading)

    def _show(self, probes: int, miss: float) -> None:
        """Tell the observer what is done, what is expected, and the estimate so far."""
        if (now := time.monotonic()) - self._shown_at > _SHOW_EVERY:
            self._shown_at = now
            self._shown = read(self.engine, miss, self.relative_rounding)
        reading = self._shown
        self.clock.tell(
            "probing",
            done=self.engine.operator.meter.products - self._start,
            total=self._expected(reading, probes),
            estimate=None if reading is None else float(reading.estimate[-1]),
            interval=None if reading is None else reading.interval(),
        )

    def _expected(self, reading: Reading | None, probes: int) -> float | None:
        """Products at the look that is expected to be the last."""
        if reading is None or self._looks == 0:
            return None
        needed = reading.probes_for(self._wanted(reading), self.engine.num_probes)
        if needed is None:
            return float(probes)
        doublings = max(0, math.ceil(math.log2(max(needed, 1.0) / probes)))
        return probes * 2.0**doublings
