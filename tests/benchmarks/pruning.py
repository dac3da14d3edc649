"""Pruning by M-FAC against magnitude and diagonal Fisher, at several sparsities and seeds.

``python tests/benchmarks/pruning.py`` prints tables: loss and accuracy on the kept examples, means
over seeds (which draw the labels of the windows' rows) with their standard deviations. Magnitude
depends on no seed. Nothing is trained. Each run is a line in pruning.jsonl, here or in hesscli-out,
and is not done again.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lines import ROOT, Lines

import hesscli
from hesscli.heap import keep_freed_memory

CHECKPOINTS = {"fashion": "fashion/model.pt", "text": "text/model.safetensors"}
SPARSITIES = {
    "fashion": ("50%", "75%", "90%", "95%", "2:4"),
    "text": ("50%", "75%"),
}
STEPS = (1, 16)
SEEDS = 5
NAMES = {"mfac": "**M-FAC**", "magnitude": "magnitude", "diagonal-fisher": "diagonal Fisher"}
WORTH = ("loss", "accuracy", "loss, recalibrated", "accuracy, recalibrated")


@dataclass(frozen=True)
class Cut:
    """One run of ``hesscli.prune``; the sparsity is a share in percent, or a pattern."""

    network: str
    sparsity: str
    steps: int
    seed: int


def plan() -> Iterator[Cut]:
    """All runs, the quick ones first, and then the first seeds of all."""
    for steps, seed in itertools.product(STEPS, range(SEEDS)):
        for network, sparsities in SPARSITIES.items():
            for sparsity in sparsities:
                yield Cut(network, sparsity, steps, seed)


def pruned(cut: Cut, problem: hesscli.Problem) -> dict[str, Any]:
    """What each method leaves, in the order of ``WORTH``."""
    start = time.process_time()
    by_share = cut.sparsity.endswith("%")
    aim: dict[str, Any] = {"pattern": cut.sparsity}
    if by_share:
        aim = {"sparsity": float(cut.sparsity[:-1]) / 100}
    found = hesscli.prune(problem, steps=cut.steps, seed=cut.seed, budget=None, **aim)
    left = {}
    for one in found.methods:
        again = one.recalibrated
        numbers = (one.loss, one.accuracy, again and again.loss, again and again.accuracy)
        left[one.name] = dict(zip(WORTH, numbers, strict=True))
    before = {"loss": found.before.loss, "accuracy": found.before.accuracy}
    return {"seconds": round(time.process_time() - start, 2), "before": before, "left": left}


def told(values: list[float | None], percent: bool) -> str:
    """A mean, and its standard deviation where there are several values."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return "" if not known else f"{len(values) - len(known)} not finite"
    scale, digits = (100, 1) if percent else (1, 3)
    text = f"{scale * statistics.fmean(known):.{digits}f}"
    if len(set(known)) > 1:
        text += f" ± {scale * statistics.stdev(known):.{digits}f}"
    return text + "%" * percent


def table(network: str, lines: Lines[Cut]) -> Iterator[str]:
    """Markdown, a row for each method at each sparsity and number of steps."""
    for before in [found["before"] for cut, found in lines.items() if cut.network == network][:1]:
        accuracy = "" if before["accuracy"] is None else f", accuracy {before['accuracy']:.1%}"
        yield f"{network}: loss {before['loss']:.4f}{accuracy} before"
    yield ""
    yield "| sparsity | steps | pruned by | " + " | ".join(WORTH) + " |"
    yield "|---|---|---" + "|---" * len(WORTH) + "|"
    for sparsity, steps in itertools.product(SPARSITIES[network], STEPS):
        cuts = [Cut(network, sparsity, steps, seed) for seed in range(SEEDS)]
        found = [lines[cut]["left"] for cut in cuts if cut in lines]
        for name, title in NAMES.items() if found else ():
            cells = [
                told([left[name][worth] for left in found], "accuracy" in worth) for worth in WORTH
            ]
            yield f"| {sparsity} | {steps} | {title} | {' | '.join(cells)} |"
        if len(found) < SEEDS:
            yield f"| {sparsity} | {steps} | {len(found)} of {SEEDS} seeds |" + " |" * len(WORTH)


def main() -> None:
    """Go on with the queue, and print what there is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    started, lines = time.monotonic(), Lines("pruning.jsonl", Cut)
    load: Callable[[str], hesscli.Problem] = functools.cache(
        lambda network: hesscli.load(ROOT / "samples" / CHECKPOINTS[network], trust=True)
    )
    for cut in plan():
        if cut not in lines and time.monotonic() - started < 60 * arguments.minutes:
            lines.keep(cut, pruned(cut, load(cut.network)))
    for network in CHECKPOINTS:
        print("\n".join(table(network, lines)), end="\n\n")


if __name__ == "__main__":
    main()
