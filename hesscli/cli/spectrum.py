"""``hesscli spectrum``: the eigenvalues of a curvature matrix, the largest and all together."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from hesscli.cli import options
from hesscli.cli.usage import Given, Layers, Measure, Usage

if TYPE_CHECKING:
    from hesscli.problem.problem import Problem


def prepare(problem: Problem, asked: Given, shown: Layers) -> Measure:
    """The spectrum, with those of the blocks of chosen layers."""
    from hesscli.diagnostics.spectrum import spectrum

    return partial(spectrum, problem, layers=shown or (), **asked)


USAGE = Usage(
    help="""\
    Find the largest and smallest eigenvalues of the Hessian, and the density of all of them.

    Every eigenvalue is given as θ ± r: one lies within r of θ. With --layer, the blocks of the
    chosen layers are explored too. -v also draws how the largest eigenvalues settled.
    """,
    examples="""\
Examples:

  hesscli spectrum model.pt                    64 steps, then four short runs for error bars
  hesscli spectrum --rtol 1% --k 5 --probes 1  only the five largest eigenvalues, to 1%
  hesscli spectrum --layer                     a density for each layer's own block as well
  hesscli spectrum --matrix ggn --steps 128    and the condition number
  hesscli spectrum --exact                     a small model: all eigenvalues, drawn beneath
  hesscli spectrum --vectors --dir vectors     write the listed eigenvectors
""",
    options=(
        *options.PROBLEM,
        options.EIGENVALUES,
        options.RTOL_OF_EIGENVALUES,
        options.BUDGET,
        options.STEPS,
        options.START_VECTORS,
        options.BANDWIDTH,
        options.RELATIVE_DAMPING,
        options.EXACT,
        options.EXACT_LIMIT,
        *options.COMPUTE,
        options.LAYERS,
        options.VECTORS,
        *options.RESULT,
    ),
    prepare=prepare,
)
