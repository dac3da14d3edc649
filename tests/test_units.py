"""Memory and time in words, from one place."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import hesscli
from hesscli.cli import parsing
from hesscli.units import duration, human_bytes, human_seconds, larger_budget


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 B"),
        (1000, "1000 B"),
        (1024, "1.0 KiB"),
        (50600, "49 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (2**29, "512 MiB"),
        (3.5 * 2**30, "3.5 GiB"),
        (3 * 2**50, "3072 TiB"),
    ],
)
def test_human_bytes(size: float, expected: str) -> None:
    assert human_bytes(size) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0 ms"),
        (0.0123, "12 ms"),
        (3.44, "3.4 s"),
        (59.7, "1 min"),
        (125, "2 min 5 s"),
        (3599.8, "1 h"),
        (4200, "1 h 10 min"),
    ],
)
def test_human_seconds(seconds: float, expected: str) -> None:
    assert human_seconds(seconds) == expected


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (8.2, "9s"), (59.5, "1m00s"), (200, "3m20s"), (3599.5, "1h00m"), (7500, "2h05m")],
)
def test_durations_as_a_clock_shows_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("seconds", [0.3, 50, 119.2, 120, 3599, 7200, 86400])
def test_options_take_durations_as_they_are_written(seconds: float) -> None:
    """None is lost but the seconds beyond an hour."""
    read = parsing.duration(duration(seconds))
    assert read is not None
    assert 0 <= read - seconds < 1


def test_nobody_else_writes_units_of_memory() -> None:
    """Two writers on one screen would say MiB and GiB of like sizes."""
    for path in Path(hesscli.__file__).parent.rglob("*.py"):
        written = [
            part.value
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.JoinedStr)
            for part in node.values
            if isinstance(part, ast.Constant)
        ]
        assert path.name == "units.py" or not any("iB" in text for text in written), path


@pytest.mark.parametrize(
    ("spent", "done", "wanted"),
    [(0.001, 1.0, 10), (0.3, 1.0, 10), (2.6, 1.0, 20), (5.0, 0.5, 50), (3.0, 0.0, 200)],
)
def test_a_larger_budget_is_a_round_number_that_would_do(
    spent: float, done: float, wanted: int
) -> None:
    assert (
        larger_budget(spent, done) == f"a --budget that is {wanted} s larger, or fewer --examples"
    )
    assert wanted >= 4 * spent / max(done, 0.1)
