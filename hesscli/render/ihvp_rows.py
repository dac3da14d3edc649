"""One row for each layer's saliencies, and one for what changes of its weights do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import RenderableType
from rich.text import Text

from hesscli.render import bins, perturbations, words
from hesscli.render.fitted import Column, FittedRows
from hesscli.render.layout import facts
from hesscli.render.sparkline import cells_for, sparkline
from hesscli.results import HOLDS_WITHIN, LOW_LEVERAGE, IhvpResult, LayerSensitivity, Perturbation

# The changes that stay where there is little room, with what was measured of the first two.
_HEADLINES = (("round", 4.0), ("prune", 0.5), ("round", 3.0), ("round", 8.0), ("prune", 0.9))
_WITH_MEASURED = 2
_MOST_NAMES = 3


def saliency_rows(layers: list[LayerSensitivity], listing: list[str]) -> Iterator[RenderableType]:
    """Rank, mean, certainty and spread of each layer's saliencies.

    Args:
        layers: by rank.
        listing: which layers have no row, in words.
    """
    spectra = bins.trimmed([layer.saliency.histogram for layer in layers])
    cells = cells_for(spectra[0].edges) if spectra else ()
    means = [words.rounded_pair(layer.saliency.mean, layer.saliency.stderr) for layer in layers]
    yield Text("layers by mean saliency: a ranking, not a loss change", style="dim")
    yield FittedRows(
        "layer",
        [layer.name for layer in layers],
        [
            _column(2, "weights", (words.count(layer.num_parameters) for layer in layers)),
            _column(9, "mean\nsaliency", (mean for mean, _ in means)),
            _column(6, "± s.e.", (error for _, error in means)),
            _column(7, "above\nnext", (_above(layer) for layer in layers)),
            _column(8, "leverage", (words.probability(layer.leverage) for layer in layers)),
            _column(8, "ranking\nis", (perturbations.ranked_by(layer) for layer in layers)),
            _column(3, "halves", (words.correlation(x.half_correlation) for x in layers)),
            _column(1, "|w|", (words.correlation(x.magnitude_correlation) for x in layers)),
            Column(5, "spread", [sparkline(spectrum, cells) for spectrum in spectra], "left"),
        ],
        numbers=tuple(str(layer.rank) for layer in layers),
        styles=tuple("dim" if perturbations.ranks_by_magnitude(x) else "" for x in layers),
    )
    notes = [
        "above next: probability of a higher mean",
        "leverage: median share that data and not damping decides",
        "halves, |w|: rank correlation of two half-windows, and with |w|",
    ]
    if spectra and (edges := spectra[0].edges):
        ends = (words.number(end, 2) for end in (edges[0], edges[-1]))
        notes.append(f"spread: from {' to '.join(ends)}, log scales")
    yield facts([*notes, *listing], style="dim")
    yield from _magnitude_warning(layers)


def _magnitude_warning(layers: list[LayerSensitivity]) -> Iterator[Text]:
    """Where the ranking says no more than the weights themselves."""
    short = words.shorten_all([layer.name for layer in layers], 32)
    pairs = zip(short, layers, strict=True)
    names = [name for name, layer in pairs if perturbations.ranks_by_magnitude(layer)]
    if not names:
        return
    which = ", ".join(names[:_MOST_NAMES])
    if len(names) > _MOST_NAMES:
        which = words.count(len(names), "layer")
    limit = words.percent(LOW_LEVERAGE)
    yield Text(f"{which}: leverage below {limit}, this ranking is magnitude |w|", style="yellow")


def _above(layer: LayerSensitivity) -> str:
    return "-" if layer.above_next is None else words.probability(layer.above_next)


def change_rows(result: IhvpResult, layers: list[LayerSensitivity]) -> Iterator[RenderableType]:
    """What is predicted of pruning or rounding a layer, beside what was measured."""
    columns = list(_change_columns(layers))
    if not columns:
        return
    yield Text(
        f"predicted change of the loss ({words.number(result.problem.loss, 4)}) "
        "where one layer is rounded or pruned",
        style="dim",
    )
    yield FittedRows(
        "layer",
        [layer.name for layer in layers],
        columns,
        numbers=tuple(str(layer.rank) for layer in layers),
    )
    changes = [change for layer in layers for change in layer.perturbations]
    notes = ["one grid a channel", "prune: the least salient weights set to zero"]
    if any(change.holds is False for change in changes):
        limit = words.percent(HOLDS_WITHIN)
        notes.append(f"!: off by more than {limit} of |linear| + |quadratic|")
    certainty = perturbations.least_certain(layers)
    if certainty:
        notes.append(f"two standard errors: at most {words.percent(certainty)} of a prediction")
    yield facts(notes, style="dim")


def _change_columns(layers: Sequence[LayerSensitivity]) -> Iterator[Column]:
    for kind, level in _kinds(layers):
        place = _HEADLINES.index((kind, level)) if (kind, level) in _HEADLINES else len(_HEADLINES)
        found = [_change(layer, kind, level) for layer in layers]
        heading = f"{level:g} bit" if kind == "round" else f"prune\n{words.percent(level)}"
        rank = 2 * (len(_HEADLINES) - place)
        yield _column(rank, heading, map(_predicted, found))
        if place < _WITH_MEASURED and any(
            change and change.measured is not None for change in found
        ):
            yield _column(rank - 1, "measured", map(_measured, found))


def _kinds(layers: Iterable[LayerSensitivity]) -> list[tuple[str, float]]:
    """Rounding from fine to coarse, then pruning from little to much."""
    kinds = {(str(change.kind), change.level) for layer in layers for change in layer.perturbations}
    rounded = sorted((kind for kind in kinds if kind[0] == "round"), key=lambda kind: -kind[1])
    return rounded + sorted(kind for kind in kinds if kind[0] == "prune")


def _change(layer: LayerSensitivity, kind: str, level: float) -> Perturbation | None:
    """The change of a layer, with one grid a channel where there are two."""
    found = [c for c in layer.perturbations if (c.kind, c.level) == (kind, level)]
    return min(found, key=lambda change: change.granularity == "tensor", default=None)


def _predicted(change: Perturbation | None) -> str:
    return "-" if change is None else words.number(perturbations.predicted(change), 2)


def _measured(change: Perturbation | None) -> str:
    if change is None or change.measured is None:
        return "- "
    return words.number(change.measured, 2) + ("!" if change.holds is False else " ")


def _column(rank: int, heading: str, cells: Iterable[str]) -> Column:
    return Column(rank, heading, [Text(cell) for cell in cells])
