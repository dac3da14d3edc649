"""Sensitivities as people read them in a terminal: the window, the solve, and the layers."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.text import Text

from hesscli.render import perturbations, words
from hesscli.render.ihvp_details import layer_details
from hesscli.render.ihvp_rows import change_rows, saliency_rows
from hesscli.render.layout import GAP, Facts, Plainable, facts
from hesscli.render.outcome import cost_line, status_line
from hesscli.render.proof import proof_line
from hesscli.render.solve_lines import solve_lines, sweep_table, window_lines
from hesscli.results import IhvpResult, LayerSensitivity

_MANY_LAYERS = 40
_HIGHEST_LAYERS = 30


def ihvp_table(
    result: IhvpResult, shown: tuple[str, ...] | None = None, full: bool = False
) -> RenderableType:
    """Lay out the answer of ``hesscli ihvp``.

    Args:
        result: the answer.
        shown: the names of the layers to list; all where None. Ranks stay those among all.
        full: list every layer, however many there are, and every change of each.

    Returns:
        Something that a rich console prints at any width and in any encoding.
    """
    selected = [layer for layer in result.layers if shown is None or layer.name in shown]
    selected.sort(key=lambda layer: layer.rank)
    many = len(selected) > _MANY_LAYERS and not full
    visible = selected[:_HIGHEST_LAYERS] if many else selected
    return Plainable(
        Group(
            proof_line(result.problem),
            GAP,
            *window_lines(result),
            GAP,
            *solve_lines(result),
            *_layers(result, visible, _listing(result, visible, selected)),
            *(_details(visible) if full else ()),
            *_after_gap(sweep_table(result)),
            GAP,
            _status(result),
            cost_line(result.cost),
            _method_line(result),
        )
    )


def _layers(
    result: IhvpResult, visible: list[LayerSensitivity], listing: list[str]
) -> Iterator[RenderableType]:
    if visible:
        yield from _after_gap(saliency_rows(visible, listing))
        yield from _after_gap(change_rows(result, visible))


def _details(layers: list[LayerSensitivity]) -> Iterator[RenderableType]:
    for layer in layers:
        yield from _after_gap(layer_details(layer))


def _after_gap(lines: Iterator[RenderableType]) -> Iterator[RenderableType]:
    """The lines with an empty one before them, if there are any."""
    for index, line in enumerate(lines):
        if index == 0:
            yield GAP
        yield line


def _listing(
    result: IhvpResult, visible: list[LayerSensitivity], selected: list[LayerSensitivity]
) -> list[str]:
    """Say which layers have no row, and how sure the whole ranking is."""
    notes = []
    if result.ranking is not None and result.ranking.half_correlation is not None:
        agreement = words.correlation(result.ranking.half_correlation)
        notes.append(f"over all weights, half-windows agree to {agreement}")
    if len(visible) < len(selected):
        hidden = words.count(len(selected) - len(visible), "lower layer")
        notes.append(f"{hidden} not listed: see the JSON")
    every = len(result.ranking.layers) if result.ranking is not None else len(selected)
    if len(selected) < every:
        notes.append(f"{words.count(len(selected))} of {words.count(every, 'layer')} selected")
    return notes


def _status(result: IhvpResult) -> Text:
    if result.status == "converged" and not result.layers and result.solve.refinement is None:
        return Text.assemble(("converged", "bold green"), ": solved with the window")
    subject = "each prediction" if result.layers else "the residual"
    return status_line(result, subject, _shortfall(result))


def _shortfall(result: IhvpResult) -> str:
    """What fell short, and what would help."""
    refinement = result.solve.refinement
    if refinement is not None and not refinement.converged:
        if refinement.negative_curvature is not None:
            return "with a larger --damping, or --matrix ggn, the solve can go on"
        return f"{_longer(result)}, or accept --refine {refinement.residual:.1e}"
    certainty = perturbations.least_certain(result.layers)
    accept = f", or accept --rtol {words.percent(certainty)}" if certainty else ""
    return _longer(result) + accept


def _longer(result: IhvpResult) -> str:
    seconds = math.ceil(4 * result.cost.seconds)
    time = f"{seconds}s" if seconds < 120 else f"{math.ceil(seconds / 60)}m"
    return f"--budget {time} (four times as long)"


def _method_line(result: IhvpResult) -> Facts:
    method = result.method
    items = [method.name, f"{method.mode} mode", f"seed {method.seed}"]
    return facts(items + ([method.note] if method.note else []), style="dim")
