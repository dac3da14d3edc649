"""Parameters and losses that an optimizer cannot take are told so; moved ones take their state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizing import Make, loss_of, net, taken, weights
from torch import Tensor, nn
from torch.nn import functional as F

from hesscli.errors import UsageError
from hesscli.optim import MFAC, AdaHessian

MAKES: dict[str, Make] = {
    "adahessian": lambda params, **more: AdaHessian(params, **{"lr": 0.02} | more),
    "mfac": lambda params, **more: MFAC(
        params, **{"lr": 1e-3, "window": 6, "damping": 1e-2} | more
    ),
    "mfac with momentum": lambda params, **more: MFAC(
        params, **{"lr": 1e-3, "window": 200, "damping": 0.1, "momentum": 0.9} | more
    ),
}
every = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())


@every
@pytest.mark.parametrize(
    ("of", "to"),
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.float64, torch.bfloat16),
        (torch.bfloat16, torch.float64),
    ],
)
def test_a_model_that_is_cast_goes_on_as_from_a_state_that_is(
    make: Make, of: torch.dtype, to: torch.dtype
) -> None:
    """Between two steps, as ``load_state_dict`` casts what was saved: to the same bits."""
    model, other = net(of), net(of)
    one, two = make(model.parameters()), make(other.parameters())
    for optimizer, each in ((one, model), (two, other)):
        taken(each, optimizer, range(7))
    model.to(to)
    loaded = make(other.to(to).parameters())
    loaded.load_state_dict(two.state_dict())
    taken(model, one, range(7, 10))
    taken(other, loaded, range(7, 10))
    assert torch.equal(weights(model), weights(other))
    assert {p.dtype for p in model.parameters()} == {to}
    wide = torch.float64 if to == torch.float64 else torch.float32
    kept = [t for state in one.state.values() for t in state.values() if isinstance(t, Tensor)]
    assert {t.dtype for t in kept} <= {wide}


def test_rows_in_another_type_have_the_products_of_what_they_are_rounded_to() -> None:
    """A step in it is that of a dense matrix of the rounded rows."""
    rows = torch.randn(4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = nn.Parameter(torch.zeros(12, dtype=torch.float64))
    saved = MFAC([x], window=4, damping=0.1)
    for row in rows[:3]:
        x.grad = row.clone()
        saved.step()
    y = nn.Parameter(torch.zeros(12, dtype=torch.float64))
    narrow = MFAC([y], 1.0, window=4, damping=0.1, window_dtype=torch.bfloat16)
    narrow.load_state_dict(saved.state_dict())
    narrow.param_groups[0]["lr"] = 1.0
    y.grad = rows[3].clone()
    narrow.step()
    kept = rows.bfloat16().double()
    matrix = kept.T @ kept / 4 + 0.1 * torch.eye(12, dtype=torch.float64)
    # products in float32, of a matrix whose condition is below 1e3
    torch.testing.assert_close(-y.detach(), torch.linalg.solve(matrix, kept[3]), rtol=0, atol=1e-3)


@every
def test_a_parameter_that_has_become_another_is_told(make: Make) -> None:
    model = net()
    optimizer = make(model.parameters())
    taken(model, optimizer, range(2))
    model.head.weight.data = torch.zeros(4, 40).double()
    model.head.bias.data = torch.zeros(4).double()
    with pytest.raises(UsageError, match=r"other parameters|wrong length"):
        optimizer.step(loss_of(model, 0))


def overlapping() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3, 1).expand(3, 4))]


def twice() -> list[nn.Parameter]:
    """As of two modules with one matrix."""
    one, other = nn.Linear(3, 3), nn.Linear(3, 3)
    other.weight = one.weight
    return [*one.parameters(), *other.parameters()]


@every
@pytest.mark.parametrize(
    ("params", "what", "cure"),
    [
        (overlapping, "entries of a parameter share memory", "clone()"),
        (twice, "a parameter is there twice", "dict.fromkeys"),
    ],
)
def test_parameters_that_cannot_be_moved_are_refused(
    make: Make, params: Callable[[], list[nn.Parameter]], what: str, cure: str
) -> None:
    optimizer = make([nn.Parameter(torch.ones(1))])
    for refused in (make, lambda given: optimizer.add_param_group({"params": given})):
        with pytest.raises(UsageError, match=what) as caught:
            refused(params())
        assert cure in caught.value.hint
    assert len(optimizer.param_groups) == 1
    make(dict.fromkeys(twice()))


@pytest.mark.parametrize(
    ("own", "options"),
    [
        (AdaHessian, {"hessian_every": 5, "probes": 2, "seed": 1}),
        (MFAC, {"window": 8, "damping": 0.1, "window_dtype": torch.float64}),
    ],
)
def test_an_option_for_all_groups_is_no_groups_own(own: Any, options: dict[str, Any]) -> None:
    """In a group it would change nothing; whatever else is in one is the user's."""
    for name, value in options.items():
        group = {"params": [nn.Parameter(torch.ones(2))], name: value}
        with pytest.raises(UsageError, match=f"{name} is one for all groups") as caught:
            own([group])
        assert f"{own.__name__}(..., {name}=" in caught.value.hint
    own([{"params": [nn.Parameter(torch.ones(2))], "lr": 0.1, "layer": "head"}])


@every
def test_what_is_no_loss_is_told(make: Make) -> None:
    model = net()
    optimizer, before = make(model.parameters()), weights(model)

    def forgetful() -> None:
        loss_of(model, 0)

    for loss, what in (
        (1.5, "a loss must be a tensor"),
        (lambda: loss_of(model, 0).item(), "a loss must be a tensor"),
        (lambda: (loss_of(model, 0), 1), "a loss must be a tensor"),
        (forgetful, "there is no loss"),
    ):
        with pytest.raises(UsageError, match=what):
            optimizer.step(loss)
    assert torch.equal(weights(model), before)
    assert optimizer.steps == 0
    with pytest.raises(UsageError, match="max_norm"):
        optimizer.clip(-1.0)


@every
def test_a_closure_that_accumulates_need_not_give_a_loss(make: Make) -> None:
    model, other = net(), net()
    one, two = make(model.parameters()), make(other.parameters())
    for number in range(3):
        assert one.step(lambda n=number: one.accumulate(loss_of(model, n))) is None
        two.step(loss_of(other, number))
    assert torch.equal(weights(model), weights(other))


@every
def test_an_embedding_moves_by_the_rows_that_are_looked_up(make: Make) -> None:
    """By a sparse gradient too, whoever makes it, where no product is to follow."""
    torch.manual_seed(0)
    head, codes = nn.Linear(3, 3), torch.tensor([1, 2, 2, 4])
    is_sparse = isinstance(make(head.parameters()), MFAC)
    table = nn.Embedding(6, 3, sparse=is_sparse)
    optimizer = make([*table.parameters(), *head.parameters()])
    before = table.weight.detach().clone()
    for number in range(3):
        loss = F.cross_entropy(head(table(codes)), torch.tensor([0, 1, 2, 0]))
        if is_sparse and number:
            loss.backward()
            optimizer.clip(0.1)
            optimizer.step()
        else:
            optimizer.step(loss)
    moved = (table.weight.detach() != before).all(1)
    assert moved.tolist() == [n in codes for n in range(6)]
