"""Which engine answers: chosen by what the problem allows, and said in one line."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from hesscli.diagnostics.estimation import Turn
from hesscli.diagnostics.keeping import UNKEPT
from hesscli.engines.entries import Entries, Stream
from hesscli.engines.estimator import Estimator, Rounding
from hesscli.engines.hutchinson.designs import (
    REGIME_PROBES,
    Deflated,
    Design,
    Stratified,
    common_share,
    deflated_ratio,
    stratified_ratio,
)
from hesscli.engines.hutchinson.engine import Hutchinson
from hesscli.engines.hutchinson.table import Sharing
from hesscli.engines.per_example import PerExample
from hesscli.engines.unit_vectors import UnitVectors
from hesscli.errors import UnsoundError, UsageError
from hesscli.meter import OnStep, Spent, go_on
from hesscli.operators.base import Operator
from hesscli.operators.exactness import Exactness, exact_parameters, require_output_hessian
from hesscli.operators.gauss_newton import (
    EmpiricalFisher,
    GaussNewton,
    Sandwich,
    require_examples,
)
from hesscli.operators.hessian import Hessian, Residual
from hesscli.operators.joint import Joint
from hesscli.operators.source import Source
from hesscli.parameters import Parameters
from hesscli.problem.problem import Problem
from hesscli.randomness import Distribution, key
from hesscli.vocabulary import METHODS

Decided = Callable[[str, Callable[[], Any]], Any]
"""Of a ledger: what was decided before by some name, or else is decided now."""

AFFORDABLE_COLUMNS = 32
"""Backward passes that the exact diagonal may take where it was not asked for."""
_MANY_PROBES = 64
"""Probes ahead from which a better design is looked for."""
DEFLATION_STEPS = 16
"""Lanczos steps: half of the 32 products from which on deflation was seen to win."""
BASIS_BYTES = 1 << 31
"""Bytes that a float64 basis may take."""
COMMON_SHARE = 0.5
"""Of what makes probe noise that batches must have in common for a basis to be worth making."""
_TRIED = 8
"""Times the products that finding out about a design takes, what is left must be at least."""
_ALIKE = 2
"""Batches that are asked how much they have in common."""
_TURN = 0x7042
"""Separates the probes after a change of design from those that led to it."""


@dataclass(frozen=True)
class Draw:
    """How probes are drawn, and where single entries are kept if they are wanted.

    ``batches`` are the numbers of those that are measured, all where it is None; those of a
    ``pilot`` stand for all.
    """

    seed: int = 0
    sharing: Sharing = "fresh"
    distribution: Distribution = "rademacher"
    first: int = 0
    entries: Entries | None = None
    batches: Sequence[int] | None = None
    pilot: bool = False

    def stream(self, parameters: Parameters, *, exact: bool) -> Stream | None:
        """A new stream of entries, or None."""
        return None if self.entries is None else self.entries.stream(parameters, exact=exact)


@dataclass(frozen=True)
class Choice:
    """An estimator, what it is called and why it was chosen.

    ``exactness`` says of each parameter whether its part of R is zero, where that was asked;
    ``splits`` that the estimator knows the Hessian's Gauss-Newton part by itself; ``hurried`` that
    it was chosen for want of time; ``took`` is the work of choosing it, and ``rounding`` that of
    its cells, once they are measured.
    """

    estimator: Estimator
    name: str
    note: str
    exactness: tuple[Exactness, ...] = ()
    rethink: Better | None = None
    splits: bool = False
    hurried: bool = False
    took: Spent = field(default_factory=Spent)
    rounding: Rounding | None = None


def probe_range(probes: int | tuple[int, int] | None) -> tuple[int, int | None]:
    """The first probe of the stream, and how many; None to let a tolerance decide.

    Raises:
        UsageError: fewer than two.
    """
    first, last = probes if isinstance(probes, tuple) else (0, probes)
    fixed = None if last is None else last - first
    if fixed is not None and fixed < 2:
        raise UsageError("an error bar needs two probes", f"{fixed} probes", "--probes 2 or more")
    return first, fixed


def batches_within(
    problem: Problem, given: tuple[int, int] | None, method: str
) -> tuple[int, ...] | None:
    """The batches of a range that weigh something; None where all are meant.

    Raises:
        UsageError: there are not so many, or none of them weighs anything.
    """
    if given is None:
        return None
    if method == "deflated":
        raise UsageError(
            "a range of batches cannot be deflated by itself",
            "--method deflated, whose directions are of all batches",
            "a range of probes for each machine, as --probes 0:64, or --method hutchinson",
        )
    first, last = given
    found = tuple(i for i in problem.indices if first <= i < last)
    if not 0 <= first < last <= problem.num_batches or not found:
        raise UsageError(
            "a range of batches must be one of those that there are",
            f"batches {first}:{last} of {problem.num_batches}",
            f"--batches 0:{problem.num_batches}, or a part of that",
        )
    return found


def choose(
    operator: Operator,
    method: str,
    draw: Draw,
    on_step: OnStep = go_on,
    decided: Decided = UNKEPT.decided,
) -> Choice:
    """The estimator of a matrix.

    Args:
        operator: the matrix.
        method: by name, or ``auto``: the Gauss-Newton part without probes wherever the loss's
            output Hessian is known, and probes for the rest.
        draw: of the probes.
        on_step: called after each product of a proof; may raise to end it.
        decided: knows what proofs have found before, if they were made.

    Raises:
        UsageError: no such method, or one that this problem does not allow.
    """
    if method not in METHODS:
        raise UsageError("no such method", repr(method), f"one of {', '.join(METHODS)}")
    if method in ("deflated", "stratified", "hutchinson"):
        return _probed(operator, method, draw, on_step)
    try:
        return _split(operator, method, draw, on_step, decided)
    except (UsageError, UnsoundError) as error:
        if method != "auto":
            raise
        reason = f"probes of the whole matrix: {error.what}, {error.got}"
        return _probed(operator, "auto", draw, on_step, reason)


def _split(
    operator: Operator, method: str, draw: Draw, on_step: OnStep, decided: Decided
) -> Choice:
    """The Gauss-Newton part from gradients, the rest of the Hessian from probes.

    Raises:
        UsageError: the problem does not allow it, or ``exact`` is not to be had.
    """
    problem, gauss_newton = operator.problem, _by_example(operator, method, draw)
    sampled, columns = gauss_newton.sampled, gauss_newton.num_columns
    make = partial(
        Estimator,
        operator,
        gauss_newton=gauss_newton,
        entries=draw.entries,
        pilot=draw.pilot,
    )
    passes = {0: "no backward pass", 1: "one backward pass"}.get(
        columns, f"{columns} backward passes"
    )
    if not isinstance(operator, Hessian):
        note = "random columns of the output Hessian" if sampled else f"{passes}, no probes"
        return Choice(make(), "split" if sampled else "exact", note)

    def proven() -> list[dict[str, str | None]]:
        found = exact_parameters(problem, mode=operator.mode, meter=operator.meter, on_step=on_step)
        return [asdict(one) for one in found]

    exactness = tuple(Exactness(**one) for one in decided("exactness", proven))
    curved = [e for e in exactness if not e.exact]
    left = Parameters(p for p, e in zip(problem.parameters, exactness, strict=True) if not e.exact)
    if curved and method == "exact":
        raise _not_exact(curved)
    name, probes, rethink = "split", None, None
    if curved:
        residual = Residual(problem, parameters=left, mode=operator.mode, meter=operator.meter)
        probes = _hutchinson(residual, draw, whole=problem.parameters)
        note = (
            f"Gauss-Newton part from {'random columns' if sampled else passes}; probes for the "
            f"rest in {len(curved)} of {len(exactness)} tensors: {curved[0].reason}"
        )
        rethink = Better(draw, on_step) if method == "auto" else None
    elif sampled:
        note = "random columns of the output Hessian; the rest of the diagonal is zero"
    else:
        name, note = "exact", f"{passes}; the model is piecewise linear in each tensor alone"
    estimator = make(probes=probes)
    return Choice(estimator, name, note, exactness, rethink, splits=True)


def _by_example(operator: Operator, method: str, draw: Draw) -> PerExample:
    """The matrix's Gauss-Newton part by the gradients of single examples, which are verified.

    Raises:
        UsageError: the problem does not allow it, or too many columns for the method.
    """
    problem = operator.problem
    require_examples(problem, operator.name)
    if not isinstance(operator, EmpiricalFisher):
        require_output_hessian(problem, operator.meter)
    make_part = type(operator) if isinstance(operator, Sandwich) else GaussNewton
    part = make_part(problem, mode=operator.mode, meter=operator.meter)
    sampled = method != "exact" and part.passes().columns.num_columns > AFFORDABLE_COLUMNS
    gauss_newton = PerExample(
        part,
        sampled=sampled,
        seed=draw.seed,
        first=draw.first,
        batches=draw.batches,
        stream=draw.stream(problem.parameters, exact=not sampled),
    )
    gauss_newton.verify()
    return gauss_newton


def _probed(
    operator: Operator, method: str, draw: Draw, on_step: OnStep, reason: str = "as asked for"
) -> Choice:
    """All of the matrix from probes."""
    estimator = Estimator(
        operator,
        probes=_hutchinson(operator, draw, design=_designed(operator, method, draw)),
        entries=draw.entries,
        pilot=draw.pilot,
    )
    name = "hutchinson" if method == "auto" else method
    rethink = Better(draw, on_step) if method == "auto" else None
    return Choice(estimator, name, reason, rethink=rethink)


def hurried(
    operator: Operator, groups: Sequence[Sequence[int]], why: str, draw: Draw, on_step: OnStep
) -> Choice:
    """All of the matrix from probes of batches that are taken as one.

    Each round brings every batch's next probe, where that takes no graph of its own, else as many
    as there are: what is under way when time is up counts for nothing.
    """
    joint = Joint(operator, groups)
    after = (
        (lambda probes: probes + 1) if joint.keeps_graphs else (lambda probes: max(2 * probes, 2))
    )
    probes = _hutchinson(joint, draw, round_after=after)
    estimator = Estimator(joint, probes=probes)
    return Choice(estimator, "hutchinson", why, rethink=Better(draw, on_step), hurried=True)


def _hutchinson(
    operator: Source,
    draw: Draw,
    whole: Parameters | None = None,
    design: Design | None = None,
    round_after: Callable[[int], int] | None = None,
) -> Hutchinson:
    return Hutchinson(
        operator,
        seed=draw.seed,
        sharing=draw.sharing,
        distribution=draw.distribution,
        first=draw.first,
        batches=draw.batches,
        whole=whole,
        design=design,
        stream=draw.stream(operator.parameters, exact=False),
        round_after=round_after,
    )


@dataclass(frozen=True)
class Better:
    """What needs fewer products than the many that plain probes still would.

    Args:
        draw: as of the plain probes.
        on_step: called after each product that is made to find out.
        fits: whether there is time for so many products.
        designs: whether other designs of probes are looked for, which takes some.
        foretells: whether what a turn leaves to do is measured, for a plan.
    """

    draw: Draw
    on_step: OnStep
    fits: Callable[[int], bool] = lambda _: True
    designs: bool = True
    foretells: bool = False

    def units(self, estimator: Estimator, probes: int) -> Turn | None:
        """Unit vectors, where they are fewer than so many probes.

        They say nothing before the last of them, so that there must be time for all.
        """
        size = estimator.parameters.size
        if size >= probes or not self.fits(size):
            return None
        why = f"{size} unit vectors, since they are fewer than {probes} probes"
        return Turn("unit vectors", why)

    def decide(self, estimator: Estimator, needed: float) -> Turn | None:
        """Its kind, if there is any."""
        size, probes = estimator.parameters.size, estimator.probes
        if size < needed < math.inf and self.fits(size):
            return Turn("unit vectors", _foretold(needed, "the unit vectors are fewer"))
        if probes is None or needed <= _MANY_PROBES or not self.designs:
            return None
        operator, seed = probes.operator, self.draw.seed
        layers = len(operator.parameters.layers)
        if 1 < layers <= _MANY_PROBES and self._pays(layers, operator, needed):
            ratio = stratified_ratio(operator, seed, self.on_step)
            if ratio < 0.5:
                why = f"probes by layer, which take {ratio:.0%} of the work"
                return Turn("stratified", _foretold(needed, why), work=ratio)
        steps = min(DEFLATION_STEPS, BASIS_BYTES // (8 * operator.parameters.size))
        if steps < 2 or not self._pays(_ALIKE, operator, needed):
            return None
        common = common_share(operator, seed, self.on_step)
        if common < COMMON_SHARE:
            return None
        why = f"the top {steps} Krylov directions exactly, probes for the rest"
        turn = Turn("deflated", _foretold(needed, why), steps)
        if not self.foretells:
            return turn
        return replace(turn, work=deflated_ratio(operator, steps, seed, self.on_step))

    def _pays(self, blocks: int, operator: Source, needed: float) -> bool:
        """Whether finding out takes little of what is left, as blocks of products of a batch."""
        least = _TRIED * blocks * REGIME_PROBES // len(operator.indices)
        return least <= needed and self.fits(least)

    def take(self, turn: Turn, estimator: Estimator) -> Estimator:
        """All by unit vectors, or another design for what is probed."""
        if turn.kind == "unit vectors":
            whole = estimator.operator.in_full()  # no error bar says more than float32's digits
            units = UnitVectors(whole, self.draw.stream(whole.parameters, exact=True))
            return Estimator(whole, gauss_newton=units, entries=estimator.entries)
        assert estimator.probes is not None  # or there is no other design
        operator = estimator.probes.operator
        design: Design = Stratified(operator)
        if turn.kind == "deflated":
            stream = self.draw.stream(operator.parameters, exact=True)
            whole_network = estimator.parameters
            design = Deflated(operator, turn.steps, self.draw.seed, stream, whole_network)
        fresh = replace(self.draw, seed=key(_TURN, self.draw.seed), first=0)
        return Estimator(
            estimator.operator,
            gauss_newton=estimator.gauss_newton,
            probes=_hutchinson(operator, fresh, whole=estimator.parameters, design=design),
            entries=estimator.entries,
        )


def _foretold(needed: float, why: str) -> str:
    many = f"{needed:.0f}" if math.isfinite(needed) else "that no number would do"
    return f"the first probes foretold {many}, so {why}"


def _designed(operator: Operator, method: str, draw: Draw) -> Design | None:
    if method == "stratified":
        return Stratified(operator)
    if method == "deflated":
        stream = draw.stream(operator.parameters, exact=True)
        return Deflated(operator, DEFLATION_STEPS, draw.seed, stream, operator.parameters)
    return None


def _not_exact(curved: list[Exactness]) -> UsageError:
    named = ", ".join(f"{e.name} ({e.reason})" for e in curved[:3])
    return UsageError(
        "the Hessian's diagonal is not the Gauss-Newton matrix's everywhere",
        f"{len(curved)} tensors: {named}",
        "--method split, or --matrix ggn",
    )
