"""Rows of a window: their mean outer product is the matrix that their kind promises."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hesscli
from hesscli.errors import UnsoundError, UsageError
from hesscli.meter import Meter
from hesscli.operators.per_example.rows import Rows, fitting_kind
from hesscli.operators.products import flatten, gradient
from hesscli.problem.batches import rows as rows_of_batch
from hesscli.vocabulary import RowKind

SAMPLES = Path(__file__).parents[1] / "samples"


def rows(problem: hesscli.Problem, kind: str, count: int, seed: int = 0) -> Tensor:
    return torch.cat(list(Rows(problem, RowKind.parse(kind), seed).take(count))).double()


def classifier(*, batch_size: int = 10, weights: list[float] | None = None) -> hesscli.Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    data = torch.utils.data.TensorDataset(
        torch.randn(64, 5, dtype=torch.float64), torch.randint(3, (64,))
    )
    given = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    return hesscli.Problem(model, nn.CrossEntropyLoss(given), data, batch_size=batch_size)


@pytest.mark.parametrize("weights", [None, [1.0, 4.0, 0.25]])
def test_the_rows_of_all_examples_are_the_empirical_fisher_matrix(
    weights: list[float] | None,
) -> None:
    problem = classifier(weights=weights)
    found = rows(problem, "example", 1000)
    assert len(found) == 64
    dense = hesscli.EmpiricalFisher(problem).to_dense()
    # Float64 sums of 64 products.
    torch.testing.assert_close(found.T @ found / 64, dense, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weights", [None, [1.0, 4.0, 0.25]])
def test_sampled_rows_are_unbiased_for_the_gauss_newton_matrix(
    weights: list[float] | None,
) -> None:
    problem = classifier(weights=weights)
    dense = hesscli.GaussNewton(problem).to_dense()
    passes = 60
    found = rows(problem, "sampled", 64 * passes).view(passes, 64, -1)
    torch.manual_seed(1)
    directions = torch.randn(dense.shape[0], 8, dtype=torch.float64)
    forms = (found @ directions).square().mean(1)  # of each pass over all examples
    truth = (directions * (dense @ directions)).sum(0)
    error = forms.std(0) / math.sqrt(passes)
    # Eight two-sided t-tests with 59 degrees, 1e-3 in all.
    assert ((forms.mean(0) - truth).abs() < 4.1 * error).all()


def test_sampled_rows_of_a_language_model_sum_over_tokens() -> None:
    problem = hesscli.load(SAMPLES / "text/model.safetensors", examples="16")
    passes = 6
    found = rows(problem, "sampled", 16 * passes).view(passes, 16, -1)
    squares = found.square().sum(2).mean(1)
    exact = hesscli.trace(problem, matrix="ggn", probes=8)
    error = math.hypot(float(squares.std()) / math.sqrt(passes), exact.trace.label_stderr or 0.0)
    assert abs(float(squares.mean()) - exact.trace.estimate) < 4.5 * error  # t with 5 degrees: 0.6%


def test_microbatches_are_gradients_of_their_own_mean() -> None:
    problem = classifier(batch_size=10)
    found = list(Rows(problem, RowKind.parse("microbatch:4")).take(1000))
    batch = problem.batch(0)
    data = rows_of_batch(batch.data, 0, 4)
    expected = flatten(gradient(problem.evaluate(data), problem.parameters.tensors))
    torch.testing.assert_close(found[0][0], expected, rtol=1e-12, atol=1e-14)
    counts = problem.data.counts
    assert len(found) == sum(math.ceil(count / 4) for count in counts)


def test_the_first_rows_are_the_same_however_many_are_taken() -> None:
    problem = classifier()
    for kind in ("sampled", "example", "microbatch:3"):
        torch.testing.assert_close(rows(problem, kind, 7), rows(problem, kind, 20)[:7])


@pytest.mark.parametrize("kind", ["sampled", "example", "microbatch:3"])
def test_blocks_are_small_and_rows_go_on_from_any_of_them(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = classifier(batch_size=24)
    bytes_each = 8 * problem.parameters.size
    monkeypatch.setattr("hesscli.operators.per_example.rows.BLOCK_BYTES", 6 * bytes_each)
    whole, end = Meter(), 90
    blocks = list(Rows(problem, RowKind.parse(kind), meter=whole).take(end))
    assert max(block.nbytes for block in blocks) <= 6 * bytes_each
    starts = [0, *itertools.accumulate(map(len, blocks))]
    for start in starts[1:]:
        before, after = Meter(), Meter()
        list(Rows(problem, RowKind.parse(kind), meter=before).take(start))
        rest = list(Rows(problem, RowKind.parse(kind), meter=after).take(end, start))
        assert before.gradients + after.gradients == pytest.approx(whole.gradients)
        torch.testing.assert_close(
            torch.cat([blocks[0][:0], *rest]), torch.cat(blocks)[start:], rtol=1e-12, atol=1e-14
        )


def test_seeds_draw_other_columns_and_passes_other_rows() -> None:
    problem = classifier()
    one = rows(problem, "sampled", 128)
    assert not torch.equal(one, rows(problem, "sampled", 128, seed=1))
    assert not torch.allclose(one[:64], one[64:])
    assert torch.equal(one, rows(problem, "sampled", 128))


def test_coupled_examples_have_no_rows_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    data = torch.utils.data.TensorDataset(torch.randn(64, 3), torch.randint(2, (64,)))
    problem = hesscli.Problem(model, "cross_entropy", data, batch_size=16)
    with pytest.raises(UsageError, match="BatchNorm1d"):
        Rows(problem, RowKind("sampled"))
    kind, reason = fitting_kind(problem)
    assert kind == RowKind("microbatch", 16)
    assert "1 (BatchNorm1d)" in reason


class Mixer(nn.Module):
    """Subtracts the batch's mean, but only of batches as the rows are made from."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return (y - y.mean(0) if len(x) == 4 else y).tanh()


def test_secretly_mixed_examples_are_found_out() -> None:
    data = torch.utils.data.TensorDataset(torch.randn(64, 3), torch.randint(2, (64,)))
    problem = hesscli.Problem(Mixer(), "cross_entropy", data)
    assert problem.independence.proven
    assert problem.data.counts == (4,) * 16
    with pytest.raises(UnsoundError, match="do not add up") as caught:
        list(Rows(problem, RowKind("example")).take(8))
    assert "--rows microbatch:N" in caught.value.hint


def test_a_loss_without_a_known_hessian_falls_back_to_examples() -> None:
    data = torch.utils.data.TensorDataset(torch.randn(64, 3), torch.randint(2, (64,)))

    def odd(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[range(len(targets)), targets].tanh()).mean()

    problem = hesscli.Problem(nn.Linear(3, 2), odd, data)
    assert fitting_kind(problem)[0] == RowKind("example")
    with pytest.raises(UsageError, match="--rows example"):
        Rows(problem, RowKind("sampled"))
    assert len(rows(problem, "example", 9)) == 9


@pytest.mark.parametrize("text", ["", "samples", "microbatch", "microbatch:0", "microbatch:x"])
def test_other_kinds_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="microbatch:N"):
        RowKind.parse(text)
