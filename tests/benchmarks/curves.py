"""Errors of other libraries' estimators against the truth, by number of products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from curvlinops import hutchpp_trace, xdiag, xtrace
from pool import Pool
from torch import Tensor
from truths import Truth, by_layer

Quantity = Literal["trace", "layers", "diagonal"]
QUANTITIES: tuple[Quantity, ...] = ("trace", "layers", "diagonal")
Curves = dict[Quantity, dict[int, list[float]]]
Measures = dict[Quantity, Callable[[Tensor], float]]
MEDIAN = 0.67449
"""Median of |z| for a standard normal z."""
GRID = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
THIRDS = (3, 6, 9, 12, 18, 24, 36, 48, 72, 96, 144, 192, 288, 384)
RUNS = 64
"""Runs at each number of products, where the pool has so many."""
BOOTSTRAPS = 100


# -- means of independent products: the error after one, then again from resampled probes --------


class Signs:
    """Hutchinson's estimators, one set of signs for all batches or one for each."""

    def __init__(self, pool: Pool, truth: Truth, *, fresh: bool) -> None:
        self.pool, self.truth, self.fresh = pool, truth, fresh
        self.normal = normal(truth)

    def errors(self, quantity: Quantity) -> list[float]:
        """With all probes, then with each of many resamples of them."""
        generator = torch.Generator().manual_seed(1)
        size = self.pool.size
        samples = [torch.arange(size)]
        samples += [torch.randint(size, (size,), generator=generator) for _ in range(BOOTSTRAPS)]
        return [getattr(self, quantity)(rows) for rows in samples]

    def covariance(self, rows: Tensor) -> Tensor:
        """Of one product's estimates of the layers' traces."""
        weights, forms = self.pool.weights.double(), self.pool.forms[rows]
        if not self.fresh:
            return torch.einsum("b,pbl->lp", weights, forms).cov()
        return sum(w**2 * forms[:, b].T.cov() for b, w in enumerate(weights))

    def trace(self, rows: Tensor) -> float:
        return MEDIAN * float(self.covariance(rows).sum()) ** 0.5 / abs(self.truth.trace)

    def layers(self, rows: Tensor) -> float:
        values, vectors = torch.linalg.eigh(self.covariance(rows))
        errors = self.normal @ (vectors * values.clamp(min=0).sqrt()).T
        return typical(errors / self.truth.layers)

    def diagonal(self, rows: Tensor) -> float:
        """Root mean square: over so many entries it hardly varies."""
        pool, size = self.pool, self.pool.size
        if not self.fresh:
            scatter = self.frobenius[rows].mean() - self.truth.square
        else:
            squares = pool.squares[rows].mean(0)
            own = (pool.diagonals.square().sum(1) - squares / size) / (1 - 1 / size)
            scatter = pool.weights.double() ** 2 @ (squares - own)
        return float(scatter / self.truth.square) ** 0.5

    @property
    def frobenius(self) -> Tensor:
        """‖Hw‖², whose mean is ‖H‖²."""
        return self.pool.images.double().square().sum(1)


def each_layer(pool: Pool, truth: Truth) -> list[float]:
    """Hutchinson's estimator on each layer's block of H, after a product with each of them."""
    squares = by_layer(truth.whole.square(), pool.layer)
    blocks = pool.kept["blocks"]  # (probes, layers): ‖(Hw)_l‖² for w on layer l alone
    generator = torch.Generator().manual_seed(1)
    count, errors = len(blocks), []
    for sample in range(1 + BOOTSTRAPS):
        rows = torch.randint(count, (count,), generator=generator) if sample else slice(None)
        sigma = (2 * (blocks[rows].mean(0) - squares)).clamp(min=0).sqrt()
        errors.append(typical(normal(truth) * sigma / truth.layers))
    return errors


def normal(truth: Truth) -> Tensor:
    """Standard normal numbers for the layers in each of some thousand runs."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4000, len(truth.layers), generator=generator, dtype=torch.float64)


def typical(errors: Tensor) -> float:
    """Median over runs of the median over layers."""
    return float(errors.abs().quantile(0.5, 1).quantile(0.5))


# -- the rest: the libraries' own functions ------------------------------------------------------


def run(
    pool: Pool,
    function: Callable[..., Tensor],
    grid: tuple[int, ...],
    draws: Callable[[int], int],
    measures: Measures,
) -> Curves:
    """Errors of a function's answers at each number of products."""
    operator = pool.operator
    curves: Curves = {quantity: {} for quantity in measures}
    for products in grid:
        if products >= operator.shape[0] or draws(products) > pool.size:
            break
        answers = (function(operator, products) for _ in pool.starts(draws(products)))
        for _, answer in zip(range(RUNS), answers, strict=False):
            for quantity, measure in measures.items():
                curves[quantity].setdefault(products, []).append(measure(answer))
    return curves


def hutchpp(pool: Pool, truth: Truth) -> Curves:
    measures: Measures = {"trace": lambda answer: truth.trace_error(float(answer))}
    return run(pool, hutchpp_trace, THIRDS, lambda m: 2 * m // 3, measures)


def by_xtrace(pool: Pool, truth: Truth) -> Curves:
    measures: Measures = {"trace": lambda answer: truth.trace_error(float(answer))}
    return run(pool, xtrace, GRID, lambda m: m // 2, measures)


def by_xdiag(pool: Pool, truth: Truth) -> Curves:
    measures: Measures = {
        "trace": lambda answer: truth.trace_error(float(answer.sum())),
        "layers": lambda answer: truth.layers_error(by_layer(answer, pool.layer)),
        "diagonal": truth.diagonal_error,
    }
    return run(pool, xdiag, GRID, lambda m: m // 2, measures)
