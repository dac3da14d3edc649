"""What hesscli answers, held against the truth: one verdict a network."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import t as student

import hesscli
from fuzz.dice import Dice
from fuzz.grammar import Subject
from fuzz.truth import Truth, truth
from hesscli.errors import ExitCode, HesscliError

Verdict = Literal["right", "refused", "warned", "misnamed", "wrong", "crash"]

NOT_SMOOTH = (r"not finite", r"\bNaN\b", r"infinit", r"differentiab", r"gradient")
"""Words for a network that chance has put where its function has no derivatives."""
OF_SUBSAMPLES = (r"only \d+ examples", r"data noise alone exceeds", r"examples that were kept")
"""What is said of the few examples that a subsample here has."""
REFUSALS = (ExitCode.USAGE, ExitCode.INPUT, ExitCode.UNSOUND)
BUDGET = 600.0
"""Seconds: a limit that no run comes near, on a busy machine either."""
FEWEST_ROWS = 16
"""Of examples, for a ranking with its confidence."""
BEYOND_CHANCE = 1e-6
"""Probability with which an interval as wide as is allowed would miss."""
_EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23}


@dataclass
class Report:
    """Of one network.

    Attributes:
        verdict: the worst of all commands'.
        notes: what was wrong, or what was said.
        warnings: all that were given.
        needless: those of them that ordinary networks and data do not deserve.
        misses: for each interval that is no claim of exactness, whether it misses the truth.
        entries: entries with bars, and how many of them ±1.96 standard errors miss.
        exact: whether the trace was said to be exact, None where no number came.
        exact_is_due: H − G has a zero diagonal, and the loss shows its outputs.
        unknown: something that ordinary data have was said to be unknown.
    """

    verdict: Verdict = "right"
    notes: list[str] = field(default_factory=list)
    warnings: tuple[str, ...] = ()
    needless: tuple[str, ...] = ()
    misses: list[bool] = field(default_factory=list)
    entries: tuple[int, int] = (0, 0)
    exact: bool | None = None
    exact_is_due: bool = False
    unknown: bool = False


_ORDER: tuple[Verdict, ...] = ("right", "refused", "warned", "misnamed", "wrong", "crash")


def judge(subject: Subject, dice: Dice, *, brief: bool = False) -> Report:
    """Run a few commands on a subject and compare.

    Args:
        subject: what to analyse.
        dice: chooses the commands.
        brief: one command of fewer probes and no tolerance, which may take its time.
    """
    if subject.must_refuse:
        return judge_refusal(subject)
    right, report = truth(subject), Report()
    if not right.is_finite:
        subject = replace(subject, causes=(*subject.causes, *NOT_SMOOTH))
    if subject.subsample is not None:  # one example of those left out may carry most of a trace
        subject = replace(subject, causes=(*subject.causes, *OF_SUBSAMPLES))
    report.exact_is_due = exactness_is_due(subject, right)
    found: list[str] = []
    try:
        problem = problem_of(subject)
        for command in commands(dice, subject, brief):
            found += command(problem, subject, right, report)
    except HesscliError as error:
        return _refusal(error, subject, report)
    except Exception as error:
        return _crash(error, report)
    if not right.is_finite:
        found = ["a number, where there is none"]
    report.notes += found
    if found:
        warned = any(names(warning, subject.causes) for warning in report.warnings)
        report.verdict = "warned" if warned else "wrong"
    return report


def judge_refusal(subject: Subject) -> Report:
    """Of a subject whose function has no number: any that comes is wrong."""
    report = Report()
    try:
        result = hesscli.trace(problem_of(subject), probes=16, budget=BUDGET)
    except HesscliError as error:
        return _refusal(error, subject, report)
    except Exception as error:
        return _crash(error, report)
    report.notes.append(f"a number, where there is none: {result}")
    warned = any(names(warning, subject.causes) for warning in result.warnings)
    report.verdict = "warned" if warned else "wrong"
    return report


def problem_of(subject: Subject) -> hesscli.Problem:
    """What hesscli makes of a subject."""
    return hesscli.Problem(subject.model, subject.loss, subject.data, **subject.options)


def _crash(error: Exception, report: Report) -> Report:
    where = traceback.extract_tb(error.__traceback__)[-1]
    report.verdict = "crash"
    report.notes.append(f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})")
    return report


def _refusal(error: HesscliError, subject: Subject, report: Report) -> Report:
    told = " | ".join((error.what, error.got, error.hint))
    named = error.exit_code in REFUSALS and names(told, subject.causes)
    report.verdict = "refused" if named else "misnamed"
    report.notes.append(f"exit {int(error.exit_code)}: {told}")
    return report


def names(text: str, causes: Sequence[str]) -> bool:
    """Whether a text has one of the words."""
    return any(re.search(cause, text, re.IGNORECASE) for cause in causes)


def exactness_is_due(subject: Subject, right: Truth) -> bool:
    """The diagonal of H is that of G, by numbers from outside."""
    if right.residual is None or subject.coupled or subject.subsample is not None:
        return False
    if not right.is_finite:
        return False
    return float(right.residual.abs().max()) <= 1e-12 * float(right.diagonal.abs().max())


# -- commands ----------------------------------------------------------------------------------

Command = Callable[[hesscli.Problem, Subject, Truth, Report], list[str]]


def commands(dice: Dice, subject: Subject, brief: bool) -> Iterator[Command]:
    """Trace or diagonal always, now and then eigenvalues and a solve."""
    chosen: dict[str, Any] = {"budget": BUDGET, "seed": dice.between(0, 1000)}
    few = dice.between(8, 16) if brief else dice.between(16, 32)
    chosen |= {"probes": few} if brief or dice.chance(0.9) else {"rtol": 0.25}
    if dice.chance(0.5):
        yield lambda *args: _trace(*args, **chosen)
    else:
        yield lambda *args: _diagonal(*args, **chosen)
    if brief:
        return
    if dice.chance(0.1):
        yield _spectrum
    rows = sum(len(y) for _, y in subject.batches)
    if dice.chance(0.06) and rows >= FEWEST_ROWS and not subject.coupled:
        yield _solve


def _trace(
    problem: hesscli.Problem, subject: Subject, right: Truth, report: Report, **how: Any
) -> list[str]:
    result = hesscli.trace(problem, **how)
    return [*_header(result, subject, right, report), *_sums(result, subject, right, report)]


def _diagonal(
    problem: hesscli.Problem, subject: Subject, right: Truth, report: Report, **how: Any
) -> list[str]:
    result = hesscli.diagonal(problem, **how)
    found = [*_header(result, subject, right, report), *_sums(result, subject, right, report)]
    if subject.subsample is not None:
        return found  # the draw of the examples moves all entries together
    errors, bars = [], []
    for name in right.names:
        entries = np.asarray(result.entries[name], np.float64).reshape(-1)
        bar = np.asarray(result.stderr[name], np.float64).reshape(-1)
        errors.append(entries - right.of([name], right.diagonal).numpy())
        bars.append(bar)
    error, bar = np.concatenate(errors), np.concatenate(bars)
    slack = _rounding(subject, right)
    known = bar > 0
    off = np.abs(error) > slack
    if not np.isfinite(error).all():
        found.append("diag has entries that are not finite")
    if (off & ~known).any():
        worst = np.abs(error[~known]).max()
        found.append(f"diag is {worst:.3g} off in an entry without a bar (slack {slack:.1g})")
    if np.linalg.norm(error[known]) > 4 * np.linalg.norm(bar[known]) + slack * known.sum():
        found.append(
            f"diag is off by {np.linalg.norm(error[known]):.3g}, bars are "
            f"{np.linalg.norm(bar[known]):.3g}"
        )
    missed = int((np.abs(error[known]) > 1.96 * bar[known] + slack).sum())
    report.entries = (report.entries[0] + int(known.sum()), report.entries[1] + missed)
    return found


def _spectrum(
    problem: hesscli.Problem, subject: Subject, right: Truth, report: Report
) -> list[str]:
    result = hesscli.spectrum(problem, k=3, steps=24, probes=2, budget=BUDGET)
    found = list(_header(result, subject, right, report))
    if subject.subsample is not None:
        return found
    values = torch.linalg.eigvalsh(right.hessian).numpy()
    slack = 16 * _EPS[torch.float64] * len(values) * float(np.abs(values).max())
    for each in result.eigenvalues:
        nearest = values[np.abs(values - each.value).argmin()]
        if not abs(nearest - each.value) <= each.residual + slack:
            found.append(f"eigenvalue {each.value:.8g} ± {each.residual:.2g} for {nearest:.8g}")
    return found


def _solve(problem: hesscli.Problem, subject: Subject, right: Truth, report: Report) -> list[str]:
    """The residual that a solve claims against the operator, by the true one."""
    result = hesscli.sensitivity(problem, budget=BUDGET)
    found = list(_header(result, subject, right, report))
    claimed = result.residual.operator
    if subject.subsample is not None or claimed is None or result.problem.matrix != "hessian":
        return found
    y = np.concatenate([np.asarray(result.direction[n], np.float64).ravel() for n in right.names])
    g, H = right.gradient.numpy(), right.hessian.numpy()
    true = np.linalg.norm(H @ y + result.window.damping * y - g) / np.linalg.norm(g)
    scale = np.linalg.norm(H, 2) * np.linalg.norm(y) / np.linalg.norm(g)
    if not abs(true - claimed) <= 1e-3 * true + 100 * _eps(subject) * (1 + scale):
        found.append(f"residual {claimed:.6g} of a solve, {true:.6g} in truth")
    return found


def _header(result: Any, subject: Subject, right: Truth, report: Report) -> Iterator[str]:
    """What all results share: the warnings, the loss, the length of its gradient."""
    report.warnings = tuple(dict.fromkeys((*report.warnings, *result.warnings)))
    if result.command != "ihvp":  # which says how good its window is, and that is never good here
        warned = (*report.needless, *result.warnings)
        report.needless = tuple(dict.fromkeys(w for w in warned if not is_deserved(w, subject)))
    if subject.subsample is not None:
        return
    head, length = result.problem, float(right.gradient.norm())
    roundings = 100 * _eps(subject)
    if not abs(head.loss - right.loss) <= roundings * (1 + abs(right.loss)):
        yield f"loss {head.loss:.9g} for {right.loss:.9g}"
    if not abs(head.gradient_norm - length) <= roundings * (1 + length + abs(right.loss)):
        yield f"gradient norm {head.gradient_norm:.9g} for {length:.9g}"


def is_deserved(warning: str, subject: Subject) -> bool:
    """A few dozen examples out of 64 are few, whatever the network."""
    return subject.subsample is not None and names(warning, OF_SUBSAMPLES)


def _sums(result: Any, subject: Subject, right: Truth, report: Report) -> Iterator[str]:
    """The trace and that of each layer, with what is claimed of them."""
    report.exact = result.status == "exact"
    total = float(right.diagonal.sum())
    if result.trace.interval is None or result.trace.interval[0] is None:
        report.unknown = True
        yield from _without_interval(result, total, subject, right)
        return
    report.unknown |= any(layer.interval is None for layer in result.layers)
    if subject.subsample is not None and report.exact:
        yield "exact, of a subsample"
    low, high = result.trace.interval
    if not report.exact:
        report.misses.append(not low - _slack(right) <= total <= high + _slack(right))
    widened = _widening(result.trace.degrees_of_freedom)
    if not _holds(low, high, total, 3 if report.exact else widened, _slack(right)):
        yield f"{result.status}: trace in [{low:.8g}, {high:.8g}] for {total:.8g}"
    for layer in result.layers:
        if layer.interval is None:
            continue
        true = float(right.of([p.name for p in layer.parameters], right.diagonal).sum())
        widening = 3 if layer.status == "exact" else 2 * widened
        if not _holds(*layer.interval, true, widening, _slack(right)):
            low, high = layer.interval
            yield f"{layer.name}, {layer.status}: trace in [{low:.8g}, {high:.8g}] for {true:.8g}"


def _without_interval(result: Any, total: float, subject: Subject, right: Truth) -> Iterator[str]:
    if result.status == "exact":
        yield "exact, with an unknown interval"


def _holds(low: float, high: float, value: float, widening: float, slack: float) -> bool:
    middle, half = (low + high) / 2, (high - low) / 2
    return abs(value - middle) <= widening * half + slack


def _widening(freedom: float | None) -> float:
    """How much wider than its 95% an interval is whose misses are beyond chance."""
    freedom = 1e6 if freedom is None else max(freedom, 1.0)
    wide, usual = student.isf([BEYOND_CHANCE / 2, 0.025], freedom)
    return float(wide / usual)


def _slack(right: Truth) -> float:
    """Rounding of the truth itself."""
    return 1e-12 * float(right.diagonal.abs().sum()) + 1e-14


def _eps(subject: Subject) -> float:
    return _EPS[torch.float32 if subject.narrow else subject.dtype]


def _rounding(subject: Subject, right: Truth) -> float:
    """Of a single entry, which has no bar of its own for it."""
    return 200 * _eps(subject) * float(right.diagonal.abs().max()) + 1e-14
