"""A matrix of some parameters alone: the block of the whole one, for what that block costs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from program import FEW, SUNSPOTS, hesscli_warm, three_lines
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import hesscli
from hesscli.engines.hutchinson.designs import Probes
from hesscli.errors import ExitCode, UnsoundError, UsageError
from hesscli.problem.freezing import FrozenData
from hesscli.problem.problem import Problem

# -- Against dense float64 Hessians, by double backward of the samples' losses as they are meant ---

FILES = {
    "sunspots": "sunspots/model.pt",
    "fashion": "fashion/model.pt",
    "text": "text/model.safetensors",
}


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.study)


GLOBS = [
    ("sunspots", ["head"], {"head.weight", "head.bias"}),
    ("sunspots", ["*.bias", "!head"], {"hidden1.bias", "hidden2.bias"}),
    ("sunspots", ["hidden[12]", "!hidden?.weight"], {"hidden1.bias", "hidden2.bias"}),
    ("fashion", ["head.bias", "head.bias"], {"head.bias"}),
    ("fashion", ["norm1"], {"norm1.weight", "norm1.bias"}),
    ("fashion", ["!*.weight", "norm*", "!norm[23]"], {"norm1.bias"}),
    ("text", ["norm.bias"], {"norm.bias"}),
    slow(
        "text", ["blocks.0", "!*.weight", "!*.[ace]*"], {f"blocks.0.norm{i}.bias" for i in (1, 2)}
    ),
    slow("text", ["blocks.1.norm1.bias"], {"blocks.1.norm1.bias"}),
]


def some_of(samples: Path, sample: str, globs: list[str]) -> Problem:
    """A sample on its first examples alone, as if there were no others."""
    loaded = hesscli.load(samples / FILES[sample], examples="first:2", dtype="float64")
    data = FrozenData(loaded.data.batches, loaded.data.counts, loaded.data.count, True, "first")
    decay = loaded.weight_decay
    return Problem(loaded.model, loaded.loss, data, params=globs, weight_decay=decay)


def dense(sample: str, problem: Problem, names: set[str]) -> tuple[Tensor, Tensor]:
    """Gradient ``(d,)`` and Hessian ``(d, d)``, weight decay included."""
    model = copy.deepcopy(problem.model).double()
    chosen = [p for name, p in model.named_parameters() if name in names]
    total, count = torch.zeros((), dtype=torch.float64), 0
    with sdpa_kernel(SDPBackend.MATH):
        for inputs, targets in problem.data.batches:
            outputs = model(inputs.double() if inputs.is_floating_point() else inputs)
            if sample == "sunspots":
                total = total + (outputs - targets.double()).square().sum()
            else:
                flat = outputs.flatten(0, -2), targets.long().flatten()
                total = total + functional.cross_entropy(*flat, reduction="sum")
            count += targets.numel()
    decay = problem.weight_decay / 2 * sum(p.square().sum() for p in chosen)

    def gradient(value: Tensor, **options: bool) -> Tensor:
        parts = torch.autograd.grad(value, chosen, materialize_grads=True, **options)
        return torch.cat([part.flatten() for part in parts])

    slope = gradient(total / count + decay, create_graph=True)
    rows = [gradient(one, retain_graph=True, allow_unused=True) for one in slope]
    return slope.detach(), torch.stack(rows)


@pytest.mark.parametrize(("sample", "globs", "names"), GLOBS)
def test_commands_answer_for_the_block(
    samples: Path, sample: str, globs: list[str], names: set[str]
) -> None:
    problem = some_of(samples, sample, globs)
    assert set(problem.parameter_names) == names
    slope, block = dense(sample, problem, names)
    size, rounding = len(block), 1e-10 * float(block.norm())
    assert (hesscli.Hessian(problem).to_dense() - block).norm() <= rounding

    trace = hesscli.trace(problem, probes=32).trace
    low, high = trace.interval
    assert low - rounding <= float(block.trace()) <= high + rounding
    found = hesscli.diagonal(problem, probes=32)
    entries, stderr = (
        np.concatenate([array.ravel() for array in arrays.values()])
        for arrays in (found.entries, found.stderr)
    )
    assert (abs(entries - block.diagonal().numpy()) <= 6 * stderr + rounding).all()

    solved = hesscli.ihvp(problem, refine=1e-9)
    assert solved.window is not None
    direction = np.concatenate([array.ravel() for array in solved.direction.values()])
    damped = block + solved.window.damping * torch.eye(size, dtype=block.dtype)
    left = float((damped @ torch.from_numpy(direction) - slope).norm() / slope.norm())
    assert left == pytest.approx(solved.residual.operator, rel=1e-6, abs=1e-9)

    spectrum = hesscli.spectrum(problem, k=size, steps=size, probes=1)
    values = np.sort([one.value for one in spectrum.eigenvalues])
    bars = max(one.residual for one in spectrum.eigenvalues)
    truth = torch.linalg.eigvalsh(block).numpy()
    assert abs(values[-5:] - truth[-5:]).max() <= bars + rounding


# -- Which parameters globs take -------------------------------------------------------------------


class Net(nn.Module):
    """Experts of which each example takes one, a tied head, a frozen tensor, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(4, 3)
        self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 4)
        self.head.weight = self.embed.weight
        self.head.bias.requires_grad_(False)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        rows = [self.experts[0 if int(row) < 2 else 1](self.embed(row)) for row in x]
        return self.head(self.norm(torch.stack(rows).tanh()))


def problem_of(*params: str, model: nn.Module | None = None, **options: Any) -> Problem:
    net = (Net() if model is None else model).double().eval()
    batches = (
        (torch.tensor([0, 1]), torch.tensor([1, 2])),
        (torch.tensor([2, 3]), torch.tensor([3, 0])),
    )
    return Problem(
        net, "cross_entropy", FrozenData(batches, (2, 2), 4, True, "x"), params=params, **options
    )


@pytest.mark.parametrize(
    ("globs", "names"),
    [
        (["norm"], ["norm.weight", "norm.bias"]),
        (["*s.1.bias", "norm.b*"], ["experts.1.bias", "norm.bias"]),
        (["head"], ["embed.weight"]),
        (["head.weight", "!norm"], ["embed.weight"]),
        (["!head", "!experts", "!unused"], ["norm.weight", "norm.bias"]),
        (["!experts.?.weight", "experts"], [f"experts.{i}.bias" for i in range(3)]),
    ],
)
def test_globs_take_parameters_by_any_of_their_names(globs: list[str], names: list[str]) -> None:
    problem = problem_of(*globs)
    assert list(problem.parameter_names) == names
    report = problem.report("hessian")
    assert report.restricted_to == tuple(globs)
    assert report.num_parameters + report.num_frozen == sum(p.numel() for p in Net().parameters())


@pytest.mark.parametrize(
    ("globs", "got", "cure"),
    [
        (["norn"], "'norn'", "norm"),
        (["norm", "!Head"], "'!Head'", "head"),
        (["norm.running_mean"], "norm.running_mean is a buffer", "nn.Parameter"),
        (["head.bias"], "head.bias is frozen by the model", "requires_grad = True"),
        (["norm", "!norm"], "'!norm'", "fewer patterns"),
        (["head", "!embed"], "'!embed'", "fewer patterns"),
    ],
)
def test_a_glob_that_takes_nothing_is_refused(globs: list[str], got: str, cure: str) -> None:
    with pytest.raises(UsageError) as caught:
        problem_of(*globs)
    assert got in caught.value.got
    assert cure in caught.value.hint


def test_what_the_loss_never_reaches_is_refused_and_what_a_batch_misses_is_not() -> None:
    with pytest.raises(UnsoundError, match="restricted to") as caught:
        hesscli.trace(problem_of("unused"))
    assert "--params" in caught.value.hint
    expert = problem_of("experts.1")  # of the second batch's examples alone
    whole = problem_of()
    places = [p.offset + i for p in expert.parameters for i in range(p.numel)]
    block = hesscli.Hessian(whole).to_dense()[places][:, places]
    assert block.norm() > 0.01
    assert torch.allclose(hesscli.Hessian(expert).to_dense(), block, rtol=0, atol=1e-14)
    found = hesscli.diagonal(expert).entries
    flat = np.concatenate([found[name].ravel() for name in expert.parameter_names])
    assert np.allclose(flat, block.diagonal(), rtol=0, atol=1e-12)


# -- What is not of the matrix stays as it is, and costs nothing -----------------------------------


def test_restricting_changes_no_draw(samples: Path) -> None:
    whole = hesscli.load(samples / FILES["sunspots"])
    part = hesscli.load(samples / FILES["sunspots"], params=["*.bias", "hidden2"])
    assert part.manifest_sha256 == whole.manifest_sha256
    places = [p.offset + i for p in part.parameters for i in range(p.numel)]
    for distribution in ("rademacher", "gaussian"):
        every, own = (
            Probes(hesscli.Hessian(problem), 3, "fresh", distribution).block(2, 5, 4)
            for problem in (whole, part)
        )
        assert torch.equal(own, every[:, places])
    assert part.parameters[0].offset > 0


def test_the_loss_is_the_whole_ones_and_the_model_as_it_was() -> None:
    net = Net()
    flags = [p.requires_grad for p in net.parameters()]
    whole, part = (problem_of(*globs, model=net, weight_decay=0.1) for globs in ((), ("norm",)))
    assert part.prove().loss == pytest.approx(whole.prove().loss, rel=1e-14)
    assert part.prove().gradient.tolist() == pytest.approx(
        [float(whole.prove().gradient[p.offset + i]) for p in part.parameters for i in range(3)]
    )
    hesscli.trace(part)
    with part.forward_context():
        assert sum(p.requires_grad for p in net.parameters()) == 2
    assert [p.requires_grad for p in net.parameters()] == flags


DEPTH, WIDTH = 6, 32


def deep(*params: str, frozen: bool = False) -> Problem:
    """Equal layers, the parameters of the last one by globs or by ``requires_grad``."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(DEPTH)]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, WIDTH)).double()
    if frozen:
        model[:-1].requires_grad_(False)
    x = torch.randn(16, WIDTH, dtype=torch.float64)
    data = FrozenData(((x, torch.arange(16)),), (16,), 16, True, "x")
    return Problem(model, "cross_entropy", data, params=params)


def test_a_way_back_counts_as_far_as_it_goes() -> None:
    """All weights take a product each, and the inputs of all layers but the first."""
    products = DEPTH + 1 + DEPTH
    shares = {"6": 1, "5": 2, "0": DEPTH + 1, "!0": products - 2, "!1": products - 1}
    for glob, share in shares.items():
        problem = deep(glob)
        assert problem.way_back == pytest.approx(2 / 3 * share / products), glob
        assert hesscli.Hessian(problem).cost == pytest.approx(
            (1 / 3 + problem.way_back, 3 * problem.way_back)
        )
    assert deep().way_back == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("sample", "glob"),
    [("fashion", "conv3"), ("fashion", "norm2"), ("text", "blocks.1"), ("text", "characters")],
)
def test_a_way_back_is_what_torch_counts_of_it(samples: Path, sample: str, glob: str) -> None:
    def counted(problem: Problem) -> int:
        with problem.forward_context():
            loss = problem.loss.evaluate(problem.model, problem.sample(1).data)
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(loss, problem.parameters.tensors)
        return counter.get_total_flops()

    file = samples / FILES[sample]
    part, whole = (hesscli.load(file, examples="first:2", params=globs) for globs in ([glob], []))
    assert part.way_back * 3 / 2 == pytest.approx(counted(part) / counted(whole), rel=1e-12)


def test_frozen_by_the_model_or_by_params_is_one_and_the_same() -> None:
    ours, theirs = deep("6"), deep(frozen=True)
    # Offsets are in the vector of what the model trains, so that probes are of other places.
    one, other = hesscli.trace(ours), hesscli.trace(theirs)
    assert one.trace.estimate == pytest.approx(other.trace.estimate, rel=1e-12)
    assert one.cost.gradients == pytest.approx(other.cost.gradients)
    assert one.problem.num_frozen == other.problem.num_frozen


def test_a_last_layer_takes_three_forward_passes_and_its_own_way_back() -> None:
    """Proof, claim and squares see all examples; no check sees more than 64 of them, or a few."""
    x, y = torch.randn(4096, WIDTH, dtype=torch.float64), torch.arange(4096) % WIDTH
    batches = tuple(zip(x.split(64), y.split(64), strict=True))
    data = FrozenData(batches, (64,) * 64, 4096, True, "x")
    part, whole = (
        Problem(deep().model, "cross_entropy", data, params=globs) for globs in (["6"], [])
    )
    cost = hesscli.trace(part).cost.gradients - part.trial_work
    checks = 20 * part.share_of(64)  # passes, at most
    together = part.joint_share  # of proof and claim, which take all batches as one
    most = (2 * together + 1 + checks) / 3 + (together + WIDTH + checks) * part.way_back
    assert (2 * together + 1) / 3 < cost < most
    assert hesscli.trace(whole).cost.gradients > WIDTH * 2 / 3


def test_a_last_bias_alone_is_planned() -> None:
    """Whose product with the Hessian is no work by the graph's count."""
    plan = hesscli.check(deep(f"{DEPTH}.bias")).plan
    assert {"trace", "diag", "ihvp", "spectrum"} <= {one.command for one in plan.commands}


def test_no_graph_is_kept_behind_frozen_layers() -> None:
    def kept(problem: Problem) -> int:
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            problem.evaluate(problem.batch(0).data)
        return sum(sizes.values())

    parameters = sum(p.numel() for p in deep().model.parameters()) * 8
    activations = 16 * WIDTH * 8
    assert kept(deep()) > parameters / 2 + DEPTH * activations
    assert kept(deep("6")) < 4 * activations


# -- As it is typed --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["check", *FEW])
def test_every_command_tells_what_it_is_restricted_to(command: str, tmp_path: Path) -> None:
    globs = ("--params", "hidden2", "--params", "!*.bias")
    line = (command, SUNSPOTS, *FEW.get(command, ()), *globs, "--dir", ".")
    run = hesscli_warm(*line, cwd=tmp_path)
    assert run.returncode == ExitCode.OK, run.stderr
    assert "72 parameters of hidden2, !*.bias (243 frozen)" in " ".join(run.stdout.split())
    document = json.loads((tmp_path / f"{command}.json").read_text())
    assert document["problem"]["restricted_to"] == ["hidden2", "!*.bias"]
    assert [layer["name"] for layer in document.get("layers", [{"name": "hidden2"}])] == ["hidden2"]


def test_layer_reports_some_of_what_params_takes(tmp_path: Path) -> None:
    globs = ("--params", "hidden*", "--layer")
    run = hesscli_warm(
        "trace", SUNSPOTS, *globs, "hidden1", "--out", "json", "--dir", "-", cwd=tmp_path
    )
    document = json.loads(run.stdout)
    assert [layer["name"] for layer in document["layers"]] == ["hidden1"]
    assert document["problem"]["num_parameters"] == 310
    run = hesscli_warm("trace", SUNSPOTS, *globs, "head", "--dir", "-", cwd=tmp_path)
    assert run.returncode == ExitCode.USAGE
    what, got, hint = three_lines(run.stderr)
    assert "no layer of the matrix" in what
    assert "head is frozen by --params" in got
    assert "hidden1" in hint


def test_a_run_goes_on_with_its_own_params_alone(tmp_path: Path) -> None:
    line = ("trace", SUNSPOTS, "--method", "hutchinson", "--rtol", "0.0001%", "-v", "--dir", ".")
    endless = (*line, "--budget", "none", "--params", "hidden*")
    run = hesscli_warm(*endless, cwd=tmp_path, ctrl_c_at="±")
    assert run.returncode == ExitCode.INTERRUPTED, run.stderr
    run = hesscli_warm(*line, "--resume", "--params", "head", cwd=tmp_path)
    assert run.returncode == ExitCode.USAGE
    said = [text for text in run.stderr.splitlines() if "--params" in text]
    assert any("['hidden*']" in text and "['head']" in text for text in said)
    assert any("--params 'hidden*'" in text for text in said)
