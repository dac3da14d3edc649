"""Numbers and names as people read them; shared by tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from itertools import takewhile
from typing import TypeVar, overload

from hesscli.results import (
    Answer,
    BlockReport,
    DiagResult,
    IhvpResult,
    Interval,
    Layer,
    LayerTrace,
    Outliers,
    Perturbation,
    ProblemReport,
    PruneResult,
    SpectralFunction,
    SpectrumResult,
    TraceResult,
)
from hesscli.vocabulary import MATRICES

Estimated = TraceResult | DiagResult
"""The answers that hold an estimate of the trace."""

LayerT = TypeVar("LayerT", bound=Layer)

_MOST_NAMES = 3
_NO_PLACE = 400  # beyond the smallest float


def with_error(value: float, half_width: float | None) -> str:
    """Write a number with as many digits as its error bar leaves it, as in ``1 234 ± 56``."""
    number, error = rounded_pair(value, half_width)
    return f"{number} ± {error}" if error else number


def rounded_pair(value: float, half_width: float | None) -> tuple[str, str]:
    """Round a number and its error bar to the same place.

    The error bar keeps two digits, or one where the second says nothing; the number at most six.

    Returns:
        Both as text. The error bar is empty where it is zero.
    """
    half_width = math.inf if half_width is None else half_width
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


@overload
def bar(stderr: float) -> float: ...
@overload
def bar(stderr: float | None) -> float | None: ...
def bar(stderr: float | None) -> float | None:
    """What ± stands for wherever it is written: 95%, by a standard error that is scaled for it."""
    return None if stderr is None else 1.96 * stderr


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


def percent(share: float | None) -> str:
    """Write a share, as in ``4.5%``."""
    if share is None or not math.isfinite(share):
        return "unknown"
    return f"{_digits(100 * share, 2)}%"


def probability(value: float | None) -> str:
    """Write a probability, or a share that is never all, without claiming certainty."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "unknown"
    return ">99%" if value > 0.99 else "<1%" if value < 0.01 else f"{100 * value:.0f}%"


def correlation(value: float | None) -> str:
    """Write a correlation or a cosine, as in ``0.97``; a dash where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.2f}"


def shorten(name: str, width: int) -> str:
    """Cut a name in the middle and make it printable.

    More of its end is kept, since that is where the names of layers differ.
    """
    return _cut(_printable(name), width, _usual_head(width))


def shorten_all(names: Sequence[str], width: int) -> list[str]:
    """Shorten names where one is too long, first by the modules that all of them lie in.

    Each is cut where it can be told from the others, if there is such a place.
    """
    names = [_printable(name) for name in names]
    if len(names) > 1 and max(map(len, names)) > width:
        modules = zip(*(name.split(".")[:-1] for name in names), strict=False)
        shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, modules))
        names = ["…" * (shared > 0) + ".".join(name.split(".")[shared:]) for name in names]
    return [_told_apart(name, set(names) - {name}, width) for name in names]


def few(names: Sequence[str], every: Sequence[str]) -> str:
    """Name layers where they are few, else say how many: ``conv1, head`` or ``7 layers``.

    Args:
        names: of the layers.
        every: among which they are told apart.
    """
    if len(names) > _MOST_NAMES:
        return count(len(names), "layer")
    short = dict(zip(every, shorten_all(every, 32), strict=True))
    return ", ".join(short[name] for name in names)


def _told_apart(name: str, others: Set[str], width: int) -> str:
    usual = _usual_head(width)
    if len(name) <= width:
        return name
    for head in (usual, *range(usual + 1, width), *range(usual)):
        start, end = name[:head], name[len(name) - (width - head - 1) :]
        if not any(other.startswith(start) and other.endswith(end) for other in others):
            return _cut(name, width, head)
    return _cut(name, width, usual)


def _usual_head(width: int) -> int:
    return max(width - max(3 * width // 4, 1) - 1, 0)


def _cut(name: str, width: int, head: int) -> str:
    if len(name) <= width:
        return name
    return f"{name[:head]}…{name[len(name) - max(width - head - 1, 0) :]}"


def _printable(name: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def matrix_name(problem: ProblemReport) -> str:
    """Name the matrix that was analysed."""
    return MATRICES.get(problem.matrix, problem.matrix)


def examples_used(problem: ProblemReport) -> str:
    """Say how many examples were used, and of how many."""
    if problem.num_examples_available is None:
        return f"{count(problem.num_examples, 'example')} of an unknown number"
    if problem.num_examples == problem.num_examples_available:
        return f"all {count(problem.num_examples, 'example')}"
    return f"{count(problem.num_examples)} of {count(problem.num_examples_available, 'example')}"


def seen_by(result: Answer) -> str:
    """Say through what the matrix was seen: probes, or the rows of a window."""
    if isinstance(result, IhvpResult | PruneResult):
        return f"{count(result.window.rows)} {result.window.row_kind} rows"
    if isinstance(result, SpectrumResult):
        starts = count(result.method.num_probes, "start vector")
        return f"{count(result.steps, 'step')}, {starts}"
    probes = result.method.num_probes
    return count(probes, "probe") if probes else "no probes"


def per_parameter(layer: LayerTrace) -> float:
    """The trace of a layer, shared among its parameters; an empty layer has none."""
    return layer.estimate / max(layer.num_parameters, 1)


def largest(layers: Sequence[LayerT], most: int, size: Callable[[LayerT], float]) -> list[LayerT]:
    """The layers of largest size, at most so many, in their own order."""
    by_size = sorted(range(len(layers)), key=lambda index: -size(layers[index]))
    return [layers[index] for index in sorted(by_size[:most])]


def trace_size(layer: LayerTrace) -> float:
    """How large a layer's trace is, whatever its sign."""
    return abs(layer.estimate)


def half_width(interval: Interval) -> float:
    """Half the width of an interval."""
    return (interval[1] - interval[0]) / 2


def is_averaged(block: BlockReport) -> bool:
    """Tell whether a layer has blocks at all: vectors alone have none."""
    return block.rule != "none"


def share_within(share: float, interval: Interval) -> str:
    """Write a share and its interval, as in ``43% (38% to 48%)``."""
    low, high = map(percent, interval)
    return percent(share) + (f" ({low} to {high})" if low != high else "")


def includes_zero(interval: Interval) -> bool:
    """Tell whether not even the sign is known; an exact zero is known."""
    low, high = interval
    return low <= 0 <= high and low < high


def change_name(change: Perturbation) -> str:
    """Name a change of weights, as in ``prune 50%`` or ``4 bit tensor``."""
    if change.kind == "prune":
        return f"prune {percent(change.level)}"
    return f"{change.level:g} bit {change.granularity}"


def spectral_sum(function: SpectralFunction) -> str:
    """Write a sum over eigenvalues with its interval where there is one."""
    if function.value is None:
        return "none"
    if function.interval is None:
        return number(function.value)
    return with_error(function.value, half_width(function.interval))


def standing_apart(outliers: Outliers) -> str:
    """How many of the largest eigenvalues lie above the widest step."""
    if not outliers.count:
        return "no eigenvalue stands apart"
    if outliers.count == 1:
        return f"1 eigenvalue stands apart: it is {outliers.ratio:.2g} times the next"
    return (
        f"{outliers.count} eigenvalues stand apart: the last is {outliers.ratio:.2g} times the next"
    )


def compared_with_classes(outliers: Outliers) -> list[str]:
    """What the staircase does at the number of classes."""
    if outliers.classes is None:
        return []
    said = f"{outliers.classes} classes"
    if outliers.class_ratio is None:
        return [f"{said}, fewer eigenvalues than that are told apart"]
    number = outliers.classes - 1
    return [f"{said}: eigenvalue {number} is {outliers.class_ratio:.2g} times the next"]


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
