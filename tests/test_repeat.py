"""The same command twice gives the same bytes, apart from times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SPEC = Path(__file__).parents[1] / "samples" / "sunspots" / "hesscli.toml"


def run(threads: int, seed: int, folder: Path) -> dict[str, Any]:
    arguments = f"trace --spec {SPEC} --probes 2 --seed {seed} --out json --dir -".split()
    done = subprocess.run(
        [sys.executable, "-m", "hesscli", *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    document: dict[str, Any] = json.loads(done.stdout)
    for name in ("seconds", "peak_bytes"):
        del document["cost"][name]
    return document


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(1, 3, tmp_path_factory.mktemp("first"))


def test_two_runs_are_byte_equal(first: dict[str, Any], tmp_path: Path) -> None:
    second, other = (run(1, seed, tmp_path) for seed in (3, 4))
    assert json.dumps(first) == json.dumps(second)
    assert json.dumps(first["trace"]) != json.dumps(other["trace"])


def test_threads_change_rounding_alone(first: dict[str, Any], tmp_path: Path) -> None:
    """The probes are the same whatever the thread count: estimates agree to rounding."""
    one, two = first["trace"], run(2, 3, tmp_path)["trace"]
    assert abs(one["estimate"] - two["estimate"]) <= 1e-9 * abs(one["estimate"])
