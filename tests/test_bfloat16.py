"""Products in bfloat16 where it was asked for, with what that does to them in every bar."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import hesscli
from hesscli.errors import UsageError
from hesscli.ledger import FileLedger
from hesscli.operators.gauss_newton import EmpiricalFisher, GaussNewton
from hesscli.operators.hessian import Hessian
from hesscli.operators.joint import Joint
from hesscli.problem.freezing import FrozenData
from hesscli.problem.precision import doubled
from hesscli.problem.problem import Problem
from hesscli.results import Snapshot
from hesscli.vocabulary import Mode

WIDTH, CLASSES, EXAMPLES = 6, 3, 128


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class SwiGLU(nn.Module):
    """A block as language models have them: x + down(silu(gate(norm(x))) · up(norm(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = RMSNorm()
        self.gate = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, WIDTH), SwiGLU(), RMSNorm(), nn.Linear(WIDTH, CLASSES))


def problem_of(
    model: nn.Module, dtype: torch.dtype | None, rows: tuple[int, ...] = (4,)
) -> Problem:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(EXAMPLES, *rows, generator=generator)
    targets = torch.randint(CLASSES, (EXAMPLES,), generator=generator)
    data = FrozenData(((inputs, targets),), (EXAMPLES,), EXAMPLES, sliceable=True, sha256="")
    return Problem(model, "cross_entropy", data, dtype=dtype)


@pytest.fixture(scope="module")
def narrow() -> Problem:
    return problem_of(network(), torch.bfloat16)


@pytest.fixture(scope="module")
def truth() -> Tensor:
    """The dense Hessian, float64."""
    return hesscli.Hessian(problem_of(network(), torch.float64)).to_dense()


# -- the products --------------------------------------------------------------------------------


@pytest.mark.parametrize("matrix", [Hessian, GaussNewton, EmpiricalFisher])
@pytest.mark.parametrize("mode", ["double-backward", "forward-over-reverse"])
def test_products_are_off_by_less_than_two_percent(
    narrow: Problem, matrix: type[Hessian], mode: Mode
) -> None:
    """By more than float32's would be: a rounding to 8 bits is of 0.2%."""
    exact = matrix(problem_of(network(), torch.float64), mode=mode)
    vectors = torch.randn(len(exact.parameters.names), exact.shape[0], dtype=torch.float64).T
    found, wanted = matrix(narrow, mode=mode) @ vectors, exact @ vectors
    assert 1e-4 < float((found - wanted).norm() / wanted.norm()) < 0.02


def test_only_where_it_was_asked_for(narrow: Problem) -> None:
    """Weights, loss, gradient, and products in full or in float64 are not narrower."""
    plain = problem_of(network(), None)
    assert plain.autocast is None
    assert narrow.dtype == torch.float32
    assert narrow.prove().loss == plain.prove().loss
    assert torch.equal(narrow.prove().gradient, plain.prove().gradient)
    vector = torch.randn(narrow.parameters.size)
    operator = Hessian(narrow, mode="double-backward")
    assert torch.equal(operator.in_full() @ vector, Hessian(plain, mode="double-backward") @ vector)
    assert not torch.equal(operator @ vector, operator.in_full() @ vector)
    assert not torch.is_autocast_enabled("cpu")
    with doubled(narrow):
        assert narrow.autocast is None
        wide = operator @ vector.double()
    exact = Hessian(problem_of(network(), torch.float64), mode="double-backward")
    assert float((wide - exact @ vector.double()).norm()) < 1e-12 * float(wide.norm())


class Again(nn.Module):
    """Runs its part once more on the way back."""

    def __init__(self) -> None:
        super().__init__()
        self.part = SwiGLU()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(self.part, x, use_reentrant=False)
        return found


KINDS = {
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3),
            nn.BatchNorm1d(4),
            nn.SiLU(),
            nn.Conv1d(4, 4, 3, padding=1, groups=2, bias=False),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(24, CLASSES),
        ).eval(),
        (2, 8),
    ),
    "a layer norm": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, CLASSES)),
        (4,),
    ),
    "attention": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
            nn.Flatten(),
            nn.Linear(20, CLASSES),
        ),
        (5, 4),
    ),
    "checkpointing": (
        lambda: nn.Sequential(nn.Linear(4, WIDTH), Again(), nn.Linear(WIDTH, CLASSES)),
        (4,),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_layers(kind: str) -> None:
    make, rows = KINDS[kind]
    torch.manual_seed(3)
    model = make()
    found = Hessian(problem_of(model, torch.bfloat16, rows), mode="double-backward")
    exact = Hessian(problem_of(model, torch.float64, rows), mode="double-backward")
    vector = torch.randn(found.shape[0], dtype=torch.float64)
    wanted = exact @ vector
    assert 1e-4 < float((found @ vector - wanted).norm() / wanted.norm()) < 0.03


# -- the bars ------------------------------------------------------------------------------------


def test_a_trace_covers_the_truth() -> None:
    """In at least 89 of 100 runs, whose noise is no larger than their bias; so do most layers."""
    covered, layers, wide = 0, list[bool](), list[float]()
    for seed in range(5):
        model = network(seed)
        exact = hesscli.Hessian(problem_of(model, torch.float64)).to_dense().diagonal()
        problem = problem_of(model, torch.bfloat16)
        for probes in range(20):
            found = hesscli.trace(problem, probes=16, seed=probes, method="hutchinson")
            low, high = found.trace.interval
            covered += low <= float(exact.sum()) <= high
            assert found.trace.rounding_error is not None
            wide.append(found.trace.rounding_error / abs(found.trace.estimate))
            for layer, place in zip(found.layers, problem.parameters.layer_places(), strict=True):
                assert layer.interval is not None
                low, high = layer.interval
                layers.append(low <= float(exact[place].sum()) <= high)
    assert covered >= 89
    assert np.mean(layers) >= 0.89
    assert 1e-3 < np.median(wide) < 0.1


def test_a_trace_whose_noise_is_gone_keeps_its_bias(narrow: Problem, truth: Tensor) -> None:
    """All of the probes that there are fall within a bar that is mostly rounding by then."""
    found = hesscli.trace(narrow, probes=512, method="hutchinson").trace
    low, high = found.interval
    assert low <= float(truth.trace()) <= high
    assert found.rounding_error is not None
    assert found.rounding_error > 1e-3 * found.estimate


def test_batches_that_are_taken_as_one_have_the_bias_of_all(narrow: Problem) -> None:
    operator = Hessian(narrow)
    joint = Joint(operator, [narrow.indices])
    assert operator.bias() is not None
    assert joint.bias() is operator.bias()
    assert joint.in_full().bias() is None


@pytest.mark.parametrize("method", ["hutchinson", "split", "stratified"])
def test_entries_have_bars_that_hold(narrow: Problem, truth: Tensor, method: str) -> None:
    """95% of them; those that are known without probes to the digits of float32."""
    exact, held = truth.diagonal().numpy(), list[bool]()
    for seed in range(3):
        found = hesscli.diagonal(narrow, probes=64, method=method, seed=seed)
        entries, bars = (
            np.concatenate([arrays[name].ravel() for name in narrow.parameter_names])
            for arrays in (found.entries, found.stderr)
        )
        rounding = 1e-5 * np.abs(exact).max()
        held += (np.abs(entries - exact) <= 1.96 * bars + rounding).tolist()
    assert np.mean(held) >= 0.93


def test_eigenvalues_have_bars_that_hold(narrow: Problem, truth: Tensor) -> None:
    exact = torch.linalg.eigvalsh(truth).flip(0).tolist()
    for seed in range(3):
        found = hesscli.spectrum(narrow, k=3, steps=24, probes=1, seed=seed)
        assert found.status in ("converged", "budget")
        for value, wanted in zip(found.eigenvalues[:3], exact, strict=False):
            assert abs(value.value - wanted) <= value.residual
            assert value.residual > 1e-3 * exact[0]


def test_residuals_of_solves_are_the_truth(narrow: Problem, truth: Tensor) -> None:
    """To float32's digits: a certificate that is itself off by bfloat16's would be none."""
    found = hesscli.ihvp(narrow, refine=1e-2, matrix="ggn")
    matrix = GaussNewton(problem_of(network(), torch.float64)).to_dense()
    solution = np.concatenate([found.direction[name].ravel() for name in narrow.parameter_names])
    solution = torch.from_numpy(solution).double()
    right = narrow.prove().gradient
    left = matrix @ solution + found.window.damping * solution - right
    assert found.residual.operator == pytest.approx(float(left.norm() / right.norm()), rel=1e-3)


# -- what is said --------------------------------------------------------------------------------


def test_exact_is_not_claimed(narrow: Problem) -> None:
    """Not of what nothing is drawn for, nor of all the steps that Lanczos' method has."""
    torch.manual_seed(0)
    relu = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, CLASSES))
    assert hesscli.trace(problem_of(relu, None)).status == "exact"
    flat = problem_of(relu, torch.bfloat16)
    for found in (
        hesscli.trace(flat),
        hesscli.diagonal(flat),
        hesscli.spectrum(flat, k=1, steps=flat.parameters.size, probes=1),
        hesscli.trace(narrow, method="split", probes=4),
    ):
        assert found.status != "exact"
        assert found.problem.dtype == "bfloat16"
        assert "bfloat16" in found.method.note or "float32" in found.method.note


def test_float16_is_refused_with_a_cure() -> None:
    with pytest.raises(UsageError) as refused:
        problem_of(network(), torch.float16)
    assert "float16" in refused.value.what
    assert "bfloat16" in refused.value.hint


class Fixed(nn.Module):
    """Computes in float32 whatever it is asked for, by NumPy's leave."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise RuntimeError("float32 alone")
        found: Tensor = self.part(x)
        return found


def test_a_bias_that_nobody_can_measure_is_refused() -> None:
    with pytest.raises(UsageError, match="measured in float64"):
        problem_of(Fixed(), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_analysed_as_they_are_in_float32(dtype: torch.dtype) -> None:
    """Every such number is one of float32's, and the model stays what it was."""
    half = network().to(dtype)
    wide = network().to(dtype).float()
    problem = problem_of(half, None)
    assert problem.dtype == torch.float32
    assert problem.autocast is None
    assert problem.prove().loss == problem_of(wide, None).prove().loss
    assert all(parameter.dtype == dtype for parameter in half.parameters())


def test_a_run_does_not_go_on_in_another_type(narrow: Problem, tmp_path: Path) -> None:
    def ledger(typed: str | None, *, resume: bool) -> FileLedger:
        path, loaded = tmp_path / "trace.ledger", {"--dtype": typed}
        return FileLedger(path, {}, resume=resume, say=pytest.fail, loaded=loaded)

    def stop(snapshot: Snapshot) -> bool:
        return snapshot.phase == "probing" and (snapshot.done or 0) >= 4

    measure = partial(hesscli.trace, method="hutchinson", probes=8)
    with suppress(KeyboardInterrupt):  # before there was a result
        measure(narrow, observe=stop, ledger=ledger("bfloat16", resume=False))
    with pytest.raises(UsageError) as refused:
        measure(problem_of(network(), None), ledger=ledger(None, resume=True))
    assert refused.value.got.startswith("--dtype was bfloat16")
    again = measure(narrow, ledger=ledger("bfloat16", resume=True))
    assert again.trace == measure(narrow).trace
