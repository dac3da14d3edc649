"""A table of as many columns as there is room for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from hesscli.render import words
from hesscli.render.layout import ruled_table

_NAME_WIDTHS = range(11, 33)
"""Names are cut down to the least of these at which they differ before columns are given up."""
_GAP = 2


@dataclass(frozen=True)
class Column:
    """A heading and its cells; where room is short, the lowest ranks are given up first."""

    rank: int
    heading: str
    cells: list[Text]
    justify: Literal["left", "right"] = "right"

    @property
    def width(self) -> int:
        """How many characters the column takes."""
        return max(len(line) for line in (*self.heading.split("\n"), *map(str, self.cells)))


@dataclass(frozen=True)
class FittedRows:
    """Named rows.

    Args:
        heading: of the names.
        names: of the rows, cut where they must be.
        columns: what there is to say, from left to right.
        numbers: of the rows, to the left of their names; none where empty.
        styles: of the rows; all plain where empty.
    """

    heading: str
    names: list[str]
    columns: list[Column]
    numbers: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns, least = list(self.columns), self._least_name_width()
        while columns and self._width(columns) + least > options.max_width:
            columns.remove(min(columns, key=lambda column: column.rank))
        table = ruled_table()
        if self.numbers:
            table.add_column("#", justify="right", no_wrap=True, vertical="bottom")
        table.add_column(self.heading, no_wrap=True, vertical="bottom")
        for column in columns:
            table.add_column(
                column.heading, justify=column.justify, no_wrap=True, vertical="bottom"
            )
        names = words.shorten_all(self.names, max(options.max_width - self._width(columns), 1))
        for row, name in enumerate(names):
            number = [Text(self.numbers[row])] if self.numbers else []
            cells = (column.cells[row] for column in columns)
            style = self.styles[row] if self.styles else ""
            table.add_row(*number, Text(name), *cells, style=style)
        yield table

    def _width(self, columns: list[Column]) -> int:
        """How many characters all but the names take."""
        numbers = max(map(len, self.numbers), default=-_GAP) + _GAP
        return numbers + sum(_GAP + column.width for column in columns)

    def _least_name_width(self) -> int:
        longest = max(map(len, (self.heading, *self.names)))
        different = len(set(self.names))
        least = next(
            (w for w in _NAME_WIDTHS if len(set(words.shorten_all(self.names, w))) == different),
            _NAME_WIDTHS[0],
        )
        return min(longest, least)
