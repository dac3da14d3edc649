"""What tables have in common: the proof, the trace, where its error comes from, what it took."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import RenderableType
from rich.text import Text

from hesscli.render import words
from hesscli.render.terminal import GAP, Facts, facts, grid
from hesscli.render.words import LayerT
from hesscli.results import (
    Answer,
    DiagResult,
    Layer,
    LayerTrace,
    MethodReport,
    ProblemReport,
    Quantile,
    Status,
)
from hesscli.units import duration, human_bytes, human_seconds

# -- The line that opens every table: which model was analysed, on what ----------------------------


def proof_line(problem: ProblemReport) -> Facts:
    """Parameters, loss, accuracy and gradient, by which users know their model."""
    parameters = words.count(problem.num_parameters, "parameter")
    if problem.restricted_to is not None:
        parameters += f" of {words.shorten(', '.join(problem.restricted_to), 48)}"
    aside = [
        f"{words.count(number)} {what}"
        for number, what in (
            (problem.num_unreached, "unreached by the loss"),
            (problem.num_frozen, "frozen"),
        )
        if number
    ]
    name = Path(problem.checkpoint.path).name if problem.checkpoint else "model in memory"
    lines = [] if problem.data is None else [problem.model_class]
    lines += [
        parameters + (f" ({', '.join(aside)})" if aside else ""),
        f"loss {words.number(problem.loss, 4)} ({problem.loss_name})",
    ]
    if problem.weight_decay:
        lines.append(f"weight decay {words.number(problem.weight_decay, 2)}")
    if problem.accuracy is not None:
        lines.append(f"accuracy {100 * problem.accuracy:.1f}%")
    lines += [
        f"‖gradient‖ {words.number(problem.gradient_norm)}",
        words.examples_used(problem) + _tokens_of(problem),
        f"{problem.dtype} on {problem.device}",
    ]
    if problem.training_mode:
        lines.append("training mode")
    checkpoint = Text(words.shorten(name, 48), style="bold")
    return Facts((checkpoint, *(Text(line) for line in lines)))


def _tokens_of(problem: ProblemReport) -> str:
    """How many tokens of which data the examples are, where no spec says what they are."""
    if problem.data is None:
        return ""
    tokens = f", {words.count(problem.num_tokens, 'token')}" if problem.num_tokens else ""
    return f"{tokens} of {Path(problem.data.path).name}"


# -- Where an estimate's error comes from, and which option would shrink it ------------------------


@dataclass(frozen=True)
class Noise:
    """One source of error in the interval: its size (one sigma) and what would shrink it."""

    source: str
    size: float
    remedy: str


def noises(result: words.Estimated) -> list[Noise]:
    """List the sources of error that the interval of the trace holds, the largest first."""
    trace = result.trace
    found = (
        Noise("probe noise", trace.probe_stderr, f"{more_work(result)} halves it"),
        Noise("data noise", _sampling_stderr(result), more_examples(result.problem)),
        Noise("label noise", trace.label_stderr or 0.0, "more --probes draw more labels"),
        Noise("rounding", trace.rounding_error or 0.0, _more_precision(result.problem)),
    )
    return sorted((noise for noise in found if noise.size > 0), key=lambda noise: -noise.size)


def more_examples(problem: ProblemReport) -> str:
    """Say which option would shrink the data noise, and by how much."""
    wanted = 4 * problem.num_examples
    if problem.num_examples_available is not None and wanted >= problem.num_examples_available:
        return "--examples all removes it"
    return f"--examples {wanted} (four times as many) halves it"


def more_work(result: words.Estimated) -> str:
    """Say which option buys four times the probes."""
    option = more_probes = f"--probes {4 * result.method.num_probes}"
    if result.method.batches_joined and result.status in ("budget", "interrupted"):
        # A number of probes would be of each of the batches that there was no time for. Where files
        # are written there is a ledger, and what it keeps is not done anew.
        resumed, times = ("--resume and ", 2) if result.files else ("", 3)
        option = f"{resumed}{larger_budget(result.cost.seconds, times)}"
    elif result.status == "budget":
        # Time or a given number of probes ended the run; these two together lift both limits.
        option = f"{more_probes} and {larger_budget(result.cost.seconds)}"
    elif result.status == "converged":
        # Else the tolerance did not end the run, so a tighter one would change nothing.
        option = _half_the_error(result) or more_probes
    return f"{option} (four times the work)"


def larger_budget(seconds: float, times: int = 3) -> str:
    """A budget by what it is to have more: how long start-up took, which is in any, nobody knows.

    Args:
        seconds: that a run took, by its own count.
        times: as many more.
    """
    return f"a --budget that is {duration(times * seconds)} larger"


def _half_the_error(result: words.Estimated) -> str | None:
    """The tolerance that is half of what was reached, where that is known."""
    if isinstance(result, DiagResult):
        bound = result.diagonal.relative_error_bound
        return None if bound is None else f"--rtol {words.percent(bound / 2)}"
    error, size = words.half_width(result.trace.interval), abs(result.trace.estimate)
    if not math.isfinite(error):
        return None
    if size <= error:
        return f"--atol {error / 2:.2g}"
    return f"--rtol {words.percent(error / size / 2)}"


def _more_precision(problem: ProblemReport) -> str:
    if problem.dtype == "float64":
        return "as small as float64 allows"
    wider = "float32" if problem.dtype == "bfloat16" else "float64"
    return f"--dtype {wider} removes most of it"


def _sampling_stderr(result: words.Estimated) -> float:
    """The part of ``data_stderr`` that is in the interval: what the unused examples could add."""
    available = result.problem.num_examples_available
    if available is None or result.trace.data_stderr is None:
        return 0.0
    unused = 1 - result.problem.num_examples / available
    return result.trace.data_stderr * math.sqrt(max(unused, 0.0))


# -- What the tables of all estimates have in common: the trace, its errors, and what it took ------


_MANY_LAYERS = 40
_LARGEST_LAYERS = 30


def trace_lines(result: words.Estimated) -> tuple[RenderableType, ...]:
    """The trace with its interval, and under it what it is made of."""
    trace, problem = result.trace, result.problem
    confidence = words.percent(trace.confidence)
    value = words.with_error(trace.estimate, words.half_width(trace.interval))
    line = Text(f"trace of the {words.matrix_name(problem)}  ")
    line.append(value, style="bold").append(f" ({confidence})")
    place = words.half_width(trace.interval)
    low, high = (words.rounded_pair(end, place)[0] for end in trace.interval)
    details = [f"between {low} and {high}"] if low != high else []
    if trace.gauss_newton is not None and trace.residual is not None:
        gauss_newton = words.rounded_pair(trace.gauss_newton, place)[0]
        residual = words.rounded_pair(trace.residual, place)[0]
        details.append(f"Gauss-Newton part {gauss_newton}, the rest {residual}")
    details.append(f"{words.number(trace.estimate / problem.num_parameters)} per parameter")
    if trace.population_interval is not None:
        population = trace.population_interval
        low, high = (words.rounded_pair(end, words.half_width(population))[0] for end in population)
        details.append(f"for unseen examples between {low} and {high}")
    return line, facts(details, indent=2, style="dim")


def error_budget(result: words.Estimated, heading: str) -> Iterator[RenderableType]:
    """Where the trace's error comes from, the largest source first, and what would shrink it."""
    found = noises(result)
    if not found:
        return
    known = math.isfinite(words.half_width(result.trace.interval))
    largest = "largest; " if len(found) > 1 and known else ""
    rows = [[noise.source, f"± {words.number(noise.size, 2)}", ""] for noise in found]
    rows[0][2] = f"{largest}{found[0].remedy}"
    yield GAP
    yield Text(f"{heading} ({_scale(found)})", style="dim")
    yield grid(rows, right=(1,), indent=2)
    if result.trace.data_stderr and result.problem.num_examples_available is None:
        size = words.number(result.trace.data_stderr, 2)
        yield Text(
            f"  data noise of ± {size} is left out: how many examples there are is not known",
            style="dim",
        )


def _scale(found: list[Noise]) -> str:
    """What the sizes are: the interval holds rounding as a bound, and the rest by its variance."""
    bounds = [noise.source == "rounding" for noise in found]
    if all(bounds):
        return "a bound"
    return "one standard error each" + ("; rounding is a bound" if any(bounds) else "")


def listed(layers: Sequence[LayerT], full: bool, size: Callable[[LayerT], float]) -> list[LayerT]:
    """The layers that get a row: all in full detail or where they are few, else the largest."""
    if full or len(layers) <= _MANY_LAYERS:
        return list(layers)
    return words.largest(layers, _LARGEST_LAYERS, size)


def listing_notes(
    visible: Sequence[Layer], result: Answer, kind: str, whole: str = "totals are of them all"
) -> list[str]:
    """Say which layers have no row.

    Args:
        visible: those that have one.
        result: the answer.
        kind: what the others are called, as in ``smaller layer``.
        whole: what does not depend on which layers were chosen, in words.
    """
    notes, selected = [], len(result.layers)
    if len(visible) < selected:
        notes.append(f"{words.count(selected - len(visible), kind)} not listed: see the JSON")
    if result.num_hidden:
        total = words.count(result.num_layers, "layer")
        notes.append(f"{words.count(selected)} of {total} selected, {whole}")
    return notes


def trace_notes(visible: Sequence[LayerTrace], result: words.Estimated) -> list[str]:
    """Say which layers have no row, and which rows are uncertain."""
    notes = listing_notes(visible, result, "smaller layer")
    uncertain = [layer.name for layer in visible if words.includes_zero(layer.interval)]
    if uncertain:
        names = words.few(uncertain, [layer.name for layer in visible])
        notes.append(f"{names}: the interval includes 0")
    return notes


def quantiles(found: Iterable[Quantile]) -> Iterator[str]:
    """Quantiles by their levels, as in ``median 0.15 ± 0.01``."""
    names = {0.0: "least", 0.5: "median", 1.0: "greatest"}
    for one in found:
        name = names.get(one.level, f"{100 * one.level:g}%")
        yield f"{name} {words.with_error(one.value, words.bar(one.stderr))}"


def ending(
    result: Answer, subject: str, remedy: str, accept: str, drawn: Sequence[str] = ()
) -> tuple[RenderableType, ...]:
    """How the run ended, what it took, and how it can be made again.

    Args:
        result: the answer.
        subject: what is compared with the tolerance.
        remedy: what would reach the tolerance where the run ended before it, if anything.
        accept: the tolerance that was reached, if any.
        drawn: the random vectors that the numbers were made with, in words.
    """
    return GAP, status_line(result, subject, remedy, accept), *cost_lines(result, drawn)


def status_line(result: Answer, subject: str, remedy: str, accept: str) -> Text:
    """How the run ended, in words; arguments as of :func:`ending`."""
    part, every = result.method.batches_measured, result.problem.num_batches
    if part is not None and result.status in ("budget", "data-limited"):
        missed = f"{tolerance(result.method)} was not reached by {part} of {every} batches"
        return status_text(result.status, f"{missed}; hesscli join adds the others")
    shortfall = "; or ".join(filter(None, (remedy, accept and f"accept {accept}")))
    meaning = {
        "exact": "no probe noise, and every example was used",
        "converged": f"{subject} is within {tolerance(result.method)}",
        "budget": f"{tolerance(result.method)} was not reached within the limits; {shortfall}",
        "data-limited": "data noise alone exceeds the tolerance; " + more_examples(result.problem),
        "interrupted": f"stopped early; {subject} is that of the work done so far",
    }[result.status]
    return status_text(result.status, meaning)


def tolerance(method: MethodReport) -> str:
    """Name the error that would end a run, as it was typed."""
    relative = "" if method.rtol is None else f"{100 * method.rtol:g}%"
    absolute = "" if method.atol is None else f"± {method.atol:g}"
    known = " or ".join(filter(None, (relative, absolute)))
    return f"the tolerance of {known}" if known else "the tolerance"


def status_text(status: Status, meaning: str) -> Text:
    """A status in its colour, and what it means."""
    style = "green" if status in ("exact", "converged") else "yellow"
    return Text.assemble((status, f"bold {style}"), f": {meaning}")


def cost_lines(result: Answer, drawn: Sequence[str] = ()) -> tuple[Facts, Facts]:
    """What the run took, and how the numbers were made, for whoever wants them again."""
    cost, method = result.cost, result.method
    work = (
        f"{words.amount(cost.products)} products",
        f"the work of {words.amount(cost.gradients)} full gradients",
        human_seconds(cost.seconds),
        f"{human_bytes(cost.peak_bytes)} peak memory",
    )
    made = (method.name, *drawn, f"{method.mode} mode", f"seed {method.seed}", method.note)
    return facts(work), facts(filter(None, made), style="dim")


def probes_drawn(method: MethodReport) -> tuple[str, ...]:
    """How many probes there were, of which kind."""
    if not method.num_probes:
        return ("no probes",)
    probes = f"{words.count(method.num_probes)} {method.probe_distribution} probes"
    return probes, f"{method.probe_design} design"
