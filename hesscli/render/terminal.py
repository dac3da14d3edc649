"""Pieces of terminal layout that rich does not have: all adapt to the width and the encoding."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from hesscli.render import words
from hesscli.render.words import shorten

# -- Pieces of terminal layout that rich does not have: all adapt to the width and the encoding ----


# Of equal width, so that columns stay aligned.
_ASCII = str.maketrans("█▌░·…‖─±×▁▂▃▄▅▆▇", "##-|~|-~x.:-=+*%")
# Called ascii so that rich leaves it alone: Plainable replaces the glyph where it must.
_RULE = box.Box(str(box.SIMPLE_HEAD), ascii=True)
GAP = Text()
_LEAST_BAR = 4


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
        return Measurement(_LEAST_BAR, max(options.max_width // 10, _LEAST_BAR))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        halves = round(2 * options.max_width * abs(self.share))
        if self.share < 0:
            yield Text("░" * ((halves + 1) // 2), style=self.style, no_wrap=True)
        else:
            yield Text("█" * (halves // 2) + "▌" * (halves % 2), style=self.style, no_wrap=True)


def grid(
    rows: Iterable[Sequence[str | RenderableType]],
    *,
    unbroken: Container[int] = (),
    right: Container[int] = (),
    dim: Container[int] = (),
    indent: int = 0,
) -> Padding:
    """Rows without headings, in columns as wide as they must be.

    Args:
        rows: of as many cells each.
        unbroken: the columns that stay on one line.
        right: those that are aligned at their right ends.
        dim: those that are less bright.
        indent: characters to the left.
    """
    table, columns = Table.grid(padding=(0, 2)), [*zip(*rows, strict=True)]
    while columns and not any(columns[-1]):  # rich gives too little room to the others
        columns.pop()
    for column in range(len(columns)):
        table.add_column(
            no_wrap=column in unbroken,
            justify="right" if column in right else "left",
            style="dim" if column in dim else "",
        )
    for row in zip(*columns, strict=True):
        table.add_row(*map(_plain, row))
    return Padding(table, (0, 0, 0, indent), expand=False)


def after_gap(lines: Iterable[RenderableType]) -> Iterator[RenderableType]:
    """The lines with an empty one before them, if there are any."""
    for index, line in enumerate(lines):
        if index == 0:
            yield GAP
        yield line


def _plain(cell: str | RenderableType) -> RenderableType:
    """What rich does not take for markup."""
    return Text(cell) if isinstance(cell, str) else cell


def ruled_table() -> Table:
    """A table with nothing but a rule below its head."""
    return Table(
        box=_RULE,
        show_edge=False,
        pad_edge=False,
        padding=(0, 0, 0, 1),
        header_style="dim",
    )


# -- A table of as many columns as there is room for -----------------------------------------------


_NAME_WIDTHS = range(11, 33)
"""Names are cut down to the least of these at which they differ before columns are given up."""
_GAP = 2


@dataclass(frozen=True)
class Column:
    """A heading and its cells; where room is short, the lowest ranks are given up first."""

    rank: int
    heading: str
    cells: Sequence[str | Text | Bar]
    justify: Literal["left", "right"] = "right"

    @property
    def width(self) -> int:
        """How many characters the column takes, bars as short as they can be."""
        texts = (_LEAST_BAR * " " if isinstance(cell, Bar) else cell for cell in self.cells)
        return max(map(len, (*self.heading.split("\n"), *texts)))


@dataclass(frozen=True)
class FittedRows:
    """Named rows.

    Args:
        heading: of the names.
        names: of the rows, cut where they must be.
        columns: what there is to say, from left to right.
        numbers: of the rows, to the left of their names; none where empty.
        styles: of the rows; all plain where empty.
        fitted: names for a width, where they are more than names of layers.
        least: width of names for which columns are given up, in any case.
    """

    heading: str
    names: Sequence[str]
    columns: Sequence[Column]
    numbers: Sequence[str] = ()
    styles: Sequence[str] = ()
    fitted: Callable[[int], Sequence[str]] | None = None
    least: int = 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns, least = list(self.columns), self._least_name_width()
        while columns and self._width(columns) + least > options.max_width:
            columns.remove(min(columns, key=lambda column: column.rank))
        table = ruled_table()
        if self.numbers:
            table.add_column("#", justify="right", no_wrap=True, vertical="bottom")
        table.add_column(self.heading, no_wrap=True, vertical="bottom")
        for column in columns:
            bars = any(isinstance(cell, Bar) for cell in column.cells)
            table.add_column(
                column.heading, justify=column.justify, no_wrap=not bars, vertical="bottom"
            )
        names = self._cut(max(options.max_width - self._width(columns), 1))
        for row, name in enumerate(names):
            number = [Text(self.numbers[row])] if self.numbers else []
            cells = (_plain(column.cells[row]) for column in columns)
            style = self.styles[row] if self.styles else ""
            table.add_row(*number, Text(name), *cells, style=style)
        yield table

    def _width(self, columns: list[Column]) -> int:
        """How many characters all but the names take."""
        numbers = max(map(len, self.numbers), default=-_GAP) + _GAP
        return numbers + sum(_GAP + column.width for column in columns)

    def _cut(self, width: int) -> Sequence[str]:
        return self.fitted(width) if self.fitted else words.shorten_all(self.names, width)

    def _least_name_width(self) -> int:
        longest = max(map(len, self.names), default=0)
        different = len(set(self.names))
        least = next(
            (w for w in _NAME_WIDTHS if len(set(self._cut(w))) == different), _NAME_WIDTHS[0]
        )
        return max(len(self.heading), min(longest, max(least, self.least)))
