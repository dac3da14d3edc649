"""Replicates of a diagonal's error: their covariance is that of the error itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binom
from scipy.stats import t as student
from torch import Tensor, nn

from hesscli.engines.entries import Entries, Part, Stream, replicates_for
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
