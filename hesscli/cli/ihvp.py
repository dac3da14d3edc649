"""``hesscli ihvp``: inverse-Hessian-vector products, and the sensitivity that they show."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hesscli.cli import options
from hesscli.cli.usage import Given, Layers, Measure, Usage

if TYPE_CHECKING:
    from hesscli.problem.problem import Problem

GRADIENT = "gradient"
_OF_WINDOW = {
    "rows": "rows",
    "window": "size",
    "window_dtype": "dtype",
    "window_file": "file",
    "blocks": "blocks",
}


def prepare(problem: Problem, asked: Given, _shown: Layers) -> Measure:
    """The study of a network's sensitivity, or with a vector given no more than its solve.

    Raises:
        InputError: a file that does not hold one tensor for each parameter.
    """
    from hesscli.diagnostics.ihvp import ihvp, sensitivity
    from hesscli.problem.checkpoint import load_vector

    asked = with_window(asked)
    name = asked.pop("vector")
    if name is None:
        return partial(sensitivity, problem, **asked)
    del asked["rtol"], asked["verify"]
    vector = None if name == GRADIENT else load_vector(Path(name), problem.parameters)
    return partial(ihvp, problem, vector, source=name, **asked)


def with_window(asked: Given) -> dict[str, Any]:
    """What is asked, with all that is of the window in its own options."""
    from hesscli.diagnostics.window import WindowOptions

    rest = dict(asked)
    own = {field: rest.pop(name) for name, field in _OF_WINDOW.items() if name in rest}
    if "damping" in rest:
        own["damping"], own["absolute"] = rest.pop("damping")
    return rest | {"window": WindowOptions(**own)}


USAGE = Usage(
    help="""\
    Find which weights and layers matter, and what pruning or rounding them does to the loss.

    Saliencies go to saliency.safetensors, a direction solved for to ihvp.safetensors.
    """,
    examples="""\
Examples:

  hesscli ihvp model.pt                        which weights and layers matter, and how sure?
  hesscli ihvp --verify                        and are the predicted loss changes true?
  hesscli ihvp --layer 'conv*' --out json
  hesscli ihvp --window 1024 --damping 1e-2 --rows example
  hesscli ihvp --vector gradient --refine 1e-3 a damped Newton direction
""",
    options=(
        *options.PROBLEM,
        options.ROWS,
        options.WINDOW,
        options.WINDOW_DTYPE,
        options.WINDOW_FILE,
        options.BLOCKS,
        options.DAMPING,
        options.RTOL_OF_CHANGES,
        options.VERIFY,
        options.BUDGET,
        options.VECTOR,
        options.REFINE,
        *options.COMPUTE,
        options.LAYERS,
        *options.RESULT,
    ),
    prepare=prepare,
)
