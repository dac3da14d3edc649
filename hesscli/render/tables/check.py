"""What ``hesscli check`` found, as people read it in a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.text import Text

from hesscli.render import words
from hesscli.render.tables.shared import proof_line
from hesscli.render.terminal import GAP, Column, Facts, FittedRows, Plainable, facts, grid
from hesscli.results import Check, CheckResult, CheckState, Plan, Preflight
from hesscli.units import human_bytes, human_seconds

_MARKS: dict[CheckState, str] = {"passed": "pass", "skipped": "skip", "not applicable": "n/a"}
_STYLES: dict[CheckState, str] = {"passed": "green", "skipped": "yellow", "not applicable": "dim"}


def check_table(result: CheckResult) -> RenderableType:
    """Lay out the answer of ``hesscli check``.

    Args:
        result: the answer.

    Returns:
        Something that a rich console prints at any width and in any encoding.
    """
    return Plainable(
        Group(
            proof_line(result.problem),
            GAP,
            _checks(result.preflight.checks),
            GAP,
            _preflight(result.preflight),
            GAP,
            _unit_costs(result.plan, result.problem.num_batches),
            GAP,
            _planned_commands(result.plan),
            *_plan_notes(result.plan),
        )
    )


def _checks(checks: tuple[Check, ...]) -> RenderableType:
    return grid(
        (
            Text(_MARKS[check.state], style=_STYLES[check.state]),
            check.name,
            words.number(check.value, 2) if check.value is not None else "",
            f"bound {words.number(check.bound, 2)}" if check.bound is not None else "",
            check.detail,
        )
        for check in checks
    )


def _preflight(preflight: Preflight) -> Facts:
    items = [f"autodiff mode {preflight.mode}", f"attention kernel {preflight.attention_kernel}"]
    if preflight.fallback is not None:
        items.append(f"a faster mode was ruled out by {preflight.fallback}")
    if preflight.relative_rounding is not None:
        items.append(f"relative rounding error {words.number(preflight.relative_rounding, 2)}")
    else:
        items.append("rounding error unknown")
    return facts(items)


def _unit_costs(plan: Plan, num_batches: int) -> RenderableType:
    product = human_seconds(plan.product_seconds)
    batches = "one batch" if num_batches == 1 else f"{words.count(num_batches)} batches"
    return grid(
        (
            ("one full gradient", human_seconds(plan.gradient_seconds)),
            (
                "one full product",
                f"{product}, {human_bytes(plan.product_bytes)} beyond model and examples",
            ),
            ("model parameters", human_bytes(plan.parameter_bytes)),
            ("kept examples", f"{human_bytes(plan.kept_bytes)} in {batches}"),
            *_ranks(plan, num_batches),
        )
    )


def _ranks(plan: Plan, num_batches: int) -> Iterator[tuple[str, str]]:
    """Into how many parts the work is dealt out, where that is more than one."""
    if plan.ranks > 1:
        most, idle = -(-num_batches // plan.ranks), plan.ranks - num_batches
        told = f"{plan.ranks}, with {most} of {num_batches} batches at most"
        yield "ranks", f"{told}, {idle} of them without any" if idle > 0 else told


def _planned_commands(plan: Plan) -> FittedRows:
    commands = plan.commands
    return FittedRows(
        "command",
        [planned.command for planned in commands],
        [
            Column(2, "products", [words.amount(planned.products) for planned in commands]),
            Column(1, "gradients", [words.amount(planned.gradients) for planned in commands]),
            Column(4, "time", [human_seconds(planned.seconds) for planned in commands]),
            Column(3, "peak memory", [human_bytes(planned.peak_bytes) for planned in commands]),
        ],
    )


def _plan_notes(plan: Plan) -> Iterator[Text]:
    for planned in plan.commands:
        if planned.note:
            yield Text(f"{planned.command}: {planned.note}", style="dim")
