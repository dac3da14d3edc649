"""One layer's sensitivity in full detail."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from hesscli.render import perturbations, words
from hesscli.render.fitted import Column, FittedRows
from hesscli.render.layout import Facts, facts
from hesscli.results import LayerSensitivity, Perturbation

_HOLDS = {True: "yes", False: "no", None: "-"}


def layer_details(layer: LayerSensitivity) -> Iterator[RenderableType]:
    """A heading, and under it quantiles and every change of the layer."""
    yield Facts(
        (
            Text(words.shorten(layer.name, 60), style="bold"),
            Text(words.count(layer.num_parameters, "weight")),
            Text(f"rank {layer.rank}"),
            Text(_leverage(layer)),
        )
    )
    yield facts(_correlations(layer), indent=2)
    if layer.saliency.quantiles:
        yield facts(
            (
                f"{_level(quantile.level)} {words.with_error(quantile.value, quantile.stderr)}"
                for quantile in layer.saliency.quantiles
            ),
            indent=2,
        )
    if layer.perturbations:
        yield Padding(_changes(layer.perturbations), (0, 0, 0, 2), expand=False)


def _leverage(layer: LayerSensitivity) -> str:
    share = f"leverage {words.percent(layer.leverage)}"
    if perturbations.ranks_by_magnitude(layer):
        return f"{share}: this ranking is magnitude"
    return share


def _correlations(layer: LayerSensitivity) -> Iterator[str]:
    saliency = layer.saliency
    yield f"mean saliency {words.with_error(saliency.mean, saliency.stderr)}"
    yield f"half-windows agree to {words.correlation(layer.half_correlation)}"
    yield f"rank correlation with |w| {words.correlation(layer.magnitude_correlation)}"


def _level(level: float) -> str:
    return "median" if level == 0.5 else f"{100 * level:g}%"


def _changes(changes: tuple[Perturbation, ...]) -> FittedRows:
    values: dict[str, tuple[int, list[float | None]]] = {
        "linear": (8, [change.linear for change in changes]),
        "quadratic": (7, [change.quadratic for change in changes]),
        "sum": (1, [perturbations.predicted(change) for change in changes]),
        "± s.e.": (5, [change.stderr for change in changes]),
        "HAWQ": (3, [change.hawq for change in changes]),
    }
    if any(change.measured is not None for change in changes):
        values["measured"] = (6, [change.measured for change in changes])
    columns = [
        Column(rank, heading, [Text(_number(value)) for value in column])
        for heading, (rank, column) in values.items()
    ]
    if any(change.holds is not None for change in changes):
        columns.append(Column(4, "holds", [Text(_HOLDS[change.holds]) for change in changes]))
        columns.append(Column(2, "order", [Text(_order(change)) for change in changes]))
    return FittedRows("change", [perturbations.label(change) for change in changes], columns)


def _number(value: float | None) -> str:
    return "-" if value is None else words.number(value, 2)


def _order(change: Perturbation) -> str:
    return "-" if change.order is None else f"{change.order:.1f}"
