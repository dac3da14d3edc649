"""What ``hesscli trace`` returns."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from hesscli.results.header import (
    SCHEMA_VERSION,
    Cost,
    Environment,
    Estimate,
    LayerTrace,
    MethodReport,
    ProblemReport,
    Status,
)


@dataclass(frozen=True, kw_only=True)
class TraceResult:
    """The answer of ``hesscli trace``."""

    schema_version: Literal[1] = SCHEMA_VERSION
    command: Literal["trace"] = "trace"
    hesscli_version: str
    status: Status
    problem: ProblemReport
    method: MethodReport
    cost: Cost
    trace: Estimate
    layers: tuple[LayerTrace, ...]
    environment: Environment
    files: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One honest line."""
        low, high = self.trace.interval
        known = f"[{low:.6g}, {high:.6g}]" if low > -math.inf or high < math.inf else "unknown"
        return (
            f"trace({self.problem.matrix}) = {self.trace.estimate:.6g}, "
            f"{self.trace.confidence:.0%} interval {known}, "
            f"{self.problem.num_examples} examples, {self.method.num_probes} probes, "
            f"{self.cost.products:.3g} products, {self.status}"
        )
