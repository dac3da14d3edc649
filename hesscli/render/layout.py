"""Pieces of terminal layout that rich does not have: all adapt to the width and the encoding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from hesscli.render.words import shorten

# Of equal width, so that columns stay aligned.
_ASCII = str.maketrans("█▌░·…‖─±×▁▂▃▄▅▆▇", "##-|~|-~x.:-=+*%")
# Called ascii so that rich leaves it alone: Plainable replaces the glyph where it must.
_RULE = box.Box(str(box.SIMPLE_HEAD), ascii=True)
GAP = Text()


@dataclass(frozen=True)
class Plainable:
    """Anything, with its glyphs replaced where the stream cannot carry them."""

    content: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        segments = console.render(self.content, options)
        if not options.ascii_only:
            yield from segments
            return
        for text, style, control in segments:
            yield Segment(text.replace("± ", "+-").translate(_ASCII), style, control)


@dataclass(frozen=True)
class Facts:
    """Short facts in a row, broken into lines between facts only."""

    facts: tuple[Text, ...]
    indent: int = 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        margin, between = Text(" " * self.indent), Text(" · ", style="dim")
        line = margin.copy()
        for fact in self.facts:
            if len(line) == self.indent:
                line.append_text(fact)
            elif line.cell_len + between.cell_len + fact.cell_len <= options.max_width:
                line.append_text(between).append_text(fact)
            else:
                yield line
                line = margin + fact
        yield line


def facts(items: Iterable[str], indent: int = 0, style: str = "") -> Facts:
    """Make a row of facts from plain strings."""
    return Facts(tuple(Text(item, style=style) for item in items), indent)


@dataclass(frozen=True)
class Name:
    """A name that is cut in the middle where the column is too narrow."""

    name: str
    style: str = ""

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(len(self.name), 8), len(self.name))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(shorten(self.name, options.max_width), style=self.style, no_wrap=True)


@dataclass(frozen=True)
class Bar:
    """A bar for a share of the longest one, light where it is negative."""

    share: float
    style: str = "cyan"

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(4, max(options.max_width // 10, 4))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        halves = round(2 * options.max_width * abs(self.share))
        if self.share < 0:
            yield Text("░" * ((halves + 1) // 2), style=self.style, no_wrap=True)
        else:
            yield Text("█" * (halves // 2) + "▌" * (halves % 2), style=self.style, no_wrap=True)


def ruled_table() -> Table:
    """A table with nothing but a rule below its head."""
    return Table(
        box=_RULE,
        show_edge=False,
        pad_edge=False,
        padding=(0, 0, 0, 1),
        header_style="dim",
    )
