"""What ``hesscli trace`` returns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hesscli.results.header import Answer, Estimate, LayerTrace


@dataclass(frozen=True, kw_only=True)
class TraceResult(Answer):
    """The answer of ``hesscli trace``."""

    command: Literal["trace"] = "trace"
    trace: Estimate
    layers: tuple[LayerTrace, ...]

    def __str__(self) -> str:
        """One honest line."""
        low, high = self.trace.interval
        known = f"[{low:.6g}, {high:.6g}]" if low > -math.inf or high < math.inf else "unknown"
        return (
            f"trace({self.problem.matrix}) = {self.trace.estimate:.6g}, "
            f"{self.trace.confidence:.0%} interval {known}, "
            f"{self.problem.num_examples} examples, {self.method.num_probes} probes, "
            f"{self.cost.products:.3g} products, {self.end}"
        )
