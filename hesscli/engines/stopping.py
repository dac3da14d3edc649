"""Stopping at a tolerance with intervals that hold however often one looks.

An interval that is looked at again and again until it is narrow misses more often than it says.
Here the looks are few (each doubles the number of probes) and share one error budget: look j
spends α/(j(j+1)), which sums to α over any number of looks (union bound).
"""

from __future__ import annotations

from dataclasses import dataclass

from hesscli.engines.hutchinson.table import Sharing

FIRST_CELLS = 32
"""Independent quadratic forms at the first look: they are skewed, and Student's interval is not."""


@dataclass(frozen=True)
class Tolerance:
    """The half-width that is wanted: relative to the true value, or absolute if that is wider."""

    relative: float | None = 0.05
    absolute: float | None = None

    def half_width(self, estimate: float) -> float:
        """The widest allowed half-width around ``estimate``.

        The truth may be as small as the interval's near end: h ≤ r(|x| − h), so
        h ≤ r|x| / (1 + r).
        """
        relative = self.relative or 0.0
        return max(relative * abs(estimate) / (1 + relative), self.absolute or 0.0)


def miss_probability(total: float, look: int) -> float:
    """Share of the error budget ``total`` that look number ``look`` (from 1) spends."""
    return total / (look * (look + 1))


def first_look(sharing: Sharing, num_batches: int) -> int:
    """Probes for each batch at the first look.

    Fresh probes are independent from batch to batch, so a look at two of each can rest on many.
    """
    return FIRST_CELLS if sharing == "shared" else max(2, -(-FIRST_CELLS // num_batches))
