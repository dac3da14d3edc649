"""A command that hesscli does not have: the mean |gradient| by layer. One entry registers it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from rich.table import Table

from hesscli.cli import options
from hesscli.cli.usage import Usage
from hesscli.commands import Command
from hesscli.diagnostics.keeping import Kept
from hesscli.diagnostics.measurement import Pace, Work, drive
from hesscli.diagnostics.plans import Pilot
from hesscli.diagnostics.reporting import described
from hesscli.diagnostics.run import Clock, Run, started
from hesscli.problem.problem import Problem
from hesscli.results import Answer, Layer, MethodReport, Observe, Snapshot

_PARTS = {"usage": "USAGE", "result": "ToyResult"} | {n: n for n in ("measure", "plan", "table")}
TOY = Command(figures="toy:figures", **{part: f"toy:{name}" for part, name in _PARTS.items()})
USAGE = Usage(
    help="Find the mean size of each layer's gradient.",
    examples="Examples:\n\n  hesscli toy model.pt",
    options=(*options.PROBLEM, options.BUDGET, *options.COMPUTE, options.LAYERS, *options.RESULT),
)


@dataclass(frozen=True, kw_only=True)
class ToyLayer(Layer):
    """A layer's gradient."""

    size: float


@dataclass(frozen=True, kw_only=True)
class ToyResult(Answer):
    """The answer of ``hesscli toy``."""

    command: Literal["toy"] = "toy"
    layers: tuple[ToyLayer, ...]


class Gradients(Kept):
    """The mean gradient over the batches seen so far."""

    kept = ("total", "seen", "batches")

    def __init__(self, run: Run) -> None:
        self.run, self.total, self.seen, self.batches = run, 0.0, 0.0, 0

    ready = property(lambda self: self.seen > 0)

    def expected(self, pace: Pace) -> tuple[Work, ...]:
        return (Work(phase="taking gradients", spent=pace.gradient),)

    def steps(self) -> Iterator[Snapshot]:
        problem, parameters = self.run.problem, self.run.problem.parameters
        for batch in islice(problem.batches(), self.batches, None):
            parts = torch.autograd.grad(problem.evaluate(batch.data), parameters.tensors)
            self.total = self.total + batch.weight * parameters.flatten(parts)
            self.seen, self.batches = self.seen + batch.weight, self.batches + 1
            self.run.operator.meter.add(1.0, batch.weight)
            self.run.operator.meter.keep()
            yield Snapshot(phase="taking gradients", done=self.seen, total=1.0)


def plan(pilot: Pilot) -> tuple[Work, ...]:
    return Gradients(pilot.run).expected(pilot.pace)


def measure(
    problem: Problem, *, matrix: str, budget: float, seed: int, mode: str, observe: Observe, **kept
) -> ToyResult:
    with started(problem, matrix, mode, Clock(budget, observe), **kept) as run:
        found, parameters, layers = Gradients(run), problem.parameters, []
        status = drive(run.clock, found, run.ledger) or "exact"
        gradient = found.total / found.seen
        for name, place in zip(parameters.layers, parameters.layer_places(), strict=True):
            count, tensors = place.stop - place.start, described(parameters.in_layer(name))
            size = float(gradient[place].abs().mean())
            layers += [ToyLayer(name=name, num_parameters=count, parameters=tensors, size=size)]
        how = MethodReport(name="backward", seed=seed, mode=run.flight.mode, attention_kernel="own")
        return ToyResult(
            status=status, method=how, cost=run.cost(), layers=tuple(layers), **run.header()
        )


def table(result: ToyResult, full: bool = False) -> Table:
    rows = Table("layer", "mean |gradient|")
    for layer in result.layers:
        rows.add_row(layer.name, f"{layer.size:.3g}")
    return rows


def figures(result: ToyResult, asked: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    figure = Figure()
    figure.subplots().barh([x.name for x in result.layers], [x.size for x in result.layers])
    yield "toy", figure
