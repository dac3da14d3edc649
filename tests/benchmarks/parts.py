"""The trace of a last layer beside that of its whole network, and beside a forward pass.

``python tests/benchmarks/parts.py [WIDTH] [EXAMPLES]``: a perceptron of 20 million parameters. What
is frozen should take no more than forward passes: three over the data (loss and gradient, the claim
of exactness, the squares), and the checks on a few examples. Seconds are of the CPU.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import nn

import hesscli

LAYERS, CLASSES = 10, 10


def network(width: int) -> nn.Module:
    torch.manual_seed(0)
    hidden = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(LAYERS)]
    return nn.Sequential(*hidden, nn.Linear(width, CLASSES)).eval()


def timed(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    width, examples = (int(a) for a in (sys.argv[1:] + ["1414", "1024"][len(sys.argv) - 1 :])[:2])
    model = network(width)
    x, y = torch.randn(examples, width), torch.arange(examples) % CLASSES
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, {examples} examples, {torch.get_num_threads()} threads")

    def forward() -> None:
        with torch.no_grad():
            for part in x.split(128):
                model(part)

    def gradient() -> None:
        for inputs, labels in zip(x.split(128), y.split(128), strict=True):
            loss = nn.functional.cross_entropy(model(inputs), labels)
            torch.autograd.grad(loss, list(model.parameters()))

    hesscli.trace(hesscli.Problem(nn.Linear(1, 2), "cross_entropy", (x[:, :1], y % 2)))  # imports
    forward()
    passes, slope = (min(timed(work) for _ in range(3)) for work in (forward, gradient))
    print(f"forward pass {passes:.3f} s, gradient {slope:.3f} s")
    for globs in ([str(LAYERS)], []):
        began = time.process_time()
        problem = hesscli.Problem(model, "cross_entropy", (x, y), params=globs, examples="all")
        loaded = time.process_time() - began
        began = time.process_time()
        found = hesscli.trace(problem, budget=None)
        took = time.process_time() - began
        print(
            f"{' '.join(globs) or 'all':4} {problem.parameters.size:>11,} parameters: "
            f"problem {loaded:.2f} s, trace {took:.2f} s "
            f"= {took / passes:.1f} forward passes, {found.cost.gradients:.2f} gradients; "
            f"{found.method.name}, {found.status}, {found.trace.estimate:.5g}"
        )


if __name__ == "__main__":
    main()
