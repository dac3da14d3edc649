"""The intervals of the batch × probe table: coverage on dense matrices of prescribed kinds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from hesscli.diagnostics.looks import Tolerance
from hesscli.engines.hutchinson.table import MeanSquare, Table, half_width, reduce_table

SEEDS = 2000
LEVEL = 1e-3
BATCHES, SIZE, LAYERS = 16, 30, 3
SLICES = np.array([0, 12, 25])


def bounds(low: float, high: float, checks: int, seeds: int = SEEDS) -> tuple[float, float]:
    """Hit rates that a coverage within [low, high] leaves with probability LEVEL at most."""
    tail = LEVEL / checks / 2
    return binom.ppf(tail, seeds, low) / seeds, binom.ppf(1 - tail, seeds, high) / seeds


def matrices(kind: str, rng: np.random.Generator, count: int = BATCHES) -> np.ndarray:
    """Symmetric matrices of `count` batches: one common part and each its own."""
    basis = np.linalg.qr(rng.standard_normal((SIZE, SIZE)))[0]
    spectrum = {
        "decaying": 10.0 / (1 + np.arange(SIZE)),  # a few large eigenvalues: skewed forms
        "indefinite": np.linspace(-1, 2, SIZE),
        "flat": np.ones(SIZE) + 0.1 * rng.standard_normal(SIZE),
    }[kind]
    common = basis @ np.diag(spectrum) @ basis.T
    own = rng.standard_normal((count, SIZE, SIZE)) * 0.3
    return common + own + own.transpose(0, 2, 1)


def columns(forms: np.ndarray) -> np.ndarray:
    """Entrywise v⊙Av summed to layers and total along the last axis."""
    layers = np.add.reduceat(forms, SLICES, axis=-1)
    return np.concatenate([layers, layers.sum(-1, keepdims=True)], axis=-1)


def cells(a: np.ndarray, probes: int, design: str, rng: np.random.Generator) -> list[np.ndarray]:
    owners = len(a) if design == "fresh" else 1
    v = 2.0 * rng.integers(0, 2, (owners, probes, SIZE)) - 1
    return list(columns(v * (v @ a)))


def truth(a: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return columns(np.diagonal(np.tensordot(weights / weights.sum(), a, 1))[None])[0]


@pytest.mark.parametrize("kind", ["decaying", "indefinite", "flat"])
@pytest.mark.parametrize(("design", "probes"), [("fresh", 2), ("fresh", 16), ("shared", 32)])
def test_coverage_of_all_examples(kind: str, design: str, probes: int) -> None:
    """Probe noise alone, batches of unequal mass: 93 to 97% for every layer and the total."""
    rng = np.random.default_rng(7)
    a, weights = matrices(kind, rng), rng.uniform(0.5, 1.5, BATCHES)
    target = truth(a, weights)
    hits = np.zeros(LAYERS + 1)
    for _ in range(SEEDS):
        table = reduce_table(cells(a, probes, design, rng), weights, design)
        hits += abs(table.estimate - target) <= half_width(table.variance(1.0), 0.05)
    low, high = bounds(0.93, 0.97, checks=9 * (LAYERS + 1))
    assert (hits / SEEDS >= low).all(), hits / SEEDS
    assert (hits / SEEDS <= high).all(), hits / SEEDS


@pytest.mark.parametrize("design", ["fresh", "shared"])
def test_coverage_from_a_quarter_of_the_batches(design: str) -> None:
    """With the finite-population factor; the truth is over all 64 batches."""
    rng = np.random.default_rng(8)
    a = matrices("indefinite", rng, count=64)
    target = truth(a, np.ones(64))
    hits = np.zeros(LAYERS + 1)
    for _ in range(SEEDS):
        kept = rng.permutation(64)[:16]
        table = reduce_table(cells(a[kept], 32, design, rng), np.ones(16), design)
        hits += abs(table.estimate - target) <= half_width(table.variance(0.25), 0.05)
    low, high = bounds(0.93, 0.97, checks=2 * (LAYERS + 1))
    assert (hits / SEEDS >= low).all(), hits / SEEDS
    assert (hits / SEEDS <= high).all(), hits / SEEDS


def test_the_wrong_formula_would_be_seen() -> None:
    """Shared probes read by the nested formula cover far too little: the test can fail."""
    rng = np.random.default_rng(10)
    a, weights = matrices("decaying", rng), np.ones(BATCHES)
    target, hits = truth(a, weights)[-1], 0
    for _ in range(300):
        table = reduce_table(cells(a, 32, "shared", rng), weights, "fresh")
        hits += abs(table.estimate[-1] - target) <= half_width(table.variance(1.0), 0.05)[-1]
    assert hits / 300 < 0.8


@pytest.mark.parametrize("design", ["fresh", "shared"])
def test_variances_are_unbiased(design: str) -> None:
    """Mean of the variance estimate against the closed form 2·Σ_offdiag² for Rademacher probes."""
    rng = np.random.default_rng(11)
    a, probes = matrices("indefinite", rng), 4
    off = a * (1 - np.eye(SIZE))
    if design == "fresh":
        exact = sum(2 * np.square(m).sum() for m in off) / BATCHES**2 / probes
    else:
        exact = 2 * np.square(off.mean(0)).sum() / probes
    seen = [
        reduce_table(cells(a, probes, design, rng), np.ones(BATCHES), design).probe.value[-1]
        for _ in range(SEEDS)
    ]
    stderr = np.std(seen) / math.sqrt(SEEDS)
    assert abs(np.mean(seen) - exact) < 3.9 * stderr  # two-sided level 1e-4


def test_a_diagonal_matrix_is_known_after_two_probes() -> None:
    """Rademacher probes see a diagonal matrix without noise, however it is split."""
    rng = np.random.default_rng(12)
    a = np.stack([np.diag(rng.standard_normal(SIZE)) for _ in range(BATCHES)])
    table = reduce_table(cells(a, 2, "fresh", rng), np.ones(BATCHES), "fresh")
    assert half_width(table.variance(1.0), 0.05).max() < 1e-13
    np.testing.assert_allclose(table.estimate, truth(a, np.ones(BATCHES)), rtol=1e-13)


def test_one_batch_has_no_data_noise_to_speak_of() -> None:
    rng = np.random.default_rng(13)
    table = reduce_table(cells(matrices("flat", rng, 1), 8, "fresh", rng), [1.0], "fresh")
    assert table.between is None
    assert table.data_variance is None
    assert isinstance(table, Table)


def test_tolerance_is_relative_to_the_truth() -> None:
    """|x − t| ≤ h guarantees |x − t| ≤ r|t| at the worst t = x − h."""
    wanted = Tolerance(relative=0.1).half_width(5.0)
    assert wanted == pytest.approx(0.1 * (5.0 - wanted))
    assert Tolerance(relative=0.1, absolute=2.0).half_width(5.0) == 2.0
    assert Tolerance(relative=None, absolute=0.5).half_width(100.0) == 0.5


def test_student_quantile() -> None:
    """t(0.975; 10) = 2.228139 (Fisher and Yates' table)."""
    width = half_width(MeanSquare(np.array([4.0]), 10.0), 0.05)[0]
    assert width == pytest.approx(2 * 2.228139, abs=1e-5)
