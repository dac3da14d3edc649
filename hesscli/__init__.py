"""hesscli: a curvature microscope for trained PyTorch networks.

Names are resolved on first use, so that ``import hesscli`` is fast and loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version as _version
from typing import Any

from hesscli.commands import COMMANDS

__version__ = _version("hesscli")

_HOMES = {
    "Problem": "hesscli.problem.problem",
    "load": "hesscli.problem.loading",
    "read": "hesscli.results.saved",
    "Hessian": "hesscli.operators.hessian",
    "GaussNewton": "hesscli.operators.gauss_newton",
    "Fisher": "hesscli.operators.gauss_newton",
    "EmpiricalFisher": "hesscli.operators.gauss_newton",
    "ihvp": "hesscli.diagnostics.ihvp",
    "WindowOptions": "hesscli.diagnostics.window",
}
_HOMES |= {
    function: module
    for module, _, function in (command.measure.partition(":") for command in COMMANDS.values())
    if function
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hesscli' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
