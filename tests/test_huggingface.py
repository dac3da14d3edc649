"""Losses that models compute themselves: labels are read and weighed as the model reads them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import hesscli
from hesscli.errors import InputError, UsageError
from hesscli.operators.hessian import Residual
from hesscli.problem.batches import Batch, rows
from hesscli.problem.huggingface import UNEXPLAINED, HuggingFace
from hesscli.problem.problem import Problem

ROUNDING = 1e-12
N, T, V, K = 18, 5, 6, 4


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _whole(*shape: int, of: int = K, seed: int = 2) -> Tensor:
    return torch.randint(of, shape, generator=torch.Generator().manual_seed(seed))


class Tokens(nn.Module):
    """A class for each token, of labels that ``shift`` moves; −100 is ignored."""

    def __init__(self, shift: int = 0, extra: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(V, 3).double(), nn.Linear(3, K).double()
        self.shift, self.extra = shift, extra

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Any) -> SimpleNamespace:
        logits = self.head(self.table(input_ids).tanh())
        kept = logits[:, : logits.shape[1] - self.shift].transpose(1, 2)
        loss = functional.cross_entropy(kept, labels[:, self.shift :])
        loss = loss + self.extra * self.table.weight.square().sum()
        return SimpleNamespace(loss=loss, logits=logits)


class Decoder(Tokens):
    """Begins each answer with a token of its own and moves its inputs, so that no label is lost."""

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Any) -> SimpleNamespace:
        begun = functional.pad(labels.clamp(min=0)[:, :-1], (1, 0))
        read = self.table(input_ids).mean(1, keepdim=True)
        logits = self.head((self.table(begun) + read).tanh())
        loss = functional.cross_entropy(logits.transpose(1, 2), labels)
        return SimpleNamespace(loss=loss, logits=logits)


class Rows(nn.Module):
    """One answer an example, by a loss of its own."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.loss = nn.Linear(3, K).double(), loss

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(x)
        return {"loss": self.loss(logits, labels), "logits": logits}


def _ragged(first: int = 1) -> Tensor:
    """Labels of which the last ones are ignored, more or fewer of them."""
    labels = _whole(N, T)
    for i in range(N):
        labels[i, first + i % T :] = -100
    return labels


def _only_first() -> Tensor:
    labels = torch.full((N, T), -100)
    labels[:, 0] = _whole(N)
    return labels


def _scattered() -> Tensor:
    return _whole(N, T).where(_draw(N, T) < 0, -100)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels.flatten())


X, IDS = _draw(N, 3), _whole(N, T, of=V, seed=3)

# A model, its batch, and its labels that count.
CASES: dict[str, tuple[nn.Module, dict[str, Tensor], int]] = {
    "causal": (
        Tokens(1),
        {"input_ids": IDS, "labels": _ragged(2)},
        int((_ragged(2) >= 0).sum()) - N,
    ),
    "token classes": (
        Tokens(),
        {"input_ids": IDS, "labels": _ragged()},
        int((_ragged() >= 0).sum()),
    ),
    "masked": (
        Tokens(),
        {"input_ids": IDS, "labels": _scattered(), "attention_mask": torch.ones(N, T)},
        int((_scattered() >= 0).sum()),
    ),
    "the first token alone": (Tokens(), {"input_ids": IDS, "labels": _only_first()}, N),
    "decoder": (Decoder(), {"input_ids": IDS, "labels": _ragged()}, int((_ragged() >= 0).sum())),
    "classes": (Rows(_cross_entropy), {"x": X, "labels": _whole(N)}, N),
    "a column of classes": (Rows(_cross_entropy), {"x": X, "labels": _whole(N, 1)}, N),
}


@pytest.mark.parametrize("name", CASES)
def test_batches_weigh_as_the_model_reads_its_labels(name: str) -> None:
    model, batch, mass = CASES[name]
    own = model(**batch)
    own = own["loss"] if isinstance(own, dict) else own.loss
    cut = [rows(batch, *ends) for ends in ((0, 4), (4, 13), (13, N))]
    problem = Problem(model, "huggingface", cut, batch_size=9)
    assert problem.total_weight == mass
    assert problem.hidden_outputs is None
    assert problem.prove().warnings == ()
    assert problem.prove().accuracy is not None
    assert problem.prove().loss == pytest.approx(float(own.detach()), rel=ROUNDING)
    vectors = _draw(problem.parameters.size, 2)
    whole = hesscli.Hessian(Problem(model, "huggingface", [batch])) @ vectors
    parts = hesscli.GaussNewton(problem) @ vectors + Residual(problem) @ vectors
    torch.testing.assert_close(parts, whole, rtol=ROUNDING, atol=ROUNDING)


def test_values_that_do_not_tell_readings_apart() -> None:
    """An untrained head of zeros: every label costs log K, and only slopes say which count."""
    model, batch, mass = CASES["masked"]
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    assert Problem(model, "huggingface", [batch]).total_weight == mass


OTHERS: dict[str, tuple[nn.Module, Batch]] = {
    "a router's own loss": (Tokens(1, 1e-3), {"input_ids": IDS, "labels": _whole(N, T)}),
    "numbers": (Rows(functional.mse_loss), {"x": X, "labels": _draw(N, K)}),
    "many labels each": (
        Rows(functional.binary_cross_entropy_with_logits),
        {"x": X, "labels": _whole(N, K, of=2).double()},
    ),
    "smoothed": (
        Rows(lambda f, y: functional.cross_entropy(f, y, label_smoothing=0.1)),
        {"x": X, "labels": _whole(N)},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_models_own_loss_that_is_another(name: str) -> None:
    """The loss stays the model's, examples count, and what needs outputs is refused."""
    model, batch = OTHERS[name]
    problem = Problem(model, "huggingface", [batch])
    own = model(**batch)
    own = own["loss"] if isinstance(own, dict) else own.loss
    assert problem.prove().loss == pytest.approx(float(own.detach()), rel=ROUNDING)
    assert problem.total_weight == N
    for matrix in (hesscli.GaussNewton, hesscli.Fisher, hesscli.EmpiricalFisher):
        with pytest.raises(UsageError) as caught:
            matrix(problem)
        assert f"--matrix {matrix.name} needs" in caught.value.what
        assert caught.value.got == UNEXPLAINED
    proof = problem.prove()
    assert proof.accuracy is None
    assert len(proof.warnings) == 1
    assert UNEXPLAINED in proof.warnings[0]
    assert proof.warnings[0] in hesscli.trace(problem, probes=2).warnings


def test_a_reading_that_later_batches_break_is_hidden() -> None:
    """Four batches choose the reading, and all of them are put to the test."""

    class Late(Tokens):
        def forward(self, input_ids: Tensor, labels: Tensor, **_: Any) -> SimpleNamespace:
            self.shift = int(input_ids[0, 0] == V - 1)
            return super().forward(input_ids, labels)

    batches = []
    for i in range(6):
        ids = _whole(2, T, of=V - 1, seed=i)
        ids[0, 0] = V - 1 if i == 5 else 0
        batches.append({"input_ids": ids, "labels": _whole(2, T, seed=9 + i)})
    problem = Problem(Late(), "huggingface", batches, examples="first:12", batch_size=2)
    assert problem.hidden_outputs is not None
    assert len(problem.prove().warnings) == 1


def test_logits_are_those_that_output_names() -> None:
    class Named(Rows):
        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            made = super().forward(x, labels)
            return {"loss": made["loss"], "scores": made["logits"], "twice": 2 * made["logits"]}

    batch = {"x": X, "labels": _whole(N)}
    problem = Problem(Named(_cross_entropy), "huggingface", [batch], output="scores")
    assert problem.hidden_outputs is None
    assert (
        Problem(Named(_cross_entropy), "huggingface", [batch], output="twice").hidden_outputs
        == UNEXPLAINED
    )


def test_what_is_no_such_model_or_batch_is_refused() -> None:
    batch = {"x": X, "labels": _whole(N)}
    model, loss = nn.Linear(3, 2).double(), HuggingFace()
    with pytest.raises(InputError, match="returned no loss"):
        loss.evaluate(lambda **_: SimpleNamespace(logits=X), batch)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="dicts with 'labels'"):
        Problem(model, loss, [(X, _whole(N))])


def test_classifiers_count_examples() -> None:
    batch = {"labels": torch.tensor([0, 2, -100])}
    assert HuggingFace().masses(batch).tolist() == [1, 1, 0]
    right, of = HuggingFace().correct(torch.eye(3), batch)  # type: ignore[misc]
    assert (int(right), int(of)) == (1, 2)
