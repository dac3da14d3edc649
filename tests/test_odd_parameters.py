"""Parameters without dimensions, without entries, sparse or complex; and the user's own model."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from program import hesscli_warm
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import hesscli
from hesscli.errors import UnsoundError

SOURCE = """
import torch
from torch import nn

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.tokens = nn.Parameter(torch.zeros(0))
        self.words = nn.Embedding(7, 4, sparse=True)
        self.none = nn.Linear(4, 0)
        self.gain = nn.ParameterDict({"inner": nn.Parameter(torch.tensor(0.7))})
        self.head = nn.Linear(4, 3)

    def forward(self, ids):
        mean = self.words(ids).mean(1)
        h = torch.tanh(self.gain["inner"] * mean) + self.none(mean).sum()
        return self.scale * self.head(h) + self.tokens.sum()

def dataset():
    g = torch.Generator().manual_seed(1)
    ids, y = torch.randint(0, 7, (32, 5), generator=g), torch.randint(0, 3, (32,), generator=g)
    return torch.utils.data.TensorDataset(ids, y)
"""


@pytest.fixture(scope="module")
def odd() -> tuple[nn.Module, TensorDataset, Tensor]:
    """The network, its data, and its Hessian by differentiating twice in float64."""
    module: dict[str, object] = {"__name__": "odd"}
    exec(SOURCE, module)
    torch.manual_seed(0)
    model, data = module["Odd"](), module["dataset"]()  # type: ignore[operator]
    ids, y = data.tensors
    twin = copy.deepcopy(model).double()
    twin.words.sparse = False
    return model, data, dense(twin, F.cross_entropy(twin(ids), y))


def dense(model: nn.Module, loss: Tensor) -> Tensor:
    tensors = list(model.parameters())
    slopes = torch.autograd.grad(loss, tensors, create_graph=True, materialize_grads=True)
    rows = [
        torch.cat(
            [
                g.reshape(-1)
                for g in torch.autograd.grad(s, tensors, retain_graph=True, materialize_grads=True)
            ]
        )
        for slope in slopes
        for s in slope.reshape(-1)
    ]
    return torch.stack(rows).detach()


def flat(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(a, dtype=np.float64).reshape(-1) for a in arrays.values()])


def shapes(arrays: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: np.shape(array) for name, array in arrays.items()}


def test_every_command_knows_odd_shapes(odd: tuple[nn.Module, TensorDataset, Tensor]) -> None:
    model, data, hessian = odd
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    problem = hesscli.Problem(model, "cross_entropy", data)
    assert np.allclose(hesscli.Hessian(problem).to_dense(), hessian, atol=1e-6)

    run = hesscli.diagonal(problem, probes=64)
    assert shapes(run.entries) == shapes(run.stderr) == wanted
    truth = hessian.diagonal().numpy()
    off = np.linalg.norm(flat(run.entries) - truth) / np.linalg.norm(truth)
    assert off <= 2 * run.diagonal.relative_error_bound
    assert {"tokens", "none"}.isdisjoint(layer.name for layer in run.layers)

    low, high = hesscli.trace(problem, probes=64).trace.interval
    spare = (high - low) / 2  # twice the interval, which for 95% of seeds is enough by itself
    assert low - spare <= float(truth.sum()) <= high + spare

    largest = float(torch.linalg.eigvalsh(hessian)[-1])
    found = hesscli.spectrum(problem, k=1, probes=1, exact=True)
    assert found.eigenvalues[0].value == pytest.approx(largest, rel=1e-4)
    assert max(found.exact.eigenvalues) == pytest.approx(largest, rel=1e-4)

    ranked = hesscli.sensitivity(problem, window=hesscli.WindowOptions(size=32), budget=4)
    assert shapes(ranked.saliency) == wanted
    assert np.isfinite(flat(ranked.saliency)).all()


@pytest.mark.parametrize("command", ["trace", "diag", "ihvp", "spectrum"])
def test_every_command_draws_and_writes_odd_shapes(
    tmp_path: Path, odd: tuple[nn.Module, TensorDataset, Tensor], command: str
) -> None:
    (tmp_path / "odd_net.py").write_text(SOURCE)
    torch.save(odd[0].state_dict(), tmp_path / "model.pt")
    (tmp_path / "model.toml").write_text(
        '[model]\nfactory = "odd_net:Odd"\n[data]\nfactory = "odd_net:dataset"\n'
        '[loss]\nname = "cross_entropy"\n'
    )
    options = {"ihvp": ["--verify", "--window", "32"], "spectrum": ["--steps", "8"]}
    line = [command, "model.pt", "--dir", "out", "--layer", *options.get(command, ())]
    run = hesscli_warm(*line, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    document = json.loads((tmp_path / "out" / f"{command}.json").read_text())
    assert document["problem"]["num_parameters"] == 1 + 28 + 1 + 15
    if tensors := document["files"].get("tensors"):
        assert load_file(tmp_path / tensors)["tokens"].shape == (0,)


# Complex numbers: no derivative with respect to them, but buffers may hold them.


def test_complex_parameters_are_refused_by_name() -> None:
    model = nn.Linear(6, 3)
    model.register_parameter("filter", nn.Parameter(torch.ones(4, dtype=torch.cfloat)))
    with pytest.raises(UnsoundError, match="complex parameters") as caught:
        hesscli.Problem(model, "mse", [(torch.randn(4, 6), torch.randn(4, 3))])
    assert "filter" in caught.value.got


class Rotating(nn.Module):
    """Rows turned by a complex buffer, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.register_buffer("turn", torch.polar(torch.ones(3), torch.arange(3.0)))

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.view_as_complex(torch.tanh(x).reshape(-1, 3, 2)) * self.turn
        return torch.tanh(self.fc(torch.view_as_real(turned).reshape(-1, 6)))


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
def test_complex_buffers_stay_complex(dtype: torch.dtype | None) -> None:
    """Taken for real numbers, they would make another function, with a trace of its own."""
    torch.manual_seed(0)
    model, x, t = Rotating(), torch.randn(16, 6), torch.randn(16, 3)
    twin = copy.deepcopy(model)
    twin.fc.double()
    twin.turn = twin.turn.to(torch.complex128)
    truth = float(dense(twin, F.mse_loss(twin(x.double()), t.double())).trace())
    problem = hesscli.Problem(model, "mse", TensorDataset(x, t), dtype=dtype)
    found = float(hesscli.Hessian(problem).to_dense().trace())
    assert found == pytest.approx(truth, rel=1e-5)
    assert problem.model.turn.is_complex()


# The user's own model.


def test_another_type_is_another_model() -> None:
    model, data = nn.Linear(6, 3), [(torch.randn(8, 6), torch.randn(8, 3))]
    problem = hesscli.Problem(model, "mse", data, dtype=torch.float64)
    problem.prove()
    assert problem.model.weight.dtype == torch.float64
    assert model.weight.dtype == torch.float32
    model.weight.data.zero_()
    assert problem.model.weight.abs().sum() > 0
    assert hesscli.Problem(model, "mse", data, dtype=torch.float32).model is model


def test_a_copy_that_reads_the_original_is_refused() -> None:
    """A function that closes over the model is not copied with it."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    first = model[0]
    model[1].register_forward_hook(lambda _module, _args, out: out * first.weight.mean())
    data = [(torch.randn(8, 6), torch.randn(8, 3))]
    hesscli.Problem(model, "mse", data).prove()
    with pytest.raises(UnsoundError, match="still reads your model"):
        hesscli.Problem(model, "mse", data, dtype=torch.float64).prove()


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_rows_that_would_be_rescaled_are_put_back(dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=0.5), nn.Flatten(), nn.Linear(8, 3))
    before = copy.deepcopy(model.state_dict())
    ids, y = torch.randint(0, 5, (16, 2)), torch.randint(0, 3, (16,))
    with pytest.raises(UnsoundError, match=r"0 \(Embedding\), max_norm = 0.5"):
        hesscli.trace(hesscli.Problem(model, "cross_entropy", TensorDataset(ids, y), dtype=dtype))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_rows_that_are_short_enough_are_no_reason_to_refuse() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=50.0), nn.Flatten(), nn.Linear(8, 3))
    ids, y = torch.randint(0, 4, (16, 2)), torch.randint(0, 3, (16,))
    model[0].weight.data[4] = 1e3  # never read
    plain = copy.deepcopy(model).double()
    plain[0].max_norm = None
    truth = float(dense(plain, F.cross_entropy(plain(ids), y)).trace())
    problem = hesscli.Problem(model, "cross_entropy", TensorDataset(ids, y))
    assert hesscli.trace(problem).trace.estimate == pytest.approx(truth, rel=1e-5)
