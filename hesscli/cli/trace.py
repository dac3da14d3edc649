"""``hesscli trace``: the trace of a curvature matrix, whole and by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from hesscli.cli import options
from hesscli.cli.answer import (
    EVERY_LAYER,
    deliver,
    exit_code,
    load_problem,
    loudness,
    prepare_output,
    say_warnings,
    select_layers,
)
from hesscli.errors import ExitCode
from hesscli.results import TraceResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLES = """\
Examples:

  hesscli trace model.pt                       to 5%, or what ten minutes give
  hesscli trace model.pt --rtol 1% --budget 1h
  hesscli trace --layer 'conv*' --layer head   only these layers
  hesscli trace --layer                        every layer, in full detail
  hesscli trace --method hutchinson --probes 64
  hesscli trace --matrix ggn --out json --dir - > trace.json
"""


def trace(
    context: typer.Context,
    checkpoint: options.Checkpoint = None,
    spec: options.Spec = None,
    matrix: options.Matrix = "hessian",
    examples: options.Examples = "4096",
    weight_decay: options.WeightDecay = None,
    batch_size: options.BatchSize = None,
    trust: options.Trust = False,
    rtol: options.RelativeTolerance = None,
    atol: options.AbsoluteTolerance = None,
    confidence: options.Confidence = 0.95,
    budget: options.Budget = 600.0,
    probes: options.Probes = None,
    method: options.Method = "auto",
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    mode: options.Mode = "auto",
    layers: options.Layers = None,
    out: options.Out = "table",
    directory: options.Directory = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> ExitCode:
    """Estimate the trace of the Hessian, whole and layer by layer, with error bars.

    Ctrl-C ends the run with the result so far; a second one quits at once.
    """
    from hesscli.diagnostics.trace import trace as estimate
    from hesscli.render.tables.trace import trace_table

    console = loudness(context, quiet=quiet, verbose=verbose)
    with console.working() as observe:
        problem = load_problem(context, console, observe)
        shown = select_layers(layers or (), problem)
        folder = prepare_output(directory, problem.checkpoint)
        result = estimate(
            problem,
            matrix=matrix,
            rtol=options.relative_tolerance(rtol, atol),
            atol=atol,
            confidence=confidence,
            budget=budget,
            probes=probes,
            method=method,
            seed=seed,
            mode=mode,
            observe=observe,
        )
    say_warnings(console, problem, result.warnings)
    selected = result.only(shown)
    deliver(
        selected,
        console,
        out=out,
        folder=folder,
        table=lambda: trace_table(selected, full=EVERY_LAYER in (layers or ())),
        figures={"trace": lambda: draw(selected)},
    )
    return exit_code(result.status, asked=bool(rtol or atol))


def draw(result: TraceResult) -> Figure:
    """The picture; matplotlib is loaded only where one is wanted."""
    from hesscli.render.figures.trace import trace_figure

    return trace_figure(result)
