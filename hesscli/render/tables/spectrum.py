"""A spectrum as people read it in a terminal: its ends, sums over it, and layers."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hesscli.render import words
from hesscli.render.tables.shared import ending, proof_line
from hesscli.render.terminal import (
    GAP,
    Column,
    Facts,
    FittedRows,
    Plainable,
    after_gap,
    facts,
    grid,
    ruled_table,
)
from hesscli.results import (
    Condition,
    Eigenvalue,
    LayerSpectrum,
    SpectralFunction,
    SpectrumResult,
)

_MOST_NAMED = 3
_MOST_LAYERS = 40
_NAMES = {
    "trace": "trace",
    "squared_norm": "sum of squares",
    "negative_mass": "negative mass",
    "stable_rank": "stable rank",
    "effective_rank": "effective rank",
}


def spectrum_table(result: SpectrumResult, full: bool = False) -> RenderableType:
    """Lay out the answer of ``hesscli spectrum``.

    Args:
        result: the answer.
        full: list every layer, however many there are.

    Returns:
        Something that a rich console prints at any width and in any encoding.
    """
    return Plainable(
        Group(
            proof_line(result.problem),
            GAP,
            *_headline(result),
            GAP,
            _eigenvalues(result),
            facts(_eigenvalue_notes(result), style="dim"),
            GAP,
            _sums(result),
            *_sum_notes(result),
            *after_gap(_blocks(result, full)),
            *ending(
                result,
                "the bar of each largest eigenvalue",
                f"--steps {2 * result.steps} goes twice as deep",
                "the bars above",
                (words.count(result.method.num_probes, "start vector"),),
            ),
        )
    )


def _headline(result: SpectrumResult) -> tuple[RenderableType, ...]:
    top = result.eigenvalues[0]
    line = Text(f"largest eigenvalue of the {words.matrix_name(result.problem)}  ")
    line.append(words.with_error(top.value, top.residual), style="bold")
    details = [words.standing_apart(result.outliers), *words.compared_with_classes(result.outliers)]
    if result.condition is not None:
        details.append(_condition(result.condition))
    if result.exact is not None and result.exact.distance is not None:
        off = words.percent(result.exact.distance)
        details.append(f"density off by {off} of the mean size, against the dense matrix")
    return line, facts(details, indent=2, style="dim")


def _condition(condition: Condition) -> str:
    low, high = (words.number(end) for end in condition.interval)
    damping = words.number(condition.damping)
    return f"condition number with damping {damping} between {low} and {high}"


def _eigenvalues(result: SpectrumResult) -> Table:
    table = ruled_table()
    table.add_column("", justify="right", no_wrap=True)
    for heading in ("eigenvalue", "±", "copies"):
        if heading != "copies" or _has_copies(result):
            table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("its vector lies in")
    for index, (rank, eigenvalue) in enumerate(ranked(result.eigenvalues)):
        if eigenvalue.end == "bottom" and not (eigenvalue.settled or rank == -1):
            continue
        table.add_row(
            Text(str(rank) if eigenvalue.settled or abs(rank) == 1 else "?"),
            *_value(eigenvalue),
            *([Text(words.count(eigenvalue.copies))] if _has_copies(result) else []),
            Text(_whereabouts(result, index)),
            style="" if known(eigenvalue) else "dim",
        )
    return table


def ranked(eigenvalues: tuple[Eigenvalue, ...]) -> list[tuple[int, Eigenvalue]]:
    """Each with its place: 1 the largest, -1 the smallest."""
    top = [one for one in eigenvalues if one.end == "top"]
    bottom = [one for one in eigenvalues if one.end == "bottom"]
    return [*enumerate(top, 1), *enumerate(bottom, -len(bottom))]


def known(eigenvalue: Eigenvalue) -> bool:
    """Whether its sign and size are known at all."""
    return eigenvalue.residual < abs(eigenvalue.value)


def _has_copies(result: SpectrumResult) -> bool:
    return any(eigenvalue.copies > 1 for eigenvalue in result.eigenvalues)


def _value(eigenvalue: Eigenvalue) -> tuple[Text, Text]:
    value, bar = words.rounded_pair(eigenvalue.value, eigenvalue.residual)
    return Text(value), Text(bar)


def _whereabouts(result: SpectrumResult, index: int) -> str:
    """The layers with the largest parts; none where the vector may be another's."""
    if not result.eigenvalues[index].has_vector:
        return "-"
    parts = [(layer.participation[index], layer.name) for layer in result.layers]
    largest = sorted(parts, key=lambda part: -part[0])[:_MOST_NAMED]
    names = [layer.name for layer in result.layers]
    short = dict(zip(names, words.shorten_all(names, 24), strict=True))
    return ", ".join(f"{short[name]} {words.percent(part)}" for part, name in largest)


def _eigenvalue_notes(result: SpectrumResult) -> list[str]:
    notes = ["± r: an eigenvalue lies within r"]
    if not all(one.has_vector for one in result.eigenvalues):
        notes.append("-: the vector is not known")
    if not all(one.settled for one in result.eigenvalues if one.end == "top"):
        notes.append("?: others may lie between")
    unsettled = sum(one.end == "bottom" and not one.settled for one in result.eigenvalues)
    if unsettled > 1:
        notes.append("smallest ones that have not settled: see the JSON")
    return notes


def _sums(result: SpectrumResult) -> RenderableType:
    rows = []
    for name, label in _NAMES.items():
        function: SpectralFunction = getattr(result.functions, name)
        rows.append((label, words.spectral_sum(function), _doubt(result, function)))
    return grid(rows, unbroken=(1,), right=(1,))


def _doubt(result: SpectrumResult, function: SpectralFunction) -> str:
    """Why there is no error bar."""
    if result.exact is not None:
        return "of the dense matrix"
    if function.stderr == 0 and result.status != "exact" and result.method.num_probes > 1:
        return "the same from every start vector"
    if function.value is None or function.stderr is not None:
        return ""
    if function.depth_change is None:
        return "no error bar from one start vector" if result.method.num_probes < 2 else ""
    changed = words.number(abs(function.depth_change), 2)
    return f"no error bar: the last half of the steps changed it by {changed}"


def _sum_notes(result: SpectrumResult) -> Iterator[Facts]:
    if result.status == "exact" or result.exact is not None or result.method.num_probes < 2:
        return
    number = words.count(result.method.num_probes, "start vector")
    yield facts([f"± 95%, between {number}"], style="dim")


def _blocks(result: SpectrumResult, full: bool) -> Iterator[RenderableType]:
    """The blocks of layers that were explored."""
    explored = [layer for layer in result.layers if layer.functions is not None]
    layers = explored if full else explored[:_MOST_LAYERS]
    if not layers:
        return
    yield FittedRows(
        "block of",
        [layer.name for layer in layers],
        [
            Column(3, "parameters", [words.count(layer.num_parameters) for layer in layers]),
            Column(6, "largest", [_end(layer, 0) for layer in layers]),
            Column(5, "smallest", [_end(layer, -1) for layer in layers]),
            Column(4, "trace", [_sum(layer, "trace") for layer in layers]),
            Column(2, "negative", [_negative(layer) for layer in layers]),
            Column(1, "eff. rank", [_sum(layer, "effective_rank") for layer in layers]),
        ],
    )
    if len(layers) < len(explored):
        yield Text(f"{len(explored) - len(layers)} more: see the JSON", style="dim")


def _end(layer: LayerSpectrum, place: int) -> str:
    assert layer.eigenvalues is not None  # explored
    return _short(layer.eigenvalues[place])


def _sum(layer: LayerSpectrum, name: str) -> str:
    return words.spectral_sum(getattr(layer.functions, name))


def _negative(layer: LayerSpectrum) -> str:
    assert layer.functions is not None  # explored
    mass = layer.functions.negative_mass.value
    return "-" if mass is None else words.percent(mass)


def _short(eigenvalue: Eigenvalue) -> str:
    if not known(eigenvalue):
        return f"0 ± {words.number(abs(eigenvalue.value) + eigenvalue.residual, 2)}"
    return words.number(eigenvalue.value, 4)
