"""``hesscli spectrum``: the eigenvalues of a curvature matrix, the largest and all together."""

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
from hesscli.errors import ExitCode
from hesscli.results import SpectrumResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLES = """\
Examples:

  hesscli spectrum model.pt                    64 steps, then four short runs for error bars
  hesscli spectrum --rtol 1% --k 5 --probes 1  only the five largest eigenvalues, to 1%
  hesscli spectrum --layer                     a density for each layer's own block as well
  hesscli spectrum --matrix ggn --steps 128    and the condition number
  hesscli spectrum --exact                     a small model: all eigenvalues, drawn beneath
  hesscli spectrum --vectors --dir vectors     write the listed eigenvectors
"""


def spectrum(
    context: typer.Context,
    checkpoint: options.Checkpoint = None,
    spec: options.Spec = None,
    matrix: options.Matrix = "hessian",
    examples: options.Examples = "4096",
    weight_decay: options.WeightDecay = None,
    batch_size: options.BatchSize = None,
    trust: options.Trust = False,
    k: options.Eigenvalues = 10,
    rtol: options.EigenvalueTolerance = None,
    budget: options.Budget = 600.0,
    steps: options.Steps = None,
    probes: options.StartVectors = 5,
    bandwidth: options.Bandwidth = None,
    damping: options.RelativeDamping = 1e-3,
    exact: options.Exact = False,
    exact_limit: options.ExactLimit = 5000,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    mode: options.Mode = "auto",
    layers: options.Layers = None,
    vectors: options.Vectors = False,
    out: options.Out = "table",
    directory: options.Directory = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> ExitCode:
    """Find the largest and smallest eigenvalues of the Hessian, and the density of all of them.

    Every eigenvalue is given as θ ± r: one lies within r of θ. With --layer, the blocks of the
    chosen layers are explored too. -v also draws how the largest eigenvalues settled.
    """
    from hesscli.diagnostics.spectrum import spectrum as explore
    from hesscli.render.tables.spectrum import spectrum_table

    console = loudness(context, quiet=quiet, verbose=verbose)
    with console.working() as observe:
        problem = load_problem(context, console, observe)
        shown = select_layers(layers or (), problem)
        folder = prepare_output(directory, problem.checkpoint)
        result = explore(
            problem,
            matrix=matrix,
            k=k,
            steps=steps,
            probes=probes,
            rtol=rtol,
            bandwidth=bandwidth,
            damping=damping,
            layers=shown or (),
            vectors=vectors,
            exact=exact,
            exact_limit=exact_limit,
            budget=budget,
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
        table=lambda: spectrum_table(selected, full=EVERY_LAYER in (layers or ())),
        figures=_figures(selected, verbose=verbose),
        tensors={"spectrum_vectors": result.vectors} if vectors else {},
    )
    return exit_code(result.status, asked=bool(rtol))


def _figures(result: SpectrumResult, *, verbose: bool) -> dict[str, Callable[[], Figure]]:
    """The pictures; matplotlib is loaded only where one is drawn."""

    def density() -> Figure:
        from hesscli.render.figures.spectrum import density_figure

        return density_figure(result)

    def staircase() -> Figure:
        from hesscli.render.figures.spectrum import staircase_figure

        return staircase_figure(result)

    def participation() -> Figure:
        from hesscli.render.figures.spectrum import participation_figure

        return participation_figure(result)

    def convergence() -> Figure:
        from hesscli.render.figures.spectrum import convergence_figure

        return convergence_figure(result)

    drawn = {
        "spectrum": density,
        "spectrum_staircase": staircase,
        "spectrum_participation": participation,
    }
    return drawn | {"spectrum_convergence": convergence} if verbose else drawn
