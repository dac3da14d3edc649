"""Predicted against measured loss changes of every layer of two samples, in float64.

    python tests/benchmarks/calibration.py [fashion text]

For each scale t of a change δ: the share of changes whose predicted loss, t gᵀδ + t²/2 δᵀHδ over
all kept examples, is within 10% of |linear| + |quadratic| of the measured one; and the power of t
with which the error falls. Half an hour on one core.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch

import hesscli
from hesscli.heap import keep_freed_memory
from hesscli.results import IhvpResult, Perturbation

SAMPLES = {"fashion": "fashion/model.pt", "text": "text/model.safetensors"}
FOLDER = Path(__file__).resolve().parents[2] / "samples"
WITHIN = 0.1


def main() -> None:
    """Measure the chosen samples and print their tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("samples", nargs="*", default=list(SAMPLES))
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    asked: list[Perturbation] = []
    for name in arguments.samples:
        problem = hesscli.load(FOLDER / SAMPLES[name], dtype="float64")
        result = hesscli.sensitivity(problem, rtol=1e-12, budget=None, verify=True)
        print(f"\n{name}: {result}")
        print("\n".join(table(result)), flush=True)
        asked += [c for layer in result.layers for c in layer.perturbations if wanted(c)]
    print(f"\n{line('all of these samples', asked)}")


def table(result: IhvpResult) -> Iterator[str]:
    """For each kind of change and scale, how many predictions hold, and the error's order."""
    changes = [(layer.name, change) for layer in result.layers for change in layer.perturbations]
    yield (
        f"{'change':<28}{'points':>7}"
        + "".join(f"{f'within at {s}':>18}" for s in ("1", "1/2", "1/4"))
        + f"{'median order':>14}"
    )
    asked = [c for _, c in changes if wanted(c)]
    for label in dict.fromkeys(named(c) for _, c in changes):
        yield line(label, [c for _, c in changes if named(c) == label])
    yield line("8, 6, 4 bits, 10% removed", asked)
    yield "\nof these, off at 1/4 (layer, change, error over |linear| + |quadratic|):"
    for layer, change in changes:
        if wanted(change) and relative_error(change, 2) > WITHIN:
            yield f"  {layer:<32}{named(change):<22}{relative_error(change, 2):.2f}"


def wanted(change: Perturbation) -> bool:
    """Whether it is small enough for a quadratic to be expected to hold at a quarter of it."""
    return change.level in ((8.0, 6.0, 4.0) if change.kind == "round" else (0.1,))


def named(change: Perturbation) -> str:
    """What a change is called."""
    if change.kind == "prune":
        return f"{change.level:.0%} removed"
    return f"{change.level:.0f} bits, a {change.granularity}"


def line(label: str, changes: list[Perturbation]) -> str:
    """One row of the table."""
    shares = [
        statistics.mean(relative_error(change, place) <= WITHIN for change in changes)
        for place in range(3)
    ]
    orders = [change.order for change in changes if change.order is not None]
    return (
        f"{label:<28}{len(changes):>7}"
        + "".join(f"{share:>18.0%}" for share in shares)
        + f"{statistics.median(orders) if orders else float('nan'):>14.2f}"
    )


def relative_error(change: Perturbation, place: int) -> float:
    """Of the prediction at one scale, over what its two terms are there."""
    scaled = change.changes[place]
    size = scaled.scale * abs(change.linear) + scaled.scale**2 * abs(change.quadratic)
    off = abs(scaled.measured - scaled.predicted)
    return off / size if size else (0.0 if off == 0 else float("inf"))


if __name__ == "__main__":
    main()
