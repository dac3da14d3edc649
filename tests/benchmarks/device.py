"""Products on a CUDA device: of vectors one by one, side by side, and beside a gradient.

``python tests/benchmarks/device.py``: for each network a gradient of a batch, a product with one
vector on a graph that is kept, a product of many side by side (all of them over their number),
and how many a run would take at once; then whole traces on both devices, from what is loaded to
the result. Medians of 15, in milliseconds, once all that was asked of the device is done.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from lines import ROOT
from scale import task_named

import hesscli
from hesscli.meter import now
from hesscli.operators.at_once import vectors_at_once
from hesscli.operators.products import gradient

SAMPLES = {
    "sunspots": "sunspots/model.pt",
    "text": "text/model.safetensors",
    "fashion": "fashion/model.pt",
}


def milliseconds(work: Callable[[], object], rounds: int = 15) -> float:
    work()
    times, device = list[float](), torch.device("cuda")
    for _ in range(rounds):
        began = now(device)
        work()
        times.append(1000 * (now(device) - began))
    return statistics.median(times)


def generated(name: str) -> hesscli.Problem:
    task = task_named(name)
    data = torch.utils.data.TensorDataset(task.inputs, task.targets)
    return hesscli.Problem(task.model.cuda(), task.loss, data, batch_size=64, examples="all")


def products(name: str, problem: hesscli.Problem) -> None:
    """A line of one network's."""
    operator = hesscli.Hessian(problem)
    batch = problem.batch(*problem.joint()[0])
    block = torch.randn(operator.block_size, operator.parameters.size, device="cuda")
    with problem.forward_context():
        one = milliseconds(
            lambda: gradient(problem.evaluate(batch.data), problem.parameters.tensors)
        )
        alone = milliseconds(partial(operator.live(batch), block[:1]))
        together = operator.live(batch, side_by_side=True)
        beside = milliseconds(partial(together, block)) / len(block)
        del together
    print(
        f"{name}: {operator.parameters.size:,} parameters, {batch.count} examples: gradient "
        f"{one:.2f} ms, product {alone:.2f} ({alone / one:.2f} gradients), of {len(block)} side "
        f"by side {beside:.3f} ({alone / beside:.1f} times less); "
        f"a run takes {vectors_at_once(operator)}",
        flush=True,
    )


def traces(name: str) -> None:
    """Of a sample by 64 fresh probes, on both devices."""
    seconds, values = dict[str, float](), dict[str, str]()
    for device in ("cpu", "cuda", "cuda"):  # the first run there also makes the device's context
        problem = hesscli.load(ROOT / "samples" / name, device=device, trust=True)
        began = time.perf_counter()
        found = hesscli.trace(problem, method="hutchinson", probes=64, budget=None)
        seconds[device] = time.perf_counter() - began
        values[device] = f"{found.trace.estimate:.7g} ± {found.trace.probe_stderr:.2g}"
    ratio = seconds["cpu"] / seconds["cuda"]
    print(
        f"{name}: trace by 64 probes: CPU {values['cpu']} in {seconds['cpu']:.2f} s with "
        f"{torch.get_num_threads()} threads, device {values['cuda']} in {seconds['cuda']:.2f} s, "
        f"{ratio:.1f} times less",
        flush=True,
    )


def main() -> None:
    print(torch.cuda.get_device_name(), torch.__version__)
    for name, place in SAMPLES.items():
        products(name, hesscli.load(ROOT / "samples" / place, device="cuda", trust=True))
    for name in ("resnet", "gpt:27", "gpt:108"):
        products(name, generated(name))
    for place in SAMPLES.values():
        traces(place)


if __name__ == "__main__":
    main()
