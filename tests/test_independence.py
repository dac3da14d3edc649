"""Batches stay the user's own until their examples are proven independent; sums are sums.

Truth is the user's objective on the user's own batches: its value, and its dense Hessian by
differentiating twice in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import hesscli
from hesscli.errors import InputError
from hesscli.operators.matrices import matrix_named
from hesscli.problem.losses import StepLoss
from hesscli.problem.objective import Sample
from hesscli.problem.problem import Problem
from hesscli.results import Snapshot

ROUNDING = 1e-10  # float64, a few thousand terms


def _rows(count: int = 24, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (count,), generator=generator)


def _net(middle: Callable[[Tensor], Tensor] = torch.tanh) -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(middle(self.a(x)))
            return out

    torch.manual_seed(0)
    return Net().double()


def _dense(model: nn.Module, objective: Callable[[nn.Module], Tensor]) -> tuple[float, Tensor]:
    twin = copy.deepcopy(model)
    tensors = list(twin.parameters())
    value = objective(twin)
    slopes = torch.autograd.grad(value, tensors, create_graph=True, materialize_grads=True)
    slope = torch.cat([s.reshape(-1) for s in slopes])
    rows = [
        torch.autograd.grad(s, tensors, retain_graph=True, materialize_grads=True) for s in slope
    ]
    return float(value.detach()), torch.stack([torch.cat([p.reshape(-1) for p in r]) for r in rows])


def _agrees(problem: Problem, model: nn.Module, objective: Callable[[nn.Module], Tensor]) -> None:
    value, matrix = _dense(model, objective)
    assert problem.prove().loss == pytest.approx(value, rel=ROUNDING)
    found = hesscli.Hessian(problem).to_dense()
    torch.testing.assert_close(found, matrix, rtol=0, atol=ROUNDING * float(matrix.norm()))


# -- what mixes --------------------------------------------------------------------------------

MODELS: dict[str, Callable[[Tensor], Tensor]] = {
    "centred": lambda h: torch.tanh(h - h.mean(0)),
    "batch statistics": lambda h: functional.batch_norm(h, None, None, training=True).tanh(),
    "attention over the batch": lambda h: torch.softmax(h @ h.T, 1) @ h,
    "the neighbour": lambda h: torch.tanh(h + 0.5 * h.roll(1, 0)),
    "pairs of neighbours": lambda h: h.view(-1, 2, 4).flip(1).reshape(-1, 4).tanh() + h,
    "the other half": lambda h: torch.tanh(h) + torch.cat(h.chunk(2)[::-1]),
    "the place in the batch": lambda h: torch.tanh(h + 0.1 * torch.arange(len(h))[:, None]),
    "a little": lambda h: torch.tanh(h + 1e-6 * h.sum(0)),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("form", ["listed", "loader", "rows"])
def test_models_that_mix(kind: str, form: str) -> None:
    x, y = _rows()
    model = _net(MODELS[kind])
    batches = [(x[:12], y[:12]), (x[12:], y[12:])]
    data: Any = batches
    if form == "loader":
        data = DataLoader(TensorDataset(x, y), batch_size=12)
    if form == "rows":
        data, batches = TensorDataset(x, y), [(x, y)]
    problem = Problem(model, "cross_entropy", data, batch_size=24 if form == "rows" else None)
    assert problem.couples_examples is not None
    assert any("mixes the examples" in warning for warning in problem.warnings)
    if form == "rows":  # in another order
        batches = list(problem.data.batches)
        assert [len(t) for _, t in batches] == [24]
    _agrees(
        problem,
        model,
        lambda net: sum(functional.cross_entropy(net(x), y) * len(y) / 24 for x, y in batches),
    )


def _contrast(z: Tensor, y: Tensor) -> Tensor:
    z = functional.normalize(z, dim=1)
    return functional.cross_entropy(4 * z @ z.T - 9 * torch.eye(len(z)), (y + 1) % len(z))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "contrast": _contrast,
    "masked mean": lambda o, y: functional.cross_entropy(o, y.where(o[:, 0] > 0, -100)),
    "one masked row": lambda o, y: functional.cross_entropy(o, y.where(o[:, 0] < o.max(), -100)),
    "class weights of the batch": lambda o, y: functional.cross_entropy(
        o, y, weight=1 / (1 + torch.bincount(y, minlength=3).double())
    ),
    "variance": lambda o, y: o.var(0).sum(),
    "hardest": lambda o, y: functional.cross_entropy(o, y, reduction="none").max(),
    "pairs": lambda o, y: (o[0::2] - o[1::2]).square().mean(),
    "root of the mean": lambda o, y: functional.cross_entropy(o, y).sqrt(),
}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("as_step", [False, True])
def test_losses_that_mix(kind: str, as_step: bool) -> None:
    x, y = _rows()
    model, loss = _net(), LOSSES[kind]
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]
    users = StepLoss(lambda net, b: loss(net(b[0]), b[1]), "step") if as_step else loss
    problem = Problem(model, users, batches)
    assert problem.couples_examples is not None
    assert "loss" in problem.couples_examples
    _agrees(
        problem,
        model,
        lambda net: sum(loss(net(x), y) * len(y) / len(_rows()[1]) for x, y in batches),
    )


def test_a_mask_in_one_batch_of_many_is_seen() -> None:
    """Only rows of the last batch are masked: every batch is put to the test."""
    x, y = _rows(40 * 8)
    y[-3:] = -100
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, len(y), 8)]
    problem = Problem(_net(), lambda o, y: functional.cross_entropy(o, y), batches)
    assert problem.couples_examples == "the loss <lambda>"
    assert problem.data.counts == (8,) * 40


# -- what does not -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 30.0])
def test_independent_examples_are_not_accused(dtype: torch.dtype, scale: float) -> None:
    """Of sure predictions, whose loss is the difference of large numbers, too."""
    x, y = _rows(40)
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3)).to(dtype)
    with torch.no_grad():
        net[3].weight.mul_(scale)
    for loss in (
        "cross_entropy",
        lambda o, y: functional.cross_entropy(o, y),
        StepLoss(lambda net, b: functional.cross_entropy(net(b[0]), b[1]), "step"),
        lambda o, y: functional.cross_entropy(o, y) + 0.1 * net[0].weight.square().sum(),
    ):
        problem = Problem(net, loss, [(x[:30], y[:30]), (x[30:], y[30:])])
        assert problem.independence.proven
        assert problem.warnings == ()
        assert len(problem.data.counts) == 16


class Single(nn.Module):
    """Computes in float32, whatever it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x.float(), self.linear.weight.float())


def test_a_model_that_casts_is_judged_in_float64_all_the_same() -> None:
    """Of a loss of 1e-5, the rounding of float32 sums would be as large as what a mask does."""
    problem = Problem(Single(), "cross_entropy", [_rows(100)])
    assert problem.independence.proven
    assert problem.independence.bound < 1e-8
    x, _ = _rows(40)
    near = Single()(x.float()).detach() + 3e-3 * torch.randn(40, 3)

    def masked(outputs: Tensor, targets: Tensor) -> Tensor:
        kept = targets[:, 0] > 0
        return (outputs - targets)[kept].square().mean()

    assert Problem(Single(), masked, [(x, near)]).couples_examples == "the loss masked"


@pytest.mark.parametrize(
    ("loss", "reduction"),
    [
        (lambda o, t: (o - t).square().mean(), "mean"),
        (lambda o, t: (o - t).square().sum(), "sum"),
        (lambda o, t: (o - t).square().sum() / t.square().sum(), None),
    ],
)
def test_a_loss_that_is_zero_where_the_weights_stand(loss: Any, reduction: str | None) -> None:
    """A student that is its teacher: nothing is the mean, the sum and all else of nothing."""
    x, _ = _rows(24)
    model = _net()
    teacher = model(x).detach()
    state = [p.detach().clone() for p in model.parameters()]
    problem = Problem(model, loss, [(x[:8], teacher[:8]), (x[8:], teacher[8:])])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), state, strict=True))
    assert problem.independence.proven == (reduction is not None)
    if reduction is not None:
        assert problem.independence.reduction == reduction
        _agrees_in_trace(problem, model, lambda net: loss(net(x), teacher))


def _agrees_in_trace(
    problem: Problem, model: nn.Module, objective: Callable[[nn.Module], Tensor]
) -> None:
    _, matrix = _dense(model, objective)
    found = hesscli.Hessian(problem).to_dense()
    torch.testing.assert_close(found, matrix, rtol=0, atol=ROUNDING * float(matrix.norm()))


def test_experts_that_are_full_only_in_large_batches() -> None:
    """Of a batch of 48, at most 16 rows get their expert; the first rows alone show nothing."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.other = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            served = (torch.arange(len(x)) < 16)[:, None]
            return torch.where(served, self.one(x), self.other(x).tanh())

    x, y = _rows(48)
    problem = Problem(Experts().double(), "cross_entropy", TensorDataset(x, y), batch_size=48)
    assert problem.couples_examples is not None
    assert problem.data.counts == (48,)


def test_inputs_that_are_rounded_to_the_models_type_are_said_to_be() -> None:
    class Lookup(nn.Module):
        """Reads a time in seconds, to which float32 is blind, and casts it by itself."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(1, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.linear((x - 1.6e9).to(self.linear.weight.dtype))
            return out

    y = _rows(24)[1]
    times = 1.6e9 + torch.arange(24, dtype=torch.float64)[:, None]
    rounded = Problem(Lookup(), "cross_entropy", TensorDataset(times, y))
    assert any("float64 inputs were rounded" in text for text in rounded.warnings)
    plain = Problem(nn.Linear(4, 3), "cross_entropy", TensorDataset(*_rows(24)))
    assert plain.warnings == ()  # it takes no float64: whoever trained it rounded as well


def test_random_outputs_accuse_nobody() -> None:
    """The determinism check refuses them by their own name."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    problem = Problem(model.train(), "cross_entropy", [_rows()])
    assert problem.couples_examples is None
    assert problem.independence.unseen is not None
    assert problem.data.counts == (24,)


def test_padding_of_the_users_is_part_of_the_function() -> None:
    """A model that reads its padding is another function in batches that pad otherwise."""
    generator = torch.Generator().manual_seed(2)
    rows = [(torch.randn(2 + i % 5, 4, generator=generator), i % 3) for i in range(30)]

    def collate(items: list[Any]) -> tuple[Tensor, Tensor]:
        xs, ys = zip(*items, strict=True)
        return nn.utils.rnn.pad_sequence(list(xs), batch_first=True), torch.tensor(ys)

    class Mean(nn.Module):
        def __init__(self, masked: bool) -> None:
            super().__init__()
            self.linear, self.masked = nn.Linear(4, 3), masked

        def forward(self, x: Tensor) -> Tensor:
            kept = (x != 0).any(2, keepdim=True).to(x)
            over = kept.sum(1) if self.masked else torch.full_like(kept.sum(1), x.shape[1])
            out: Tensor = (self.linear(x) * kept).sum(1) / over
            return out

    loader = DataLoader(rows, batch_size=10, collate_fn=collate)  # type: ignore[arg-type]
    assert Problem(Mean(masked=True), "cross_entropy", loader).independence.proven
    mixed = Problem(Mean(masked=False), "cross_entropy", loader)
    assert mixed.couples_examples is not None
    assert mixed.data.counts == (10, 10, 10)


# -- sums --------------------------------------------------------------------------------------

SUMS: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "criterion": (
        nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]).double(), reduction="sum"),
        lambda o, y: functional.cross_entropy(
            o, y, torch.tensor([1.0, 2.0, 0.5]).double(), reduction="sum"
        ),
    ),
    "function": (
        lambda o, y: functional.cross_entropy(o, y, reduction="sum"),
        lambda o, y: functional.cross_entropy(o, y, reduction="sum"),
    ),
    "step": (
        StepLoss(lambda net, b: functional.cross_entropy(net(b[0]), b[1], reduction="sum"), "s"),
        lambda o, y: functional.cross_entropy(o, y, reduction="sum"),
    ),
    "square": (
        nn.MSELoss(reduction="sum"),
        lambda o, t: (o - t).square().sum(),
    ),
}


@pytest.mark.parametrize("kind", SUMS)
def test_sums_are_sums_over_all_batches(kind: str) -> None:
    x, y = _rows(25)
    targets = torch.eye(3, dtype=torch.float64)[y] if kind == "square" else y
    users, loss = SUMS[kind]
    model = _net()
    problem = Problem(model, users, [(x[:8], targets[:8]), (x[8:], targets[8:])], weight_decay=0.1)
    assert problem.independence.proven
    assert len(problem.data.counts) == 16
    assert any("sum over all 25 examples" in warning for warning in problem.warnings)

    def objective(net: nn.Module) -> Tensor:
        decay = sum(p.square().sum() for p in net.parameters())
        return loss(net(x), targets) + 0.05 * decay

    _agrees(problem, model, objective)
    _, matrix = _dense(model, objective)
    result = hesscli.trace(problem, probes=8)
    low, high = result.trace.interval
    assert low <= float(matrix.trace()) <= high


@pytest.mark.parametrize("matrix", ["ggn", "fisher", "empirical-fisher"])
def test_other_matrices_of_a_sum_are_its_own(matrix: str) -> None:
    """N times the mean's, also the one that is made of squared slopes."""
    x, y = _rows(25)
    model = _net()
    traces = [
        hesscli.trace(Problem(model, nn.CrossEntropyLoss(reduction=r), [(x, y)]), matrix=matrix)
        for r in ("mean", "sum")
    ]
    assert traces[1].trace.estimate == pytest.approx(25 * traces[0].trace.estimate, rel=1e-8)
    mean, summed = (
        matrix_named(matrix)(Problem(model, nn.CrossEntropyLoss(reduction=r), [(x, y)])).to_dense()
        for r in ("mean", "sum")
    )
    torch.testing.assert_close(summed, 25 * mean, rtol=1e-8, atol=1e-12)


def test_a_subsample_of_a_sum_is_scaled_to_the_whole() -> None:
    x, y = _rows(400)
    model = _net()
    data = TensorDataset(x, y)
    whole = Problem(model, nn.CrossEntropyLoss(reduction="sum"), data)
    part = Problem(model, nn.CrossEntropyLoss(reduction="sum"), data, examples=100)
    mean = Problem(model, nn.CrossEntropyLoss(), data, examples=100)
    assert part.prove().loss == pytest.approx(400 * mean.prove().loss, rel=ROUNDING)
    assert part.prove().loss == pytest.approx(whole.prove().loss, rel=0.3)
    assert any("all 400 examples, from the 100" in warning for warning in part.warnings)


def test_the_noise_of_a_sums_weights_is_in_its_interval() -> None:
    """A rare heavy class: how many of it are kept moves the sum as much as what they lose."""
    x, y = _rows(400)
    y[:] = 0
    y[::20] = 2
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 1.0, 30.0]).double(), reduction="sum")
    model, data = nn.Linear(4, 3).double(), TensorDataset(x, y)
    whole = Problem(model, loss, data)
    truth = hesscli.trace(whole).trace.estimate
    held = 0
    for seed in range(20):
        problem = Problem(model, loss, data, examples=100, seed=seed)
        low, high = hesscli.trace(problem).trace.interval
        held += low <= truth <= high
    assert held >= 16  # of 20 at 95%: fewer in 3 of 1,000


def test_a_sum_can_be_asked_for_and_none_is_refused() -> None:
    x, y = _rows()
    problem = Problem(_net(), "cross_entropy", [(x, y)], reduction="sum")
    expected = functional.cross_entropy(_net()(x), y, reduction="sum")
    assert problem.prove().loss == pytest.approx(float(expected.detach()), rel=ROUNDING)
    with pytest.raises(InputError, match="a mean or a sum"):
        Problem(_net(), nn.CrossEntropyLoss(reduction="none"), [(x, y)])


def test_a_step_is_called_once_for_each_part_and_whoever_watches_may_end_it() -> None:
    calls: list[int] = []

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        calls.append(len(batch[0]))
        return (model(batch[0]) - batch[1]).square().mean(), len(batch[0])

    loss = StepLoss(step, "step")
    batch = torch.randn(8, 3), torch.randn(8, 1)
    assert loss.value_and_mass(nn.Linear(3, 1), batch, 8)[1] == 8
    assert len(calls) == 1
    seen: list[str] = []

    def observe(snapshot: Snapshot) -> bool:
        if snapshot.phase != "reading data":
            seen.append(snapshot.phase)
        return len(seen) == 3

    with pytest.raises(KeyboardInterrupt):
        Problem(nn.Linear(3, 1), loss, [batch] * 9, observe=observe)
    assert len(seen) == 3

    def weighed(snapshot: Snapshot) -> bool:
        if snapshot.phase == "weighing batches":
            seen.append(snapshot.phase)
            calls.clear()
        return len(seen) == 5

    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        Problem(nn.Linear(3, 1), loss, [batch] * 9, observe=weighed)
    assert not calls  # no batch more is run through the model


# -- batches that rows cannot be put together from, though their tensors have the same shapes ------


def _keyed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    if "labels" in batch:
        return functional.cross_entropy(model(batch["x"]), batch["labels"])
    return 2 * functional.cross_entropy(model(-batch["x"]), batch["guessed"])


def _ordered(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch["x"]) + model(batch["z"]).square(), batch["y"])


def _nested(model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
    if len(batch) == 2:
        (x, z), y = batch
        return functional.cross_entropy(model(x + z), y)
    x, z, y = batch
    return functional.cross_entropy(model(x - z), y)


@pytest.mark.parametrize(
    ("step", "forms"),
    [
        (_keyed, [lambda x, y: {"x": x, "labels": y}, lambda x, y: {"x": x, "guessed": y}]),
        (
            _ordered,
            [
                lambda x, y: {"x": x, "z": 2 * x, "y": y},
                lambda x, y: {"z": 2 * x, "x": x, "y": y},
            ],
        ),
        (_nested, [lambda x, y: ((x, x.sin()), y), lambda x, y: (x, x.sin(), y)]),
    ],
    ids=["keys", "their order", "nesting"],
)
@pytest.mark.parametrize("runs", [1, 3])
def test_batches_of_other_forms_are_not_put_together(
    step: Callable[..., Tensor], forms: list[Callable[..., Any]], runs: int
) -> None:
    x, y = _rows()
    batches = [forms[i // runs % 2](x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4]) for i in range(6)]
    model = _net()
    problem = Problem(model, StepLoss(step, "step"), batches)

    _agrees(problem, model, lambda twin: torch.stack([step(twin, b) for b in batches]).mean())


def test_samples_keep_the_forms_of_their_batches() -> None:
    """So that what is put to the test is what each of them is of the user's function."""
    x, y = _rows()
    batches: list[Any] = [{"x": x[i : i + 4], "y": y[i : i + 4]} for i in (0, 4, 8)]
    batches += [{"z": x[i : i + 4], "y": y[i : i + 4]} for i in (12, 16, 20)]
    problem = Problem(_net(), StepLoss(_of_form, "step"), batches)
    forms = [tuple(batch.data) for batch in Sample.of(problem, 24).batches()]
    assert forms == [("x", "y"), ("z", "y")]


def _of_form(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return functional.cross_entropy(net(batch["x"] if "x" in batch else batch["z"]), batch["y"])
