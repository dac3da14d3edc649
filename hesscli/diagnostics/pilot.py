"""A few products that tell what a tolerance will cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hesscli.engines.hutchinson.engine import Hutchinson
from hesscli.operators.base import Operator
from hesscli.streams import key

PILOT_BATCHES = 16
PILOT_PROBES = 2
_PILOT_SEED = 0x91707
"""The pilot's probes are its own: a plan must not be made of the numbers that it plans."""


@dataclass(frozen=True)
class Pilot:
    """A first idea of the trace, and the variance of its estimate from one full-data product."""

    estimate: float
    variance: float


def run_pilot(operator: Operator, *, seed: int, on_step: Callable[[], None]) -> Pilot:
    """Two fresh probes on each of up to sixteen batches."""
    engine = Hutchinson(
        operator, seed=key(_PILOT_SEED, seed), design="fresh", batches=PILOT_BATCHES
    )
    for _ in engine.extend(PILOT_PROBES):
        on_step()
    table = engine.table()
    assert table is not None  # every batch of the pilot has its probes
    share = len(engine.indices) / operator.problem.num_batches
    return Pilot(
        estimate=float(table.estimate[-1]) + operator.decay * operator.parameters.size,
        variance=float(table.probe.value[-1]) * PILOT_PROBES * share,
    )
