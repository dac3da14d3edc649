"""The matrices that ``--matrix`` names."""

from __future__ import annotations

from hesscli.errors import UsageError
from hesscli.operators.base import Operator
from hesscli.operators.gauss_newton import EmpiricalFisher, Fisher, GaussNewton
from hesscli.operators.hessian import Hessian

MATRICES: dict[str, type[Operator]] = {
    matrix.name: matrix for matrix in (Hessian, GaussNewton, Fisher, EmpiricalFisher)
}


def matrix_named(name: str) -> type[Operator]:
    """The operator class of a name.

    Raises:
        UsageError: no such matrix.
    """
    if name not in MATRICES:
        raise UsageError("no such matrix", repr(name), f"one of {', '.join(MATRICES)}")
    return MATRICES[name]
