"""Forms in which people have data: the same examples in each, or a refusal that says what to write.

Truth is the loss over all rows as torch itself computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

import hesscli
from hesscli.errors import InputError
from hesscli.problem.losses import StepLoss
from hesscli.problem.problem import Problem

GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(20, 4, generator=GENERATOR)
Y = torch.randint(0, 3, (20,), generator=GENERATOR)
IDS = torch.randint(0, 7, (20, 5), generator=GENERATOR)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(torch.tanh(self.table(input_ids)).mean(1))
        if labels is None:
            return logits
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


class Rows:
    """Like a data set of a hub: dicts of plain numbers and lists, by whole numbers."""

    def __init__(self, make: Callable[[int], Any], count: int = 20) -> None:
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        assert type(index) is int
        return self.make(index)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(zip(X, Y, strict=True))


VECTORS: dict[str, Any] = {
    "arrays": (X.numpy(), Y.numpy()),
    "tensors": (X, Y),
    "pairs of tensors": list(zip(X, Y, strict=True)),
    "pairs with numbers": [(x, int(y)) for x, y in zip(X, Y, strict=True)],
    "pairs of arrays and numbers": [(x.numpy(), y.numpy()) for x, y in zip(X, Y, strict=True)],
    "lists of numbers": [[x.tolist(), int(y)] for x, y in zip(X, Y, strict=True)],
    "dicts": [{"x": x, "label": y} for x, y in zip(X, Y, strict=True)],
    "rows by number": Rows(lambda i: {"x": X[i].tolist(), "y": int(Y[i])}),
    "a loader of a list": DataLoader(list(zip(X, Y, strict=True)), batch_size=6, shuffle=True),  # type: ignore[arg-type]
    "listed batches": [(X[:13], Y[:13]), (X[13:], Y[13:])],
    "batches of one": [(X[i : i + 1], Y[i : i + 1]) for i in range(20)],
    "a data set": TensorDataset(X, Y),
    "a loader of a stream": DataLoader(Stream(), batch_size=6),
}


@pytest.mark.parametrize("form", VECTORS)
def test_every_form_is_the_same_problem(form: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    problem = Problem(model, "cross_entropy", VECTORS[form])
    assert problem.data.count == problem.data.available == 20
    assert problem.separable
    assert problem.warnings == ()
    expected = float(functional.cross_entropy(model(X), Y).detach())
    assert problem.prove().loss == pytest.approx(expected, rel=20 * 2**-23)
    # No example is lost or taken twice, and each keeps its own label.
    labels = {tuple(row.tolist()): int(y) for row, y in zip(X, Y, strict=True)}
    for batch in problem.data.batches:
        x, y = batch.values() if isinstance(batch, dict) else batch
        for row, label in zip(x, y, strict=True):
            assert labels.pop(tuple(row.float().tolist())) == int(label)
    assert not labels


@pytest.mark.parametrize("loss", ["cross_entropy", "huggingface"])
@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("make", [lambda row: row.tolist(), lambda row: row])
def test_rows_of_tokens(loss: str, as_list: bool, make: Callable[[Tensor], Any]) -> None:
    def row(i: int) -> dict[str, Any]:
        return {"input_ids": make(IDS[i]), "labels": int(Y[i])}

    torch.manual_seed(0)
    model = Tokens()
    data = [row(i) for i in range(20)] if as_list else Rows(row)
    problem = Problem(model, loss, data)
    expected = float(functional.cross_entropy(model(IDS), Y).detach())
    assert problem.data.count == 20
    assert problem.prove().loss == pytest.approx(expected, rel=20 * 2**-23)


def test_a_label_for_each_token_of_plain_rows() -> None:
    data = [{"input_ids": ids.tolist(), "labels": (ids % 3).tolist()} for ids in IDS]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 3), nn.Flatten(2))

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(outputs.flatten(0, 1), labels.flatten())

    problem = Problem(model, loss, data)
    assert problem.data.count == 20
    expected = float(loss(model(IDS), IDS % 3).detach())
    assert problem.prove().loss == pytest.approx(expected, rel=100 * 2**-23)


def test_sequences_in_a_list_are_not_shuffled_step_by_step() -> None:
    """Each is a batch as it came, or its steps would be fed in another order."""
    sequences = [(torch.randn(5, 4), torch.randint(0, 3, (5,))) for _ in range(6)]

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.RNN(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.rnn(x)[0])
            return out

    model = Recurrent()
    problem = Problem(model, "cross_entropy", sequences)
    assert problem.couples_examples is not None
    terms = [functional.cross_entropy(model(x), y) for x, y in sequences]
    expected = float(torch.stack(terms).mean().detach())
    assert problem.prove().loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_list_of_vectors_and_their_targets_holds_examples(reduction: str) -> None:
    targets = X @ torch.randn(4, 3, generator=GENERATOR)
    model = nn.Linear(4, 3)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.mse_loss(outputs, targets, reduction=reduction)

    problem = Problem(model, loss, list(zip(X, targets, strict=True)))
    assert problem.data.count == 20
    expected = float(loss(model(X), targets).detach())
    assert problem.prove().loss == pytest.approx(expected, rel=100 * 2**-23)


def test_a_sum_that_cannot_be_seen_is_not_passed_over() -> None:
    """Each batch is one cloud of points, of another size: nothing shows mean or sum."""
    data = [(torch.randn(3 + i, 4), torch.randn(3)) for i in range(5)]

    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.linear(x).sum(0)
            return out

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum()

    assert any("a mean or a sum" in text for text in Problem(Pool(), loss, data).warnings)
    said = Problem(Pool(), loss, data, reduction="sum")
    assert not any("mean or a sum" in text for text in said.warnings)
    model = said.model
    expected = sum(float(loss(model(x), t).detach()) for x, t in data)
    assert said.prove().loss == pytest.approx(expected, rel=1e-5)


def test_time_first_batches_count_examples_and_stay_whole() -> None:
    rows = [(torch.randn(2 + i % 4, 4), torch.randint(0, 3, (2 + i % 4,))) for i in range(12)]

    def collate(items: list[Any]) -> tuple[Tensor, Tensor]:
        pad = nn.utils.rnn.pad_sequence
        return pad([x for x, _ in items]), pad([y for _, y in items], padding_value=-100)

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(outputs.flatten(0, 1), labels.flatten())

    loader = DataLoader(rows, batch_size=8, collate_fn=collate)  # type: ignore[arg-type]
    problem = Problem(nn.Linear(4, 3), loss, loader)
    assert problem.data.counts == (8, 4)
    assert problem.masses == [8, 4]
    assert not problem.data.sliceable


def test_a_collate_function_of_ones_own() -> None:
    ragged = [(torch.randn(1 + i % 3, 4), int(Y[i])) for i in range(20)]

    def collate(items: list[Any]) -> tuple[Tensor, Tensor]:
        xs, ys = zip(*items, strict=True)
        return nn.utils.rnn.pad_sequence(list(xs), batch_first=True).sum(1), torch.tensor(ys)

    model = nn.Linear(4, 3)
    expected = functional.cross_entropy(model(torch.stack([x.sum(0) for x, _ in ragged])), Y)
    for data in (ragged, Rows(lambda i: ragged[i]), iter(ragged)):
        problem = Problem(model, "cross_entropy", data, collate=collate)
        assert problem.data.count == 20
        assert problem.prove().loss == pytest.approx(float(expected.detach()), rel=1e-5)
    with pytest.raises(InputError) as caught:
        Problem(model, "cross_entropy", ragged)
    assert caught.value.what == "the examples cannot be put together into a batch"
    assert "collate" in caught.value.hint


def test_a_step_gets_listed_batches_as_they_are() -> None:
    """Whatever is in them: what looks like an example may be the step's own batch."""
    seen: list[Any] = []

    def step(model: nn.Module, batch: Any) -> Tensor:
        seen.append(batch)
        x, scale = batch
        out: Tensor = model(x).square().mean() * scale
        return out

    data = [(X[:10], torch.tensor(2.0)), (X[10:], torch.tensor(3.0))]
    problem = Problem(nn.Linear(4, 3), StepLoss(step, "step"), data)
    assert problem.data.counts == (10, 10)
    assert all(x.shape == (10, 4) and scale.shape == () for x, scale in seen)


@pytest.mark.parametrize(
    ("data", "what", "hint"),
    [
        ([(X.to_sparse(), Y)], "a batch holds a sparse tensor", "to_dense"),
        ((X, Y[:19]), "as many rows each", "one row an example"),
        (
            Rows(lambda i: {"input_ids": [1] * (1 + i), "labels": 0}),
            "cannot be put together",
            "pad",
        ),
        (Rows(lambda i: {"text": "a", "label": "b"}), "a batch holds no tensor", "collate"),
        ([object()], "a batch holds no tensor", "tuples, lists or dicts"),
    ],
)
def test_what_has_to_be_collated_is_refused(data: Any, what: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        Problem(nn.Linear(4, 3), "cross_entropy", data)
    assert what in caught.value.what
    assert hint in caught.value.hint


def test_a_list_that_is_no_list_of_batches_is_sent_to_a_loader() -> None:
    """Such pairs of tensors could be batches of some model; they are none of this one."""
    y = torch.rand(20, 5)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(20, y.shape[1]))
    data = list(zip(IDS, y, strict=True))
    with pytest.raises(InputError, match="the model or its loss raised") as caught:
        Problem(model, "bce_with_logits", data).prove()
    assert "DataLoader" in caught.value.hint
    loader = DataLoader(data, batch_size=32)
    assert Problem(model, "bce_with_logits", loader).data.count == 20
    with pytest.raises(InputError, match="the model or its loss raised") as caught:
        Problem(nn.Linear(9, 3), "bce_with_logits", loader)
    assert "DataLoader" not in caught.value.hint


@pytest.mark.parametrize("noise", [0.0, 1e-3])
@pytest.mark.parametrize("sampled", [False, True])
def test_examples_that_change_are_said_to(noise: float, sampled: bool) -> None:
    data: Any = Rows(lambda i: (X[i] + noise * torch.randn(4), int(Y[i])))
    if sampled:
        data = DataLoader(data, batch_size=5, sampler=SubsetRandomSampler(range(20)))
    problem = Problem(nn.Linear(4, 3), "cross_entropy", data)
    assert problem.data.changing == (noise > 0)
    result = hesscli.trace(problem)
    assert any("random augmentation" in warning for warning in result.warnings) == (noise > 0)
