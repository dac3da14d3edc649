"""``hesscli symmetry``: which transformations of the parameters the loss does not notice."""

from __future__ import annotations

from hesscli.cli import options
from hesscli.cli.usage import Usage

USAGE = Usage(
    help="""\
    Find symmetries of the loss, and test each: null directions, charges, and what breaks them.

    Ctrl-C ends the run with the result so far; a second one quits at once.
    """,
    examples="""\
Examples:

  hesscli symmetry model.pt                    families that hold, and those that do not
  hesscli symmetry early.pt late.pt            whose charges have drifted, and how far?
  hesscli symmetry early.pt late.pt --trained-with lr=0.1,wd=5e-4,updates=log.safetensors
  hesscli symmetry --layer                     every layer, in full detail
  hesscli symmetry --matrix ggn                whose null directions are so everywhere
  hesscli symmetry --params 'blocks.0.*'       all else stays as it is
  hesscli symmetry --out json --dir - > symmetry.json
""",
    options=(
        options.CHECKPOINT,
        options.LATER,
        *options.PROBLEM[1:],
        options.TRAINED_WITH,
        options.BUDGET,
        *options.COMPUTE,
        options.LAYERS,
        *options.RESULT,
    ),
)
