"""Where tensors are made does not depend on torch's default device, which a user may have set."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._device import _device_constructors

import hesscli
from hesscli.optim import MFAC, AdaHessian, UpdateLog
from hesscli.vocabulary import TrainedWith

PACKAGE = Path(hesscli.__file__).parent
CONSTRUCTORS = {f"torch.{function.__name__}" for function in _device_constructors()}
X, LABELS = torch.randn(24, 5, dtype=torch.float64), torch.arange(24) % 3


def constructed(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls of what makes a tensor on the default device, where no other is named."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in CONSTRUCTORS:
            yield node


def test_every_tensor_is_made_on_a_device_that_is_named() -> None:
    places = [
        f"{path.relative_to(PACKAGE)}:{call.lineno}"
        for path in PACKAGE.rglob("*.py")
        for call in constructed(ast.parse(path.read_text(encoding="utf-8")))
        if "device" not in {keyword.arg for keyword in call.keywords}
    ]
    assert not places


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(5, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 3)
    return nn.Sequential(*layers).double()


@pytest.fixture
def model() -> Iterator[nn.Module]:
    """On the CPU, where by default tensors have no numbers."""
    made = net()
    with torch.device("meta"):  # as torch.set_default_device does
        yield made


def problem_of(model: nn.Module) -> hesscli.Problem:
    return hesscli.Problem(model, "cross_entropy", (X, LABELS), batch_size=8)


COMMANDS: dict[str, Callable[[hesscli.Problem], object]] = {
    "trace": lambda problem: hesscli.trace(problem, method="hutchinson", rtol=1.0),
    "diag": lambda problem: hesscli.diagonal(problem, method="split", rtol=1.0),
    "spectrum": hesscli.spectrum,
    "ihvp": hesscli.sensitivity,
    "symmetry": hesscli.symmetries,
    "prune": lambda problem: hesscli.prune(problem, sparsity=0.5),
    "check": lambda problem: hesscli.check(problem, symmetry=True),
    "dense": lambda problem: hesscli.EmpiricalFisher(problem).to_dense(),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_commands_make_their_tensors_where_the_model_is_or_on_the_cpu(
    model: nn.Module, command: Callable[[hesscli.Problem], object]
) -> None:
    command(problem_of(model))


@pytest.mark.parametrize("make", [torch.optim.SGD, AdaHessian, MFAC])
def test_steps_and_their_log(
    model: nn.Module, make: Callable[..., torch.optim.Optimizer], tmp_path: Path
) -> None:
    problem, optimizer = problem_of(copy.deepcopy(model)), make(model.parameters(), lr=0.01)
    with UpdateLog(model, optimizer, tmp_path / "log.safetensors"):
        for _ in range(2):
            loss = F.cross_entropy(model(X), LABELS)
            if make is torch.optim.SGD:
                loss.backward()
            optimizer.step(lambda loss=loss: loss)  # type: ignore[misc]
    torch.save(model.state_dict(), tmp_path / "late.pt")
    way = TrainedWith(lr=0.01, updates=str(tmp_path / "log.safetensors"))
    if make is torch.optim.SGD:
        result = hesscli.symmetries(problem, later=[tmp_path / "late.pt"], trained_with=way)
        assert result.drifts
