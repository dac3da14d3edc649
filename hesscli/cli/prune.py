"""``hesscli prune``: a checkpoint with fewer weights, and what that does to the loss."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from hesscli.cli import options
from hesscli.cli.usage import Given, Layers, Measure, Usage

if TYPE_CHECKING:
    from hesscli.problem.problem import Problem


def prepare(problem: Problem, asked: Given, _shown: Layers) -> Measure:
    """The pruning, with its window."""
    from hesscli.cli.ihvp import with_window
    from hesscli.diagnostics.prune import prune

    return partial(prune, problem, **with_window(asked))


def copies(problem: Problem) -> list[str]:
    """What the pruned checkpoint's files will be called."""
    from hesscli.problem.rewriting import names_of_copies

    return names_of_copies(problem.origin, "prune")


USAGE = Usage(
    help="""\
    Prune weights by M-FAC, and compare with magnitude and diagonal Fisher pruning.

    Those of the least saliency go and the others make up for it. A checkpoint like CHECKPOINT, with
    these weights, goes to the run's folder. Biases, gains and other vectors stay as they are.
    """,
    examples="""\
Examples:

  hesscli prune model.pt --sparsity 90%            nine of ten weights, at once
  hesscli prune model.pt --sparsity 90% --steps 16 the same with a new window at each step
  hesscli prune model.pt --pattern 2:4             two of each four, as sparse tensor cores want
  hesscli prune --pattern 1x4 --sparsity 75%       blocks of one output by four inputs
  hesscli prune --per-layer --params 'blocks.*'    half of each layer of these
  hesscli prune --damping 1e-1 --blocks 64 --examples all
  hesscli prune --out json --dir pruned > prune.json
""",
    options=(
        *options.PROBLEM_OF_PRUNING,
        options.SPARSITY,
        options.PATTERN,
        options.PRUNING_STEPS,
        options.PER_LAYER,
        options.ROWS,
        options.WINDOW,
        options.WINDOW_DTYPE,
        options.WINDOW_FILE,
        options.BLOCKS,
        options.DAMPING_OF_PRUNING,
        options.BUDGET,
        *options.COMPUTE,
        options.LAYERS,
        *options.RESULT,
    ),
    prepare=prepare,
    copies=copies,
)
