"""The examples on which products are put to the test: from where they come, and their weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hesscli.problem.freezing import FrozenData
from hesscli.problem.losses import StepLoss
from hesscli.problem.objective import Sample
from hesscli.problem.problem import Problem


def numbered(first: int, count: int, width: int = 4) -> Tensor:
    """Rows that begin with their number."""
    x = torch.randn(count, width)
    x[:, 0] = torch.arange(first, first + count)
    return x


def frozen(batches: list[tuple[Tensor, Tensor]]) -> FrozenData:
    counts = tuple(len(x) for x, _ in batches)
    return FrozenData(tuple(batches), counts, sum(counts), sliceable=True, sha256="")


def labels(count: int) -> Tensor:
    return torch.randint(0, 3, (count,))


def problem_of(sizes: list[int]) -> Problem:
    torch.manual_seed(0)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    batches = [(numbered(a, n), labels(n)) for a, n in zip(starts, sizes, strict=True)]
    return Problem(nn.Linear(4, 3), "cross_entropy", frozen(batches))


def numbers(sample: Sample) -> list[int]:
    return [int(row[0]) for batch in sample.batches() for row in batch.data[0]]


@pytest.mark.parametrize("count", [1, 4, 8, 16, 24, 64])
def test_rows_come_evenly_from_all_batches(count: int) -> None:
    sample = Sample.of(problem_of([4] * 16), count)
    rows = numbers(sample)
    assert len(set(rows)) == len(rows) == count
    batches = {row // 4 for row in rows}
    assert len(batches) == min(count, 16)
    gaps = torch.tensor(sorted(batches)).diff()
    assert not len(gaps) or gaps.max() - gaps.min() <= 1


def test_small_problems_are_taken_whole() -> None:
    problem = problem_of([1] * 10)
    sample = Sample.of(problem, 64)
    assert numbers(sample) == list(range(10))
    loss = sum(b.weight * float(problem.evaluate(b.data)) for b in problem.batches())
    assert float(sample.evaluate()) == pytest.approx(loss, rel=1e-6)  # float32, some ten terms


def test_halves_make_the_whole() -> None:
    sample = Sample.of(problem_of([3] * 7), 20)
    first, second = sample.halves()
    assert sorted(numbers(first) + numbers(second)) == sorted(numbers(sample))
    parts = sum(h.count * float(h.evaluate()) for h in (first, second))
    assert parts / sample.count == pytest.approx(float(sample.evaluate()), rel=1e-6)
    single = Sample.of(problem_of([3] * 7), 1)
    assert single.halves() == ()


def test_large_examples_are_taken_a_few_at_a_time() -> None:
    problem = problem_of([4] * 6)
    whole, pieces = Sample.of(problem, 20), Sample.of(problem, 20, together=3)
    assert [batch.count for batch in pieces.batches()] == [3] * 6 + [2]
    assert numbers(pieces) == numbers(whole)
    assert float(pieces.evaluate()) == pytest.approx(float(whole.evaluate()), rel=1e-6)


def test_examples_of_other_lengths_stay_apart() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(1, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(x.mean(1, keepdim=True))
            return result

    torch.manual_seed(0)
    batches = [(numbered(8 * i, 8, width), labels(8)) for i, width in enumerate([3, 5, 3])]
    problem = Problem(Mean(), "cross_entropy", frozen(batches))
    sample = Sample.of(problem, 12)
    assert [tuple(b.data[0].shape) for b in sample.batches()] == [(8, 3), (4, 5)]
    assert [b.weight for b in sample.batches()] == pytest.approx([2 / 3, 1 / 3])


def test_steps_give_whole_batches_until_there_are_enough() -> None:
    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
        return functional.cross_entropy(model(batch[0]), batch[1]), float(batch[0][0, 0] + 1)

    torch.manual_seed(0)
    batches = [(numbered(6 * i, 6), labels(6)) for i in range(5)]
    problem = Problem(nn.Linear(4, 3), StepLoss(step, "step"), batches)
    sample = Sample.of(problem, 10)
    assert [batch.count for batch in sample.batches()] == [6, 6]
    assert sum(batch.weight for batch in sample.batches()) == pytest.approx(1)
    assert [half.count for half in sample.halves()] == [6, 6]
    assert sample.halves()[0].halves() == ()


@pytest.mark.parametrize("sizes", [[1] * 6, [3, 3, 1, 5], [8]])
def test_independent_steps_are_run_at_once_and_can_be_taken_apart(sizes: list[int]) -> None:
    calls: list[int] = []

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
        calls.append(len(batch[0]))
        weights = 1.0 + batch[1]  # of the examples
        losses = functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return (weights * losses).sum() / weights.sum(), float(weights.sum())

    torch.manual_seed(0)
    batches = [(torch.randn(n, 4), labels(n)) for n in sizes]
    first = (torch.randn(4, 4), labels(4))  # a batch that shows that its examples are independent
    model = nn.Linear(4, 3)
    problem = Problem(model, StepLoss(step, "step"), frozen([first, *batches]))
    assert problem.independence.unseen is None
    sample = Sample.of(problem, 100)
    calls.clear()
    found = float(sample.evaluate())
    assert calls == [4 + sum(sizes)]
    x, y = (torch.cat(column) for column in zip(first, *batches, strict=True))
    weights = 1.0 + y
    losses = functional.cross_entropy(model(x), y, reduction="none")
    assert found == pytest.approx(float((weights * losses).sum() / weights.sum()), rel=1e-5)
    halves = sample.halves()
    assert sum(half.count for half in halves) == sample.count
    masses = [sum(half.masses) for half in halves]
    assert sum(masses) == pytest.approx(float(weights.sum()))
    whole = sum(m * float(h.evaluate()) for m, h in zip(masses, halves, strict=True))
    assert whole / sum(masses) == pytest.approx(found, rel=1e-5)  # float32, a few dozen terms


def test_they_can_be_had_in_the_present_type() -> None:
    problem = problem_of([4] * 2)
    sample = Sample.of(problem, 4)
    with problem.in_dtype(torch.float64):
        assert all(b.data[0].dtype == torch.float64 for b in sample.batches())
    assert all(b.data[0].dtype == torch.float32 for b in sample.batches())
