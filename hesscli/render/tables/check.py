"""What ``hesscli check`` found, as people read it in a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hesscli.render import words
from hesscli.render.shared import proof_line
from hesscli.render.terminal import GAP, Facts, Plainable, facts, ruled_table
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
            _unit_costs(result.plan),
            GAP,
            _planned_commands(result.plan),
            *_plan_notes(result.plan),
        )
    )


def _checks(checks: tuple[Check, ...]) -> Table:
    table = Table.grid(padding=(0, 2))
    for check in checks:
        mark = Text(_MARKS[check.state], style=_STYLES[check.state])
        measured = words.number(check.value, 2) if check.value is not None else ""
        bound = f"bound {words.number(check.bound, 2)}" if check.bound is not None else ""
        table.add_row(mark, Text(check.name), Text(measured), Text(bound), Text(check.detail))
    return table


def _preflight(preflight: Preflight) -> Facts:
    items = [f"autodiff mode {preflight.mode}", f"attention kernel {preflight.attention_kernel}"]
    if preflight.fallback is not None:
        items.append(f"a faster mode was ruled out by {preflight.fallback}")
    if preflight.relative_rounding is not None:
        items.append(f"relative rounding error {words.number(preflight.relative_rounding, 2)}")
    else:
        items.append("rounding error unknown")
    return facts(items)


def _unit_costs(plan: Plan) -> Table:
    table = Table.grid(padding=(0, 2))
    for what, size in (
        ("one full gradient", human_seconds(plan.gradient_seconds)),
        (
            "one full product",
            f"{human_seconds(plan.product_seconds)}, "
            f"{human_bytes(plan.product_bytes)} beyond model and examples",
        ),
        ("model parameters", human_bytes(plan.parameter_bytes)),
        ("kept examples", human_bytes(plan.kept_bytes)),
    ):
        table.add_row(Text(what), Text(size))
    return table


def _planned_commands(plan: Plan) -> Table:
    table = ruled_table()
    table.add_column("command", no_wrap=True)
    for heading in ("products", "gradients", "time", "peak memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for planned in plan.commands:
        table.add_row(
            Text(planned.command),
            Text(words.amount(planned.products)),
            Text(words.amount(planned.gradients)),
            Text(human_seconds(planned.seconds)),
            Text(human_bytes(planned.peak_bytes)),
        )
    return table


def _plan_notes(plan: Plan) -> Iterator[Text]:
    for planned in plan.commands:
        if planned.note:
            yield Text(f"{planned.command}: {planned.note}", style="dim")
