"""Bars of eigenvalues hold where float32 makes more of its products than a few eps of them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hesscli
from hesscli.problem.problem import Problem

N = 48


def huge_logits(seed: int) -> tuple[nn.Module, Tensor]:
    """Logits in the hundreds, whose own rounding decides how sure the network is."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 3)
    )
    with torch.no_grad():
        model[4].weight *= 300
        model[2].weight *= 30
    return model, torch.randn(N, 8)


def far_from_zero(seed: int) -> tuple[nn.Module, Tensor]:
    """Inputs of 1000 ± 1, which a bias takes away again."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 3))
    with torch.no_grad():
        model[0].bias -= 1000 * model[0].weight.sum(1)
        model[2].weight *= 6
    return model, 1000 + torch.randn(N, 8)


def one_large_example(seed: int) -> tuple[nn.Module, Tensor]:
    """Curvature and rounding come from one example of many."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 3))
    x = 0.1 * torch.randn(N, 8)
    x[N // 3] *= 3000
    with torch.no_grad():
        model[2].weight *= 0.01
    return model, x


def ordinary(seed: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 3)), torch.randn(N, 8)


Build = Callable[[int], tuple[nn.Module, Tensor]]


def run(build: Build, seed: int) -> tuple[np.ndarray, hesscli.SpectrumResult]:
    """All eigenvalues in float64, and what is found in float32."""
    model, x = build(seed)
    y = torch.randint(0, 3, (N,))
    twin = copy.deepcopy(model).double()
    names, tensors = zip(*twin.named_parameters(), strict=True)

    def loss(*theta: Tensor) -> Tensor:
        parts = dict(zip(names, theta, strict=True))
        outputs = torch.func.functional_call(twin, parts, (x.double(),))
        return nn.functional.cross_entropy(outputs, y)

    blocks = torch.autograd.functional.hessian(loss, tensors)
    sizes = [t.numel() for t in tensors]
    rows = [
        torch.cat([b.reshape(n, -1) for b in row], 1) for n, row in zip(sizes, blocks, strict=True)
    ]
    dense = torch.cat(rows).detach()
    problem = Problem(model, "cross_entropy", TensorDataset(x, y))
    return np.linalg.eigvalsh(dense.numpy()), hesscli.spectrum(problem, steps=48, probes=1)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("build", [huge_logits, far_from_zero, one_large_example, ordinary])
def test_bars_hold_an_eigenvalue_of_the_float64_matrix(build: Build, seed: int) -> None:
    values, found = run(build, seed)
    for one in found.eigenvalues[:5]:
        nearest = np.abs(values - one.value).min()
        assert nearest <= one.residual


def test_ordinary_bars_stay_narrow() -> None:
    """Some hundred eps of float32, 1.2e-7 each, at most."""
    _, found = run(ordinary, 0)
    top = found.eigenvalues[0]
    assert top.residual <= 1e-5 * top.value


def test_float64_measures_nothing() -> None:
    model, x = ordinary(0)
    data = TensorDataset(x.double(), torch.randint(0, 3, (N,)))
    found = hesscli.spectrum(Problem(model.double(), "cross_entropy", data), steps=48, probes=1)
    top = found.eigenvalues[0]
    assert top.residual <= 1e-10 * top.value  # 48 steps reach it to a few hundred eps of float64
