"""On a CUDA device every kind of network has the CPU's matrices, and optimizers its steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from optimizing import loss_of, net
from ranks import OPTIMIZERS
from test_gpu import without_waiting
from test_modes import ACCEPTED, DIFFERENCES, Case, named
from torch import Tensor, nn

import hesscli
from hesscli.engines.lanczos import Lanczos
from hesscli.engines.mfac import GradientWindow, StaticFisher
from hesscli.problem.freezing import FrozenData
from hesscli.problem.problem import Problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Images(nn.Module):
    """Convolutions of three kinds, statistics, pooling, and a mask that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.GELU(),
            nn.Conv2d(4, 4, 3, stride=2, groups=4),
            nn.SiLU(),
            nn.MaxPool2d(2),
        )
        self.signal = nn.Conv1d(4, 2, 2)
        self.head = nn.Linear(2 * 8, 3)
        self.register_buffer("mask", (torch.arange(16) % 3 != 0) * 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.signal(self.body(x).flatten(2)))
        return self.head(x.flatten(1) * self.mask)


class Text(nn.Module):
    """A causal transformer of one block, with padding, whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(7, 4, padding_idx=0), nn.Embedding(5, 4)
        self.first, self.second = nn.LayerNorm(4), nn.LayerNorm(4)
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        count, length = x.shape
        h = self.tokens(x) + self.places(torch.arange(length, device=x.device))
        parts = self.qkv(self.first(h)).view(count, length, 3, 2, 2).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        h = h + self.out(mixed.transpose(1, 2).flatten(2))
        h = h + self.down(nn.functional.gelu(self.up(self.second(h))))
        return h @ self.tokens.weight.T


def images(device: str, dtype: torch.dtype) -> Problem:
    torch.manual_seed(3)
    model, x, y = Images().eval(), torch.randn(12, 1, 13, 13), torch.randint(3, (12,))
    return Problem(model, "cross_entropy", (x, y), device=device, dtype=dtype)


def text(device: str, dtype: torch.dtype) -> Problem:
    torch.manual_seed(4)
    model, tokens = Text(), torch.randint(7, (10, 6))
    data = tokens[:, :-1], tokens[:, 1:].where(tokens[:, 1:] > 1, -100)
    return Problem(model, "language_model", data, device=device, dtype=dtype)


def with_tanh(device: str, dtype: torch.dtype) -> Problem:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    data = torch.randn(20, 6), torch.randn(20, 4)
    return Problem(model, "mse", data, device=device, dtype=dtype)


BUILT = [images, text, with_tanh]


def case_on(case: Case, device: str, dtype: torch.dtype) -> Problem:
    torch.manual_seed(7)
    model, inputs = case.model().to(dtype), case.inputs()
    targets = torch.randint(3, (len(inputs),))
    batches = (inputs[:5], targets[:5]), (inputs[5:], targets[5:])
    data = FrozenData(batches, (5, 3), len(inputs), sliceable=True, sha256="")
    return Problem(model.to(device).train(case.train), case.loss, data)


@named(ACCEPTED)
def test_hessians_of_modules(case: Case) -> None:
    """In the mode of the CPU, and in both types."""
    truth = hesscli.Hessian(case_on(case, "cpu", torch.float64)).to_dense()
    for dtype, off in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        hessian = hesscli.Hessian(case_on(case, "cuda", dtype))
        assert hessian.mode == case.mode
        if case.mode == DIFFERENCES:
            off = 1e-5
        assert float((hessian.to_dense() - truth).norm()) <= off * float(truth.norm())


@pytest.mark.parametrize("build", BUILT)
@pytest.mark.parametrize("matrix", ["Hessian", "GaussNewton", "EmpiricalFisher"])
def test_matrices_of_networks(build: Callable[..., Problem], matrix: str) -> None:
    """Float32 to its own rounding: TF32 would be off by a thousandth."""
    make = getattr(hesscli, matrix)
    truth = make(build("cpu", torch.float64)).to_dense()
    for dtype, off in ((torch.float64, 1e-10), (torch.float32, 5e-5)):
        found = make(build("cuda", dtype)).to_dense()
        assert float((found - truth).norm()) <= off * float(truth.norm())


@pytest.mark.parametrize("build", BUILT)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_exact_numbers_of_networks(build: Callable[..., Problem], dtype: torch.dtype) -> None:
    """Within their own bars of the dense matrix in float64 on the CPU."""
    problem, twin = build("cuda", dtype), build("cpu", torch.float64)
    truth = hesscli.Hessian(twin).to_dense()
    trace = hesscli.trace(problem, rtol=1e-12).trace
    assert abs(trace.estimate - float(truth.trace())) <= trace.rounding_error + 1e-12
    split = hesscli.trace(problem, matrix="ggn", rtol=1e-12)
    assert split.status == "exact"
    gauss_newton = float(hesscli.GaussNewton(twin).to_dense().trace())
    assert abs(split.trace.estimate - gauss_newton) <= split.trace.rounding_error + 1e-12
    diagonal = hesscli.diagonal(problem, rtol=1e-12)
    found = torch.cat([torch.as_tensor(each).flatten() for each in diagonal.entries.values()])
    scale = float(truth.diagonal().abs().max())
    assert float((found - truth.diagonal()).abs().max()) <= 1e-4 * scale
    values = torch.linalg.eigvalsh(truth)
    for top in hesscli.spectrum(problem, steps=24, probes=2).eigenvalues[:1]:
        assert float((values - top.value).abs().min()) <= top.residual + 1e-10 * scale


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_of_optimizers(name: str) -> None:
    """In float64, from the same draws: as the CPU's but for rounding."""
    ends = []
    for device in ("cpu", "cuda"):
        model = net().to(device)
        optimizer = OPTIMIZERS[name](model)
        for number in range(8):
            optimizer.step(_loss_on(device, model, number))
        ends.append(torch.cat([p.detach().cpu().flatten() for p in model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in net().parameters()])
    assert float((ends[0] - start).norm()) > 1e-3
    torch.testing.assert_close(*ends, rtol=0, atol=1e-8)


def _loss_on(device: str, model: nn.Module, number: int) -> Tensor:
    class Moved(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(x.to(device)).cpu()

        def parameters(self, recurse: bool = True):  # type: ignore[no-untyped-def]
            return model.parameters()

    return loss_of(Moved(), number)


@pytest.mark.parametrize("matrix", ["Hessian", "GaussNewton", "EmpiricalFisher"])
@pytest.mark.parametrize("build", [images, text])
def test_products_do_not_wait(build: Callable[..., Problem], matrix: str) -> None:
    """For the device, once a batch's graph is there."""
    problem = build("cuda", torch.float32)
    term = next(getattr(hesscli, matrix)(problem).batches())
    block = torch.randn(3, problem.parameters.size, device="cuda")
    term.apply(block)
    with without_waiting():
        term.apply(block)


def waits(function: Callable[[], object]) -> int:
    """How often the host waits for the device meanwhile."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in told)


def test_a_lanczos_step_waits_for_its_numbers_alone() -> None:
    """Four numbers at once, and whether another pass is needed, after each of two."""
    diagonal = torch.linspace(0, 1, 70_000, dtype=torch.float64, device="cuda")
    lanczos = Lanczos(lambda v: diagonal * v, len(diagonal), seed=0, device=torch.device("cuda"))
    for _ in range(4):
        lanczos.step()
    assert waits(lanczos.step) <= 3


def test_solves_wait_no_more_for_more_columns() -> None:
    """What a solve reads back does not grow with the window's tiles."""
    found = []
    for columns in (4096, 65536):
        with GradientWindow(32, columns, device="cuda") as window:
            window.extend(torch.randn(32, columns, device="cuda"))
            fisher = StaticFisher(window, 1e-2)
            x = torch.randn(columns, dtype=torch.float64, device="cuda")
            fisher.ihvp(x)
            found.append(waits(lambda fisher=fisher, x=x: fisher.ihvp(x)))  # type: ignore[misc]
    assert found[1] <= found[0]
