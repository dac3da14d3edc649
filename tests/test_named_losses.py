"""What a named loss is of, as the model's outputs and the data show it, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import hesscli
from hesscli.errors import InputError, UnsoundError, UsageError
from hesscli.operators.hessian import Residual
from hesscli.problem.batches import first_rows
from hesscli.problem.criteria import as_loss
from hesscli.problem.problem import Problem

N, K = 24, 3
ROUNDING = 1e-11


def _draw(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


X = _draw(N, 4)
LABELS = torch.randint(K, (N,), generator=torch.Generator().manual_seed(2))


class Ends(nn.Module):
    """A linear layer, and whatever is done to its outputs."""

    def __init__(self, end: Callable[[Tensor], Tensor], hidden: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 4), hidden) if hidden else nn.Identity()
        self.head, self.end = nn.Linear(4, K), end
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.head(self.body(x)))


def _truth(model: nn.Module, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Dense Hessian by double backward of the objective itself."""
    tensors = list(model.parameters())
    slope = torch.autograd.grad(loss(model(X)), tensors, create_graph=True)
    flat = torch.cat([part.reshape(-1) for part in slope])
    if not flat.requires_grad:
        return torch.zeros(len(flat), len(flat), dtype=flat.dtype)
    rows = []
    for entry in flat:
        parts = torch.autograd.grad(
            entry, tensors, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows)


# -- nll ---------------------------------------------------------------------------------------

LOG_PROBABILITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "log-softmax": lambda x: x.log_softmax(1),
    "log of softmax": lambda x: x.softmax(1).log(),
    "by hand": lambda x: x - x.logsumexp(1, keepdim=True),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "raw": lambda x: x,
    "twice": lambda x: 2 * x.log_softmax(1),
    "probabilities": lambda x: x.softmax(1),
    "sigmoids": functional.logsigmoid,
    "over the batch": lambda x: x.log_softmax(1) + 0.1,
}


@pytest.mark.parametrize("name", LOG_PROBABILITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nll_of_log_probabilities_is_cross_entropy(name: str, dtype: torch.dtype) -> None:
    model, data = Ends(LOG_PROBABILITIES[name]), [(X.to(dtype), LABELS)]
    truth = _truth(model, lambda out: functional.nll_loss(out, LABELS))
    problem = Problem(model.to(dtype), "nll", data)
    rounding = ROUNDING if dtype == torch.float64 else 1e-5
    for matrix in (hesscli.Hessian, hesscli.GaussNewton, hesscli.Fisher):
        found = matrix(problem).to_dense()
        torch.testing.assert_close(found, truth, rtol=rounding, atol=rounding)
    assert problem.warnings == ()
    assert hesscli.trace(problem, matrix="ggn").status == "exact"


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("hidden", [None, nn.Tanh()], ids=["linear", "tanh"])
def test_nll_of_anything_else_is_linear_in_it(name: str, hidden: nn.Module | None) -> None:
    model = Ends(OTHERS[name], hidden)
    truth = _truth(model, lambda out: functional.nll_loss(out, LABELS))
    problem = Problem(model, "nll", [(X, LABELS)])
    whole = hesscli.Hessian(problem).to_dense()
    torch.testing.assert_close(whole, truth, rtol=ROUNDING, atol=ROUNDING)
    assert not hesscli.GaussNewton(problem).to_dense().any()
    (warning,) = problem.warnings
    assert "no log-probabilities" in warning
    with pytest.raises(UsageError, match="fisher needs a distribution"):
        hesscli.Fisher(problem)
    if name == "raw":
        result = hesscli.trace(problem, probes=2)
        assert result.trace.gauss_newton == 0
        assert warning in result.warnings


@pytest.mark.parametrize("name", LOG_PROBABILITIES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_last_log_softmax_leaves_cross_entropy_exact(name: str, reduction: str) -> None:
    """Its log-sum-exp has the weights p − y, which sum to zero: R is that of the logits."""
    model = Ends(LOG_PROBABILITIES[name], nn.ReLU())
    truth = _truth(model, lambda out: functional.nll_loss(out, LABELS, reduction=reduction))
    for loss in ("nll", "cross_entropy"):
        result = hesscli.trace(Problem(model, loss, [(X, LABELS)], reduction=reduction), probes=2)
        if name == "by hand":
            assert result.status != "exact"  # no such operation is seen
            continue
        assert result.status == "exact"
        assert result.trace.estimate == pytest.approx(float(truth.trace()), rel=ROUNDING)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_another_normalisation_is_curved(loss: str) -> None:
    """Over another dimension than the classes, or under another loss, nothing cancels."""
    dim = 1 if loss == "mse" else 2
    model = Ends(lambda x: torch.stack([x, 2 * x.relu()], 2).log_softmax(dim))
    labels = _draw(N, K, 2) if loss == "mse" else LABELS[:, None].expand(N, 2)
    assert hesscli.trace(Problem(model, loss, [(X, labels)]), probes=2).status != "exact"


def test_tokens_are_normalised_over_the_vocabulary() -> None:
    tokens = torch.randint(7, (N, 5), generator=torch.Generator().manual_seed(3))
    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7), nn.LogSoftmax(-1)).double()
    data = [(tokens[:, :-1], tokens[:, 1:])]
    assert hesscli.trace(Problem(model, "language_model", data), method="split").status == "exact"


def test_ggn_of_a_linear_loss_is_exactly_its_weight_decay() -> None:
    problem = Problem(Ends(OTHERS["raw"]), nn.NLLLoss(), [(X, LABELS)], weight_decay=0.5)
    result = hesscli.trace(problem, matrix="ggn")
    assert result.status == "exact"
    assert result.trace.estimate == pytest.approx(0.5 * problem.parameters.size, rel=ROUNDING)
    assert any("Gauss-Newton matrix is zero" in warning for warning in result.warnings)


def test_log_probabilities_by_chance_are_none() -> None:
    """A head of zeros whose biases are log 1/K: right at these weights, and nowhere near them."""
    model = Ends(lambda x: x)
    nn.init.zeros_(model.head.weight)
    nn.init.constant_(model.head.bias, -float(torch.tensor(K).double().log()))
    assert len(Problem(model, "nll", [(X, LABELS)]).warnings) == 1


def test_log_probabilities_of_some_examples_alone_are_refused() -> None:
    def end(x: Tensor) -> Tensor:
        return torch.where(x.abs().amax(1, keepdim=True) > 10, x, x.log_softmax(1))

    rows = torch.zeros(64, 4, dtype=torch.float64)
    rows[-1] = 100.0
    batch = (rows, torch.zeros(64, dtype=torch.long))
    loss = as_loss("nll").settled(Ends(end), [first_rows(batch, 8)])
    with pytest.raises(UnsoundError, match="some examples and not of others"):
        loss.check(loss.outputs(Ends(end), batch), batch)


# -- what is said ------------------------------------------------------------------------------


def test_probabilities_under_cross_entropy_are_told() -> None:
    for name, shape in (("cross_entropy", (N, 4)), ("language_model", (N, 2, 4))):
        model = nn.Sequential(nn.Linear(4, K), nn.Softmax(-1)).double()
        labels = LABELS if len(shape) == 2 else LABELS[:, None].expand(N, 2)
        problem = Problem(model, name, [(_draw(*shape), labels)])
        assert len(problem.warnings) == 1
        assert "probabilities already" in problem.warnings[0]
        raw = Problem(model[0], name, [(_draw(*shape), labels)])
        assert raw.warnings == ()


@pytest.mark.parametrize("masked", [False, True])
def test_labels_that_nobody_shifted_are_told(masked: bool) -> None:
    tokens = torch.randint(7, (N, 5), generator=torch.Generator().manual_seed(3))
    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7)).double()
    labels = tokens.where(torch.arange(5) < 3, -100) if masked else tokens.clone()
    (warning,) = Problem(model, "language_model", [(tokens, labels)]).warnings
    assert "labels equal the inputs" in warning
    assert Problem(model, "language_model", [(tokens[:, :-1], tokens[:, 1:])]).warnings == ()


def test_bce_is_of_probabilities() -> None:
    targets = (_draw(N, K, seed=4) > 0).double()
    model = Ends(torch.sigmoid)
    truth = _truth(model, lambda out: functional.binary_cross_entropy(out, targets))
    problem = Problem(model, "bce", [(X, targets)])
    whole = hesscli.Hessian(problem).to_dense()
    torch.testing.assert_close(whole, truth, rtol=ROUNDING, atol=ROUNDING)
    gauss_newton = hesscli.GaussNewton(problem).to_dense()
    split = gauss_newton + Residual(problem).to_dense()
    torch.testing.assert_close(split, truth, rtol=ROUNDING, atol=ROUNDING)
    trace = hesscli.trace(problem, matrix="ggn")
    assert trace.status == "exact"
    assert trace.trace.estimate == pytest.approx(float(gauss_newton.trace()), rel=ROUNDING)
    with pytest.raises(UsageError, match="fisher needs a distribution"):
        hesscli.Fisher(problem)


# -- torch's criteria in a spec ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (
            'factory = "torch.nn:CrossEntropyLoss"\nkwargs = { weight = [0.1, 2, 3] }',
            lambda f, y, w: functional.cross_entropy(f, y, w),
        ),
        (
            'factory = "torch.nn.functional:cross_entropy"\nkwargs = { weight = [0.1, 2, 3] }',
            lambda f, y, w: functional.cross_entropy(f, y, w),
        ),
        (
            'factory = "torch.nn:MultiMarginLoss"\nkwargs = { weight = [0.1, 2, 3] }',
            lambda f, y, w: functional.multi_margin_loss(f, y, weight=w),
        ),
    ],
)
def test_weights_of_torchs_criteria_in_a_spec(
    loss: str, expected: Callable[[Tensor, Tensor, Tensor], Tensor], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, K)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    (tmp_path / "rows.py").write_text(
        "import torch\n"
        "def rows():\n"
        "    torch.manual_seed(1)\n"
        "    return [(torch.randn(24, 4), torch.arange(24) % 3)]\n"
    )
    (tmp_path / "hesscli.toml").write_text(
        '[model]\nfactory = "torch.nn:Linear"\nkwargs = { in_features = 4, out_features = 3 }\n'
        f'[data]\nfactory = "rows:rows"\n[loss]\n{loss}\n'
    )
    problem = hesscli.load(tmp_path / "model.pt", spec=tmp_path / "hesscli.toml")
    torch.manual_seed(1)
    x, weight = torch.randn(24, 4), torch.tensor([0.1, 2, 3])
    value = expected(model(x), torch.arange(24) % 3, weight)
    assert problem.prove().loss == pytest.approx(float(value.detach()), rel=1e-6)


def test_next_tokens_are_told_the_loss_that_they_are_for() -> None:
    """Classes may have positions too, as those of pixels do, but then come before them."""
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    tokens = torch.randint(7, (6, 5))
    with pytest.raises(InputError, match=r"targets of shape \(N, 7\)") as refused:
        Problem(model, "cross_entropy", (tokens, tokens))
    assert refused.value.hint.startswith("language_model")
    assert Problem(model, "language_model", (tokens, tokens)).data.count == 6


def test_one_line_tells_of_training_mode_and_of_warnings() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    data = torch.randn(16, 3), torch.randint(2, (16,))
    assert ", in training mode, " in str(hesscli.trace(Problem(model, "cross_entropy", data)))
    assert "training mode" not in str(hesscli.trace(Problem(model.eval(), "cross_entropy", data)))
