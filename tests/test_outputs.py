"""Models of several outputs: losses of one's own get the whole, named ones what is named."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import hesscli
from hesscli.errors import InputError, UsageError
from hesscli.operators.hessian import Residual
from hesscli.problem.batches import rows
from hesscli.problem.losses import UserLoss
from hesscli.problem.outputs import HiddenOutputsError, named_output, rows_of
from hesscli.problem.problem import Problem

N, K = 20, 3
ROUNDING = 1e-12


def _draw(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


X = _draw(N, 4)
LABELS = torch.randint(K, (N,), generator=torch.Generator().manual_seed(2))


class Pair(NamedTuple):
    cls: Tensor
    reg: Tensor


@dataclass
class Data:
    cls: Tensor
    reg: Tensor


class Made(nn.Module):
    """Two heads on a tanh layer, put together in one of many ways."""

    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.a, self.b = nn.Linear(4, 5), nn.Linear(5, K), nn.Linear(5, 2)
        self.make = make
        self.double()

    def forward(self, x: Tensor) -> Any:
        hidden = self.body(x).tanh()
        return self.make(self.a(hidden), self.b(hidden))


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _both(cls: Tensor, reg: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(cls, labels) + reg.square().sum(1).exp().mean()


# What a model makes of its two heads, and the loss that reads it.
TREES: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any, Tensor], Tensor]]] = {
    "tuple": (lambda a, b: (a, b), lambda o, y: _both(o[0], o[1], y)),
    "list": (lambda a, b: [a, b], lambda o, y: _both(*o, y)),
    "dict": (lambda a, b: {"a": a, "b": b}, lambda o, y: _both(o["a"], o["b"], y)),
    "ordered": (
        lambda a, b: OrderedDict(a=a, b=b),
        lambda o, y: _both(*OrderedDict.values(o), y),
    ),
    "named tuple": (Pair, lambda o, y: _both(o.cls, o.reg, y)),
    "data class": (Data, lambda o, y: _both(o.cls, o.reg, y)),
    "namespace": (
        lambda a, b: SimpleNamespace(cls=a, reg=b),
        lambda o, y: _both(o.cls, o.reg, y),
    ),
    "nested": (
        lambda a, b: {"heads": (a, [b, None]), "scale": 2.0, "none": ()},
        lambda o, y: _both(o["heads"][0], o["heads"][1][0], y) * o["scale"] / 2,
    ),
    "with a mask and a count": (
        lambda a, b: (a, b, b > -9, torch.full((len(a),), 7)),
        lambda o, y: _both(o[0], o[1] * o[2], y) * o[3].float().mean() / 7,
    ),
    "structured": (
        lambda a, b: (a, torch.max(torch.stack([b, b - 1], 2), 2)),
        lambda o, y: _both(o[0], o[1].values, y),
    ),
}


def _truth(model: Made, vectors: Tensor) -> tuple[float, Tensor]:
    """Loss, and products with its Hessian by double backward of the objective itself."""
    hidden = model.body(X).tanh()
    loss = _both(model.a(hidden), model.b(hidden), LABELS)
    return float(loss.detach()), _products(loss, model, vectors)


def _products(loss: Tensor, model: nn.Module, vectors: Tensor) -> Tensor:
    tensors = list(model.parameters())
    parts = torch.autograd.grad(loss, tensors, create_graph=True)
    slope = torch.cat([part.reshape(-1) for part in parts])
    found = []
    for vector in vectors.T:
        second = torch.autograd.grad(slope @ vector, tensors, retain_graph=True)
        found.append(torch.cat([part.reshape(-1) for part in second]))
    return torch.stack(found, 1)


def _agree(problem: Problem, vectors: Tensor, products: Tensor) -> None:
    """The Hessian is the truth, and so is the sum of its two parts."""
    whole = hesscli.Hessian(problem) @ vectors
    split = hesscli.GaussNewton(problem) @ vectors + Residual(problem) @ vectors
    for found in (whole, split):
        torch.testing.assert_close(found, products, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("name", TREES)
def test_a_loss_of_ones_own_gets_the_whole(name: str) -> None:
    make, function = TREES[name]
    model = Made(make)
    vectors = _draw(_size(model), 2)
    loss, products = _truth(model, vectors)
    problem = Problem(model, function, [rows((X, LABELS), 0, 7), rows((X, LABELS), 7, N)])
    assert problem.prove().loss == pytest.approx(loss, rel=ROUNDING)
    assert problem.hidden_outputs is None
    assert problem.prove().warnings == ()
    _agree(problem, vectors, products)


@pytest.mark.parametrize("name", ["tuple", "nested", "with a mask and a count"])
def test_examples_have_gradients_of_their_own(name: str) -> None:
    make, function = TREES[name]
    problem = Problem(Made(make), function, [(X, LABELS)])
    found = torch.zeros(problem.parameters.size, problem.parameters.size, dtype=torch.float64)
    for i in range(N):
        loss = problem.evaluate((X[i : i + 1], LABELS[i : i + 1]))
        slope = torch.autograd.grad(loss, problem.parameters.tensors)
        flat = torch.cat([part.reshape(-1) for part in slope])
        found += flat[:, None] * flat / N
    vectors = _draw(problem.parameters.size, 2)
    products = hesscli.EmpiricalFisher(problem) @ vectors
    torch.testing.assert_close(products, found @ vectors, rtol=ROUNDING, atol=ROUNDING)
    trace = hesscli.trace(problem, matrix="empirical-fisher")
    assert trace.status == "exact"
    assert trace.trace.estimate == pytest.approx(float(found.trace()), rel=ROUNDING)


HIDDEN: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any, Tensor], Tensor]]] = {
    "a scalar beside rows": (
        lambda a, b: (a, b.square().sum(1).exp().mean()),
        lambda o, y: functional.cross_entropy(o[0], y) + o[1],
    ),
    "a matrix of weights": (
        lambda a, b: (a, b.T),
        lambda o, y: _both(o[0], o[1].T, y),
    ),
    "an array": (lambda a, b: (a, b, np.ones(2)), lambda o, y: _both(o[0], o[1], y)),
    "counts of the batch": (
        lambda a, b: (a, b, len(a)),
        lambda o, y: _both(o[0], o[1], y) * len(y) / o[2],
    ),
    "numbers too large": (
        lambda a, b: (a, b, torch.full((len(a),), 1 << 60)),
        lambda o, y: _both(o[0], o[1], y),
    ),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_is_no_rows_of_examples_has_a_hessian_alone(name: str) -> None:
    make, function = HIDDEN[name]
    model = Made(make)
    vectors = _draw(_size(model), 2)
    loss, products = _truth(model, vectors)
    problem = Problem(model, function, [(X, LABELS)])
    assert problem.hidden_outputs is not None
    assert problem.prove().loss == pytest.approx(loss, rel=ROUNDING)
    found = hesscli.Hessian(problem) @ vectors
    torch.testing.assert_close(found, products, rtol=ROUNDING, atol=ROUNDING)
    with pytest.raises(UsageError, match="needs the model's outputs"):
        hesscli.GaussNewton(problem)


def test_lengths_that_are_equal_by_chance_are_no_rows() -> None:
    """Time first: (T, N, ...) with T = N is told by half a batch."""
    timed = lambda a, b: (a, b[None].expand(N, *b.shape))  # noqa: E731
    loss = UserLoss(lambda o, y: _both(o[0], o[1].mean(0), y), "timed")
    hidden = loss.settled(Made(timed), [(X, LABELS)]).hidden
    assert hidden == f"output 1 is of shape ({N}, {N // 2}, 2) for {N // 2} examples"


def test_models_that_differentiate_on_their_way() -> None:
    """Energies and forces: the forward pass takes a gradient itself."""

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = x.detach().requires_grad_()
            energy = self.net(x)
            (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
            return {"energy": energy, "forces": -slope}

    def loss(out: dict[str, Tensor], y: Tensor) -> Tensor:
        return (out["energy"][:, 0] - y).square().mean() + out["forces"].square().sum(1).mean()

    model, y = Field(), _draw(N, seed=3)
    vectors = _draw(_size(model), 2)
    _agree(Problem(model, loss, [(X, y)]), vectors, _products(loss(model(X), y), model, vectors))


# -- named losses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "output"),
    [
        (lambda a, b: (b, a), 1),
        (lambda a, b: (b, a), -1),
        (lambda a, b: {"b": b, "a": a}, "a"),
        (lambda a, b: {"b": b, "a": (a, None)}, "a"),
        (Pair, "cls"),
        (Pair, 0),
        (Data, "cls"),
        (lambda a, b: (a, None), None),
        (lambda a, b: {"only": a, "guess": a.argmax(1)}, None),
        (lambda a, b: {"b": b, "logits": a}, None),
        (lambda a, b: SimpleNamespace(loss=b.sum(), logits=a), None),
    ],
)
def test_a_named_loss_reads_what_is_named(make: Any, output: str | int | None) -> None:
    model = Made(make)
    problem = Problem(model, "cross_entropy", [(X, LABELS)], output=output)
    expected = functional.cross_entropy(model.a(model.body(X).tanh()), LABELS)
    assert problem.prove().loss == pytest.approx(float(expected.detach()), rel=ROUNDING)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda a, b: (b, a), "output = 0"),
        (lambda a, b: {"box": b, "cls": a}, 'output = "box"'),
        (Pair, "output = 0"),
        (Data, 'output = "cls"'),
        (lambda a, b: (a, (b, b)), "output = 0"),
    ],
)
def test_several_outputs_and_none_named_is_refused(make: Any, line: str) -> None:
    with pytest.raises(InputError, match="several outputs") as caught:
        Problem(Made(make), "cross_entropy", [(X, LABELS)]).prove()
    assert line in caught.value.hint
    assert f"(N, {K})" in caught.value.got


def test_an_output_that_is_not_there() -> None:
    for output in ("logits", 5):
        with pytest.raises(InputError, match="the model has no output") as caught:
            named_output({"box": X, "cls": X}, output)
        assert "box (N, 4), cls (N, 4)" in caught.value.got
    with pytest.raises(InputError, match="no output 1") as caught:
        named_output(X, 1)
    assert "single tensor" in caught.value.got
    for wrong in (None, (), {}, "text", {"out": 1}):
        with pytest.raises(InputError, match="holds no tensor"):
            named_output(wrong)


def test_output_is_not_for_losses_of_ones_own() -> None:
    with pytest.raises(InputError, match="output is for named losses"):
        Problem(Made(Pair), TREES["named tuple"][1], [(X, LABELS)], output="cls")


def test_a_spec_names_the_output(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(
        "import torch\n"
        "class Two(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.box, self.cls = torch.nn.Linear(4, 2), torch.nn.Linear(4, 3)\n"
        "    def forward(self, x):\n"
        "        return {'box': self.box(x), 'cls': self.cls(x)}\n"
        "def data():\n"
        "    return [(torch.ones(6, 4), torch.arange(6) % 3)]\n"
    )
    torch.manual_seed(0)
    state = {"box.weight": torch.randn(2, 4), "box.bias": torch.randn(2)}
    state |= {"cls.weight": torch.randn(3, 4), "cls.bias": torch.randn(3)}
    torch.save(state, tmp_path / "model.pt")
    for line, loss in (('output = "cls"', True), ("output = 1", False)):
        spec = tmp_path / "hesscli.toml"
        spec.write_text(
            f'[model]\nfactory = "two:Two"\n{line}\n[data]\nfactory = "two:data"\n'
            '[loss]\nname = "cross_entropy"\n'
        )
        if loss:
            problem = hesscli.load(tmp_path / "model.pt", spec=spec)
            out = torch.ones(6, 4) @ state["cls.weight"].T + state["cls.bias"]
            expected = functional.cross_entropy(out, torch.arange(6) % 3)
            assert problem.prove().loss == pytest.approx(float(expected), rel=1e-6)
        else:
            with pytest.raises(InputError, match="no output 1"):
                hesscli.load(tmp_path / "model.pt", spec=spec).prove()


# -- rows ------------------------------------------------------------------------------------------


def test_rows_are_read_back_as_they_were() -> None:
    mask, count = X > 0, torch.arange(N)
    raw = {"x": X, "rest": (X[:, None, :2].float(), mask, [count]), "scale": 3}
    flat, layout = rows_of(raw, N)
    assert flat.shape == (N, 4 + 2 + 4 + 1)
    back = layout.tree(flat[3:5])
    assert torch.equal(back["x"], X[3:5])
    assert torch.equal(back["rest"][0], X[3:5, None, :2].float())
    assert torch.equal(back["rest"][1], mask[3:5])
    assert torch.equal(back["rest"][2][0], count[3:5])
    assert back["scale"] == 3
    assert raw["x"] is X, "what the model returned is left as it was"


def test_a_tree_that_holds_itself_is_hidden() -> None:
    raw: list[Any] = [X]
    raw.append(raw)
    with pytest.raises(HiddenOutputsError):
        rows_of(raw, N)
