"""Problems: what is analysed is the user's model on the user's data, and nothing changes."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import hesscli
from hesscli.errors import ExitCode, HesscliError, InputError, UnsoundError, UsageError
from hesscli.problem import proof as proofs
from hesscli.problem.freezing import FrozenData
from hesscli.problem.loading import resolve_device
from hesscli.problem.problem import Problem
from hesscli.results import Snapshot

ROUNDING = 1e-12  # float64, sums of a few hundred terms


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _labels(count: int, of: int = 3) -> Tensor:
    return torch.randint(of, (count,), generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """Batch norm, a frozen tensor and one that the loss does not reach."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 3)
        self.unused = nn.Linear(7, 1)
        self.head.bias.requires_grad_(False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.tanh(self.norm(self.first(x))))
        return result


DATA = (_draw(100, 4), _labels(100))


def _problem(
    model: nn.Module | None = None, loss: Any = "cross_entropy", **options: Any
) -> Problem:
    return Problem(model or Net().eval(), loss, [DATA], **options)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _legacy() -> list[int]:
    state: Any = np.random.get_state()
    return [int(word) for word in state[1]]


def _storages(model: nn.Module) -> dict[str, tuple[int, int]]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: (id(value), value.data_ptr()) for name, value in named}


# -- the proof ---------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_proving_leaves_everything_as_it_was(training: bool) -> None:
    model = Net().train(training)
    model.head.eval()
    model.first.weight.grad = torch.full_like(model.first.weight, 3.0)
    state, storages = _state(model), _storages(model)
    modes = [module.training for module in model.modules()]
    generators = torch.get_rng_state(), random.getstate(), _legacy()

    problem = _problem(model, weight_decay=0.1)
    problem.prove()
    hesscli.Hessian(problem) @ torch.ones(problem.parameters.size, dtype=torch.float64)

    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert _storages(model) == storages
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.first.weight.grad, torch.full_like(model.first.weight, 3.0))
    assert all(p.grad is None for n, p in model.named_parameters() if n != "first.weight")
    assert int(model.norm.num_batches_tracked) == 0  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (random.getstate(), _legacy()) == generators[1:]


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_loss_gradient_and_accuracy_are_the_full_batchs(
    decay: float, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proofs, "_KEPT", 8 * 1000 * kept)
    weights = torch.tensor([0.1, 2.0, 0.9], dtype=torch.float64)
    model = Net().eval()
    trainable = [p for p in model.parameters() if p.requires_grad]
    outputs = model(DATA[0])
    loss = functional.cross_entropy(outputs, DATA[1], weight=weights)
    loss = loss + decay / 2 * sum(p.square().sum() for p in trainable)
    slope = torch.autograd.grad(loss, trainable, materialize_grads=True)
    accuracy = float((outputs.argmax(1) == DATA[1]).double().mean())

    # 100 examples in 16 batches of 6 and 7: none weighs what another does.
    problem = _problem(model, nn.CrossEntropyLoss(weights), weight_decay=decay)
    assert sorted(set(problem.data.counts)) == [6, 7]
    proof = problem.prove()
    assert proof.loss == pytest.approx(float(loss.detach()), rel=ROUNDING)
    assert proof.accuracy == pytest.approx(accuracy, rel=ROUNDING)
    flat = torch.cat([part.reshape(-1) for part in slope])
    torch.testing.assert_close(proof.gradient, flat, rtol=ROUNDING, atol=ROUNDING)
    assert proof.gradient_norm == pytest.approx(float(flat.norm()), rel=ROUNDING)
    assert problem.total_weight == pytest.approx(float(weights[DATA[1]].sum()), rel=ROUNDING)
    assert sum(batch.weight for batch in problem.batches()) == pytest.approx(1, rel=ROUNDING)


def test_train_mode_is_analysed_as_it_is() -> None:
    """With batch statistics, the loss is the mean over the batches as they are cut."""
    model = Net().train()
    problem = _problem(model)
    expected = sum(
        len(y) / 100 * float(functional.cross_entropy(copy.deepcopy(model)(x), y).detach())
        for x, y in problem.data.batches
    )
    assert problem.prove().loss == pytest.approx(expected, rel=ROUNDING)
    assert problem.couples_examples == "norm (BatchNorm1d)"
    assert Problem(model.eval(), "cross_entropy", [DATA]).couples_examples is None
    bare = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)).eval()
    assert Problem(bare, "cross_entropy", [DATA]).couples_examples == "0 (BatchNorm1d)"


def test_batch_norm_gets_batches_of_the_size_that_was_asked_for() -> None:
    """On smaller ones, as error bars would like them, it is another function."""
    rows = TensorDataset(*DATA)
    mixed = Problem(Net().train(), "cross_entropy", rows, batch_size=32)
    assert mixed.data.counts == (32, 32, 32, 4)
    assert len(Problem(Net().eval(), "cross_entropy", rows, batch_size=32).data.counts) == 16
    assert _problem(Net().train(), batch_size=32).data.counts == (100,)  # as it was listed


def test_an_observer_can_stop_the_proof() -> None:
    seen: list[float | None] = []

    def observe(snapshot: Snapshot) -> bool:
        seen.append(snapshot.done)
        return True

    problem = _problem()
    with pytest.raises(KeyboardInterrupt):
        problem.prove(observe)
    assert seen == [problem.data.count]  # small batches are run as one
    assert problem.prove().accuracy is not None


def test_report() -> None:
    report = _problem(weight_decay=0.5, examples=60).report("ggn")
    assert report.num_parameters == 20 + 5 + 10 + 15 + 8
    assert report.num_unreached == 8
    assert report.num_frozen == 3
    assert (report.num_examples, report.num_examples_available) == (60, 100)
    assert (report.num_batches, report.total_weight) == (60, 60.0)  # 64 groups, if there can be
    assert (report.loss_name, report.weight_decay) == ("cross_entropy", 0.5)
    assert (report.dtype, report.device, report.training_mode) == ("float64", "cpu", False)
    assert (report.matrix, report.checkpoint) == ("ggn", None)
    assert len(report.manifest_sha256) == 64
    again = _problem(weight_decay=0.5, examples=60)
    assert again.report("ggn") == report
    other = _problem(weight_decay=0.5, examples=60, seed=1)
    assert other.report("ggn").manifest_sha256 != report.manifest_sha256
    assert other.sampling_fraction == 0.6


def test_unreached_parameters_are_those_of_all_batches() -> None:
    class Switch(nn.Module):
        """Reaches one half for large inputs and the other for small ones."""

        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.parts[int(x.mean() > 0)](x)
            return result

    batches = [(torch.full((4, 1), sign), torch.zeros(4, 1)) for sign in (-1.0, 1.0)]
    problem = Problem(Switch(), lambda f, t: (f - t).square().mean(), _frozen(batches))
    assert problem.prove().unreached == ("parts.2.weight", "parts.2.bias")


def _frozen(batches: list[Any]) -> FrozenData:
    counts = tuple(len(batch[0]) for batch in batches)
    return FrozenData(tuple(batches), counts, sum(counts), True, "by hand")


def test_batches_without_mass_are_passed_over() -> None:
    masked = torch.full((20,), -100)
    batches = [(_draw(20, 4), masked), DATA, (_draw(20, 4), masked)]
    problem = Problem(Net().eval(), "cross_entropy", _frozen(batches))
    assert problem.masses == [0, 100, 0]
    assert [batch.index for batch in problem.batches()] == [1]
    expected = _problem().prove()
    assert problem.prove().loss == pytest.approx(expected.loss, rel=ROUNDING)
    assert problem.prove().accuracy == expected.accuracy
    assert problem.sample(8).count == 8
    assert all((row == DATA[0]).all(1).any() for row in problem.sample(8).data[0])
    with pytest.raises(UnsoundError, match="the examples weigh nothing"):
        Problem(Net().eval(), "cross_entropy", [(_draw(20, 4), masked)])


def test_a_sample_starts_where_something_weighs() -> None:
    labels = DATA[1].clone()
    labels[:93] = -100
    problem = Problem(Net().eval(), "cross_entropy", _frozen([(DATA[0], labels)]))
    sample = problem.sample(8)
    assert sample.count == 7
    assert torch.equal(sample.data[0], DATA[0][93:])
    assert torch.isfinite(problem.evaluate(sample.data))


# -- evaluation --------------------------------------------------------------------------------


def test_given_parameters_stand_in_for_the_models() -> None:
    model = Net().eval()
    problem = _problem(model)
    other = _draw(3, 5)
    at_other = problem.evaluate(DATA, {"head.weight": other})
    with torch.no_grad():
        model.head.weight.copy_(other)
    torch.testing.assert_close(at_other, functional.cross_entropy(model(DATA[0]), DATA[1]))


def test_computing_in_another_type_gives_the_tensors_back() -> None:
    model = Net().eval().float()
    model.first.weight.grad = torch.ones_like(model.first.weight)
    problem = _problem(model)
    state, storages = _state(model), _storages(model)
    single = problem.evaluate(problem.batch(0).data).detach()

    def unchanged() -> bool:
        same = all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
        return same and _storages(model) == storages and problem.dtype == torch.float32

    with problem.in_dtype(torch.float64):
        assert {t.dtype for t in model.parameters()} == {torch.float64}
        assert model.norm.running_mean is not None
        assert model.norm.running_mean.dtype == torch.float64
        double = problem.evaluate(problem.batch(0).data).detach()
        assert double.dtype == torch.float64
    assert unchanged()
    torch.testing.assert_close(double.float(), single)
    assert double != single.double()
    with pytest.raises(KeyError), problem.in_dtype(torch.float64):
        raise KeyError
    assert unchanged()


def test_type_and_batch_size_can_be_chosen() -> None:
    problem = _problem(Net().eval(), dtype=torch.float32, batch_size=3)
    assert problem.dtype == problem.batch(0).data[0].dtype == torch.float32
    assert problem.batch(0).data[1].dtype == torch.int64
    assert problem.report("hessian").dtype == "float32"
    assert max(problem.data.counts) == 3


class OfSixteen(nn.Module):
    """Made for sixteen rows at most: with more it does something else."""

    def __init__(self, with_more: str) -> None:
        super().__init__()
        self.head, self.with_more = nn.Linear(4, 3), with_more

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(x)
        if len(x) <= 16:
            return y
        if self.with_more == "raises":
            raise RuntimeError("no room for more")
        return y / 2 if self.with_more == "halves" else (y + y.detach()) / 2


@pytest.mark.parametrize(
    ("model", "groups"),
    [
        (nn.Linear(4, 3), 1),
        (OfSixteen("raises"), 20),
        (OfSixteen("halves"), 20),
        (OfSixteen("has half the gradient"), 20),
    ],
    ids=["any", "raises", "halves", "half a gradient"],
)
def test_small_batches_are_computed_as_one_where_that_is_the_same(
    model: nn.Module, groups: int
) -> None:
    torch.manual_seed(1)
    data = TensorDataset(_draw(320, 4), _labels(320))
    problem = Problem(model, "cross_entropy", data, batch_size=16, examples="all")
    assert len(problem.indices) == 20
    assert len(problem.joint()) == groups
    parts = [float(problem.evaluate(problem.batch(i).data).detach()) for i in problem.indices]
    assert problem.prove().loss == pytest.approx(sum(parts) / 20, rel=1e-5)


def test_batches_whose_loss_is_zero_are_not_computed_as_one() -> None:
    """Of them nothing shows that more of them make the same."""
    x = _draw(320, 4)
    model = nn.Linear(4, 3).double()

    def of_sixteen(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum() / min(len(outputs), 20)

    data = TensorDataset(x, model(x).detach())
    problem = Problem(model, of_sixteen, data, batch_size=16, examples="all")
    trace = 3 * float((x.square().sum(1) + 1).mean()) * 2
    assert hesscli.trace(problem).trace.estimate == pytest.approx(trace, rel=ROUNDING)


@pytest.mark.parametrize("with_more", ["raises", "halves", "has half the gradient"])
@pytest.mark.parametrize("kind", ["loader", "list", "stream"])
def test_examples_are_not_cut_into_larger_batches_that_are_others(
    kind: str, with_more: str
) -> None:
    torch.manual_seed(1)
    model, x, y = OfSixteen(with_more).double(), _draw(320, 4), _labels(320)
    pairs = list(zip(torch.split(x, 16), torch.split(y, 16), strict=True))
    sources = {
        "loader": DataLoader(TensorDataset(x, y), batch_size=16),
        "list": pairs,
        "stream": iter(pairs),
    }
    problem = Problem(model, "cross_entropy", sources[kind], examples="all")
    assert problem.data.counts == (16,) * 20
    losses = [nn.functional.cross_entropy(model(a), b) for a, b in pairs]
    expected = torch.stack(losses).mean()
    assert problem.prove().loss == pytest.approx(float(expected.detach()), rel=ROUNDING)
    slopes = torch.autograd.grad(expected, tuple(model.parameters()))
    length = float(torch.cat([slope.reshape(-1) for slope in slopes]).norm())
    assert problem.prove().gradient_norm == pytest.approx(length, rel=ROUNDING)


def test_examples_are_cut_anew_where_larger_batches_are_the_same() -> None:
    loader = DataLoader(TensorDataset(_draw(320, 4), _labels(320)), batch_size=4)
    problem = Problem(nn.Linear(4, 3), "cross_entropy", loader, examples="all")
    assert problem.data.counts == (20,) * 16


def test_step_losses_that_mix_keep_the_users_batches() -> None:
    def step(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        x, y = batch
        outputs = model(x)
        return functional.cross_entropy(outputs - outputs.mean(0), y), len(y)

    step_loss = hesscli.problem.losses.StepLoss(step, "steps:step")
    batches = [tuple(t[start : start + 40] for t in DATA) for start in range(0, 100, 40)]
    problem = Problem(Net().eval(), step_loss, batches)
    assert problem.data.counts == (40, 40, 20)
    expected = sum(len(y) / 100 * float(step(Net().eval(), (x, y))[0].detach()) for x, y in batches)
    assert problem.prove().loss == pytest.approx(expected, rel=ROUNDING)
    assert problem.prove().accuracy is None
    assert problem.report("hessian").loss_name == "steps:step"
    assert problem.sample(8).count == 40


def test_frozen_data_is_taken_as_it_is() -> None:
    data = _problem(seed=5).data
    assert Problem(Net().eval(), "cross_entropy", data).data is data


# -- refusals ----------------------------------------------------------------------------------


def _refused(kind: type[HesscliError], model: nn.Module, loss: Any, data: Any) -> HesscliError:
    with pytest.raises(kind) as caught:
        Problem(model, loss, data).prove()
    return caught.value


def test_weights_that_are_not_finite() -> None:
    model = Net().eval()
    with torch.no_grad():
        model.first.weight[0, 0] = float("nan")
    error = _refused(UnsoundError, model, "cross_entropy", [DATA])
    assert error.what == "the weights are not finite"
    assert "first.weight (1 tensors)" in error.got


def test_losses_and_gradients_that_are_not_finite() -> None:
    broken = DATA[0].clone()
    broken[3, 1] = float("nan")
    error = _refused(UnsoundError, Net().eval(), "cross_entropy", [(broken, DATA[1])])
    assert error.what == "the loss is not finite"
    assert "whose inputs hold NaN or infinity" in error.got
    error = _refused(UnsoundError, Net().eval(), lambda f, t: f.sum() / 0.0, [DATA])
    assert "inputs" not in error.got
    # √0 is finite, its slope is not.
    error = _refused(
        UnsoundError, Net().eval(), lambda f, t: (f - f.detach()).norm(dim=1).sqrt().mean(), [DATA]
    )
    assert error.what == "the gradient is not finite"
    assert "first.weight" in error.got
    assert "unused" not in error.got


def test_problems_without_a_gradient() -> None:
    frozen = Net().requires_grad_(False)
    error = _refused(InputError, frozen, "cross_entropy", [DATA])
    assert error.what == "the model has no trainable parameter"
    error = _refused(UnsoundError, Net().eval(), lambda f, t: f.detach().mean(), [DATA])
    assert error.what == "the loss does not depend on any parameter through autograd"
    error = _refused(InputError, Net().eval(), lambda f, t: f.sum(1), [DATA])
    assert error.what == "the loss must be one number in a tensor"
    error = _refused(InputError, Net().eval(), lambda f, t: float(f.detach().sum()), [DATA])
    assert error.got.endswith("gave float")
    error = _refused(UnsoundError, Net().eval(), "cross_entropy", [(DATA[0], DATA[1] + 1)])
    assert error.what == "a label lies outside the model's classes"
    error = _refused(InputError, Net().eval(), "cross_entropy", [(_draw(10, 5), _labels(10))])
    assert error.what == "the model or its loss raised an error"
    assert "mat1 and mat2" in error.got


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    with pytest.raises(UsageError) as caught:
        resolve_device("cuda:99")
    assert caught.value.exit_code == ExitCode.USAGE


# -- from files --------------------------------------------------------------------------------


def test_a_sample_is_loaded_as_its_readme_says(sunspots: Problem) -> None:
    report = sunspots.report("hessian")
    assert report.num_parameters == 315
    assert (report.num_examples, report.num_examples_available) == (256, 256)
    assert report.num_batches == 16
    assert report.dtype == "float64"
    assert report.loss == pytest.approx(0.411975240673531, abs=1e-13)
    assert report.gradient_norm < 1e-10
    assert report.checkpoint is not None
    assert report.checkpoint.path.endswith("model.pt")


@pytest.mark.parametrize(
    "reference", ["torch.nn:CrossEntropyLoss", "torch.nn.functional:cross_entropy"]
)
def test_torchs_own_losses_in_a_spec_count_as_torch_does(reference: str, tmp_path: Path) -> None:
    torch.save({"weight": _draw(3, 4), "bias": _draw(3)}, tmp_path / "model.pt")
    save_file({"x": DATA[0], "y": DATA[1]}, tmp_path / "data.safetensors")
    (tmp_path / "hesscli.toml").write_text(
        '[model]\nfactory = "torch.nn:Linear"\nkwargs = { in_features = 4, out_features = 3 }\n'
        '[data]\nfile = "data.safetensors"\ninputs = "x"\ntargets = "y"\n'
        f'[loss]\nfactory = "{reference}"\nkwargs = {{ ignore_index = 1 }}\n'
    )
    problem = hesscli.load(tmp_path / "model.pt", trust=True)
    assert problem.loss.name == "cross_entropy"
    assert problem.total_weight == int((DATA[1] != 1).sum())


def test_double_precision_weights_are_not_rounded_on_the_way(tmp_path: Path) -> None:
    """A factory that builds float32 must not make float32 of a float64 checkpoint."""
    state = {"weight": _draw(3, 4), "bias": _draw(3)}
    torch.save(state, tmp_path / "model.pt")
    save_file({"x": DATA[0], "y": DATA[1]}, tmp_path / "data.safetensors")
    (tmp_path / "hesscli.toml").write_text(
        '[model]\nfactory = "torch.nn:Linear"\nkwargs = { in_features = 4, out_features = 3 }\n'
        '[data]\nfile = "data.safetensors"\ninputs = "x"\ntargets = "y"\n'
        '[loss]\nname = "cross_entropy"\n'
    )
    problem = hesscli.load(tmp_path / "model.pt", trust=True)
    assert problem.dtype == torch.float64
    assert all(torch.equal(p.tensor, state[p.name]) for p in problem.parameters)
    loss = functional.cross_entropy(DATA[0] @ state["weight"].T + state["bias"], DATA[1])
    assert problem.prove().loss == pytest.approx(float(loss), rel=ROUNDING)
    single = hesscli.load(tmp_path / "model.pt", trust=True, dtype="float32")
    assert single.dtype == torch.float32
    assert single.prove().loss == pytest.approx(float(loss), rel=1e-5)
    assert load_file(tmp_path / "data.safetensors")["x"].dtype == torch.float64


def test_devices_that_are_not_there_are_refused() -> None:
    """From Python as from the command line, where torch has errors of its own."""
    model, data = nn.Linear(3, 2), (torch.randn(8, 3), torch.randn(8, 2))
    with pytest.raises(UsageError) as told:
        Problem(model, "mse", data, device="cuda:99")
    assert told.value.what == "no such device"
