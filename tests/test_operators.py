"""Operators against matrices by other routes: differences, closed forms, explicit Jacobians."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional

import hesscli
from hesscli import EmpiricalFisher, Fisher, GaussNewton, Hessian
from hesscli.errors import UsageError
from hesscli.operators.base import Operator
from hesscli.problem.batches import Batch
from hesscli.problem.freezing import FrozenData
from hesscli.problem.losses import StepLoss
from hesscli.problem.named_losses import LanguageModel
from hesscli.problem.problem import Problem
from hesscli.vocabulary import MODES

OPERATORS: dict[str, Callable[..., Operator]] = {
    kind.name: kind for kind in (Hessian, GaussNewton, Fisher, EmpiricalFisher)
}
ROUNDING = 1e-10  # float64, sums of some thousand terms, the worst of them cancelling


def _draw(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _distance(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


# -- the sunspots sample -----------------------------------------------------------------------


def _data(problem: Problem) -> tuple[Tensor, Tensor]:
    """All examples at once, in the order they were frozen in."""
    lags, following = zip(*problem.data.batches, strict=True)
    return torch.cat(lags), torch.cat(following)


def _slope(model: nn.Module, lags: Tensor, following: Tensor, decay: float) -> Tensor:
    loss = functional.mse_loss(model(lags), following)
    loss = loss + decay / 2 * sum(p.square().sum() for p in model.parameters())
    return torch.cat([p.reshape(-1) for p in torch.autograd.grad(loss, list(model.parameters()))])


def _hessian_by_differences(problem: Problem, step: float = 1e-5) -> Tensor:
    model, data = problem.model, _data(problem)
    columns = []
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for i in range(len(flat)):
            kept = float(flat[i])
            flat[i] = kept + step
            ahead = _slope(model, *data, problem.weight_decay)
            flat[i] = kept - step
            columns.append((ahead - _slope(model, *data, problem.weight_decay)) / (2 * step))
            flat[i] = kept
    return torch.stack(columns, dim=1)


def _jacobian(problem: Problem) -> Tensor:
    """Of the network's outputs, by backpropagating each: (examples, 315)."""
    model, (lags, _) = problem.model, _data(problem)
    rows = []
    for output in model(lags)[:, 0]:
        parts = torch.autograd.grad(output, list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows)


def _cut(data: tuple[Tensor, ...], sizes: list[int]) -> FrozenData:
    pieces = zip(*(torch.split_with_sizes(t, sizes) for t in data), strict=True)
    return FrozenData(tuple(pieces), tuple(sizes), sum(sizes), True, "by hand")


@pytest.fixture(scope="module")
def dense(sunspots: Problem) -> dict[str, Tensor]:
    """The matrices from two unequal batches: 315 products with all 16 take their time."""
    data = _cut(_data(sunspots), [156, 100])
    decay = sunspots.weight_decay
    problem = Problem(sunspots.model, sunspots.loss, data, weight_decay=decay)
    return {name: kind(problem).to_dense() for name, kind in OPERATORS.items()}


def test_the_hessian_is_the_derivative_of_the_gradient(
    sunspots: Problem, dense: dict[str, Tensor]
) -> None:
    matrix = dense["hessian"]
    assert matrix.shape == (315, 315)
    assert matrix.dtype == torch.float64
    # Differences: h²/6 of the third derivative along one entry, and ε/h of rounding, ~1e-10 each.
    assert _distance(matrix, _hessian_by_differences(sunspots)) < 1e-7
    assert _distance(matrix, matrix.T) < 1e-12
    spectrum = torch.linalg.eigvalsh(matrix)
    assert float(spectrum[0]) > 0
    # As the sample's README has them.
    assert float(spectrum[-1]) == pytest.approx(561.8, abs=0.05)


def test_gauss_newton_and_fisher_are_made_of_jacobians(
    sunspots: Problem, dense: dict[str, Tensor]
) -> None:
    jacobian = _jacobian(sunspots)
    outer = 2 / 256 * jacobian.T @ jacobian
    decay = sunspots.weight_decay * torch.eye(315, dtype=torch.float64)
    assert _distance(dense["ggn"], outer + decay) < 1e-12
    assert torch.equal(dense["fisher"], dense["ggn"])
    lags, following = _data(sunspots)
    residuals = 2 * (sunspots.model(lags) - following).detach()
    slopes = residuals * jacobian
    assert _distance(dense["empirical-fisher"], slopes.T @ slopes / 256) < 1e-12


@pytest.mark.parametrize("name", OPERATORS)
def test_products_are_those_of_the_dense_matrix(
    name: str, sunspots: Problem, dense: dict[str, Tensor]
) -> None:
    operator, vectors = OPERATORS[name](sunspots), _draw(315, 5)
    assert operator.shape == (315, 315)
    assert _distance(operator @ vectors, dense[name] @ vectors) < ROUNDING
    assert _distance(operator @ vectors[:, 2], dense[name] @ vectors[:, 2]) < ROUNDING
    assert _distance(dense[name], dense[name].T) < 1e-12


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("pattern", ["hidden*", "hidden2", "*.bias", "head.weight"])
def test_restriction_is_the_diagonal_block(
    name: str, pattern: str, sunspots: Problem, dense: dict[str, Tensor]
) -> None:
    operator = OPERATORS[name](sunspots).restrict(pattern)
    places = [
        p.offset + i for p in sunspots.parameters.select(pattern) for i in range(p.tensor.numel())
    ]
    block, vectors = dense[name][places][:, places], _draw(len(places), 3)
    assert operator.shape == (len(places), len(places))
    assert _distance(operator @ vectors, block @ vectors) < ROUNDING
    with pytest.raises(UsageError, match="no parameter matches"):
        operator.restrict("absent")


@pytest.mark.parametrize("name", OPERATORS)
def test_the_modes_agree(name: str, sunspots: Problem, dense: dict[str, Tensor]) -> None:
    vectors = _draw(315, 3)
    state = [t.detach().clone() for t in sunspots.parameters.tensors]
    for mode in MODES:
        product = OPERATORS[name](sunspots, mode=mode) @ vectors
        assert isinstance(product, Tensor)
        bound = 1e-7 if mode == "finite-difference" else ROUNDING  # h² and ε/h along unit vectors
        assert _distance(product, dense[name] @ vectors) < bound, mode
    kept = zip(state, sunspots.parameters.tensors, strict=True)
    assert all(torch.equal(before, after) for before, after in kept)


@pytest.mark.parametrize("name", OPERATORS)
def test_weight_decay_adds_a_multiple_of_the_identity(name: str, samples: Any) -> None:
    path = samples / "sunspots" / "model.pt"
    vectors = _draw(315, 2)
    plain, decayed = (
        OPERATORS[name](hesscli.load(path, weight_decay=decay)) @ vectors for decay in (0.0, 0.25)
    )
    added = 0.0 if name == "empirical-fisher" else 0.25
    torch.testing.assert_close(decayed - plain, added * vectors, rtol=0, atol=1e-12)


# -- small networks with every loss ------------------------------------------------------------


class Tied(nn.Module):
    """One matrix used twice, and a curved output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.tanh(self.first(x))).sin()
        return result


class LogSoftmax(Tied):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).log_softmax(1)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.head(torch.tanh(self.table(tokens)))
        return result


WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
GOALS = _draw(40, 3, seed=5)
LABELS = torch.randint(3, (40,), generator=torch.Generator().manual_seed(3))
TOKENS = torch.randint(5, (40, 4), generator=torch.Generator().manual_seed(4))
MASKED = TOKENS.where(_draw(40, 4) < 0.5, -100)
TOKEN_WEIGHTS = _draw(40, 4, seed=9).square()

Case = tuple[Callable[[], nn.Module], Any, tuple[Tensor, ...], Any]

# Network, loss, examples, and the same loss by torch for outputs (N, ...) and all examples.
CASES: dict[str, Case] = {
    "cross-entropy": (
        Tied,
        nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.1),
        (_draw(40, 3), LABELS),
        lambda f: functional.cross_entropy(f, LABELS, WEIGHTS, label_smoothing=0.1),
    ),
    "mse": (
        Tied,
        "mse",
        (_draw(40, 3), GOALS),
        lambda f: functional.mse_loss(f, GOALS),
    ),
    "bce": (
        Tied,
        nn.BCEWithLogitsLoss(pos_weight=WEIGHTS),
        (_draw(40, 3), GOALS.sigmoid()),
        lambda f: functional.binary_cross_entropy_with_logits(
            f, GOALS.sigmoid(), pos_weight=WEIGHTS
        ),
    ),
    "nll": (
        LogSoftmax,
        nn.NLLLoss(WEIGHTS, ignore_index=1),
        (_draw(40, 3), LABELS),
        lambda f: functional.nll_loss(f, LABELS, WEIGHTS, ignore_index=1),
    ),
    "language": (
        Tokens,
        LanguageModel(),
        (TOKENS, MASKED, TOKEN_WEIGHTS),
        lambda f: (
            (
                functional.cross_entropy(f.transpose(1, 2), MASKED, reduction="none")
                * TOKEN_WEIGHTS
            ).sum()
            / (TOKEN_WEIGHTS * (MASKED != -100)).sum()
        ),
    ),
    "a user's own": (
        Tied,
        lambda f, t: functional.smooth_l1_loss(f, t, beta=10.0),
        (_draw(40, 3), GOALS),
        lambda f: functional.smooth_l1_loss(f, GOALS, beta=10.0),
    ),
}


def _flat(model: nn.Module) -> tuple[Tensor, Callable[[Tensor], dict[str, Tensor]]]:
    """The parameters as one vector, and back to names."""
    named = dict(model.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def back(theta: Tensor) -> dict[str, Tensor]:
        parts = torch.split_with_sizes(theta, sizes)
        return {n: v.view(p.shape) for v, (n, p) in zip(parts, named.items(), strict=True)}

    return torch.cat([p.detach().reshape(-1) for p in named.values()]), back


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_hessian_and_gauss_newton_by_jacobians(name: str, mode: str) -> None:
    build, loss, data, criterion = CASES[name]
    model = build()
    theta, back = _flat(model)

    def outputs(theta: Tensor) -> Tensor:
        result: Tensor = functional_call(model, back(theta), (data[0],))
        return result

    problem = Problem(model, loss, _cut(data, [20, 13, 7]), weight_decay=0.125)
    decay = 0.125 * torch.eye(len(theta), dtype=torch.float64)
    bound = 1e-7 if mode == "finite-difference" else ROUNDING

    whole = hessian(lambda theta: criterion(outputs(theta)))(theta)
    assert _distance(Hessian(problem, mode=mode).to_dense(), whole + decay) < bound

    jacobian = jacrev(outputs)(theta).reshape(-1, len(theta))
    at = outputs(theta)
    if name == "nll":  # in natural parameters: log-softmax of log-probabilities is themselves
        curvature = hessian(lambda f: criterion(f.view_as(at).log_softmax(1)))(at.reshape(-1))
    else:
        curvature = hessian(lambda f: criterion(f.view_as(at)))(at.reshape(-1))
    gauss_newton = jacobian.T @ curvature @ jacobian
    assert _distance(GaussNewton(problem, mode=mode).to_dense(), gauss_newton + decay) < bound
    assert float(gauss_newton.norm()) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_empirical_fisher_by_gradients_of_single_examples(name: str) -> None:
    build, loss, data, _ = CASES[name]
    model = build()
    problem = Problem(model, loss, _cut(data, [20, 13, 7]))
    theta, back = _flat(model)

    def alone(theta: Tensor, example: tuple[Tensor, ...]) -> Tensor:
        return problem.loss.mean(functional_call(model, back(theta), example[0]), example)

    examples = [tuple(t[i : i + 1] for t in data) for i in range(40)]
    masses = [problem.loss.mass(model, example) for example in examples]
    slopes = [jacrev(alone)(theta, example) for example in examples]
    pairs = [(m, g) for m, g in zip(masses, slopes, strict=True) if m]  # the others' means are NaN
    expected = torch.stack([m * torch.outer(g, g) for m, g in pairs]).sum(0) / sum(masses)
    assert _distance(EmpiricalFisher(problem).to_dense(), expected) < ROUNDING


def test_the_fisher_matrix_is_the_mean_over_the_models_own_labels() -> None:
    """Σ_y p(y|x) ∇log p(y|x) ∇log p(y|x)ᵀ, for log-probabilities and for logits alike."""
    x = _draw(40, 3)
    for build, loss in ((Tied, "cross_entropy"), (LogSoftmax, "nll")):
        model = build()
        theta, back = _flat(model)

        def scores(theta: Tensor, model: nn.Module = model, back: Any = back) -> Tensor:
            result: Tensor = functional_call(model, back(theta), (x,)).log_softmax(1)
            return result

        slopes, chances = jacrev(scores)(theta), scores(theta).exp()
        expected = torch.einsum("nk,nki,nkj->ij", chances, slopes, slopes) / 40
        got = Fisher(Problem(model, loss, [(x, LABELS)])).to_dense()
        assert _distance(got, expected) < ROUNDING


# -- ragged batches ----------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_ragged_split_gives_the_matrix_of_all_examples(name: str, weights: Tensor | None) -> None:
    labels = torch.randint(3, (128,), generator=torch.Generator().manual_seed(3))
    labels[:60] = 0  # the parts differ, so that a mean of means would be far off
    data = (_draw(128, 3) + labels[:, None], labels)
    model = Tied()

    def matrix(source: Any, **options: Any) -> Tensor:
        loss = nn.CrossEntropyLoss(weights)
        return OPERATORS[name](Problem(model, loss, source, **options)).to_dense()

    whole = matrix(_cut(data, [128]))
    assert _distance(matrix(_cut(data, [100, 28])), whole) < ROUNDING
    assert _distance(matrix([data], batch_size=7), whole) < ROUNDING
    parts = [matrix(_cut(tuple(t[a:b] for t in data), [b - a])) for a, b in ((0, 100), (100, 128))]
    assert _distance((parts[0] + parts[1]) / 2, whole) > 0.01


def test_step_losses_count_their_own_weight() -> None:
    data = (_draw(128, 3), LABELS.repeat(4)[:128])
    model = Tied()

    def weighted(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        x, y = batch
        return functional.cross_entropy(model(x), y, WEIGHTS), WEIGHTS[y].sum()

    def plain(model: nn.Module, batch: Batch) -> Tensor:
        x, y = batch
        return functional.cross_entropy(model(x), y)

    batches = [tuple(t[:100] for t in data), tuple(t[100:] for t in data)]
    for step, loss in ((weighted, nn.CrossEntropyLoss(WEIGHTS)), (plain, nn.CrossEntropyLoss())):
        problem = Problem(model, StepLoss(step, "step"), batches)
        assert problem.independence.proven
        expected = Hessian(Problem(model, loss, _cut(data, [128]))).to_dense()
        assert _distance(Hessian(problem).to_dense(), expected) < ROUNDING
        for name in ("ggn", "fisher", "empirical-fisher"):
            with pytest.raises(UsageError, match="needs the model's outputs"):
                OPERATORS[name](problem)


def test_per_example_gradients_are_refused_where_there_are_none() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    data = (_draw(40, 3), LABELS)
    with pytest.raises(UsageError, match="per-example gradients do not exist") as caught:
        EmpiricalFisher(Problem(model.train(), "cross_entropy", [data]))
    assert "1 (BatchNorm1d)" in caught.value.got
    EmpiricalFisher(Problem(model.eval(), "cross_entropy", [data])).to_dense()
    whole = FrozenData((data,), (40,), 40, False, "by hand")
    with pytest.raises(UsageError, match="one row an example"):
        EmpiricalFisher(Problem(model.eval(), "cross_entropy", whole))


def test_closed_form() -> None:
    """Least squares: the Hessian is 2 xᵀx / n, whatever the weights, and so is the rest."""
    x = _draw(50, 6)
    problem = Problem(nn.Linear(6, 1, bias=False).double(), "mse", [(x, _draw(50, 1))])
    for kind in (Hessian, GaussNewton):
        assert _distance(kind(problem).to_dense(), 2 / 50 * x.T @ x) < 1e-14


# -- what @ takes and gives --------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> tuple[Operator, Tensor]:
    operator = Hessian(Problem(Tied(), "mse", _cut((_draw(40, 3), GOALS), [30, 10])))
    return operator, operator.to_dense()


def test_arrays_in_arrays_out(small: tuple[Operator, Tensor]) -> None:
    operator, matrix = small
    array = _draw(15, 4).numpy()
    for vectors in (array, array[:, 0], array[::-1], np.asfortranarray(array), array[:, :0]):
        product = operator @ vectors
        assert isinstance(product, np.ndarray)
        assert product.shape == vectors.shape
        np.testing.assert_allclose(product, matrix.numpy() @ vectors, rtol=1e-10, atol=1e-13)
    assert (operator @ array.astype(np.float32)).dtype == np.float32


def test_whole_numbers_give_no_whole_numbers(small: tuple[Operator, Tensor]) -> None:
    operator, matrix = small
    torch.testing.assert_close(operator @ torch.eye(15, dtype=torch.long), matrix)
    np.testing.assert_allclose(operator @ np.eye(15, dtype=int), matrix, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("shape", [(14,), (16, 2), (15, 2, 2), (1, 15), ()])
@pytest.mark.parametrize("array", [False, True])
def test_wrong_shapes(small: tuple[Operator, Tensor], shape: tuple[int, ...], array: bool) -> None:
    vectors: Any = torch.zeros(shape)
    with pytest.raises(UsageError) as caught:
        _ = small[0] @ (vectors.numpy() if array else vectors)
    assert caught.value.what == "the operator is 15 × 15"
    assert str(shape) in caught.value.got


def test_products_are_counted(small: tuple[Operator, Tensor]) -> None:
    operator = Hessian(small[0].problem)
    _ = operator @ _draw(15, 4)
    assert operator.meter.products == pytest.approx(4)
    made, problem = operator.meter.gradients, operator.problem
    vectors = 4 * len(problem.joint()) * problem.vectors(1, 4)
    assert made == pytest.approx(problem.joint_share * (1 + 4 * 2) + vectors)


def test_more_columns_than_are_held_at_once(small: tuple[Operator, Tensor]) -> None:
    operator, matrix = small
    vectors = _draw(15, 2 * operator.block_size + 3)
    torch.testing.assert_close(operator @ vectors, matrix @ vectors, rtol=1e-10, atol=1e-12)
