"""Claims that diag H = diag G: never false, and made where true."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

import hesscli
from hesscli import GaussNewton, Hessian
from hesscli.operators.base import Operator
from hesscli.operators.exactness import exact_parameters, within_parameters
from hesscli.operators.hessian import Residual
from hesscli.operators.linearity import bends
from hesscli.problem.freezing import FrozenData
from hesscli.problem.losses import StepLoss
from hesscli.problem.problem import Problem

ROUNDING = 1e-12
"""Of an entry of H − G relative to the largest of diag H, in float64."""
CURVED = 1e-7
"""The same where it is truly not zero: the smallest in the table is above 1e-5."""


def problem_of(model: nn.Module, inputs: Tensor, loss: Any = "mse", targets: Any = None) -> Problem:
    """One batch of all inputs; random targets for a mean of squares."""
    if targets is None:
        with torch.no_grad():
            targets = torch.randn_like(outputs_of(model, inputs))
    data = FrozenData(((inputs, targets),), (len(inputs),), len(inputs), True, "by hand")
    return Problem(model, loss, data)


def outputs_of(model: nn.Module, inputs: Tensor) -> Tensor:
    outputs = model(inputs)
    return outputs if isinstance(outputs, Tensor) else outputs[0]


class Made(nn.Module):
    """Modules by name, and a function of them and of x as the forward pass."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


class Symmetric(nn.Module):
    """A parametrization that is linear."""

    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).T


class Squared(nn.Module):
    """A parametrization that is not."""

    def forward(self, w: Tensor) -> Tensor:
        return w.square()


class Surrogate(torch.autograd.Function):
    """A step whose derivative is made up: by its values it would be piecewise constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return slopes[0] / (1 + x.square())


def linear(inputs: int = 3, outputs: int = 3) -> nn.Linear:
    return nn.Linear(inputs, outputs)


def chain(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules)


def tied(middle: nn.Module) -> nn.Sequential:
    net = chain(linear(), middle, linear(), nn.ReLU(), linear())
    net[2].weight = net[0].weight
    return net


def spectral() -> nn.Module:
    return parametrizations.spectral_norm(linear())


def parametrized(how: nn.Module) -> nn.Module:
    layer = linear()
    parametrize.register_parametrization(layer, "weight", how)
    return layer


def convolutional(norm: nn.Module) -> nn.Module:
    return chain(
        nn.Conv2d(1, 3, 3, bias=False), norm, nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(3, 2, 2), nn.LeakyReLU(), nn.Flatten(), linear(2, 2),
    )  # fmt: skip


def attention() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        scores = m.query(x) @ m.key(x).transpose(-2, -1)
        return m.head(m.mix(scores.softmax(-1) @ m.value(x)).relu())

    return Made(forward, **{n: linear() for n in ("query", "key", "value", "mix", "head")})


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
    return chain(linear(3, 4), layer, linear(4, 2))


def assign(m: Any, x: Tensor) -> Tensor:
    y = torch.zeros(len(x), 6, dtype=x.dtype)
    y[:, :3] = m.first(x)
    y[:, 3:] = functional.relu(m.second(x))
    return m.head(y)


def write_curve(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    y[:, :2].tanh_()
    return m.head(y.relu())


def write_scale(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    y[:, :2].mul_(m.scale)
    y[:, 1:] += x[:, 1:]
    y.view(-1).relu_()
    return m.head(y)


def write_product(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    y[:, :2].mul_(m.scale)
    y[:, 1:].mul_(y[:, 1:].sum(1, keepdim=True))
    return m.head(y)


def write_through_a_view(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    part = y.view(-1)[1:]  # the base is read again after it is written to
    part.sigmoid_()
    return m.head(y)


ALL, NONE = "all", ""
IMAGES, ROWS, SEQUENCES = (5, 1, 7, 7), (5, 3), (5, 4, 3)

# A network, the shape of its inputs, what is claimed, and what is not claimed though it is zero.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, str]] = {
    # piecewise linear throughout
    "linear": (linear, ROWS, ALL, NONE),
    "relu": (lambda: chain(linear(), nn.ReLU(), linear(), nn.ReLU(), linear()), ROWS, ALL, NONE),
    "piecewise": (
        lambda: chain(linear(), nn.Hardtanh(), linear(), nn.ReLU6(), linear(), nn.PReLU(), linear(),
                      nn.Hardshrink(0.1), linear(), nn.Threshold(0.1, 0.2), linear()),
        ROWS, ALL, NONE,
    ),
    "conv": (lambda: convolutional(nn.Identity()), IMAGES, ALL, NONE),
    "batch norm, evaluated": (
        lambda: convolutional(nn.BatchNorm2d(3)).eval(), IMAGES, ALL, NONE,
    ),
    "batch norm, training": (
        lambda: convolutional(nn.BatchNorm2d(3)), IMAGES,
        "1.weight 1.bias 4.weight 4.bias 7.weight 7.bias", NONE,
    ),
    "residual": (
        lambda: Made(lambda m, x: m.c(functional.relu(m.b(functional.relu(m.a(x))) + x)),
                     a=linear(), b=linear(), c=linear()),
        ROWS, ALL, NONE,
    ),
    "einsum, max, abs, cat, where": (
        lambda: Made(
            lambda m, x: torch.cat([
                torch.einsum("oi,ni->no", m.a, x).abs(),
                m.b(x).amax(1, keepdim=True),
                torch.where(x > 0, m.b(x), -m.c(x)).clamp(max=0.5),
            ], 1),
            a=torch.randn(2, 3), b=linear(), c=linear()),
        ROWS, ALL, NONE,
    ),
    "embedding": (lambda: chain(nn.Embedding(5, 3), nn.ReLU(), linear()), (5,), ALL, NONE),
    "functional weights": (
        lambda: Made(lambda m, x: functional.linear(functional.linear(x, m.a).relu(), m.b[:2] / 2),
                     a=torch.randn(3, 3), b=torch.randn(3, 3)),
        ROWS, ALL, NONE,
    ),
    "in place": (
        lambda: chain(linear(), nn.ReLU(inplace=True), linear(), nn.LeakyReLU(inplace=True),
                      linear()),
        SEQUENCES, ALL, NONE,
    ),
    "assigned": (
        lambda: Made(assign, first=linear(), second=linear(), head=linear(6, 2)), ROWS, ALL, NONE,
    ),
    "linear parametrization": (
        lambda: chain(parametrized(Symmetric()), nn.ReLU(), linear()), ROWS, ALL, NONE,
    ),
    # curved activations
    "gelu": (lambda: chain(linear(), nn.GELU(), linear()), ROWS, "2.weight 2.bias", NONE),
    "silu": (lambda: chain(linear(), nn.SiLU(), linear()), ROWS, "2.weight 2.bias", NONE),
    "tanh": (lambda: chain(linear(), nn.Tanh(), linear()), ROWS, "2.weight 2.bias", NONE),
    "one gelu in a relu net": (
        lambda: chain(linear(3, 9), nn.ReLU(), linear(9), nn.GELU(), linear(3, 9), nn.ReLU(),
                      linear(9)),
        ROWS, "4.weight 4.bias 6.weight 6.bias", NONE,
    ),
    "square": (
        lambda: Made(lambda m, x: m.b(m.a(x).relu() ** 2), a=linear(), b=linear()),
        ROWS, "b.weight b.bias", NONE,
    ),
    "log-softmax": (lambda: chain(linear(), nn.LogSoftmax(1)), ROWS, NONE, NONE),
    "surrogate gradient": (
        lambda: Made(lambda m, x: m.b(Surrogate.apply(m.a(x))), a=linear(), b=linear()),
        ROWS, "b.weight b.bias", NONE,
    ),
    "in place, curved": (
        lambda: Made(write_curve, first=linear(), head=linear()),
        ROWS, "head.weight head.bias", NONE,
    ),
    "in place, through a view": (
        lambda: Made(write_through_a_view, first=linear(), head=linear()),
        ROWS, "head.weight head.bias", NONE,
    ),
    "in place, scaled": (
        lambda: Made(write_scale, first=linear(), scale=torch.randn(2), head=linear()),
        ROWS, ALL, NONE,
    ),
    "in place, product": (
        lambda: Made(write_product, first=linear(), scale=torch.randn(2), head=linear()),
        ROWS, "head.weight head.bias", NONE,
    ),
    # products of paths
    "product of two paths": (
        lambda: Made(lambda m, x: m.b(m.a(x) * m.a(x).relu()), a=linear(), b=linear()),
        ROWS, "b.weight b.bias", NONE,
    ),
    "gate": (
        lambda: Made(lambda m, x: m.b(x) * m.a(x).relu(), a=linear(), b=linear()),
        ROWS, ALL, NONE,
    ),
    "f = (a² − b²) x": (
        lambda: Made(lambda m, x: (m.a[0] ** 2 - m.a[1] ** 2) * x, a=torch.randn(2)),
        ROWS, NONE, NONE,
    ),
    "entries of one tensor": (
        lambda: Made(lambda m, x: m.a[0] * m.a[1] * x, a=torch.randn(2)), ROWS, NONE, "a",
    ),
    "quotient": (
        lambda: Made(lambda m, x: m.a(x) / (m.b(x).abs() + 1), a=linear(), b=linear()),
        ROWS, "a.weight a.bias", NONE,
    ),
    "tied": (lambda: tied(nn.ReLU()), ROWS, "0.bias 2.bias 4.weight 4.bias", NONE),
    "tied, curved between": (lambda: tied(nn.Tanh()), ROWS, "2.bias 4.weight 4.bias", NONE),
    "called twice": (
        lambda: Made(lambda m, x: m.b(m.a(m.a(x).relu())), a=linear(), b=linear()),
        ROWS, "a.bias b.weight b.bias", NONE,
    ),
    "called twice, side by side": (
        lambda: Made(lambda m, x: m.b(m.a(x).relu() + m.a(x * x)), a=linear(), b=linear()),
        ROWS, ALL, NONE,
    ),
    "weight used again": (
        lambda: Made(lambda m, x: functional.linear(m.a(x), m.a.weight.T), a=linear()),
        ROWS, "a.bias", NONE,
    ),
    # parametrizations
    "weight norm": (
        lambda: chain(parametrizations.weight_norm(linear()), nn.ReLU(), linear()), ROWS,
        "0.bias 0.parametrizations.weight.original0 2.weight 2.bias", NONE,
    ),
    "spectral norm": (
        lambda: chain(spectral(), nn.ReLU(), linear()).eval(), ROWS, "0.bias 2.weight 2.bias", NONE,
    ),
    "curved parametrization": (
        lambda: chain(parametrized(Squared()), nn.ReLU(), linear()), ROWS,
        "0.bias 2.weight 2.bias", NONE,
    ),
    # norms and attention
    "layer norm": (
        lambda: chain(linear(), nn.LayerNorm(3), nn.ReLU(), linear()), ROWS,
        "1.weight 1.bias 3.weight 3.bias", NONE,
    ),
    "layer norm before a curve": (
        lambda: chain(linear(), nn.LayerNorm(3), nn.SiLU(), linear()), ROWS,
        "3.weight 3.bias", NONE,
    ),
    "group norm": (
        lambda: chain(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(),
                      linear(100, 1)),
        IMAGES, "1.weight 1.bias 4.weight 4.bias", NONE,
    ),
    "rms norm": (
        lambda: chain(linear(), nn.RMSNorm(3), linear()), ROWS, "1.weight 2.weight 2.bias", NONE,
    ),
    "attention": (
        attention, SEQUENCES,
        "value.weight value.bias mix.weight mix.bias head.weight head.bias", "key.bias",
    ),
    "transformer": (
        transformer, SEQUENCES, "1.norm2.weight 1.norm2.bias 2.weight 2.bias", NONE,
    ),
    "recurrent": (
        lambda: Made(lambda m, x: m.head(m.cell(x)[0].relu()), cell=nn.GRU(3, 2), head=linear(2)),
        SEQUENCES, "head.weight head.bias", NONE,
    ),
}  # fmt: skip


def by_double_backward(problem: Problem, matrix: type[Operator]) -> Tensor:
    """The diagonal that autograd makes, be it that of the loss or not: claims are about that."""
    operator = matrix(problem, mode="double-backward")
    identity = torch.eye(operator.shape[0], dtype=torch.float64)
    parts = [batch.weight * operator.live(batch)(identity) for batch in problem.batches()]
    return torch.stack(parts).sum(0).diagonal()


@pytest.mark.parametrize("name", CASES)
def test_claims_against_dense_diagonals(name: str) -> None:
    build, shape, expected, unsure = CASES[name]
    torch.manual_seed(0)
    model = build().double()
    torch.manual_seed(1)
    inputs = torch.randn(shape, dtype=torch.float64) if len(shape) > 1 else torch.arange(5)
    problem = problem_of(model, inputs)
    claims = {claim.name: claim for claim in exact_parameters(problem)}
    exact = {name for name, claim in claims.items() if claim.exact}
    assert exact == (set(claims) if expected == ALL else set(expected.split()))

    whole = by_double_backward(problem, Hessian)
    rest = (whole - by_double_backward(problem, GaussNewton)).abs() / whole.abs().max()
    for parameter, part in zip(problem.parameters, problem.parameters.split(rest), strict=True):
        largest = float(part.max())
        if parameter.name in exact or parameter.name in unsure.split():
            assert largest < ROUNDING, parameter.name
        else:
            assert largest > CURVED, parameter.name


# -- reasons -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "parameter", "reason"),
    [
        ("gelu", "0.weight", "gelu in 1 (GELU)"),
        ("square", "a.weight", "pow in Made"),
        ("attention", "query.weight", "softmax in Made"),
        ("layer norm", "0.bias", "layer_norm in 1 (LayerNorm)"),
        ("called twice", "a.weight", "addmm in a (Linear)"),
        ("surrogate gradient", "a.bias", "surrogate in Made"),
        ("in place, curved", "first.weight", "tanh in Made"),
        ("batch norm, training", "0.weight", "batch_norm in 1 (BatchNorm2d)"),
        ("curved parametrization", "0.parametrizations.weight.original",
         "pow in 0.parametrizations.weight.0 (Squared)"),
    ],
)  # fmt: skip
def test_a_reason_names_operation_and_module(case: str, parameter: str, reason: str) -> None:
    build, shape, _, _ = CASES[case]
    problem = problem_of(build().double(), torch.randn(shape, dtype=torch.float64))
    (claim,) = exact_parameters(problem, problem.parameters.select(parameter))
    assert (claim.name, claim.reason) == (parameter, reason)


# -- what a proof alone or a probe alone would get wrong ---------------------------------------


def test_a_gaussian_probe_sees_what_signs_cannot() -> None:
    build, shape, _, _ = CASES["f = (a² − b²) x"]
    problem = problem_of(build().double(), torch.randn(shape, dtype=torch.float64))
    residual, sample = Residual(problem), problem.sample(8)
    for signs in ((1.0, 1.0), (1.0, -1.0)):
        vector = torch.tensor(signs, dtype=torch.float64)
        assert float(vector @ (residual @ vector)) == pytest.approx(0, abs=1e-14)
    (form,) = within_parameters(residual, [0], sample)
    assert form > 0.01


def test_a_probe_stops_what_the_graph_does_not_show() -> None:
    """A hook on a gradient is no operation; it makes a ReLU network's curvature its own."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        if y.requires_grad:
            y.register_hook(lambda slope: slope * y)
        return m.b(y.relu())

    problem = problem_of(Made(forward, a=linear(), b=linear()).double(), torch.randn(5, 3).double())
    outputs = problem.outputs(problem.sample(5).data)
    assert not bends(outputs, problem.parameters.tensors)
    claims = exact_parameters(problem)
    assert [claim.exact for claim in claims] == [False, False, True, True]
    assert "a probe found" in str(claims[0].reason)


def test_every_batch_counts() -> None:
    """The path depends on the data, and only the last batch takes the curved one."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(torch.tanh(m.a(x)) if x.mean() > 5 else torch.relu(m.a(x)))

    x = torch.randn(9, 3, dtype=torch.float64)
    x[6:] += 10
    parts = tuple((part, part) for part in x.split(3))
    data = FrozenData(parts, (3, 3, 3), 9, True, "by hand")
    problem = Problem(Made(forward, a=linear(), b=linear()).double(), "mse", data)
    assert [claim.exact for claim in exact_parameters(problem)] == [False, False, True, True]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_modules_take_no_hooks() -> None:
    model = torch.jit.script(chain(linear(), nn.GELU(), linear())).double()
    claims = exact_parameters(problem_of(model, torch.randn(5, 3).double()))
    assert [claim.reason for claim in claims] == ["gelu", "gelu", None, None]


def test_an_unreached_parameter_is_exact() -> None:
    model = Made(lambda m, x: torch.tanh(m.a(x)), a=linear(), b=linear()).double()
    claims = exact_parameters(problem_of(model, torch.randn(5, 3).double()))
    assert [claim.exact for claim in claims] == [False, False, True, True]


# -- losses that are no function of the outputs -------------------------------------------------


def test_nothing_is_claimed_where_the_hessian_does_not_split() -> None:
    model = linear().double()
    x, labels = torch.randn(5, 3, dtype=torch.float64), torch.arange(5) % 3

    def penalised(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets) + model.weight.pow(4).sum()

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    for loss, words in (
        (penalised, "reads the model's parameters"),
        (StepLoss(step, "step"), "step"),
    ):
        claims = exact_parameters(problem_of(model, x, loss, labels))
        assert all(not claim.exact and words in str(claim.reason) for claim in claims)
    split = exact_parameters(problem_of(model, x, "cross_entropy", labels))
    assert all(claim.exact for claim in split)
    model_and_loss = Problem(Own(), "huggingface", [{"x": x, "labels": labels}])
    claims = exact_parameters(model_and_loss)
    assert not any(claim.exact for claim in claims)


class Own(nn.Module):
    """A model with a loss of its own, in which there is more than its logits show."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear().double()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layer(x)
        penalty = self.layer.weight.pow(4).sum()
        return {"logits": logits, "loss": functional.cross_entropy(logits, labels) + penalty}


# -- float32 and the samples ---------------------------------------------------------------------


def test_single_precision_models_that_cast_by_themselves() -> None:
    model = Made(lambda m, x: m.b(m.a(x.float()).relu()), a=linear(), b=linear())
    problem = problem_of(model, torch.randn(5, 3))
    assert all(claim.exact for claim in exact_parameters(problem))
    assert problem.dtype == torch.float32


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        ("fashion/model.pt", ALL),
        ("text/model.safetensors", "norm.weight norm.bias head.weight head.bias"),
        ("sunspots/model.pt", "head.weight head.bias"),
    ],
)
def test_the_samples(samples: Any, sample: str, expected: str) -> None:
    problem = hesscli.load(samples / sample, examples=16)
    claims = exact_parameters(problem)
    exact = {claim.name for claim in claims if claim.exact}
    assert exact == (set(problem.parameters.names) if expected == ALL else set(expected.split()))
