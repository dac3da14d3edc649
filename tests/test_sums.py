"""The weighted sum over batches, beside rational arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from hesscli.sums import weighted_sum

EPS = 2.0**-52


@dataclass(frozen=True)
class Batch:
    weight: float
    rows: Tensor

    def blocks(self, size: int) -> Iterator[Tensor]:
        return iter(torch.split(self.rows, size))


def batches(dtype: torch.dtype) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    weights = (0.1, 0.6, 0.3)
    return [Batch(w, torch.randn(5, 3, dtype=dtype, generator=generator)) for w in weights]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_whatever_the_type_and_the_blocks(dtype: torch.dtype, size: int) -> None:
    parts, start = batches(dtype), torch.full((5, 3), 0.25, dtype=torch.float64)
    truth = [
        Fraction(0.25)
        + sum(Fraction(b.weight) * Fraction(v) for b, v in zip(parts, vs, strict=True))
        for vs in zip(*(b.rows.double().flatten().tolist() for b in parts), strict=True)
    ]
    total = weighted_sum(parts, start, lambda batch: batch.blocks(size))
    assert total is start
    largest = 0.25 + sum(b.weight * float(b.rows.abs().max()) for b in parts)
    for found, expected in zip(total.flatten().tolist(), truth, strict=True):
        assert abs(Fraction(found) - expected) <= 2 * len(parts) * EPS * largest


def test_no_graph_is_kept() -> None:
    weight = torch.ones(3, requires_grad=True)
    total = weighted_sum([Batch(1.0, weight)], torch.zeros(3), lambda batch: [2 * batch.rows])
    assert total.tolist() == [2.0] * 3
    assert not total.requires_grad


def test_a_batch_is_done_before_the_next_is_taken() -> None:
    """A generator may look at the clock between its rows and the next batch."""
    seen: list[tuple[str, float]] = []

    def source() -> Iterator[Batch]:
        for batch in batches(torch.float64):
            seen.append(("taken", batch.weight))
            yield batch

    def parts(batch: Batch) -> Iterator[Tensor]:
        yield batch.rows
        seen.append(("done", batch.weight))

    weighted_sum(source(), torch.zeros(5, 3, dtype=torch.float64), parts)
    assert seen == [(what, w) for w in (0.1, 0.6, 0.3) for what in ("taken", "done")]
