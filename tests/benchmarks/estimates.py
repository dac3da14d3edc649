"""What an estimate within 10, 3 and 1% of the truth costs: ours and other libraries'.

    pip install -e '.[bench]'
    python tests/benchmarks/estimates.py [sunspots fashion text] [--cache DIR]

Three quantities: the Hessian's trace, the traces of its layers (median over them of the relative
error) and its diagonal (relative error in L2). The cost is that of the smallest number of products
whose median error over runs is small enough, so of stopping by oracle; it is counted and measured
in plain gradients of the same loss over all data. The first run takes an hour a sample and keeps
its products in the cache; later ones measure prices and ours again. Numbers go to estimates.json,
tables to estimates.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import curves
import ours
import torch
import truths
from curves import QUANTITIES, Quantity, Signs
from methods import METHODS, Method
from ours import Cost
from peers import Task
from pool import Pool, Rows
from prices import Price, prices
from products import gradient, seconds
from reach import Reach, by_grid, by_rate
from report import facts, markdown
from torch.nn.attention import SDPBackend, sdpa_kernel
from truths import Truth

import hesscli
from hesscli.heap import keep_freed_memory

FOLDER = Path(__file__).resolve().parents[2] / "samples"


@dataclass(frozen=True)
class Sample:
    """A checkpoint, random signs in its pool, and first batches over which peers are timed."""

    checkpoint: str
    signs: int
    batches: int


SAMPLES = {
    "sunspots": Sample("sunspots/model.pt", signs=2048, batches=16),
    "fashion": Sample("fashion/model.pt", signs=256, batches=2),
    "text": Sample("text/model.safetensors", signs=256, batches=2),
}
WANTED = (0.10, 0.03, 0.01)

OurCosts = dict[Quantity, dict[float, Cost]]
Errors = dict[str, dict[Quantity, Any]]
"""By curve and quantity: errors after one product (a list) or by number of products."""


def main() -> None:
    """Measure the chosen samples, and write the record and the tables of all."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("samples", nargs="*", default=list(SAMPLES))
    parser.add_argument("--cache", type=Path, default=Path("hesscli-out/benchmarks"))
    parser.add_argument("--record", type=Path, default=here / "estimates.json")
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each peer")
    parser.add_argument("--limit", type=float, default=600, help="seconds for each of our calls")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")
    keep_freed_memory()  # as the command does
    torch.set_num_threads(1)
    record = json.loads(arguments.record.read_text()) if arguments.record.exists() else {}
    for sample in arguments.samples:
        with sdpa_kernel(SDPBackend.MATH):
            record[sample] = {**measure(sample, arguments), "machine": facts()}
        arguments.record.write_text(json.dumps(record, indent=1) + "\n")
    arguments.record.with_suffix(".md").write_text(markdown(record))


def measure(sample: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All of one sample's numbers."""
    problem = hesscli.load(FOLDER / SAMPLES[sample].checkpoint)
    pool, truth = known(sample, problem, arguments.cache)
    found = errors(pool, truth, arguments.cache / f"{sample}-errors.json")
    say(sample, "errors known")
    paid = prices(Task.of(problem, SAMPLES[sample].batches), arguments.rounds)
    gradient_seconds = min(seconds(partial(gradient, Task.of(problem))) for _ in range(3))
    say(sample, "peers timed")
    runs = our_runs(problem, truth, arguments.limit)
    own = {q: {x: ours.cost(runs[q], q, x) for x in WANTED} for q in QUANTITIES}
    say(sample, "ours measured")
    return {
        "parameters": problem.parameters.size,
        "layers": len(problem.layer_names),
        "gradient_seconds": gradient_seconds,
        "truth": {
            "how": truth.how,
            "trace": truth.trace,
            "layers": truth.layers.tolist(),
            "standard_errors": truth.errors.tolist(),
        },
        "prices": {name: asdict(price) for name, price in paid.items()},
        "ours": {
            q: {str(x): asdict(cost) for x, cost in costs.items()} for q, costs in own.items()
        },
        "our_errors": {
            q: {m: dict(ours.medians(several))[q] for m, several in runs[q].items()}
            for q in QUANTITIES
        },
        "peers": [
            {
                **asdict(method),
                "within": {
                    str(x): asdict(outlay(method, x, found, problem, paid, own)) for x in WANTED
                },
            }
            for method in METHODS
        ],
    }


def known(sample: str, problem: hesscli.Problem, cache: Path) -> tuple[Pool, Truth]:
    """Products and the truth, made now where the cache has none."""
    pool = Pool(problem, SAMPLES[sample].signs, cache / f"{sample}.pt")
    for line in pool.fill():
        say(sample, line)
    if pool.dense:
        return pool, truths.dense(pool)
    task, rows = Task.of(problem), Rows(cache / f"{sample}-truth.pt")
    if sample == "fashion":
        return pool, truths.piecewise_linear(task, pool.layer, rows)
    for line in truths.fill(task, rows):
        say(sample, line)
    return pool, truths.sampled(task, pool.layer, rows)


def errors(pool: Pool, truth: Truth, file: Path) -> Errors:
    """Of every curve."""
    if file.exists():
        found: Errors = json.loads(file.read_text())
        return found
    found = {
        name: {
            quantity: Signs(pool, truth, fresh=fresh).errors(quantity) for quantity in QUANTITIES
        }
        for name, fresh in (("signs", False), ("fresh", True))
    }
    found["each layer"] = {"layers": curves.each_layer(pool, truth)}
    found["hutchpp"] = curves.hutchpp(pool, truth)
    found["xtrace"] = curves.by_xtrace(pool, truth)
    found["xdiag"] = curves.by_xdiag(pool, truth)
    file.write_text(json.dumps(found))
    return errors(pool, truth, file)


@dataclass(frozen=True)
class Outlay:
    """Gradients by counted operations and by time, and what multiple of ours the latter is.

    Of ``timed`` and ``ratio`` the quartiles follow the value.
    """

    reach: Reach
    counted: float
    timed: tuple[float, float, float]
    ratio: tuple[float, float, float]


def outlay(
    method: Method,
    wanted: float,
    found: Errors,
    problem: hesscli.Problem,
    paid: dict[str, Price],
    own: OurCosts,
) -> Outlay:
    """One method's cost of coming within ``wanted``."""
    price, our_cost = paid[method.call], own[method.quantity][wanted]
    reach = reached(found[method.curve][method.quantity], wanted, problem, method)
    timed = reach.products * price.median, reach.low * price.low, reach.high * price.high
    ratio = timed[0] / our_cost.timed, timed[1] / our_cost.high, timed[2] / our_cost.low
    return Outlay(reach, method.counted(reach.products), timed, ratio)


def our_runs(problem: hesscli.Problem, truth: Truth, limit: float) -> dict[Quantity, ours.Runs]:
    """Those of ours that answer each question."""
    traces = ours.measure(ours.traces, problem, truth, min(WANTED), 8, limit)
    diagonals = ours.measure(ours.diagonal, problem, truth, min(WANTED), 3, limit)
    return {"trace": traces, "layers": traces, "diagonal": diagonals}


def reached(found: Any, wanted: float, problem: hesscli.Problem, method: Method) -> Reach:
    """Products until the error is small enough."""
    columns = problem.parameters.size
    if isinstance(found, dict):
        return by_grid({int(m): runs for m, runs in found.items()}, wanted, columns)
    unit = len(problem.layer_names) if method.by_layer else 1
    return by_rate(found, wanted, columns, unit)


def say(sample: str, line: str) -> None:
    print(f"{sample}: {line}, {time.process_time():.0f} s", flush=True)


if __name__ == "__main__":
    main()
