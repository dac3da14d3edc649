"""On a CUDA device the numbers are those of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import hesscli
from hesscli.engines.lanczos import Lanczos
from hesscli.engines.mfac import GradientWindow, StaticFisher, WindowedFisher
from hesscli.results import TraceResult

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SAMPLES = Path(__file__).parents[1] / "samples"
CHECKPOINTS = ["fashion/model.pt", "text/model.safetensors", "sunspots/model.pt"]


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("matrix", ["hessian", "ggn", "empirical-fisher"])
def test_the_same_probes_give_the_same_trace(checkpoint: str, matrix: str) -> None:
    """To what the run itself says of its rounding, on both devices, and a margin of ten."""
    found = []
    for device in ("cpu", "cuda"):
        problem = hesscli.load(SAMPLES / checkpoint, device=device, examples=64)
        found.append(hesscli.trace(problem, matrix=matrix, probes=2, method="hutchinson"))
    cpu, cuda = (result.trace for result in found)
    bound = 10 * (cpu.rounding_error + cuda.rounding_error)
    assert abs(cpu.estimate - cuda.estimate) <= bound
    assert found[0].problem.manifest_sha256 == found[1].problem.manifest_sha256
    assert found[1].environment.device_name != found[0].environment.device_name


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_the_same_diagonal(checkpoint: str) -> None:
    """Exact, split and drawn: entries to half of float32's digits of the largest."""
    found = []
    for device in ("cpu", "cuda"):
        problem = hesscli.load(SAMPLES / checkpoint, device=device, examples=64)
        found.append(hesscli.diagonal(problem, probes=2))
    cpu, cuda = found
    assert cpu.method.name == cuda.method.name
    for name, entries in cpu.entries.items():
        scale = max(abs(array).max() for array in cpu.entries.values())
        assert abs(entries - cuda.entries[name]).max() < 3e-4 * scale


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_products_in_bfloat16(checkpoint: str) -> None:
    """Off by more than float32's, with a trace whose bar holds float64's.

    And by less than 25 roundings to 8 bits in a row: there and back, twice, through six layers.
    """
    load = partial(hesscli.load, SAMPLES / checkpoint, device="cuda", examples=64)
    wide, narrow = load(dtype="float64"), load(dtype="bfloat16")
    vector = torch.randn(wide.parameters.size, dtype=torch.float64, device="cuda")
    exact, found = hesscli.Hessian(wide) @ vector, hesscli.Hessian(narrow) @ vector
    assert 1e-4 < float((found - exact).norm() / exact.norm()) < 25 * 2**-8
    how = {"probes": 8, "method": "hutchinson"}
    trace, truth = hesscli.trace(narrow, **how).trace, hesscli.trace(wide, **how).trace
    assert abs(trace.estimate - truth.estimate) <= trace.rounding_error


def test_a_basis_on_the_device_is_orthonormal() -> None:
    problem = hesscli.load(SAMPLES / "sunspots/model.pt", device="cuda")
    hessian = hesscli.Hessian(problem)
    lanczos = Lanczos(
        lambda vector: hessian @ vector, problem.parameters.size, seed=0, device=problem.device
    )
    for _ in range(32):
        lanczos.step()
    overlaps = lanczos.basis @ lanczos.basis.T
    assert overlaps.device.type == "cuda"
    assert float((overlaps - torch.eye(32, device="cuda")).abs().max()) < 1e-12
    top = float(torch.linalg.eigvalsh(hessian.to_dense())[-1])
    assert abs(lanczos.ritz().values[-1] - top) < 1e-8 * top


@pytest.mark.parametrize("blocks", [None, (64,) * 8])
def test_windows_on_the_device_are_inverted(blocks: tuple[int, ...] | None) -> None:
    """Against the dense float64 inverse of the same rows, within the error that is reported."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(96, 512, generator=generator)
    x = torch.randn(512, generator=generator, dtype=torch.float64)
    damping = 1e-3
    with GradientWindow(96, 512, device="cuda") as window:
        window.extend(rows.cuda())
        fisher = StaticFisher(window, damping, blocks=blocks)
        solution, diagonal = fisher.ihvp(x.cuda()), fisher.diagonal()
        diagonal_error = fisher.diagonal_error().cpu()
        moving = WindowedFisher(window, damping)
        member = moving.member(5)
    exact = rows.double()
    matrix = exact.T @ exact / 96
    whole = torch.linalg.inv(matrix + damping * torch.eye(512, dtype=torch.float64))
    if blocks is not None:
        matrix = torch.block_diag(*(matrix[i : i + 64, i : i + 64] for i in range(0, 512, 64)))
    inverse = torch.linalg.inv(matrix + damping * torch.eye(512, dtype=torch.float64))
    expected = inverse @ x
    assert solution.vector.device.type == "cuda"
    off = float((solution.vector.cpu() - expected).norm() / expected.norm())
    assert off <= solution.error
    assert ((diagonal.cpu() - inverse.diagonal()).abs() <= diagonal_error).all()
    wanted = whole @ exact[5]
    assert float((member.vector.cpu() - wanted).norm() / wanted.norm()) <= member.error


def test_the_same_sensitivity() -> None:
    """Rows are drawn by the keyed hash: saliencies and predictions agree to rounding."""
    found = []
    for device in ("cpu", "cuda"):
        problem = hesscli.load(SAMPLES / "sunspots/model.pt", device=device)
        window = hesscli.WindowOptions(size=64)
        found.append(hesscli.sensitivity(problem, window=window, rtol=1e-12, verify=True))
    for one, other in zip(found[0].layers, found[1].layers, strict=True):
        assert one.saliency.mean == pytest.approx(other.saliency.mean, rel=1e-4)
        for a, b in zip(one.perturbations, other.perturbations, strict=True):
            assert a.quadratic == pytest.approx(b.quadratic, rel=1e-4, abs=1e-12)
            assert a.measured == pytest.approx(b.measured, rel=1e-4, abs=1e-12)


@contextmanager
def without_waiting() -> Iterator[None]:
    """Meanwhile whatever has the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_stray_synchronisation_between_probes() -> None:
    """Products of one batch after its graph is made, without the host waiting for the device."""
    problem = hesscli.load(SAMPLES / "text/model.safetensors", device="cuda", examples=32)
    term = next(hesscli.Hessian(problem).batches())
    block = torch.randn(4, problem.parameters.size, device="cuda")
    term.apply(block)
    with without_waiting():
        term.apply(block)


def wide() -> hesscli.Problem:
    """What its vectors take is activations: cuDNN would make do with less, and say nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 4096), nn.Tanh(), nn.Linear(4096, 10)).cuda()
    return hesscli.Problem(
        model, "cross_entropy", (torch.randn(4096, 64), torch.randint(10, (4096,)))
    )


def test_memory_that_runs_out_halves_the_block() -> None:
    """Of a card of which the process may have more than half a block takes, and less than one."""

    def measure(probes: int) -> TraceResult:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return hesscli.trace(
            wide(), method="hutchinson", mode="forward-over-reverse", probes=probes, budget=None
        )

    card = torch.cuda.get_device_properties(0).total_memory
    measure(16)
    half = torch.cuda.max_memory_allocated()
    whole = measure(32)
    taken = torch.cuda.max_memory_allocated()
    assert half < 0.9 * taken
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((half + taken) / 2 / card)
    try:
        halved = measure(32)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("memory ran out once" in told for told in halved.warnings)
    bound = 10 * (whole.trace.rounding_error + halved.trace.rounding_error)
    assert abs(whole.trace.estimate - halved.trace.estimate) <= bound
