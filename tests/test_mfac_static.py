"""Inverses of windows that stay, against dense ones made from the rows as they are stored."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from mfac_truth import Truth, distance, rows_of
from torch import Tensor

from hesscli.engines.mfac import GradientWindow, StaticFisher, static
from hesscli.engines.mfac.subsets import inverse_diagonals
from hesscli.errors import ExitCode, UnsoundError, UsageError

KINDS = ["normal", "graded", "columns", "mean", "pairs", "equal"]
DAMPINGS = [1e-2, 1e-5, 1e-8]
SHAPES = {"few rows": (16, 96), "half as many rows": (60, 96), "many rows": (120, 72)}
BLOCKS = {
    "whole": lambda size: None,
    "equal": lambda size: [8] * (size // 8),
    "mixed": lambda size: [1, 1, 5, 5, size - 43, 7, 12, 12],
}
PRECISE = 1e-6

every_kind = pytest.mark.parametrize("kind", KINDS)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
every_blocking = pytest.mark.parametrize("blocking", BLOCKS.values(), ids=BLOCKS.keys())


def window_of(rows: Tensor, dtype: torch.dtype = torch.float32, spare: int = 0) -> GradientWindow:
    window = GradientWindow(len(rows) + spare, rows.shape[1], dtype=dtype)
    window.extend(rows)
    return window


def relative(window: GradientWindow, damping: float) -> float:
    return damping * (window.mean_square() / window.size or 1.0)


def normal(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solutions(fisher: StaticFisher) -> dict[str, tuple[Any, Tensor]]:
    """Every way to solve, and for what."""
    rows = fisher.window.rows.double()
    x = normal(fisher.window.size)
    a = (2 * normal(fisher.window.count)).round()  # so that Gᵀa has no rounding to speak of
    return {
        "random": (fisher.ihvp(x), x),
        "row as a vector": (fisher.ihvp(rows[3]), rows[3]),
        "row": (fisher.member(3), rows[3]),
        "combination": (fisher.combination(a), rows.T @ a),
    }


@every_kind
@every_shape
@every_blocking
def test_precise(kind: str, shape: tuple[int, int], blocking: Any) -> None:
    """To 1e-6 in everything, unless the condition κ is such that float64 cannot hold that.

    A vector of float64 numbers divided by λ has errors of κ 2^-53 of what is largest in it.
    """
    window = window_of(rows_of(kind, *shape))
    blocks, weights = blocking(window.size), normal(window.size)
    for damping in DAMPINGS:
        fisher = StaticFisher(window, relative(window, damping), blocks=blocks, precise=True)
        truth = Truth(window.rows, fisher.damping, blocks)
        allowed = max(PRECISE, 8 * truth.condition * 2.0**-53)
        for name, (solution, x) in solutions(fisher).items():
            assert distance(solution.vector, truth.solve(x)) < allowed, (name, damping)
        inverse = truth.inverse()
        largest = float(inverse.abs().max())
        assert (fisher.diagonal() / inverse.diagonal() - 1).abs().max() < allowed
        for i, j in [(0, 0), (2, 3), (5, 11), (60, 60), (window.size - 1, window.size - 2)]:
            assert abs(fisher.element(i, j) - float(inverse[i, j])) < allowed * largest
        group = torch.tensor([3, 4, 6, 50, 51, 70])
        part = inverse[group[:, None], group]
        assert (fisher.submatrix(group) - part).abs().max() < allowed * largest
        saliency = 0.5 * weights[group] @ torch.linalg.solve(part, weights[group])
        assert fisher.group_saliency(weights, group) == pytest.approx(float(saliency), rel=allowed)


@every_kind
@every_shape
@pytest.mark.parametrize("precise", [None, False])
def test_errors_are_within_what_is_reported(
    kind: str, shape: tuple[int, int], precise: bool | None
) -> None:
    """Whatever the arithmetic; where it is left to choose, digits are left as well.

    The truth's own error is below κ 2^-60.
    """
    window, compared = window_of(rows_of(kind, *shape)), 0
    for damping in DAMPINGS:
        try:
            fisher = StaticFisher(window, relative(window, damping), precise=precise)
        except UnsoundError:
            assert precise is False
            continue
        truth = Truth(window.rows, fisher.damping)
        for name, (solution, x) in solutions(fisher).items():
            error = distance(solution.vector, truth.solve(x))
            assert error <= solution.error + truth.condition * 2.0**-60, (name, damping)
            assert precise is False or solution.error < 0.02
        true = truth.inverse().diagonal()
        allowed = fisher.diagonal_error() + truth.condition * 2.0**-60 * true
        assert ((fisher.diagonal() - true).abs() <= allowed).all()
        assert (fisher.diagonal() > 0).all()
        compared += 1
    assert compared


def test_errors_in_many_dimensions() -> None:
    """Where float32 is good enough, it is within its bound, and the bound says something.

    Of rows that are nearly orthogonal it is the rounding of a sum of d terms, 8 √d 2^-24, for
    each of n rows, once in A and once in Gx.
    """
    window = window_of(rows_of("normal", 60, 500))
    expected = 2 * 8 * math.sqrt(60 * 500) * 2.0**-24
    for damping in DAMPINGS:
        fisher = StaticFisher(window, relative(window, damping))
        truth = Truth(window.rows, fisher.damping)
        for name, (solution, x) in solutions(fisher).items():
            error = distance(solution.vector, truth.solve(x))
            assert error <= solution.error <= 0.01, (name, damping)
            if name != "row as a vector":  # which cancels to 1/κ of itself
                assert solution.error < expected


@pytest.mark.parametrize("blocks", [None, [50, 46], [8] * 12])
def test_bfloat16_is_exact_for_its_own_rows(blocks: list[int] | None) -> None:
    rows = rows_of("normal", 40, 96)
    window = window_of(rows, torch.bfloat16)
    assert 1e-3 < distance(window.rows.double(), rows) < 2.0**-8
    fisher = StaticFisher(window, relative(window, 1e-4), blocks=blocks)
    truth = Truth(window.rows, fisher.damping, blocks)
    for solution, x in solutions(fisher).values():
        assert distance(solution.vector, truth.solve(x)) < PRECISE
    assert distance(fisher.diagonal(), truth.inverse().diagonal()) < PRECISE


@pytest.mark.parametrize("blocks", [None, [50, 46], [8] * 12])
@pytest.mark.parametrize("precise", [None, True, False])
def test_gradients_that_are_zero(blocks: list[int] | None, precise: bool | None) -> None:
    """F̂ = 0, and y = x / λ to the last bits."""
    fisher = StaticFisher(window_of(rows_of("zero", 20, 96)), 0.25, blocks=blocks, precise=precise)
    x = normal(96)
    assert distance(fisher.ihvp(x).vector, 4 * x) < 1e-15
    assert fisher.ihvp(torch.zeros(96)).vector.tolist() == [0.0] * 96
    assert fisher.member(0).vector.tolist() == [0.0] * 96
    assert fisher.diagonal().tolist() == [4.0] * 96
    assert fisher.leverage().tolist() == [0.0] * 96
    assert fisher.element(3, 3) == 4.0
    assert fisher.element(3, 4) == 0.0


@every_shape
@every_blocking
def test_a_window_that_is_not_full(shape: tuple[int, int], blocking: Any) -> None:
    """Rows that are not there do not count: n is the number that are."""
    rows = rows_of("normal", *shape)
    full, partial = window_of(rows), window_of(rows, spare=11)
    assert (partial.count, partial.capacity) == (len(rows), len(rows) + 11)
    damping, blocks = relative(full, 1e-3), blocking(full.size)
    expected = StaticFisher(full, damping, blocks=blocks)
    found = StaticFisher(partial, damping, blocks=blocks)
    one, other = (fisher.ihvp(normal(full.size)) for fisher in (found, expected))
    assert distance(one.vector, other.vector) <= one.error + other.error
    allowed = found.diagonal_error() + expected.diagonal_error()
    assert ((found.diagonal() - expected.diagonal()).abs() <= allowed).all()


@every_shape
@every_blocking
def test_what_is_one_thing_in_two_ways(shape: tuple[int, int], blocking: Any) -> None:
    window = window_of(rows_of("normal", *shape))
    blocks = blocking(window.size)
    fisher = StaticFisher(window, relative(window, 1e-3), blocks=blocks, precise=True)
    X = normal(5, window.size)
    many = fisher.ihvp_many(X)
    for x, y in zip(X, many, strict=True):
        assert distance(fisher.ihvp(x).vector, y) < 1e-12
        assert distance(fisher.multiply(y), x) < 1e-9
    another = fisher.with_damping(relative(window, 1e-1))
    fresh = StaticFisher(window, another.damping, blocks=blocks, precise=True)
    assert distance(another.ihvp(X[0]).vector, fresh.ihvp(X[0]).vector) < 1e-12
    assert distance(another.diagonal(), fresh.diagonal()) < 1e-12
    assert fisher.damping < another.damping
    assert distance(fisher.ihvp(X[0]).vector, many[0]) < 1e-12
    assert torch.equal(fisher.leverage(), 1 - fisher.damping * fisher.diagonal())
    every = torch.tensor([[fisher.element(i, j) for j in range(20)] for i in range(20)])
    assert distance(every, fisher.submatrix(torch.arange(20))) < 1e-6
    assert fisher.table_nbytes > 0


def test_another_damping_makes_no_new_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep over λ reads the rows for its solutions only, not for the matrices."""
    window = window_of(rows_of("normal", 20, 200))
    for blocks in (None, [100, 100], [10] * 20):
        fisher = StaticFisher(window, 0.1, blocks=blocks)
        with monkeypatch.context() as patch:
            patch.setattr(window, "tiles", None)
            fisher.with_damping(0.01)


def test_values_of_any_size() -> None:
    """Squares of what is pushed or solved for may be beyond float32."""
    rows = rows_of("normal", 20, 200)
    x = normal(200)
    one = window_of(rows)
    expected = StaticFisher(one, relative(one, 1e-2)).ihvp(x).vector
    for scale in (2.0**-50, 2.0**50):
        window = window_of(rows * scale)
        fisher = StaticFisher(window, relative(window, 1e-2))
        assert distance(fisher.ihvp(x).vector * scale**2, expected) < 1e-6
        assert distance(fisher.ihvp(x * 2.0**-200).vector * 2.0**200 * scale**2, expected) < 1e-6


@pytest.mark.parametrize("damping", [0.0, -1e-3, math.inf, math.nan])
def test_a_damping_that_cannot_be(damping: float) -> None:
    window = window_of(rows_of("normal", 4, 8))
    for attempt in (
        lambda: StaticFisher(window, damping),
        lambda: StaticFisher(window, 1.0).with_damping(damping),
    ):
        with pytest.raises(UsageError, match="--damping must be above 0") as caught:
            attempt()
        assert caught.value.exit_code is ExitCode.USAGE


@pytest.mark.parametrize("shape", [(40, 100), (100, 40)])
def test_a_damping_that_rounding_swallows(shape: tuple[int, int]) -> None:
    """What the hint names works."""
    window = window_of(rows_of("equal", *shape))
    with pytest.raises(UnsoundError, match="lost in rounding") as caught:
        StaticFisher(window, 1e-30)
    assert caught.value.exit_code is ExitCode.UNSOUND
    flag, value = caught.value.hint.split()[:2]
    assert flag == "--damping"
    StaticFisher(window, float(value.removeprefix("abs:")))


def test_what_does_not_fit() -> None:
    with pytest.raises(UsageError, match="the window is empty"):
        StaticFisher(GradientWindow(4, 8), 1.0)
    window = window_of(rows_of("normal", 4, 8))
    for blocks in ([4, 5], [8, 0], [], [12, -4]):
        with pytest.raises(UsageError, match="blocks do not make up"):
            StaticFisher(window, 1.0, blocks=blocks)
    fisher = StaticFisher(window, 1.0)
    for attempt in (
        lambda: fisher.ihvp(torch.zeros(9)),
        lambda: fisher.ihvp_many(torch.zeros(8)),
        lambda: fisher.combination(torch.zeros(8)),
        lambda: fisher.multiply(torch.zeros(4)),
        lambda: fisher.member(4),
        lambda: fisher.member(-1),
        lambda: fisher.element(0, 8),
        lambda: fisher.element(-1, 0),
        lambda: fisher.submatrix([0, 8]),
    ):
        with pytest.raises(UsageError):
            attempt()
    with pytest.raises(UnsoundError, match="not finite"):
        fisher.ihvp(torch.full((8,), math.nan))
    with pytest.raises(UsageError, match="named twice"):
        fisher.group_saliency(torch.ones(8), [2, 2])


def test_a_window_that_has_changed() -> None:
    window = window_of(rows_of("normal", 4, 8))
    fisher = StaticFisher(window, 1.0)
    window.push(torch.ones(8))
    with pytest.raises(UsageError, match="not what it was"):
        fisher.diagonal()
    fisher = StaticFisher(window, 1.0)
    window.close()
    with pytest.raises(UsageError, match="not what it was"):
        fisher.ihvp(torch.ones(8))


@every_shape
@every_blocking
def test_what_is_not_kept_is_made_again(
    shape: tuple[int, int], blocking: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same bits, since it is the same work."""
    window = window_of(rows_of("normal", *shape))
    blocks, x = blocking(window.size), normal(window.size)
    kept = StaticFisher(window, relative(window, 1e-3), blocks=blocks)
    monkeypatch.setattr(static, "_KEPT", 0)
    made = StaticFisher(window, kept.damping, blocks=blocks)
    for one, other in ((kept, made), (kept.with_damping(0.1), made.with_damping(0.1))):
        assert torch.equal(one.ihvp(x).vector, other.ihvp(x).vector)
        assert torch.equal(one.multiply(x), other.multiply(x))
        assert torch.equal(one.diagonal(), other.diagonal())
        assert one.element(3, 4) == other.element(3, 4)


UNEVEN = (16, 96), (61, 96), (120, 72)
PAIRED = [
    pytest.param(kind, UNEVEN[(first + second) % 3], blocking, id=f"{kind}-{name}")
    for first, kind in enumerate(KINDS)
    for second, (name, blocking) in enumerate(BLOCKS.items())
]
"""Kinds of rows in all blocks, and in windows of all sizes; and each of these with each."""


@pytest.mark.parametrize(("kind", "shape", "blocking"), PAIRED)
def test_inverses_from_some_of_the_rows(kind: str, shape: tuple[int, int], blocking: Any) -> None:
    """Of all, of halves and without a group, of rows that the groups do not share out evenly."""
    window, groups = window_of(rows_of(kind, *shape)), 5
    odd = torch.arange(groups) % 2 == 1
    sets = torch.stack([odd | ~odd, odd, ~odd, *~torch.eye(groups).bool()])
    blocks, damping = blocking(window.size), relative(window, 1e-3)
    sizes = np.array(blocks or [window.size])
    found = inverse_diagonals(window, slice(0, window.size), sizes, damping, sets)
    members = torch.arange(window.count) % groups
    for chosen, diagonal in zip(sets, found, strict=True):
        truth = Truth(window.rows[chosen[members]], damping, blocks)
        expected = truth.inverse().diagonal()
        # As float32 products allow where a block is larger than its rows are many; else float64.
        allowed = 1e-3 if sizes.max() > window.count else 64 * truth.condition * 2.0**-53
        assert (diagonal / expected - 1).abs().max() < allowed
    some = slice(int(sizes[:2].sum()), int(sizes[:4].sum()))
    part = inverse_diagonals(window, some, sizes[2:4], damping, sets) if blocks else found[:, some]
    torch.testing.assert_close(part, found[:, some], rtol=1e-9, atol=0)
