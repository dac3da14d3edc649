"""``hesscli trace``: the trace of a curvature matrix, whole and by layer."""

from __future__ import annotations

from hesscli.cli import options
from hesscli.cli.usage import Usage

USAGE = Usage(
    help="""\
    Estimate the trace of the Hessian, whole and layer by layer, with error bars.

    Ctrl-C ends the run with the result so far; a second one quits at once.
    """,
    examples="""\
Examples:

  hesscli trace model.pt                       to 5%, or what ten minutes give
  hesscli trace model.pt --rtol 1% --budget 1h
  hesscli trace --layer 'conv*' --layer head   only these layers
  hesscli trace --layer                        every layer, in full detail
  hesscli trace --method hutchinson --probes 64
  hesscli trace --matrix ggn --out json --dir - > trace.json
""",
    options=(
        *options.PROBLEM,
        options.RTOL,
        options.ATOL,
        options.CONFIDENCE,
        options.BUDGET,
        options.PROBES,
        options.BATCHES,
        options.METHOD,
        *options.COMPUTE,
        options.LAYERS,
        *options.RESULT,
    ),
)
