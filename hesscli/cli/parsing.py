"""From what is typed after an option to its value.

ValueError or UsageError where it cannot be meant.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

from hesscli.vocabulary import BlockRule, Pattern, RowKind, Selection, TrainedWith, WindowBlocks


class Range(NamedTuple):
    """The numbers from ``start`` up to, not including, ``stop``."""

    start: int
    stop: int

    def __str__(self) -> str:
        """As it is typed."""
        return f"{self.start}:{self.stop}"


class DampingValue(NamedTuple):
    """λ in units of the matrix's mean diagonal entry, or absolute."""

    value: float
    absolute: bool = False

    def __str__(self) -> str:
        """As it is typed."""
        return f"abs:{self.value}" if self.absolute else str(self.value)


def fraction(text: str) -> float:
    """``5%`` or ``0.05``; a plain number above 1 is a percentage that lacks its sign."""
    value = float(text.removesuffix("%")) / 100 if text.endswith("%") else _at_most_one(text)
    return _positive(value)


def confidence(text: str) -> float:
    """A percentage or fraction strictly between none and all."""
    value = fraction(text)
    if value >= 1:
        raise ValueError
    return value


def positive(text: str) -> float:
    """A finite number above 0."""
    return _positive(float(text))


def non_negative(text: str) -> float:
    """A finite number, 0 or more."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


def duration(text: str) -> float | None:
    """``1h30m``, ``90s``, ``600`` (seconds), in seconds; None for ``none``, no limit."""
    if text == "none":
        return None
    number = r"(\d+(?:\.\d*)?|\.\d+)"
    parts = re.fullmatch(f"(?:{number}h)?(?:{number}m)?(?:{number}s?)?", text)
    if parts is None:
        raise ValueError
    hours, minutes, seconds = (float(part or 0) for part in parts.groups())
    return _positive(3600 * hours + 60 * minutes + seconds)


def count(text: str) -> int:
    """A whole number, 1 or more."""
    value = whole(text)
    if value < 1:
        raise ValueError
    return value


def whole(text: str) -> int:
    """A whole number from 0 to the largest that 63 bits hold."""
    if not re.fullmatch("[0-9]{1,19}", text) or int(text) >= 2**63:
        raise ValueError
    return int(text)


def numbers(text: str) -> Range:
    """A part of all numbers, ``a:b``."""
    first, _, last = text.partition(":")
    numbers = Range(whole(first), whole(last))
    if numbers.start >= numbers.stop:
        raise ValueError
    return numbers


def probes(text: str) -> int | Range:
    """How many probes, ``N``, or which of them all, ``a:b``."""
    return numbers(text) if ":" in text else count(text)


def as_typed(parse: Callable[[str], object]) -> Callable[[str], str]:
    """What a grammar accepts, as it was typed: it is read again where it is used."""

    def read(text: str) -> str:
        parse(text)
        return text

    return read


block = as_typed(BlockRule.parse)
blocks = as_typed(WindowBlocks.parse)
pattern = as_typed(Pattern.parse)
examples = as_typed(Selection.parse)


def rows(text: str) -> str:
    """A kind of rows, or ``auto``, as it was typed."""
    return text if text == "auto" else as_typed(RowKind.parse)(text)


def damping(text: str) -> DampingValue:
    """``1e-3`` in units of tr F̂ / d, or ``abs:1e-5``."""
    return DampingValue(positive(text.removeprefix("abs:")), text.startswith("abs:"))


training = TrainedWith.parse


def bandwidth(text: str) -> float | None:
    """``auto``, which is None, or a fraction."""
    return None if text == "auto" else fraction(text)


def device(text: str) -> str:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:i``."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", text):
        raise ValueError
    return text


def _at_most_one(text: str) -> float:
    value = float(text)
    if value > 1:
        raise ValueError
    return value


def _positive(value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError
    return value
