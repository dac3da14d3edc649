"""Inverses that follow a window, against dense ones and against ones made anew."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from mfac_truth import Truth, distance, rows_of
from torch import Tensor

from hesscli.engines.mfac import GradientWindow, StaticFisher, WindowedFisher
from hesscli.engines.mfac.system import ENOUGH
from hesscli.errors import UnsoundError, UsageError

SHAPES = {"few rows": (16, 96), "half as many rows": (60, 96), "many rows": (120, 72)}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def normal(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def resident() -> int:
    """Bytes that the process takes now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@every_shape
@pytest.mark.parametrize("kind", ["normal", "graded", "columns", "mean", "pairs", "equal"])
@pytest.mark.parametrize("damping", [1e-2, 1e-5, 1e-8])
def test_errors_are_within_what_is_reported(
    shape: tuple[int, int], kind: str, damping: float
) -> None:
    """While the window fills, when it is full, and after each of its rows was replaced.

    Digits are left as well, unless κ² 2^-53 > 1: then what is measured of rounding is rounding.
    """
    count, size = shape
    rows = rows_of(kind, 2 * count + 5, size)
    unit = float(rows.square().sum(1).mean() / size)
    window = GradientWindow(count, size)
    fisher = WindowedFisher(window, damping * unit)
    a = 3 - torch.arange(count, dtype=torch.float64) % 7  # so that Gᵀa has no rounding
    for number, row in enumerate(rows, 1):
        slot = fisher.push(row)
        if number not in (1, 2, count // 2, count, count + 1, count + 7, 2 * count + 5):
            continue
        truth, stored = Truth(window.rows, fisher.damping), window.rows.double()
        amounts = a[: window.count]
        x = normal(size, seed=number)
        for solution, right in (
            (fisher.ihvp(x), x),
            (fisher.ihvp(stored[slot]), stored[slot]),
            (fisher.member(slot), stored[slot]),
            (fisher.combination(amounts), stored.T @ amounts),
        ):
            error = distance(solution.vector, truth.solve(right))
            assert error <= solution.error + truth.condition * 2.0**-60
            assert solution.error < 0.02 or truth.condition > 2.0**26.5


def test_no_drift_and_no_growth() -> None:
    """Ten thousand replacements, against a factor made anew from the same rows.

    Both are float64 throughout; what they differ by is κ eps at most.
    """
    count, size, damping = 32, 50, 1e-8
    window = GradientWindow(count, size, dtype=torch.float64)
    fisher = WindowedFisher(window, damping)
    generator = torch.Generator().manual_seed(0)

    def push(times: int) -> None:
        for i in range(times):
            slot = fisher.push(torch.randn(size, generator=generator, dtype=torch.float64))
            if i % 5 == 0:
                fisher.member(slot)

    def difference() -> float:
        fresh = StaticFisher(window, damping, precise=True)
        x = normal(size)
        return max(
            distance(fisher.member(5).vector, fresh.member(5).vector),
            distance(fisher.ihvp(x).vector, fresh.ihvp(x).vector),
        )

    push(count + 200)
    early, before = difference(), resident()
    push(10_000)
    assert resident() - before < 16 * 2**20  # 1,700 bytes a push, less than a row of anything
    late = difference()
    assert late < 1e-8
    assert late < 100 * max(early, 1e-13)


@every_shape
def test_it_is_the_static_one(shape: tuple[int, int]) -> None:
    """Of every number of replacements, with solves between all, some, or none."""
    count, size = shape
    rows = rows_of("normal", 2 * count + 10, size)
    for every in (1, count // 16, count // 16 + 1, count + 1):
        window = GradientWindow(count, size, dtype=torch.float64)
        fisher = WindowedFisher(window, 0.01)
        for number, row in enumerate(rows):
            fisher.push(row)
            if number % every == 0:
                expected = StaticFisher(window, 0.01, precise=True).member(0).vector
                assert distance(fisher.member(0).vector, expected) < 1e-10


def test_a_window_that_others_push_to() -> None:
    window = GradientWindow(8, 60, dtype=torch.float64)
    rows, x = rows_of("normal", 30, 60), normal(60)
    window.extend(rows[:5])
    fisher = WindowedFisher(window, 0.1)
    for push in (lambda: window.extend(rows[5:20]), lambda: fisher.push(rows[21])):
        push()
        truth = Truth(window.rows, 0.1)
        assert distance(fisher.ihvp(x).vector, truth.solve(x)) < 1e-10


def test_gradients_that_are_zero() -> None:
    fisher = WindowedFisher(GradientWindow(8, 60), 0.5)
    x = normal(60)
    for _ in range(12):
        fisher.push(torch.zeros(60))
        assert distance(fisher.ihvp(x).vector, 2 * x) < 1e-15
        assert not fisher.member(0).vector.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite(bad: float) -> None:
    """It leaves everything as it was."""
    fisher = WindowedFisher(GradientWindow(8, 60), 0.1)
    for row in rows_of("normal", 12, 60):
        fisher.push(row)
    x = normal(60)
    before = fisher.ihvp(x).vector
    with pytest.raises(UnsoundError, match="not finite"):
        fisher.push(torch.full((60,), bad))
    assert torch.equal(fisher.ihvp(x).vector, before)
    fisher.push(normal(60))
    truth = Truth(fisher.window.rows, 0.1)
    assert distance(fisher.ihvp(x).vector, truth.solve(x)) < 1e-5


def test_what_does_not_fit() -> None:
    window = GradientWindow(8, 60)
    for damping in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="--damping must be above 0"):
            WindowedFisher(window, damping)
    fisher = WindowedFisher(window, 1.0)
    for attempt in (lambda: fisher.ihvp(torch.zeros(60)), lambda: fisher.member(0)):
        with pytest.raises(UsageError):
            attempt()
    fisher.push(torch.ones(60))
    for attempt in (
        lambda: fisher.ihvp(torch.zeros(59)),
        lambda: fisher.member(1),
        lambda: fisher.combination(torch.zeros(2)),
        lambda: fisher.push(torch.zeros(3)),
    ):
        with pytest.raises(UsageError):
            attempt()


def test_whoever_asks_for_fewer_digits_stays_in_float32() -> None:
    """Nearly equal rows: what they differ by is all that λ is to tell apart."""
    window = GradientWindow(8, 4096)
    window.extend(rows_of("equal", 8, 4096) + 1e-4 * rows_of("normal", 8, 4096))
    damping = 1e-4 * window.mean_square()
    truth = StaticFisher(window, damping, precise=True).member(3).vector
    bounds = []
    for enough in (1.0, ENOUGH):
        solution = WindowedFisher(window, damping, enough=enough).member(3)
        assert distance(solution.vector, truth) <= solution.error <= enough
        bounds.append(solution.error)
    assert bounds[0] > ENOUGH > 1e6 * bounds[1]


def test_a_damping_that_rounding_swallows() -> None:
    """What the hint names works."""
    window = GradientWindow(40, 100)
    window.extend(rows_of("equal", 40, 100))
    with pytest.raises(UnsoundError, match="lost in rounding") as caught:
        WindowedFisher(window, 1e-30).member(0)
    enough = float(caught.value.hint.split()[1].removeprefix("abs:"))
    WindowedFisher(window, enough).member(0)
