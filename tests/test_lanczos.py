"""Lanczos' method on matrices whose eigenvalues are known to the last bit.

A Hadamard matrix over 8 is orthogonal and exact, and so is H diag(λ) Hᵀ / 64 where λ are short
binary fractions: eigenvalues are prescribed, not computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard
from torch import Tensor, nn

from hesscli import Hessian, Problem
from hesscli.engines.lanczos import Lanczos
from hesscli.engines.ritz import Ritz
from hesscli.errors import UnsoundError
from hesscli.operators.dense import Dense
from hesscli.sums import rounding_of_sum

SIZE = 64
EPS = 2.0**-52
MATVEC = SIZE * EPS
"""Worst relative error of a product with a dense matrix: a sum of 64 terms an entry."""

SPECTRA = {
    "spread": np.arange(1.0, 65.0),
    "decaying": np.array([2.0 ** (20 - i // 2) + (i % 2) for i in range(SIZE)]),
    "clustered": np.repeat([1.0, 1.0 + 2.0**-20, 5.0, 5.0 + 2.0**-24], 16),
    "repeated": np.repeat([-3.0, 1.0, 2.0, 7.0], [40, 1, 20, 3]),
    "indefinite": np.arange(-32.0, 32.0),
    "outliers": np.r_[np.ones(60), -(2.0**20), 2.0**12, 2.0**20, 2.0**20],
    "tiny": np.arange(1.0, 65.0) * 2.0**-300,
    "huge": np.arange(-20.0, 44.0) * 2.0**300,
    "rank one": np.r_[3.0, np.zeros(63)],
    "negative rank one": np.r_[-3.0, np.zeros(63)],
    "identity": np.ones(64),
    "zero": np.zeros(64),
}
every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA.keys())


def with_spectrum(values: np.ndarray) -> Tensor:
    basis = hadamard(len(values)).astype(np.float64)
    return torch.from_numpy((basis * values) @ basis / len(values))


def run(matrix: Tensor, steps: int, seed: int = 0) -> Lanczos:
    lanczos = Lanczos(lambda vector: matrix @ vector, len(matrix), seed=seed)
    for _ in range(steps):
        lanczos.step()
    return lanczos


def readings(matrix: Tensor) -> Iterator[Ritz]:
    """Of one run, early and late."""
    lanczos = run(matrix, 0)
    for steps in (1, 2, 3, 5, 20, 63, 64):
        while lanczos.count < steps:
            lanczos.step()
        yield lanczos.ritz()


def residual_norms(matrix: Tensor, lanczos: Lanczos, ritz: Ritz) -> np.ndarray:
    """‖Ay − θy‖, the sums in extended precision."""
    vectors = lanczos.vectors(ritz, slice(None)).numpy().astype(np.longdouble)
    scale = float(matrix.abs().max()) or 1.0  # squares of 2**±300 fit, but with little to spare
    a, values = matrix.numpy() / scale, ritz.values / scale
    errors = vectors @ a.astype(np.longdouble) - values[:, None] * vectors
    return np.linalg.norm(errors.astype(np.float64), axis=1) * scale


def off_orthonormal(rows: Tensor) -> float:
    wide = rows.double()
    return float((wide @ wide.T - torch.eye(len(rows))).abs().max())


@every_spectrum
@pytest.mark.parametrize("seed", [0, 1])
def test_all_eigenvalues_after_as_many_steps_as_dimensions(spectrum: np.ndarray, seed: int) -> None:
    """Each as often as it is there: no ghosts, none missing. Weyl: off by ‖error of A‖ at most."""
    lanczos = run(with_spectrum(spectrum), SIZE, seed)
    assert lanczos.done
    np.testing.assert_allclose(
        lanczos.ritz().values, np.sort(spectrum), rtol=0, atol=MATVEC * np.abs(spectrum).max()
    )


@every_spectrum
def test_an_eigenvalue_lies_within_each_bar(spectrum: np.ndarray) -> None:
    for ritz in readings(with_spectrum(spectrum)):
        distances = np.abs(ritz.values[:, None] - spectrum).min(axis=1)
        assert (distances <= ritz.residuals).all(), len(distances)


@every_spectrum
def test_bars_are_the_residuals(spectrum: np.ndarray) -> None:
    """Neither shorter than what the Ritz pairs leave, nor longer by more than the rounding."""
    matrix = with_spectrum(spectrum)
    for steps in (1, 5, 20, 64):
        lanczos = run(matrix, steps)
        ritz = lanczos.ritz()
        true = residual_norms(matrix, lanczos, ritz)
        assert (true <= ritz.residuals).all()
        assert (ritz.residuals <= true + 2 * ritz.rounding).all()
        assert ritz.rounding <= 2 * MATVEC * np.abs(spectrum).max()


@every_spectrum
def test_the_basis_is_orthonormal_and_tridiagonalises(spectrum: np.ndarray) -> None:
    matrix = with_spectrum(spectrum)
    lanczos = run(matrix, SIZE)
    basis = lanczos.basis
    assert basis.shape == (SIZE, SIZE)
    assert basis.dtype == torch.float64
    assert (basis @ basis.T - torch.eye(SIZE)).abs().max() < 1e-12
    projected = basis @ matrix @ basis.T
    beside = projected - projected.tril(1).triu(-1)
    assert beside.abs().max() <= 2 * MATVEC * np.abs(spectrum).max()


@every_spectrum
def test_weights_sum_to_one(spectrum: np.ndarray) -> None:
    """Also after breakdowns, which half of the spectra have."""
    for ritz in readings(with_spectrum(spectrum)):
        assert (ritz.weights >= 0).all()
        assert abs(ritz.weights.sum() - 1) < 1e-12, len(ritz.weights)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_quadrature_is_exact_for_polynomials(steps: int) -> None:
    """k steps integrate λ^p for p < 2k: Σ w θ^p = vᵀA^p v, and no further."""
    matrix = with_spectrum(np.arange(-32.0, 32.0) / 32)
    lanczos = run(matrix, steps)
    ritz, start = lanczos.ritz(), lanczos.basis[0]
    image = start.clone()
    for power in range(2 * steps):
        # ‖A‖ is 1, so that each of the products adds an error of 64 eps at most.
        error = abs(ritz.weights @ ritz.values**power - float(start @ image))
        assert error <= 2 * steps * MATVEC, power
        image = matrix @ image
    assert abs(ritz.weights @ ritz.values ** (2 * steps) - float(start @ image)) > 1e-6


def test_quadrature_is_of_the_start_vector_alone() -> None:
    """What else there is of an eigenvalue comes after breakdowns, or after steps of rounding alone.

    vᵀ f(A) v is Σ f(λ) ‖v's part in λ's space‖², which is known, for any function. An error E of
    A turns an eigenspace by ‖E‖ / gap (Davis & Kahan), and a part changes by twice that.
    """
    spectrum = SPECTRA["repeated"]
    lanczos = run(with_spectrum(spectrum), SIZE)
    ritz = lanczos.ritz()
    parts = np.square(hadamard(SIZE) @ lanczos.basis[0].numpy()) / SIZE
    turned = 2 * MATVEC * np.abs(spectrum).max()  # the smallest gap is 1
    for value in np.unique(spectrum):
        near = np.abs(ritz.values - value) <= ritz.residuals
        assert abs(ritz.weights[near].sum() - parts[spectrum == value].sum()) <= turned, value
    for function in (np.exp, np.cos, np.abs):
        expected = parts @ function(spectrum)
        found = ritz.weights @ function(ritz.values)
        assert abs(found - expected) <= 4 * turned * np.abs(function(spectrum)).max()


def test_outliers_are_found_long_before_the_end() -> None:
    """Top and bottom after 8 of 64 steps, with bars that say so."""
    matrix = with_spectrum(SPECTRA["outliers"])
    ritz = run(matrix, 8).ritz()
    np.testing.assert_allclose(ritz.values[[0, -1]], [-(2.0**20), 2.0**20], rtol=MATVEC)
    assert (ritz.residuals[[0, -1]] <= 2 * MATVEC * 2**20).all()


def test_ritz_vectors_are_orthonormal_and_chosen_as_asked() -> None:
    matrix = with_spectrum(SPECTRA["outliers"])
    lanczos = run(matrix, 20)
    ritz = lanczos.ritz()
    lanczos.step()  # a reading stays good when the run goes on
    every = lanczos.vectors(ritz, slice(None))
    assert every.shape == (20, SIZE)
    assert (every @ every.T - torch.eye(20)).abs().max() < 1e-12
    ends = lanczos.vectors(ritz, [0, -1])
    torch.testing.assert_close(ends, every[[0, -1]], rtol=0, atol=20 * EPS)  # sums of 20 terms
    quotients = ((ends @ matrix) * ends).sum(1).numpy()
    np.testing.assert_allclose(quotients, ritz.values[[0, -1]], rtol=MATVEC)


def test_each_basis_vector_has_one_product() -> None:
    """The caller may record what it sees: products of all rows of the basis, in order, once."""
    matrix, seen, images = with_spectrum(SPECTRA["repeated"]), [], []

    def product(vector: Tensor) -> Tensor:
        seen.append(vector.clone())
        images.append(matrix @ vector)
        return images[-1]

    lanczos = Lanczos(product, SIZE, seed=0, reserve=3)
    for steps in range(SIZE + 5):
        assert lanczos.count == min(steps, SIZE)
        lanczos.step()
    assert torch.equal(torch.stack(seen), lanczos.basis)
    assert torch.equal(torch.stack(images), torch.stack([matrix @ q for q in seen]))
    assert lanczos.nbytes == 8 * SIZE * SIZE


def test_a_product_that_fails_can_be_made_again() -> None:
    matrix = with_spectrum(SPECTRA["spread"])
    calls = 0

    def product(vector: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise KeyboardInterrupt
        return matrix @ vector

    lanczos = Lanczos(product, SIZE, seed=0)
    while lanczos.count < 20:
        try:
            lanczos.step()
        except KeyboardInterrupt:
            continue
    assert calls > 20
    assert torch.equal(lanczos.basis, run(matrix, 20).basis)
    assert np.array_equal(lanczos.ritz().residuals, run(matrix, 20).ritz().residuals)


def test_the_seed_is_all_that_is_random() -> None:
    matrix = with_spectrum(SPECTRA["repeated"])
    assert torch.equal(run(matrix, 30).basis, run(matrix, 30).basis)
    assert abs(float(run(matrix, 1, seed=1).basis[0] @ run(matrix, 1, seed=2).basis[0])) < 0.5


def test_bars_hold_for_products_in_float32() -> None:
    """If they are told so: in many dimensions most of that error does not show in the basis."""
    matrix = with_spectrum(np.r_[np.arange(1021) % 3, -300.0, 400.0, 1000.0])
    single = matrix.float()
    assert torch.equal(single.double(), matrix)
    held = {}
    for dtype in (torch.float32, torch.float64):
        lanczos = Lanczos(lambda v: single @ v.float(), len(matrix), seed=1, dtype=dtype)
        for _ in range(20):
            lanczos.step()
        assert lanczos.basis.dtype == dtype
        assert off_orthonormal(lanczos.basis) < 2 * rounding_of_sum(len(matrix), dtype)
        ritz = lanczos.ritz()
        held[dtype] = (residual_norms(matrix, lanczos, ritz) <= ritz.residuals).all()
    assert held == {torch.float32: True, torch.float64: False}


def test_a_long_basis_in_float32_is_orthonormal() -> None:
    """As far as sums of 2¹⁵ products in float32 are; one of all of them is off by twice that."""
    size = 1 << 20
    values = torch.linspace(-1, 1, size)
    values[size // 3] = 1000.0
    lanczos = Lanczos(lambda v: (values * v).double(), size, seed=0, dtype=torch.float32)
    for _ in range(6):
        lanczos.step()
    assert off_orthonormal(lanczos.basis) < rounding_of_sum(1 << 15, torch.float32)
    ritz = lanczos.ritz()
    assert abs(ritz.values[-1] - 1000.0) <= ritz.residuals[-1]
    assert ritz.values[-2] <= 1.0 + ritz.residuals[-2]


@every_spectrum
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_complement_has_the_other_eigenvalues(spectrum: np.ndarray, dtype: torch.dtype) -> None:
    """Whatever vectors the run is made apart from, in two blocks: of each value one time less."""
    matrix = with_spectrum(spectrum)
    vectors = torch.from_numpy(hadamard(SIZE) / math.sqrt(SIZE)).to(dtype)
    matrix, spectrum = matrix / matrix.abs().max().clamp_min(1e-300), spectrum.copy()
    spectrum = spectrum / max(float(with_spectrum(spectrum).abs().max()), 1e-300)
    blocks = vectors[[0, 17, 63]], vectors[[5]]
    lanczos = Lanczos(lambda v: matrix @ v.double(), SIZE, seed=0, dtype=dtype, apart=blocks)
    while not lanczos.done:
        lanczos.step()
    assert off_orthonormal(torch.cat([*blocks, lanczos.basis])) < 2 * rounding_of_sum(SIZE, dtype)
    others = np.sort(np.delete(spectrum, [0, 5, 17, 63]))
    ritz = lanczos.ritz()
    assert (np.abs(ritz.values - others) <= ritz.residuals).all()


def test_bars_hold_where_products_are_not_symmetric() -> None:
    """What breaks the symmetry is seen, and told as rounding: no bar is silently too short."""
    matrix = with_spectrum(SPECTRA["spread"])
    generator = torch.Generator().manual_seed(0)
    matrix += 1e-6 * torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    lanczos = run(matrix, 60)
    ritz = lanczos.ritz()
    assert (residual_norms(matrix.T, lanczos, ritz) <= ritz.residuals).all()
    assert 1e-6 < ritz.rounding < 1e-4


@pytest.mark.parametrize("size", [1, 2, 3])
def test_small_matrices(size: int) -> None:
    matrix = torch.diag(torch.arange(size, dtype=torch.float64))
    lanczos = run(matrix, size)
    np.testing.assert_allclose(lanczos.ritz().values, np.arange(size), atol=4 * EPS * size)
    assert run(matrix, 0).ritz().values.shape == (0,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_product_that_is_not_finite_is_refused(bad: float) -> None:
    lanczos = Lanczos(lambda v: v * torch.tensor([1.0, bad, 1.0]), 3, seed=0)
    with pytest.raises(UnsoundError, match="not finite"):
        lanczos.step()
    assert lanczos.count == 0


def test_bars_hold_for_the_hessian_of_a_network() -> None:
    """Its own dense matrix, solved by LAPACK, whose error is some eps of the largest eigenvalue."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    data = [(torch.randn(8, 2).double(), torch.randn(8, 1).double())]
    hessian = Hessian(Problem(model, "mse", data))
    size = hessian.shape[0]
    dense = hessian.to_dense()
    known = np.linalg.eigvalsh((dense + dense.T).numpy() / 2)
    assert known[0] < 0
    lanczos = Lanczos(lambda v: hessian.apply(v[None])[0], size, seed=0)
    for steps in range(1, size + 1):
        lanczos.step()
        ritz = lanczos.ritz()
        distances = np.abs(ritz.values[:, None] - known).min(axis=1)
        assert (distances <= ritz.residuals + size * EPS * known[-1]).all(), steps
    np.testing.assert_allclose(ritz.values, known, rtol=0, atol=10 * size * EPS * known[-1])


def test_batches_of_an_operator_can_be_told_apart() -> None:
    """The product's caller sees each batch's own part of Qᵀ A Q, whose weighted sum it is."""
    matrices = torch.stack([with_spectrum(SPECTRA[name]) for name in ("spread", "indefinite")])
    operator = Dense.of(matrices, masses=[1.0, 3.0])
    parts: dict[int, list[Tensor]] = {0: [], 1: []}

    def product(vector: Tensor) -> Tensor:
        total = torch.zeros_like(vector)
        for term in operator.batches():
            image = term.apply(vector[None])[0]
            parts[term.index].append(image)
            total.add_(image, alpha=term.weight)
        return total

    lanczos = Lanczos(product, SIZE, seed=0)
    for _ in range(10):
        lanczos.step()
    for index, images in parts.items():
        expected = lanczos.basis @ matrices[index]
        torch.testing.assert_close(torch.stack(images), expected, rtol=0, atol=64 * MATVEC)
    assert operator.meter.products == 10
