"""Probe streams: the hash that they claim to be, moments, and independence of what lies near."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from scipy import stats
from torch import Tensor

from hesscli import randomness

CPU = torch.device("cpu")
LEVEL = 1e-3
MASK = 2**64 - 1

rademacher = partial(randomness.rademacher, dtype=torch.float32, device=CPU)
gaussian = partial(randomness.gaussian, dtype=torch.float64, device=CPU)
uneven = partial(randomness.uneven, dtype=torch.float64, device=CPU)


def _splitmix64(seed: int) -> Iterator[int]:
    """The published generator, in plain integers."""
    while True:
        seed = (seed + 0x9E3779B97F4A7C15) % 2**64
        z = seed
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        yield z ^ (z >> 31)


def _word(stream: int, counter: int) -> int:
    """Output ``counter`` of the stream; number 0 is the one before the generator's first."""
    return next(_splitmix64((stream + (counter - 1) * 0x9E3779B97F4A7C15) % 2**64))


def _signs(word: int) -> list[int]:
    return [2 * (word >> bit & 1) - 1 for bit in range(64)]


def _hoeffding(count: int, tests: int) -> float:
    """What |a sum of ``count`` signs| exceeds in none of ``tests``, but for LEVEL of the time."""
    return math.sqrt(2 * count * math.log(2 * tests / LEVEL))


def test_signs_are_the_bits_of_the_published_generator() -> None:
    # The first outputs for this seed, as Rosetta Code's splitmix64 task lists them.
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert list(itertools.islice(_splitmix64(1234567), 4)) == known
    expected = [sign for word in known for sign in _signs(word)]
    assert rademacher(1234567, 64, 256).tolist() == expected


@pytest.mark.parametrize("stream", [1, randomness.key(3, 1, 4), MASK, 1 << 63])
@pytest.mark.parametrize("first", [0, 2**31, 2**52 // 64])
def test_torch_integers_agree_with_plain_ones(stream: int, first: int) -> None:
    expected = [sign for i in range(3) for sign in _signs(_word(stream, first + i))]
    assert rademacher(stream, 64 * first, 192).tolist() == expected
    pairs = [(_word(stream, 2 * (first + i)), _word(stream, 2 * (first + i) + 1)) for i in range(9)]
    uniforms = [[((word >> 11) + 0.5) / 2**53 for word in pair] for pair in pairs]
    normals = [math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * v) for u, v in uniforms]
    # log and cos may differ by a few roundings, and cos moves by 2π of the uniform's own.
    assert gaussian(stream, first, 9).tolist() == pytest.approx(normals, rel=1e-13, abs=1e-14)


@pytest.mark.parametrize("sampler", [rademacher, gaussian, uneven])
def test_an_entry_does_not_depend_on_the_slice(sampler: Callable[..., Tensor]) -> None:
    stream = randomness.key(5, 0, 2)
    whole = sampler(stream, 0, 1000)
    for offset, size in [(0, 1), (1, 63), (63, 2), (64, 64), (130, 517), (999, 1), (400, 0)]:
        assert torch.equal(sampler(stream, offset, size), whole[offset : offset + size])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_signs_are_the_same_in_any_dtype(dtype: torch.dtype) -> None:
    signs = randomness.rademacher(7, 3, 500, dtype=dtype, device=CPU)
    assert signs.dtype == dtype
    assert torch.equal(signs.float(), rademacher(7, 3, 500))
    assert torch.equal(
        randomness.gaussian(7, 3, 500, dtype=dtype, device=CPU), gaussian(7, 3, 500).to(dtype)
    )


@pytest.mark.parametrize("sampler", [rademacher, gaussian])
def test_the_signs_are_the_same_on_any_number_of_threads(sampler: Callable[..., Tensor]) -> None:
    threads = torch.get_num_threads()
    one = sampler(11, 17, 300_000)
    try:
        torch.set_num_threads(2)
        two = sampler(11, 17, 300_000)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, two)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_signs_are_the_same_on_a_gpu() -> None:
    cuda = torch.device("cuda")
    there = randomness.rademacher(13, 5, 100_000, dtype=torch.float32, device=cuda)
    assert torch.equal(there.cpu(), rademacher(13, 5, 100_000))
    normals = randomness.gaussian(13, 5, 100_000, dtype=torch.float64, device=cuda)
    torch.testing.assert_close(normals.cpu(), gaussian(13, 5, 100_000), rtol=1e-12, atol=1e-12)


def test_global_generators_are_left_alone() -> None:
    before = torch.get_rng_state()
    rademacher(1, 0, 100)
    gaussian(1, 0, 100)
    assert torch.equal(before, torch.get_rng_state())


def test_signs_have_the_moments_of_signs() -> None:
    count = 1 << 20
    signs = rademacher(randomness.key(0, 0, 0), 0, count)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.sum())) < _hoeffding(count, 1)
    bits = signs.view(-1, 64)
    assert float(bits.sum(0).abs().max()) < _hoeffding(len(bits), 64)
    between = (bits.T @ bits).fill_diagonal_(0)
    assert float(between.abs().max()) < _hoeffding(len(bits), 64 * 63 // 2)


def test_uneven_entries_are_signs_of_different_sizes() -> None:
    signs, values = rademacher(3, 5, 1000).double(), uneven(3, 5, 1000)
    sizes = values / signs
    assert float(sizes.min()) >= 0.5
    assert float(sizes.max()) < 1.5
    assert len(sizes.unique()) == 1000


def test_gaussian_entries_have_the_moments_of_a_gaussian() -> None:
    count = 1 << 20
    values = gaussian(randomness.key(0, 0, 0), 0, count)
    assert torch.isfinite(values).all()
    bound = float(stats.norm.isf(LEVEL / 2 / 4))
    # E x, x², x³, x⁴ and the variances of those powers.
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        error = float(values.pow(power).mean()) - mean
        assert abs(error) < bound * math.sqrt(variance / count), power
    assert stats.kstest(values[: 1 << 17].numpy(), "norm").pvalue > LEVEL
    lagged = float(values[:-1] @ values[1:]) / math.sqrt(count)
    assert abs(lagged) < float(stats.norm.isf(LEVEL / 2))


def test_keys_are_distinct_and_ordered() -> None:
    triples = itertools.product(range(40), range(40), range(40))
    assert len({randomness.key(*words) for words in triples}) == 40**3
    assert len({randomness.key(0), randomness.key(0, 0), randomness.key(0, 0, 0)}) == 3
    assert randomness.key(1, 2) != randomness.key(2, 1)
    assert randomness.key(-1) == randomness.key(MASK) != randomness.key(1)


NEIGHBOURS: dict[str, Callable[[int], int]] = {
    "seeds": lambda i: randomness.key(i, 0, 0),
    "batches": lambda i: randomness.key(0, i, 0),
    "probes": lambda i: randomness.key(0, 0, i),
    "probes shared by all batches": lambda i: randomness.key(0, randomness.SHARED, i),
}


@pytest.mark.parametrize("kind", NEIGHBOURS)
def test_neighbours_are_independent(kind: str) -> None:
    many, length = 1000, 4096
    signs = torch.stack([rademacher(NEIGHBOURS[kind](i), 0, length) for i in range(many)])
    pairs = many * (many - 1) // 2

    products = torch.triu(signs @ signs.T, diagonal=1)
    assert float(products.abs().max()) < _hoeffding(length, pairs)
    # Products of different pairs are uncorrelated, so their squares add up as a chi-square does:
    # variance 2 (1 − 1/length) each.
    excess = float(products.double().square().sum()) / length - pairs
    assert abs(excess) < float(stats.norm.isf(LEVEL / 2)) * math.sqrt(2 * pairs)

    # A stream may not be its neighbour's, shifted: correlations at all circular lags.
    spectrum = torch.fft.rfft(signs.double())
    lagged = torch.fft.irfft(spectrum[1:] * spectrum[:-1].conj())
    assert float(lagged.abs().max()) < _hoeffding(length, lagged.numel())

    # A mean over seeds must shrink as fast as it says, at every entry and in all.
    assert float(signs.sum(0).abs().max()) < _hoeffding(many, length)
    assert float(signs.sum(1).abs().max()) < _hoeffding(length, many)
    assert abs(float(signs.double().sum())) < _hoeffding(many * length, 1)
