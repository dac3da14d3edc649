"""What a product costs inside of other libraries' estimators, in plain gradients.

Each is called as its documentation says, between two passes of gradients over the same batches;
CPU times, one thread. What it does besides products (signs, QR) is in the price.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from curvlinops import hutchinson_diag, hutchinson_trace, hutchpp_trace, xdiag, xtrace
from hessian_eigenthings import HessianOperator, match_names, supervised_loss, trace
from peers import Curvlinops, HessianEigenthings, Peer, PyHessianBatches, PyHessianLoader, Task
from products import gradient, seconds
from pyhessian import hessian

PRODUCTS = 12
"""In a timed call: a multiple of what any of them splits its products into."""
NO_STOP = -math.inf
"""PyHessian ends when running means move by less than this."""


@dataclass(frozen=True)
class Price:
    """Gradients for each product: median and quartiles of the rounds, and their number."""

    median: float
    low: float
    high: float
    rounds: int


def batch_by_batch(peer: Peer, products: int) -> None:
    for batch in peer.task.batches:
        peer.task.model.zero_grad()
        term = hessian(peer.task.model, peer.task.criterion, data=batch, cuda=False)
        term.trace(maxIter=products, tol=NO_STOP)
    peer.task.model.zero_grad()


def layer_by_layer(peer: Peer, products: int) -> None:
    """As many products with each of an operator for each layer."""
    task = peer.task
    for layer in layers(task):
        operator = HessianOperator(
            task.model,
            task.batches,
            supervised_loss(task.criterion),
            param_filter=match_names(f"{layer}.weight", f"{layer}.bias"),
        )
        trace(operator, num_matvecs=products, method="hutchinson")


@dataclass(frozen=True)
class Call:
    """One of a library's functions, ``run(peer, products)``; or as many for each layer."""

    peer: type[Peer]
    run: Callable[[Any, int], object]
    products: int = PRODUCTS
    by_layer: bool = False

    def made(self, task: Task) -> int:
        """Products in all."""
        return self.products * (len(layers(task)) if self.by_layer else 1)


def layers(task: Task) -> list[str]:
    """Modules that own parameters."""
    names = [name for name, _ in task.model.named_parameters()]
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


CALLS = {
    "pyhessian": Call(PyHessianLoader, lambda p, m: p.library.trace(maxIter=m, tol=NO_STOP)),
    "pyhessian batches": Call(PyHessianBatches, batch_by_batch),
    "hutchinson_trace": Call(Curvlinops, lambda p, m: hutchinson_trace(p.operator, m)),
    "hutchpp_trace": Call(Curvlinops, lambda p, m: hutchpp_trace(p.operator, m)),
    "xtrace": Call(Curvlinops, lambda p, m: xtrace(p.operator, m)),
    "hutchinson_diag": Call(Curvlinops, lambda p, m: hutchinson_diag(p.operator, m)),
    "xdiag": Call(Curvlinops, lambda p, m: xdiag(p.operator, m)),
    "eigenthings hutchinson": Call(
        HessianEigenthings, lambda p, m: trace(p.operator, num_matvecs=m, method="hutchinson")
    ),
    "eigenthings hutch++": Call(HessianEigenthings, lambda p, m: trace(p.operator, num_matvecs=m)),
    "eigenthings layers": Call(HessianEigenthings, layer_by_layer, 1, by_layer=True),
}


def prices(task: Task, rounds: int) -> dict[str, Price]:
    """Of every call."""
    peers = {call.peer: call.peer(task) for call in CALLS.values()}
    ratios: dict[str, list[float]] = {name: [] for name in CALLS}
    before = seconds(partial(gradient, task))
    for _ in range(rounds):
        for name, call in CALLS.items():
            own = seconds(partial(call.run, peers[call.peer], call.products))
            after = seconds(partial(gradient, task))
            ratios[name].append(2 * own / (before + after) / call.made(task))
            before = after
    return {name: priced(values) for name, values in ratios.items()}


def priced(values: list[float]) -> Price:
    low, _, high = statistics.quantiles(values, n=4)
    return Price(statistics.median(values), low, high, len(values))
