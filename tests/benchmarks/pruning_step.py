"""One step to a high sparsity: what is due to the choice of weights, and what to the update.

``python tests/benchmarks/pruning_step.py`` prints a table for the fashion sample (two minutes).
Weights are chosen by M-FAC's saliency or by magnitude, and the others stay where they are or move
by the exact update, by blocks or by layers, with less damping or more.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from lines import ROOT
from pruning import WORTH, told
from torch import Tensor

import hesscli
from hesscli.diagnostics.pruning_choice import Candidates, least
from hesscli.diagnostics.pruning_study import at
from hesscli.diagnostics.saliency import saliencies
from hesscli.diagnostics.window import block_sizes, kind_of
from hesscli.engines.mfac import GradientWindow, StaticFisher
from hesscli.engines.mfac.pruning import compensation
from hesscli.heap import keep_freed_memory
from hesscli.meter import Meter, go_on
from hesscli.operators.per_example.rows import Rows
from hesscli.problem.proof import measured
from hesscli.problem.recalibration import recalibrated

ROWS = 512
SPARSITIES = (0.9, 0.95)
BLOCKS = ("128", "layer")
DAMPINGS = (1e-2, 1e-1, 1.0)


class Step:
    """The sample, and a window of its gradients."""

    def __init__(self) -> None:
        self.problem = hesscli.load(ROOT / "samples" / "fashion" / "model.pt", trust=True)
        parameters, self.meter = self.problem.parameters, Meter()
        self.whole = parameters.flatten([t.detach().double() for t in parameters.tensors])
        candidates = Candidates(parameters)
        self.columns, self.weights = candidates.columns, self.whole[candidates.columns]
        self.layers = [place.stop - place.start for place in candidates.layers.values()]
        self.window = GradientWindow(ROWS, candidates.count)
        kind, _ = kind_of(self.problem, "sampled")
        for block in Rows(self.problem, kind, 0, self.meter).take(ROWS):
            self.window.extend(block[:, self.columns])

    def fisher(self, blocks: str, damping: float) -> StaticFisher:
        """With a damping relative to the mean diagonal."""
        unit = self.window.mean_square() / self.window.size
        sizes = block_sizes(self.layers, blocks, ROWS)
        return StaticFisher(self.window, damping * unit, blocks=sizes)

    def cheapest(self, costs: Tensor, sparsity: float) -> Tensor:
        """Which go."""
        return least(costs, [(slice(0, len(costs)), round(sparsity * len(costs)))])

    def told(self, gone: Tensor, change: Tensor) -> str:
        """What is left, in a table's cells."""
        kept = torch.where(gone, 0.0, self.weights + change)
        moved = float(change[~gone].norm() / self.weights[~gone].norm())
        last = slice(-self.layers[-1] - self.layers[-2], -self.layers[-1])
        cells = [f"{float(gone[last].double().mean()):.1%}", f"{moved:.2f}", *self._worth(kept)]
        return " | ".join(cells)

    def _worth(self, kept: Tensor) -> Iterator[str]:
        weights = self.whole.clone()
        weights[self.columns] = kept
        with at(self.problem, weights):
            numbers = [*measured(self.problem, go_on)]
            with recalibrated(self.problem, self.meter, go_on):
                numbers += measured(self.problem, go_on)
        return (
            told([number], "accuracy" in name) for name, number in zip(WORTH, numbers, strict=True)
        )


def main() -> None:
    """Print the table, row by row as they are known."""
    keep_freed_memory()
    torch.set_num_threads(1)
    step = Step()
    titles = ("sparsity", "chosen by", "blocks", "damping", "gone of conv3", "moved", *WORTH)
    print(f"| {' | '.join(titles)} |\n" + "|---" * len(titles) + "|")
    for sparsity in SPARSITIES:
        gone = step.cheapest(step.weights.square(), sparsity)
        still = step.told(gone, torch.zeros_like(step.weights))
        print(f"| {sparsity:.0%} | magnitude | | | {still} |", flush=True)
        for blocks, damping in itertools.product(BLOCKS, DAMPINGS):
            fisher = step.fisher(blocks, damping)
            costs = {
                "M-FAC": saliencies(step.weights, fisher.diagonal()),
                "magnitude": step.weights.square(),
            }
            for name, cost in costs.items():
                gone = step.cheapest(cost, sparsity)
                cells = step.told(gone, compensation(fisher, step.weights, gone))
                print(f"| {sparsity:.0%} | {name} | {blocks} | {damping:g} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
