"""``hesscli check``: is the problem sound, and what will the other commands cost?"""

from __future__ import annotations

import typer

from hesscli.cli import options
from hesscli.cli.answer import deliver, load_problem, loudness, prepare_output, say_warnings
from hesscli.errors import ExitCode

EXAMPLES = """\
Examples:

  hesscli check model.pt
  hesscli check model.pt --examples all --rtol 1%
  hesscli check --window 2048              what would ihvp take with so many rows?
  hesscli check --out json --dir -
"""


def check(
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
    method: options.Method = "auto",
    window: options.Window = None,
    window_dtype: options.WindowDtype = "float32",
    window_file: options.WindowFile = None,
    blocks: options.Blocks = "auto",
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    mode: options.Mode = "auto",
    out: options.Out = "table",
    directory: options.Directory = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> ExitCode:
    """Check that checkpoint, spec and loss are sound, and plan what a run will take."""
    from hesscli.diagnostics.check import check as inspect
    from hesscli.diagnostics.window import WindowOptions
    from hesscli.render.tables.check import check_table

    console = loudness(context, quiet=quiet, verbose=verbose)
    with console.working() as observe:
        problem = load_problem(context, console, observe)
        folder = prepare_output(directory, problem.checkpoint)
        result = inspect(
            problem,
            matrix=matrix,
            rtol=rtol,
            atol=atol,
            confidence=confidence,
            budget=budget,
            method=method,
            window=WindowOptions(size=window, dtype=window_dtype, file=window_file, blocks=blocks),
            seed=seed,
            mode=mode,
            observe=observe,
        )
    say_warnings(console, problem, result.warnings)
    deliver(result, console, out=out, folder=folder, table=lambda: check_table(result))
    return ExitCode.OK
