"""How a command is typed: what its options are made of, and the signature that they make."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from hesscli.cli.console import Console
from hesscli.errors import ExitCode, UsageError
from hesscli.results import Header

if TYPE_CHECKING:
    from hesscli.problem.problem import Problem

Layers = tuple[str, ...] | None
"""The names of those that were chosen; None where all are meant."""
Measure = Callable[..., Header]
"""Told an observer, it does the work."""

_HALF = ("bfloat16", "float32")
ALIASES = {
    **dict.fromkeys(("gauss-newton", "generalized-gauss-newton", "gn", "gauss"), ("ggn",)),
    **dict.fromkeys(("fim", "natural", "true-fisher"), ("fisher",)),
    **dict.fromkeys(("ef", "emp-fisher", "efisher"), ("empirical-fisher",)),
    **dict.fromkeys(("fp64", "f64", "double", "torch-float64", "64"), ("float64",)),
    **dict.fromkeys(("fp32", "f32", "single", "float", "torch-float32", "32"), ("float32",)),
    **dict.fromkeys(("bf16", "bfloat16", "fp16", "f16", "half", "float16", "16"), _HALF),
    **dict.fromkeys(("reverse-over-reverse", "double-backprop"), ("double-backward",)),
    **dict.fromkeys(("forward", "jvp"), ("forward-over-reverse",)),
}
"""What else the choices are called, the first of those that an option has being meant."""


# -- A row, and a command's choice of rows ---------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option, or the argument, of a command line.

    Attributes:
        name: what functions call it.
        declared: what typer is told of it.
        type: what typer takes it for, where it has no reader of its own.
        default: its value where it is not typed.
        usual: a tolerance that counts where none of any kind is typed.
    """

    name: str
    declared: Any
    type: Any = str
    default: Any = None
    usual: float | None = None

    @property
    def parameter(self) -> inspect.Parameter:
        """How a signature has it."""
        annotation = Annotated[self.type, self.declared]  # type: ignore[name-defined]
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=self.default, annotation=annotation
        )


Given = Mapping[str, Any]
"""What was typed, or is usual, by the names of options."""


@dataclass(frozen=True)
class Usage:
    """How a command is typed.

    Attributes:
        help: what it does.
        examples: command lines.
        options: rows of the table, in the order of ``--help``.
        run: does it all, told the console, the checkpoint and what else was typed, where the
            command has no result.
        prepare: makes a measurement of a problem, what is asked of it, and the layers that were
            chosen, if any, and refuses what cannot be before the long work; None where the
            registry's own takes what is asked as it is.
        copies: the names of the files that it makes of the problem's own, which must not take the
            place of these; None where it makes none.
    """

    help: str
    examples: str
    options: tuple[Option, ...]
    run: Callable[[Console, Path | None, Given], ExitCode] | None = None
    prepare: Callable[[Problem, Given, Layers], Measure] | None = None
    copies: Callable[[Problem], Sequence[str]] | None = None

    def defaults(self) -> dict[str, Any]:
        """What is given where nothing is typed."""
        return {option.name: option.default for option in self.options}


# -- A bare ``--layer``, which takes every layer ---------------------------------------------------


EVERY_LAYER = "*"


class Typed(TyperCommand):
    """A command on which ``--layer`` may stand without a pattern."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments once each bare ``--layer`` has its pattern."""
        return super().parse_args(ctx, fill_bare_layers(args))


def fill_bare_layers(args: Sequence[str]) -> list[str]:
    """Give each bare ``--layer`` the pattern that takes every layer.

    It is bare where it stands last, before another option, or before an existing file, which
    is the checkpoint.
    """
    end = args.index("--") if "--" in args else len(args)
    following = [*args[1:end], "--"]
    filled = [
        f"--layer={EVERY_LAYER}"
        if arg == "--layer" and (after.startswith("-") or Path(after).is_file())
        else arg
        for arg, after in zip(args[:end], following, strict=False)
    ]
    return [*filled, *args[end:]]


# -- How rows are written --------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """A group of options in ``--help``; makes its rows."""

    title: str | None

    def value(
        self,
        flag: str,
        read: Callable[[str], Any],
        must: str,
        example: str,
        *,
        metavar: str,
        help: str,
        default: Any = None,
        words: Sequence[str] = (),
        usual: float | None = None,
    ) -> Option:
        """An option whose refusal says what it must be and shows one that works."""

        def parse(value: Any) -> Any:
            if not isinstance(value, str):  # a default, which is a value already
                return value
            try:
                return read(value.strip())
            except (ValueError, UsageError):
                raise UsageError(f"{flag} must be {must}", repr(value), example) from None

        more = {"parser": parse, "autocompletion": (lambda: list(words)) if words else None}
        declared = self._declared(flag, metavar=metavar, help=help, show_default=False, **more)
        return Option(name=_name(flag), declared=declared, default=default, usual=usual)

    def choice(
        self, flag: str, choices: Sequence[str], *, help: str, default: str | None = None
    ) -> Option:
        """An option that takes one of a few names, which shells complete and refusals suggest."""

        def parse(value: Any) -> Any:
            if value is None or value in choices:
                return value
            what = f"{flag} must be {listed(choices)}"
            raise UsageError(what, repr(value), f"{flag} {_meant(str(value), choices)}")

        more = {"parser": parse, "autocompletion": lambda: list(choices)}
        declared = self._declared(flag, metavar="NAME", help=help, show_default=False, **more)
        return Option(name=_name(flag), declared=declared, default=default)

    def text(
        self, flag: str, metavar: str, *, help: str, type: Any = Path, name: str | None = None
    ) -> Option:
        """A path, a name or a pattern, which are read later."""
        declared = self._declared(flag, metavar=metavar, help=help, show_default=False)
        return Option(name=name or _name(flag), declared=declared, type=type | None)

    def switch(self, *flags: str, help: str) -> Option:
        """An option that is there or not."""
        declared = self._declared(*flags, help=help)
        return Option(name=_name(flags[0]), declared=declared, type=bool, default=False)

    def _declared(self, *flags: str, **settings: Any) -> Any:
        return typer.Option(*flags, rich_help_panel=self.title, **settings)


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _meant(text: str, choices: Sequence[str]) -> str:
    """The choice that is probably meant: by another name, by its beginning, or nearly spelled."""
    folded = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    names = [folded, *(name for name in ALIASES.get(folded, ()))]
    known = [name for name in names if name in choices]
    begun = [choice for choice in choices if folded and choice.startswith(folded)]
    return (known or begun or difflib.get_close_matches(folded, choices) or choices)[0]


def listed(names: Sequence[str]) -> str:
    """Names as a sentence has them."""
    return f"{', '.join(names[:-1])} or {names[-1]}"
