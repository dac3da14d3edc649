"""Running a model with other parameters leaves the user's model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import hesscli
from hesscli.problem.forward import standing_in


class Registered(nn.Module):
    """One layer under two names, its parameter under a third, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.same = self.layer
        self.shared = self.layer.weight
        self.inside = nn.Sequential(nn.Tanh(), self.layer)
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * functional.linear(self.inside(self.layer(x)), self.shared)


class Looked(nn.Module):
    """A table that is looked up, and held again by the module that multiplies by it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.head = nn.ModuleDict({"table": self.table})

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.table(ids)) @ self.head["table"].weight.T


class Stepwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(3, 3, batch_first=True)
        self.again = self.cell

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.cell(x[:, None].expand(-1, 2, -1))[0])[0][:, -1]


MODELS = (Registered, Looked, Stepwise)


def inputs(model: nn.Module) -> Tensor:
    return torch.randint(5, (12,)) if isinstance(model, Looked) else torch.randn(12, 3).double()


@pytest.mark.parametrize("kind", MODELS)
def test_parameters_stand_in_wherever_they_are_held_and_come_back(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, other = kind().double(), kind().double()
    before = dict(model.named_parameters(remove_duplicate=False))
    x = inputs(model)
    with standing_in(model, dict(other.named_parameters())):
        got = model(x)
    torch.testing.assert_close(got, other(x))
    after = dict(model.named_parameters(remove_duplicate=False))
    assert before.keys() == after.keys()
    assert all(after[name] is before[name] for name in before)


def test_parameters_come_back_after_an_error() -> None:
    model = Registered()
    before = dict(model.named_parameters(remove_duplicate=False))
    others = {name: p.detach() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="own"), standing_in(model, others):
        raise RuntimeError("the user's own")
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is before[name] for name in before)


@pytest.mark.parametrize("method", ["auto", "hutchinson"])
@pytest.mark.parametrize("kind", MODELS)
def test_trace_of_a_module_that_is_registered_twice(kind: type[nn.Module], method: str) -> None:
    torch.manual_seed(1)
    model = kind().double()
    x = inputs(model)
    y = torch.randint(3, (12,))
    loss = functional.cross_entropy(model(x), y)
    tensors = list(model.parameters())
    slopes = torch.autograd.grad(loss, tensors, create_graph=True)
    truth = 0.0
    for tensor, slope in zip(tensors, slopes, strict=True):
        for index, entry in enumerate(slope.reshape(-1)):
            row = torch.autograd.grad(entry, tensor, retain_graph=True)[0]
            truth += float(row.reshape(-1)[index])
    problem = hesscli.Problem(model, "cross_entropy", TensorDataset(x, y))
    for _ in range(2):
        result = hesscli.trace(problem, method=method, probes=16)
        low, high = result.trace.interval
        centre, half = (low + high) / 2, (high - low) / 2
        assert abs(truth - centre) <= 3 * half + 1e-12 * abs(truth)
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
