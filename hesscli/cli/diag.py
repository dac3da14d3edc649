"""``hesscli diag``: the diagonal of a curvature matrix, entry by entry."""

from __future__ import annotations

from collections.abc import Callable
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
from hesscli.errors import ExitCode, UsageError
from hesscli.results import DiagResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hesscli.problem.problem import Problem

EXAMPLES = """\
Examples:

  hesscli diag model.pt                        every entry, or as well as ten minutes allow
  hesscli diag --layer                         every layer, in full detail
  hesscli diag --layer 'conv*' --block kernel  is AdaHessian's averaging safe there?
  hesscli diag --probes 32                     and how noisy would its probes be?
  hesscli diag --heatmap conv2.weight --dir maps
"""


def diag(
    context: typer.Context,
    checkpoint: options.Checkpoint = None,
    spec: options.Spec = None,
    matrix: options.Matrix = "hessian",
    examples: options.Examples = "4096",
    weight_decay: options.WeightDecay = None,
    batch_size: options.BatchSize = None,
    trust: options.Trust = False,
    rtol: options.DiagonalTolerance = None,
    atol: options.AbsoluteTolerance = None,
    confidence: options.Confidence = 0.95,
    budget: options.Budget = 600.0,
    probes: options.Probes = None,
    method: options.Method = "auto",
    block: options.Block = "auto",
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    mode: options.Mode = "auto",
    layers: options.Layers = None,
    heatmap: options.HeatMap = None,
    out: options.Out = "table",
    directory: options.Directory = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> ExitCode:
    """Find the diagonal of the Hessian, and what AdaHessian's blocks keep of it.

    The entries go to diag.safetensors, their standard errors to diag_stderr.safetensors.
    """
    from hesscli.diagnostics.diag import diagonal
    from hesscli.render.tables.diag import diag_table

    console = loudness(context, quiet=quiet, verbose=verbose)
    with console.working() as observe:
        problem = load_problem(context, console, observe)
        shown = select_layers(layers or (), problem)
        _require_map(heatmap, problem)
        folder = prepare_output(directory, problem.checkpoint)
        result = diagonal(
            problem,
            matrix=matrix,
            rtol=options.relative_tolerance(rtol, atol, usual=0.1),
            atol=atol,
            confidence=confidence,
            budget=budget,
            probes=probes,
            block=block,
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
        table=lambda: diag_table(selected, full=EVERY_LAYER in (layers or ())),
        figures=_figures(selected, heatmap or _most_curved(selected)),
        tensors={"diag": result.entries, "diag_stderr": result.stderr},
    )
    return exit_code(result.status, asked=bool(rtol or atol))


def _require_map(name: str | None, problem: Problem) -> None:
    """Refuse a map of what is no matrix, before the long work.

    Raises:
        UsageError: there is no such tensor, or it is a vector.
    """
    mapped = [p.name for p in problem.parameters if p.tensor.dim() >= 2]
    if name is not None and name not in mapped:
        raise UsageError(
            "--heatmap needs a matrix or kernel tensor",
            repr(name),
            f"one of {', '.join(mapped[:5])} (of {len(mapped)})" if mapped else "none: no matrix",
        )


def _most_curved(result: DiagResult) -> str | None:
    """The selected layers' matrix or kernel tensor with the largest entry, if there is any."""
    names = [parameter.name for layer in result.layers for parameter in layer.parameters]
    mapped = {name: result.entries[name] for name in names if result.entries[name].ndim >= 2}
    return max(mapped, key=lambda name: abs(mapped[name]).max(), default=None)


def _figures(result: DiagResult, mapped: str | None) -> dict[str, Callable[[], Figure]]:
    """The pictures; matplotlib is loaded only where one is drawn."""

    def spectrum() -> Figure:
        from hesscli.render.figures.diag import diag_figure

        return diag_figure(result)

    def blocks() -> Figure:
        from hesscli.render.figures.diag import block_figure

        return block_figure(result)

    def heat() -> Figure:
        from hesscli.render.figures.canvas import provenance
        from hesscli.render.figures.heat_map import heat_map

        assert mapped is not None  # or it is not drawn
        return heat_map(mapped, result.entries[mapped], provenance(result))

    drawn = {"diag": spectrum}
    if any(layer.block.rule != "none" for layer in result.layers):
        drawn["diag_blocks"] = blocks
    if mapped is not None:
        drawn["diag_heatmap"] = heat
    return drawn
