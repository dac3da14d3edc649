"""Losses as weighted means: torch's own value and gradient, whole or cut into ragged batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import hesscli
from hesscli.errors import ExitCode, InputError, UnsoundError
from hesscli.problem.batches import Batch, rows, shape_of
from hesscli.problem.criteria import NAMED, as_loss
from hesscli.problem.losses import Loss, StepLoss, UserLoss
from hesscli.problem.named_losses import (
    BinaryCrossEntropy,
    BinaryCrossEntropyOfProbabilities,
    CrossEntropy,
    LanguageModel,
    MeanSquaredError,
    NegativeLogLikelihood,
)
from hesscli.problem.problem import Problem

ROUNDING = 1e-12  # float64, sums of a few hundred terms


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _classes(*shape: int, of: int, masked: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(of, shape, generator=generator)
    if masked is not None:
        labels[torch.rand(shape, generator=generator) < 0.3] = masked
    return labels


WEIGHTS = [0.1, 0.7, 3.3, 1.0]
TENSOR = torch.tensor(WEIGHTS, dtype=torch.float64)
SHARES = _draw(23, 4).softmax(1)


@dataclass
class Case:
    """A loss, what it stands for in torch, and outputs and targets for both."""

    loss: Loss
    torch: Any
    outputs: Tensor
    targets: Tensor


CASES = {
    "classes": Case(CrossEntropy(), nn.CrossEntropyLoss(), _draw(23, 4), _classes(23, of=4)),
    "classes with everything": Case(
        CrossEntropy(0.1, 3, WEIGHTS),
        nn.CrossEntropyLoss(TENSOR, ignore_index=3, label_smoothing=0.1),
        _draw(23, 4),
        _classes(23, of=4),
    ),
    "class weights and masked": Case(
        CrossEntropy(class_weights=WEIGHTS),
        nn.CrossEntropyLoss(TENSOR),
        _draw(23, 4),
        _classes(23, of=4, masked=-100),
    ),
    "smoothed": Case(
        CrossEntropy(0.2),
        nn.CrossEntropyLoss(label_smoothing=0.2),
        _draw(23, 4),
        _classes(23, of=4, masked=-100),
    ),
    "soft targets": Case(CrossEntropy(), nn.CrossEntropyLoss(), _draw(23, 4), SHARES),
    "soft, weighted, smoothed": Case(
        CrossEntropy(0.1, class_weights=WEIGHTS),
        nn.CrossEntropyLoss(TENSOR, label_smoothing=0.1),
        _draw(23, 4),
        SHARES,
    ),
    "segmentation": Case(
        CrossEntropy(0.1, 255, WEIGHTS),
        nn.CrossEntropyLoss(TENSOR, ignore_index=255, label_smoothing=0.1),
        _draw(23, 4, 3, 5),
        _classes(23, 3, 5, of=4, masked=255),
    ),
    "soft segmentation": Case(
        CrossEntropy(), nn.CrossEntropyLoss(), _draw(23, 4, 3, 5), _draw(23, 4, 3, 5).softmax(1)
    ),
    "nll": Case(
        NegativeLogLikelihood(2, WEIGHTS),
        nn.NLLLoss(TENSOR, ignore_index=2),
        _draw(23, 4).log_softmax(1),
        _classes(23, of=4),
    ),
    "nll of pixels": Case(
        NegativeLogLikelihood(),
        nn.NLLLoss(),
        _draw(23, 4, 3, 5).log_softmax(1),
        _classes(23, 3, 5, of=4, masked=-100),
    ),
    "mse": Case(MeanSquaredError(), nn.MSELoss(), _draw(23, 3, 2), 2 + _draw(23, 3, 2).cos()),
    "mse of scalars": Case(MeanSquaredError(), nn.MSELoss(), _draw(23), _draw(23).cos()),
    "bce": Case(BinaryCrossEntropy(), nn.BCEWithLogitsLoss(), _draw(23, 4), SHARES),
    "bce with whole numbers": Case(
        BinaryCrossEntropy(),
        lambda outputs, targets: nn.BCEWithLogitsLoss()(outputs, targets.double()),
        _draw(23, 4),
        _classes(23, 4, of=2),
    ),
    "bce with pos_weight": Case(
        BinaryCrossEntropy(WEIGHTS),
        nn.BCEWithLogitsLoss(pos_weight=TENSOR),
        _draw(23, 4),
        SHARES.round(),
    ),
    "bce of probabilities": Case(
        BinaryCrossEntropyOfProbabilities(WEIGHTS),
        nn.BCELoss(TENSOR),
        _draw(23, 4).sigmoid(),
        SHARES,
    ),
    "bce with weights": Case(
        BinaryCrossEntropy(weight=WEIGHTS),
        nn.BCEWithLogitsLoss(TENSOR),
        _draw(23, 4),
        SHARES.round(),
    ),
    "divergence": Case(
        as_loss(nn.KLDivLoss(reduction="batchmean")),
        nn.KLDivLoss(reduction="batchmean"),
        _draw(23, 4).log_softmax(1),
        SHARES,
    ),
    "language": Case(
        LanguageModel(0.1),
        lambda outputs, targets: nn.CrossEntropyLoss(label_smoothing=0.1)(
            outputs.reshape(-1, 6), targets.reshape(-1)
        ),
        _draw(23, 7, 6),
        _classes(23, 7, of=6, masked=-100),
    ),
    "a user's own": Case(
        UserLoss(functional.smooth_l1_loss, "huber"),
        nn.SmoothL1Loss(),
        _draw(23, 4),
        SHARES,
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    chosen = CASES[request.param]
    chosen.loss.check(chosen.outputs, (None, chosen.targets))
    return chosen


def _batch(targets: Tensor) -> Batch:
    return (torch.zeros(len(targets), 1), targets)


def _value_and_slope(function: Any, outputs: Tensor) -> tuple[Tensor, Tensor]:
    outputs = outputs.clone().requires_grad_()
    value = function(outputs)
    return value.detach(), torch.autograd.grad(value, outputs)[0]


def test_value_and_gradient_are_torchs(case: Case) -> None:
    batch = _batch(case.targets)
    value, slope = _value_and_slope(lambda f: case.loss.mean(f, batch), case.outputs)
    expected, expected_slope = _value_and_slope(lambda f: case.torch(f, case.targets), case.outputs)
    torch.testing.assert_close(value, expected, rtol=ROUNDING, atol=0)
    torch.testing.assert_close(slope, expected_slope, rtol=ROUNDING, atol=ROUNDING)


def test_ragged_batches_weighted_by_mass_are_all_examples_at_once(case: Case) -> None:
    masses, means = [], []
    for start, stop in [(0, 10), (10, 20), (20, 23)]:
        batch = _batch(case.targets[start:stop])
        masses.append(case.loss.mass(nn.Identity(), batch))
        means.append(float(case.loss.mean(case.outputs[start:stop], batch)))
    together = sum(m * v for m, v in zip(masses, means, strict=True)) / sum(masses)
    whole = float(case.torch(case.outputs, case.targets))
    assert together == pytest.approx(whole, rel=ROUNDING)


def test_numerators_and_masses_are_those_of_the_examples_alone(case: Case) -> None:
    batch = _batch(case.targets)
    masses, numerators = case.loss.masses(batch), case.loss.numerators(case.outputs, batch)
    assert masses.dtype == torch.float64
    assert masses.shape == numerators.shape == (23,)
    for i in range(23):
        one = rows(batch, i, i + 1)
        assert float(case.loss.masses(one)) == float(masses[i])
        if masses[i] == 0:  # torch's own mean of nothing is NaN
            assert numerators[i] == 0
            continue
        alone = case.torch(case.outputs[i : i + 1], case.targets[i : i + 1])
        assert float(numerators[i] / masses[i]) == pytest.approx(float(alone), rel=ROUNDING)


def test_weights_are_not_rounded_to_single_precision() -> None:
    batch = _batch(torch.tensor([0]))
    assert float(CrossEntropy(class_weights=[0.1]).masses(batch)) == 0.1
    loss = as_loss(nn.BCEWithLogitsLoss(pos_weight=TENSOR))
    assert isinstance(loss, BinaryCrossEntropy)
    assert torch.equal(loss.pos_weight, TENSOR)  # type: ignore[arg-type]


# -- weights of targets ------------------------------------------------------------------------


@pytest.mark.parametrize("by_example", [False, True], ids=["targets", "examples"])
@pytest.mark.parametrize(
    "name",
    [
        "classes",
        "segmentation",
        "soft segmentation",
        "nll of pixels",
        "mse",
        "bce",
        "mse of scalars",
    ],
)
def test_weights_of_targets_are_means_by_weight(name: str, by_example: bool) -> None:
    """(w · terms).sum() / w.sum(), a mask where weights are 0 and 1."""
    case = CASES[name]
    terms = _terms(case)
    weights = _draw(*(terms.shape[:1] if by_example else terms.shape)).square().round()
    weights[3] = 0
    batch = {"x": torch.zeros(23, 1), "y": case.targets, "loss_weights": weights}
    spread = weights.view(*weights.shape, *[1] * (terms.dim() - weights.dim())).expand_as(terms)
    kept = torch.ones_like(terms)
    if isinstance(case.loss, CrossEntropy) and not case.targets.is_floating_point():
        kept = (case.targets != case.loss.ignore_index).double()
        if case.loss.class_weights is not None:
            kept = kept * TENSOR[case.targets.clamp(0, 3)]
    value, _ = _value_and_slope(lambda f: case.loss.mean(f, batch), case.outputs)
    expected = (spread * terms).sum() / (spread * kept).sum()
    torch.testing.assert_close(value, expected, rtol=ROUNDING, atol=0)
    halves = [rows(batch, 0, 10), rows(batch, 10, 23)]
    masses = [case.loss.mass(nn.Identity(), half) for half in halves]
    means = [
        float(case.loss.mean(outputs, half))
        for outputs, half in zip((case.outputs[:10], case.outputs[10:]), halves, strict=True)
    ]
    together = sum(m * v for m, v in zip(masses, means, strict=True)) / sum(masses)
    assert together == pytest.approx(float(expected), rel=ROUNDING)


def _terms(case: Case) -> Tensor:
    """Loss of each target by torch, unreduced."""
    loss, f, y = case.loss, case.outputs, case.targets
    if isinstance(loss, MeanSquaredError):
        return functional.mse_loss(f, y, reduction="none")
    if isinstance(loss, BinaryCrossEntropy):
        return functional.binary_cross_entropy_with_logits(f, y, reduction="none")
    assert isinstance(loss, CrossEntropy)
    if isinstance(loss, NegativeLogLikelihood):
        return functional.nll_loss(f, y, reduction="none")
    return functional.cross_entropy(
        f,
        y,
        weight=loss.class_weights,
        ignore_index=loss.ignore_index,
        label_smoothing=loss.label_smoothing,
        reduction="none",
    )


def test_weights_are_no_input_of_the_model() -> None:
    x, y = _draw(5, 1), _draw(5, 1).cos()
    mask = torch.tensor([True, False, True, True, False])
    batch = {"x": x, "y": y, "loss_weights": mask}
    value = MeanSquaredError().evaluate(Linear(), batch)
    assert float(value.detach()) == pytest.approx(float((2 * x - y)[mask].square().mean()))
    with pytest.raises(InputError, match="a weight for each target or example") as caught:
        MeanSquaredError().masses({**batch, "loss_weights": mask[:, None, None]})
    assert "(N, 1, 1)" in caught.value.got


# -- language models ---------------------------------------------------------------------------


def test_token_weights() -> None:
    outputs, targets = CASES["language"].outputs, CASES["language"].targets
    weights = _draw(23, 7).square()
    batch = (torch.zeros(23, 7), targets, weights)
    terms = functional.cross_entropy(
        outputs.reshape(-1, 6), targets.reshape(-1), reduction="none"
    ).view(23, 7)
    kept = weights * (targets != -100)
    expected = (terms * kept).sum() / kept.sum()
    value, slope = _value_and_slope(lambda f: LanguageModel().mean(f, batch), outputs)
    _, expected_slope = _value_and_slope(
        lambda f: (
            (functional.cross_entropy(f.transpose(1, 2), targets, reduction="none") * kept).sum()
            / kept.sum()
        ),
        outputs,
    )
    assert float(value) == pytest.approx(float(expected), rel=ROUNDING)
    torch.testing.assert_close(slope, expected_slope, rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(LanguageModel().masses(batch), kept.sum(1))
    seen: list[tuple[Any, ...]] = []

    class Spy(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            seen.append(inputs)
            return outputs

    LanguageModel().outputs(Spy(), batch)
    assert len(seen[0]) == 1, "the token weights are no input of the model"


# -- the user's own functions ------------------------------------------------------------------


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[2.0]], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_batches_as_dicts() -> None:
    x, y = _draw(5, 1), _draw(5, 1).cos()
    for loss in (MeanSquaredError(), as_loss(lambda f, t: (f - t).square().mean())):
        value = loss.evaluate(Linear(), {"x": x, "y": y})
        assert float(value.detach()) == pytest.approx(float((2 * x - y).square().mean()))


def test_step_losses_with_and_without_a_weight() -> None:
    x, y = _draw(5, 1), _draw(5, 1).cos()

    def step(model: nn.Module, batch: Batch) -> Tensor:
        return functional.mse_loss(model(batch[0]), batch[1])

    plain = StepLoss(step, "step")
    assert plain.mass(Linear(), (x, y)) == 5.0
    weighted = StepLoss(lambda model, batch: (step(model, batch), 2.5), "step")
    assert weighted.mass(Linear(), (x, y)) == 2.5
    mass = torch.tensor(3.0, requires_grad=True)
    live = StepLoss(lambda model, batch: (step(model, batch), mass), "step")
    assert live.mass(Linear(), (x, y)) == 3.0
    for loss in (plain, weighted, live):
        value = loss.evaluate(Linear(), (x, y))
        assert torch.equal(value, functional.mse_loss(2 * x, y))
        with pytest.raises(InputError, match="one loss an example"):
            loss.numerators(x, (x, y))


def test_a_step_may_differentiate() -> None:
    """As the residual of a differential equation does."""

    def step(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        x = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return (slope - 1).square().mean(), len(x)

    loss = StepLoss(step, "residual")
    assert loss.mass(Linear(), (_draw(5, 1),)) == 5.0
    assert float(loss.evaluate(Linear(), (_draw(5, 1),)).detach()) == 1.0


def test_a_users_loss_gets_its_targets_as_they_are() -> None:
    targets = {"low": _draw(5, 1), "high": _draw(5, 1) + 1}
    loss = as_loss(lambda f, t: ((f - t["low"]) * (f - t["high"])).mean())
    batch = (torch.zeros(5, 1), targets)
    outputs = _draw(5, 1)
    expected = (outputs - targets["low"]) * (outputs - targets["high"])
    torch.testing.assert_close(loss.mean(outputs, batch), expected.mean())
    torch.testing.assert_close(loss.numerators(outputs, batch), expected[:, 0])


# -- names and criteria ------------------------------------------------------------------------


def written_into(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean squared error, made where the outputs were."""
    outputs -= targets
    return outputs.square().mean()


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "empirical-fisher"])
@pytest.mark.parametrize("method", ["auto", "hutchinson"])
def test_a_users_loss_may_write_into_its_outputs(matrix: str, method: str) -> None:
    """A model's it may; so it may where they are a leaf, of which its own derivative is taken."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = torch.randn(32, 4).double(), torch.randn(32, 3).double()
    found, expected = (
        hesscli.trace(Problem(model, loss, data), matrix=matrix, method=method, probes=2)
        for loss in (written_into, nn.functional.mse_loss)
    )
    # The same probes of the same matrix, whose products differ by their rounding.
    assert found.trace.estimate == pytest.approx(expected.trace.estimate, rel=1e-12)


def test_names_and_criteria_become_losses() -> None:
    for name, kind in NAMED.items():
        assert type(as_loss(name)) is kind
        assert as_loss(name).name == name
    made = as_loss(nn.CrossEntropyLoss(TENSOR, ignore_index=7, label_smoothing=0.3))
    assert isinstance(made, CrossEntropy)
    assert (made.label_smoothing, made.ignore_index) == (0.3, 7)
    assert torch.equal(made.class_weights, TENSOR)  # type: ignore[arg-type]
    assert type(as_loss(nn.NLLLoss(TENSOR))) is NegativeLogLikelihood
    assert type(as_loss(nn.MSELoss())) is MeanSquaredError
    assert type(as_loss(nn.L1Loss())) is UserLoss
    weighed = as_loss(nn.BCEWithLogitsLoss(TENSOR, pos_weight=2 * TENSOR))
    assert isinstance(weighed, BinaryCrossEntropy)
    assert torch.equal(weighed.weight, TENSOR)  # type: ignore[arg-type]
    assert torch.equal(weighed.pos_weight, 2 * TENSOR)  # type: ignore[arg-type]
    assert type(as_loss(nn.BCELoss(TENSOR))) is BinaryCrossEntropyOfProbabilities
    assert type(as_loss(nn.KLDivLoss(reduction="batchmean"))) is UserLoss
    assert as_loss(made) is made


def test_torchs_functions_become_losses() -> None:
    assert type(as_loss(functional.cross_entropy)) is CrossEntropy
    assert type(as_loss(functional.nll_loss)) is NegativeLogLikelihood
    assert type(as_loss(functional.mse_loss)) is MeanSquaredError
    assert type(as_loss(functional.binary_cross_entropy_with_logits)) is BinaryCrossEntropy
    assert type(as_loss(functional.l1_loss)) is UserLoss
    made = as_loss(partial(functional.cross_entropy, weight=TENSOR, ignore_index=2))
    assert isinstance(made, CrossEntropy)
    assert torch.equal(made.class_weights, TENSOR)  # type: ignore[arg-type]
    assert made.ignore_index == 2
    weighted = partial(functional.mse_loss, weight=torch.ones(3))
    assert type(as_loss(weighted)) is UserLoss
    for function in (functional.cross_entropy, functional.l1_loss):
        assert as_loss(partial(function, reduction="sum")).reduction == "sum"


@pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, nn.MSELoss, nn.L1Loss])
def test_means_and_sums_are_taken(kind: Any) -> None:
    assert as_loss(kind(reduction="sum")).reduction == "sum"
    assert as_loss(kind(), reduction="sum").reduction == "sum"
    with pytest.raises(InputError) as caught:
        as_loss(kind(reduction="none"))
    assert caught.value.what == "the loss must be a mean or a sum"
    assert "none" in caught.value.got


@pytest.mark.parametrize("wrong", ["crossentropy", 3, None])
def test_unknown_losses(wrong: Any) -> None:
    with pytest.raises(InputError, match="unknown loss"):
        as_loss(wrong)


# -- outputs and targets that cannot be meant together -----------------------------------------


@pytest.mark.parametrize(
    ("name", "outputs", "targets", "cure"),
    [
        ("cross_entropy", torch.zeros(5, 3), torch.zeros(5, 1, dtype=torch.long), "squeeze(1)"),
        ("bce_with_logits", torch.zeros(5, 1), torch.zeros(5), "unsqueeze(1)"),
        ("mse", torch.zeros(5), torch.zeros(5, 1), "squeeze(1)"),
    ],
)
def test_a_column_too_many_or_too_few(
    name: str, outputs: Tensor, targets: Tensor, cure: str
) -> None:
    """The advice is code that makes the targets fit."""
    with pytest.raises(InputError) as caught:
        as_loss(name).check(outputs, _batch(targets))
    assert caught.value.hint.startswith(f"targets.{cure}")
    fitting = eval(caught.value.hint.partition(",")[0], {"targets": targets})
    as_loss(name).check(outputs, _batch(fitting))


@pytest.mark.parametrize("label", [4, -1, 255])
@pytest.mark.parametrize("name", ["cross_entropy", "nll"])
def test_labels_out_of_range(name: str, label: int) -> None:
    targets = torch.tensor([0, label, 3])
    with pytest.raises(UnsoundError) as caught:
        as_loss(name).check(torch.zeros(3, 4), _batch(targets))
    assert caught.value.exit_code == ExitCode.UNSOUND
    assert caught.value.got == f"label {label} for outputs of 4 classes"


@pytest.mark.parametrize(
    ("name", "outputs", "targets"),
    [
        ("mse", (5, 1), (5,)),
        ("mse", (5,), (5, 1)),
        ("bce_with_logits", (5, 1), (5,)),
        ("cross_entropy", (5, 4), (5, 1)),
        ("cross_entropy", (5, 4), (6,)),
        ("cross_entropy", (5, 4, 2, 2), (5,)),
        ("cross_entropy", (5,), (5,)),
        ("nll", (5, 4), (5, 4)),
        ("language_model", (5, 4), (5,)),
        ("language_model", (5, 3, 4), (5, 4)),
    ],
)
def test_shapes_that_do_not_fit(
    name: str, outputs: tuple[int, ...], targets: tuple[int, ...]
) -> None:
    classes = name not in ("mse", "bce_with_logits")
    labels = torch.zeros(targets, dtype=torch.long if classes else torch.float32)
    with pytest.raises(InputError) as caught:
        as_loss(name).check(torch.zeros(outputs), _batch(labels))
    assert caught.value.exit_code == ExitCode.INPUT
    shape = shape_of(torch.empty(targets), outputs[0])
    assert caught.value.got.endswith(f"of shape {shape}") or "outputs of" in caught.value.got


@pytest.mark.parametrize("shape", [(3,), (3, 2)])
def test_labels_in_floating_point_are_refused_plainly(shape: tuple[int, ...]) -> None:
    """Class numbers stored as floats look like probabilities to torch."""
    batch, loss = _batch(torch.zeros(shape)), CrossEntropy()
    assert loss.masses(batch).tolist() == [math.prod(shape[2:])] * 3
    with pytest.raises(InputError, match="class labels that are whole numbers") as caught:
        loss.check(torch.zeros(3, 4, *shape[1:]), batch)
    assert caught.value.got == "targets of dtype float32"
    assert "labels.long()" in caught.value.hint


def test_targets_that_only_lack_a_column() -> None:
    with pytest.raises(InputError) as caught:
        BinaryCrossEntropy().check(torch.zeros(7, 1), _batch(torch.zeros(7)))
    assert "(N, 1)" in caught.value.what
    assert caught.value.got == "targets of shape (N,)"
    assert "squeeze" in caught.value.hint


def test_weights_of_binary_losses_are_of_the_entries_of_one_example() -> None:
    outputs, targets = CASES["bce"].outputs, CASES["bce"].targets
    for weight in (TENSOR, TENSOR[None], TENSOR[:1]):
        as_loss(nn.BCEWithLogitsLoss(weight)).check(outputs, _batch(targets))
    for weight in (torch.ones(23, 1), torch.ones(23, 4), torch.ones(3)):
        with pytest.raises(InputError, match=r"entries of one example, \(4,\)"):
            as_loss(nn.BCELoss(weight)).check(outputs.sigmoid(), _batch(targets))


def test_probabilities_lie_between_zero_and_one() -> None:
    with pytest.raises(UnsoundError, match="bce needs outputs that are probabilities") as caught:
        BinaryCrossEntropyOfProbabilities().check(torch.tensor([[1.5]]), _batch(torch.zeros(1, 1)))
    assert "1.5" in caught.value.got


def test_accuracy() -> None:
    outputs = torch.tensor([[0.0, 2, 1], [3, 0, 0], [0, 0, 5], [9, 0, 0]])
    pair = CrossEntropy().correct(outputs, _batch(torch.tensor([1, 1, 2, -100])))
    assert [int(n) for n in pair or ()] == [2, 3]
    pair = LanguageModel().correct(outputs[None], _batch(torch.tensor([[1, 1, 2, -100]])))
    assert [int(n) for n in pair or ()] == [2, 3]
    pair = BinaryCrossEntropy().correct(torch.tensor([[1.0, -1]]), _batch(torch.tensor([[1.0, 1]])))
    assert [int(n) for n in pair or ()] == [1, 2]
    shares = _batch(torch.tensor([[0.9, 1.0]]))
    assert BinaryCrossEntropy().correct(torch.tensor([[1.0, -1]]), shares) is None
    sure = torch.tensor([[0.9, 0.2]])
    pair = BinaryCrossEntropyOfProbabilities().correct(sure, _batch(torch.tensor([[1.0, 1]])))
    assert [int(n) for n in pair or ()] == [1, 2]
    assert MeanSquaredError().correct(outputs, _batch(outputs)) is None
    assert CrossEntropy().correct(outputs, _batch(outputs.softmax(1))) is None
