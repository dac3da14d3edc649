"""The live progress line: what is being done, the estimate so far, and the time left."""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from hesscli.results import Snapshot


class ProgressLine:
    """One redrawn line on a terminal, gone when the work is done; nothing elsewhere."""

    def __init__(self, console: Console, *, live: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[estimate]}"),
            console=console,
            transient=True,
            disable=not live,
        )
        self._task: TaskID | None = None
        self._first: Snapshot | None = None
        self._began = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def observe(self, snapshot: Snapshot) -> bool:
        """Redraw the line; never asks to stop."""
        if self._first is None or self._first.phase != snapshot.phase:
            self._begin(snapshot)
        assert self._task is not None
        assert self._first is not None
        self._progress.update(
            self._task,
            total=snapshot.total,
            completed=snapshot.done or 0.0,
            left=describe_time_left(self._first, snapshot, time.monotonic() - self._began),
            estimate=describe_estimate(snapshot),
        )
        return False

    def _begin(self, snapshot: Snapshot) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(snapshot.phase, total=None, left="", estimate="")
        self._first = snapshot
        self._began = time.monotonic()


def describe_time_left(first: Snapshot, now: Snapshot, seconds: float) -> str:
    """Time left in a phase, from the rate in the ``seconds`` since its first snapshot."""
    if now.total is None or now.done is None:
        return "time left unknown"
    done = now.done - (first.done or 0.0)
    if done <= 0:
        return "time left unknown"
    return f"{format_duration(max(now.total - now.done, 0.0) * seconds / done)} left"


def describe_estimate(snapshot: Snapshot) -> str:
    """The estimate and half the width of its interval, as far as they are known."""
    if snapshot.estimate is None:
        return ""
    low, high = snapshot.interval or (-math.inf, math.inf)
    half = (high - low) / 2
    return f"{snapshot.estimate:.5g}" + (f" ± {half:.2g}" if math.isfinite(half) else "")


def format_duration(seconds: float) -> str:
    """Seconds as people say them: ``8s``, ``3m20s``, ``2h05m``."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
