"""Block variance against loops over entries, and its intervals on noisy diagonals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from noisy_diagonals import at_least, at_most, estimates, matrix

from hesscli.diagnostics.block_variance import block_report
from hesscli.engines.diagonal import Diagonal
from hesscli.engines.hutchinson.blocks import Blocks
from hesscli.results import BlockReport
from hesscli.vocabulary import BlockRule

SEEDS = 500
SHAPES = [(4, 3, 2, 2), (4,), (3, 10)]  # 48 and 30 entries in blocks, 4 outside


def report(
    values: np.ndarray,
    noise: np.ndarray | None = None,
    shapes: Sequence[Sequence[int]] = SHAPES,
    rule: str = "auto",
    **more: object,
) -> BlockReport:
    replicates = None if noise is None else torch.from_numpy(noise).float()
    diagonal = Diagonal(torch.from_numpy(values), replicates, math.inf if noise is None else 8.0)
    return block_report(diagonal, shapes, BlockRule.parse(rule), confidence=0.95, **more)


def groups(values: np.ndarray) -> list[list[float]]:
    """The blocks of SHAPES by the rule 4: kernels in rows of 12, then rows of 4, 4 and 2."""
    parts = [values[i : i + 4] for i in range(0, 48, 4)]
    for row in range(52, 82, 10):
        parts += [values[row : row + 4], values[row + 4 : row + 8], values[row + 8 : row + 10]]
    return [list(part) for part in parts]


def variances(values: np.ndarray) -> tuple[float, float]:
    """Between and within, entry by entry."""
    blocks = groups(values)
    everything = [x for block in blocks for x in block]
    mean = sum(everything) / len(everything)
    between = within = 0.0
    for block in blocks:
        centre = sum(block) / len(block)
        for x in block:
            between += (centre - mean) ** 2 / len(everything)
            within += (x - centre) ** 2 / len(everything)
    return between, within


def test_exact_variances_are_their_naive_twins() -> None:
    values = np.random.default_rng(0).standard_normal(82)
    found, (between, within) = report(values, rule="4"), variances(values)
    assert (found.rule, found.count) == ("4", 21)
    assert found.between_variance == pytest.approx(between, rel=1e-12)
    assert found.within_variance == pytest.approx(within, rel=1e-12)
    assert found.explained == pytest.approx(between / (between + within), rel=1e-12)
    assert found.between_interval == (found.between_variance,) * 2
    assert found.within_interval == (found.within_variance,) * 2
    assert found.explained_interval == (found.explained,) * 2
    assert found.noise_variance is None
    assert found.noise_reduction is None


def test_noise_is_taken_out_and_reported() -> None:
    """Bias is the replicates' own between and within; their block means give the noise."""
    rng = np.random.default_rng(1)
    values = 3 * rng.standard_normal(82)
    noise = rng.standard_normal((6, 82)).astype(np.float32).astype(np.float64)
    found = report(values, noise, rule="4")
    between, within = variances(values)
    bias = np.mean([variances(error) for error in noise], axis=0)
    assert found.between_variance == pytest.approx(between - bias[0], rel=1e-12)
    assert found.within_variance == pytest.approx(within - bias[1], rel=1e-12)
    means = [[np.mean(block) for block in groups(error)] for error in noise]
    entries = [[x for block in groups(error) for x in block] for error in noise]
    block_noise = np.mean(np.square(means))
    assert found.noise_variance == pytest.approx(block_noise, rel=1e-12)
    assert found.noise_reduction == pytest.approx(np.mean(np.square(entries)) / block_noise)
    borrowed = report(values, rule="4", probe_noise=torch.from_numpy(noise).float())
    assert borrowed.noise_variance == pytest.approx(found.noise_variance)
    assert borrowed.noise_reduction == pytest.approx(found.noise_reduction)
    assert borrowed.within_variance == pytest.approx(within)


@pytest.mark.parametrize("shapes", [[(7,), (3,)], [(5, 2, 1, 1)], [(10, 1), ()]])
def test_nothing_to_average(shapes: list[tuple[int, ...]]) -> None:
    """Vectors alone, 1 × 1 kernels, and columns have one entry in a block."""
    rng = np.random.default_rng(2)
    size = sum(math.prod(shape) for shape in shapes)
    found = report(rng.standard_normal(size), rng.standard_normal((8, size)), shapes)
    assert found.verdict == "nothing to average: one entry per block"
    assert (found.within_variance, found.within_interval) == (0, (0, 0))
    assert (found.explained, found.explained_interval) == (1, (1, 1))
    assert found.noise_reduction == pytest.approx(1)
    assert found.rule == ("none" if shapes[0] == (7,) else found.rule)


def test_mixed_rules_are_both_named() -> None:
    assert report(np.zeros(82)).rule == "kernel + 32"


def layers() -> list[tuple[tuple[int, ...], str, float, float]]:
    """Layers with between and within small and large, in units of the noise in an entry."""
    small, large = 0.3, 5.0
    return [
        ((3, 4, 2, 2), "auto", small, small),
        ((6, 2, 3, 3), "auto", large, small),
        ((8, 12), "4", small, large),
        ((5, 20), "row", large, large),
        ((5, 10), "7", 1.0, 1.0),
    ]


@pytest.mark.parametrize("kind", ["flat", "spiked"])
def test_coverage(kind: str) -> None:
    """Nominal 95%: 94% at least, pooled over layers; at most 97% and no wider than needed where
    the truth stands out of the noise."""
    probes, replicates, pooled = 32, 8, np.zeros(3)
    for shape, rule, between, within in layers():
        rng = np.random.default_rng(20)
        blocks = Blocks.of(shape, BlockRule.parse(rule))
        truth = within * torch.from_numpy(rng.standard_normal(shape))
        truth -= blocks.average(truth)
        means = between * torch.from_numpy(rng.standard_normal(shape))
        truth = (truth + blocks.average(means) * math.sqrt(blocks.size)).reshape(-1).numpy()
        exact = report(truth, None, [shape], rule)
        targets = np.array([exact.between_variance, exact.within_variance, exact.explained])
        a = matrix(truth, kind, math.sqrt(probes), rng)
        hits, found, widths = np.zeros(3), [], []
        for diagonal in estimates(a, SEEDS, probes, replicates, rng):
            got = block_report(diagonal, [shape], BlockRule.parse(rule), confidence=0.95)
            ends = np.array([got.between_interval, got.within_interval, got.explained_interval]).T
            hits += (ends[0] <= targets) & (targets <= ends[1])
            widths.append(ends[1] - ends[0])
            found.append((got.between_variance, got.within_variance, got.explained))
        pooled += hits / SEEDS / len(layers())
        if between == within == 5.0:
            assert (hits / SEEDS <= at_most(0.98, 6, SEEDS)).all(), hits
            needed = 2 * 1.96 * np.std(found, axis=0)
            assert (np.median(widths, axis=0) < 1.35 * needed).all()
    assert (pooled >= at_least(0.94, 6, SEEDS * len(layers()))).all(), pooled


def structured(between: float, within: float) -> np.ndarray:
    """A matrix of 40 × 64 by blocks of 32, with these variances exactly."""
    rng = np.random.default_rng(21)
    means, rest = rng.standard_normal((40, 2, 1)), rng.standard_normal((40, 2, 32))
    means, rest = means - means.mean(), rest - rest.mean(2, keepdims=True)
    values = means * math.sqrt(between) / means.std() + rest * math.sqrt(within) / rest.std()
    return np.asarray(values.reshape(-1))


@pytest.mark.parametrize(
    ("between", "within", "noise", "probes", "verdict"),
    [
        (1.0, 0.02, None, None, "safe: averaging keeps 98.0% of the structure"),
        (1.0, 0.4, None, None, "mixed: averaging keeps 71.4% of the structure"),
        (0.1, 1.0, None, None, "harmful unless noisy: averaging keeps 9.1% of the structure"),
        (1.0, 1.0, 0.2, 100, "safe while noisy: up to 3 probes"),
        (1.0, 1.0, 0.05, 4, "harmful: averaging keeps 5"),
        (1.0, 1.0, 0.1, 100, "even: averaging keeps 5"),
        (0.03, 0.01, 1.0, None, "cannot tell: the interval of the share kept is 0% to 100%"),
    ],
)
def test_verdicts(
    between: float, within: float, noise: float | None, probes: int | None, verdict: str
) -> None:
    values = structured(between, within)
    if noise is None:
        assert report(values, None, [(40, 64)]).verdict == verdict
        return
    rng = np.random.default_rng(22)
    errors = noise * rng.standard_normal((9, 40 * 64))
    found = report(values + errors[0], errors[1:], [(40, 64)], num_probes=probes)
    assert found.verdict.startswith(verdict), found


def test_exact_values_with_probes_to_compare_with() -> None:
    """The noise of one of 100 probes is 4, of which averaging 32 entries removes 97%."""
    values = structured(1.0, 1.0)
    errors = 0.2 * np.random.default_rng(23).standard_normal((8, 40 * 64))
    found = report(
        values, None, [(40, 64)], probe_noise=torch.from_numpy(errors).float(), num_probes=100
    )
    assert found.explained == pytest.approx(0.5)
    assert found.noise_variance == pytest.approx(0.04 / 32, rel=0.2)
    assert found.noise_reduction == pytest.approx(32, rel=0.2)
    assert found.verdict.startswith("safe while noisy: up to 3 probes")
