"""What a terminal shows of a window of gradients, the solve with it, and other dampings."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hesscli.render import words
from hesscli.render.fitted import Column, FittedRows
from hesscli.render.layout import facts
from hesscli.results import (
    LARGE_RESIDUAL,
    DampingPoint,
    IhvpResult,
    Refinement,
    WindowReport,
)

_ROWS = {
    "sampled": "gradients of sampled labels, for the Gauss-Newton matrix",
    "example": "gradients of single examples, for the empirical Fisher matrix",
    "microbatch": "mean gradients of a few examples, for a part of the empirical Fisher matrix",
}


def window_lines(result: IhvpResult) -> Iterator[RenderableType]:
    """Which gradients stand for the matrix, and how they are damped."""
    window = result.window
    line = Text("window  ").append(words.seen_by(result), style="bold")
    line.append(f", damping {words.number(window.damping)}")
    yield line.append(f" ({window.relative_damping:.3g} of its mean diagonal)")
    details = [_ROWS.get(window.row_kind.partition(":")[0], window.row_kind)]
    details += [_blocks(window, result.problem.num_parameters), window.dtype]
    details.append(words.human_bytes(window.num_bytes) + (" on disk" if window.file else ""))
    yield facts(details, indent=2, style="dim")


def _blocks(window: WindowReport, parameters: int) -> str:
    if window.largest_block >= parameters:
        return "in one block"
    return f"in diagonal blocks of at most {words.count(window.largest_block)} entries"


def solve_lines(result: IhvpResult) -> Iterator[RenderableType]:
    """The solution's length, and how well it solves the system with either matrix."""
    solve, residual = result.solve, result.residual
    line = Text(f"(window + damping) y = {solve.vector}  ")
    line.append(f"‖y‖ {words.number(solve.norm)}", style="bold")
    yield line.append(f", ‖{solve.vector}‖ {words.number(solve.vector_norm)}")
    if solve.refinement is not None:
        yield facts(_refined(solve.refinement), indent=2)
    matrix = words.matrix_name(result.problem)
    rows = (
        ("window + damping", residual.window, _window_remark(result)),
        (f"{matrix} + damping", residual.operator, _operator_remark(result)),
    )
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column()
    for name, value, remark in rows:
        known = "unknown" if value is None else words.number(value, 2)
        table.add_row(Text(name), Text(known), Text(remark))
    yield Text("relative residual of y against", style="dim")
    yield Padding(table, (0, 0, 0, 2), expand=False)


def _window_remark(result: IhvpResult) -> str:
    if result.solve.refinement is not None:
        return "y was refined for the matrix below"
    return "" if result.residual.window is None else "rounding alone"


def _operator_remark(result: IhvpResult) -> str:
    residual, matrix = result.residual.operator, words.matrix_name(result.problem)
    if residual is None or result.solve.refinement is not None or residual <= LARGE_RESIDUAL:
        return ""
    return f"large: --refine 1e-3 would solve with the {matrix} itself, not the window"


def _refined(refinement: Refinement) -> tuple[str, ...]:
    work = words.count(refinement.iterations, "iteration")
    if refinement.negative_curvature is not None:
        curvature = words.number(refinement.negative_curvature, 2)
        return (
            f"refinement ended after {work}",
            f"the matrix + damping curves downwards there ({curvature})",
            "a larger --damping, or --matrix ggn",
        )
    tolerance = words.number(refinement.tolerance, 2)
    if refinement.converged:
        return (f"refined to {tolerance} in {work} of conjugate gradients",)
    return (f"refinement did not reach {tolerance} in {work} of conjugate gradients",)


def sweep_table(result: IhvpResult) -> Iterator[RenderableType]:
    """One row for each damping, that of the run marked."""
    points, own = result.sweep, result.window.relative_damping
    if not points:
        return
    yield Text("what other dampings make of it", style="dim")
    yield FittedRows(
        "relative",
        [_damping(point, own) for point in points],
        [
            _column(2, "damping", [words.number(point.absolute, 2) for point in points]),
            _column(5, "y in\nspan", [_share(point.span_share) for point in points]),
            _column(3, "cosine\nto next", [words.correlation(point.cosine) for point in points]),
            _column(6, "median\nleverage", [words.probability(point.leverage) for point in points]),
            _column(
                4, "rank\ncorr.", [words.correlation(point.rank_correlation) for point in points]
            ),
            _column(7, "residual", [_residual(point.operator_residual) for point in points]),
        ],
        styles=tuple("bold" if is_own(point, own) else "" for point in points),
    )
    yield facts(
        (
            "y in span: share of ‖y‖ that the rows span",
            "cosine: of y to that of the next row",
            "rank corr.: of saliencies with this run's",
            f"residual: against {words.matrix_name(result.problem)} + damping",
        ),
        style="dim",
    )


def is_own(point: DampingPoint, relative: float) -> bool:
    """Tell whether a point of the sweep is at the run's own damping."""
    return math.isclose(point.relative, relative, rel_tol=1e-6)


def _damping(point: DampingPoint, own: float) -> str:
    return f"{point.relative:g}" + (" (run)" if is_own(point, own) else "")


def _column(rank: int, heading: str, cells: list[str]) -> Column:
    return Column(rank, heading, [Text(cell) for cell in cells])


def _share(share: float | None) -> str:
    return "-" if share is None else words.percent(share)


def _residual(value: float | None) -> str:
    return "-" if value is None else words.number(value, 2)
