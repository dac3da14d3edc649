"""What several test modules share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import hesscli
from hesscli.problem.problem import Problem

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

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
