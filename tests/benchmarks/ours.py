"""What hesscli pays for the same estimates: whole calls, with preflight and all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, cast

import numpy as np
import torch
from curves import Quantity
from peers import Task
from products import gradient, seconds
from reach import How, crossing
from truths import Truth

import hesscli

PROBES = tuple(2**k for k in range(1, 10))
LOOSE = 0.5
"""A tolerance at which what is not exact ends at once."""


@dataclass(frozen=True)
class Answer:
    """An estimate's errors, and the gradients that it took by the program's own count.

    ``noise`` is the part of them that falls with the root of the number of probes. Shrinkage takes
    most of it out of a diagonal's errors while there is much of it, and nothing in the end.
    """

    errors: dict[Quantity, float]
    noise: dict[Quantity, float]
    gradients: float
    exact: bool


@dataclass(frozen=True)
class Run:
    """An answer and its time in gradients."""

    answer: Answer
    time: float


Ask = Callable[..., Answer]
Runs = dict[int, list[Run]]
"""By number of probes."""


@dataclass(frozen=True)
class Cost:
    """Gradients, counted and by time with quartiles of the runs, and how that was found."""

    counted: float
    timed: float
    low: float
    high: float
    how: How


def traces(problem: hesscli.Problem, truth: Truth, **options: Any) -> Answer:
    """The trace and those of the layers."""
    result = hesscli.trace(problem, budget=None, **options)
    layers = torch.tensor([layer.estimate for layer in result.layers], dtype=torch.float64)
    errors: dict[Quantity, float] = {
        "trace": truth.trace_error(result.trace.estimate),
        "layers": truth.layers_error(layers),
    }
    return Answer(errors, errors, result.cost.gradients, result.status == "exact")


def diagonal(problem: hesscli.Problem, truth: Truth, **options: Any) -> Answer:
    """The diagonal."""
    result = hesscli.diagonal(problem, budget=None, **options)
    estimate = np.concatenate([part.ravel() for part in result.entries.values()])
    error = truth.diagonal_error(torch.from_numpy(estimate).double())
    return Answer(
        {"diagonal": error},
        {"diagonal": result.diagonal.relative_error or 0.0},
        result.cost.gradients,
        result.status == "exact",
    )


def measure(
    ask: Ask, problem: hesscli.Problem, truth: Truth, wanted: float, runs: int, limit: float
) -> Runs:
    """Ask with more and more probes until all errors are small enough or time is up.

    Args:
        ask: one of this module's functions.
        problem: to ask about.
        truth: to compare with.
        wanted: median error to come to.
        runs: at each number of probes, each with a seed of its own.
        limit: CPU seconds for the whole of it.
    """
    timed = Stopwatch(Task.of(problem))
    first = [timed(partial(ask, problem, truth, rtol=LOOSE)) for _ in range(runs)]
    if first[0].answer.exact:
        return {0: first}
    found: Runs = {}
    for probes in PROBES:
        found[probes] = []
        for seed in range(runs):
            found[probes].append(timed(partial(ask, problem, truth, probes=probes, seed=seed)))
            if timed.total > limit:
                return found
        if all(error <= wanted for _, error in medians(found[probes])):
            break
    return found


def medians(runs: list[Run]) -> Iterator[tuple[Quantity, float]]:
    """Of each error."""
    for quantity in runs[0].answer.errors:
        yield quantity, median(run.answer.errors[quantity] for run in runs)


class Stopwatch:
    """Times calls between passes of gradients over all data."""

    def __init__(self, task: Task) -> None:
        self.gradient = partial(gradient, task)
        self.before, self.total = seconds(self.gradient), 0.0

    def __call__(self, ask: Callable[[], Answer]) -> Run:
        answers: list[Answer] = []
        own = seconds(lambda: answers.append(ask()))
        after = seconds(self.gradient)
        time = 2 * own / (self.before + after)
        self.before, self.total = after, self.total + own
        return Run(answers[0], time)


def cost(runs: Runs, quantity: Quantity, wanted: float) -> Cost:
    """Of coming within ``wanted``; each number of probes has a median error and a cost."""
    errors = {m: [r.answer.errors[quantity] for r in several] for m, several in runs.items()}
    counted = {m: median(r.answer.gradients for r in several) for m, several in runs.items()}
    last, how = max(runs), cast(How, "exact" if 0 in runs else "measured")
    probes = 0.0 if how == "exact" else crossing(errors, wanted)
    if probes > last:
        noise = median(run.answer.noise[quantity] for run in runs[last])
        probes, how = last * (noise / wanted) ** 2, "extrapolated"
    middle, low, high = (
        line(
            {m: float(np.quantile([r.time for r in several], q)) for m, several in runs.items()},
            probes,
        )
        for q in (0.5, 0.25, 0.75)
    )
    return Cost(line(counted, probes), middle, low, high, how)


def line(values: dict[int, float], at: float) -> float:
    """Straight between points, and on from the last two of them."""
    points = sorted(values.items())
    if len(points) == 1:
        return points[0][1]
    after = next((i for i, (m, _) in enumerate(points) if m >= at), len(points) - 1)
    (m0, v0), (m1, v1) = points[max(after, 1) - 1], points[max(after, 1)]
    return v0 + (v1 - v0) * (at - m0) / (m1 - m0)
