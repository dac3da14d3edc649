"""Numbers, names and causes as people read them; shared by tables and pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hesscli.results import Interval, LayerTrace, ProblemReport, TraceResult

_NO_PLACE = 400  # beyond the smallest float

_MATRIX_NAMES = {
    "hessian": "Hessian",
    "ggn": "Gauss-Newton matrix",
    "fisher": "Fisher matrix",
    "empirical-fisher": "empirical Fisher matrix",
}


def with_error(value: float, half_width: float) -> str:
    """Write a number with as many digits as its error bar leaves it, as in ``1 234 ± 56``."""
    number, error = rounded_pair(value, half_width)
    return f"{number} ± {error}" if error else number


def rounded_pair(value: float, half_width: float) -> tuple[str, str]:
    """Round a number and its error bar to the same place.

    The error bar keeps two digits, or one where the second says nothing; the number at most six.

    Returns:
        Both as text. The error bar is empty where it is zero.
    """
    if not math.isfinite(value) or half_width == 0:
        return number(value, digits=6), ""
    if not math.isfinite(half_width):
        return number(value), "unknown"
    mantissa = f"{half_width:.1e}".split("e")[0]
    digits = 1 if mantissa.endswith(".0") and mantissa != "1.0" else 2
    place = _last_place(half_width, digits)
    scientific = _is_scientific(max(abs(value), half_width))
    return (
        _rounded(value, max(place, _last_place(value, 6)), scientific),
        _rounded(half_width, place, scientific or half_width < 1e-4),
    )


def number(value: float, digits: int = 3) -> str:
    """Write a number with a few significant digits and its thousands apart."""
    if not math.isfinite(value):
        return "unknown"
    return _digits(value, digits, _is_scientific(abs(value)))


def count(value: int, noun: str = "") -> str:
    """Write how many, as in ``4 096 examples``."""
    grouped = f"{value:,}".replace(",", " ")
    if not noun:
        return grouped
    return f"{grouped} {noun}" if value == 1 else f"{grouped} {noun}s"


def amount(value: float) -> str:
    """Write how much work: whole numbers where they are not small."""
    return count(round(value)) if value >= 10 and math.isfinite(value) else number(value, 2)


def percent(share: float) -> str:
    """Write a share, as in ``4.5%``."""
    return f"{_digits(100 * share, 2)}%" if math.isfinite(share) else "unknown"


def human_bytes(size: float) -> str:
    """Write an amount of memory, as in ``512 MiB``."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        units = size / 1024**power
        if units >= 0.9995:
            return f"{units:.1f} {unit}" if units < 9.95 else f"{units:.0f} {unit}"
    return f"{size:.0f} B"


def human_seconds(seconds: float) -> str:
    """Write a time span, as in ``12 ms``, ``3.4 s``, ``2 min 5 s`` or ``1 h 10 min``."""
    if seconds < 0.0995:
        return f"{_digits(1000 * seconds, 2)} ms"
    if seconds < 59.5:
        return f"{_digits(seconds, 2)} s"
    if seconds < 3599.5:
        return _two_units(seconds, 60, "min", "s")
    return _two_units(seconds / 60, 60, "h", "min")


def shorten(name: str, width: int) -> str:
    """Cut a name in the middle and make it printable.

    More of its end is kept, since that is where the names of layers differ.
    """
    name = "".join(letter if letter.isprintable() else "?" for letter in name)
    if len(name) <= width:
        return name
    tail = max(3 * width // 4, 1)
    return f"{name[: max(width - tail - 1, 0)]}…{name[-tail:]}"


def matrix_name(problem: ProblemReport) -> str:
    """Name the matrix that was analysed."""
    return _MATRIX_NAMES.get(problem.matrix, problem.matrix)


def examples_used(problem: ProblemReport) -> str:
    """Say how many examples were used, and of how many."""
    if problem.num_examples_available is None:
        return f"{count(problem.num_examples, 'example')} of an unknown number"
    if problem.num_examples == problem.num_examples_available:
        return f"all {count(problem.num_examples, 'example')}"
    return f"{count(problem.num_examples)} of {count(problem.num_examples_available, 'example')}"


def per_parameter(layer: LayerTrace) -> float:
    """The trace of a layer, shared among its parameters; an empty layer has none."""
    return layer.estimate / max(layer.num_parameters, 1)


def half_width(interval: Interval) -> float:
    """Half the width of an interval."""
    return (interval[1] - interval[0]) / 2


def includes_zero(interval: Interval) -> bool:
    """Tell whether not even the sign is known; an exact zero is known."""
    low, high = interval
    return low <= 0 <= high and low < high


@dataclass(frozen=True)
class Noise:
    """One source of error in the interval: its size (one sigma) and what would shrink it."""

    source: str
    size: float
    remedy: str


def noises(result: TraceResult) -> list[Noise]:
    """List the sources of error that the interval of the trace holds, the largest first."""
    trace = result.trace
    found = (
        Noise("probe noise", trace.probe_stderr, f"{_more_work(result)} halves it"),
        Noise("data noise", _sampling_stderr(result), more_examples(result.problem)),
        Noise("label noise", trace.label_stderr or 0.0, "more --probes draw more labels"),
        Noise("rounding", trace.rounding_error, _more_precision(result.problem)),
    )
    return sorted((noise for noise in found if noise.size > 0), key=lambda noise: -noise.size)


def more_examples(problem: ProblemReport) -> str:
    """Say which option would shrink the data noise, and by how much."""
    wanted = 4 * problem.num_examples
    if problem.num_examples_available is not None and wanted >= problem.num_examples_available:
        return "--examples all removes it"
    return f"--examples {wanted} (four times as many) halves it"


def _more_precision(problem: ProblemReport) -> str:
    if problem.dtype == "float64":
        return "as small as float64 allows"
    return "--dtype float64 removes most of it"


def _sampling_stderr(result: TraceResult) -> float:
    """The part of ``data_stderr`` that is in the interval: what the unused examples could add."""
    available = result.problem.num_examples_available
    if available is None or result.trace.data_stderr is None:
        return 0.0
    unused = 1 - result.problem.num_examples / available
    return result.trace.data_stderr * math.sqrt(max(unused, 0.0))


def _more_work(result: TraceResult) -> str:
    """The option that buys four times the probes."""
    error, size = half_width(result.trace.interval), abs(result.trace.estimate)
    more_probes = f"--probes {4 * result.method.num_probes}"
    if result.status == "budget":
        # Time or a given number of probes ended the run; these two together lift both limits.
        seconds = math.ceil(4 * result.cost.seconds)
        time = f"{seconds}s" if seconds < 120 else f"{math.ceil(seconds / 60)}m"
        option = f"{more_probes} --budget {time}"
    elif result.status != "converged" or not math.isfinite(error):
        # The tolerance did not end the run, so a tighter one would change nothing.
        option = more_probes
    elif size > error:
        option = f"--rtol {percent(error / size / 2)}"
    else:
        option = f"--atol {error / 2:.2g}"
    return f"{option} (four times the work)"


def _is_scientific(magnitude: float) -> bool:
    return magnitude != 0 and not 1e-3 <= magnitude < 1e7


def _digits(value: float, digits: int, scientific: bool = False) -> str:
    return _rounded(value, _last_place(value, digits), scientific)


def _last_place(value: float, digits: int) -> int:
    """The power of ten at which a number has so many significant digits; small for zero."""
    if value == 0:
        return -_NO_PLACE
    return int(f"{value:.{digits - 1}e}".split("e")[1]) - digits + 1


def _rounded(value: float, place: int, scientific: bool) -> str:
    value = round(value, -place) + 0.0  # no minus before a zero
    if value == 0 and (scientific or place <= -_NO_PLACE):
        return "0"
    if scientific:
        decimals = int(f"{value:e}".split("e")[1]) - place
        return f"{value:.{max(decimals, 0)}e}"
    return f"{value:,.{max(-place, 0)}f}".replace(",", " ")


def _two_units(amount: float, factor: int, large: str, small: str) -> str:
    whole, rest = divmod(round(amount), factor)
    return f"{whole} {large} {rest} {small}" if rest else f"{whole} {large}"
