"""Factors of output Hessians against autograd's Hessians of the losses themselves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn

from hesscli.errors import UnsoundError, UsageError
from hesscli.problem.batches import Batch, rows
from hesscli.problem.criteria import as_loss
from hesscli.problem.huggingface import HuggingFace
from hesscli.problem.losses import Loss
from hesscli.problem.named_losses import (
    BinaryCrossEntropy,
    BinaryCrossEntropyOfProbabilities,
    CrossEntropy,
    LanguageModel,
    MeanSquaredError,
    NegativeLogLikelihood,
)
from hesscli.problem.output_hessian import Factor, factor_of, has_factor

N, K, T = 6, 4, 3
ROUNDING = 1e-13  # float64, sums of a dozen terms of size 1


def _draw(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _labels(*shape: int) -> Tensor:
    return torch.randint(K, shape, generator=torch.Generator().manual_seed(2))


WEIGHTS = [0.2, 1.0, 3.0, 0.0]
ANY = torch.zeros(N, 1)
FLAT, GRID, SEQUENCE = _draw(N, K), _draw(N, K, 2, 3), _draw(N, T, K)
SOFT, SOFT_GRID = _draw(N, K).softmax(1), _draw(N, K, 2, 3).exp()
MASKED = _labels(N, T).where(_draw(N, T) < 0.5, -100)

# Loss, outputs, batch.
CASES: dict[str, tuple[Loss, Tensor, Batch]] = {
    "plain": (CrossEntropy(), FLAT, (ANY, _labels(N))),
    "smoothed": (CrossEntropy(0.3), FLAT, (ANY, _labels(N))),
    "weighted": (CrossEntropy(0.3, 1, WEIGHTS), FLAT, (ANY, _labels(N))),
    "positions": (CrossEntropy(0.1, 2, WEIGHTS), GRID, (ANY, _labels(N, 2, 3))),
    "soft": (CrossEntropy(0.3, -100, WEIGHTS), FLAT, (ANY, SOFT)),
    "soft positions": (CrossEntropy(0.3), GRID, (ANY, SOFT_GRID)),
    "nll": (NegativeLogLikelihood(1, WEIGHTS), FLAT.log_softmax(1), (ANY, _labels(N))),
    "mse by weight": (
        MeanSquaredError(),
        GRID,
        {"x": ANY, "y": GRID + 1, "loss_weights": _draw(N, K, 2, 3, seed=5).square()},
    ),
    "positions by weight": (
        CrossEntropy(0.1, 2, WEIGHTS),
        GRID,
        {"x": ANY, "y": _labels(N, 2, 3), "loss_weights": (_draw(N, seed=5) > 0).double()},
    ),
    "language": (LanguageModel(), SEQUENCE, (ANY, MASKED)),
    "tokens": (LanguageModel(0.2), SEQUENCE, (ANY, MASKED, _draw(N, T, seed=3).square())),
    "huggingface": (HuggingFace(), SEQUENCE, {"labels": MASKED}),
    "mse": (MeanSquaredError(), GRID, (ANY, GRID + 1)),
    "bce": (BinaryCrossEntropy(), FLAT, (ANY, SOFT)),
    "bce weighted": (BinaryCrossEntropy(WEIGHTS), FLAT, (ANY, SOFT)),
    "bce masked": (BinaryCrossEntropy(WEIGHTS, WEIGHTS), FLAT, (ANY, SOFT)),
    "bce of probabilities": (
        BinaryCrossEntropyOfProbabilities(WEIGHTS),
        FLAT.sigmoid(),
        (ANY, SOFT),
    ),
}


def _hessians(loss: Loss, outputs: Tensor, batch: Batch) -> Tensor:
    """Of each example's numerator in its own outputs, (N, D, D), one example at a time."""
    found = []
    for i in range(N):
        alone, shape = rows(batch, i, i + 1), outputs[i : i + 1].shape
        hessian: Any = torch.func.hessian(
            lambda f, a=alone, s=shape: loss.natural.numerators(f.view(s), a).sum()
        )
        found.append(hessian(outputs[i].reshape(-1)))
    return torch.stack(found)


def _columns(factor: Factor) -> Tensor:
    """(N, D, columns)."""
    return torch.stack([factor.column(j).flatten(1) for j in range(factor.num_columns)], 2)


@pytest.mark.parametrize("name", CASES)
def test_columns_multiply_to_the_hessian(name: str) -> None:
    loss, outputs, batch = CASES[name]
    factor = factor_of(loss, outputs, batch)
    assert has_factor(loss)
    assert factor.column(0).shape == outputs.shape
    columns = _columns(factor)
    expected = _hessians(loss, outputs, batch)
    assert float(expected.norm()) > 0.1
    assert float((columns @ columns.mT - expected).norm()) < ROUNDING * expected.numel()


def test_softmax_takes_one_column_less_than_classes() -> None:
    assert factor_of(*CASES["plain"]).num_columns == K - 1
    assert factor_of(*CASES["positions"]).num_columns == 6 * (K - 1)
    assert factor_of(*CASES["mse"]).num_columns == 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sure_predictions_keep_their_digits(dtype: torch.dtype) -> None:
    """p = (1 − 2e, e, e): entries of A are e, where 1 − p would have lost all of them."""
    outputs = torch.tensor([[60.0, 0.0, 0.0], [0.0, 0.0, 60.0], [0.0, 500.0, 0.0]], dtype=dtype)
    columns = _columns(factor_of(CrossEntropy(), outputs, (ANY, torch.zeros(3).long()))).double()
    got, rare = columns @ columns.mT, math.exp(-60)
    first = torch.tensor([[2.0, -1, -1], [-1, 1, 0], [-1, 0, 1]]).double() * rare
    tolerance = 8 * torch.finfo(dtype).eps * rare
    torch.testing.assert_close(got[0], first, rtol=0, atol=tolerance)
    torch.testing.assert_close(got[1], first.flip(0, 1), rtol=0, atol=tolerance)
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("name", CASES)
def test_draws_have_the_hessian_as_their_second_moment(name: str) -> None:
    loss, outputs, batch = CASES[name]
    factor, count = factor_of(loss, outputs, batch), 1000
    draws = torch.stack([factor.draw(seed).flatten(1) for seed in range(count)])
    products = draws[..., :, None] * draws[..., None, :]
    expected = _hessians(loss, outputs, batch)
    spread = products.std(0) / math.sqrt(count)
    sure = spread < 1e-12  # products of one entry with itself where signs alone are drawn
    torch.testing.assert_close(products.mean(0)[sure], expected[sure], rtol=0, atol=1e-12)
    scores = ((products.mean(0) - expected) / spread)[~sure]
    if scores.numel():  # 1e-3 over all entries
        assert float(scores.abs().max()) < norm.isf(5e-4 / scores.numel() / len(CASES))


@pytest.mark.parametrize("name", CASES)
def test_a_batch_may_be_cut_without_changing_its_draws(name: str) -> None:
    loss, outputs, batch = CASES[name]
    whole = factor_of(loss, outputs, batch).draw(7)
    part = factor_of(loss, outputs[4:], rows(batch, 4, N)).draw(7, 4)
    assert torch.equal(part, whole[4:])
    assert not torch.equal(factor_of(loss, outputs, batch).draw(8), whole)


def test_other_losses_are_refused_by_name() -> None:
    loss = as_loss(nn.functional.smooth_l1_loss)
    assert not has_factor(loss)
    with pytest.raises(UsageError, match="is not known") as caught:
        factor_of(loss, FLAT, (ANY, FLAT))
    assert "smooth_l1_loss" in caught.value.got


def test_negative_weights_are_refused() -> None:
    with pytest.raises(UnsoundError, match="not convex") as caught:
        factor_of(CrossEntropy(class_weights=[1.0, -2.0, 1, 1]), FLAT, (ANY, _labels(N)))
    assert "-2" in caught.value.got
