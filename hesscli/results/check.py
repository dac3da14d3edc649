"""What ``hesscli check`` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hesscli.results.header import Header
from hesscli.vocabulary import Mode

CheckState = Literal["passed", "skipped", "not applicable"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One preflight check: what was measured, against which bound.

    ``state`` says whether it passed, could not be made, or asks what has no meaning here;
    ``passed`` is the first of these alone. What fails is refused.
    """

    name: str
    state: CheckState
    detail: str
    value: float | None = None
    bound: float | None = None
    passed: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "passed", self.state == "passed")


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """The checks, and the autodiff mode that passed them.

    ``fallback`` names the module that ruled a faster mode out, or is None;
    ``relative_rounding`` is the relative error of quadratic forms against float64, and
    ``product_rounding`` that of a product beside the largest with a unit vector (None where the
    model does not run in float64: then nobody knows).
    """

    mode: Mode
    attention_kernel: str
    fallback: str | None
    relative_rounding: float | None
    product_rounding: float | None
    checks: tuple[Check, ...]


@dataclass(frozen=True, kw_only=True)
class PlannedCommand:
    """What one command is expected to take."""

    command: str
    products: float
    gradients: float
    seconds: float
    peak_bytes: int
    note: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Time and memory of one full-data product, and of the commands.

    ``product_bytes`` is what one product of one batch holds beyond model and examples;
    ``kept_bytes`` the frozen examples. Seconds are those of all ``ranks``, and bytes those of each.
    """

    gradient_seconds: float
    product_seconds: float
    product_bytes: int
    parameter_bytes: int
    kept_bytes: int
    ranks: int = 1
    commands: tuple[PlannedCommand, ...]


@dataclass(frozen=True, kw_only=True)
class CheckResult(Header):
    """The answer of ``hesscli check``."""

    command: Literal["check"] = "check"
    status: Literal["ok"] = "ok"
    preflight: Preflight
    plan: Plan
