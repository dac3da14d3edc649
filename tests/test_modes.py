"""Every operation that autodiff is known to trip over: the curvature is right, or refused by name.

The truth is made here: central differences of the whole loss's gradient in float64, and dense
JᵀAJ from explicit Jacobians.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

import hesscli
from hesscli.errors import UnsoundError, UsageError
from hesscli.operators.gauss_newton import EmpiricalFisher, GaussNewton
from hesscli.operators.hessian import Hessian
from hesscli.operators.preflight import preflight
from hesscli.problem.freezing import FrozenData
from hesscli.problem.problem import Problem

DOUBLE = "double-backward"
DIFFERENCES = "finite-difference"
CLASSES, WIDTH, EXAMPLES = 3, 4, 8


class Wrapped(nn.Module):
    """``body`` between two layers, called as ``call(body, x)`` on x of shape ``(N, 4)``."""

    def __init__(self, body: nn.Module, call: Callable[[Any, Tensor], Tensor], out: int) -> None:
        super().__init__()
        self.first, self.body = nn.Linear(WIDTH, WIDTH), body
        self.call, self.head = call, nn.Linear(out, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.call(self.body, self.first(x).tanh()))


class Tokens(nn.Module):
    """An embedding ``(N, 5)`` to ``(N, out)``, then a layer."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.body(tokens)
        return self.head((embedded.mean(1) if embedded.dim() == 3 else embedded).tanh())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens % CLASSES).mean(1).tanh())


class Unreached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x.tanh())


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = nn.Linear(WIDTH, WIDTH), reentrant

    def forward(self, x: Tensor) -> Tensor:
        run = lambda x: self.inner(x).tanh()  # noqa: E731
        return checkpoint(run, x, use_reentrant=self.reentrant)


class ThroughData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.data).tanh()


class WithoutGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.scale.exp()
        return (x * scale + self.shift).tanh()


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.rand(x.shape[1], dtype=x.dtype)


class OnceSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * slope


class SilentSquare(OnceSquare):
    """Its backward hides x from autograd: double backward runs and is wrong."""

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0].detach() * slope


class Custom(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


class Heads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x.view(len(x), 2, WIDTH)
        return functional.scaled_dot_product_attention(q, q.flip(1), q, is_causal=True).flatten(1)


class Repeated(nn.Module):
    """A recurrent or attention module on x repeated over three steps with different signs."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.stack([x, -x, 2 * x], 1)
        attends = isinstance(self.body, nn.MultiheadAttention)
        out = self.body(steps, steps, steps) if attends else self.body(steps)
        return out[0][:, -1]


def around(body: Callable[[], nn.Module], out: int = WIDTH) -> Callable[[], nn.Module]:
    return lambda: Wrapped(body(), lambda body, x: body(x), out)


def floats() -> Tensor:
    return torch.randn(EXAMPLES, WIDTH)


def integers() -> Tensor:
    return torch.randint(7, (EXAMPLES, 5))


def ctc(outputs: Tensor, targets: Tensor) -> Tensor:
    """Outputs ``(N, 4 · 3)`` as four steps over three symbols."""
    steps = outputs.view(len(outputs), 4, CLASSES).log_softmax(2).transpose(0, 1)
    lengths = torch.full_like(targets, 4), torch.ones_like(targets)
    labels = targets.clamp_min(1)[:, None]
    return functional.ctc_loss(steps, labels, *lengths, reduction="none").mean()


@dataclass(frozen=True)
class Case:
    """A model on data; either ``mode`` makes its products, or it is refused with ``refusal``."""

    name: str
    model: Callable[[], nn.Module]
    mode: str = DOUBLE
    refusal: str = ""
    culprit: str = ""
    inputs: Callable[[], Tensor] = floats
    train: bool = False
    loss: Any = "cross_entropy"
    truth: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy

    def build(self, dtype: torch.dtype = torch.float64) -> Problem:
        torch.manual_seed(7)
        model = self.model().to(dtype)
        inputs = self.inputs()
        targets = torch.randint(CLASSES, (EXAMPLES,))
        batches = (inputs[:5], targets[:5]), (inputs[5:], targets[5:])
        data = FrozenData(batches, (5, 3), EXAMPLES, sliceable=True, sha256="")
        return Problem(model.train(self.train), self.loss, data)


CASES = [
    Case("layer norm", around(lambda: nn.LayerNorm(WIDTH))),
    Case("group norm", around(lambda: nn.Sequential(nn.GroupNorm(2, WIDTH), nn.Tanh()))),
    Case("batch norm eval", around(lambda: nn.BatchNorm1d(WIDTH))),
    Case("batch norm train", around(lambda: nn.BatchNorm1d(WIDTH)), train=True),
    Case("sdpa", around(lambda: nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), Heads()), 2 * WIDTH)),
    Case(
        "multihead attention",
        around(lambda: Repeated(nn.MultiheadAttention(WIDTH, 2, batch_first=True))),
    ),
    Case("lstm", around(lambda: Repeated(nn.LSTM(WIDTH, WIDTH, batch_first=True)))),
    Case("gru", around(lambda: Repeated(nn.GRU(WIDTH, WIDTH, batch_first=True)))),
    Case(
        "embedding bag",
        lambda: Tokens(nn.EmbeddingBag(7, WIDTH)),
        DIFFERENCES,
        culprit="body (EmbeddingBag)",
        inputs=integers,
    ),
    Case(
        "sparse embedding",
        lambda: Tokens(nn.Embedding(7, WIDTH, sparse=True)),
        inputs=integers,
    ),
    Case(
        "ctc",
        lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4 * CLASSES)),
        DIFFERENCES,
        culprit="the loss ctc",
        loss=ctc,
        truth=ctc,
    ),
    Case("in-place relu", around(lambda: nn.Sequential(nn.Linear(WIDTH, 9), nn.ReLU(True)), 9)),
    Case("dropout eval", around(lambda: nn.Dropout(0.5))),
    Case("dropout train", around(lambda: nn.Dropout(0.5)), refusal="body (Dropout)", train=True),
    Case("random op", around(Noise), refusal="body (Noise)"),
    Case("tied weights", Tied, inputs=integers),
    Case("unreached", Unreached),
    Case("checkpoint", around(lambda: Checkpointed(False))),
    Case("reentrant checkpoint", around(lambda: Checkpointed(True)), refusal="body (Checkpointed)"),
    Case("parameters through .data", around(ThroughData), refusal="in body"),
    Case("parameters under no_grad", around(WithoutGrad), refusal="in body"),
    Case(
        "old weight norm",  # torch's fused kernel has a second derivative, and it is wrong
        around(lambda: nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))),
    ),
    Case(
        "weight norm",
        around(lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))),
    ),
    Case("spectral norm", around(lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)))),
    Case("old spectral norm", around(lambda: nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH)))),
    Case(
        "spectral norm train",  # its power iteration depends on the weights behind autograd's back
        around(lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))),
        refusal="in body",
        train=True,
    ),
    Case(
        "once differentiable",
        around(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(True), Custom(OnceSquare))),
        DIFFERENCES,
        culprit="body.2 (Custom)",
    ),
    Case(
        "backward that hides its input",
        around(lambda: Custom(SilentSquare)),
        DIFFERENCES,
        culprit="in first",
    ),
]
ACCEPTED = [case for case in CASES if not case.refusal]
REFUSED = [case for case in CASES if case.refusal]


def named(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


# -- truth --------------------------------------------------------------------------------------


def unit_vectors(problem: Problem) -> Tensor:
    torch.manual_seed(11)
    rows = torch.randn(2, problem.parameters.size, dtype=torch.float64)
    return rows / rows.norm(dim=1, keepdim=True)


def true_loss(problem: Problem, case: Case) -> Tensor:
    """The mean over all examples, from the frozen batches."""
    model, total = problem.model, 0
    for inputs, targets in problem.data.batches:
        inputs = inputs.double() if inputs.is_floating_point() else inputs
        total = total + case.truth(model(inputs), targets) * len(targets)
    return total / EXAMPLES  # type: ignore[return-value]


def true_gradient(problem: Problem, case: Case) -> Tensor:
    problem.model.zero_grad(set_to_none=True)
    buffers = {name: b.clone() for name, b in problem.model.named_buffers()}
    true_loss(problem, case).backward()
    for name, buffer in problem.model.named_buffers():
        buffer.copy_(buffers[name])
    tensors = [p for p in problem.model.parameters() if p.requires_grad]
    parts = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in tensors]
    return torch.cat([part.reshape(-1) for part in parts])


def move(problem: Problem, direction: Tensor) -> None:
    offset = 0
    for p in problem.model.parameters():
        p.data.add_(direction[offset : offset + p.numel()].view_as(p))
        offset += p.numel()


def true_product(problem: Problem, case: Case, direction: Tensor, step: float = 1e-5) -> Tensor:
    """Central difference of the gradient along a unit direction."""
    move(problem, step * direction)
    ahead = true_gradient(problem, case)
    move(problem, -2 * step * direction)
    behind = true_gradient(problem, case)
    move(problem, step * direction)
    return (ahead - behind) / (2 * step)


# Rounding 2e-16 · ‖g‖ / step is 1e-10 and the truncation step² as much, relative to ‖Hv‖ ~ 0.1.
CLOSE = 1e-7


@named(ACCEPTED)
def test_hessian_agrees_with_central_differences(case: Case) -> None:
    problem = case.build()
    flight = preflight(problem, Hessian)
    assert flight.mode == case.mode
    assert all(check.state != "skipped" for check in flight.checks)
    if case.mode == DOUBLE:
        assert flight.fallback is None
    else:
        assert flight.fallback is not None
        assert case.culprit in flight.fallback
    before = {name: t.clone() for name, t in problem.model.state_dict().items()}
    operator = Hessian(problem, mode=flight.mode)  # type: ignore[arg-type]
    for direction in unit_vectors(problem):
        truth = true_product(problem, case, direction)
        error = (operator @ direction - truth).norm() / truth.norm()
        assert error < CLOSE
    for name, tensor in problem.model.state_dict().items():  # steps there and back round
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-14)


@named([case for case in ACCEPTED if case.name in ("layer norm", "lstm", "embedding bag", "ctc")])
def test_float32_problem_takes_the_same_mode(case: Case) -> None:
    problem = case.build(torch.float32)
    before = {name: t.clone() for name, t in problem.model.state_dict().items()}
    flight = preflight(problem, Hessian)
    assert flight.mode == case.mode
    assert flight.relative_rounding is not None
    assert flight.relative_rounding < 1e-5
    after = problem.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@named(REFUSED)
def test_refusal_names_the_module(case: Case) -> None:
    with pytest.raises(UnsoundError) as refused:
        preflight(case.build(), Hessian)
    assert case.refusal in refused.value.got
    assert len(str(refused.value).splitlines()) == 3


# -- matrices through the outputs ----------------------------------------------------------------


def rows_of(problem: Problem, value: Tensor) -> Tensor:
    """The dense Jacobian of a tensor, one backward pass a row."""
    tensors = list(problem.model.parameters())
    rows = []
    for entry in value.reshape(-1):
        parts = torch.autograd.grad(entry, tensors, retain_graph=True, allow_unused=True)
        dense = [
            torch.zeros_like(t) if p is None else p.to_dense()
            for t, p in zip(tensors, parts, strict=True)
        ]
        rows.append(torch.cat([part.reshape(-1) for part in dense]))
    return torch.stack(rows)


def dense_gauss_newton(problem: Problem, case: Case) -> Tensor:
    total = torch.zeros(problem.parameters.size, problem.parameters.size, dtype=torch.float64)
    for inputs, targets in problem.data.batches:
        outputs = problem.model(inputs.double() if inputs.is_floating_point() else inputs)
        middle = torch.autograd.functional.hessian(
            lambda o, targets=targets: functional.cross_entropy(o, targets, reduction="sum"),
            outputs.detach(),
        )
        jacobian = rows_of(problem, outputs)
        total += jacobian.T @ middle.reshape(len(jacobian), len(jacobian)) @ jacobian  # type: ignore[union-attr]
    return total / EXAMPLES


def dense_empirical_fisher(problem: Problem, case: Case) -> Tensor:
    total = torch.zeros(problem.parameters.size, problem.parameters.size, dtype=torch.float64)
    for inputs, targets in problem.data.batches:
        for x, y in zip(inputs, targets, strict=True):
            x = x.double() if x.is_floating_point() else x
            slope = rows_of(problem, case.truth(problem.model(x[None]), y[None]))
            total += slope.T @ slope
    return total / EXAMPLES


MATRICES = [(GaussNewton, dense_gauss_newton), (EmpiricalFisher, dense_empirical_fisher)]


@pytest.mark.parametrize(("matrix", "dense"), MATRICES, ids=["ggn", "empirical fisher"])
@named(ACCEPTED)
def test_matrices_through_outputs_agree_with_jacobians(
    case: Case, matrix: Any, dense: Callable[[Problem, Case], Tensor]
) -> None:
    problem = case.build()
    if (case.name, matrix) == ("batch norm train", EmpiricalFisher):
        with pytest.raises(UsageError, match=r"body \(BatchNorm1d\) mixes the examples"):
            preflight(problem, matrix)
        return
    if (case.name, matrix) == ("ctc", GaussNewton):  # its second derivative in the outputs
        with pytest.raises(UnsoundError, match="the loss ctc"):
            preflight(problem, matrix)
        return
    flight = preflight(problem, matrix)
    operator = matrix(problem, mode=flight.mode)
    truth = dense(problem, case)
    for direction in unit_vectors(problem):
        expected = truth @ direction
        assert (operator @ direction - expected).norm() / expected.norm() < CLOSE


# -- every command in every mode -----------------------------------------------------------------


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "empirical-fisher"])
@pytest.mark.parametrize("mode", ["double-backward", "forward-over-reverse", "finite-difference"])
def test_every_command_runs_in_every_mode(sunspots: Problem, mode: str, matrix: str) -> None:
    assert hesscli.check(sunspots, matrix=matrix, mode=mode).preflight.mode == mode
    assert hesscli.trace(sunspots, matrix=matrix, mode=mode, probes=2).method.mode == mode
    found = hesscli.spectrum(sunspots, matrix=matrix, mode=mode, steps=4, probes=1)
    assert found.method.mode == mode


@pytest.mark.parametrize(
    ("command", "few"),
    [
        ("trace", {"probes": 2}),
        ("diagonal", {"probes": 2}),
        ("spectrum", {"steps": 2, "probes": 1}),
        ("sensitivity", {"window": hesscli.WindowOptions(size=16)}),
        ("ihvp", {"window": hesscli.WindowOptions(size=16)}),
    ],
)
def test_differences_in_float64_leave_the_problem_its_type(
    command: str, few: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(32, 4), torch.randint(0, 3, (32,)))
    problem = hesscli.Problem(nn.Linear(4, 3), "cross_entropy", data)
    result = getattr(hesscli, command)(problem, mode=DIFFERENCES, **few)
    assert (result.method.mode, result.problem.dtype) == (DIFFERENCES, "float32")
