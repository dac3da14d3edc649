"""A few products that tell which probe design is cheaper, and what a tolerance will cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hesscli.engines.hutchinson.engine import Hutchinson
from hesscli.engines.hutchinson.statistics import Design
from hesscli.operators.base import Operator
from hesscli.streams import Distribution, key

PILOT_BATCHES = 8
PILOT_PROBES = 4
_PILOT_SEED = 0x91707
"""The pilot's probes are its own: a choice must not depend on the numbers that it then judges."""


@dataclass(frozen=True)
class Pilot:
    """Variance of the trace from one full-data product a batch, for each design."""

    estimate: float
    fresh_variance: float
    shared_variance: float

    @property
    def design(self) -> Design:
        """The design that needs fewer products.

        Fresh probes win unless the batches' matrices cancel in their mean; a draw goes to them,
        for their error bars rest on more independent numbers.
        """
        return "shared" if self.shared_variance < 0.8 * self.fresh_variance else "fresh"

    @property
    def variance(self) -> float:
        """That of the chosen design."""
        return min(self.fresh_variance, self.shared_variance)


def run_pilot(
    operator: Operator,
    *,
    seed: int,
    distribution: Distribution,
    on_step: Callable[[], None],
) -> Pilot:
    """Four shared probes on up to eight batches, and the variance components of their table."""
    engine = Hutchinson(
        operator,
        seed=key(_PILOT_SEED, seed),
        design="shared",
        distribution=distribution,
        batches=PILOT_BATCHES,
    )
    for _ in engine.extend(PILOT_PROBES):
        on_step()
    table = np.stack([cell[:, -1] for cell in engine.cells.values()])
    batches = operator.problem.num_batches
    within = float(table.var(axis=1, ddof=1).mean())
    common = float(table.mean(axis=0).var(ddof=1))
    if len(table) > 1:
        # The mean over the pilot's batches holds a share of each batch's own noise too.
        own = max(0.0, (within - common) * len(table) / (len(table) - 1))
        common = max(0.0, within - own)
        return Pilot(float(table.mean()), within / batches, common + own / batches)
    return Pilot(float(table.mean()), within, within)
