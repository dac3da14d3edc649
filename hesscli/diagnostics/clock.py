"""A run's time: its limit, and the observer's line."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from hesscli.results import Observe, Snapshot


class Stopped(KeyboardInterrupt):
    """The observer wants no more: to everyone else, as if Ctrl-C had been pressed."""


@dataclass
class Clock:
    """Time since the start, and whom to tell.

    Args:
        budget: seconds, or None for no limit.
        observer: called with each snapshot.
    """

    budget: float | None
    observer: Observe | None
    _began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._began

    @property
    def out_of_time(self) -> bool:
        """Whether the budget is spent."""
        return self.budget is not None and self.seconds > self.budget

    def tell(self, phase: Any, **details: Any) -> None:
        """Tell the observer.

        Raises:
            Stopped: the observer wants no more.
        """
        if self.observer is None:
            return
        if self.observer(Snapshot(phase=phase, seconds=self.seconds, **details)):
            raise Stopped


def beyond(seconds: float, budget: float | None) -> tuple[str, ...]:
    """What a plan says where it takes longer than it will be given; nothing where it does not."""
    if budget is None or seconds <= budget:
        return ()
    return (f"beyond --budget {budget:.0f}s, which ends it at its result so far",)
