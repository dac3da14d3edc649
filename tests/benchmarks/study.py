"""Five optimizers on three networks, from scratch: what they reach, how soon, how surely.

    apt-get download dataset-fashion-mnist dict-devil
    dpkg-deb -x dataset-fashion-mnist_*.deb data; dpkg-deb -x dict-devil_*.deb data
    python tests/benchmarks/study.py --data data/usr/share

A queue of trainings, one line of JSON each in hesscli-out/study.jsonl. What is there, or in
study.jsonl beside this file, is not done again, and of an interrupted queue the training that ran
is lost alone. ``--minutes`` stops before the next one. ``study_tables.py`` reads the lines.

Each optimizer has five learning rates, factors of two apart, which train on a part of the training
set and are compared on the rest of it; with the best of them each of eight seeds then trains on
all of it. A seed gives the first weights and the order of the examples, the same to all optimizers.
Learning rates rise over a twentieth of the steps and fall to 0 along a cosine.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from lines import ROOT, Lines
from scale import Residual
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from hesscli.cli.process import keep_freed_memory
from hesscli.errors import UnsoundError
from hesscli.optim import MFAC, AdaHessian
from hesscli.optim.base import LossOptimizer

# -- Networks and their data -----------------------------------------------------------------------


class Examples(NamedTuple):
    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Task:
    """What is trained, on what.

    Attributes:
        make: the network, with weights drawn by torch's own generator.
        read: examples to train on, and unseen ones, from the folder of the data.
        rates: the middle of each optimizer's learning rates, from trainings of an epoch.
        batch: examples in a step.
        epochs: of a training whose result is compared.
        tuning_epochs: of a training that tries a learning rate.
        held_back: this share of the examples to train on is for comparing learning rates.
        window: of M-FAC. As it fills, steps along the newest gradient grow with the number of rows:
            a learning rate is worth nothing that is from a training in which it was never full.
    """

    make: Callable[[], nn.Module]
    read: Callable[[Path], tuple[Examples, Examples]]
    rates: dict[str, float]
    batch: int
    epochs: int = 5
    tuning_epochs: int = 2
    held_back: float = 1 / 6
    window: int = 512


def sample(folder: str) -> ModuleType:
    """A sample's training script, and the network that it imports as ``net``."""
    path = ROOT / "samples" / folder
    sys.modules.pop("net", None)
    sys.path.insert(0, str(path))
    try:
        spec = importlib.util.spec_from_file_location(f"{folder}_train", path / "train.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def clothes(folder: Path) -> tuple[Examples, Examples]:
    """All of Fashion-MNIST: 60,000 images and 10,000."""
    read = sample("fashion").read_split
    folder = folder / "datasets" / "fashion-mnist"
    return Examples(*read(folder, "train")), Examples(*read(folder, "t10k"))


def dictionary(folder: Path) -> tuple[Examples, Examples]:
    """Nine tenths of The Devil's Dictionary and the rest, by rows of 64 characters."""
    script = sample("text")
    book = script.read_book(folder / "dictd" / "devil.dict.dz")
    rows = map(script.windows, book.tensor_split([len(book) * 9 // 10]))
    seen, unseen = (Examples(part[:, :-1], part[:, 1:].long()) for part in rows)
    return seen, unseen


def convolutions() -> nn.Module:
    """The sample's network, half as wide: 5,154 parameters."""
    net: nn.Module = sample("fashion").FashionNet(8)
    return net.to(memory_format=torch.channels_last)


class ResNet8(nn.Module):
    """Three residual blocks of 8, 16 and 32 channels on 14 by 14: 19,810 parameters.

    The first convolution takes every second pixel, as the sample's does.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            Residual(width, width, 1),
            Residual(width, 2 * width, 2),
            Residual(2 * width, 4 * width, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map bytes (N, 28, 28) to logits."""
        logits: Tensor = self.layers(images[:, None].float() / 255)
        return logits


def residual() -> nn.Module:
    """In the layout that a CPU convolves fastest."""
    return ResNet8().to(memory_format=torch.channels_last)


def transformer() -> nn.Module:
    """The sample's network, half as wide, with embeddings drawn as the sample's are."""
    net: nn.Module = sample("text").CharTransformer(width=32)
    for table in net.characters, net.positions:
        nn.init.normal_(table.weight, std=0.1)  # type: ignore[arg-type, union-attr]
    return net


ON_IMAGES = {"SGD": 0.2, "Adam": 0.016, "AdamW": 0.016, "AdaHessian": 0.2, "M-FAC": 0.008}
ON_TEXT = {"SGD": 0.1, "Adam": 0.004, "AdamW": 0.004, "AdaHessian": 0.05, "M-FAC": 0.008}
TASKS = {
    "cnn": Task(convolutions, clothes, ON_IMAGES, 128),
    "text": Task(transformer, dictionary, ON_TEXT, 32, window=128),
    "resnet8": Task(residual, clothes, ON_IMAGES, 128),
}


# -- Optimizers ------------------------------------------------------------------------------------


Make = Callable[..., torch.optim.Optimizer]
#: With the customary decays, which are small beside what five epochs do.
OPTIMIZERS: dict[str, Make] = {
    "SGD": partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4),
    "Adam": partial(torch.optim.Adam, weight_decay=5e-4),
    "AdamW": partial(torch.optim.AdamW, weight_decay=0.01),
    "AdaHessian": partial(AdaHessian, weight_decay=5e-4),
    "M-FAC": partial(MFAC, weight_decay=5e-4),
}
GRID = [0.25, 0.5, 1, 2, 4]
#: At AdaHessian's own learning rate.
VARIANTS: dict[str, Make] = {
    "AdaHessian, entry by entry": partial(AdaHessian, weight_decay=5e-4, blocks="1"),
    "AdaHessian, |v ⊙ Hv|": partial(AdaHessian, weight_decay=5e-4, diagonal="abs"),
    "AdaHessian, every 10 steps": partial(AdaHessian, weight_decay=5e-4, hessian_every=10),
}
SEEDS = 8
FIRST_SEEDS = 3
OFF = [0.5, 2, 4]
OFF_SEEDS = 3


# -- The queue -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        phase: ``tuning`` on a part of the training set, or ``test``.
    """

    phase: str
    task: str
    optimizer: str
    lr: float
    seed: int


def tuning(task: str, optimizer: str) -> list[Run]:
    """With each of the grid's learning rates."""
    middle = TASKS[task].rates[optimizer]
    return [Run("tuning", task, optimizer, middle * factor, 0) for factor in GRID]


def tuned(task: str, optimizer: str, lines: Lines[Run]) -> float:
    """The rate with the lowest loss on what was held back."""
    losses = {run.lr: lines[run]["loss"] for run in tuning(task, optimizer)}
    return min(losses, key=lambda lr: math.inf if losses[lr] is None else losses[lr])


def tests(task: str, seeds: Iterable[int], lines: Lines[Run]) -> Iterator[Run]:
    """Each seed by all optimizers at their best rates."""
    for seed, optimizer in itertools.product(seeds, OPTIMIZERS):
        yield Run("test", task, optimizer, tuned(task, optimizer, lines), seed)


def plan(tasks: list[str], lines: Lines[Run]) -> Iterator[Run]:
    """All there is to do, the most telling first; what comes later depends on what came before."""
    for task in tasks:
        for optimizer in OPTIMIZERS:
            yield from tuning(task, optimizer)
        yield from tests(task, range(FIRST_SEEDS), lines)
    for task in tasks:
        for seed, variant in itertools.product(range(FIRST_SEEDS), VARIANTS):
            yield Run("test", task, variant, tuned(task, "AdaHessian", lines), seed)
    for task in tasks:
        yield from tests(task, range(FIRST_SEEDS, SEEDS), lines)
    for seed, task in itertools.product(range(OFF_SEEDS), tasks):
        for factor, optimizer in itertools.product(OFF, OPTIMIZERS):
            yield Run("test", task, optimizer, factor * tuned(task, optimizer, lines), seed)


def next_of(tasks: list[str], lines: Lines[Run]) -> Run | None:
    """The first that is not done."""
    return next((run for run in plan(tasks, lines) if run not in lines), None)


# -- One training ----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(net: nn.Module, examples: Examples) -> dict[str, float | None]:
    """Mean loss and share of right answers, as a network in use has them."""
    net.eval()
    batches = zip(*(part.split(500) for part in examples), strict=True)
    pairs = [(net(inputs).flatten(0, -2), targets.flatten()) for inputs, targets in batches]
    net.train()
    count = sum(len(targets) for _, targets in pairs)
    loss = sum(cross_entropy(*pair, reduction="sum").item() for pair in pairs) / count
    right = sum(int((logits.argmax(1) == targets).sum()) for logits, targets in pairs)
    return {"loss": loss if math.isfinite(loss) else None, "accuracy": right / count}


def train(run: Run, data: tuple[Examples, Examples]) -> dict[str, Any]:
    """Train, and tell the loss and accuracy twice an epoch; or at the end alone, for a rate.

    CPU time is that of the steps. A loss that is not finite ends the training, and its accuracy is
    that of the last weights that were looked at.
    """
    task, (seen, unseen) = TASKS[run.task], data
    epochs = task.epochs
    if run.phase == "tuning":
        epochs, cut = task.tuning_epochs, round(len(seen.inputs) * (1 - task.held_back))
        unseen = Examples(*(part[cut:] for part in seen))
        seen = Examples(*(part[:cut] for part in seen))
    torch.manual_seed(run.seed)
    net = task.make().train()
    make = VARIANTS.get(run.optimizer) or OPTIMIZERS[run.optimizer]
    options = {"window": task.window} if run.optimizer == "M-FAC" else {}
    optimizer = make(net.parameters(), run.lr, **options)
    if isinstance(optimizer, AdaHessian):
        optimizer.seed = run.seed
    each = math.ceil(len(seen.inputs) / task.batch)
    steps = epochs * each
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: min(1, (t + 1) / warm) * (1 + math.cos(math.pi * t / steps)) / 2,
    )
    looks = [{"step": 0, "seconds": 0.0, **evaluate(net, unseen)}]
    seconds, losses, diverged = 0.0, [], False
    for step in range(steps):
        if step % each == 0:
            batches = torch.randperm(len(seen.inputs)).split(task.batch)
        batch = batches[step % each]
        start = time.process_time()
        try:
            losses.append(take_step(net, optimizer, Examples(*(part[batch] for part in seen))))
        except UnsoundError:
            losses.append(math.nan)
        schedule.step()
        seconds += time.process_time() - start
        diverged = not math.isfinite(losses[-1])
        done = step + 1
        if diverged or done == steps or (run.phase == "test" and done * 2 % each < 2):
            trained = None if diverged else sum(losses) / len(losses)
            look = {"step": done, "seconds": round(seconds, 2), "training_loss": trained}
            looks.append(look | evaluate(net, unseen))
            losses = []
        if diverged:
            break
    last = {name: looks[-1][name] for name in ("loss", "accuracy")}
    size = sum(p.numel() for p in net.parameters())
    told = {"diverged": diverged, "steps": steps, "epochs": epochs, "parameters": size}
    return last | told | {"seconds": round(seconds, 2), "looks": looks}


def take_step(net: nn.Module, optimizer: torch.optim.Optimizer, batch: Examples) -> float:
    """One step; the loss before it."""
    loss = cross_entropy(net(batch.inputs).flatten(0, -2), batch.targets.flatten())
    if isinstance(optimizer, LossOptimizer):
        optimizer.step(loss)
    else:
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return loss.item()


def main() -> None:
    """Go on with the queue."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default="/usr/share", help="folder of both data sets")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no training after")
    parser.add_argument("tasks", nargs="*", default=list(TASKS), help="which; all")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    started = time.monotonic()
    data: dict[Any, tuple[Examples, Examples]] = {}
    lines = Lines("study.jsonl", Run)
    with sdpa_kernel(SDPBackend.MATH):  # which can be differentiated twice
        while time.monotonic() - started < 60 * arguments.minutes and (
            run := next_of(arguments.tasks, lines)
        ):
            read = TASKS[run.task].read
            if read not in data:
                data[read] = read(arguments.data)
            lines.keep(run, train(run, data[read]))
            print(*asdict(run).values(), *list(lines[run].items())[:3], flush=True)


if __name__ == "__main__":
    main()
