"""On a CUDA device every command answers as on the CPU, wherever its parts come from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from program import hesscli_warm, three_lines
from torch import nn

import hesscli

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SAMPLES = Path(__file__).parents[1] / "samples"
CHECKPOINTS = ["fashion/model.pt", "text/model.safetensors", "sunspots/model.pt"]
LITTLE = {
    "check": (),
    "trace": ("--method", "hutchinson", "--probes", 4),
    "diag": ("--method", "split", "--probes", 4),
    "ihvp": ("--window", 16),
    "prune": ("--window", 16),
    "spectrum": ("--steps", 12, "--probes", 1),
    "symmetry": (),
}
Found = dict[str, Any]


def answer(command: str, checkpoint: Path, device: str, folder: Path, *more: object) -> Found:
    spec = SAMPLES / checkpoint.parent.name / "hesscli.toml"
    folder.mkdir(exist_ok=True)
    ran = hesscli_warm(
        command,
        *(checkpoint, "--spec", spec, "--device", device, "--examples", 16, "--out", "json"),
        *("--dir", folder, *LITTLE[command], *more),
        cwd=folder,
    )
    assert ran.returncode == 0, ran.stderr
    found: Found = json.loads(ran.stdout)
    for name, path in found.get("files", {}).items():
        assert (folder / path).exists(), name
    return found


def layers(found: Found, *keys: str) -> list[float]:
    values = []
    for layer in found["layers"]:
        for key in keys:
            layer = layer[key]
        values.append(layer)
    return values


def same(command: str, one: Found, other: Found) -> None:
    """Draws are the same on both: what differs is rounding, which bars are made for."""
    if command == "check":
        modes = [found["preflight"]["mode"] for found in (one, other)]
        assert modes[0] == modes[1]
        assert all(check["state"] != "failed" for check in other["preflight"]["checks"])
        assert len(one["plan"]["commands"]) == len(other["plan"]["commands"])
    elif command in ("trace", "diag"):
        traces = [found["trace"] for found in (one, other)]
        apart = abs(traces[0]["estimate"] - traces[1]["estimate"])
        assert apart <= sum(trace["rounding_error"] for trace in traces)
        scale = max(map(abs, layers(one, "estimate")))
        assert layers(one, "estimate") == pytest.approx(layers(other, "estimate"), abs=1e-4 * scale)
    elif command == "ihvp":
        assert layers(one, "saliency", "mean") == pytest.approx(
            layers(other, "saliency", "mean"), rel=1e-2
        )
        assert layers(one, "leverage") == pytest.approx(layers(other, "leverage"), rel=1e-2)
    elif command == "prune":
        assert one["sparsity"]["num_zeros"] == other["sparsity"]["num_zeros"]
        assert [m["name"] for m in one["methods"]] == [m["name"] for m in other["methods"]]
        losses = [[m["loss"] for m in found["methods"]] for found in (one, other)]
        assert losses[0] == pytest.approx(losses[1], rel=0.05)
    elif command == "spectrum":
        tops = [found["eigenvalues"][0] for found in (one, other)]
        bars = sum(top["residual"] for top in tops)
        assert abs(tops[0]["value"] - tops[1]["value"]) <= bars + 1e-9 * tops[0]["value"]
    else:
        families = [
            [(f["name"], f["layer"], f["status"], f["null_directions"]) for f in found["families"]]
            for found in (one, other)
        ]
        assert families[0] == families[1]
        assert one["flat"] == other["flat"]


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("command", LITTLE)
def test_every_command(command: str, checkpoint: str, tmp_path: Path) -> None:
    path = SAMPLES / checkpoint
    one = answer(command, path, "cpu", tmp_path / "host")
    other = answer(command, path, "cuda", tmp_path / "device")
    assert one["problem"]["manifest_sha256"] == other["problem"]["manifest_sha256"]
    assert other["problem"]["device"].startswith("cuda")
    assert other["problem"]["loss"] == pytest.approx(one["problem"]["loss"], rel=1e-4)
    same(command, one, other)


@pytest.mark.parametrize("command", ["trace", "spectrum"])
def test_blocks_that_are_run_again(command: str, tmp_path: Path) -> None:
    """There give what blocks that are kept give on the CPU."""
    path = SAMPLES / "text/model.safetensors"
    one = answer(command, path, "cpu", tmp_path / "host")
    other = answer(command, path, "cuda", tmp_path / "device", "--checkpoint-activations")
    same(command, one, other)


def test_auto_is_the_device(tmp_path: Path) -> None:
    found = answer("trace", SAMPLES / "sunspots/model.pt", "auto", tmp_path)
    assert found["problem"]["device"] == "cuda:0"
    assert found["environment"]["tf32"] is False


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    beyond = f"cuda:{torch.cuda.device_count()}"
    path = SAMPLES / "sunspots/model.pt"
    spec = "--spec", path.parent / "hesscli.toml"
    ran = hesscli_warm("trace", path, *spec, "--device", beyond, cwd=tmp_path)
    assert ran.returncode == 2
    assert three_lines(ran.stderr)[0] == "no such device"
    x, y = torch.randn(8, 3), torch.randn(8, 2)
    with pytest.raises(hesscli.errors.UsageError, match="no such device"):
        hesscli.Problem(nn.Linear(3, 2), "mse", (x, y), device=beyond)


@pytest.mark.parametrize(("saved", "read"), [("cuda", "cpu"), ("cuda", "cuda"), ("cpu", "cuda")])
def test_checkpoints_of_either(saved: str, read: str, tmp_path: Path) -> None:
    """A file of tensors of one, read on the other."""
    folder = shutil.copytree(SAMPLES / "sunspots", tmp_path / "sunspots")
    file = folder / "model.pt"
    state = torch.load(file, weights_only=True, map_location=saved)
    torch.save(state, file)
    found = answer("trace", file, read, tmp_path)
    plain = answer("trace", SAMPLES / "sunspots/model.pt", "cpu", tmp_path / "plain")
    bars = found["trace"]["rounding_error"] + plain["trace"]["rounding_error"]
    assert abs(found["trace"]["estimate"] - plain["trace"]["estimate"]) <= bars


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
        self.register_buffer("shift", torch.linspace(-1, 1, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x + self.shift)


def parts() -> tuple[Shifted, torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return Shifted().double(), torch.randn(24, 5).double(), torch.randint(3, (24,))


PLACES = [("cpu", "cpu"), ("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")]


@pytest.mark.parametrize(("model_on", "data_on"), PLACES)
@pytest.mark.parametrize("asked", ["cpu", "cuda"])
@pytest.mark.parametrize("weighted", [False, True], ids=["named", "criterion"])
def test_parts_from_either(model_on: str, data_on: str, asked: str, weighted: bool) -> None:
    """Model, examples and the loss's own tensors; the user's stay where they were."""
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    found = []
    for first, second, third in (("cpu", "cpu", "cpu"), (model_on, data_on, asked)):
        model, x, y = parts()
        model.to(first)
        loss: Any = nn.CrossEntropyLoss(weight=weights) if weighted else "cross_entropy"
        data = x.to(second), y.to(second)
        problem = hesscli.Problem(model, loss, data, device=third)
        found.append(hesscli.trace(problem, rtol=1e-12).trace.estimate)
        assert model.shift.device.type == first
        assert weights.device.type == "cpu"
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_a_buffer_left_behind() -> None:
    """It is fetched where a device is named; else the model does not run, and that is told."""
    model, x, y = parts()
    model.body.to("cuda")
    there = hesscli.Problem(model, "cross_entropy", (x, y), device="cuda")
    whole = hesscli.Problem(parts()[0], "cross_entropy", (x, y))
    found = [hesscli.trace(each, rtol=1e-12).trace.estimate for each in (there, whole)]
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    with pytest.raises(hesscli.errors.InputError, match="same device") as told:
        hesscli.Problem(model, "cross_entropy", (x, y))
    assert "device=x.device" in told.value.hint


def test_a_default_device_changes_nothing() -> None:
    """What torch.set_default_device does is this, for the process."""
    model, x, y = parts()
    usual = hesscli.Problem(model, "cross_entropy", (x, y))
    expected = hesscli.trace(usual, rtol=1e-12).trace.estimate, hesscli.symmetries(usual).flat
    model, x, y = [each.to("cuda") for each in parts()]  # type: ignore[attr-defined]
    with torch.device("cuda"):
        there = hesscli.Problem(model, "cross_entropy", (x, y))
        assert hesscli.trace(there, rtol=1e-12).trace.estimate == pytest.approx(expected[0])
        assert hesscli.symmetries(there).flat == expected[1]
        hesscli.spectrum(there)
        hesscli.sensitivity(there)
        hesscli.prune(there, sparsity=0.5)


def test_a_plan_of_memory_holds() -> None:
    """What commands take at most is within 1.3 of what was foreseen."""
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(256, 1024), nn.Tanh(), nn.Linear(1024, 512), nn.Linear(512, 8))
    data = torch.randn(512, 256), torch.randint(8, (512,))
    problem = hesscli.Problem(wide, "cross_entropy", data, device="cuda")
    planned = hesscli.check(problem, budget=10).plan.commands
    foreseen = {one.command: one.peak_bytes for one in planned}
    runs = {"trace": hesscli.trace, "diag": hesscli.diagonal}
    for command, run in runs.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run(problem, budget=10)
        assert torch.cuda.max_memory_allocated() <= 1.3 * foreseen[command]
