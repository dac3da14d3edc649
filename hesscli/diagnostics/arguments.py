"""What functions of Python are given, looked at before anything runs as options are."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from inspect import signature
from numbers import Integral, Real
from typing import Any, NamedTuple, ParamSpec, TypeVar

from hesscli.errors import UsageError

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


class _Kind(NamedTuple):
    """A number within limits.

    Attributes:
        words: what it is.
        example: of how it is given.
        whole: whether it is a whole number.
        least: it is larger, or as large where it is whole.
        most: it is smaller, or as large where ``ends`` there.
        ends: whether it may be as large as ``most``.
    """

    words: str
    example: str
    whole: bool = False
    least: float = 0.0
    most: float = math.inf
    ends: bool = False

    def plain(self, value: Any) -> Any:
        """The same as Python's own number, or numbers: NumPy's do not go into JSON."""
        if isinstance(value, tuple):
            return tuple(map(self.plain, value))
        return int(value) if self.whole else float(value)

    def has(self, value: Any) -> bool:
        """Whether a value is of this kind."""
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        number = float(value)
        above = number >= self.least if self.whole else number > self.least
        return above and (number <= self.most if self.ends else number < self.most)


_SHARE = _Kind("a share of the value", "0.05", most=1.0, ends=True)
_COUNT = _Kind("a whole number from 1", "8", whole=True, least=1)
_PROBES = _Kind("a whole number", "64", whole=True)
_KINDS = {
    "budget": _Kind("seconds above 0", "60, or None for no limit"),
    "rtol": _SHARE,
    "atol": _Kind("a number above 0", "0.1"),
    "confidence": _Kind("a share between 0 and 1", "0.95", most=1.0),
    "seed": _Kind("a whole number from 0", "0", whole=True, most=2**63),
    "refine": _SHARE,
    "bandwidth": _SHARE,
    "sparsity": _Kind("a share between 0 and 1", "0.9", most=1.0),
    "damping": _Kind("a number above 0", "1e-3"),
    "probes": _PROBES,
    "steps": _COUNT,
    "k": _COUNT,
    "exact_limit": _COUNT,
}


def as_asked(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Refuse numbers by name that are none, or out of range; None is what a default says it is.

    Raises:
        UsageError: one is.
    """
    kinds = {name: _KINDS[name] for name in signature(function).parameters if name in _KINDS}

    @wraps(function)
    def checked(*args: _Given.args, **given: _Given.kwargs) -> _Result:
        for name, kind in kinds.items():
            value = given.get(name)
            if value is None:
                continue
            parts = value if isinstance(value, tuple) and kind is _PROBES else (value,)
            if not all(map(kind.has, parts)):
                raise UsageError(
                    f"{name} is {kind.words}", f"{name}={value!r}", f"{name}={kind.example}"
                )
            given[name] = kind.plain(value)
        return function(*args, **given)

    return checked
