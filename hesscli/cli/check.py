"""``hesscli check``: is the problem sound, and what will the other commands cost?"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from hesscli.cli import options
from hesscli.cli.usage import Given, Layers, Measure, Usage

if TYPE_CHECKING:
    from hesscli.problem.problem import Problem


def prepare(problem: Problem, asked: Given, _shown: Layers) -> Measure:
    """The check, with the window that ``ihvp`` would be given."""
    from hesscli.cli.ihvp import with_window
    from hesscli.diagnostics.check import check

    return partial(check, problem, **with_window(asked))


USAGE = Usage(
    help="Check that checkpoint, spec and loss are sound, and plan what a run will take.",
    examples="""\
Examples:

  hesscli check model.pt
  hesscli check model.pt --examples all --rtol 1%
  hesscli check --window 2048              what would ihvp take with so many rows?
  hesscli check --symmetry                 do products respect the model's symmetries?
  hesscli check --out json --dir -
""",
    options=(
        *options.PROBLEM,
        options.RTOL_OF_PLANS,
        options.ATOL,
        options.CONFIDENCE,
        options.BUDGET,
        options.METHOD,
        options.WINDOW,
        options.WINDOW_DTYPE,
        options.WINDOW_FILE,
        options.BLOCKS,
        *options.COMPUTE,
        options.SYMMETRY,
        *options.OUTPUT,
    ),
    prepare=prepare,
)
