"""A command that hesscli does not have: the mean |gradient| by layer. One entry registers it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from rich.table import Table

from hesscli.cli import options
from hesscli.cli.usage import Usage
from hesscli.commands import Command
from hesscli.diagnostics.reporting import described
from hesscli.diagnostics.run import environment
from hesscli.problem.problem import Problem
from hesscli.results import Answer, Cost, Layer, MethodReport, Observe, Snapshot

TOY = Command(
    usage="toy:USAGE",
    result="toy:ToyResult",
    measure="toy:measure",
    table="toy:table",
    figures="toy:figures",
)
USAGE = Usage(
    help="Find the mean size of each layer's gradient.",
    examples="Examples:\n\n  hesscli toy model.pt",
    options=(*options.PROBLEM, options.BUDGET, *options.COMPUTE, options.LAYERS, *options.OUTPUT),
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


def measure(
    problem: Problem, *, matrix: str, budget: float, seed: int, mode: str, observe: Observe
) -> ToyResult:
    began, total, seen, status = time.monotonic(), 0.0, 0.0, "exact"
    parameters = problem.parameters
    try:
        for batch in problem.batches():
            parts = torch.autograd.grad(problem.evaluate(batch.data), parameters.tensors)
            total, seen = total + batch.weight * parameters.flatten(parts), seen + batch.weight
            observe(Snapshot(phase="taking gradients", done=seen, total=1.0))
            if time.monotonic() - began > budget:
                status = "budget"
                break
    except KeyboardInterrupt:
        status = "interrupted"
    sizes = [float((total / seen)[place].abs().mean()) for place in parameters.layer_places()]
    layers = []
    for name, size in zip(parameters.layers, sizes, strict=True):
        owned, count = parameters.in_layer(name), sum(p.numel for p in parameters.in_layer(name))
        tensors = described(owned)
        layers += [ToyLayer(name=name, num_parameters=count, parameters=tensors, size=size)]
    return ToyResult(
        status=status,
        problem=problem.report(matrix),
        method=MethodReport(name="backward", seed=seed, mode=mode, attention_kernel="own"),
        cost=Cost(products=0, gradients=seen, seconds=time.monotonic() - began, peak_bytes=0),
        layers=tuple(layers),
        environment=environment(problem.device),
        warnings=problem.warnings,
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
