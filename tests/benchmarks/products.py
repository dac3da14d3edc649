"""What a block of Hessian products costs, in plain gradients: ours and other libraries'.

    pip install -e '.[bench]'
    python tests/benchmarks/products.py [fashion text] [--rounds 15] [--peer-rounds 5]

That is a quarter of an hour a sample; ``--batches 2`` takes two minutes for a first look.

Everyone multiplies the Hessian of the same loss, over the same frozen batches, with the same 8
vectors, in float32 on one thread, with the math attention kernel. Times are CPU times of full
passes; each is divided by the mean of the two passes of plain gradients that it stands between,
so that a machine that slows down or is shared slows both. Before it is timed, each answer is
compared with a float64 product that uses nothing but torch.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError
from itertools import islice
from pathlib import Path

import torch
from peers import PEERS, Task, flatten
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import hesscli
from hesscli.heap import keep_freed_memory
from hesscli.operators.base import LiveTerm
from hesscli.operators.hessian import Hessian

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
CHECKPOINTS = {"fashion": "model.pt", "text": "model.safetensors"}
BLOCK = 8
LIMIT = 1.25 * (3 + 2 * (BLOCK - 1))
"""Gradients: a first product takes 3 by counted operations and each further one 2."""
PEER_LIMIT = 1.1
"""Times the cheapest peer."""
TOLERANCE = 1e-4
"""Relative; float32 products of these models are within 2e-6 of float64."""

Block = Callable[[Tensor], Tensor]


@dataclass
class Row:
    """A contestant and what became of it."""

    title: str
    block: Block
    rounds: int
    ratios: list[float] = field(default_factory=list)
    error: float = float("nan")
    failure: str | None = None

    @property
    def median(self) -> float:
        """Gradients a block."""
        return statistics.median(self.ratios)


class FirstBatches(Hessian):
    """The part of the Hessian that the first batches contribute."""

    count: int | None = None

    def batches(self, among: Sequence[int] | None = None) -> Iterator[LiveTerm]:
        """The first ``count`` terms; None means all."""
        return islice(super().batches(among), self.count)


def main() -> None:
    """Measure the chosen samples and print a table for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("samples", nargs="*", default=list(CHECKPOINTS), help="fashion, text")
    parser.add_argument("--rounds", type=int, default=15, help="passes of ours")
    parser.add_argument("--peer-rounds", type=int, default=5, help="passes of each peer")
    parser.add_argument("--batches", type=int, default=None, help="only the first so many")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")
    keep_freed_memory()  # as the command does
    torch.set_num_threads(1)
    console = Console()
    for sample in arguments.samples:
        problem = hesscli.load(SAMPLES / sample / CHECKPOINTS[sample])
        with sdpa_kernel(SDPBackend.MATH):
            rows = run(problem, arguments.batches, arguments.rounds, arguments.peer_rounds)
        console.print(table(sample, problem, arguments.batches, rows))
        console.print(*verdicts(rows), sep="\n", end="\n\n")


def run(problem: hesscli.Problem, batches: int | None, rounds: int, peer_rounds: int) -> list[Row]:
    """Check, then time all contestants in turn; ours is the first."""
    task = Task.of(problem, batches)
    operator = FirstBatches(problem)
    operator.count = batches
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(BLOCK, problem.parameters.size, generator=generator)
    share = len(task.batches) / problem.num_batches
    rows = [Row(f"hesscli {hesscli.__version__}", lambda v: operator.apply(v) / share, rounds)]
    rows += list(peer_rows(task, peer_rounds))
    check(rows, vectors, product(task, vectors.sum(0)))
    measure(rows, vectors, lambda: gradient(task))
    return rows


def peer_rows(task: Task, rounds: int) -> Iterator[Row]:
    """A row for each peer; one that is not installed or does not start says so."""
    for peer in PEERS:
        try:
            yield Row(peer.title(), peer(task).block, rounds)
        except PackageNotFoundError:
            title = f"{peer.distribution}, {peer.call}"
            yield Row(title, torch.clone, 0, failure="not installed: pip install -e '.[bench]'")
        except Exception as error:
            yield Row(peer.title(), torch.clone, 0, failure=reason(error))


def check(rows: list[Row], vectors: Tensor, truth: Tensor) -> None:
    """Relative error of each; by linearity the rows' sum answers for all of them."""
    for row in rows:
        if row.failure is None:
            try:
                answer = row.block(vectors).sum(0).double()
                row.error = float((answer - truth).norm() / truth.norm())
            except Exception as error:  # a peer may fail in any way; its row says which
                row.failure = reason(error)


def measure(rows: list[Row], vectors: Tensor, gradient: Callable[[], None]) -> None:
    """Time each contestant between two passes of gradients, round by round."""
    before = seconds(gradient)
    for turn in range(max(row.rounds for row in rows)):
        for row in rows:
            if row.failure is None and turn < row.rounds:
                own = seconds(partial(row.block, vectors))
                after = seconds(gradient)
                row.ratios.append(2 * own / (before + after))
                before = after


def seconds(run: Callable[[], object]) -> float:
    """CPU time of a call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def gradient(task: Task) -> None:
    """One plain gradient of the whole loss."""
    total = torch.zeros(sum(p.numel() for p in task.parameters))
    for batch in task.batches:
        total += flatten(list(torch.autograd.grad(task.loss(batch), task.parameters)))


def product(task: Task, vector: Tensor) -> Tensor:
    """Hv in float64 by differentiating the gradient twice, with nothing shared or reused."""
    task = Task(task.model.double(), task.criterion, task.batches)
    total = torch.zeros_like(vector, dtype=torch.float64)
    for batch in task.batches:
        slope = torch.autograd.grad(task.loss(batch), task.parameters, create_graph=True)
        directional = flatten(list(slope)) @ vector.double()
        total += flatten(list(torch.autograd.grad(directional, task.parameters)))
    task.model.float()
    return total / len(task.batches)


def reason(error: Exception) -> str:
    """The first line of what went wrong."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def table(sample: str, problem: hesscli.Problem, batches: int | None, rows: list[Row]) -> Table:
    """Gradients a block, their spread, and the answer's error."""
    used = f"{problem.num_batches if batches is None else batches} of {problem.num_batches}"
    grid = Table(
        title=f"{BLOCK} Hessian products, samples/{sample}: d = {problem.parameters.size}, "
        f"{used} batches of {problem.data.counts[0]}, float32, 1 thread, "
        f"torch {torch.__version__}, Python {platform.python_version()}",
    )
    for heading in ("", "gradients", "quartiles", "passes", "relative error", ""):
        grid.add_column(heading, justify="left" if not heading else "right")
    for row in rows:
        if row.failure is not None:
            grid.add_row(row.title, "–", "–", "0", "–", escape(row.failure))
            continue
        low, high = torch.tensor(row.ratios).quantile(torch.tensor([0.25, 0.75])).tolist()
        wrong = "" if row.error <= TOLERANCE else "wrong value"
        grid.add_row(
            row.title,
            f"{row.median:.2f}",
            f"{low:.2f} – {high:.2f}",
            str(len(row.ratios)),
            f"{row.error:.1e}",
            wrong,
        )
    return grid


def verdicts(rows: list[Row]) -> Iterator[str]:
    """The two limits that ours has to stay within."""
    ours, *others = rows
    yield f"at most {LIMIT:.2f} gradients: {ours.median:.2f}, {word(ours.median <= LIMIT)}"
    timed = [row for row in others if row.ratios]
    if timed:
        best = min(timed, key=lambda row: row.median)
        share = ours.median / best.median
        yield (
            f"at most {PEER_LIMIT} × the cheapest peer ({best.title}): "
            f"{share:.2f}, {word(share <= PEER_LIMIT)}"
        )


def word(met: bool) -> str:
    """How a limit was taken."""
    return "met" if met else "MISSED"


if __name__ == "__main__":
    main()
