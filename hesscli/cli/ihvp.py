"""``hesscli ihvp``: inverse-Hessian-vector products, and the sensitivity that they show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
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
from hesscli.cli.reading import DampingValue
from hesscli.errors import ExitCode
from hesscli.results import IhvpResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from hesscli.problem.problem import Problem

GRADIENT = "gradient"
USUAL_DAMPING = DampingValue(1e-3)
EXAMPLES = """\
Examples:

  hesscli ihvp model.pt                        which weights and layers matter, and how sure?
  hesscli ihvp --verify                        and are the predicted loss changes true?
  hesscli ihvp --layer 'conv*' --out json
  hesscli ihvp --window 1024 --damping 1e-2 --rows example
  hesscli ihvp --vector gradient --refine 1e-3 a damped Newton direction
"""


def ihvp(
    context: typer.Context,
    checkpoint: options.Checkpoint = None,
    spec: options.Spec = None,
    matrix: options.Matrix = "hessian",
    examples: options.Examples = "4096",
    weight_decay: options.WeightDecay = None,
    batch_size: options.BatchSize = None,
    trust: options.Trust = False,
    rows: options.Rows = "auto",
    window: options.Window = None,
    window_dtype: options.WindowDtype = "float32",
    window_file: options.WindowFile = None,
    blocks: options.Blocks = "auto",
    damping: options.Damping = USUAL_DAMPING,
    rtol: options.PredictionTolerance = None,
    verify: options.Verify = False,
    budget: options.Budget = 600.0,
    vector: options.Vector = None,
    refine: options.Refine = None,
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
    """Find which weights and layers matter, and what pruning or rounding them does to the loss.

    Saliencies go to saliency.safetensors, a direction solved for to ihvp.safetensors.
    """
    from hesscli.diagnostics.ihvp import ihvp as solve
    from hesscli.diagnostics.ihvp import sensitivity
    from hesscli.diagnostics.window import WindowOptions
    from hesscli.render.tables.ihvp import ihvp_table

    console = loudness(context, quiet=quiet, verbose=verbose)
    with console.working() as observe:
        problem = load_problem(context, console, observe)
        shown = select_layers(layers or (), problem)
        right = _vector(vector, problem)
        folder = prepare_output(directory, problem.checkpoint)
        chosen = WindowOptions(
            rows, window, window_dtype, window_file, blocks, damping.value, damping.absolute
        )
        if vector is None:
            result = sensitivity(
                problem,
                matrix=matrix,
                window=chosen,
                rtol=rtol or 0.2,
                budget=budget,
                refine=refine,
                verify=verify,
                seed=seed,
                mode=mode,
                observe=observe,
            )
        else:
            result = solve(
                problem,
                right,
                matrix=matrix,
                window=chosen,
                budget=budget,
                refine=refine,
                seed=seed,
                mode=mode,
                source=vector,
                observe=observe,
            )
    say_warnings(console, problem, result.warnings)
    selected = result.only(shown)
    deliver(
        selected,
        console,
        out=out,
        folder=folder,
        table=lambda: ihvp_table(selected, full=EVERY_LAYER in (layers or ())),
        figures=_figures(selected),
        tensors={"saliency": result.saliency} if vector is None else {"ihvp": result.direction},
    )
    return exit_code(result.status, asked=bool(rtol or refine))


def _vector(name: str | None, problem: Problem) -> Tensor | None:
    """What to solve for; None for the gradient.

    Raises:
        InputError: a file that does not hold one tensor for each parameter.
    """
    from hesscli.problem.checkpoint import load_vector

    if name is None or name == GRADIENT:
        return None
    return load_vector(Path(name), problem.parameters)


def _figures(result: IhvpResult) -> dict[str, Callable[[], Figure]]:
    """The pictures that there is something to draw in; matplotlib is loaded only then."""

    def sensitivities() -> Figure:
        from hesscli.render.figures.ihvp import sensitivity_figure

        return sensitivity_figure(result)

    def distribution() -> Figure:
        from hesscli.render.figures.ihvp import saliency_figure

        return saliency_figure(result)

    def calibration() -> Figure:
        from hesscli.render.figures.ihvp_checks import calibration_figure

        return calibration_figure(result)

    def dampings() -> Figure:
        from hesscli.render.figures.ihvp_checks import sweep_figure

        return sweep_figure(result)

    changes = [change for layer in result.layers for change in layer.perturbations]
    drawn: dict[str, Callable[[], Figure]] = {}
    if changes:
        drawn["ihvp"] = sensitivities
    if result.layers:
        drawn["ihvp_saliency"] = distribution
    if any(change.measured is not None for change in changes):
        drawn["ihvp_calibration"] = calibration
    if result.sweep:
        drawn["ihvp_damping"] = dampings
    return drawn
