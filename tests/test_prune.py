"""``hesscli prune``: what goes, what is written, and what is said of it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from program import SUNSPOTS, hesscli_warm, three_lines
from safetensors.torch import load_file, save_file
from shown import on_one_line, printed
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hesscli
from hesscli.diagnostics import pruning_study
from hesscli.diagnostics.pruning_choice import Candidates
from hesscli.errors import ExitCode, UsageError
from hesscli.ledger import FileLedger
from hesscli.render import words
from hesscli.render.tables.prune import prune_table
from hesscli.results import Snapshot

SAMPLES = SUNSPOTS.parent.parent
WEIGHTS = 18 * 12 + 4 * 18 + 4
"""That may go of the sunspots' network."""


def mean_squared_error(state: dict[str, Tensor]) -> float:
    """By the sample's own network, as its script builds it."""
    sys.path.insert(0, str(SUNSPOTS.parent))
    try:
        sys.modules.pop("net", None)
        from net import SunspotNet  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(SUNSPOTS.parent))
        sys.modules.pop("net", None)
    net = SunspotNet(12).double()
    net.load_state_dict(state)
    data = load_file(SUNSPOTS.parent / "sunspots.safetensors")
    return nn.functional.mse_loss(net(data["lags"]), data["next"]).item()


@pytest.mark.parametrize(("sparsity", "steps", "zeros"), [("90%", 4, 263), ("33%", 1, 96)])
def test_the_checkpoint_has_the_sparsity_and_the_loss_that_are_said(
    sparsity: str, steps: int, zeros: int, tmp_path: Path
) -> None:
    line = ("prune", SUNSPOTS, "--sparsity", sparsity, "--steps", steps, "--window", 64)
    run = hesscli_warm(*line, "--dir", "out", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    document = json.loads((tmp_path / "out" / "prune.json").read_text())
    written = tmp_path / document["files"]["checkpoint"]
    old, new = (torch.load(path, weights_only=True) for path in (SUNSPOTS, written))
    assert list(old) == list(new)
    matrices = [value for name, value in new.items() if name.endswith("weight")]
    assert sum(value.numel() for value in matrices) == WEIGHTS
    assert sum(int((value == 0).sum()) for value in matrices) == zeros
    assert (
        document["sparsity"]["num_zeros"] == zeros == round(document["sparsity"]["asked"] * WEIGHTS)
    )
    assert all(torch.equal(old[name], new[name]) for name in old if name.endswith("bias"))
    methods = {one["name"]: one for one in document["methods"]}
    assert methods["mfac"]["loss"] == pytest.approx(mean_squared_error(new), rel=1e-12)
    assert document["before"]["loss"] == pytest.approx(mean_squared_error(old), rel=1e-12)
    assert len(methods["mfac"]["steps"]) == steps
    by_size = np.sort(np.concatenate([old[n].abs().flatten() for n in old if "weight" in n]))
    small = {n: v * (v.abs() > by_size[zeros - 1]) if "weight" in n else v for n, v in old.items()}
    assert methods["magnitude"]["loss"] == pytest.approx(mean_squared_error(small), rel=1e-12)
    assert methods["mfac"]["loss"] < methods["magnitude"]["loss"]
    assert methods["mfac"]["recalibrated"] is None  # it has no batch norm
    spec, few = ("--spec", SUNSPOTS.parent / "hesscli.toml"), ("--probes", 2, "--dir", "-")
    again = hesscli_warm("trace", written, *spec, *few, cwd=tmp_path)
    assert again.returncode == 0, again.stderr


def test_a_network_in_memory_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).eval()
    net[1].running_mean.normal_()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    data = torch.randn(64, 6), torch.randint(3, (64,))
    found = hesscli.prune(hesscli.Problem(net, "cross_entropy", data), sparsity=0.5, per_layer=True)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert found.checkpoint == {}
    assert [layer.num_zeros for layer in found.layers] == [24, 12]
    own = {name: torch.from_numpy(value) for name, value in found.weights.items()}
    net.load_state_dict(own, strict=False)
    loss = float(nn.functional.cross_entropy(net(data[0]), data[1]).detach())
    assert found.methods[0].loss == pytest.approx(loss, rel=1e-5)
    norm = net[1]
    norm.reset_running_stats()
    norm.momentum = None
    net.train()(data[0])
    loss = float(nn.functional.cross_entropy(net.eval()(data[0]), data[1]).detach())
    assert found.methods[0].recalibrated is not None
    assert found.methods[0].recalibrated.loss == pytest.approx(loss, rel=1e-5)


def linear_network(loss: str) -> hesscli.Problem:
    """A linear network of 40 weights that is right by large margins, where its loss is flat."""
    generator = torch.Generator().manual_seed(0)
    net, inputs = nn.Linear(10, 4, bias=False), torch.randn(64, 10, generator=generator)
    with torch.no_grad():
        net.weight.copy_(10 * torch.randn(4, 10, generator=generator))
        targets = net(inputs)
    noise = torch.randn(64, 4, generator=generator)
    wanted = (targets + noise).double() if loss == "mse" else targets.argmax(1)
    return hesscli.Problem(net.double(), loss, (inputs.double(), wanted))


@pytest.mark.parametrize(
    ("loss", "steps"), [("mse", 1), ("cross_entropy", 1), ("cross_entropy", 2)]
)
def test_a_prediction_is_marked_where_the_quadratic_does_not_reach(loss: str, steps: int) -> None:
    """It is the change where errors are squared; cross-entropy that is flat grows all the same."""
    problem = linear_network(loss)
    window = hesscli.WindowOptions(size=32, damping=1e-2)
    found = hesscli.prune(problem, sparsity=0.9, steps=steps, window=window)
    change = found.methods[0].loss - found.before.loss  # type: ignore[operator]
    shown = on_one_line(printed(prune_table(found), width=400))
    assert found.predicted is not None
    if loss == "mse":
        assert found.predicted == pytest.approx(change, rel=1e-9)
        assert found.holds is True
        assert "!" not in shown
        return
    assert found.holds is False
    assert abs(change - found.predicted) > max(abs(change), abs(found.predicted)) / 3
    assert f"changed by {words.number(change)}!, where" in shown
    assert "a quadratic does not reach so far" in shown
    assert ("--steps 16" in shown) == (steps == 1)


def pruned_by_inverses(
    net: nn.Module, data: tuple[Tensor, Tensor], sparsity: float, steps: int, damping: float
) -> Tensor:
    """Weights ``(d,)`` after steps of Optimal Brain Surgeon, each with an inverse of its own."""
    tensors = list(net.parameters())
    weights = nn.utils.parameters_to_vector(tensors).detach()
    gone = torch.zeros(len(weights), dtype=torch.bool)
    for step in range(1, steps + 1):
        nn.utils.vector_to_parameters(weights, tensors)
        losses = nn.functional.cross_entropy(net(data[0]), data[1], reduction="none")
        parts = (torch.autograd.grad(one, tensors, retain_graph=True) for one in losses)
        rows = torch.stack([torch.cat([part.flatten() for part in each]) for each in parts])
        rows = rows[:, ~gone]
        matrix = rows.T @ rows / len(rows)
        inverse = torch.linalg.inv(matrix + damping * torch.eye(len(matrix)).double())
        saliency = torch.full_like(weights, -1.0)
        saliency[~gone] = weights[~gone].square() / (2 * inverse.diagonal())
        now = torch.zeros_like(gone)
        count = round(len(weights) * (1 - (1 - sparsity) ** (step / steps)))
        now[saliency.argsort(stable=True)[:count]] = True
        among, old = now[~gone], weights[~gone]
        new = old - inverse[:, among] @ torch.linalg.solve(inverse[among][:, among], old[among])
        weights = weights.index_put((~gone,), new).masked_fill(now, 0.0)
        gone = now
    return weights


@pytest.mark.parametrize(("sparsity", "steps"), [(0.5, 1), (0.9, 4)])
def test_steps_are_those_by_dense_inverses(sparsity: float, steps: int) -> None:
    """In float64, of matrices whose condition is below 1e4: in each step κ d u of the weights."""
    generator = torch.Generator().manual_seed(0)
    layers = (nn.Linear(8, 6, bias=False), nn.Tanh(), nn.Linear(6, 4, bias=False))
    net = nn.Sequential(*layers).double()
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / 3)
    data = torch.randn(40, 8, generator=generator).double(), torch.arange(40) % 4
    how: dict[str, Any] = {"rows": "example", "size": 40, "dtype": "float64", "blocks": "whole"}
    window = hesscli.WindowOptions(**how, damping=1e-3, absolute=True)
    problem = hesscli.Problem(net, "cross_entropy", data)
    found = hesscli.prune(problem, sparsity=sparsity, steps=steps, window=window)
    weights = np.concatenate([each.ravel() for each in found.weights.values()])
    expected = pruned_by_inverses(net, data, sparsity, steps, 1e-3).numpy()
    assert np.array_equal(weights == 0, expected == 0)
    bound = steps * 1e4 * len(weights) * 2.0**-53 * np.linalg.norm(expected)
    assert np.linalg.norm(weights - expected) <= bound


def test_few_weights_may_be_gone_before_the_last_step() -> None:
    found = hesscli.prune(linear_network("cross_entropy"), sparsity=0.999, steps=3)
    shares = [one.sparsity for one in found.methods[0].steps]
    assert shares == [round(40 * (1 - 0.001 ** (k / 3))) / 40 for k in range(1, 4)]
    assert shares[-2:] == [1.0, 1.0]


def test_the_matrix_is_of_the_prediction_alone() -> None:
    """Which weights go is the window's: rows of another kind choose others."""
    window = hesscli.WindowOptions(size=32, damping=1e-2)
    plain, other = (
        hesscli.prune(linear_network("cross_entropy"), matrix=matrix, window=window)
        for matrix in ("hessian", "empirical-fisher")
    )
    np.testing.assert_allclose(plain.weights["weight"], other.weights["weight"], rtol=1e-9)
    assert plain.predicted != other.predicted
    rows = hesscli.WindowOptions(rows="example", size=32, damping=1e-2)
    chosen = hesscli.prune(linear_network("cross_entropy"), window=rows)
    assert not np.array_equal(plain.weights["weight"] == 0, chosen.weights["weight"] == 0)


@pytest.mark.parametrize("absolute", [False, True])
def test_the_damping_that_a_leverage_takes_is_told(absolute: bool) -> None:
    """In blocks of one weight ℓ = F̂ / (F̂ + λ): twice that damping leaves it low, half does not."""

    def warned(damping: float) -> str:
        window = hesscli.WindowOptions(size=32, damping=damping, absolute=absolute, blocks="1")
        result = hesscli.prune(linear_network("mse"), window=window)
        return " ".join(text for text in result.warnings if "leverage below 50%" in text)

    assert (told := re.search(r"50% takes --damping (abs:)?(\S+) or less", warned(1e3)))
    assert (told[1] == "abs:") == absolute
    assert warned(2 * float(told[2]))
    assert not warned(float(told[2]) / 2)


def test_the_blocks_that_a_leverage_takes_are_told() -> None:
    """Of 40 weights in one block 8 rows leave the mean leverage below a fifth, whatever damping."""
    window = hesscli.WindowOptions(size=8, damping=1e-6, blocks="whole")
    result = hesscli.prune(linear_network("mse"), window=window)
    assert any("--blocks 2," in warning for warning in result.warnings)


def test_weights_that_are_gone_stay_gone(tmp_path: Path) -> None:
    first = tmp_path / "first"
    shutil.copytree(SUNSPOTS.parent, first, ignore=shutil.ignore_patterns("*.csv", "__pycache__"))
    line = ("--window", 64, "--out", "json")
    run = hesscli_warm("prune", "first/model.pt", *line, "--dir", "half", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    half = torch.load(tmp_path / "half" / "prune.pt", weights_only=True)
    shutil.copy(tmp_path / "half" / "prune.pt", first / "model.pt")
    more = ("prune", "first/model.pt", *line, "--dir", "more", "--sparsity")
    run = hesscli_warm(*more, "75%", "--steps", 2, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    found = torch.load(tmp_path / "more" / "prune.pt", weights_only=True)
    for name, value in half.items():
        assert not found[name][value == 0].any()
    assert json.loads(run.stdout)["sparsity"]["num_zeros"] == 219
    run = hesscli_warm(*more, "20%", cwd=tmp_path)
    assert run.returncode == ExitCode.USAGE
    what, got, advice = three_lines(run.stderr)
    assert what == "the weights are sparser already"
    assert got.startswith("50% of them are zero")
    assert "--sparsity above 50%" in advice


def test_the_checkpoint_itself_is_never_written_over(tmp_path: Path) -> None:
    for name in ("net.py", "hesscli.toml", "sunspots.safetensors", "held_out.safetensors"):
        shutil.copy(SUNSPOTS.parent / name, tmp_path)
    shutil.copy(SUNSPOTS, tmp_path / "prune.pt")
    before = (tmp_path / "prune.pt").read_bytes()
    run = hesscli_warm("prune", "prune.pt", "--window", 32, "--dir", ".", cwd=tmp_path)
    assert run.returncode == ExitCode.USAGE
    assert "take the place of the checkpoint" in run.stderr
    assert (tmp_path / "prune.pt").read_bytes() == before
    assert "the run is kept" not in run.stderr, "it is refused before the work"


def test_runs_of_two_matrices_in_a_folder_have_a_checkpoint_each(tmp_path: Path) -> None:
    line = ("prune", SUNSPOTS, "--window", 16, "--dir", ".", "--sparsity")
    for sparsity, *matrix in (("20%",), ("60%", "--matrix", "fisher")):
        run = hesscli_warm(*line, sparsity, *matrix, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
    for name, share in (("prune", 0.2), ("prune-fisher", 0.6)):
        hesscli.read(tmp_path / f"{name}.json")  # whose sums of its files hold
        state = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        zeros = sum(int((v == 0).sum()) for n, v in state.items() if "weight" in n)
        assert zeros == round(share * WEIGHTS)


BAD = [
    (("--sparsity", "100%"), "--sparsity must be"),
    (("--sparsity", "-3"), "--sparsity must be"),
    (("--steps", "0"), "--steps must be"),
    (("--params", "*.bias"), "no weight may go"),
    (("--damping", "0"), "--damping must be"),
    (("--pattern", "4:2"), "--pattern must be"),
    (("--pattern", "8:16"), "--pattern must be"),
    (("--pattern", "2:4", "--sparsity", "90%"), "--sparsity is not that of --pattern"),
    (("--pattern", "3:5"), "no weight may go: no tensor is of so many outputs and inputs"),
]


@pytest.mark.parametrize(("asked", "what"), BAD, ids=[" ".join(asked) for asked, _ in BAD])
def test_what_cannot_be_is_refused_in_three_lines(
    asked: tuple[str, ...], what: str, tmp_path: Path
) -> None:
    run = hesscli_warm("prune", SUNSPOTS, *asked, "--dir", "-", cwd=tmp_path)
    assert run.returncode == ExitCode.USAGE
    assert three_lines(run.stderr)[0].startswith(what)


def test_a_checkpoint_that_cannot_be_written_anew_is_refused_before_the_work(
    tmp_path: Path,
) -> None:
    old = torch.load(SUNSPOTS, weights_only=True)
    torch.save(old, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    line = ("prune", "model.pt", "--spec", SUNSPOTS.parent / "hesscli.toml", "--window", 32)
    run = hesscli_warm(*line, cwd=tmp_path)
    assert run.returncode == ExitCode.INPUT
    assert three_lines(run.stderr)[0] == "this checkpoint cannot be written anew"
    run = hesscli_warm(*line, "--dir", "-", cwd=tmp_path)  # which writes none
    assert run.returncode == 0, run.stderr


def test_low_leverage_and_a_layer_that_is_emptied_are_said(tmp_path: Path) -> None:
    line = ("prune", SUNSPOTS, "--damping", "1e4", "--window", 32, "--sparsity", "98%")
    run = hesscli_warm(*line, "--dir", "-", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "leverage below 50%" in run.stderr
    assert "a matter of magnitude" in run.stderr
    assert "no weight is left in" in run.stderr


def test_safetensors_come_out_as_they_went_in(tmp_path: Path) -> None:
    state: dict[str, Any] = torch.load(SUNSPOTS, weights_only=True)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    spec = ("--spec", SUNSPOTS.parent / "hesscli.toml")
    line = ("prune", "model.safetensors", *spec, "--window", 32, "--dir", "out")
    run = hesscli_warm(*line, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    new = load_file(tmp_path / "out" / "prune.safetensors")
    assert new.keys() == state.keys()
    assert sum(int((v == 0).sum()) for n, v in new.items() if "weight" in n) == WEIGHTS // 2
    hesscli.read(tmp_path / "out" / "prune.json")


def test_half_typed_shards_are_as_good_as_is_said(tmp_path: Path) -> None:
    """The loss is that of the weights as they are written, and what is there is nobody else's."""
    state = {n: v.half() for n, v in torch.load(SUNSPOTS, weights_only=True).items()}
    (model := tmp_path / "model").mkdir()
    of = {name: f"model-{number}.safetensors" for number, name in enumerate(state)}
    for name, value in state.items():
        save_file({name: value}, model / of[name], {"format": "pt"})
    index = {"metadata": {}, "weight_map": of}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    spec = ("--spec", SUNSPOTS.parent / "hesscli.toml")
    line = ("prune", "model", *spec, "--window", 32, "--dtype", "float64", "--dir")
    run = hesscli_warm(*line, "out", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    document = json.loads((tmp_path / "out" / "prune.json").read_text())
    assert set(document["files"]) >= {"checkpoint", *(f"checkpoint_{n}" for n in range(1, 7))}
    new = {name: load_file(tmp_path / "out" / file)[name] for name, file in of.items()}
    assert {value.dtype for value in new.values()} == {torch.float16}
    loss = mean_squared_error({name: value.double() for name, value in new.items()})
    assert loss == pytest.approx(document["methods"][0]["loss"], rel=1e-12)
    hesscli.read(tmp_path / "out" / "prune.json")
    again = hesscli_warm(*line, "out", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    before = {path: path.read_bytes() for path in model.iterdir()}
    inside = hesscli_warm(*line, "model", cwd=tmp_path)
    assert inside.returncode == ExitCode.USAGE
    assert "take the place of" in inside.stderr
    assert {path: path.read_bytes() for path in before} == before


def test_of_each_group_of_inputs_no_more_stay_than_the_pattern_says(tmp_path: Path) -> None:
    line = ("prune", SUNSPOTS, "--pattern", "2:4", "--steps", 2, "--window", 64, "--dir", ".")
    run = hesscli_warm(*line, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "hidden2.weight (1 tensors) stay whole" in run.stderr  # of 18 inputs
    state = torch.load(tmp_path / "prune.pt", weights_only=True)
    for name in ("hidden1.weight", "head.weight"):
        assert ((state[name].view(-1, 4) != 0).sum(1) == 2).all()
    old = torch.load(SUNSPOTS, weights_only=True)
    assert torch.equal(state["hidden2.weight"], old["hidden2.weight"])
    document = json.loads((tmp_path / "prune.json").read_text())
    assert document["sparsity"]["num_zeros"] == (18 * 12 + 4) // 2
    assert document["pattern"] == "2:4"
    first, last = document["methods"][0]["steps"]
    assert 0.25 < first["sparsity"] < last["sparsity"] == 0.5


def test_groups_of_a_kernel_are_of_its_input_channels() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    data = torch.randn(48, 4, 4, 4), torch.randint(2, (48,))
    found = hesscli.prune(hesscli.Problem(net, "cross_entropy", data), pattern="1:4")
    kernel = torch.from_numpy(found.weights["0.weight"])
    assert ((kernel != 0).sum(1) == 1).all()
    assert (torch.from_numpy(found.weights["3.weight"]).view(-1, 4) != 0).sum(1).tolist() == [1] * 6
    by_size = next(one for one in found.methods if one.name == "magnitude")
    with torch.no_grad():
        for number in (0, 3):
            weight = net[number].weight
            largest = weight.view(len(weight), -1, 4, *weight.shape[2:]).abs().amax(2, keepdim=True)
            kept = weight.view(len(weight), -1, 4, *weight.shape[2:]).abs() == largest
            weight.mul_(kept.view(weight.shape))
        loss = nn.functional.cross_entropy(net(data[0]), data[1])
    assert by_size.loss == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize(("pattern", "sparsity", "steps"), [("2x4", 0.75, 2), ("4x1", None, 1)])
def test_blocks_go_or_stay_whole_and_as_many_as_were_asked_for(
    pattern: str, sparsity: float | None, steps: int
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
    data = torch.randn(48, 4, 4, 4), torch.randint(4, (48,))
    problem = hesscli.Problem(net, "cross_entropy", data)
    found = hesscli.prune(problem, pattern=pattern, sparsity=sparsity, steps=steps)
    rows, columns = map(int, pattern.split("x"))

    def blocks(weight: Tensor) -> Tensor:
        """With the entries of each in the last place."""
        whole = weight.movedim(1, -1)
        whole = whole.unflatten(0, (-1, rows)).unflatten(-1, (-1, columns))
        return whole.movedim(1, -1).flatten(-2)

    zeros = [blocks(torch.from_numpy(found.weights[f"{n}.weight"])) == 0 for n in (0, 3)]
    assert all(bool((each.all(-1) == each.any(-1)).all()) for each in zeros)
    count = sum(int(each.sum()) for each in zeros)
    assert count == found.sparsity.num_zeros == round((sparsity or 0.5) * (8 * 4 * 9 + 32 * 4))
    by_size = next(one for one in found.methods if one.name == "magnitude")
    with torch.no_grad():
        sizes = [blocks(net[n].weight).square().sum(-1) for n in (0, 3)]
        every = torch.cat([size.flatten() for size in sizes]).sort().values
        bound = every[count // (rows * columns) - 1]
        for number in (0, 3):
            weight = net[number].weight
            size = weight.square().unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
            stays = size.sum((1, 3), keepdim=True) > bound
            weight.mul_(stays.expand(size.shape).flatten(2, 3).flatten(0, 1))
        loss = nn.functional.cross_entropy(net(data[0]), data[1])
    assert by_size.loss == pytest.approx(float(loss), rel=1e-5)


def test_a_training_checkpoint_with_kernels_comes_out_whole(tmp_path: Path) -> None:
    fashion = SAMPLES / "fashion"
    line = ("prune", fashion / "model.pt", "--spec", fashion / "hesscli.toml", "--examples", 100)
    run = hesscli_warm(*line, "--pattern", "2:4", "--window", 32, "--dir", ".", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    said = json.loads((tmp_path / "prune.json").read_text())
    problem = hesscli.load(tmp_path / "prune.pt", spec=fashion / "hesscli.toml", examples=100)
    assert problem.prove().loss == pytest.approx(said["methods"][0]["loss"], rel=1e-5)
    assert problem.prove().accuracy == said["methods"][0]["accuracy"]
    old, new = (
        torch.load(path, weights_only=False)
        for path in (fashion / "model.pt", tmp_path / "prune.pt")
    )
    assert list(old) == list(new)
    assert list(old["model_state_dict"]) == list(new["model_state_dict"])
    for name, value in new["model_state_dict"].items():
        if name in ("conv2.weight", "conv3.weight", "head.weight"):
            groups = value.movedim(1, -1).reshape(-1, 4)
            assert ((groups != 0).sum(1) == 2).all()
        else:
            assert torch.equal(value, old["model_state_dict"][name])


@pytest.mark.parametrize("pattern", [None, "1x2"])
def test_a_run_that_was_cut_off_goes_on_to_the_same_weights(
    pattern: str | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).eval()
    problem = hesscli.Problem(net, "cross_entropy", (torch.randn(32, 6), torch.randint(2, (32,))))
    options: dict[str, Any] = {"sparsity": 0.75, "steps": 3, "pattern": pattern, "budget": None}
    options["window"] = hesscli.WindowOptions(size=34)
    whole = hesscli.prune(problem, **options)
    for phase, done in (("pruning", 1), ("comparing methods", 1)):
        file = tmp_path / f"{phase}{done}.ledger"

        def observe(snapshot: Snapshot, at: tuple[str, int] = (phase, done)) -> bool:
            return (snapshot.phase, snapshot.done) == at

        kept = FileLedger(file, {}, resume=False, say=pytest.fail)
        cut = hesscli.prune(problem, observe=observe, ledger=kept, **options)
        assert cut.status == "interrupted"
        kept = FileLedger(file, {}, resume=True, say=pytest.fail)
        found = hesscli.prune(problem, ledger=kept, **options)
        assert found.methods == whole.methods
        assert found.predicted == whole.predicted
        assert all(np.array_equal(found.weights[n], whole.weights[n]) for n in whole.weights)


def test_a_run_that_is_stopped_says_how_far_it_came() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    problem = hesscli.Problem(net, "cross_entropy", (torch.randn(64, 6), torch.randint(3, (64,))))

    def observe(snapshot: Snapshot) -> bool:
        return snapshot.phase == "pruning" and snapshot.done == 2

    found = hesscli.prune(problem, sparsity=0.9, steps=4, observe=observe)
    assert found.status == "interrupted"
    (only,) = found.methods
    assert [one.sparsity for one in only.steps] == [
        round(72 * (1 - 0.1 ** (k / 4))) / 72 for k in (1, 2)
    ]
    assert found.sparsity.reached == only.steps[-1].sparsity
    assert any(
        "2 of 4 steps: 68.1% of the weights are zero, and not 90.0%" in w for w in found.warnings
    )
    assert any("diagonal-fisher and magnitude" in w for w in found.warnings)


def test_networks_that_do_not_fit_are_refused_before_they_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And planned without being made: three copies in float64 are many times the weights."""
    model = nn.Sequential(nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 3))
    data = TensorDataset(torch.randn(8, 300), torch.arange(8) % 3)
    problem = hesscli.Problem(model, "cross_entropy", data)
    room = 100 * problem.parameters.size
    monkeypatch.setattr(pruning_study, "room_for_more", lambda _: room)
    monkeypatch.setattr(Candidates, "columns", property(lambda _: pytest.fail("they are made")))
    with pytest.raises(UsageError, match="networks do not fit") as refusal:
        hesscli.prune(problem)
    most = int(re.findall(r"at most (\d+)", refusal.value.hint)[0])
    assert 0.4 * problem.parameters.size < most < problem.parameters.size
    plan = hesscli.check(problem).plan
    (note,) = (each.note for each in plan.commands if each.command == "prune")
    assert note.startswith("refused: the pruned networks do not fit")
    monkeypatch.setattr(pruning_study, "room_for_more", lambda _: 1 << 40)
    plan = hesscli.check(problem).plan
    (planned,) = (each for each in plan.commands if each.command == "prune")
    assert planned.peak_bytes > 200 * problem.parameters.size
