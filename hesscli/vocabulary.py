"""Words that are typed, and that documents have: each list of them, and each grammar, is here.

So are the defaults that all commands share. Without torch, so that the command line can refuse a
word before anything is loaded.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Self, cast, get_args

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

    ``lr`` None is not known, nor are ``steps``; ``updates`` is a file of what each step added.
    """

    optimizer: str = "sgd"
    lr: float | None = None
    wd: float = 0.0
    momentum: float = 0.0
    steps: int | None = None
    updates: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``lr=0.1,wd=5e-4,momentum=0.9,steps=500,updates=FILE,optimizer=sgd``, any of them.

        Raises:
            UsageError: another name, or a value that cannot be meant.
        """
        given = dict(part.partition("=")[::2] for part in text.split(","))
        numbers = [given[name] for name in ("lr", "wd", "momentum") if name in given]
        try:
            wrong = not all(0 <= float(number) < math.inf for number in numbers)
            wrong |= float(given.get("momentum", 0)) >= 1 or int(given.get("steps", 0)) < 0
        except ValueError:
            wrong = True
        named = given.get("optimizer", "sgd")
        if wrong or given.keys() - set(cls._fields) or named not in OPTIMIZERS:
            raise UsageError(f"training must be {SPELLED}", repr(text), "lr=0.1,wd=5e-4")
        return cls(
            optimizer=named,
            lr=float(given["lr"]) if "lr" in given else None,
            wd=float(given.get("wd", 0)),
            momentum=float(given.get("momentum", 0)),
            steps=int(given["steps"]) if "steps" in given else None,
            updates=given.get("updates"),
        )

    def __str__(self) -> str:
        """As it is typed."""
        pairs = zip(self._fields, self, strict=True)
        return ",".join(f"{name}={value}" for name, value in pairs if value is not None)


OPTIMIZERS = ("sgd", "adam", "adamw")
"""Whose steps are known; the latter two keep no charges."""
SPELLED = "lr=X,wd=X,momentum=X,steps=N,updates=FILE,optimizer=sgd|adam|adamw, any of them"


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
    """N:M sparsity: of each ``size`` consecutive inputs no more than ``kept`` weights are left."""

    spelled: ClassVar[str] = "N:M with N below M and few choices, as 2:4, 1:4 or 4:8"
    most: ClassVar[int] = 128
    """Choices that are tried for each group."""
    kept: int
    size: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``N:M``.

        Raises:
            UsageError: it is none, or has too many choices.
        """
        kept, size = (_number(part) for part in (*text.split(":"), "", "")[:2])
        if text.count(":") != 1 or not kept or not size or kept >= size:
            raise UsageError("no such pattern", repr(text), cls.spelled)
        if size > cls.most or math.comb(size, kept) > cls.most:
            raise UsageError("a pattern with too many choices", repr(text), cls.spelled)
        return cls(kept, size)

    @property
    def sparsity(self) -> float:
        """Share of the weights that it lets go."""
        return 1 - self.kept / self.size

    def __str__(self) -> str:
        return f"{self.kept}:{self.size}"


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
