"""Given matrices as an operator: as torch multiplies them, and as autograd sees their loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hesscli import Hessian
from hesscli.errors import UsageError
from hesscli.operators.dense import Dense

MASSES = [1.0, 2.0, 0.0, 4.5]
LAYERS = {"first": 3, "second": 1, "third": 4}


@pytest.fixture(scope="module")
def matrices() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, 8, 8, generator=generator, dtype=torch.float64)
    return a + a.mT


def mean(matrices: Tensor) -> Tensor:
    weights = torch.tensor(MASSES, dtype=torch.float64)
    return torch.einsum("b,bij->ij", weights / weights.sum(), matrices)


def test_is_the_weighted_mean(matrices: Tensor) -> None:
    operator = Dense.of(matrices, masses=MASSES)
    vectors = torch.eye(8, dtype=torch.float64)[:, :3]
    torch.testing.assert_close(operator.to_dense(), mean(matrices), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(operator @ vectors, mean(matrices)[:, :3], rtol=1e-14, atol=1e-14)
    assert operator.shape == (8, 8)


def test_is_the_hessian_of_its_problem(matrices: Tensor) -> None:
    """By autograd: whatever takes the problem instead of the operator sees the same matrix."""
    operator = Dense.of(matrices, masses=MASSES, layers=LAYERS)
    seen = Hessian(operator.problem).to_dense()
    torch.testing.assert_close(seen, mean(matrices), rtol=1e-14, atol=1e-14)


def test_batches_are_the_matrices_that_weigh_something(matrices: Tensor) -> None:
    operator = Dense.of(matrices, masses=MASSES)
    terms = {term.index: term for term in operator.batches()}
    assert [(i, term.weight) for i, term in terms.items()] == [
        (0, 1 / 7.5),
        (1, 2 / 7.5),
        (3, 4.5 / 7.5),
    ]
    assert operator.problem.masses == MASSES
    block = torch.ones(2, 8, dtype=torch.float64)
    rounding = 8 * 2.0**-52 * float(matrices[3].abs().sum(0).max())  # of two sums of 8 terms
    torch.testing.assert_close(terms[3].apply(block), block @ matrices[3], rtol=0, atol=rounding)
    assert operator.meter.products == 2 / 4


def test_layers_cut_it_into_blocks(matrices: Tensor) -> None:
    operator = Dense.of(matrices, masses=MASSES, layers=LAYERS)
    assert operator.parameters.layers == tuple(LAYERS)
    torch.testing.assert_close(
        operator.restrict("third").to_dense(), mean(matrices)[4:, 4:], rtol=1e-14, atol=1e-14
    )


def test_one_matrix_in_its_own_dtype() -> None:
    operator = Dense.of(torch.tensor([[0.0, 3.0], [3.0, 1.0]]))
    product = operator @ torch.tensor([1.0, 2.0])
    assert product.tolist() == [6.0, 5.0]
    assert operator.problem.dtype == product.dtype == torch.float32


def test_what_is_not_symmetric_is_refused() -> None:
    with pytest.raises(UsageError, match="symmetric"):
        Dense.of(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
