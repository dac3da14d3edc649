"""One row for each layer's diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from hesscli.render import words
from hesscli.render.layout import Name, ruled_table
from hesscli.render.sparkline import axis_marks, cells_for, sparkline
from hesscli.results import Histogram, LayerDiagonal

_NAME_WIDTH = 11
"""A name is cut down to this before a column is given up for it."""
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
class DiagonalRows:
    """A table of layers and their spectra in as many columns as there is room for."""

    layers: list[LayerDiagonal]
    spectra: list[Histogram]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = self._columns()
        while columns and _width(columns) > options.max_width:
            columns.remove(min(columns, key=lambda column: column.rank))
        table = ruled_table()
        table.add_column("layer", vertical="bottom")
        for column in columns:
            table.add_column(
                column.heading, justify=column.justify, no_wrap=True, vertical="bottom"
            )
        for row, layer in enumerate(self.layers):
            uncertain = words.includes_zero(layer.interval)
            values = (column.cells[row] for column in columns)
            table.add_row(Name(layer.name), *values, style="dim" if uncertain else "")
        yield table

    def _columns(self) -> list[Column]:
        layers = self.layers
        cells = cells_for(self.spectra[0].edges) if self.spectra else ()
        spectra = [sparkline(histogram, cells) for histogram in self.spectra]
        means = [words.rounded_pair(layer.mean, layer.mean_stderr) for layer in layers]
        return [
            Column(2, "entries", [Text(words.count(layer.num_parameters)) for layer in layers]),
            Column(6, "mean", [Text(mean) for mean, _ in means]),
            Column(4, "± s.e.", [Text(error) for _, error in means]),
            Column(1, "std", [Text(_std(layer)) for layer in layers]),
            Column(5, "< 0", [Text(words.percent(layer.negative_fraction)) for layer in layers]),
            Column(7, f"spectrum\n{axis_marks(cells)}", spectra, "left"),
            Column(3, "blocks\nkeep", [Text(_kept(layer)) for layer in layers]),
        ]


def _width(columns: list[Column]) -> int:
    return _NAME_WIDTH + sum(_GAP + column.width for column in columns)


def _std(layer: LayerDiagonal) -> str:
    return words.rounded_pair(layer.std, layer.std_stderr)[0] if layer.std else "0"


def _kept(layer: LayerDiagonal) -> str:
    return words.percent(layer.block.explained) if words.is_averaged(layer.block) else "-"
