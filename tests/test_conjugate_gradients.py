"""Conjugate gradients on matrices whose eigenvalues are prescribed, against dense solves.

A Hadamard matrix over 8 is orthogonal and exact, and so is H diag(λ) Hᵀ / 64 where λ are short
binary fractions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard
from torch import Tensor, nn

from hesscli import Hessian, Problem
from hesscli.engines.conjugate_gradients import ConjugateGradients
from hesscli.engines.lanczos import ROUNDING
from hesscli.errors import UnsoundError

SIZE = 64
EPS = 2.0**-52
MATVEC = SIZE * EPS
"""Worst relative error of a product with a dense matrix: a sum of 64 terms an entry."""

POSITIVE = {
    "spread": np.arange(1.0, 65.0),
    "clustered": np.repeat([1.0, 1.0 + 2.0**-20, 5.0, 5.0 + 2.0**-24], 16),
    "outliers": np.r_[np.ones(60), 2.0**8, 2.0**9, 2.0**10, 2.0**10],
    "wide": np.repeat(2.0 ** np.arange(16), 4),
    "tiny": np.arange(1.0, 65.0) * 2.0**-300,
    "huge": np.arange(1.0, 65.0) * 2.0**300,
    "identity": np.ones(64),
}
every_positive = pytest.mark.parametrize("spectrum", POSITIVE.values(), ids=POSITIVE.keys())


def with_spectrum(values: np.ndarray) -> Tensor:
    basis = hadamard(len(values)).astype(np.float64)
    return torch.from_numpy((basis * values) @ basis / len(values))


def vector(size: int = SIZE, seed: int = 0) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inverse_of(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    inverse = torch.linalg.inv(matrix)
    return lambda v: inverse @ v


def solve(solver: ConjugateGradients, tolerance: float = 0.0, limit: int = 3000) -> int:
    """Step until the tolerance or the end, and say how many products that took."""
    products = 0
    while not solver.done and solver.residual > tolerance:
        solver.step()
        products += 1
        assert products < limit
    return products


def off(matrix: Tensor, y: Tensor, x: Tensor) -> float:
    """‖x − Ay‖ / ‖x‖, the sums in extended precision."""
    a, y, x = (t.numpy().astype(np.longdouble) for t in (matrix, y, x))
    return float(np.linalg.norm(x - a @ y) / np.linalg.norm(x))


# -- against dense solves ------------------------------------------------------------------------


@every_positive
@pytest.mark.parametrize("tolerance", [1e-2, 1e-6, 1e-9])
def test_the_tolerance_is_met_and_the_solution_close(
    spectrum: np.ndarray, tolerance: float
) -> None:
    """‖y − A⁻¹x‖ ≤ ‖A⁻¹‖ ‖x − Ay‖; a dense solve is off by some κ eps itself."""
    matrix, x = with_spectrum(spectrum), vector()
    solver = ConjugateGradients(lambda v: matrix @ v, x)
    solve(solver, tolerance)
    assert solver.residual <= tolerance
    rounding = MATVEC * spectrum.max() * float(solver.solution.norm() / x.norm())
    assert off(matrix, solver.solution, x) <= tolerance + rounding
    assert abs(solver.true_residual() - solver.residual) <= 0.1 * tolerance + rounding
    dense = torch.linalg.solve(matrix, x)
    allowed = (tolerance + rounding) * float(x.norm()) / spectrum.min()
    allowed += MATVEC * spectrum.max() / spectrum.min() * float(dense.norm())
    assert float((solver.solution - dense).norm()) <= allowed
    assert solver.solution.dtype == torch.float64
    assert solver.negative_curvature is None


@pytest.mark.parametrize("name", ["clustered", "outliers", "identity", "spread"])
def test_steps_are_as_many_as_distinct_eigenvalues_at_most(name: str) -> None:
    """A polynomial of that degree vanishes on all; "clustered" has two but for 2^-20 of them."""
    spectrum = POSITIVE[name]
    matrix = with_spectrum(spectrum)
    solver = ConjugateGradients(lambda v: matrix @ v, vector())
    solve(solver, 1e-5)
    assert solver.iterations <= len(np.unique(np.round(spectrum, 3)))


@pytest.mark.parametrize("preconditioned", [False, True])
def test_each_iterate_is_the_best_of_its_krylov_space(preconditioned: bool) -> None:
    """It minimises ½yᵀAy − xᵀy there, which a dense solve on a basis of that space does too."""
    matrix, x = with_spectrum(np.linspace(1.0, 8.0, SIZE)), vector()
    scales = torch.linspace(1, 3, SIZE, dtype=torch.float64)
    precondition = (lambda v: scales * v) if preconditioned else None
    solver = ConjugateGradients(lambda v: matrix @ v, x, precondition=precondition)
    krylov = torch.zeros(SIZE, 0, dtype=torch.float64)
    new = scales * x if preconditioned else x
    for steps in range(1, 9):
        new = new - krylov @ (krylov.T @ new)
        krylov = torch.cat([krylov, (new / new.norm())[:, None]], dim=1)
        solver.step()
        best = krylov @ torch.linalg.solve(krylov.T @ matrix @ krylov, krylov.T @ x)
        assert solver.residual == pytest.approx(off(matrix, best, x), rel=1e-9), steps
        torch.testing.assert_close(solver.solution, best, rtol=0, atol=1e-10 * float(best.norm()))
        image = matrix @ krylov[:, -1]
        new = scales * image if preconditioned else image


def test_errors_stay_below_chebyshevs_bound() -> None:
    """‖y − A⁻¹x‖_A ≤ 2 ((√κ − 1)/(√κ + 1))^k ‖A⁻¹x‖_A, far above rounding."""
    spectrum = np.linspace(1.0, 256.0, SIZE)
    matrix, x = with_spectrum(spectrum), vector()
    exact = torch.linalg.solve(matrix, x)
    solver = ConjugateGradients(lambda v: matrix @ v, x, start=torch.zeros(SIZE))
    rate = (16 - 1) / (16 + 1)
    whole = float(exact @ matrix @ exact) ** 0.5
    found = []
    for steps in range(1, 41):
        solver.step()
        error = solver.solution - exact
        found.append(float(error @ matrix @ error) ** 0.5)
        if solver.residual == solver.true_residual():
            assert found[-1] <= 2 * rate**steps * whole, steps
    assert found[-1] <= 2 * rate**40 * whole


def test_a_start_is_where_it_begins() -> None:
    """The exact solution is done at once; zero is no start but for a product of its own."""
    matrix, x = with_spectrum(np.repeat([1.0, 2.0, 4.0], [10, 50, 4])), vector()
    images = []

    def product(v: Tensor) -> Tensor:
        images.append(v.clone())
        return matrix @ v

    near = torch.linalg.solve(matrix, x) + 1e-3 * vector(seed=1)
    solver = ConjugateGradients(product, x, start=near)
    assert len(images) == 1
    assert solver.residual == pytest.approx(off(matrix, near, x), rel=1e-9)
    assert torch.equal(solver.solution, near)
    solve(solver, 1e-12)
    assert solver.iterations <= 4
    unit = ConjugateGradients(lambda v: v, x, start=x)
    assert unit.done
    assert unit.residual == 0


# -- preconditioners -----------------------------------------------------------------------------


@every_positive
def test_the_inverse_itself_takes_a_step_or_two(spectrum: np.ndarray) -> None:
    """The inverse is off by κ eps, 5e-10 at most; one step leaves some of that, two its square."""
    matrix, x = with_spectrum(spectrum), vector()
    solver = ConjugateGradients(lambda v: matrix @ v, x, precondition=inverse_of(matrix))
    solve(solver, 1e-10)
    assert solver.iterations <= 2


def test_a_window_that_knows_outliers_saves_their_steps() -> None:
    """λI + low rank, all but one of the outliers in it: two eigenvalues are left instead of nine.

    Before the last of its steps a solve is off by much more than rounding.
    """
    damping = 2.0**-4
    curved = 2.0 ** np.arange(8)
    matrix = with_spectrum(np.r_[curved, np.zeros(56)] + damping)
    known = with_spectrum(np.r_[0.0, curved[1:], np.zeros(56)] + damping)
    x = vector()
    alone = ConjugateGradients(lambda v: matrix @ v, x)
    helped = ConjugateGradients(lambda v: matrix @ v, x, precondition=inverse_of(known))
    for solver in alone, helped:
        solve(solver, 1e-9)
    assert helped.iterations <= 2
    assert alone.iterations >= 9  # and rounding may cost some more
    assert off(matrix, helped.solution, x) <= 2e-9


def test_a_preconditioner_may_be_rounded() -> None:
    """Asymmetric by a part in a thousand, as of a window in float32 at a small λ."""
    spectrum = np.r_[np.ones(32), 2.0 ** np.linspace(0, 8, 32)]
    matrix, x = with_spectrum(spectrum), vector()
    inverse = torch.linalg.inv(with_spectrum(spectrum * (1 + np.arange(64) % 3)))
    inverse *= 1 + 1e-3 * vector(SIZE * SIZE, 1).view(SIZE, SIZE)
    alone = ConjugateGradients(lambda v: matrix @ v, x)
    helped = ConjugateGradients(lambda v: matrix @ v, x, precondition=lambda v: inverse @ v)
    for solver in alone, helped:
        solve(solver, 1e-10)
        assert off(matrix, solver.solution, x) <= 1.1e-10
    assert helped.iterations < 0.4 * alone.iterations


def test_a_preconditioner_that_gives_nothing_ends_the_solve() -> None:
    matrix, x = with_spectrum(np.arange(1.0, 65.0)), vector()
    solver = ConjugateGradients(lambda v: matrix @ v, x, precondition=torch.zeros_like)
    solver.step()
    assert solver.done
    assert solver.negative_curvature is None
    assert solver.residual == 1


# -- matrices that are not positive --------------------------------------------------------------

INDEFINITE = {
    "half": np.arange(-32.0, 32.0) + 0.5,
    "one": np.r_[-1.0, np.arange(1.0, 64.0)],
    "slightly": np.r_[-(2.0**-20), np.ones(31), np.full(32, 3.0)],
    "negative": -np.arange(1.0, 65.0),
    "large": np.r_[np.ones(63), -(2.0**20)],
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float64) for name in INDEFINITE),
        *((name, torch.float32) for name in INDEFINITE if name != "slightly"),
    ],
)
def test_negative_curvature_is_met_and_measured(name: str, dtype: torch.dtype) -> None:
    """As it is along the direction of the last step, in extended precision.

    The smallest is within the rounding of float32, and left out there.
    """
    spectrum = INDEFINITE[name]
    matrix, x, seen = with_spectrum(spectrum).to(dtype), vector(), []

    def product(v: Tensor) -> Tensor:
        seen.append(v.clone())
        return matrix @ v.to(dtype)

    solver = ConjugateGradients(product, x, dtype=dtype)
    products = solve(solver)
    curvature = solver.negative_curvature
    assert curvature is not None
    p, a = seen[products - 1].numpy().astype(np.longdouble), matrix.numpy().astype(np.longdouble)
    allowed = SIZE * torch.finfo(dtype).eps * np.abs(spectrum).max()
    assert abs(curvature - float((p @ a @ p) / (p @ p))) <= allowed
    assert spectrum.min() - allowed <= curvature < 0
    assert solver.residual <= 1
    assert off(matrix.double(), solver.solution, x) <= solver.residual + 1e-3
    made = len(seen)
    solver.step()
    assert solver.done
    assert len(seen) == made


def test_zero_curvature_is_not_called_negative() -> None:
    """Along a null vector, in float32, rounding decides the sign of pᵀAp.

    The same run told that products are exact takes it for real: so the dtype is heeded.
    """
    found = {torch.float32: 0, torch.float64: 0}
    for seed, dtype in itertools.product(range(20), found):
        basis = torch.linalg.qr(vector(SIZE * SIZE, seed).view(SIZE, SIZE)).Q
        single = ((basis * torch.arange(SIZE)) @ basis.T).float()
        solver = ConjugateGradients(lambda v, a=single: a @ v.float(), basis[:, 0], dtype=dtype)
        solver.step()
        found[dtype] += solver.negative_curvature is not None
    assert found[torch.float32] == 0
    assert found[torch.float64] > 5


def test_a_singular_system_without_a_solution_ends() -> None:
    """The part of x in the null space is left; conjugate gradients come near it, not to it."""
    spectrum = np.r_[np.zeros(4), np.arange(1.0, 61.0)]
    matrix, x = with_spectrum(spectrum), vector()
    null = torch.from_numpy(hadamard(SIZE)[:, :4].astype(np.float64)) / 8
    least = float((null.T @ x).norm() / x.norm())
    solver = ConjugateGradients(lambda v: matrix @ v, x)
    solve(solver)
    assert least <= solver.residual <= 2 * least
    assert off(matrix, solver.solution, x) == pytest.approx(solver.residual, rel=1e-6)


# -- rounding ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spectrum",
    [np.arange(1.0, 1025.0), np.repeat(2.0 ** np.arange(0, 16), 64), np.ones(1024)],
    ids=["spread", "powers", "identity"],
)
def test_products_in_float32_are_not_lied_about(spectrum: np.ndarray) -> None:
    """It ends at the floor, ``ROUNDING`` eps ‖A‖ ‖y‖ / ‖x‖ at most, and says where that is.

    The textbook's recursion goes on falling. Ten steps after it came there, and some after the
    residuals that were computed anew, it is over, on a processor that rounds well or badly.
    """
    matrix, x = with_spectrum(spectrum), vector(1024)
    single = matrix.float()
    assert torch.equal(single.double(), matrix)
    solver = ConjugateGradients(lambda v: single @ v.float(), x, dtype=torch.float32)
    products = solve(solver)
    true, stretch = off(matrix, solver.solution, x), spectrum.max() * float(solver.solution.norm())
    assert solver.residual <= ROUNDING * 2.0**-23 * stretch / float(x.norm())
    assert abs(true - solver.residual) <= 2.0**-23 * stretch / float(x.norm())
    assert solver.residual == solver.true_residual()
    claims = textbook(lambda v: single @ v.float(), x, 1500)
    assert claims[-1] < 0.1 * true
    steps = next(k for k, claim in enumerate(claims, 1) if claim <= true)
    assert products <= 1.2 * steps + 20, "soon after it came there"
    assert products - solver.iterations <= 8 + products // 10, "few went into checks"


def textbook(product: Callable[[Tensor], Tensor], x: Tensor, steps: int) -> list[float]:
    """Relative residuals of the plain recursion (Hestenes & Stiefel 1952)."""
    r = p = x
    claims = []
    for _ in range(steps):
        image = product(p).double()
        length = (r @ r) / (p @ image)
        new = r - length * image
        claims.append(float(new.norm() / x.norm()))
        if claims[-1] < 1e-12:
            break
        p = new + (new @ new) / (r @ r) * p
        r = new
    return claims


def test_a_tolerance_far_above_rounding_costs_no_check() -> None:
    matrix, x = with_spectrum(np.arange(1.0, 1025.0)), vector(1024)
    for product, dtype in (
        (lambda v: matrix @ v, torch.float64),
        (lambda v: matrix.float() @ v.float(), torch.float32),
    ):
        solver = ConjugateGradients(product, x, dtype=dtype)
        assert solve(solver, 1e-2) == solver.iterations
        assert off(matrix, solver.solution, x) <= 1.1e-2


def test_the_best_is_kept_where_residuals_rise() -> None:
    """They do where eigenvalues differ much, and the one reported is never left behind."""
    matrix, x = with_spectrum(POSITIVE["wide"]), vector()
    solver = ConjugateGradients(lambda v: matrix @ v, x)
    reported, kept = [], 0
    for _ in range(60):
        before = solver.solution
        solver.step()
        kept += torch.equal(solver.solution, before)
        reported.append(solver.residual)
        assert off(matrix, solver.solution, x) == pytest.approx(solver.residual, rel=1e-3)
    assert reported == sorted(reported, reverse=True)
    assert 5 < kept < 55


def test_what_rounding_holds_up_ends() -> None:
    """κ is 1e9 in float64: where no residual comes down any more, the solve is over.

    That is after a hundred steps in vain and as many as there were before any doubt, here three or
    four hundred, for each time that a residual is halved. What is in doubt is within 16 eps of
    ‖A‖ ‖y‖, and is not halved much below one of them.
    """
    spectrum = np.repeat(2.0 ** np.arange(0, 32, 2), 4)
    matrix, x = with_spectrum(spectrum), vector()
    solver = ConjugateGradients(lambda v: matrix @ v, x)
    products = solve(solver)
    assert products - solver.iterations < 0.2 * products
    assert solver.residual <= ROUNDING * EPS * spectrum.max() * float(solver.solution.norm())
    assert off(matrix, solver.solution, x) == pytest.approx(solver.residual, rel=0.5)


# -- edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [None, torch.ones(SIZE)])
def test_a_right_hand_side_of_zero(start: Tensor | None) -> None:
    matrix = with_spectrum(np.arange(1.0, 65.0))
    solver = ConjugateGradients(lambda v: matrix @ v, torch.zeros(SIZE), start=start)
    assert solver.done
    solver.step()
    assert (solver.iterations, solver.residual, solver.true_residual()) == (0, 0.0, 0.0)
    assert torch.equal(solver.solution, torch.zeros(SIZE, dtype=torch.float64))


@pytest.mark.parametrize("scale", [3.0, 2.0**-40, 2.0**100])
def test_one_dimension(scale: float) -> None:
    solver = ConjugateGradients(lambda v: scale * v, torch.tensor([5.0]))
    solve(solver)
    assert solver.iterations == 1
    assert float(solver.solution) == pytest.approx(5 / scale, rel=2 * EPS)
    down = ConjugateGradients(lambda v: -scale * v, torch.tensor([5.0]))
    down.step()
    assert down.done
    assert down.negative_curvature == pytest.approx(-scale, rel=2 * EPS)


@pytest.mark.parametrize("guilty", ["product", "preconditioner"])
def test_what_fails_can_be_made_again(guilty: str) -> None:
    """The same bits as of a run in which nothing failed, checks of the residual included."""
    matrix, x, calls = with_spectrum(POSITIVE["outliers"]), vector(), 0

    def failing(function: Callable[[Tensor], Tensor], name: str) -> Callable[[Tensor], Tensor]:
        def call(v: Tensor) -> Tensor:
            nonlocal calls
            calls += name == guilty
            if name == guilty and calls % 3 == 2:
                raise KeyboardInterrupt
            return function(v)

        return call

    def product(v: Tensor) -> Tensor:
        return matrix @ v

    def precondition(v: Tensor) -> Tensor:
        return v / (2 + torch.arange(SIZE) % 3)

    smooth = ConjugateGradients(product, x, precondition=precondition)
    solver = ConjugateGradients(
        failing(product, "product"), x, precondition=failing(precondition, "preconditioner")
    )
    while not solver.done:
        before = solver.iterations, solver.residual, solver.solution
        try:
            solver.step()
        except KeyboardInterrupt:
            assert (solver.iterations, solver.residual, solver.solution) == before
            continue
        smooth.step()
        assert solver.residual == smooth.residual
        assert torch.equal(solver.solution, smooth.solution)
    assert smooth.done
    assert solver.residual < 1e-13


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    broken, x = torch.tensor([1.0, bad, 1.0]), torch.ones(3)
    solver = ConjugateGradients(lambda v: v * broken, x)
    with pytest.raises(UnsoundError, match="not finite") as error:
        solver.step()
    assert "product 1" in error.value.got
    assert solver.iterations == 0
    solver = ConjugateGradients(lambda v: v, x, precondition=lambda v: v * broken)
    with pytest.raises(UnsoundError, match="preconditioned residual 1"):
        solver.step()
    with pytest.raises(UnsoundError, match="not finite"):
        ConjugateGradients(lambda v: v * broken, x, start=x)


def test_what_is_passed_in_and_out_stays_as_it_is() -> None:
    matrix, x = with_spectrum(np.arange(1.0, 65.0)), vector()
    start = vector(seed=1)
    buffer = torch.empty_like(x)

    def reused(v: Tensor) -> Tensor:
        return torch.mv(matrix, v, out=buffer)

    solver = ConjugateGradients(reused, x, start=start, precondition=lambda v: v)
    plain = ConjugateGradients(lambda v: matrix @ v, x.clone(), start=start.clone())
    for _ in range(10):
        solver.step()
        plain.step()
        held, bits = solver.solution, solver.solution.clone()
        solver.step()
        plain.step()
        assert torch.equal(held, bits)
        assert torch.equal(solver.solution, plain.solution)
    fresh = ConjugateGradients(reused, x, start=start)
    before = start.clone()
    x.zero_()
    start.zero_()
    assert torch.equal(fresh.solution, before)
    assert solver.true_residual() == plain.true_residual() > 0


def test_the_hessian_of_a_network() -> None:
    """y against a dense solve with LAPACK, with λ above its most negative eigenvalue, and below."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    data = [(torch.randn(16, 4).double(), torch.randn(16, 1).double())]
    hessian = Hessian(Problem(model, "mse", data))
    dense = hessian.to_dense()
    dense = (dense + dense.T) / 2
    lowest, highest = torch.linalg.eigvalsh(dense)[[0, -1]].tolist()
    size, x = len(dense), vector(len(dense))
    for damping in (0.01 * highest - lowest, -lowest - 0.01 * highest):
        solver = ConjugateGradients(lambda v, λ=damping: hessian.apply(v[None])[0] + λ * v, x)
        solve(solver, 1e-6)
        damped = dense + damping * torch.eye(size)
        if damping > -lowest:
            assert off(damped, solver.solution, x) <= 1.1e-6
            error = (solver.solution - torch.linalg.solve(damped, x)).norm()
            assert float(error) <= 1.2e-6 * float(x.norm()) / (damping + lowest)
        else:
            assert solver.negative_curvature is not None
            assert damping + lowest <= solver.negative_curvature < 0
