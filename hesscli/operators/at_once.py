"""How many vectors go through a model at once: what memory lets, and what is faster on a device."""

from __future__ import annotations

import torch
from torch import Tensor

from hesscli.memory import is_out_of_memory, room_for_more
from hesscli.meter import FORWARD, now
from hesscli.operators.base import LiveTerm, Operator
from hesscli.operators.products import Apply
from hesscli.operators.trials import signs
from hesscli.problem.objective import WeightedBatch
from hesscli.problem.precision import tolerance
from hesscli.torch_private import storages_kept

_AROUND, _SIDE_BY_SIDE = 8, 5
"""Of what a loss keeps for its gradient, in forward mode: what a product takes in any case, and for
each vector. At four networks 4 to 8 times were measured, and 2.2 to 5.1."""
_ROUNDS = 2
"""Of which the faster counts; one more goes before them, that kernels are chosen in."""
_BUSY = 0.05
"""Seconds from which on a product does not wait for its kernels: starting all those of a hundred
layers takes less."""


def vectors_at_once(operator: Operator) -> int | None:
    """How many of a block go through the model side by side; None where they go one by one.

    In forward mode as many as have room, and at least one, whatever it takes: it is not known that
    well. Passes back go one by one on a CPU, where they take as long side by side. On a device a
    small network waits for its kernels to be started, as often for one vector as for many: both
    ways are measured on the largest batch, and the faster one is taken where both agree.
    """
    if operator.mode == "forward-over-reverse":
        return _that_fit(operator)
    waits = operator.mode == "double-backward" and operator.device.type == "cuda"
    if waits and operator.block_size > 1 and not operator.problem.blocks:
        return _that_are_faster(operator, operator.block_size)
    return None


def _largest_batch(operator: Operator) -> WeightedBatch:
    groups = operator.problem.joint()
    largest = max(groups, key=lambda group: sum(operator.counts[i] for i in group))
    return operator.problem.batch(*largest)


def _that_fit(operator: Operator) -> int:
    batch = _largest_batch(operator)
    kept = dict[int, int]()
    with storages_kept(kept):
        operator.problem.evaluate(batch.data)
    operator.meter.add(FORWARD, operator.problem.share_of(batch.count))
    held = max(1, sum(kept.values()))
    room = room_for_more(operator.device) - _AROUND * held
    return max(1, min(operator.block_size, room // (_SIDE_BY_SIDE * held)))


def _that_are_faster(operator: Operator, most: int) -> int | None:
    """Of vectors side by side, as many as memory lets; None where they are slower, or not equal."""
    problem, batch = operator.problem, _largest_batch(operator)
    term = LiveTerm(batch, operator)
    block = torch.stack([signs(problem, number, operator.parameters) for number in range(most)])
    alone, one = _seconds(term.apply, block[:1])
    if alone > _BUSY:
        return None
    del term  # and its graph
    with problem.forward_context():
        found = _as_memory_lets(operator.live(batch, side_by_side=True), block)
    if found is None:
        return None
    together, products = found
    graph, product = operator.cost
    share = problem.share_of(batch.count)
    operator.meter.add(graph + (1 + _ROUNDS) * len(products) * product, share)
    apart = (products[0] - one[0]).norm() / one[0].norm().clamp_min(1e-300)
    agree = float(apart) <= tolerance(operator.dtype)
    return len(products) if agree and together < len(products) * alone else None


def _as_memory_lets(apply: Apply, block: Tensor) -> tuple[float, Tensor] | None:
    """What half, a quarter … of a block takes, where all of it does not fit, and its products.

    None where it comes down to a single vector, or not every operation goes side by side.
    """
    while len(block) > 1:
        try:
            return _seconds(apply, block)
        except Exception as error:  # of any kind, as vmap has no words of its own for it
            if not is_out_of_memory(error):
                return None
        torch.cuda.empty_cache()
        block = block[: len(block) // 2]
    return None


def _seconds(apply: Apply, block: Tensor) -> tuple[float, Tensor]:
    """What products take, and the products."""
    products, times = apply(block), []
    for _ in range(_ROUNDS):
        began = now(block.device)
        products = apply(block)
        times.append(now(block.device) - began)
    return min(times), products
