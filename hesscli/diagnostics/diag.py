"""A diagonal in all its readings: entries, layers, blocks, and how far they are off."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from hesscli.diagnostics.arguments import as_asked
from hesscli.diagnostics.block_variance import block_report
from hesscli.diagnostics.choice import Draw, batches_within, probe_range
from hesscli.diagnostics.estimation import Outcome
from hesscli.diagnostics.keeping import UNKEPT, Ledger
from hesscli.diagnostics.looks import Standing, Tolerance
from hesscli.diagnostics.measurement import Pace, Work, drive
from hesscli.diagnostics.plans import Pilot
from hesscli.diagnostics.reporting import (
    chosen,
    estimated,
    layers,
    method_report,
    total,
    warnings,
)
from hesscli.diagnostics.run import Clock, Run, started
from hesscli.diagnostics.summary import histogram_edges, summarise, total_histogram
from hesscli.engines.diagonal import Diagonal, shrunk
from hesscli.engines.entries import Entries, Part, most_entries, needed_bytes
from hesscli.engines.estimator import Estimator, Reading
from hesscli.engines.hutchinson.designs import Plain
from hesscli.engines.hutchinson.engine import Hutchinson
from hesscli.errors import UsageError
from hesscli.memory import room_for_more
from hesscli.meter import Spent
from hesscli.operators.base import Operator
from hesscli.problem.problem import Problem
from hesscli.results import (
    BlockReport,
    DiagonalReport,
    DiagResult,
    EntrySummary,
    LayerDiagonal,
    MethodReport,
    Observe,
    ParameterReport,
    Snapshot,
)
from hesscli.state import State
from hesscli.units import human_bytes
from hesscli.vocabulary import USUAL_BUDGET, USUAL_CONFIDENCE, USUAL_RTOL, BlockRule

_SORTED = 85.0
"""Passes through the entries that sorting and counting them takes as long as."""


@dataclass(frozen=True)
class Faced:
    """The noise that AdaHessian's own probes would have, beside a diagonal without any."""

    engine: Hutchinson
    noise: Tensor


@dataclass(frozen=True)
class FoundDiagonal:
    """A diagonal in all its readings.

    ``unbiased`` has the estimator's own values, for what is linear or quadratic in them; in
    ``best`` what was probed is shrunk towards the shape of what is known, layer by layer.
    """

    problem: Problem
    outcome: Outcome
    faced: Faced | None
    rule: BlockRule
    confidence: float

    @cached_property
    def unbiased(self) -> Diagonal:
        """The estimator's own entries, not shrunk."""
        outcome, fraction = self.outcome, self.problem.sampling_fraction or 1.0
        return outcome.estimator.diagonal(fraction, outcome.rounding.bias)

    @property
    def best(self) -> Diagonal:
        """Entries shrunk where that lowers their error, with bars that count it."""
        return self._shrunk[0]

    @cached_property
    def _shrunk(self) -> tuple[Diagonal, tuple[float, ...] | None]:
        """The entries, and what was kept of each layer's noisy part."""
        found, estimator = self.unbiased, self.outcome.estimator
        if (known := estimator.known_diagonal()) is None:
            return found, None
        probed = estimator.probed_diagonal(self.problem.sampling_fraction or 1.0)
        if probed is None or probed.noise is None:
            return found, None
        moved, kept = torch.zeros_like(found.values), []
        for _, place in self._slices():
            part, share = shrunk(probed.part(place), known[place])
            if part.moved is not None:
                moved[place] = part.moved
            kept.append(share)
        return replace(found, values=found.values + moved, moved=moved), tuple(kept)

    def report(self) -> DiagonalReport:
        """The whole diagonal as results have it."""
        found = self.unbiased
        whole = total_histogram([s.histogram for s in self._summaries])
        entries = sum(whole.counts)
        negative = float((self.best.values < 0).sum())
        return DiagonalReport(
            norm=found.norm.estimate**0.5,
            relative_error=_finite(found.relative_error()),
            relative_error_bound=_finite(found.relative_error_bound(1 - self.outcome.reading.miss)),
            confidence=self.confidence,
            negative_fraction=negative / entries,
            histogram=whole,
            shrinkage=self._shrunk[1],
        )

    def layers(self, tolerance: Tolerance) -> Iterator[LayerDiagonal]:
        """Each layer's trace, entries and blocks."""
        traces = layers(self.problem, self.outcome, tolerance)
        pieces = zip(traces, self._slices(), self._summaries, strict=True)
        for trace, (layer, place), summary in pieces:
            facts = {field.name: getattr(summary, field.name) for field in fields(summary)}
            facts["mean"] = trace.estimate / trace.num_parameters
            shared = {field.name: getattr(trace, field.name) for field in fields(trace)}
            yield LayerDiagonal(**shared, **facts, block=self._block(layer, place))

    @cached_property
    def _summaries(self) -> list[EntrySummary]:
        edges = histogram_edges(self.best.values)
        return [
            summarise(self.best.part(place), self._reports(layer), edges)
            for layer, place in self._slices()
        ]

    def _block(self, layer: str, place: slice) -> BlockReport:
        noise = None if self.faced is None else self.faced.noise[:, place]
        plain = self._plain_probes()
        count = None if plain is None else plain.count * len(plain.indices)
        return block_report(
            self.unbiased.part(place),
            [p.shape for p in self._reports(layer)],
            self.rule,
            confidence=self.confidence,
            probe_noise=noise,
            num_probes=count,
        )

    def _plain_probes(self) -> Hutchinson | None:
        """Probes of the whole matrix, one product each, as AdaHessian draws them."""
        if self.faced is not None:
            return self.faced.engine
        probes = self.outcome.estimator.probes
        if probes is None or self.outcome.estimator.gauss_newton is not None:
            return None
        return probes if isinstance(probes.design, Plain) else None

    def _slices(self) -> Iterator[tuple[str, slice]]:
        """Layers and their places in the vector, where each layer's tensors follow each other."""
        start = 0
        for layer in self.problem.parameters.layers:
            stop = start + sum(p.numel for p in self.problem.parameters.in_layer(layer))
            yield layer, slice(start, stop)
            start = stop

    def _reports(self, layer: str) -> list[ParameterReport]:
        return [
            ParameterReport(name=p.name, shape=tuple(p.tensor.shape))
            for p in self.problem.parameters.in_layer(layer)
        ]

    def by_name(self, vector: Tensor) -> dict[str, Any]:
        """Arrays in the shapes of the parameters, float64 only where that says more."""
        kind = torch.float64 if self.problem.dtype == torch.float64 else torch.float32
        return self.problem.parameters.by_name(vector, kind)


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None


# -- How large is each entry of the diagonal, how are a layer's spread, and do blocks keep that? ---


@as_asked
def diagonal(
    problem: Problem,
    *,
    matrix: str = "hessian",
    rtol: float | None = USUAL_RTOL["diag"],
    atol: float | None = None,
    confidence: float = USUAL_CONFIDENCE,
    budget: float | None = USUAL_BUDGET,
    probes: int | tuple[int, int] | None = None,
    batches: tuple[int, int] | None = None,
    block: str = "auto",
    method: str = "auto",
    seed: int = 0,
    mode: str = "auto",
    observe: Observe | None = None,
    ledger: Ledger = UNKEPT,
) -> DiagResult:
    """Diagonal of a curvature matrix, exact where that is possible, with an error bar an entry.

    Args:
        problem: model, loss and frozen examples.
        matrix: ``hessian``, ``ggn``, ``fisher`` or ``empirical-fisher``.
        rtol: wanted ‖error‖ / ‖diagonal‖, which holds with probability ``confidence``.
        atol: wanted ‖error‖; the wider of the two counts.
        confidence: of the intervals, looks included.
        budget: seconds; None for no limit.
        probes: a fixed number ``N`` instead of a tolerance, or probes ``(a, b)`` of the stream.
            Where the diagonal is exact, they only show the noise that AdaHessian would face.
        batches: only the batches ``(a, b)``, whose number of probes must be fixed.
        block: AdaHessian's block averaging: ``auto``, ``image``, ``row``, ``kernel``, ``channel``,
            ``head:N`` or ``N`` consecutive entries.
        method: as for :func:`hesscli.trace`.
        seed: of the probes.
        mode: autodiff mode; ``auto`` takes the cheapest that passes the preflight.
        observe: told how far the run is; returning True ends it at its result so far.
        ledger: keeps the run, so that it can go on from there.

    Raises:
        UsageError: fewer than two probes, a matrix, method or block that there is not, or more
            entries than there is memory for.
        UnsoundError: the problem's curvature would mean nothing.
        BudgetError: the time was not enough for a result.
        KeyboardInterrupt: stopped before there was any estimate.
    """
    first, fixed = probe_range(probes)
    rule = BlockRule.parse(block)
    _require_heads(rule, problem)
    clock, tolerance = Clock(budget, observe), Tolerance(rtol, atol)
    with started(problem, matrix, mode, clock, ledger) as run:
        measured = batches_within(problem, batches, method)
        draw = Draw(seed, first=first, entries=_entries(problem), batches=measured)
        choice = chosen(run, method, draw)
        _require_room(problem, exact=choice.estimator.exact)
        goal = partial(_standing, tolerance=tolerance)
        ending = _reading_off(choice.estimator)
        outcome = estimated(run, choice, goal, 1 - confidence, fixed, ending)
        faced = None
        if fixed is not None and _is_known(problem, outcome):
            faced = _probe_noise(run, replace(draw, entries=None), fixed)
    found = FoundDiagonal(problem, outcome, faced, rule, confidence)
    replicates = 0 if found.best.noise is None else len(found.best.noise)
    run.operator.meter.add(problem.vectors(0.0, _SORTED * (1 + replicates)))
    return DiagResult(
        status=outcome.status,
        method=_method(method_report(choice, outcome, draw, tolerance, run.flight), faced),
        cost=run.cost(),
        trace=total(problem, choice, outcome, confidence),
        diagonal=found.report(),
        layers=tuple(found.layers(tolerance)),
        entries=found.by_name(found.best.values),
        stderr=found.by_name(found.best.bars()),
        **run.header(warnings(problem, outcome, tolerance)),
    )


def _entries(problem: Problem) -> Entries:
    """Where single entries are kept, in the type that products are in now."""
    return Entries(problem.parameters, problem.device, problem.dtype)


def _is_known(problem: Problem, outcome: Outcome) -> bool:
    """Whether the diagonal has no error, or would have none if it was of all the batches."""
    estimator = outcome.estimator
    if not estimator.partial or outcome.status == "interrupted":
        return outcome.status == "exact"
    whole = len(estimator.sources[0].seen) == len(estimator.indices)
    is_all = problem.sampling_fraction == 1 and outcome.rounding.is_exact
    return estimator.exact and whole and is_all


def _require_room(problem: Problem, *, exact: bool) -> None:
    """See that sums of entries fit into memory, before any of it is taken.

    Raises:
        UsageError: not even those of one source do.
    """
    size, room = problem.parameters.size, room_for_more(problem.device)
    if (needed := needed_bytes(size, problem.dtype, exact=exact)) > room:
        raise UsageError(
            "the entries of the diagonal do not fit in the memory that is free",
            f"{size} of them, with their errors, take {human_bytes(needed)}, and there is room for "
            f"{human_bytes(room)}",
            f"--params for at most {most_entries(room, problem.dtype, exact=exact)} of them, "
            "hesscli trace for sums by layer, or more memory",
        )


_READING = 25
"""Times as long as the norm of a replicate takes, for each, to say all that is said of a diagonal:
14 were seen at half a million entries, and 23 at 17 million."""


def _reading_off(estimator: Estimator) -> float:
    """Seconds that it will take to say what there is in a diagonal, on this machine."""
    assert estimator.entries is not None  # a diagonal is kept in them
    size, many = estimator.parameters.size, estimator.entries.replicates
    one = Diagonal(
        torch.ones(size, dtype=torch.float64, device="cpu"),
        torch.ones(1, size, device="cpu"),
        freedom=1.0,
    )

    def once() -> float:
        began = time.perf_counter()
        one.squared_norm()
        return time.perf_counter() - began

    seconds = min(once() for _ in range(3))  # one alone may be the first, or wait for others' work
    noisy = not estimator.exact or (estimator.operator.sampling_fraction or 0.0) < 1
    return _READING * (many if noisy else 1) * seconds


def _require_heads(rule: BlockRule, problem: Problem) -> None:
    """Refuse heads that no matrix has, before the long work."""
    rows = [p.tensor.shape[0] for p in problem.parameters if p.tensor.dim() == 2]
    if rule.kind == "head" and all(n % rule.number for n in rows):
        sizes = ", ".join(map(str, sorted(set(rows))[:5])) or "no matrices"
        raise UsageError(
            "heads must divide the rows of some matrix",
            f"head:{rule.number}, and rows of {sizes}",
            "--block row, or the number of an attention layer's heads",
        )


def _standing(estimator: Estimator, reading: Reading, *, tolerance: Tolerance) -> Standing:
    """How far the diagonal's relative error is from the tolerance, both of the norm."""
    fraction = estimator.operator.sampling_fraction or 1.0
    found, random = estimator.diagonal(fraction, reading.bias), estimator.diagonal(1.0)
    error, drawn = found.relative_error(), random.relative_error()
    norm = found.norm.estimate**0.5
    wanted = max(tolerance.relative or 0.0, (tolerance.absolute or 0.0) / norm if norm else 0.0)
    return Standing(
        error=found.relative_error_bound(1 - reading.miss),
        wanted=wanted,
        floor=max(error**2 - drawn**2, 0.0) ** 0.5,
        share=min((drawn / error) ** 2, 1.0) if error else 0.0,
    )


class _ProbeNoise:
    """Plain probes of the whole matrix, for the noise that AdaHessian would face."""

    ready = True  # an exact diagonal is a result without them
    lasting = False

    def __init__(self, operator: Operator, draw: Draw, probes: int) -> None:
        parameters = operator.problem.parameters
        self.entries = _entries(operator.problem)
        self.stream = self.entries.stream(parameters, exact=False)
        self.engine = Hutchinson(
            operator,
            seed=draw.seed,
            first=draw.first,
            batches=draw.batches,
            stream=self.stream,
        )
        self.probes, self._joined = probes, False

    def expected(self, pace: Pace) -> tuple[Work, ...]:
        """All of them on one graph."""
        return (Work(phase="probing", spent=pace.products(self.probes)),)

    def steps(self) -> Iterator[Snapshot]:
        """Blocks of products."""
        if self._joined:
            return
        meter = self.engine.operator.meter
        for _ in self.engine.extend(self.probes):
            yield Snapshot(phase="probing", done=meter.products, total=float(self.probes))

    def state_dict(self) -> State:
        """The table and the entries."""
        return self.engine.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Go on from there."""
        self.engine.load_state_dict(state)

    def join(self, state: State) -> None:
        """Add other batches, or other probes."""
        self.engine.join(state)
        self._joined = True


def _probe_noise(run: Run, draw: Draw, probes: int) -> Faced | None:
    """None where the run was stopped before the probes were done."""
    noise = _ProbeNoise(run.operator, draw, probes)
    if drive(run.clock, noise, run.ledger) is not None or not noise.engine.seen:
        return None
    found = noise.entries.diagonal([Part(noise.stream, 1.0, probes)], 0.0).noise
    assert found is not None  # probes have some
    return Faced(noise.engine, found)


def _method(report: MethodReport, faced: Faced | None) -> MethodReport:
    if faced is None:
        return report
    note = f"{report.note}; probes only for the noise that AdaHessian faces"
    return replace(report, num_probes=faced.engine.count, note=note)


# -- What ``hesscli diag`` will take ---------------------------------------------------------------


def plan(pilot: Pilot) -> Iterator[Work]:
    """Probes to the tolerance, or one pass where none are needed."""
    goal = partial(_foreseen, tolerance=pilot.asked.tolerance("diag"))
    problem = pilot.run.problem
    _require_room(problem, exact=False)  # as the pilot, which knows no method before it has room
    exact = pilot.choice(pilot.asked.method).estimator.exact
    held = needed_bytes(problem.parameters.size, problem.dtype, exact=exact)
    *before, last = pilot.estimated(goal)
    yield from before
    yield replace(last, num_bytes=held)
    ending = Spent(seconds=_reading_off(pilot.choice(pilot.asked.method).estimator))
    yield Work(phase="reading off", spent=ending)


def _foreseen(estimator: Estimator, reading: Reading, *, tolerance: Tolerance) -> Standing:
    """As :func:`_standing`, with the error that is expected in place of a pilot's bound on it."""
    seen = _standing(estimator, reading, tolerance=tolerance)
    error = estimator.diagonal(estimator.operator.sampling_fraction or 1.0).relative_error()
    return replace(seen, error=error)
