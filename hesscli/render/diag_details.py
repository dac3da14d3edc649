"""One layer's diagonal in full detail."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hesscli.render import words
from hesscli.render.layout import Facts, Name, facts
from hesscli.results import BlockReport, Entry, Interval, LayerDiagonal


def layer_details(layer: LayerDiagonal) -> Iterator[RenderableType]:
    """A heading, and under it quantiles, largest entries and what block averages keep."""
    yield _heading(layer)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_row("entries", _moments(layer))
    if layer.quantiles:
        table.add_row("quantiles", _quantiles(layer))
    if layer.largest:
        table.add_row("largest", _largest(layer.largest))
    if words.is_averaged(layer.block):
        table.add_row("variance", _variances(layer.block))
    table.add_row("blocks", Group(*_blocks(layer.block)))
    yield Padding(table, (0, 0, 0, 2), expand=False)


def _heading(layer: LayerDiagonal) -> Facts:
    trace = words.with_error(layer.estimate, words.half_width(layer.interval))
    return Facts(
        (
            Text(words.shorten(layer.name, 60), style="bold"),
            Text(words.count(layer.num_parameters, "parameter")),
            Text(f"trace {trace} ({layer.status})"),
        )
    )


def _moments(layer: LayerDiagonal) -> Facts:
    negative = f"negative {words.percent(layer.negative_fraction)}"
    if layer.negative_stderr:
        negative += f" ± {words.percent(layer.negative_stderr)}"
    return facts(
        (
            f"mean {words.with_error(layer.mean, layer.mean_stderr)}",
            f"std {words.with_error(layer.std, layer.std_stderr)}",
            negative,
        )
    )


def _quantiles(layer: LayerDiagonal) -> Facts:
    return facts(
        f"{_level(quantile.level)} {words.with_error(quantile.value, quantile.stderr)}"
        for quantile in layer.quantiles
    )


def _level(level: float) -> str:
    return {0.0: "least", 0.5: "median", 1.0: "greatest"}.get(level, f"{100 * level:g}%")


def _largest(entries: tuple[Entry, ...]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(no_wrap=True)
    for entry in entries:
        place = f"[{', '.join(map(str, entry.index))}]" if entry.index else ""
        value = words.with_error(entry.estimate, entry.stderr)
        table.add_row(Name(entry.parameter + place), Text(value))
    return table


def _variances(block: BlockReport) -> Facts:
    parts = [
        f"between blocks {_with_interval(block.between_variance, block.between_interval)}",
        f"within {_with_interval(block.within_variance, block.within_interval)}",
    ]
    if block.noise_variance is not None:
        parts.append(f"noise of a block's mean {words.number(block.noise_variance, 2)}")
    return facts(parts)


def _blocks(block: BlockReport) -> Iterator[Text]:
    if words.is_averaged(block):
        share = words.share_within(block.explained, block.explained_interval)
        yield Text(f"{words.count(block.count)} by rule {block.rule} keep {share}")
    yield Text(block.verdict)


def _with_interval(value: float, interval: Interval) -> str:
    low, high = (words.number(end, 2) for end in interval)
    return words.number(value, 2) + (f" ({low} to {high})" if low != high else "")
