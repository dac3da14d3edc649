"""AdaHessian's running root mean square: the published formula, its bias, and taking it off."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hesscli.engines.root_mean_square import (
    RootMeanSquare,
    variance_from_successive,
    variance_of_mean,
)
from hesscli.errors import UsageError

ENTRIES = 20_000
LEVEL_1E_4 = 3.9
"""Standard errors that a normal variable exceeds with probability 1e-4, two-sided."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def weights(beta2: float, count: int) -> Tensor:
    """What each update counts in the end, by the paper's formula."""
    raw = [(1 - beta2) * beta2 ** (count - i) / (1 - beta2**count) for i in range(1, count + 1)]
    return torch.tensor(raw, dtype=torch.float64)


@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.98, 0.999])
@pytest.mark.parametrize("count", [1, 2, 7, 300])
def test_is_the_published_sum(beta2: float, count: int) -> None:
    estimates = normal(count, 4, 3)
    ours = RootMeanSquare(beta2)
    for estimate in estimates:
        ours.update(estimate)
    naive = torch.einsum("i,i...->...", weights(beta2, count), estimates.square()).sqrt()
    # Up to 300 roundings, and 1 − β^t has lost up to 1/(1 − β) = 1000 of its eps.
    torch.testing.assert_close(ours.value, naive, rtol=1e-12, atol=0)


def test_a_constant_is_its_own_root_mean_square_from_the_first_update() -> None:
    """Bias correction counts updates: without it the first of 0.999 would be 3% of the truth."""
    ours = RootMeanSquare(0.999)
    for _ in range(50):
        ours.update(torch.tensor([2.0, -2.0, 0.0], dtype=torch.float64))
        expected = torch.tensor([2.0, 2.0, 0.0], dtype=torch.float64)
        torch.testing.assert_close(ours.value, expected, rtol=1e-12, atol=0)


def test_one_probe_tends_to_the_norms_of_the_rows() -> None:
    """E[(v ⊙ Hv)²] = Σ_j H_ij² for Rademacher probes: the noise of the estimate stays."""
    matrix = normal(6, 6)
    matrix = matrix + matrix.T
    signs = 2.0 * torch.cartesian_prod(*[torch.arange(2)] * 6).double() - 1
    ours = RootMeanSquare(1 - 1e-9)  # all 64 probes there are, at equal weights
    for probe in signs:
        ours.update(probe * (matrix @ probe))
    # Weights differ by 64e-9 of their size, and 1 − β^t has lost 1e9 of its eps.
    torch.testing.assert_close(ours.value, matrix.norm(dim=1), rtol=1e-6, atol=0)
    assert (ours.value > 1.2 * matrix.diagonal().abs()).any()


def drawn(diagonals: Tensor, probes: int, noise: float) -> Iterator[Tensor]:
    """For each update's diagonal so many independent estimates, ``(P, ENTRIES)``."""
    for i, diagonal in enumerate(diagonals):
        yield diagonal + noise * normal(probes, ENTRIES, seed=i + 1)


def assert_mean_is(errors: Tensor) -> None:
    """Entries are independent with one expectation: their mean is zero to its standard error."""
    stderr = float(errors.std()) / math.sqrt(len(errors))
    assert abs(float(errors.mean())) < LEVEL_1E_4 * stderr


@pytest.mark.parametrize("probes", [2, 5])
def test_noise_from_probes_is_taken_off_whatever_the_diagonal_does(probes: int) -> None:
    beta2, noise = 0.8, 1.5
    diagonals = torch.linspace(-1, 4, 12, dtype=torch.float64)  # it drifts, through zero
    ours = RootMeanSquare(beta2)
    for estimates in drawn(diagonals, probes, noise):
        ours.update(estimates.mean(0), variance_of_mean(estimates))
    squares = float(weights(beta2, 12) @ diagonals.square())
    assert_mean_is(ours.mean_square - ours.noise - squares)
    assert_mean_is(ours.mean_square - noise**2 / probes - squares)
    assert_mean_is(ours.noise - noise**2 / probes)
    # The test can fail: uncorrected, the mean is off by many standard errors.
    with pytest.raises(AssertionError):
        assert_mean_is(ours.mean_square - squares)


def test_noise_from_successive_updates_is_taken_off_a_constant_diagonal() -> None:
    diagonal, noise, before = 0.7, 1.5, None
    ours = RootMeanSquare(0.9)
    for (estimate,) in drawn(torch.full((30,), diagonal), 1, noise):
        ours.update(
            estimate, None if before is None else variance_from_successive(before, estimate)
        )
        before = estimate
    assert_mean_is(ours.noise - noise**2)
    assert_mean_is(ours.mean_square - ours.noise - diagonal**2)


def test_noise_is_the_mean_over_updates_that_know_theirs() -> None:
    ours = RootMeanSquare(0.5)
    for variance in (1.0, None, 4.0, None):
        known = None if variance is None else torch.full((2,), variance)
        ours.update(torch.zeros(2), known)
    # Weights 1/16, 1/8, 1/4, 1/2 in order, of which the first and the third count: all exact.
    assert ours.noise.tolist() == [(1 / 16 + 4 / 4) / (1 / 16 + 1 / 4)] * 2


def test_successive_updates_take_a_drift_for_noise() -> None:
    """As documented: half of each squared change is taken off too much."""
    drift, before = 0.5, None
    ours = RootMeanSquare(0.9)
    for diagonal in torch.arange(30, dtype=torch.float64) * drift:
        now = diagonal.expand(3)
        ours.update(now, None if before is None else variance_from_successive(before, now))
        before = now
    torch.testing.assert_close(
        ours.noise, torch.full((3,), drift**2 / 2, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_debiased_is_nearer_the_truth_than_the_paper_s() -> None:
    """D = 3, two probes of variance 1 each, a memory of (1 + β)/(1 − β) = 39 updates.

    The paper's tends to √(9 + 1/2). D̄² − noise has a variance of (4·9/2 + 2/4 + 2/4)/39 = 0.49
    an entry; the root makes that a standard deviation of √0.49/6 = 0.12, and a bias of
    −0.49/(8·27) = −0.0023. The mean of 20,000 entries: 3.9 · 0.12/√20,000 + 0.0023 < 0.006.
    """
    ours = RootMeanSquare(0.95)
    for estimates in drawn(torch.full((150,), 3.0), 2, 1.0):
        ours.update(estimates.mean(0), variance_of_mean(estimates))
    assert abs(float(ours.value.mean()) - math.sqrt(9.5)) < 0.006
    assert abs(float(ours.debiased.mean()) - 3) < 0.006


def test_debiased_is_zero_where_there_is_nothing_but_noise() -> None:
    ours = RootMeanSquare()
    ours.update(torch.ones(3), torch.tensor([0.0, 1.0, 2.0]))
    assert ours.debiased.tolist() == [1.0, 0.0, 0.0]


def test_goes_on_from_a_saved_state() -> None:
    """Through a file that torch reads without running code, to the same bits."""
    estimates, variances = normal(9, 5), normal(9, 5, seed=1).square()

    def taken(mean: RootMeanSquare, steps: range) -> RootMeanSquare:
        for i in steps:
            mean.update(estimates[i], variances[i] if i % 2 else None)
        return mean

    whole = taken(RootMeanSquare(0.9), range(9))
    file = io.BytesIO()
    torch.save(taken(RootMeanSquare(0.9), range(4)).state_dict(), file)
    file.seek(0)
    resumed = RootMeanSquare()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    taken(resumed, range(4, 9))
    for name in ("value", "debiased", "noise", "count", "beta2"):
        ours, theirs = getattr(resumed, name), getattr(whole, name)
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs)), name


def test_a_loaded_state_is_its_own() -> None:
    first, second = RootMeanSquare(0.9), RootMeanSquare()
    first.update(torch.ones(2))
    second.load_state_dict(first.state_dict())
    second.update(torch.zeros(2))
    assert first.value.tolist() == [1.0, 1.0]


def test_the_caller_s_tensors_are_left_alone() -> None:
    estimates = [normal(3, seed=i).requires_grad_() for i in range(3)]
    ours = RootMeanSquare(0.5)
    for estimate in estimates:
        ours.update(estimate, variance_from_successive(estimates[0].detach(), estimate.detach()))
    assert all(torch.equal(e.detach(), normal(3, seed=i)) for i, e in enumerate(estimates))
    assert not ours.value.requires_grad
    value = ours.value
    ours.value.zero_()
    assert torch.equal(ours.value, value)


def test_sums_are_kept_in_float64_unless_told_otherwise() -> None:
    """In float32, 1e-8 of the mean would be lost at each of these updates."""
    wide, narrow = RootMeanSquare(0.999), RootMeanSquare(0.999, dtype=torch.float32)
    estimate = torch.full((2,), 1e-3)
    for _ in range(1000):
        wide.update(estimate)
        narrow.update(estimate)
    assert wide.value.dtype == torch.float64
    assert narrow.value.dtype == torch.float32
    torch.testing.assert_close(wide.value, estimate.double(), rtol=1e-12, atol=0)
    torch.testing.assert_close(narrow.value, estimate, rtol=1e-3, atol=0)


def test_never_waits_for_the_device() -> None:
    """Tensors without data, from which nothing can be read: any look at a value would raise."""
    ours = RootMeanSquare()
    for _ in range(3):
        estimates = torch.empty(2, 5, device="meta")
        ours.update(estimates.mean(0), variance_of_mean(estimates))
    with pytest.raises(RuntimeError):
        float(ours.value.sum())
    assert {ours.value.device.type, ours.debiased.device.type} == {"meta"}


def test_misuse_is_said_in_three_lines() -> None:
    ours = RootMeanSquare()
    with pytest.raises(UsageError, match="no update"):
        _ = ours.value
    ours.update(torch.ones(3))
    with pytest.raises(UsageError, match="no update with a variance"):
        _ = ours.debiased
    with pytest.raises(UsageError, match=r"\(1,\) after \(3,\)"):
        ours.update(torch.ones(1))
    with pytest.raises(UsageError, match=r"\(1,\) after \(3,\)"):
        ours.update(torch.ones(3), torch.ones(1))
    assert ours.count == 1
    with pytest.raises(UsageError, match="beta2"):
        RootMeanSquare(1.0)
