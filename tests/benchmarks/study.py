"""Five optimizers on four networks, from scratch: what they reach, how soon, how surely.

    apt-get download dataset-fashion-mnist dict-devil
    dpkg-deb -x dataset-fashion-mnist_*.deb data; dpkg-deb -x dict-devil_*.deb data
    python tests/benchmarks/study.py --data data/usr/share

A queue of trainings, one line of JSON each in hesscli-out/study.jsonl. What is there, or in
study.jsonl beside this file, is not done again, and of an interrupted queue the trainings that ran
are lost alone. ``--minutes`` stops before the next one. ``study_tables.py`` reads the lines.

``--workers`` processes take a training each, with one thread. The fourth network, ``resnet20``, is
for a GPU (``--device cuda``), which a training alone does not keep busy: eight or so share it.

Each optimizer has five learning rates, factors of two apart, which train on a part of the training
set and are compared on the rest of it; with the best of them each of eight seeds then trains on
all of it. A seed gives the first weights and the order of the examples, the same to all optimizers
and on all devices. Learning rates rise over a twentieth of the steps and fall to 0 along a cosine.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import cache, partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from lines import FRESH, ROOT, Lines
from scale import Residual
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from hesscli.errors import UnsoundError
from hesscli.heap import keep_freed_memory
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
    return net


class ResNet(nn.Module):
    """Three stages of residual blocks, of ``width`` channels and twice and four times as many.

    The first convolution takes every second pixel, as the sample's does, so that stages see 14 by
    14, 7 by 7 and 4 by 4.
    """

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        first = nn.Conv2d(1, width, 3, 2, 1, bias=False)
        parts: list[nn.Module] = [first, nn.BatchNorm2d(width), nn.ReLU()]
        for stage in range(3):
            width *= 2 if stage else 1
            parts.append(Residual(width // 2, width, 2) if stage else Residual(width, width, 1))
            parts += [Residual(width, width, 1) for _ in range(blocks - 1)]
        parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
        self.layers = nn.Sequential(*parts)

    def forward(self, images: Tensor) -> Tensor:
        """Map bytes (N, 28, 28) to logits."""
        logits: Tensor = self.layers(images[:, None].float() / 255)
        return logits


def resnet8() -> nn.Module:
    """19,810 parameters."""
    return ResNet(8, 1)


def resnet20() -> nn.Module:
    """Of the papers on CIFAR, with convolutions in its two shortcuts: 272,186 parameters."""
    return ResNet(16, 3)


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
    "resnet8": Task(resnet8, clothes, ON_IMAGES, 128),
    "resnet20": Task(resnet20, clothes, ON_IMAGES, 128),
}
ON_A_CPU = ["cnn", "text", "resnet8"]


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
#: Torch's own, which a device can step with in one kernel, by the same formulas.
FUSED = ["SGD", "Adam", "AdamW"]
GRID = [0.25, 0.5, 1, 2, 4]
#: At AdaHessian's own learning rate.
VARIANTS: dict[str, Make] = {
    "AdaHessian, entry by entry": partial(AdaHessian, weight_decay=5e-4, blocks="1"),
    "AdaHessian, |v ⊙ Hv|": partial(AdaHessian, weight_decay=5e-4, diagonal="abs"),
    "AdaHessian, every 10 steps": partial(AdaHessian, weight_decay=5e-4, hessian_every=10),
}
SEEDS = 8
VARIANT_SEEDS = 3
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


def tuned(task: str, optimizer: str, lines: Lines[Run]) -> float | None:
    """The rate with the lowest loss on what was held back; None until all have been tried."""
    runs = tuning(task, optimizer)
    if any(run not in lines for run in runs):
        return None
    losses = {run.lr: lines[run]["loss"] for run in runs}
    return min(losses, key=lambda lr: math.inf if losses[lr] is None else losses[lr])


def plan(tasks: list[str], lines: Lines[Run]) -> Iterator[Run]:
    """All that can be done as far as rates are known, the most telling first.

    The dearest optimizers come first, so that those who work beside each other end together.
    """
    dearest = list(reversed(OPTIMIZERS))
    for task, optimizer in itertools.product(tasks, dearest):
        yield from tuning(task, optimizer)
    best = {(task, name): tuned(task, name, lines) for task in tasks for name in OPTIMIZERS}
    for seed, task, optimizer in itertools.product(range(SEEDS), tasks, dearest):
        if lr := best[task, optimizer]:
            yield Run("test", task, optimizer, lr, seed)
    for seed, task, factor in itertools.product(range(OFF_SEEDS), tasks, OFF):
        for optimizer in dearest:
            if lr := best[task, optimizer]:
                yield Run("test", task, optimizer, factor * lr, seed)
    for seed, task, variant in itertools.product(range(VARIANT_SEEDS), tasks, VARIANTS):
        if lr := best[task, "AdaHessian"]:
            yield Run("test", task, variant, lr, seed)


def next_of(tasks: list[str], lines: Lines[Run], taken: Collection[Run]) -> Run | None:
    """The first that is neither done nor taken."""
    return next((run for run in plan(tasks, lines) if run not in lines and run not in taken), None)


# -- One training ----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(net: nn.Module, examples: Examples) -> dict[str, float | None]:
    """Mean loss and share of right answers, as a network in use has them."""
    net.eval()
    batches = zip(*(part.split(500) for part in examples), strict=True)
    pairs = [(net(inputs).flatten(0, -2), targets.flatten()) for inputs, targets in batches]
    net.train()
    count = sum(len(targets) for _, targets in pairs)
    sums = torch.stack([cross_entropy(*pair, reduction="sum") for pair in pairs])
    loss = sum(sums.tolist()) / count
    right = torch.stack([(logits.argmax(1) == targets).sum() for logits, targets in pairs])
    return {"loss": loss if math.isfinite(loss) else None, "accuracy": int(right.sum()) / count}


def train(run: Run, data: tuple[Examples, Examples]) -> dict[str, Any]:
    """Train where the data are, and tell loss and accuracy twice an epoch, or of a rate at the end.

    Seconds are those of the steps: CPU time on a CPU, on a device all time, which is taken twice an
    epoch, when what was asked of it is done. A loss that is not finite ends the training there, and
    its accuracy is that of the weights then.
    """
    task, (seen, unseen) = TASKS[run.task], data
    epochs, device = task.epochs, seen.inputs.device
    if run.phase == "tuning":
        epochs, cut = task.tuning_epochs, round(len(seen.inputs) * (1 - task.held_back))
        unseen = Examples(*(part[cut:] for part in seen))
        seen = Examples(*(part[:cut] for part in seen))
    torch.manual_seed(run.seed)
    net = task.make().to(device, memory_format=layout_on(device)).train()
    optimizer = optimizer_of(run, net, device)
    each = math.ceil(len(seen.inputs) / task.batch)
    steps = epochs * each
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: min(1, (t + 1) / warm) * (1 + math.cos(math.pi * t / steps)) / 2,
    )
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    looks = [{"step": 0, "seconds": 0.0, **evaluate(net, unseen)}]
    seconds, diverged, start = 0.0, False, clock()
    held, losses = list[Tensor](), list[float]()
    for step in range(steps):
        if step % each == 0:
            batches = torch.randperm(len(seen.inputs)).to(device).split(task.batch)
        batch = batches[step % each]
        try:
            held.append(take_step(net, optimizer, Examples(*(part[batch] for part in seen))))
        except UnsoundError:
            diverged = True
        schedule.step()
        done = step + 1
        if not (diverged or done == steps or done * 2 % each < 2):
            continue
        losses += torch.stack(held).tolist() if held else []  # which waits for the device
        seconds += clock() - start
        held, diverged = [], diverged or not all(map(math.isfinite, losses))
        if diverged or done == steps or run.phase == "test":
            trained = None if diverged else sum(losses) / len(losses)
            look = {"step": done, "seconds": round(seconds, 2), "training_loss": trained}
            looks.append(look | evaluate(net, unseen))
            losses = []
        if diverged:
            break
        start = clock()
    last = {name: looks[-1][name] for name in ("loss", "accuracy")}
    size = sum(p.numel() for p in net.parameters())
    told = {"diverged": diverged, "steps": steps, "epochs": epochs, "parameters": size}
    if device.type == "cuda":
        told["device"] = torch.cuda.get_device_name(device)
    return last | told | {"seconds": round(seconds, 2), "looks": looks}


def layout_on(device: torch.device) -> torch.memory_format:
    """That in which it convolves float32 fastest."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


def optimizer_of(run: Run, net: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """With a training's own options."""
    make = VARIANTS.get(run.optimizer) or OPTIMIZERS[run.optimizer]
    options: dict[str, Any] = {}
    if run.optimizer == "M-FAC":
        options["window"] = TASKS[run.task].window
    if run.optimizer in FUSED and device.type == "cuda":
        options["fused"] = True
    optimizer = make(net.parameters(), run.lr, **options)
    if isinstance(optimizer, AdaHessian):
        optimizer.seed = run.seed
    return optimizer


def take_step(net: nn.Module, optimizer: torch.optim.Optimizer, batch: Examples) -> Tensor:
    """One step; the loss before it."""
    loss = cross_entropy(net(batch.inputs).flatten(0, -2), batch.targets.flatten())
    if isinstance(optimizer, LossOptimizer):
        optimizer.step(loss)
    else:
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return loss.detach()


# -- Trainings beside each other -------------------------------------------------------------------


def prepare() -> None:
    """Make a process a worker."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # float32, as on a CPU


def end_with_parent() -> None:
    """One that is killed tells nobody, and who works for it would wait for ever."""
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)


@cache
def examples(
    read: Callable[[Path], tuple[Examples, Examples]], folder: Path, device: str
) -> tuple[Examples, Examples]:
    """What a worker reads once."""
    seen, unseen = (Examples(*(part.to(device) for part in each)) for each in read(folder))
    return seen, unseen


def work(run: Run, folder: Path, device: str) -> dict[str, Any]:
    """A training in a worker."""
    with sdpa_kernel(SDPBackend.MATH):  # which can be differentiated twice
        return train(run, examples(TASKS[run.task].read, folder, device))


def main() -> None:
    """Go on with the queue; what fails is told of, and the rest goes on."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default="/usr/share", help="folder of both data sets")
    parser.add_argument("--out", type=Path, default=FRESH, help="folder of new lines")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--workers", type=int, default=1, help="trainings at a time")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no training after")
    help_ = f"which of {', '.join(TASKS)}; default {' '.join(ON_A_CPU)}"
    parser.add_argument("tasks", nargs="*", default=ON_A_CPU, help=help_)
    arguments = parser.parse_args()
    until = time.monotonic() + 60 * arguments.minutes
    lines = Lines("study.jsonl", Run, arguments.out)
    running, failed = dict[Future[dict[str, Any]], Run](), set[Run]()
    with ProcessPoolExecutor(arguments.workers, get_context("spawn"), prepare) as pool:
        while True:
            while (
                len(running) < arguments.workers
                and time.monotonic() < until
                and (run := next_of(arguments.tasks, lines, {*running.values(), *failed}))
            ):
                job = pool.submit(work, run, arguments.data, arguments.device)
                running[job] = run
            if not running:
                break
            for job in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(job)
                try:
                    found = job.result()
                except Exception:
                    failed.add(run)
                    print(*asdict(run).values(), "failed", file=sys.stderr)
                    traceback.print_exc()
                    continue
                if "device" in found:
                    found["workers"] = arguments.workers  # who shared it
                lines.keep(run, found)
                print(*asdict(run).values(), *list(found.items())[:3], flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
