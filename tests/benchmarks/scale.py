"""What commands cost as networks and data grow, in gradients of the user's own batches.

``python tests/benchmarks/scale.py [NETWORK COMMAND ...]``: all rows of the table, or some, as
``resnet trace`` or ``mlp:100 ihvp``. Each runs in a process of its own, on one thread: CPU time
from problem to result, by phase, over that of a gradient of the same examples as the
user batches them, timed around it; gradients as counted; the process's peak memory; and the result
in a line. Freed memory is kept, as the command line does. Slopes of a series come last: the power
of its size with which CPU time grows.

``--device cuda`` before the rows: wall time on that device, once all that was asked of it is done,
and its peak allocation; rows, where none are named, are of large networks.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import hesscli
from hesscli.heap import keep_freed_memory
from hesscli.memory import peak_bytes
from hesscli.meter import now
from hesscli.operators.retained import Retained
from hesscli.results import Snapshot

# -- Networks, with their examples -----------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A network and what it is measured on, as a user has it."""

    model: nn.Module
    loss: str
    inputs: Tensor
    targets: Tensor
    batch: int

    def mean_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        outputs = self.model(inputs)
        classes = outputs.flatten(0, -2) if outputs.dim() > 2 else outputs
        return nn.functional.cross_entropy(classes, targets.flatten())


class Residual(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or channels != width:
            conv = nn.Conv2d(channels, width, 1, stride, bias=False)
            self.skip = nn.Sequential(conv, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm1(self.conv1(x)).relu()
        return torch.relu(self.norm2(self.conv2(inner)) + self.skip(x))


def residual_network(channels: int, width: int) -> nn.Sequential:
    """ResNet-18 for small images, as wide at its beginning as is said."""
    first = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
    parts: list[nn.Module] = [first, nn.BatchNorm2d(width), nn.ReLU()]
    for number in range(4):
        before, width = width, width * (1 + (number > 0))
        parts += [Residual(before, width, 1 + (number > 0)), Residual(width, width, 1)]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def resnet() -> Task:
    """11.2 million parameters in 41 layers."""
    model = residual_network(3, 64)
    images = torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        for _ in range(20):
            model(images)  # so that batch norms know their statistics
    return Task(model.eval(), "cross_entropy", images, torch.randint(10, (64,)), 64)


class GPT(nn.Module):
    def __init__(self, vocabulary: int, width: int, depth: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.randn(length, width) / 50)
        make = partial(nn.TransformerEncoderLayer, width, width // 64, 4 * width)
        self.blocks = nn.ModuleList(
            make(0.0, "gelu", batch_first=True, norm_first=True) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places
        for block in self.blocks:
            x = block(x, src_mask=self.mask)
        logits: Tensor = self.head(self.norm(x))
        return logits


def gpt(millions: str) -> Task:
    """A decoder on 64 sequences of 4 tokens."""
    vocabulary, width, depth = {
        "27": (2048, 512, 8),
        "108": (16384, 768, 12),
        "1000": (2048, 2048, 20),
    }[millions]
    model = GPT(vocabulary, width, depth, 4)
    tokens = torch.randint(vocabulary, (64, 5))
    return Task(model.eval(), "language_model", tokens[:, :4], tokens[:, 1:], 64)


def perceptron(layers: str) -> Task:
    """So many layers of 16 units."""
    model = nn.Sequential()
    for _ in range(int(layers) - 1):
        layer = nn.Linear(16, 16)
        nn.init.orthogonal_(layer.weight, 1.2)  # so that nothing vanishes on the way
        model.extend([layer, nn.Tanh()])
    model.append(nn.Linear(16, 10))
    return Task(model, "cross_entropy", torch.randn(64, 16), torch.randint(10, (64,)), 64)


def examples(count: str) -> Task:
    """A small network on so many examples, in batches of 128."""
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
    model.append(nn.Linear(32, 10))
    x, y = torch.randn(int(count), 20), torch.randint(10, (int(count),))
    return Task(model, "cross_entropy", x, y, 128)


def classes(count: str) -> Task:
    """A small network with so many classes."""
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, int(count)))
    return Task(
        model, "cross_entropy", torch.randn(256, 20), torch.randint(int(count), (256,)), 128
    )


NETWORKS: dict[str, Callable[..., Task]] = {
    "resnet": resnet,
    "gpt": gpt,
    "mlp": perceptron,
    "examples": examples,
    "classes": classes,
}


def task_named(name: str) -> Task:
    """``resnet``, or with a size as ``mlp:100``."""
    torch.manual_seed(0)
    kind, _, size = name.partition(":")
    return NETWORKS[kind](*filter(None, [size]))


# -- Commands, and what there is to run ------------------------------------------------------------


def products(problem: hesscli.Problem, observe: Callable[[Snapshot], bool]) -> Any:
    """What no spectrum of sixteen steps does without: its checks, and as many products in turn."""
    operator = hesscli.Hessian(problem)
    operator.check()
    observe(Snapshot(phase="checks"))
    product, vector = Retained(operator, room=1 << 62), torch.ones(operator.parameters.size)
    for _ in range(16):
        vector = product(vector / vector.norm())
        observe(Snapshot(phase="products"))
    return SimpleNamespace(cost=operator.meter, warnings=())


COMMANDS: dict[str, Callable[..., Any]] = {
    "trace": partial(hesscli.trace, budget=None),
    "minute": partial(hesscli.trace, budget=60),
    "probes": partial(hesscli.trace, budget=None, probes=8),
    "diag": partial(hesscli.diagonal, budget=None),
    "lanczos": partial(hesscli.spectrum, budget=None, steps=16, probes=1),
    "products": products,
    "spectrum": partial(hesscli.spectrum, budget=None),
    "ihvp": partial(hesscli.sensitivity, budget=None),
}
"""``minute`` is a trace within one, ``probes`` one of eight probes, ``lanczos`` 16 steps, and
``products`` what these cannot do without."""

SERIES = {
    "examples": (2048, 8192, 60000),
    "mlp": (50, 100, 200, 400),
    "classes": (32, 1024, 32000),
}
ROWS = [
    *(("resnet", command) for command in ("trace", "diag", "lanczos", "ihvp")),
    *(("gpt:27", command) for command in ("minute", "lanczos", "spectrum", "ihvp")),
    *(("gpt:108", command) for command in ("minute", "lanczos")),
    *(
        (f"{network}:{size}", command)
        for network, sizes in SERIES.items()
        for command in ("probes", "lanczos", "ihvp")
        for size in sizes
    ),
]

ON_A_DEVICE = [
    *(("resnet", command) for command in ("trace", "diag", "lanczos", "ihvp")),
    *(("gpt:27", command) for command in ("lanczos", "spectrum")),
    ("gpt:1000", "minute"),
    ("gpt:27", "ihvp"),
]


def clock(device: str) -> float:
    """Of this process's CPU; of a device the time at which all that was asked of it is done."""
    return time.process_time() if device == "cpu" else now(torch.device(device))


# -- One run, in its own process -------------------------------------------------------------------


class Phases:
    """Time by phase: what has passed when a phase is first heard of again is its own."""

    def __init__(self, device: str) -> None:
        self.seconds, self._device = defaultdict[str, float](float), device
        self._last = clock(device)

    def __call__(self, snapshot: Snapshot) -> bool:
        self.add(snapshot.phase)
        return False

    def add(self, phase: str) -> None:
        now = clock(self._device)
        self.seconds[phase] += now - self._last
        self._last = now


def gradient(task: Task) -> None:
    """Over all examples, in the user's batches."""
    parameters = list(task.model.parameters())
    batches = zip(
        *(torch.split(each, task.batch) for each in (task.inputs, task.targets)), strict=True
    )
    for inputs, targets in batches:
        torch.autograd.grad(task.mean_loss(inputs, targets), parameters)


def rounds_of(task: Task) -> Iterator[float]:
    """Seconds of gradients."""
    device = task.inputs.device.type
    for _ in range(5):
        began = clock(device)
        gradient(task)
        yield clock(device) - began


def run(device: str, network: str, command: str) -> dict[str, Any]:
    """Seconds by phase, of a gradient, and what was counted."""
    torch.set_num_threads(1)
    keep_freed_memory()
    given = task_named(network)
    there = (each.to(device) for each in (given.inputs, given.targets))
    task = Task(given.model.to(device), given.loss, *there, given.batch)
    gradient(task)
    around = list(rounds_of(task))
    phases = Phases(device)
    problem = hesscli.Problem(
        task.model,
        task.loss,
        torch.utils.data.TensorDataset(given.inputs, given.targets),
        batch_size=task.batch,
        examples="all",
        observe=phases,
    )
    found = COMMANDS[command](problem, observe=phases)
    phases.add("reading off")
    peak = peak_bytes(problem.device)
    around += rounds_of(task)
    return {
        "parameters": problem.parameters.size,
        "gradient": statistics.median(around),
        "phases": phases.seconds,
        "counted": found.cost.gradients,
        "peak": peak,
        "result": str(found),
        "warnings": found.warnings,
    }


# -- All of them, as a table -----------------------------------------------------------------------


def apart(device: str, network: str, command: str) -> dict[str, Any] | None:
    """A run in a process of its own; None where it did not come to its end."""
    arguments = [sys.executable, __file__, "--run", device, network, command]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{network} {command}: {done.stderr.strip().splitlines()[-1:]}", flush=True)
        return None
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def show(network: str, command: str, found: dict[str, Any]) -> None:
    """A line, and one for each phase that matters."""
    unit, total = found["gradient"], sum(found["phases"].values())
    print(
        f"{network} {command}: {found['parameters']:,} parameters, {total:.1f} s = "
        f"{total / unit:.0f} gradients of {unit * 1000:.1f} ms, counted {found['counted']:.0f}, "
        f"peak {found['peak'] / 2**30:.2f} GiB"
    )
    print(f"    {found['result']}")
    for phase, seconds in sorted(found["phases"].items(), key=lambda item: -item[1]):
        if seconds > 0.01 * total:
            print(f"    {phase}: {seconds / unit:.1f}")
    sys.stdout.flush()


def slopes(times: dict[tuple[str, str], float]) -> None:
    """Between neighbours of a series."""
    for (before, t0), (after, t1) in itertools.pairwise(times.items()):
        (one, _, small), (other, _, large) = before[0].partition(":"), after[0].partition(":")
        if (one, before[1]) == (other, after[1]) and small:
            power = math.log(t1 / t0) / math.log(float(large) / float(small))
            print(f"{one} {before[1]}, {small} to {large}: power {power:.2f}")


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["--run"]:
        print(json.dumps(run(*arguments[1:4])))
        return
    device, rows = "cpu", ROWS
    if arguments[:1] == ["--device"]:
        device, rows, arguments = arguments[1], ON_A_DEVICE, arguments[2:]
    wanted = list(zip(arguments[::2], arguments[1::2], strict=True)) or rows
    times = dict[tuple[str, str], float]()
    for row in wanted:
        if (found := apart(device, *row)) is not None:
            show(*row, found)
            times[row] = sum(found["phases"].values())
    slopes(times)


if __name__ == "__main__":
    main()
