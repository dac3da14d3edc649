"""Traces, diagonals and eigenvalues at equal certainty: ours and other libraries'.

    pip install -e '.[bench]'
    python tests/benchmarks/certainty.py [resnet transformer] [--signs 32]

Two networks trained here for a minute: a ResNet-18 a quarter as wide (0.7 million parameters) on
32 images, and a GELU transformer (90 thousand) on 256 lines of 32 characters. Whoever asks for a
trace wants a 95% interval of ±5% or ±1%, and for a diagonal an error of 10% in L2. Other libraries
give products; their users make intervals of their own samples, v'Hv and v * Hv, and are let off
finding out how many they need: from the spread over ``--signs`` probes follows the number whose t
interval is as narrow as wanted. Costs are CPU time over that of a gradient, timed around each row;
ours is the whole run, its checks included.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peers import (
    Curvlinops,
    HessianEigenthings,
    OneRowAToken,
    Peer,
    PyHessianBatches,
    PyHessianLoader,
    Task,
)
from products import gradient
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from scale import residual_network
from scipy.stats import t
from spectrum import Row, eigenvalues
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import hesscli
from hesscli.heap import keep_freed_memory

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
WANTED = {"trace ±5%": 0.05, "trace ±1%": 0.01, "diag 10%": 0.1}
SEEDS = 3

# -- Networks, trained for a minute ----------------------------------------------------------------


Trained = tuple[nn.Module, str, Tensor, Tensor]


def resnet() -> Trained:
    """On the first 32 images."""
    model = residual_network(1, 16)
    stored = load_file(SAMPLES / "fashion" / "fashion.safetensors")
    images, labels = stored["images"].float(), stored["labels"].long()
    images = (images / images.max()).reshape(len(images), 1, 28, 28)
    train(model, nn.CrossEntropyLoss(), images, labels, torch.optim.SGD, lr=0.05, momentum=0.9)
    return model, "cross_entropy", images[:32], labels[:32]


def transformer() -> Trained:
    """On 256 lines of 32 characters."""
    sys.path.insert(0, str(SAMPLES / "text"))
    from net import CharTransformer

    stored = load_file(SAMPLES / "text" / "devil.safetensors")
    text = stored["tokens"].flatten()
    lines = text[: len(text) // 33 * 33].view(-1, 33).long()
    model = CharTransformer(width=48, blocks=3, heads=3, context=32)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    train(model, loss, lines[:, :-1], lines[:, 1:], torch.optim.Adam, lr=3e-3)
    return model, "language_model", lines[:256, :-1], lines[:256, 1:]


def train(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    optimizer: Callable[..., torch.optim.Optimizer],
    **options: float,
) -> None:
    """160 steps on 64 examples each."""
    steps = optimizer(model.parameters(), **options)
    for _ in range(160):
        chosen = torch.randint(len(inputs), (64,))
        steps.zero_grad()
        loss(model(inputs[chosen]), targets[chosen]).backward()  # type: ignore[no-untyped-call]
        steps.step()
    model.eval()


NETWORKS: dict[str, Callable[[], Trained]] = {"resnet": resnet, "transformer": transformer}


def problem_of(trained: Trained) -> hesscli.Problem:
    """In batches of 32."""
    model, loss, *tensors = trained
    data = torch.utils.data.TensorDataset(*tensors)
    return hesscli.Problem(model, loss, data, batch_size=32, examples="all")


def task_of(trained: Trained) -> Task:
    """In the same batches, which we cut on our own; tokens become examples."""
    model, loss, inputs, targets = trained
    own = model if loss == "cross_entropy" else OneRowAToken(model)
    pairs = zip(inputs.split(32), (part.flatten() for part in targets.split(32)), strict=True)
    return Task(own, nn.CrossEntropyLoss(), list(pairs))


# -- What certainty costs --------------------------------------------------------------------------


class Alone(Peer):
    """Another library's product on each batch with a probe of its own."""

    distribution, call = PyHessianBatches.distribution, "a probe a batch"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        one = [Task(task.model, task.criterion, [batch]) for batch in task.batches]
        self.batches = [PyHessianBatches(each) for each in one]

    def block(self, vectors: Tensor) -> Tensor:
        """Means over batches of v ⊙ Hv, each with other signs, times v."""
        total = torch.zeros_like(vectors)
        for batch in self.batches:
            signs = torch.randint(2, vectors.shape).float() * 2 - 1
            total += signs * batch.block(signs)
        return total / len(self.batches) * vectors


def ours(problem: hesscli.Problem, quantity: str) -> tuple[float, str]:
    """CPU seconds until our own interval is as narrow; median over seeds, and what was done."""
    took, notes = [], ""
    for seed in range(SEEDS):
        fresh = hesscli.Problem(problem.model, problem.loss, problem.data)
        command = hesscli.diagonal if quantity.startswith("diag") else hesscli.trace
        began = time.process_time()
        found = command(fresh, rtol=WANTED[quantity], budget=None, seed=seed)
        took.append(time.process_time() - began)
        notes = f"{found.status}, {found.method.num_probes} probes"
    return statistics.median(took), notes


def theirs(peer: Peer, probes: Tensor) -> dict[str, tuple[float, str]]:
    """CPU seconds of as many probes as each quantity needs, by the spread of some."""
    began = time.process_time()
    values = torch.stack([v * peer.block(v[None])[0] for v in probes]).double()
    each = (time.process_time() - began) / len(values)
    traces, mean = values.sum(1), values.mean(0)
    error = float(values.var(0).sum()) / len(values)
    size = math.sqrt(max(float(mean.square().sum()) - error, 0.0))
    found = {}
    for quantity, wanted in WANTED.items():
        if quantity.startswith("trace"):
            ratio = float(traces.std()) / abs(float(traces.mean()))
            needed = samples(ratio, wanted)
        else:
            if not size:  # all noise: the diagonal does not show yet
                found[quantity] = math.inf, "not foretold"
                continue
            needed = math.ceil(error * len(values) / (wanted * size) ** 2)
        found[quantity] = each * needed, f"{needed} probes"
    return found


def samples(ratio: float, wanted: float) -> int:
    """Samples of a relative spread whose 95% t interval is as narrow as wanted."""
    count = 2
    while t.ppf(0.975, count - 1) * ratio / math.sqrt(count) > wanted:
        count = max(count + 1, int(1.01 * count))
    return count


def rows(
    problem: hesscli.Problem, task: Task, signs: int
) -> Iterator[tuple[str, dict[str, tuple[float, str]]]]:
    """Ours first."""
    yield f"hesscli {hesscli.__version__}", {q: ours(problem, q) for q in WANTED}
    size = sum(p.numel() for p in task.parameters)
    probes = torch.randint(2, (signs, size)).float() * 2 - 1
    for kind in (PyHessianLoader, Alone, Curvlinops, HessianEigenthings):
        yield kind.title(), theirs(kind(task), probes)


def main() -> None:
    """Compare on the chosen networks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help=", ".join(NETWORKS))
    parser.add_argument("--signs", type=int, default=32, help="probes that show a spread")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    keep_freed_memory()  # as the command does
    torch.set_num_threads(1)
    console = Console(width=110)
    for name in arguments.networks:
        torch.manual_seed(0)
        trained = NETWORKS[name]()
        with sdpa_kernel(SDPBackend.MATH):
            console.print(table(name, problem_of(trained), task_of(trained), arguments.signs))


def table(name: str, problem: hesscli.Problem, task: Task, signs: int) -> Table:
    """Costs in gradients."""

    def unit() -> float:
        began = time.process_time()
        gradient(task)
        return time.process_time() - began

    grid = Table(title=f"{name}: d = {problem.parameters.size}, loss {problem.prove().loss:.3g}")
    for heading in ("gradients", *WANTED, "5 eigenvalues to 1%"):
        grid.add_column(heading)
    solved: dict[str, Row] = {}
    for row in eigenvalues(problem, task):  # of those who are told their steps for nothing, no more
        solved.setdefault(row.title.split()[0].strip(",").lower(), row)
    for title, found in rows(problem, task, signs):
        seconds = statistics.median(unit() for _ in range(7))
        cells = [f"{cost / seconds:.0f} ({note})" for cost, note in found.values()]
        row = solved.get(title.split()[0].strip(",").lower()) or solved["scipy"]
        cells.append(row.failure or f"{row.seconds / seconds:.0f} (off by {row.error:.1%})")
        grid.add_row(title, *cells)
    return grid


if __name__ == "__main__":
    main()
