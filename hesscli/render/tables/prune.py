"""A pruned network as people read it in a terminal: what it is worth, and which layers gave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from hesscli.render import words
from hesscli.render.tables.shared import (
    cost_lines,
    listed,
    listing_notes,
    proof_line,
    status_text,
)
from hesscli.render.terminal import GAP, Bar, Column, FittedRows, Plainable, facts
from hesscli.results import HOLDS_WITHIN, LayerPruned, PruneResult, Quality

NAMES = {"mfac": "M-FAC", "diagonal-fisher": "diagonal Fisher", "magnitude": "magnitude"}
"""What methods are called in a table or picture."""


_SEVERAL = 16
"""Steps that leave 90% sparse networks a fraction of the loss which one step leaves them
(tests/benchmarks/pruning.md)."""
_NO_BARS = "of the examples that the weights were chosen by: no bars, and others may lose more"


def prune_table(result: PruneResult, full: bool = False) -> RenderableType:
    """Lay out the answer of ``hesscli prune``.

    Args:
        result: the answer.
        full: list every layer, however many there are.

    Returns:
        Something that a rich console prints at any width and in any encoding.
    """
    layers = listed(result.layers, full, lambda layer: layer.num_weights)
    notes = listing_notes(layers, result, "smaller layer", "counts above are of all")
    return Plainable(
        Group(
            proof_line(result.problem),
            GAP,
            *_headline(result),
            GAP,
            _methods(result),
            facts([_NO_BARS], style="dim"),
            GAP,
            _rows(layers),
            *([facts(notes, style="dim")] if notes else []),
            GAP,
            status_text(result.status, _ending(result)),
            *cost_lines(result),
        )
    )


def _headline(result: PruneResult) -> Iterator[RenderableType]:
    sparsity = result.sparsity
    line = Text("sparsity  ")
    line.append(words.percent(sparsity.reached), style="bold")
    line.append(f"   {words.count(sparsity.num_zeros)} of {words.count(sparsity.num_weights)} ")
    yield line.append("weights are zero")
    window, found = result.window, result.methods[0]
    details = [
        *_pattern(result.pattern),
        "in each layer" if result.per_layer else "over all layers",
        words.count(result.steps, "step"),
        f"{words.count(window.rows)} {window.row_kind} rows",
        f"blocks of at most {words.count(window.largest_block)}",
        f"damping {words.number(window.relative_damping, 2)} of the mean diagonal",
    ]
    after, before = found.loss, result.before.loss
    if result.predicted is not None and after is not None and before is not None:
        change = words.number(after - before)
        name = words.matrix_name(result.problem)
        foreseen = words.number(result.predicted)
        mark = "!" if result.holds is False else ""
        details.append(
            f"the loss changed by {change}{mark}, where gradient and {name} foresee {foreseen}"
        )
    yield facts(details, indent=2, style="dim")
    if result.holds is False:
        yield facts(_too_far(result.steps), indent=2, style="dim")


def _too_far(steps: int) -> Iterator[str]:
    """What it means that the prediction is off, and what helps where all went at once."""
    yield (
        f"!: off by more than {words.percent(HOLDS_WITHIN)} of |linear| + |quadratic|: "
        "a quadratic does not reach so far"
    )
    if steps == 1:
        yield f"--steps {_SEVERAL} goes in shorter steps, and usually loses less"


def _pattern(pattern: str | None) -> Iterator[str]:
    if pattern is not None:
        yield (
            f"{pattern} blocks of outputs by inputs"
            if "x" in pattern
            else (f"{pattern} of consecutive inputs")
        )


def _methods(result: PruneResult) -> FittedRows:
    """Before, and after each method; with batch norm recalibrated in columns of their own."""
    rows: list[tuple[str, Quality, Quality | None]] = [("before", result.before, None)]
    rows += [(NAMES[one.name], one, one.recalibrated) for one in result.methods]
    names, plain, again = zip(*rows, strict=True)
    columns = [Column(6, "loss", [_loss(one) for one in plain])]
    if result.before.accuracy is not None:
        columns.append(Column(5, "accuracy", [_accuracy(one) for one in plain]))
    if any(again):
        columns.append(Column(4, "recalibrated", [_loss(one) for one in again]))
        if result.before.accuracy is not None:
            columns.append(Column(3, "accuracy", [_accuracy(one) for one in again]))
    return FittedRows("pruned by", names, columns)


def _loss(quality: Quality | None) -> str:
    if quality is None:
        return ""
    return "not finite" if quality.loss is None else words.number(quality.loss, 4)


def _accuracy(quality: Quality | None) -> str:
    if quality is None or quality.accuracy is None:
        return ""
    return f"{100 * quality.accuracy:.1f}%"


def _rows(layers: Sequence[LayerPruned]) -> FittedRows:
    shares = [layer.num_zeros / layer.num_weights for layer in layers]
    leverages = ["" if x.leverage is None else words.percent(x.leverage) for x in layers]
    return FittedRows(
        "layer",
        [layer.name for layer in layers],
        [
            Column(5, "weights", [words.count(layer.num_weights) for layer in layers]),
            Column(3, "zeros", [words.count(layer.num_zeros) for layer in layers]),
            Column(6, "sparsity", [words.percent(share) for share in shares]),
            Column(2, "", [Bar(share) for share in shares], "left"),
            Column(4, "leverage", leverages),
        ],
    )


def _ending(result: PruneResult) -> str:
    sparsity = result.sparsity
    if result.status == "converged":
        return "it has the sparsity that was asked for, and was compared"
    reached, asked = words.percent(sparsity.reached), words.percent(sparsity.asked)
    ended = "stopped early" if result.status == "interrupted" else "the budget ended it"
    if sparsity.reached < sparsity.asked and len(result.methods[0].steps) < result.steps:
        return f"{ended} at a sparsity of {reached}, where {asked} was asked for"
    return f"{ended} once it had the sparsity, before all was compared"
