"""Eigenvalues, and sums over them, as people read them; shared by tables and pictures."""

from __future__ import annotations

from hesscli.render import words
from hesscli.results import Eigenvalue, Outliers, SpectralFunction

_VECTOR_ERROR = 0.1


def has_vector(eigenvalue: Eigenvalue) -> bool:
    """Whether its vector is known so well that the layers' parts in it mean something."""
    return eigenvalue.vector_error is not None and eigenvalue.vector_error <= _VECTOR_ERROR


def estimate(function: SpectralFunction) -> str:
    """A value with its standard error where there is one."""
    if function.value is None:
        return "none"
    if function.stderr is None:
        return words.number(function.value)
    return words.with_error(function.value, function.stderr)


def standing_apart(outliers: Outliers) -> str:
    """How many of the largest eigenvalues lie above the widest step."""
    if not outliers.count:
        return "no eigenvalue stands apart"
    if outliers.count == 1:
        return f"1 eigenvalue stands apart: it is {outliers.ratio:.2g} times the next"
    return (
        f"{outliers.count} eigenvalues stand apart: the last is {outliers.ratio:.2g} times the next"
    )


def compared_with_classes(outliers: Outliers) -> list[str]:
    """What the staircase does at the number of classes."""
    if outliers.classes is None:
        return []
    said = f"{outliers.classes} classes"
    if outliers.class_ratio is None:
        return [f"{said}, fewer eigenvalues than that are told apart"]
    number = outliers.classes - 1
    return [f"{said}: eigenvalue {number} is {outliers.class_ratio:.2g} times the next"]
