"""Losses of one's own are split as named ones are: their output Hessian is autograd's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import hesscli
from hesscli.errors import UsageError
from hesscli.operators.exactness import require_output_hessian
from hesscli.problem.batches import rows
from hesscli.problem.criteria import as_loss
from hesscli.problem.losses import Loss
from hesscli.problem.named_losses import CrossEntropy, NegativeLogLikelihood
from hesscli.problem.output_hessian import Columns, columns_at
from hesscli.problem.problem import Problem

N, K = 6, 4
ROUNDING = 1e-11


def _draw(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


LABELS = torch.randint(K, (N,), generator=torch.Generator().manual_seed(2))
FLAT, GOALS, ANY = _draw(N, K), _draw(N, K, seed=3), torch.zeros(N, 1)


def _crossed(f: Tensor, y: Tensor) -> Tensor:
    """Indefinite, and with a diagonal of zeros."""
    return (f[:, 0] * f[:, 1] * (1 + y[:, 0] ** 2)).mean()


# A function, outputs, targets, and how many columns its Hessian takes.
CASES: dict[str, tuple[Callable[[Any, Any], Tensor], Tensor, Any, int]] = {
    "cross-entropy": (functional.cross_entropy, FLAT, LABELS, K - 1),
    "quartic": (lambda f, y: (f - y).pow(4).mean(), FLAT, GOALS, K),
    "grid": (lambda f, y: (f - y).cosh().mean(), _draw(N, 2, 3), _draw(N, 2, 3, seed=4), 6),
    "one number": (lambda f, y: (f - y).cosh().mean(), FLAT[:, 0], GOALS[:, 0], 1),
    "indefinite": (_crossed, FLAT, GOALS, 2),
    "of either sign": (lambda f, y: (f.sin() * y).mean(), FLAT, GOALS, 2 * K),
    "of one output": (lambda f, y: f[:, 2].exp().mean(), FLAT, GOALS, 1),
    "linear": (lambda f, y: (f * y).sum(1).mean(), FLAT, GOALS, 0),
    "targets in a dict": (
        lambda f, y: ((f - y["low"]) * (f - y["high"])).square().mean(),
        FLAT,
        {"low": GOALS, "high": GOALS + 1},
        2 * K,
    ),
}


def _user(function: Callable[[Any, Any], Tensor]) -> Loss:
    return as_loss(lambda f, y: function(f, y))


def _hessians(function: Callable[[Any, Any], Tensor], outputs: Tensor, targets: Any) -> Tensor:
    """Of each example's own loss, (N, M, M), by double backward of one at a time."""
    found = []
    for i in range(len(outputs)):
        alone = outputs[i : i + 1].clone().requires_grad_()
        value = function(alone, rows(targets, i, i + 1))
        slope = torch.autograd.grad(value, alone, create_graph=True)[0].reshape(-1)
        found.append(
            torch.stack(
                [
                    torch.autograd.grad(
                        entry, alone, retain_graph=True, allow_unused=True, materialize_grads=True
                    )[0].reshape(-1)
                    if slope.requires_grad
                    else torch.zeros_like(slope)
                    for entry in slope
                ]
            )
        )
    return torch.stack(found)


def _sum(signed: list[tuple[float, Tensor]], outputs: Tensor) -> Tensor:
    """Σ ± s sᵀ for each example."""
    total = torch.zeros(len(outputs), outputs[0].numel(), outputs[0].numel(), dtype=torch.float64)
    for sign, column in signed:
        flat = column.reshape(len(outputs), -1)
        total += sign * flat[:, :, None] * flat[:, None]
    return total


def _columns(name: str) -> Columns:
    function, outputs, targets, _ = CASES[name]
    return columns_at(_user(function), outputs, (ANY, targets))


@pytest.mark.parametrize("name", CASES)
def test_columns_make_the_hessian(name: str) -> None:
    function, outputs, targets, count = CASES[name]
    columns = _columns(name)
    assert columns.num_columns <= count
    signed = [columns.column(i) for i in range(columns.num_columns)]
    assert all(column.shape == outputs.shape for _, column in signed)
    assert [sign for sign, _ in signed] == sorted((sign for sign, _ in signed), reverse=True)
    truth = _hessians(function, outputs, targets)
    torch.testing.assert_close(_sum(signed, outputs), truth, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("name", CASES)
def test_draws_have_the_hessian_as_their_mean(name: str) -> None:
    function, outputs, targets, _ = CASES[name]
    columns, count = _columns(name), 1000
    drawn = torch.stack([_sum(columns.draw(seed), outputs) for seed in range(count)])
    spread = drawn.std(0) / math.sqrt(count)
    off = (drawn.mean(0) - _hessians(function, outputs, targets)).abs()
    sure = spread < 1e-12  # of one output, or squares of a diagonal A's
    assert not (off[sure] > 10 * ROUNDING).any()
    assert not (off[~sure] > 5.5 * spread[~sure]).any()  # 4e-8 for each of a few hundred


@pytest.mark.parametrize("name", ["cross-entropy", "grid", "indefinite", "one number"])
def test_a_batch_may_be_cut_without_changing_its_draws(name: str) -> None:
    function, outputs, targets, _ = CASES[name]
    whole = _columns(name).draw(7)
    part = columns_at(_user(function), outputs[4:], (ANY[4:], rows(targets, 4, N))).draw(7, 4)
    assert [sign for sign, _ in part] == [sign for sign, _ in whole]
    for (_, few), (_, all_) in zip(part, whole, strict=True):
        torch.testing.assert_close(few, all_[4:], rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("power", [2, 4])
def test_a_positive_diagonal_takes_one_square_a_draw(power: int) -> None:
    """As if the columns of its root had been drawn: (√a r)² and nothing else."""
    outputs, goals = _draw(N, 300), _draw(N, 300, seed=3)
    loss = _user(lambda f, y: (f - y).pow(power).mean())
    ((sign, column),) = columns_at(loss, outputs, (ANY, goals)).draw(3)
    curvature = power * (power - 1) * (outputs - goals).pow(power - 2) / 300
    assert sign == 1
    torch.testing.assert_close(column.square(), curvature, rtol=ROUNDING, atol=ROUNDING)


def test_named_losses_keep_their_factors() -> None:
    for loss, outputs in ((CrossEntropy(), FLAT), (NegativeLogLikelihood(), FLAT.log_softmax(1))):
        columns = columns_at(loss, outputs, (ANY, LABELS))
        assert columns.num_columns == K - 1
        assert columns.draw(1)[0][0] == 1


# -- of a problem ------------------------------------------------------------------------------

X = _draw(24, 3, seed=5)
GOAL = _draw(24, K, seed=6)
CLASSES = torch.randint(K, (24,), generator=torch.Generator().manual_seed(7))


def _net(hidden: nn.Module, outputs: int = K) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), hidden, nn.Linear(5, outputs)).double()


def _diagonal(model: nn.Module, function: Callable[[Any, Any], Tensor], targets: Any) -> Tensor:
    """Of the Hessian, by double backward of the objective itself."""
    tensors = list(model.parameters())
    slopes = torch.autograd.grad(function(model(X), targets), tensors, create_graph=True)
    flat = torch.cat([slope.reshape(-1) for slope in slopes])
    found = []
    for place, entry in enumerate(flat):
        parts = torch.autograd.grad(
            entry, tensors, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        found.append(torch.cat([part.reshape(-1) for part in parts])[place])
    return torch.stack(found)


class Two(nn.Module):
    """Logits, a gate and what nobody reads, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.a, self.b = nn.Linear(3, 5), nn.Linear(5, K), nn.Linear(5, 1)
        self.double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.body(x).relu()
        return {"cls": self.a(hidden), "gate": self.b(hidden), "hidden": hidden, "mask": hidden > 0}


def _gated(out: dict[str, Tensor], y: Tensor) -> Tensor:
    own = functional.cross_entropy(out["cls"], y, reduction="none")
    return (own * out["gate"][:, 0].exp() + 0.1 * out["mask"].sum(1)).mean()


WHOLE: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Any], Tensor], Any]] = {
    "quartic": (lambda: _net(nn.ReLU()), lambda f, y: (f - y).pow(4).mean(), GOAL),
    "summed": (lambda: _net(nn.ReLU()), lambda f, y: (f - y).square().sum(), GOAL),
    "indefinite": (lambda: _net(nn.ReLU()), lambda f, y: (f.sin() * y).mean(), GOAL),
    "penalised outputs": (
        lambda: _net(nn.ReLU()),
        lambda f, y: functional.cross_entropy(f, y) + 0.1 * f.square().mean(),
        CLASSES,
    ),
    "absolute": (lambda: _net(nn.ReLU()), functional.l1_loss, GOAL),
    "two outputs": (Two, _gated, CLASSES),
}


@pytest.mark.parametrize("name", WHOLE)
def test_the_diagonal_is_exact_where_the_model_is_piecewise_linear(name: str) -> None:
    make, function, targets = WHOLE[name]
    model = make()
    truth = _diagonal(model, function, targets) + 0.25
    problem = Problem(model, function, [(X, targets)], weight_decay=0.25)
    run = hesscli.diagonal(problem)
    assert run.status == "exact"
    found = torch.cat([torch.as_tensor(e).reshape(-1) for e in run.entries.values()])
    scale = float(truth.abs().max())
    torch.testing.assert_close(found, truth, rtol=ROUNDING, atol=ROUNDING * scale)


@pytest.mark.parametrize("name", ["quartic", "indefinite", "two outputs"])
def test_elsewhere_the_rest_alone_is_probed(name: str) -> None:
    _, function, targets = WHOLE[name]
    model = Two() if name == "two outputs" else _net(nn.Tanh())
    if name == "two outputs":
        model.body = nn.Sequential(nn.Linear(3, 5), nn.Tanh()).double()
    problem = Problem(model, function, [(X, targets)])
    gauss_newton = float(hesscli.GaussNewton(problem).to_dense().trace())
    whole = hesscli.trace(problem, matrix="ggn")
    assert whole.status == "exact"
    assert whole.trace.estimate == pytest.approx(gauss_newton, rel=1e-9)
    split = hesscli.trace(problem, probes=8)
    assert split.method.name == "split"
    assert split.trace.gauss_newton == pytest.approx(gauss_newton, rel=1e-9)


@pytest.mark.parametrize(
    ("function", "targets"),
    [
        (functional.cross_entropy, torch.arange(24) % 40),
        (lambda f, y: (f.roll(1, 1) * f * y).sin().mean(), _draw(24, 40, seed=8)),
    ],
    ids=["positive", "indefinite"],
)
def test_many_outputs_are_drawn(function: Callable[[Any, Any], Tensor], targets: Tensor) -> None:
    """Without bias: the mean of many draws is the truth within its own standard error."""
    model = _net(nn.ReLU(), 40)
    truth = float(_diagonal(model, function, targets).sum())
    problem = Problem(model, lambda f, y: function(f, y), [(X, targets)])
    run = hesscli.trace(problem, probes=64)
    assert run.status != "exact"
    assert "random columns" in run.method.note
    bar = run.trace.label_stderr or 0.0
    assert bar > 0
    assert abs(run.trace.estimate - truth) < 5 * bar  # 1e-5 of a t of some 60


# -- what may not be split ---------------------------------------------------------------------


class Lost(torch.autograd.Function):
    """x² whose derivative is right and counts as constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x.detach() * slope


class Once(Lost):
    """x² that can be differentiated once."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * slope


def _refused(function: Callable[[Any, Any], Tensor], model: nn.Module) -> UsageError:
    problem = Problem(model, function, [(X, GOAL)])
    with pytest.raises(UsageError) as caught:
        require_output_hessian(problem)
    run = hesscli.trace(problem, probes=2)
    assert run.method.name == "hutchinson"
    return caught.value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrong_second_derivatives_of_a_loss_are_found(dtype: torch.dtype) -> None:
    model = _net(nn.ReLU()).to(dtype)
    problem = Problem(model, lambda f, y: Lost.apply(f - y).mean(), [(X.to(dtype), GOAL.to(dtype))])
    with pytest.raises(UsageError, match="is not known") as caught:
        require_output_hessian(problem)
    assert "second derivative" in caught.value.got


def test_missing_second_derivatives_of_a_loss_are_found() -> None:
    problem = Problem(_net(nn.ReLU()), lambda f, y: Once.apply(f - y).mean(), [(X, GOAL)])
    with pytest.raises(UsageError, match="is not known"):
        require_output_hessian(problem)


def test_losses_that_read_parameters_otherwise_are_probed() -> None:
    model = _net(nn.ReLU())
    error = _refused(lambda f, y: (f - y).square().mean() + model[0].weight.square().sum(), model)
    assert "reads the model's parameters" in error.got


def test_rows_that_are_no_examples_are_probed() -> None:
    """Outputs by class, and their examples second."""

    class Turned(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).T

    error = _refused(lambda f, y: (f.T - y).pow(4).mean(), Turned(*_net(nn.ReLU())))
    assert "one row" in error.what


def test_good_losses_of_narrow_domain_are_not_refused() -> None:
    """Probabilities near the ends of their range, logarithms, kinks, and float32."""
    ends = nn.Sequential(_net(nn.ReLU()), nn.Softmax(1)).double()
    with torch.no_grad():
        ends[0][2].weight *= 30
    hard = (GOAL > 0).double()
    for dtype in (torch.float32, torch.float64):
        for model, function, goal in (
            (ends, functional.binary_cross_entropy, hard),
            (ends, lambda f, y: -(y * f.clamp_min(1e-30).log()).mean(), hard),
            (_net(nn.ReLU()), functional.smooth_l1_loss, GOAL),
            (_net(nn.ReLU()), lambda f, y: (1 - f * y).relu().square().mean(), GOAL),
        ):
            loss = lambda f, y, g=function: g(f, y)  # noqa: E731
            data = [(X.to(dtype), goal.to(dtype))]
            require_output_hessian(Problem(model.to(dtype), loss, data))
