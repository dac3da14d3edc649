"""``hesscli diag``: the diagonal of a curvature matrix, entry by entry."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from hesscli.cli import options
from hesscli.cli.usage import Given, Layers, Measure, Usage
from hesscli.errors import UsageError

if TYPE_CHECKING:
    from hesscli.problem.problem import Problem


def prepare(problem: Problem, asked: Given, _shown: Layers) -> Measure:
    """The diagonal, once it is known that what is to be mapped can be.

    Raises:
        UsageError: there is no such tensor, or it is a vector.
    """
    from hesscli.diagnostics.diag import diagonal

    asked = dict(asked)
    name = asked.pop("heatmap")
    mapped = [p.name for p in problem.parameters if p.tensor.dim() >= 2]
    if name is not None and name not in mapped:
        raise UsageError(
            "--heatmap needs a matrix or kernel tensor",
            repr(name),
            f"one of {', '.join(mapped[:5])} (of {len(mapped)})" if mapped else "none: no matrix",
        )
    return partial(diagonal, problem, **asked)


USAGE = Usage(
    help="""\
    Find the diagonal of the Hessian, and what AdaHessian's blocks keep of it.

    The entries go to diag.safetensors, their standard errors to diag_stderr.safetensors.
    """,
    examples="""\
Examples:

  hesscli diag model.pt                        every entry, or as well as ten minutes allow
  hesscli diag --layer                         every layer, in full detail
  hesscli diag --layer 'conv*' --block kernel  is AdaHessian's averaging safe there?
  hesscli diag --probes 32                     and how noisy would its probes be?
  hesscli diag --heatmap conv2.weight --dir maps
""",
    options=(
        *options.PROBLEM,
        options.RTOL_OF_DIAGONAL,
        options.ATOL,
        options.CONFIDENCE,
        options.BUDGET,
        options.PROBES,
        options.BATCHES,
        options.METHOD,
        options.BLOCK,
        *options.COMPUTE,
        options.LAYERS,
        options.HEATMAP,
        *options.RESULT,
    ),
    prepare=prepare,
)
