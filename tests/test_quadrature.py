"""Spectra that are known to the last bit, found again: counted, weighted, and with their copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard
from scipy.stats import binom, t, wasserstein_distance
from torch import Tensor

from hesscli.diagnostics.measurement import drive
from hesscli.diagnostics.run import Clock
from hesscli.diagnostics.spectral_runs import Exploration, SpectralPlan
from hesscli.diagnostics.spectrum import functions
from hesscli.engines.lanczos import Lanczos
from hesscli.engines.quadrature import Measure, measure, smoothed
from hesscli.engines.ritz import KrylovRun, counted
from hesscli.operators.dense import Dense

SIZE = 64
EPS = 2.0**-52
SPECTRA = {
    "spread": np.arange(1.0, 65.0),
    "clustered": np.repeat([1.0, 1.0 + 2.0**-20, 5.0, 5.0 + 2.0**-24], 16),
    "repeated": np.repeat([-3.0, 1.0, 2.0, 7.0], [40, 1, 20, 3]),
    "indefinite": np.arange(-32.0, 32.0),
    "outliers": np.r_[np.arange(60) / 64, -(2.0**20), 2.0**12, 2.0**20, 2.0**20],
    "tiny": np.arange(1.0, 65.0) * 2.0**-300,
    "huge": np.arange(-20.0, 44.0) * 2.0**300,
    "rank one": np.r_[3.0, np.zeros(63)],
    "identity": np.ones(64),
    "zero": np.zeros(64),
}
every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA.keys())


def with_spectrum(values: np.ndarray) -> Tensor:
    """H diag(λ) Hᵀ / d with a Hadamard matrix: exact for short binary fractions."""
    basis = hadamard(len(values)).astype(np.float64)
    return torch.from_numpy((basis * values) @ basis / len(values))


def exploration(matrix: Tensor, steps: int, probes: int, seed: int = 0) -> Exploration:
    operator = Dense.of(matrix)
    plan = SpectralPlan(steps=steps, probes=probes, count=3, goal=0.01, early=False, seed=seed)
    found = Exploration(operator, plan)
    found.finish(drive(Clock(None, None), found))
    return found


def distance(spectrum: np.ndarray, found: Measure) -> float:
    """Wasserstein-1 over the mean size."""
    size = float(np.abs(spectrum).mean()) or 1.0
    return wasserstein_distance(spectrum / size, found.values / size, None, found.weights)


@every_spectrum
@pytest.mark.parametrize("steps", [64, 200])
def test_all_steps_give_all_eigenvalues(spectrum: np.ndarray, steps: int) -> None:
    """Each as often as it is there, also where there are fewer dimensions than steps."""
    found = exploration(with_spectrum(spectrum), steps, probes=3)
    assert found.status == "exact"
    assert found.lanczos.count == SIZE
    tolerance = SIZE * EPS * np.abs(spectrum).max()
    known = found.measure
    np.testing.assert_allclose(known.values, np.sort(spectrum), rtol=0, atol=tolerance)
    assert (known.weights == 1 / SIZE).all()
    assert known.isolated.all()
    assert functions(found).trace.stderr == 0


@every_spectrum
@pytest.mark.parametrize(("steps", "probes"), [(1, 1), (2, 3), (12, 4), (63, 2)])
def test_weights_sum_to_one(spectrum: np.ndarray, steps: int, probes: int) -> None:
    known = exploration(with_spectrum(spectrum), steps, probes).measure
    assert abs(known.weights.sum() - 1) < 1e-12
    assert (known.weights > 0).all()
    assert (np.diff(known.values) >= 0).all()


@every_spectrum
@pytest.mark.parametrize("steps", [8, 20])
def test_no_ghosts(spectrum: np.ndarray, steps: int) -> None:
    """What was counted is there, and at least as often."""
    found = exploration(with_spectrum(spectrum), steps, probes=3)
    for one in found.known:
        there = np.abs(spectrum - one.value) <= one.bar
        assert 1 <= one.copies <= there.sum()


def test_few_steps_are_exact_where_eigenvalues_are_few() -> None:
    """Four of them after eight steps: copies that later starts find are counted, the rest shared.

    What is left to chance is how 64 less the counted ones are shared, so that the share of each
    is off by less than five standard deviations of a χ² over d.
    """
    spectrum = SPECTRA["repeated"]
    found = exploration(with_spectrum(spectrum), 8, probes=5)
    copies = {round(one.value): one.copies for one in found.known}
    assert copies[1] == 1
    assert copies[7] == 3
    known = found.measure
    for value, number in ((-3, 40), (1, 1), (2, 20), (7, 3)):
        share = known.weights[np.abs(known.values - value) < 1e-9].sum()
        assert abs(SIZE * share - number) < 5 * np.sqrt(2 * number)


@pytest.mark.parametrize("name", ["rank one", "identity", "zero"])
@pytest.mark.parametrize("steps", [2, 8])
def test_one_kind_of_eigenvalue_takes_all_that_is_left(name: str, steps: int) -> None:
    found = exploration(with_spectrum(SPECTRA[name]), steps, probes=2)
    sizes = np.abs(SPECTRA[name])
    rounding = SIZE * EPS * sizes.max() / (sizes.mean() or 1.0)  # of each, beside the mean
    assert distance(SPECTRA[name], found.measure) <= rounding


def test_a_copy_is_found_by_the_second_start() -> None:
    """One start vector sees a double eigenvalue once, and its share of it says nothing."""
    matrix = with_spectrum(SPECTRA["outliers"])
    alone, twice = (exploration(matrix, 6, probes) for probes in (1, 2))
    assert [one.copies for one in alone.known if one.value > 1e6] == [1]
    assert [one.copies for one in twice.known if one.value > 1e6] == [2]
    assert distance(SPECTRA["outliers"], twice.measure) < 5e-3
    assert distance(SPECTRA["outliers"], alone.measure) > 0.2


def test_counting_outliers_takes_their_noise_away() -> None:
    """Over seeds: the trace of ten outliers above a bulk, against plain quadrature."""
    spectrum = np.r_[np.arange(54) / 64, 2.0 ** np.arange(1, 11)]
    matrix = with_spectrum(spectrum)
    plain, ours = [], []
    for seed in range(20):
        found = exploration(matrix, 24, 1, seed)
        ours.append(distance(spectrum, found.measure))
        ritz = found.ritz
        off = wasserstein_distance(spectrum, ritz.values, None, ritz.weights)
        plain.append(off / np.abs(spectrum).mean())
    assert np.median(ours) < np.median(plain) / 20


def test_error_bars_hold() -> None:
    """Student's 95% intervals from five starts hold the trace for nearly 95% of 50 seeds.

    90% are asked for, by the binomial at 1e-3: the first run has less noise than the others.
    """
    spectrum = np.r_[-np.arange(1, 9) / 8, np.arange(50) / 16, 2.0 ** np.arange(3, 9)]
    matrix, truth, hits = with_spectrum(spectrum), spectrum.sum(), 0
    quantile = t.ppf(0.975, 4)
    for seed in range(50):
        trace = functions(exploration(matrix, 20, 5, seed)).trace
        assert trace.value is not None
        assert trace.stderr is not None
        hits += abs(trace.value - truth) <= quantile * trace.stderr
    assert binom.ppf(1e-3, 50, 0.9) <= hits


def test_depth_is_compared_before_a_bar_is_given() -> None:
    """Few steps cannot tell how much of a bulk around zero is negative, whatever the start."""
    spectrum = np.r_[np.linspace(-1, 1, 63), 100.0]
    shallow = functions(exploration(with_spectrum(spectrum), 8, 5)).negative_mass
    assert shallow.stderr is None or abs(shallow.depth_change or 0.0) <= shallow.stderr
    alone = functions(exploration(with_spectrum(spectrum), 8, 1)).negative_mass
    assert (alone.stderr, alone.depth_change) == (None, None)


@every_spectrum
def test_densities_have_the_spectrums_integral_and_place(spectrum: np.ndarray) -> None:
    known = exploration(with_spectrum(spectrum), 16, 3).measure
    for bandwidth in (None, 0.01, 0.3):
        smooth = smoothed(known, 3, bandwidth)
        assert (smooth.values >= 0).all()
        assert (np.diff(smooth.grid) > 0).all()
        assert abs(np.trapezoid(smooth.values, smooth.grid) - 1) < 1e-6
        assert bandwidth in (None, smooth.bandwidth)
    counted_alone = measure([KrylovRun(found := known_ritz(spectrum), SIZE)], counted(found), SIZE)
    spikes = smoothed(counted_alone, 1)
    assert abs(np.trapezoid(spikes.values, spikes.grid) - 1) < 1e-9


def known_ritz(spectrum: np.ndarray):  # type: ignore[no-untyped-def]
    matrix = with_spectrum(spectrum)
    lanczos = Lanczos(lambda vector: matrix @ vector, SIZE, seed=0)
    for _ in range(SIZE):
        lanczos.step()
    return lanczos.ritz()
