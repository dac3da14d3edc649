"""A layer's summary against numpy and loops, and its error bars on noisy diagonals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from noisy_diagonals import at_least, estimates, matrix

from hesscli.diagnostics.summary import (
    BINS,
    LEVELS,
    histogram_edges,
    summarise,
    total_histogram,
)
from hesscli.engines.diagonal import Diagonal, student
from hesscli.results import EntrySummary, ParameterReport


def parameters(*shapes: tuple[int, ...]) -> list[ParameterReport]:
    return [ParameterReport(name=f"p{i}", shape=shape) for i, shape in enumerate(shapes)]


def exact(values: np.ndarray, *shapes: tuple[int, ...]) -> EntrySummary:
    tensor = torch.from_numpy(values)
    edges = histogram_edges(tensor)
    return summarise(Diagonal(tensor, None, math.inf), parameters(*shapes), edges)


def test_exact_numbers_are_numpys() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.standard_normal(300) ** 3, np.zeros(20), [1e-9, -1e-12]])
    found = exact(values, (322,))
    assert found.mean == pytest.approx(values.mean(), rel=1e-12)
    assert found.std == pytest.approx(values.std(), rel=1e-12)
    assert found.negative_fraction == np.mean(values < 0)
    assert [q.level for q in found.quantiles] == list(LEVELS)
    np.testing.assert_allclose(
        [q.value for q in found.quantiles], np.quantile(values, LEVELS), rtol=1e-12, atol=1e-300
    )
    counts, _ = np.histogram(values, found.histogram.edges)
    assert found.histogram.counts == tuple(counts)
    bars = [found.mean_stderr, found.std_stderr, found.negative_stderr]
    bars += [q.stderr for q in found.quantiles] + [entry.stderr for entry in found.largest]
    assert set(bars) == {0.0}


def test_largest_entries_are_named_by_their_place() -> None:
    tensors = [np.zeros((2, 3)), np.zeros(()), np.zeros((2, 2, 2))]
    tensors[0][1, 2], tensors[2][0, 1, 1], tensors[2][1, 0, 0] = -7.0, 5.0, -5.0
    tensors[1][()] = 6.0
    values = np.concatenate([tensor.reshape(-1) for tensor in tensors])
    found = exact(values, (2, 3), (), (2, 2, 2)).largest
    assert [(e.parameter, e.index, e.estimate) for e in found] == [
        ("p0", (1, 2), -7.0),
        ("p1", (), 6.0),
        ("p2", (0, 1, 1), 5.0),
        ("p2", (1, 0, 0), -5.0),
        ("p0", (0, 0), 0.0),
    ]


def test_fewer_entries_than_are_asked_for() -> None:
    found = exact(np.array([2.0]), (1,))
    assert [entry.estimate for entry in found.largest] == [2.0]
    assert {q.value for q in found.quantiles} == {2.0}
    assert sum(found.histogram.counts) == 1


@pytest.mark.parametrize("kind", ["both", "positive", "negative", "constant", "spike", "zeros"])
def test_edges_hold_every_entry_and_zero_in_the_middle(kind: str) -> None:
    rng = np.random.default_rng(1)
    values = {
        "both": rng.standard_normal(5000) ** 3,
        "positive": rng.standard_normal(5000) ** 4,
        "negative": -np.exp(5 * rng.standard_normal(5000)),
        "constant": np.full(50, 3.0),
        "spike": np.concatenate([np.zeros(5000), [-1e-30, 1e5]]),
        "zeros": np.zeros(10),
    }[kind]
    edges = np.array(histogram_edges(torch.from_numpy(values)))
    assert (np.diff(edges) > 0).all()
    assert edges[0] <= values.min()
    assert values.max() <= edges[-1]
    assert np.histogram(values, edges)[0].sum() == len(values)
    middle = np.searchsorted(edges, 0.0)
    assert edges[middle - 1] == -edges[middle]
    assert len(edges) == 2 if kind == "zeros" else BINS + 2 <= len(edges) <= BINS + 4
    if kind in ("both", "positive"):
        inside = np.mean(np.abs(values) < edges[middle])
        assert inside < 0.03, "the linear bin is for few"
    for side in (edges[middle:], -edges[:middle][::-1]):
        if len(side) > 1:
            np.testing.assert_allclose(side[1:] / side[:-1], side[1] / side[0], rtol=1e-9)


def test_total_histogram_is_the_histogram_of_all() -> None:
    rng = np.random.default_rng(2)
    parts = [torch.from_numpy(rng.standard_normal(n)) for n in (10, 200, 33)]
    edges = histogram_edges(torch.cat(parts))
    shapes = [parameters((len(part),)) for part in parts]
    layers = [
        summarise(Diagonal(part, None, math.inf), shape, edges).histogram
        for part, shape in zip(parts, shapes, strict=True)
    ]
    counts, _ = np.histogram(torch.cat(parts).numpy(), edges)
    assert total_histogram(layers).counts == tuple(counts)


def naive_bars(values: np.ndarray, noise: np.ndarray) -> dict[str, float]:
    """Standard errors of two of the numbers, replicate by replicate."""
    medians = [float(np.median(values + error)) - float(np.median(values)) for error in noise]
    shift = abs(sum(medians) / len(medians)) / (2 * (math.sqrt(2) - 1))
    negative = [sum(v + e < 0 for v, e in zip(values, error, strict=True)) for error in noise]
    turned = [
        sum((v < 0) != (v + e < 0) for v, e in zip(values, error, strict=True)) for error in noise
    ]
    return {
        "median": float(np.std(medians, ddof=1)) + shift,
        "negative": (float(np.std(negative, ddof=1)) + sum(turned) / len(turned)) / len(values),
        "mean": math.sqrt(sum(float(np.mean(error)) ** 2 for error in noise) / len(noise)),
    }


def test_error_bars_are_their_naive_twins() -> None:
    rng = np.random.default_rng(3)
    values, noise = rng.standard_normal(50), rng.standard_normal((6, 50)).astype(np.float32)
    diagonal = Diagonal(torch.from_numpy(values), torch.from_numpy(noise), 6.0)
    found = summarise(diagonal, parameters((50,)), (-9.0, 9.0))
    bars = naive_bars(values, noise)
    assert found.quantiles[4].stderr == pytest.approx(bars["median"], rel=1e-9)
    assert found.negative_stderr == pytest.approx(bars["negative"], rel=1e-9)
    assert found.mean_stderr == pytest.approx(bars["mean"], rel=1e-6)
    own = diagonal.stderr().numpy()
    for entry in found.largest:
        assert entry.stderr >= own[entry.index]


TRUTHS = {
    "normal": lambda rng, size: rng.standard_normal(size),
    "positive": lambda rng, size: np.exp(2 * rng.standard_normal(size)),
    "half zero": lambda rng, size: rng.exponential(size=size) * (rng.random(size) < 0.5),
}


def test_error_bars_hold() -> None:
    """Estimate ± Student · stderr holds the truth in 94% at least, pooled over layers.

    The truths are spread ``ratio`` times as wide as the noise in an entry.
    """
    size, probes, replicates, seeds = 60, 32, 8, 120
    cases = list(itertools.product(TRUTHS, ("flat", "spiked"), (0.3, 3.0, 30.0)))
    hits: dict[str, list[float]] = {}
    for name, kind, ratio in cases:
        rng = np.random.default_rng(30)
        truth = TRUTHS[name](rng, size)
        truth /= truth.std()
        a = matrix(truth, kind, math.sqrt(probes) / ratio, rng)
        quantiles = np.quantile(truth, LEVELS)
        for diagonal in estimates(a, seeds, probes, replicates, rng):
            found = summarise(diagonal, parameters((size,)), (-1e9, 1e9))
            reach = student(diagonal.freedom, replicates, 0.025)
            pairs = {
                "mean": [(found.mean - truth.mean(), found.mean_stderr)],
                "std": [(found.std - truth.std(), found.std_stderr)],
                "negative": [(found.negative_fraction - np.mean(truth < 0), found.negative_stderr)],
                "quantiles": [
                    (q.value - t, q.stderr) for q, t in zip(found.quantiles, quantiles, strict=True)
                ],
                "largest": [(e.estimate - truth[e.index], e.stderr) for e in found.largest],
            }
            for what, rows in pairs.items():
                inside = np.mean([abs(off) <= reach * bar + 1e-12 for off, bar in rows])
                hits.setdefault(what, []).append(float(inside))
    floor = at_least(0.94, 5, seeds * len(cases))
    rates = {what: np.mean(rate) for what, rate in hits.items()}
    assert all(rate >= floor for rate in rates.values()), rates


def test_the_plain_quantile_bar_would_not_hold() -> None:
    """Without the shift, the 5% quantile of noise around one value is missed."""
    rng = np.random.default_rng(31)
    truth, missed, held = np.ones(200), 0, 0
    a = matrix(truth, "flat", math.sqrt(32), rng)
    for diagonal in estimates(a, 100, 32, 8, rng):
        noisy = diagonal.values + diagonal.noise
        spread = np.quantile(noisy.numpy(), 0.05, axis=1).std(ddof=1)
        found = summarise(diagonal, parameters((200,)), (-1e9, 1e9)).quantiles[2]
        reach = student(diagonal.freedom, 8, 0.025)
        missed += abs(found.value - 1) > reach * spread
        held += abs(found.value - 1) <= reach * found.stderr
    assert missed > 90
    assert held > 85
