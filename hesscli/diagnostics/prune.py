"""Weights that go, the others making up for them, and what the network is worth then."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from hesscli.diagnostics.arguments import as_asked
from hesscli.diagnostics.keeping import UNKEPT, Ledger
from hesscli.diagnostics.measurement import Work, drive
from hesscli.diagnostics.plans import Pilot
from hesscli.diagnostics.pruning_choice import Aim, Candidates
from hesscli.diagnostics.pruning_study import METHODS, MFAC, PruningStudy, require_room, stages
from hesscli.diagnostics.reporting import described
from hesscli.diagnostics.run import Clock, started
from hesscli.diagnostics.window import WindowOptions, raising_leverage
from hesscli.errors import InputError
from hesscli.problem.problem import Problem
from hesscli.problem.rewriting import Rewriting
from hesscli.results import (
    HOLDS_WITHIN,
    LOW_LEVERAGE,
    LayerPruned,
    Observe,
    PrunedBy,
    PruneResult,
    Sparsity,
    Status,
)
from hesscli.vocabulary import PRUNING_DAMPING, USUAL_BUDGET


@as_asked
def prune(
    problem: Problem,
    *,
    matrix: str = "hessian",
    sparsity: float | None = None,
    pattern: str | None = None,
    steps: int = 1,
    per_layer: bool = False,
    window: WindowOptions | None = None,
    budget: float | None = USUAL_BUDGET,
    seed: int = 0,
    mode: str = "auto",
    observe: Observe | None = None,
    ledger: Ledger = UNKEPT,
) -> PruneResult:
    """Weights of the least saliency go, and the others move so that the loss grows least.

    The model is left as it is: the result has the weights as arrays, to be loaded as below, and
    where they came from a checkpoint, what writes one like it.

    Args:
        problem: model, loss and frozen examples. Entries of its matrices and kernels may go.
        matrix: by which the change of the loss is predicted; which weights go is the window's.
        sparsity: share of these that are to be zero; default the pattern's, else a half.
        pattern: N:M, of M weights for consecutive inputs no more than N are to stay, of which every
            choice is tried; or RxC, blocks of R outputs by C inputs go or stay whole. Either is
            scored with the inverse's block of the whole group. None where any weight may go.
        steps: in each the same share of what is left goes, by a window of gradients of its own.
        per_layer: each layer is to have the sparsity, and not all of them together.
        window: which gradients stand for the matrix that is inverted; by default with a damping
            of 1e-2, for many weights go together.
        budget: seconds; None for no limit.
        seed: of sampled rows.
        mode: autodiff mode of the prediction.
        observe: told how far the run is; returning True ends it at its result so far.
        ledger: keeps the run, so that it can go on from there.

    Raises:
        UsageError: a sparsity that cannot be, or that the weights have already; rows, blocks or a
            window that cannot be.
        InputError: the run is kept, and there can be no checkpoint like the one it is of.
        UnsoundError: the problem's curvature would mean nothing, or all gradients are zero.
        BudgetError: there was no time for one step.
        KeyboardInterrupt: stopped before there was one.

    >>> import hesscli
    >>> model, data = torch.nn.Linear(8, 4), (torch.randn(64, 8), torch.arange(64) % 4)
    >>> result = prune(hesscli.Problem(model, "cross_entropy", data), sparsity=0.75)
    >>> weights = {name: torch.from_numpy(each) for name, each in result.weights.items()}
    >>> model.load_state_dict(model.state_dict() | weights)
    <All keys matched successfully>
    >>> int((model.weight == 0).sum())
    24
    """
    aim = Aim.of(sparsity, steps, per_layer, pattern)
    candidates = Candidates(problem.parameters, aim.pattern)
    rewriting = _rewriting(problem, candidates, required=ledger is not UNKEPT)
    options = window or WindowOptions(damping=PRUNING_DAMPING)
    options = replace(options, size=ledger.decided("rows", lambda: options.count(problem)))
    with started(problem, matrix, mode, Clock(budget, observe), ledger) as run:
        study = PruningStudy(run, aim, candidates, options, seed, rewriting)
        status = drive(run.clock, study, run.ledger) or "converged"
        return _result(study, status)


def _rewriting(problem: Problem, candidates: Candidates, *, required: bool) -> Rewriting | None:
    """How the checkpoint is written; None where there is none, and none is asked for."""
    if problem.origin.file is None:
        return None
    try:
        return Rewriting(problem.origin, candidates.parameters)
    except InputError:
        if required:
            raise
        return None


# -- What a study found, as its result -------------------------------------------------------------


def _result(study: PruningStudy, status: Status) -> PruneResult:
    run, aim, window, problem = study.run, study.aim, study.pruned.window, study.problem
    assert window is not None  # a step is done
    weights = study.as_written(study.pruned.weights)
    zeros = weights[study.candidates.columns] == 0
    layers = tuple(_layers(study, zeros))
    return PruneResult(
        status=status,
        method=run.method(
            "mfac", study.seed, f"exact update of all that stays; {window.row_kind} rows"
        ),
        cost=run.cost(),
        sparsity=Sparsity(
            asked=aim.sparsity,
            reached=float(zeros.double().mean()),
            num_weights=len(zeros),
            num_zeros=int(zeros.sum()),
        ),
        steps=aim.steps,
        per_layer=aim.per_layer,
        pattern=None if aim.pattern is None else str(aim.pattern),
        before=study.before,
        methods=tuple(_methods(study)),
        predicted=None if study.predicted is None else sum(study.predicted),
        holds=_holds(study),
        window=window,
        layers=layers,
        weights=problem.parameters.by_name(weights, problem.dtype),
        checkpoint=study.files(weights),
        **run.header(_warnings(study, layers)),
    )


def _holds(study: PruningStudy) -> bool | None:
    """Whether the loss changed as it was predicted to; None where either is unknown."""
    after, before = study.pruned.qualities[-1].loss, study.before.loss
    if study.predicted is None or after is None or before is None:
        return None
    linear, quadratic = study.predicted
    off = after - before - linear - quadratic
    return abs(off) <= HOLDS_WITHIN * (abs(linear) + abs(quadratic))


def _methods(study: PruningStudy) -> Iterator[PrunedBy]:
    """Those that came to some sparsity, the one that is written first."""
    for name in METHODS:
        network = study.networks[name]
        if not network.qualities:
            continue
        yield PrunedBy(
            name=name,
            loss=network.qualities[-1].loss,
            accuracy=network.qualities[-1].accuracy,
            recalibrated=network.recalibrated,
            steps=tuple(network.qualities),
        )


def _layers(study: PruningStudy, zeros: Tensor) -> Iterator[LayerPruned]:
    """Every layer that has weights which may go, in the model's order."""
    pruned, parameters = study.pruned, study.problem.parameters
    for name, place in study.candidates.layers.items():
        owned = parameters.in_layer(name)
        seen = pruned.leverage[place]
        seen = seen[~seen.isnan()]
        yield LayerPruned(
            name=name,
            num_parameters=sum(p.numel for p in owned),
            parameters=described(owned),
            num_weights=place.stop - place.start,
            num_zeros=int(zeros[place].sum()),
            leverage=float(seen.median()) if len(seen) else None,
        )


def _warnings(study: PruningStudy, layers: tuple[LayerPruned, ...]) -> Iterator[str]:
    """What a careful reader of the numbers must know."""
    pruned, aim = study.pruned, study.aim
    if len(pruned.qualities) < aim.steps:
        yield (
            f"{len(pruned.qualities)} of {aim.steps} steps: {pruned.gone.double().mean():.1%} of "
            f"the weights are zero, and not {aim.sparsity:.1%}; more --budget, or --resume"
        )
    if missing := [
        n for n in METHODS if len(study.networks[n].qualities) < aim.steps and n != MFAC
    ]:
        yield f"no time to compare with {' and '.join(missing)} pruning: more --budget, or --resume"
    assert pruned.window is not None
    known = {x.name: x.leverage for x in layers if x.leverage is not None}
    low = [name for name, leverage in known.items() if leverage < LOW_LEVERAGE]
    if low:
        absolute = study.options.absolute
        cure = raising_leverage([known[name] for name in low], pruned.window, absolute=absolute)
        yield (
            f"leverage below {LOW_LEVERAGE:.0%} in {', '.join(low[:5])} ({len(low)} layers): which "
            f"weights went there is a matter of magnitude; {cure}"
        )
    if empty := [layer.name for layer in layers if layer.num_zeros == layer.num_weights]:
        spread = "" if aim.per_layer else "--per-layer, "
        yield (
            f"no weight is left in {', '.join(empty[:5])} ({len(empty)} layers): {spread}a "
            "lower --sparsity, or --params '!GLOB' that spares them"
        )
    if torch.equal(pruned.weights, study.original) and len(pruned.qualities) == aim.steps:
        yield (
            f"no weight went: {aim.sparsity:.3g} of {study.candidates.count} is what was zero "
            "already, or less than one"
        )
    if whole := study.candidates.whole:
        yield (
            f"{', '.join(whole[:5])} ({len(whole)} tensors) stay whole: groups of {aim.pattern} do "
            "not fit their outputs and inputs"
        )
    if pruned.window.rows < study.options.count(study.problem):
        yield (
            f"the window of gradients has {pruned.window.rows} rows: "
            f"{study.problem.data.count} examples give no more of kind {pruned.window.row_kind}"
        )
    if study.problem.weight_decay:
        yield "losses are of the data alone: weight decay falls with whatever weight goes"


# -- What ``hesscli prune`` will take --------------------------------------------------------------


def plan(pilot: Pilot) -> Iterator[Work]:
    """Half of the weights, at once, through the window that is asked for."""
    problem = pilot.run.problem
    candidates = Candidates(problem.parameters)
    require_room(problem, candidates)
    yield from stages(problem, candidates, pilot.asked.window, 1, pilot.pace)
