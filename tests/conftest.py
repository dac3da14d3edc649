"""What several test modules share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hesscli
from hesscli.problem.problem import Problem
from hesscli.results import Observe, Snapshot

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

LATE = 1e9
"""Seconds by which the clock jumps."""

SAMPLES = Path(__file__).resolve().parents[1] / "samples"


@pytest.fixture(scope="session")
def samples() -> Path:
    """The folder of the sample problems."""
    return SAMPLES


@pytest.fixture(scope="session")
def sunspots() -> Problem:
    """315 parameters in float64 at a true minimum, all 256 examples in 16 batches; read only."""
    problem: Problem = hesscli.load(SAMPLES / "sunspots" / "model.pt")
    return problem


TimeIsUp = Callable[[Callable[[Snapshot], bool]], Observe]


@pytest.fixture
def time_is_up_when(monkeypatch: pytest.MonkeyPatch) -> TimeIsUp:
    """An observer at whose snapshot the clock jumps, so that no machine is too fast or slow."""
    now, late = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now() + late[0])

    def watching(when: Callable[[Snapshot], bool]) -> Observe:
        limit = late[0] + LATE

        def observe(snapshot: Snapshot) -> bool:
            if when(snapshot):
                late[0] = limit
            return False

        return observe

    return watching
