"""What a batch × probe table of quadratic forms says of the mean, and how surely.

Student's interval is for batches that differ symmetrically. Where they are skew, its upper end
comes too short by γ (1 + 2t²) / (6√n) standard errors to first order, by which it is widened
(Johnson 1978, "Modified t tests and confidence intervals for asymmetrical populations"; Hall
1983, "Inverting an Edgeworth expansion"). Where a few batches carry much of the sum, what was
left out may hold others like them, and no width is enough: the interval is unknown.

Tails are heavy where three things come together, of which ordinary data have one at most:

- The batches are more skew than the exponential distribution, so that widening is no use.
- They are no Gamma distribution of whatever shape, close to which a sum over many independent
  examples is that have exponential tails, however few of them matter: the cube root of a Gamma
  variable is close to normal (Wilson & Hilferty 1931, "The distribution of chi-square"), and
  here it is skew by D'Agostino's test (1970, "Transformation to normality of the null
  distribution of g1").
- They are no sum over as many exponential variables as a batch has examples, by the same test of
  the cube root, wherever such a distribution may begin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

# -- Whether batches that are a sample tell how far off their mean is: skew and heavy tails --------


Array = NDArray[np.float64]

FEWEST = 8
"""Batches from which on their skewness tells anything."""
_ANY_GAMMA, _OWN_GAMMA = 2.05, 2.58
"""Normal scores that 2% and 0.5% of samples exceed: the second sees samples' own moments."""
_SKEW = 2.0
"""Skewness of the batches, that of the exponential distribution, up to which widening is enough."""


@dataclass(frozen=True)
class Tails:
    """How batches differ.

    Attributes:
        count: batches.
        skewness: of the deviations of each column ``(C,)``; 0 where there are too few batches.
        heavy: whether those of the last column, the total, have heavy tails.
        largest: the share of the total that one batch makes up, the largest there is.
    """

    count: int
    skewness: Array
    heavy: bool
    largest: float

    def widening(self, quantile: Array) -> Array:
        """How many times as wide as Student's, by his quantile, an interval has to be ``(C,)``."""
        short = np.abs(self.skewness) * (1 + 2 * quantile**2) / (6 * math.sqrt(self.count))
        return np.asarray(1 + short / quantile)


def tails_of(means: Array, share: Array, examples: float = 1.0) -> Tails:
    """How heavy the tails of the batches are.

    Args:
        means: one of each batch and column ``(B, C)``, the total in the last.
        share: weights of the batches, which sum to 1.
        examples: independent ones in a batch, on average.
    """
    count = len(means)
    estimate = share @ means
    parts = share * means[:, -1]
    largest = float(np.abs(parts).max() / abs(estimate[-1])) if estimate[-1] else 0.0
    if count < FEWEST:
        return Tails(count, np.zeros(means.shape[1]), False, largest)
    deviations = share[:, None] * (means - estimate)
    skewness = _skewness(deviations, np.abs(share[:, None] * means).max(0))
    upwards = np.sign(estimate[-1]) or 1.0
    heavy = upwards * skewness[-1] > _SKEW
    if heavy:  # so that they differ by more than rounding
        off = upwards * deviations[:, -1]
        scaled = 1 + off / (off.std() * math.sqrt(examples))
        heavy = (
            _score(np.cbrt(upwards * means[:, -1])) > _ANY_GAMMA
            and _score(np.cbrt(scaled)) > _OWN_GAMMA
        )
    return Tails(count, skewness, bool(heavy), largest)


def _skewness(values: Array, size: Array | float) -> Array:
    """Third standardised moment along the first axis; 0 where all differ by rounding of a size."""
    off = values - values.mean(0)
    square = np.square(off).mean(0)
    rounding = np.square(np.finfo(float).eps * len(values) * size)
    scale = np.where(square > rounding, square, np.inf) ** 1.5
    return np.asarray((off**3).mean(0) / scale)


def _score(values: Array) -> float:
    """D'Agostino's score of a sample's skewness, standard normal for a normal sample."""
    n = float(len(values))
    skewness = float(_skewness(values, np.abs(values).max()))
    y = skewness * math.sqrt((n + 1) * (n + 3) / (6 * (n - 2)))
    kurtosis = 3 * (n**2 + 27 * n - 70) * (n + 1) * (n + 3)
    kurtosis /= (n - 2) * (n + 5) * (n + 7) * (n + 9)
    w = math.sqrt(2 * (kurtosis - 1)) - 1
    return math.asinh(y * math.sqrt((w - 1) / 2)) / math.sqrt(0.5 * math.log(w))


# -- What a batch × probe table of quadratic forms says of the mean, and how surely ----------------
# Cell (b, p) is vᵀA_b v for probe p on batch b: ``(C,)``, one entry a layer and one for the total.
# With fresh probes (each batch its own) the table is nested, with shared ones (all batches the
# same) it is crossed; each has its own variance formula, and the wrong one is off by factors.
# Batches are random groups of examples, a share f of all there are, and weigh by their mass, so
# means over batches are ratio estimates (Cochran 1977, "Sampling techniques", chapters 2 and 6).


Sharing = Literal["fresh", "shared"]
"""Whether batches have probes of their own."""
_NOISY = 0.5
"""Share of noise in what batches differ by from which on it hides how they differ."""


@dataclass(frozen=True)
class MeanSquare:
    """An estimate of a variance of the mean, ``(C,)``, with its degrees of freedom."""

    value: Array
    freedom: Array | float


@dataclass(frozen=True)
class Table:
    """A table reduced to its mean and mean squares.

    ``root_mean_square`` is of all cells, ``probed_size`` of those that are probed. ``probe`` is
    the variance that more probes shrink, ``label`` the one that more drawn columns of the output
    Hessian shrink; ``within`` is their sum. ``between`` is the variance of the batch means, None
    for a single batch, which holds a part ``overlap`` of noise from within. ``probed`` is the
    share of the batches that has probes, and ``between_probed`` and ``overlap_probed`` are of
    what is probed alone: they matter where the rest is known of more batches.
    """

    estimate: Array
    root_mean_square: Array
    probed_size: Array
    probe: MeanSquare
    label: MeanSquare | None
    within: MeanSquare
    between: MeanSquare | None
    overlap: MeanSquare
    probed: float
    between_probed: MeanSquare | None
    overlap_probed: MeanSquare
    tails: Tails

    @property
    def data_variance(self) -> Array | None:
        """Variance that more examples shrink, without the finite-population factor."""
        if self.between is None or self.between_probed is None:
            return None
        known = self.probed * (self.between.value - self.overlap.value)
        rest = (1 - self.probed) * (self.between_probed.value - self.overlap_probed.value)
        return np.maximum(known + rest, 0.0)

    def variance(self, fraction: float) -> MeanSquare:
        """Variance of the estimate when the probed examples are a share ``fraction`` of all.

        within + (1 − f)(between − overlap). At f = 1 only noise from within is left; f = 0 is
        the variance for unseen examples. A single batch tells nothing of others: theirs is
        infinite. Where a share p of the batches is probed and the rest
        of the matrix known of all of them, the batches are a sample and the probed ones a sample
        of it (double sampling: Cochran 1977, chapter 12): the first share, p − f, has the whole's
        differences between batches, and the second, 1 − p, those of what is probed.
        """
        if fraction == 1:
            return self.within
        if self.between is None or self.between_probed is None:
            return MeanSquare(np.full_like(self.estimate, np.inf), 1.0)
        sampled = max(self.probed - fraction, 0.0)
        if self.overlap is self.within and self.probed == 1:
            parts = [(fraction, self.within), (sampled, self.between)]
        else:
            parts = [(1.0, self.within), (sampled, self.between), (-sampled, self.overlap)]
        if (second := 1 - self.probed) > 0:
            parts += [(second, self.between_probed), (-second, self.overlap_probed)]
        total = sum((c * part.value for c, part in parts), np.zeros_like(self.estimate))
        total = np.maximum(total, fraction * self.within.value)
        return MeanSquare(total, _freedom(total, [(c * m.value, m.freedom) for c, m in parts]))

    @property
    def heavy(self) -> bool:
        """Whether batches differ by heavy tails, and not by the noise of what was drawn."""
        return (
            self.between is not None
            and self.tails.heavy
            and bool(self.overlap.value[-1] <= _NOISY * self.between.value[-1])
        )

    def half_width(self, fraction: float, miss: float) -> Array:
        """Half the width of intervals that miss with probability ``miss``; infinite if unknown.

        Student's, widened by the skewness of the batches as far as these make up the variance.
        """
        variance = self.variance(fraction)
        if fraction == 1:
            return half_width(variance, miss)
        drawn = self.within.value / np.where(variance.value, variance.value, np.inf)
        return self._widened(variance, np.maximum(1 - drawn, 0.0), miss)

    def data_half_width(self, fraction: float, miss: float) -> Array:
        """The part of :meth:`half_width` that no number of probes can take away."""
        if fraction == 1:
            return np.zeros_like(self.estimate)
        freedom = 1.0 if self.between is None else self.between.freedom
        data = np.zeros_like(self.estimate) if self.data_variance is None else self.data_variance
        return self._widened(MeanSquare((1 - fraction) * data, freedom), 1.0, miss)

    def _widened(self, variance: MeanSquare, sampled: Array | float, miss: float) -> Array:
        """Half the width from a variance of which a part is from how batches differ."""
        if self.between is None or self.heavy:
            return np.full_like(self.estimate, np.inf)
        quantile = np.broadcast_to(stdtrit(variance.freedom, 1 - miss / 2), self.estimate.shape)
        widening = 1 + sampled * (self.tails.widening(quantile) - 1)
        return np.asarray(widening * half_width(variance, miss))


def reduce_table(
    cells: Sequence[Array],
    weights: Sequence[float],
    sharing: Sharing,
    added: Sequence[Array] | None = None,
    *,
    examples: float = 1.0,
) -> Table:
    """Reduce a table of quadratic forms.

    Args:
        cells: for each batch ``(P_b, C)``: at least two probes, shared ones in equal number, or
            one row that is exact.
        weights: the batches' shares of the weight mass, those with probes first.
        sharing: whether batches have probes of their own.
        added: a second table, of traces without probes: one exact row, or some drawn ones, for
            these batches and as many more as have weights.
        examples: independent ones in a batch, on average.
    """
    count = len(cells)
    share = np.asarray(weights[:count], dtype=np.float64) / np.sum(weights[:count])
    means = np.stack([cell.mean(0) for cell in cells])
    estimate, probed_size = share @ means, _root_mean_square(cells, share)
    shared = sharing == "shared" and len(cells[0]) > 1
    within = probe = _shared(cells, share) if shared else _within(cells, share)
    overlap = _interaction(cells, share) if shared and count > 1 else probe
    between_probed, overlap_probed = variance_between(means, share), overlap
    between, label = between_probed, None
    whole_means, size = means, probed_size
    if added is not None:
        whole = np.asarray(weights, dtype=np.float64) / np.sum(weights)
        traces = np.stack([cell.mean(0) for cell in added])
        estimate = estimate + whole @ traces
        size = probed_size + _root_mean_square(added, whole)
        whole_means = means + traces[:count]
        between = variance_between(whole_means, share)
        if len(added[0]) > 1:
            label = _within(added, whole)
            drawn = label if len(added) == count else _within(added[:count], share)
            within, overlap = _sum(probe, label), _sum(overlap, drawn)
            overlap = overlap if shared or drawn is not label else within
    return Table(
        estimate=estimate,
        root_mean_square=size,
        probed_size=probed_size,
        probe=probe,
        label=label,
        within=within,
        between=between,
        overlap=overlap,
        probed=float(np.sum(weights[:count]) / np.sum(weights)),
        between_probed=between_probed,
        overlap_probed=overlap_probed,
        tails=tails_of(whole_means, share, examples),
    )


def variance_between(means: Array, share: Array) -> MeanSquare | None:
    """Variance of the weighted mean of batches as they differ; None for a single one."""
    if (count := len(means)) == 1:
        return None
    residual = count * share[:, None] * (means - share @ means)
    return MeanSquare(np.square(residual).sum(0) / (count * (count - 1)), count - 1)


def _sum(one: MeanSquare, other: MeanSquare) -> MeanSquare:
    """The variance of a sum of independent estimates."""
    total = one.value + other.value
    parts = [(one.value, one.freedom), (other.value, other.freedom)]
    return MeanSquare(total, _freedom(total, parts))


def _root_mean_square(cells: Sequence[Array], share: Array) -> Array:
    return np.asarray(np.sqrt(share @ np.stack([np.square(cell).mean(0) for cell in cells])))


def half_width(variance: MeanSquare, miss: float) -> Array:
    """Student half-width of a two-sided interval that misses with probability ``miss``."""
    quantile = stdtrit(variance.freedom, 1 - miss / 2)
    return np.asarray(quantile * np.sqrt(variance.value))


def _within(cells: Sequence[Array], share: Array) -> MeanSquare:
    """Fresh probes: Σ w_b² s_b² / P_b, each batch's own variance over its own probes."""
    pairs = [(w, cell) for w, cell in zip(share, cells, strict=True) if len(cell) > 1]
    if not pairs:
        return MeanSquare(np.zeros(cells[0].shape[1]), _CERTAIN)
    parts = [(w**2 * cell.var(0, ddof=1) / len(cell), len(cell) - 1) for w, cell in pairs]
    total = np.sum([value for value, _ in parts], axis=0)
    return MeanSquare(total, _freedom(total, parts))


def _shared(cells: Sequence[Array], share: Array) -> MeanSquare:
    """Shared probes: the variance over probes of the weighted sum over batches."""
    forms = np.einsum("b,bpc->pc", share, np.stack(cells))
    return MeanSquare(forms.var(0, ddof=1) / len(forms), len(forms) - 1)


def _interaction(cells: Sequence[Array], share: Array) -> MeanSquare:
    """Shared probes: what is left of a cell after its batch's and its probe's mean."""
    table = np.stack(cells)
    batches, probes, _ = table.shape
    inner = batches * share[:, None, None] * (table - table.mean(1, keepdims=True))
    residual = inner - inner.mean(0)
    freedom = (batches - 1) * (probes - 1)
    return MeanSquare(np.square(residual).sum((0, 1)) / (freedom * batches * probes), freedom)


def _freedom(total: Array, parts: Sequence[tuple[Array, Array | float]]) -> Array:
    """Degrees of freedom of a sum of mean squares.

    Satterthwaite 1946, with Welch's correction (1947, "The generalization of Student's problem
    when several different population variances are involved") for squares that are themselves
    estimated: without it, parts of one or two degrees of freedom look far worse than they are.
    """
    noise = np.sum([np.square(value) / (freedom + 2) for value, freedom in parts], axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.square(total) / noise - 2
    return np.where(noise > 0, np.maximum(ratio, 1.0), _CERTAIN)


_CERTAIN = 1e9
"""Degrees of freedom of a variance that is zero."""
