"""The line that opens every table: which model was analysed, on what."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text

from hesscli.render import words
from hesscli.render.layout import Facts
from hesscli.results import ProblemReport


def proof_line(problem: ProblemReport) -> Facts:
    """Parameters, loss, accuracy and gradient, by which users know their model."""
    parameters = words.count(problem.num_parameters, "parameter")
    aside = [
        f"{words.count(number)} {what}"
        for number, what in (
            (problem.num_unreached, "unreached by the loss"),
            (problem.num_frozen, "frozen"),
        )
        if number
    ]
    name = Path(problem.checkpoint.path).name if problem.checkpoint else "model in memory"
    lines = [
        parameters + (f" ({', '.join(aside)})" if aside else ""),
        f"loss {words.number(problem.loss, 4)} ({problem.loss_name})",
    ]
    if problem.weight_decay:
        lines.append(f"weight decay {words.number(problem.weight_decay, 2)}")
    if problem.accuracy is not None:
        lines.append(f"accuracy {100 * problem.accuracy:.1f}%")
    lines += [
        f"‖gradient‖ {words.number(problem.gradient_norm)}",
        words.examples_used(problem),
        f"{problem.dtype} on {problem.device}",
    ]
    if problem.training_mode:
        lines.append("training mode")
    checkpoint = Text(words.shorten(name, 48), style="bold")
    return Facts((checkpoint, *(Text(line) for line in lines)))
