"""What an exact trace and diagonal cost, in full-data gradients of CPU time.

    python tests/benchmarks/exact.py [--rounds 5]

One thread, everything after loading: proof, preflight, the proof of exactness, the squares and
the report. Gradients of the same loss over the same data are timed before and after each run, in
the same process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import hesscli
from hesscli.operators.products import flatten, gradient

FASHION = Path(__file__).parents[2] / "samples" / "fashion" / "model.pt"
LIMIT = 15.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    for name, command in (("trace", hesscli.trace), ("diag", hesscli.diagonal)):
        found = [_ratio(command) for _ in range(rounds)]
        low, middle, high = min(found), statistics.median(found), max(found)
        verdict = "within" if middle <= LIMIT else "over"
        print(f"{name}: {middle:.1f} gradients ({low:.1f} to {high:.1f}), {verdict} {LIMIT:.0f}")


def _ratio(command: Callable[..., object]) -> float:
    """CPU time of one run on a fresh problem over that of one gradient."""
    problem = hesscli.load(FASHION)
    before = _gradient_seconds(problem)
    began = time.process_time()
    result = command(problem)
    spent = time.process_time() - began
    assert "exact" in str(result)
    return spent / statistics.median([*before, *_gradient_seconds(problem)])


def _gradient_seconds(problem: hesscli.Problem) -> list[float]:
    times = []
    for _ in range(3):
        began = time.process_time()
        for batch in problem.batches():
            with problem.forward_context():
                flatten(gradient(problem.evaluate(batch.data), problem.parameters.tensors))
        times.append(time.process_time() - began)
    return times


if __name__ == "__main__":
    main()
