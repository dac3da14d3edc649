"""Diagonals with replicates of their error: norms, shares and relative errors, and their bars."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from noisy_diagonals import at_least, at_most, estimates, matrix

from hesscli.engines.diagonal import Diagonal, SquaredNorm, share, share_interval

SEEDS, SIZE = 1000, 40
RATIOS = (0.3, 1.0, 10.0)  # of the diagonal's size to its noise


def sample(replicates: int = 5) -> Diagonal:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(7, generator=generator, dtype=torch.float64)
    return Diagonal(values, torch.randn(replicates, 7, generator=generator), replicates)


def estimated(
    kind: str, ratio: float, probes: int = 32, replicates: int = 8
) -> tuple[np.ndarray, Iterator[Diagonal]]:
    """The true diagonal and estimates of it."""
    rng = np.random.default_rng(17)
    truth = rng.standard_normal(SIZE)
    a = matrix(truth, kind, math.sqrt(probes) / ratio, rng)
    return truth, estimates(a, SEEDS, probes, replicates, rng)


def test_standard_errors_are_root_mean_squares() -> None:
    diagonal = sample()
    naive = [math.sqrt(sum(float(e[i]) ** 2 for e in diagonal.noise) / 5) for i in range(7)]
    np.testing.assert_allclose(diagonal.stderr(), naive, rtol=1e-12)


def test_squared_norm_of_a_map_is_its_naive_twin() -> None:
    diagonal, tall = sample(), torch.randn(11, 7, dtype=torch.float64)
    norm = diagonal.squared_norm(lambda v: v @ tall.T)
    gram = (tall.T @ tall).numpy()
    x, errors = diagonal.values.numpy(), diagonal.noise.double().numpy()
    assert norm.plain == pytest.approx(x @ gram @ x, rel=1e-12)
    np.testing.assert_allclose(norm.biases, [e @ gram @ e for e in errors], rtol=1e-12)
    np.testing.assert_allclose(norm.slopes, [2 * x @ gram @ e for e in errors], rtol=1e-11)


def test_a_part_is_a_view_or_a_choice() -> None:
    diagonal = sample()
    part = diagonal.part(slice(2, 5))
    assert part.values.data_ptr() == diagonal.values[2:].data_ptr()
    np.testing.assert_allclose(part.stderr(), diagonal.stderr()[2:5], rtol=1e-12)
    chosen = diagonal.part(torch.tensor([6, 0]))
    assert torch.equal(chosen.values, diagonal.values[[6, 0]])
    assert torch.equal(chosen.noise, diagonal.noise[:, [6, 0]])


def test_an_exact_diagonal_has_no_error() -> None:
    diagonal = Diagonal(torch.tensor([3.0, -4.0], dtype=torch.float64), None, math.inf)
    norm = diagonal.squared_norm()
    assert diagonal.stderr().tolist() == [0, 0]
    assert (norm.estimate, norm.stderr, norm.interval(0.95)) == (25, 0, (25, 25))
    assert diagonal.relative_error() == diagonal.relative_error_bound(0.95) == 0


def test_a_diagonal_that_is_nothing_but_noise_has_no_bounded_relative_error() -> None:
    rng = np.random.default_rng(18)
    noise = torch.from_numpy(rng.standard_normal((8, 500))).float()
    diagonal = Diagonal(torch.full((500,), 0.9, dtype=torch.float64), noise, 8)
    assert diagonal.relative_error() == math.inf
    assert diagonal.relative_error_bound(0.95) == math.inf


@pytest.mark.parametrize("kind", ["flat", "spiked"])
def test_squared_norms_are_unbiased_and_covered(kind: str) -> None:
    """Pooled over small and large signals: 93% at least; 97% at most where noise is small."""
    pooled = 0
    for ratio in RATIOS:
        truth, found = estimated(kind, ratio)
        norms = [diagonal.squared_norm() for diagonal in found]
        target = truth @ truth
        values = np.array([norm.debiased for norm in norms])
        stderr = values.std(ddof=1) / math.sqrt(SEEDS)
        assert abs(values.mean() - target) < 3.9 * stderr  # two-sided level 1e-4
        plain = np.mean([norm.plain for norm in norms])
        assert ratio > 1 or plain - target > 10 * stderr, "the bias would be seen"
        intervals = [norm.interval(0.95) for norm in norms]
        hits = np.mean([low <= target <= high for low, high in intervals])
        pooled += hits / len(RATIOS)
        assert hits >= at_least(0.92, 6, SEEDS)
        if ratio == 10:
            assert hits <= at_most(0.97, 2, SEEDS)
            width = np.median([high - low for low, high in intervals])
            assert width < 1.25 * 2 * 1.96 * values.std()
    assert pooled >= at_least(0.93, 2, SEEDS * len(RATIOS))


@pytest.mark.parametrize("replicates", [4, 8])
def test_relative_error_bounds_hold(replicates: int) -> None:
    """At least 94% of errors are below their 95% bound, which is close where noise is small."""
    for ratio in RATIOS:
        truth, found = estimated("spiked", ratio, replicates=replicates)
        bounds, errors, expected = [], [], []
        for diagonal in found:
            bounds.append(diagonal.relative_error_bound(0.95))
            expected.append(diagonal.relative_error())
            errors.append(np.linalg.norm(diagonal.values.numpy() - truth))
        errors = np.array(errors) / np.linalg.norm(truth)
        assert np.mean(errors <= bounds) >= at_least(0.93, 6, SEEDS)
        if ratio == 10:
            rms = math.sqrt(np.square(errors).mean())
            assert np.sqrt(np.mean(np.square(expected))) == pytest.approx(rms, rel=0.05)
            assert np.median(bounds) < 1.25 * np.quantile(errors, 0.95)


def test_shares_are_covered() -> None:
    """Half of the entries' share of the squared norm, by Fieller."""
    half = SIZE // 2
    for ratio in RATIOS:
        truth, found = estimated("flat", ratio)
        target = np.square(truth[:half]).sum() / np.square(truth).sum()
        hits, widths = 0, []
        for diagonal in found:
            part = diagonal.squared_norm(lambda v: v[..., :half])
            rest = diagonal.squared_norm(lambda v: v[..., half:])
            low, high = share_interval(part, rest, 0.95)
            assert 0 <= low <= share(part, rest) <= high <= 1
            hits += low <= target <= high
            widths.append(high - low)
        assert hits / SEEDS >= at_least(0.93, 3, SEEDS)
        assert ratio < 10 or np.median(widths) < 0.2


def test_a_share_of_nothing_is_all_of_it() -> None:
    nothing = SquaredNorm(0.0, np.zeros(4), np.zeros(4), 4.0)
    assert share(nothing, nothing) == 1.0
    assert share_interval(nothing, nothing, 0.95) == (1.0, 1.0)
