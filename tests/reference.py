"""Writes a page of all commands and options, as ``--help`` shows them: ``make reference``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hesscli.cli.app import program

REFERENCE = Path(__file__).parents[1] / ".github" / "OPTIONS.md"


def reference() -> str:
    """The whole page."""
    return "\n".join(_page())


def _page() -> Iterator[str]:
    yield "# Commands and options"
    yield ""
    yield "Written by `make reference` from what `hesscli COMMAND --help` shows."
    for name, command in program().commands.items():
        yield from ("", f"## hesscli {name}", "", " ".join(command.help.split()))
        for panel in dict.fromkeys(map(_panel, command.params)):
            yield from ("", f"**{panel}**", "")
            yield from (_entry(one) for one in command.params if _panel(one) == panel)
        yield from ("", "```", *_lines(command.epilog), "```")
    yield ""


def _panel(parameter: Any) -> str:
    usual = "Options" if parameter.param_type_name == "option" else "Argument"
    return parameter.rich_help_panel or usual


def _entry(parameter: Any) -> str:
    """How it is typed, and what for."""
    flags = parameter.opts if parameter.param_type_name == "option" else []
    typed = " ".join(filter(None, (", ".join(flags), parameter.metavar)))
    return f"- `{typed}`: {parameter.help}"


def _lines(examples: str) -> list[str]:
    lines = examples.removeprefix("Examples:").strip("\n").splitlines()
    return [line.removeprefix("  ") for line in lines]


if __name__ == "__main__":
    REFERENCE.parent.mkdir(exist_ok=True)
    REFERENCE.write_text(reference(), encoding="utf-8")
