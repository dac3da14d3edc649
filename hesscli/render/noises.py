"""Where an estimate's error comes from, and which option would shrink it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hesscli.render import words
from hesscli.results import DiagResult, ProblemReport


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
    if result.status == "budget":
        # Time or a given number of probes ended the run; these two together lift both limits.
        seconds = math.ceil(4 * result.cost.seconds)
        time = f"{seconds}s" if seconds < 120 else f"{math.ceil(seconds / 60)}m"
        option = f"{more_probes} --budget {time}"
    elif result.status == "converged":
        # Else the tolerance did not end the run, so a tighter one would change nothing.
        option = _half_the_error(result) or more_probes
    return f"{option} (four times the work)"


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
    return "--dtype float64 removes most of it"


def _sampling_stderr(result: words.Estimated) -> float:
    """The part of ``data_stderr`` that is in the interval: what the unused examples could add."""
    available = result.problem.num_examples_available
    if available is None or result.trace.data_stderr is None:
        return 0.0
    unused = 1 - result.problem.num_examples / available
    return result.trace.data_stderr * math.sqrt(max(unused, 0.0))
