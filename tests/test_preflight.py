"""Before any number: randomness, coupled examples, precision, kinks, and operators that lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hesscli
from hesscli.errors import UnsoundError, UsageError
from hesscli.operators.base import Operator
from hesscli.operators.gauss_newton import EmpiricalFisher, GaussNewton
from hesscli.operators.hessian import Hessian
from hesscli.operators.preflight import preflight
from hesscli.operators.products import Apply
from hesscli.problem.freezing import FrozenData
from hesscli.problem.objective import WeightedBatch
from hesscli.problem.problem import Problem
from hesscli.results import Check, Preflight

EXAMPLES = 8


def problem_of(
    model: nn.Module,
    inputs: Tensor | None = None,
    targets: Tensor | None = None,
    loss: Any = "cross_entropy",
) -> Problem:
    """A problem of one batch with four inputs and three classes unless told otherwise."""
    inputs = torch.randn(EXAMPLES, 4) if inputs is None else inputs
    targets = torch.randint(3, (EXAMPLES,)) if targets is None else targets
    data = FrozenData(((inputs, targets),), (EXAMPLES,), EXAMPLES, sliceable=True, sha256="")
    return Problem(model.eval(), loss, data)


def tanh_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def check_of(flight: Preflight, name: str) -> Check:
    return next(check for check in flight.checks if check.name == name)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# -- operators that lie --------------------------------------------------------------------------


def lying(change: Callable[[Tensor, Tensor], Tensor]) -> type[Operator]:
    """A Hessian whose double backward gives ``change(V, HV)`` instead of HV."""

    class Lying(Hessian):
        def live(self, batch: WeightedBatch) -> Apply:
            apply = super().live(batch)
            return lambda block: change(block, apply(block))

    return Lying


def scaled_by_a_percent(block: Tensor, product: Tensor) -> Tensor:
    return 1.01 * product


def shifted_in_the_last_layer(block: Tensor, product: Tensor) -> Tensor:
    """Symmetric: a multiple of the identity on the last layer's 18 entries."""
    wrong = product.clone()
    wrong[:, -18:] += 0.05 * block[:, -18:]
    return wrong


def with_an_antisymmetric_part(block: Tensor, product: Tensor) -> Tensor:
    """Entries 0 and 1, which lie in the first layer, swapped with a sign: 1e-5 of it."""
    wrong = product.clone()
    wrong[:, 0] += 1e-5 * block[:, 1]
    wrong[:, 1] -= 1e-5 * block[:, 0]
    return wrong


def not_finite(block: Tensor, product: Tensor) -> Tensor:
    return product / 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (scaled_by_a_percent, "disagree with central differences by 0.99%, in 0, 2"),
        (shifted_in_the_last_layer, "in 2"),
        (with_an_antisymmetric_part, "not symmetric"),
        (not_finite, "not finite"),
    ],
)
def test_wrong_products_are_refused(
    change: Callable[[Tensor, Tensor], Tensor], said: str, dtype: torch.dtype
) -> None:
    with pytest.raises(UnsoundError) as refused:
        preflight(problem_of(tanh_net().to(dtype)), lying(change), "double-backward")
    assert said in refused.value.got
    if change is with_an_antisymmetric_part:
        assert refused.value.got.endswith("in 0")


def test_right_products_pass_with_a_margin() -> None:
    flight = preflight(problem_of(tanh_net()), Hessian)
    assert (flight.mode, flight.fallback) == ("double-backward", None)
    for name in ("gradient", "symmetry", "central difference"):
        check = check_of(flight, name)
        assert check.value is not None
        assert check.bound is not None
        assert 0 <= check.value < check.bound / 1e3
    # Sums of some 30 terms in float32, whose eps is 1.2e-7, against float64.
    assert flight.relative_rounding is not None
    assert 1e-10 < flight.relative_rounding < 1e-5


@pytest.mark.parametrize("mode", ["double-backward", "forward-over-reverse", "finite-difference"])
@pytest.mark.parametrize("matrix", [Hessian, GaussNewton, EmpiricalFisher])
def test_every_mode_passes_where_it_can(matrix: type[Operator], mode: str) -> None:
    assert preflight(problem_of(tanh_net()), matrix, mode).mode == mode


def test_a_mode_that_was_asked_for_is_refused_by_name() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.LSTM(4, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.cells(x[:, None])[0][:, -1]

    with pytest.raises(UnsoundError) as refused:
        preflight(problem_of(Recurrent()), Hessian, "forward-over-reverse")
    assert "cells (LSTM)" in refused.value.got
    assert "--mode auto" in refused.value.hint


def test_an_unknown_mode() -> None:
    with pytest.raises(UsageError, match="no such autodiff mode"):
        preflight(problem_of(tanh_net()), Hessian, "backward")


# -- gradients that are not the loss's ----------------------------------------------------------


class Doubled(torch.autograd.Function):
    """The identity with another's backward: symmetric and consistent curvature, twice too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 2 * slope


class Louder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = tanh_net()

    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(self.net(x))


class Penalised(nn.Module):
    """Its second layer's weights are decayed, but autograd is kept from it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tanh_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        penalty = 0.1 * self.net[2].weight.data.square().sum()
        return nn.functional.cross_entropy(outputs, targets) + penalty


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("matrix", [Hessian, GaussNewton])
def test_gradients_that_are_not_the_loss_are_refused(
    matrix: type[Operator], dtype: torch.dtype
) -> None:
    louder, penalised = Louder().to(dtype), Penalised().to(dtype)
    for problem, layers in (
        (problem_of(louder), ", in net.0, net.2"),
        (problem_of(penalised, loss=penalised.loss), ", in net.2"),
    ):
        with pytest.raises(UnsoundError) as refused:
            preflight(problem, matrix)
        assert refused.value.what == "the gradient is not that of the loss"
        assert refused.value.got.endswith(layers)


@pytest.mark.parametrize("margin", [10, 20, 30])
@pytest.mark.parametrize("matrix", [Hessian, GaussNewton])
def test_a_network_that_is_sure_of_its_labels(matrix: type[Operator], margin: float) -> None:
    """Loss, gradient and curvature of e^-margin are differences of probabilities near 1."""
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        model.weight.copy_(margin * torch.eye(3, 4))
    targets = torch.randint(3, (EXAMPLES,))
    problem = problem_of(model, torch.eye(4)[targets], targets)
    assert problem.prove().loss < 20 * torch.tensor(-float(margin)).exp()
    assert preflight(problem, matrix).mode == "double-backward"


# -- kinks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cross_entropy", "language_model"])
def test_a_users_loss_is_not_taken_for_the_one_of_its_name(name: str) -> None:
    """It need not leave what is the same for all logits alone: a penalty on their size does not."""

    def penalised(logits: Tensor, targets: Tensor) -> Tensor:
        penalty = logits.logsumexp(-1).square().mean()
        return nn.functional.cross_entropy(logits, targets) + 0.01 * penalty

    penalised.__name__ = name
    data = torch.randn(24, 4).double(), torch.arange(24) % 3
    problem = Problem(nn.Linear(4, 3).double(), penalised, data)
    flight = hesscli.check(problem).preflight
    assert flight.mode == "double-backward"
    assert not any(check.name == "softmax head" for check in flight.checks)


def test_weights_that_sit_on_a_kink() -> None:
    """Zero inputs and zero biases put every ReLU at exactly 0."""
    model = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3))
    nn.init.zeros_(model[0].bias)
    inputs = torch.randn(EXAMPLES, 4)
    inputs[::2] = 0
    assert preflight(problem_of(model, inputs), Hessian).mode == "double-backward"


def test_a_wide_relu_network() -> None:
    """Some of 3,200 ReLUs are within a step of their kink."""
    model = nn.Sequential(
        nn.Linear(4, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 3)
    )
    assert preflight(problem_of(model), Hessian).mode == "double-backward"


def test_padding_rows_stay_where_they_are() -> None:
    """No gradient reaches them, by design, though the outputs depend on them."""

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 3)
            nn.init.normal_(self.embed.weight)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embed(tokens).mean(1).tanh())

    problem = problem_of(Bag().double(), torch.randint(3, (EXAMPLES, 5)))
    assert preflight(problem, Hessian).mode == "double-backward"
    dense = Hessian(problem).to_dense()
    assert not dense[:4].any()
    assert not dense[:, :4].any()


# -- precision -----------------------------------------------------------------------------------


class LogitsInFloat32(nn.Module):
    """Runs in float64 up to its last line, as many language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tanh_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).float()


class OnlyFloat32(LogitsInFloat32):
    """Does not run in float64 by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.float())


@pytest.mark.parametrize("model", [LogitsInFloat32, OnlyFloat32])
@pytest.mark.parametrize("matrix", [Hessian, GaussNewton])
def test_models_that_cast_are_checked_as_others_are(
    model: type[nn.Module], matrix: type[Operator]
) -> None:
    flight = preflight(problem_of(model()), matrix)
    plain = preflight(problem_of(tanh_net()), matrix)
    assert [check.state for check in flight.checks] == [check.state for check in plain.checks]
    assert flight.relative_rounding is not None
    assert 1e-9 < flight.relative_rounding < 1e-5  # of float32, whose eps is 1.2e-7
    assert preflight(problem_of(model()), matrix, "finite-difference").mode == "finite-difference"


@torch.jit.script
def in_float32(x: Tensor) -> Tensor:
    """Compiled code, into which nobody looks."""
    return x.float() * 1.0


class Compiled(LogitsInFloat32):
    def forward(self, x: Tensor) -> Tensor:
        return in_float32(self.net(x))


def test_code_that_cannot_be_widened_is_checked_as_it_is() -> None:
    flight = preflight(problem_of(Compiled()), Hessian)
    assert (flight.relative_rounding, flight.product_rounding) == (None, None)
    for name in ("gradient", "central difference"):
        check = check_of(flight, name)
        assert check.state == "passed"
        assert "float32" in check.detail
        assert check.bound is not None
        assert 0.05 < check.bound < 0.5
    assert check_of(flight, "symmetry").bound == pytest.approx(7e-5, rel=0.01)
    with pytest.raises(UnsoundError, match="central differences need float64"):
        preflight(problem_of(Compiled()), Hessian, "finite-difference")


@pytest.mark.parametrize("method", ["exact", "hutchinson"])
def test_rounding_that_nobody_can_measure_is_unknown(method: str) -> None:
    """What is usual for float32 stands in for it, and nothing is called exact."""
    model = Compiled()
    model.net[1] = nn.ReLU()
    problem = problem_of(model)
    for run in (hesscli.trace, hesscli.diagonal):
        result = run(problem, method=method, probes=4)
        assert result.status in ("converged", "budget")
        assert all(layer.status != "exact" for layer in result.layers)
        assert result.trace.rounding_error is None
        low, high = result.trace.interval
        assert low < result.trace.estimate < high
        assert any("rounding is unknown" in warning for warning in result.warnings)
    found = hesscli.spectrum(problem, probes=1)
    assert found.status == "converged"
    assert any("rounding is unknown" in warning for warning in found.warnings)


class CompiledLouder(Compiled):
    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(super().forward(x))


def test_wrong_gradients_behind_compiled_code_are_refused() -> None:
    with pytest.raises(UnsoundError, match="the gradient is not that of the loss"):
        preflight(problem_of(CompiledLouder()), Hessian)


def test_products_that_differences_cannot_confirm_are_not_said_to_be_right() -> None:
    flight = preflight(problem_of(Compiled()), lying(lambda block, product: 1.5 * product))
    assert check_of(flight, "central difference").state == "skipped"


def test_a_float32_constant_is_no_loss_of_precision() -> None:
    class Shifted(LogitsInFloat32):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x + torch.arange(4).float())

    flight = preflight(problem_of(Shifted()), Hessian)
    assert check_of(flight, "central difference").value is not None


# -- randomness and coupled examples -------------------------------------------------------------


def test_a_random_loss_is_refused() -> None:
    def noisy(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.square().mean() * (1 + 0.1 * torch.rand(()))

    with pytest.raises(UnsoundError) as refused:
        preflight(problem_of(tanh_net(), loss=noisy), Hessian)
    assert "noisy" in refused.value.got


class Centred(nn.Module):
    """Subtracts the batch's mean: what batch norm does, under another name."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def pairwise(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.cdist(outputs, outputs).square().mean()


@pytest.mark.parametrize(
    ("model", "loss", "culprit"),
    [
        (lambda: nn.Sequential(tanh_net(), Centred()), "cross_entropy", "1 (Centred)"),
        (tanh_net, pairwise, "the loss pairwise"),
    ],
)
def test_examples_that_depend_on_each_other(
    model: Callable[[], nn.Module], loss: Any, culprit: str
) -> None:
    with pytest.raises(UsageError) as refused:
        preflight(problem_of(model(), loss=loss), EmpiricalFisher)
    assert culprit in refused.value.got
    independence = check_of(preflight(problem_of(model(), loss=loss), Hessian), _INDEPENDENT)
    assert (independence.state, independence.passed) == ("not applicable", False)
    assert culprit in independence.detail


def test_examples_that_do_not() -> None:
    independence = check_of(preflight(problem_of(tanh_net()), EmpiricalFisher), _INDEPENDENT)
    assert independence.value is not None
    assert independence.value < 1e-14  # a few eps of float64
    assert "do not depend" in independence.detail


_INDEPENDENT = "independent examples"
