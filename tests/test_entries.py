"""Replicates of a diagonal's error: their covariance is that of the error itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import binom
from scipy.stats import t as student
from torch import Tensor, nn

from hesscli.engines.entries import Entries, Part, Stream, groups, replicates_for
from hesscli.parameters import Parameters

LEVEL = 1e-3
CPU = torch.device("cpu")
SIZE, BATCHES, RUNS = 8, 12, 250


@pytest.fixture(scope="module")
def parameters() -> Parameters:
    return Parameters.of(nn.Linear(3, 2))


def weights(count: int) -> Tensor:
    raw = torch.linspace(0.5, 1.5, count, dtype=torch.float64)
    return raw / raw.sum()


def fill(stream: Stream, truth: Tensor, noise: Tensor, probes: int, seed: int) -> None:
    """Rounds of estimates: each batch's truth, and correlated noise around it."""
    generator = torch.Generator().manual_seed(seed)
    share = weights(len(truth))
    done = 0
    while done < probes:
        count = 2 if done == 0 else done
        for batch, own in enumerate(truth):
            errors = torch.randn(count, SIZE, generator=generator, dtype=torch.float64) @ noise
            found = stream.of_batch(batch, float(share[batch]))
            stream.add(found, own + errors, done)
            stream.keep(found)
        stream.close_round(count)
        done += count


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_replicates_have_the_error_s_covariance(parameters: Parameters, fraction: float) -> None:
    """Of probes in two rounds, and of batches drawn from many; both pooled over runs."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    errors, stated, hits = [], [], []
    for run in range(RUNS):
        generator.manual_seed(run)
        # A quarter of all batches is seen: the truth of the rest is as random as theirs.
        kind = {"generator": generator, "dtype": torch.float64}
        everything = torch.randn(round(BATCHES / fraction), SIZE, **kind)
        truth = everything[:BATCHES]
        share = weights(BATCHES)
        target = share @ truth if fraction == 1 else everything.mean(0)
        entries = Entries(parameters, CPU)
        stream = entries.stream(parameters, exact=False)
        fill(stream, truth, mixing, 4, run)
        found = entries.diagonal([Part(stream, fraction, 4)], 0.0)
        assert found.noise is not None
        errors.append(found.values - target)
        stated.append(found.noise.double().T @ found.noise.double() / len(found.noise))
        limit = student.isf(0.025, found.freedom) * found.stderr()
        hits.append(float(((found.values - target).abs() <= limit).double().mean()))
    real = torch.stack(errors)
    covariance = real.T @ real / RUNS
    # Weighted means lose a few percent of the finite-population factor, which is for equal ones.
    slack = 0.1 if fraction < 1 else 0.0
    scale = covariance.diagonal().sqrt().outer(covariance.diagonal().sqrt())
    difference = (torch.stack(stated).mean(0) - covariance) / scale
    # A sample covariance of 250 runs has a standard error of up to √(2 / 250) = 0.09.
    assert float(difference.abs().max()) < 4.5 * (2 / RUNS) ** 0.5 + slack
    assert np.mean(hits) >= binom.ppf(LEVEL, RUNS, 0.93) / RUNS


def test_what_is_exact_has_no_noise_until_examples_are_missing(parameters: Parameters) -> None:
    truth = torch.randn(BATCHES, SIZE, generator=torch.Generator().manual_seed(5)).double()
    entries, share = Entries(parameters, CPU), weights(BATCHES)
    stream = entries.stream(parameters, exact=True)
    for batch, row in enumerate(truth):
        for part in (0.25 * row, 0.75 * row):  # in pieces, as products of a basis come
            stream.add_exact(batch, float(share[batch]), part)
    stream.close_round(1)
    found = entries.diagonal([Part(stream, 1.0, 1)], 0.5)
    torch.testing.assert_close(found.values, share @ truth + 0.5, rtol=1e-12, atol=1e-12)
    assert found.noise is None
    assert entries.diagonal([Part(stream, 0.5, 1)], 0.5).noise is not None


def test_a_broken_round_does_not_weigh(parameters: Parameters) -> None:
    """Batches with more probes than others would weigh more: the round before it counts."""
    truth = torch.randn(BATCHES, SIZE, generator=torch.Generator().manual_seed(6)).double()
    entries, share = Entries(parameters, CPU), weights(BATCHES)
    stream = entries.stream(parameters, exact=False)
    fill(stream, truth, torch.zeros(SIZE, SIZE).double(), 2, 0)
    extra = stream.of_batch(0, float(share[0]))
    stream.add(extra, torch.full((2, SIZE), 1e6), 2)
    stream.keep(extra)
    found = entries.diagonal([Part(stream, 1.0, 2)], 0.0)
    torch.testing.assert_close(found.values, share @ truth, rtol=1e-12, atol=1e-12)


def test_a_first_round_that_is_broken_speaks_for_its_batches(parameters: Parameters) -> None:
    truth = torch.randn(BATCHES, SIZE, generator=torch.Generator().manual_seed(7)).double()
    entries, share = Entries(parameters, CPU), weights(BATCHES)
    stream = entries.stream(parameters, exact=False)
    for batch in range(5):
        found = stream.of_batch(batch, float(share[batch]))
        stream.add(found, truth[batch].expand(3, SIZE), 0)
        stream.keep(found)
    result = entries.diagonal([Part(stream, 5 / BATCHES, 3)], 0.0)
    mean = (share[:5] @ truth[:5]) / share[:5].sum()
    torch.testing.assert_close(result.values, mean, rtol=1e-12, atol=1e-12)
    assert result.noise is not None
    assert float(result.stderr().min()) > 0


def test_a_part_of_the_parameters_lands_in_its_place() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    whole = Parameters.of(model)
    part = Parameters(p for p in whole if p.name in ("0.bias", "1.weight"))
    entries = Entries(whole, CPU)
    stream = entries.stream(part, exact=True)
    stream.add_exact(0, 1.0, torch.arange(1.0, 5.0))
    stream.close_round(1)
    found = entries.diagonal([Part(stream, 1.0, 1)], 0.0).values.tolist()
    assert found == [0, 0, 0, 0, 1, 2, 3, 4, 0]


def test_replicates_fit_into_their_memory() -> None:
    assert replicates_for(1000) == 16
    assert replicates_for(25_000_000) == 5
    assert replicates_for(10**9) == 4
    assert replicates_for(25_000_000, torch.float64) == 4


@pytest.mark.parametrize("most", [1, 2, 8, 16])
def test_groups_are_the_same_wherever_one_begins(most: int) -> None:
    """They leave nothing out, none is alone that need not be, and only the ends differ."""
    for start, stop in itertools.combinations(range(3 * most + 3), 2):
        found = list(groups(start, stop, most))
        numbers = [n for first, last in found for n in range(first, last)]
        assert numbers == list(range(start, stop))
        sizes = [last - first for first, last in found]
        assert max(sizes) <= most + 2 * (most > 1)
        assert most == 1 or len(found) == 1 or min(sizes) > 1
        assert all(last % most == 0 for _, last in found[1:-2])
    cut = [*groups(0, 2 * most, most), *groups(2 * most, 5 * most, most)]
    assert cut == list(groups(0, 5 * most, most))
    assert list(groups(7, 7, most)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parts_of_the_numbers_add_up_to_the_whole(
    parameters: Parameters, dtype: torch.dtype
) -> None:
    """A stream of 64 estimates, and one that is given them in four parts."""
    rows = torch.randn(64, SIZE, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    found = []
    for cuts in ([0, 64], [0, 16, 48, 64]):
        entries = Entries(parameters, CPU, dtype)
        stream = entries.stream(parameters, exact=False)
        into = stream.of_batch(3, 1.0)
        for start, stop in itertools.pairwise(cuts):
            stream.add(into, rows[start:stop], start)
        stream.keep(into)
        stream.close_round(64)
        found.append(entries.diagonal([Part(stream, 1.0, 64)], 0.0))
    whole, parts = found
    torch.testing.assert_close(parts.values, whole.values, rtol=1e-14, atol=1e-14)
    assert whole.noise is not None
    assert whole.noise.dtype == dtype
    torch.testing.assert_close(parts.noise, whole.noise)
    assert parts.freedom == whole.freedom
