"""Pruning by M-FAC against magnitude and diagonal Fisher, at several sparsities and seeds.

``python tests/benchmarks/pruning.py [fashion|text] [SEEDS]`` prints a table: loss and accuracy
on the kept examples, means over seeds (which draw the labels of the windows' rows) with their
standard deviations. Magnitude depends on no seed. Nothing is trained.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import hesscli
from hesscli.problem.problem import Problem

SAMPLES = Path(__file__).parent.parent.parent / "samples"
NETWORKS = {
    "fashion": (SAMPLES / "fashion" / "model.pt", (0.5, 0.75, 0.9, 0.95)),
    "text": (SAMPLES / "text" / "model.safetensors", (0.5, 0.75)),
}
STEPS = (1, 16)
_COLUMNS = ("sparsity", "steps", "method", "loss", "accuracy", "recalibrated", "accuracy")


@dataclass(frozen=True)
class Numbers:
    """Of one network: loss and accuracy, as pruned and with batch norm recalibrated."""

    loss: float
    accuracy: float
    again: float
    accuracy_again: float


def pruned(
    problem: Problem, sparsity: float, steps: int, seed: int
) -> Iterator[tuple[str, Numbers]]:
    """By each method."""
    found = hesscli.prune(problem, sparsity=sparsity, steps=steps, seed=seed, budget=None)
    for one in found.methods:
        again = one.recalibrated
        values = (one.loss, one.accuracy, again and again.loss, again and again.accuracy)
        yield one.name, Numbers(*(math.nan if value is None else value for value in values))


def told(values: list[float], percent: bool = False) -> str:
    """A mean, and its standard deviation where there are several values."""
    scale, digits = (100, 1) if percent else (1, 3)
    text = f"{scale * statistics.fmean(values):.{digits}f}"
    if len(set(values)) > 1:
        text += f" ± {scale * statistics.stdev(values):.{digits}f}"
    return "" if math.isnan(values[0]) else text + "%" * percent


def main(network: str = "fashion", seeds: str = "5") -> None:
    """Print the table, row by row as they are known."""
    torch.set_num_threads(1)
    path, sparsities = NETWORKS[network]
    problem = hesscli.load(path, trust=True)
    print("| " + " | ".join(_COLUMNS) + " |\n" + "|---" * len(_COLUMNS) + "|")
    for sparsity in sparsities:
        for steps in STEPS:
            began = time.process_time()
            each: dict[str, list[Numbers]] = {}
            for seed in range(int(seeds)):
                for name, numbers in pruned(problem, sparsity, steps, seed):
                    each.setdefault(name, []).append(numbers)
            for name, found in each.items():
                cells = [
                    told([one.loss for one in found]),
                    told([one.accuracy for one in found], percent=True),
                    told([one.again for one in found]),
                    told([one.accuracy_again for one in found], percent=True),
                ]
                print(f"| {sparsity:.0%} | {steps} | {name} | {' | '.join(cells)} |", flush=True)
            spent = (time.process_time() - began) / int(seeds)
            print(f"{sparsity:.0%}, {steps} steps: {spent:.0f} CPU s a run", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
