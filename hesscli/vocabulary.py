"""Words that are typed, and that documents have: each list of them, and each grammar, is here.

So are the defaults that all commands share. Without torch, so that the command line can refuse a
word before anything is loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self, cast, get_args

from hesscli.errors import UsageError

MATRICES = {
    "hessian": "Hessian",
    "ggn": "Gauss-Newton matrix",
    "fisher": "Fisher matrix",
    "empirical-fisher": "empirical Fisher matrix",
}
"""What each is called in a sentence."""
METHODS = ("auto", "exact", "split", "deflated", "stratified", "hutchinson")
"""Of estimating a trace or a diagonal."""
Mode = Literal["double-backward", "forward-over-reverse", "finite-difference"]
MODES: tuple[Mode, ...] = get_args(Mode)
"""Of differentiating a product, the cheapest first."""
DTYPES = ("float32", "float64", "bfloat16")
"""In which models compute; in the last, products alone, by float32 weights."""
WINDOW_DTYPES = ("float32", "bfloat16", "float64")
"""In which windows of gradients are kept."""

USUAL_BUDGET = 600.0
"""Seconds that a command takes at most where nothing else is said."""
USUAL_RTOL = {"trace": 0.05, "diag": 0.1, "ihvp": 0.2}
"""Relative tolerance that counts where none of any kind is asked for, of commands that have one."""
USUAL_SPARSITY = 0.5
"""Share of the weights that pruning takes where nothing else is said."""
PRUNING_DAMPING = 1e-2
"""In units of tr F̂ / d. Many weights go together: what a window only seems to know of them is
made up for by others, and costs more than what a larger λ leaves unknown."""
USUAL_CONFIDENCE = 0.95
"""Probability with which intervals hold where nothing else is said."""


def _number(text: str) -> int | None:
    """A whole number, 1 or more, that 63 bits hold; None for anything else."""
    return int(text) if re.fullmatch("[0-9]{1,19}", text) and 0 < int(text) < 2**63 else None


@dataclass(frozen=True)
class Selection:
    """How many examples to keep: at random out of all, or the ``first`` of an iterable."""

    spelled: ClassVar[str] = "a number of examples, all, or first:N"
    usual: ClassVar[int] = 4096
    count: int | None = usual
    first: bool = False

    @classmethod
    def parse(cls, text: str | int) -> Self:
        """Read ``N``, ``all`` or ``first:N``.

        Raises:
            UsageError: anything else, or a count below one.
        """
        if text == "all":
            return cls(None)
        digits = str(text).removeprefix("first:")
        if (number := _number(digits)) is None:
            raise UsageError(f"examples must be {cls.spelled}", repr(text), "examples=4096")
        return cls(number, digits != str(text))


class TrainedWith(NamedTuple):
    """How weights came from others: the optimizer's settings, and a log of its updates.

    What is None is not known; ``updates`` is a file of what each step added.
    """

    optimizer: str | None = None
    lr: float | None = None
    wd: float | None = None
    momentum: float | None = None
    dampening: float | None = None
    nesterov: bool | None = None
    steps: int | None = None
    updates: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``lr=0.1,wd=5e-4,momentum=0.9,steps=500,updates=FILE``, any of the fields.

        Raises:
            UsageError: another name, or a value that cannot be meant.
        """
        pairs = [part.partition("=") for part in text.split(",")]
        try:
            given = {name: _SETTINGS[name](value) for name, equals, value in pairs if equals}
            if len(given) < len(pairs) or any(map(_out_of_range, given.items())):
                raise ValueError
        except (KeyError, ValueError):
            raise UsageError(f"training must be {SPELLED}", repr(text), "lr=0.1,wd=5e-4") from None
        return cls(**given)

    @classmethod
    def of_groups(cls, groups: Sequence[Mapping[str, Any]]) -> Self:
        """What an optimizer's groups of parameters have, by the names that torch gives it.

        The rate is left open where a schedule has moved it; ``mixed`` is of unlike groups.
        """
        found = {(float(group.get("lr", 0.0)), cls._of_group(group)) for group in groups}
        return found.pop()[1] if len(found) == 1 else cls("mixed")

    @classmethod
    def _of_group(cls, group: Mapping[str, Any]) -> Self:
        if "betas" in group and "hessian_power" not in group:
            return cls("adamw" if group.get("decoupled_weight_decay") else "adam")
        if not {"lr", "momentum", "dampening", "nesterov"} <= group.keys():
            return cls("other")
        rate = float(group["lr"])
        return cls(
            optimizer="sgd",
            lr=rate if float(group.get("initial_lr", rate)) == rate else None,
            wd=float(group.get("weight_decay", 0.0)),
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            nesterov=bool(group["nesterov"]),
        )

    def over(self, other: Self) -> Self:
        """The same, and what another knows besides."""
        known = {name: value for name, value in self._asdict().items() if value is not None}
        return other._replace(**known)

    def __str__(self) -> str:
        """As it is typed."""
        pairs = zip(self._fields, self, strict=True)
        return ",".join(f"{name}={value}" for name, value in pairs if value is not None)


OPTIMIZERS = ("sgd", "adam", "adamw", "other", "mixed")
"""Of these the steps of the first alone keep charges; ``mixed`` has unlike groups of parameters."""
SPELLED = (
    "lr=X,wd=X,momentum=X,dampening=X,nesterov=yes|no,steps=N,updates=FILE,"
    "optimizer=sgd|adam|adamw|other, any of them"
)


def _optimizer(text: str) -> str:
    return OPTIMIZERS[OPTIMIZERS.index(text)]


def _yes(text: str) -> bool:
    return {"yes": True, "True": True, "no": False, "False": False}[text]


_SETTINGS: dict[str, Callable[[str], Any]] = {
    "optimizer": _optimizer,
    "lr": float,
    "wd": float,
    "momentum": float,
    "dampening": float,
    "nesterov": _yes,
    "steps": int,
    "updates": str,
}


def _out_of_range(pair: tuple[str, Any]) -> bool:
    """Whether a setting is a number that no optimizer has."""
    name, value = pair
    if not isinstance(value, (int, float)):
        return False
    return not 0 <= value < (1 if name == "momentum" else math.inf)


@dataclass(frozen=True)
class BlockRule:
    """AdaHessian's blocks: a rule by name, and the N of ``head:N`` and ``N``."""

    spelled: ClassVar[str] = "auto, image, row, kernel, channel, head:N or a number of entries"
    named: ClassVar[tuple[str, ...]] = ("auto", "image", "row", "kernel", "channel")
    kind: Literal["auto", "image", "row", "kernel", "channel", "head", "entries"] = "auto"
    number: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``auto``, ``image``, ``row``, ``kernel``, ``channel``, ``head:N`` or ``N``.

        Raises:
            UsageError: it is none of these.
        """
        if text in cls.named:
            return cls(cast(Literal["auto"], text))
        if (number := _number(text.removeprefix("head:"))) is None:
            raise UsageError(f"blocks must be {cls.spelled}", repr(text), "auto, head:8 or 32")
        return cls("head" if text.startswith("head:") else "entries", number)


@dataclass(frozen=True)
class Pattern:
    """Groups of weights, of each of which no more than ``kept`` are left.

    ``N:M`` has groups of M consecutive inputs of one output, of which N stay. ``R×C`` has blocks of
    R consecutive outputs by C consecutive inputs, which go or stay whole.
    """

    spelled: ClassVar[str] = (
        "N:M with N below M and few choices, as 2:4, or blocks of up to 256 weights, as 4x4"
    )
    most: ClassVar[int] = 128
    """Choices that are tried for each group."""
    largest: ClassVar[int] = 256
    """Entries of a block, whose part of the inverse is made for each."""
    kept: int
    inputs: int
    outputs: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``N:M`` or ``RxC``.

        Raises:
            UsageError: it is neither, or has too many choices.
        """
        mark = "x" if "x" in text else ":"
        one, other = (_number(part) for part in (*text.split(mark), "", "")[:2])
        if text.count(mark) != 1 or not one or not other or (mark == ":" and one >= other):
            raise UsageError("no such pattern", repr(text), cls.spelled)
        if mark == "x":
            if not 1 < one * other <= cls.largest:
                hint = f"blocks of 2 to {cls.largest} entries, as 4x4"
                raise UsageError("no block that can be scored", repr(text), hint)
            return cls(0, other, one)
        if other > cls.most or math.comb(other, one) > cls.most:
            raise UsageError("a pattern with too many choices", repr(text), cls.spelled)
        return cls(one, other)

    @property
    def size(self) -> int:
        """Weights in a group."""
        return self.inputs * self.outputs

    @property
    def count(self) -> int:
        """How many of a group's weights go."""
        return self.size - self.kept

    @property
    def sparsity(self) -> float | None:
        """Share of the weights that it lets go; None where any number of groups may."""
        return 1 - self.kept / self.size if self.kept else None

    def __str__(self) -> str:
        return f"{self.kept}:{self.size}" if self.kept else f"{self.outputs}x{self.inputs}"


@dataclass(frozen=True)
class RowKind:
    """What a row of a window is; ``size`` is the number of examples in it."""

    spelled: ClassVar[str] = "auto, sampled, example or microbatch:N"
    named: ClassVar[tuple[str, ...]] = ("sampled", "example")
    name: Literal["sampled", "example", "microbatch"]
    size: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``sampled``, ``example`` or ``microbatch:N``.

        Raises:
            UsageError: none of these.
        """
        if text in cls.named:
            return cls(cast(Literal["sampled"], text))
        name, _, digits = text.partition(":")
        if name != "microbatch" or (number := _number(digits)) is None:
            raise UsageError("no such kind of rows", repr(text), cls.spelled)
        return cls("microbatch", number)

    def __str__(self) -> str:
        return f"{self.name}:{self.size}" if self.name == "microbatch" else self.name


@dataclass(frozen=True)
class WindowBlocks:
    """Diagonal blocks of the matrix of a window: a rule by name, and the N of ``N``."""

    spelled: ClassVar[str] = "auto, whole, layer or a number of entries"
    named: ClassVar[tuple[str, ...]] = ("auto", "whole", "layer")
    kind: Literal["auto", "whole", "layer", "entries"] = "auto"
    number: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``auto``, ``whole``, ``layer`` or ``N``.

        Raises:
            UsageError: it is none of these.
        """
        if text in cls.named:
            return cls(cast(Literal["auto"], text))
        if (number := _number(text)) is None:
            raise UsageError("no such blocks", repr(text), cls.spelled)
        return cls("entries", number)
