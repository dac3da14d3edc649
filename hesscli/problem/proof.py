"""The proof that this is the user's model on the user's data: one pass over what was kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from hesscli import world
from hesscli.errors import UnsoundError, UsageError, first_line
from hesscli.memory import is_out_of_memory
from hesscli.meter import FORWARD, OnStep, go_on
from hesscli.problem.batches import tensors_of
from hesscli.problem.blame import no_gradient
from hesscli.problem.factory import blamed_on_user
from hesscli.problem.independence import MODEL_RAISED
from hesscli.problem.losses import Loss, require_number, same_mean
from hesscli.problem.objective import Objective, WeightedBatch
from hesscli.problem.outputs import HiddenOutputsError
from hesscli.problem.precision import tolerance
from hesscli.results import Observe, Snapshot, tell
from hesscli.sums import shared_sum


@dataclass(frozen=True)
class Proof:
    """What shows that this is the user's model on the user's data.

    ``unreached`` names the parameters that the loss of no batch depends on. ``hidden_outputs``
    says why the loss is not the function of the outputs that it was taken for; None where it is.
    ``saturated`` says that the classes of all examples are so sure that their loss has no digit
    left. ``gradients`` is the work it took, and ``again`` that of reading its gradient. ``lengths``
    are of the batches' gradients: with the loss they tell problems apart. ``rounding`` is what may
    be so of the gradient, relative to these.
    """

    loss: float
    accuracy: float | None
    gradient_norm: float
    unreached: tuple[str, ...]
    hidden_outputs: str | None
    gradients: float
    again: float
    make_gradient: Callable[[], Tensor] = field(repr=False)
    lengths: tuple[float, ...] = ()
    saturated: str | None = None
    rounding: float = 0.0

    @property
    def gradient(self) -> Tensor:
        """Of the whole loss, float64 ``(d,)``; made anew where it was too large to be kept."""
        return self.make_gradient()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What its reader should be told."""
        told = [self.saturated] if self.saturated else []
        if self.hidden_outputs is not None:
            told.append(f"{self.hidden_outputs}: no accuracy, and no matrix but hessian")
        return tuple(told)


@dataclass(frozen=True)
class _Share:
    """What one batch says: its part of the loss, and the length of its gradient.

    ``right`` and ``of`` are its predictions, ``reached`` is whether each parameter was; ``depends``
    whether any loss at all was differentiable, ``hidden`` why the loss is not of the outputs.
    """

    index: int
    loss: float
    length: float
    right: float
    of: float
    reached: tuple[bool, ...]
    depends: bool
    hidden: str | None
    gradients: float


_KEPT = 1 << 28
"""Bytes of a gradient up to which it is kept: few commands read it."""


def _kept(gradient: Tensor) -> Tensor:
    return gradient


def _made_anew(problem: Objective) -> Tensor:
    """The whole loss's gradient, as the proof has seen it."""

    def its_gradient(batch: WeightedBatch) -> Iterator[Tensor]:
        with problem.forward_context(), problem.recomputing():
            parts = _gradient(problem, problem.evaluate(batch.data), batch)
        yield from map(_flat, parts, problem.parameters.tensors)

    groups = world.share(problem.unshared())
    return _summed(problem, (problem.batch(*group) for group in groups), its_gradient)


def _summed(
    problem: Objective,
    batches: Iterable[WeightedBatch],
    its_gradient: Callable[[WeightedBatch], Iterator[Tensor]],
) -> Tensor:
    """All ranks' gradients, float64 ``(d,)``, tensor by tensor, and that of weight decay."""
    parameters = problem.parameters
    total = torch.zeros(parameters.size, dtype=torch.float64, device=problem.device)
    total = shared_sum(batches, total, its_gradient)
    if problem.weight_decay:
        for part, tensor in zip(parameters.split(total), parameters.tensors, strict=True):
            part.add_(tensor.detach(), alpha=problem.weight_decay)
    return total


class _Reading:
    """A rank's way through its batches.

    Attributes:
        shares: what those say whose gradients have been taken to their end.
    """

    def __init__(self, problem: Objective, observe: Observe | None) -> None:
        self.problem, self._observe = problem, observe
        self.shares: list[_Share] = []
        self._done = 0

    def gradient(self, batch: WeightedBatch) -> Iterator[Tensor]:
        """A batch's, flat, tensor by tensor.

        Raises:
            UnsoundError: a non-finite loss, or labels out of range.
            KeyboardInterrupt: the observer wanted no more.
        """
        problem = self.problem
        with problem.forward_context(), problem.recomputing():
            with blamed_on_user(MODEL_RAISED, _must_fit(problem, batch)):
                seen, value = _run(problem, batch)
            _require_finite_loss(problem, value, batch)
            _require_own_weights(problem, value)
            parts, square = _gradient(problem, value, batch), 0.0
        for part, tensor in zip(parts, problem.parameters.tensors, strict=True):
            found = _flat(part, tensor)
            square += float(torch.linalg.vector_norm(found)) ** 2
            yield found
        cost = problem.gradient_cost + FORWARD * seen.has_run
        self.shares.append(
            _Share(
                index=batch.index,
                loss=batch.weight * float(value.detach()),
                length=batch.weight * math.sqrt(square),
                right=seen.right,
                of=seen.of,
                reached=tuple(part is not None for part in parts),
                depends=value.requires_grad,
                hidden=seen.hidden or _why_another(problem, value, seen.mean),
                gradients=cost * problem.share_of(batch.count),
            )
        )
        total = problem.data.count
        self._done = min(total, self._done + world.size() * batch.count)
        tell(self._observe, Snapshot(phase="loss and gradient", done=self._done, total=total))


def prove(problem: Objective, observe: Observe | None = None) -> Proof:
    """Loss, accuracy, gradient and reach over all kept examples.

    Raises:
        UnsoundError: a non-finite loss or gradient, or labels out of range.
        KeyboardInterrupt: the observer wanted no more.
    """
    parameters, decay = problem.parameters, problem.weight_decay
    reading, tried = _Reading(problem, observe), _tried_again(problem)
    # A claim is put to the test on every batch as it is.
    groups = [(i,) for i in problem.indices] if problem.loss.is_claim else problem.unshared()
    mine = (problem.batch(*group) for group in world.share(groups))
    gradient = _summed(problem, mine, reading.gradient)
    gathered = world.gathered(reading.shares)
    shares = sorted((one for each in gathered for one in each), key=lambda s: s.index)
    if not any(one.depends for one in shares):
        raise _independent(problem)
    _require_finite_gradient(problem, gradient)
    correct, possible = sum(one.right for one in shares), sum(one.of for one in shares)
    hidden = problem.loss.hidden if problem.loss.is_claim else None
    hidden = hidden or next((one.hidden for one in shares if one.hidden), None)
    reached = [any(each) for each in zip(*(one.reached for one in shares), strict=True)]
    loss, is_kept = sum(one.loss for one in shares), gradient.nbytes <= _KEPT
    if decay:
        squares = (t.detach().double().square().sum() for t in problem.trainable.tensors)
        loss += 0.5 * decay * float(sum(squares))
    return Proof(
        loss=loss,
        accuracy=correct / possible if possible and hidden is None else None,
        gradient_norm=float(torch.linalg.vector_norm(gradient)),
        unreached=tuple(p.name for p, r in zip(parameters, reached, strict=True) if not r),
        hidden_outputs=hidden,
        gradients=tried + sum(one.gradients for one in shares),
        again=0.0 if is_kept else problem.gradient_cost * problem.joint_share,
        make_gradient=partial(_kept, gradient) if is_kept else partial(_made_anew, problem),
        lengths=tuple(one.length for one in shares),
        saturated=_saturation(problem) if possible and loss == 0 else None,
        rounding=tolerance(problem.autocast or problem.dtype),
    )


def measured(problem: Objective, on_step: OnStep = go_on) -> tuple[float, float | None]:
    """Loss of the data alone, and accuracy, at whatever the weights are now.

    Unlike the proof it puts nothing to the test: a loss that is not finite is told as it is.

    Args:
        problem: whose weights may be any.
        on_step: called after each batch; may end it.
    """
    own = list[tuple[int, float, float, float]]()
    groups = [(i,) for i in problem.indices] if problem.loss.is_claim else problem.joint()
    with world.apart():
        for group in world.share(groups):
            batch = problem.batch(*group)
            seen, value = _run(problem, batch)
            own.append((batch.index, batch.weight * float(value.detach()), seen.right, seen.of))
            on_step()
    shares = sorted(one for each in world.gathered(own) for one in each)
    loss, right, of = (sum(column) for column in list(zip(*shares, strict=True))[1:])
    return loss, right / of if of else None


def _saturation(problem: Objective) -> str:
    """Probabilities that are 1 to the last digit have no derivatives left to see."""
    name = str(problem.dtype).removeprefix("torch.")
    more = "" if problem.dtype == torch.float64 else "; --dtype float64 may see more"
    return (
        f"the loss of every example is exactly 0 in {name}: saturated, as its derivatives are{more}"
    )


def _must_fit(problem: Objective, batch: WeightedBatch) -> str:
    """What to try where the user's code raises."""
    if batch.count == 1 and problem.couples_examples is not None:
        return (
            f"the last batch has one example, and {problem.couples_examples} mixes them: "
            "--examples or --batch-size that leaves none over, or drop_last in the loader"
        )
    return problem.must_fit


@dataclass(frozen=True)
class _Seen:
    """What a batch's outputs show: right and possible predictions, and what a claim comes to.

    ``mean`` is what a loss which is claimed to be a function of the outputs makes of them;
    ``has_run`` says that the model was run once more for it.
    """

    right: float = 0.0
    of: float = 0.0
    mean: float | None = None
    hidden: str | None = None
    has_run: bool = False


def _run(problem: Objective, batch: WeightedBatch) -> tuple[_Seen, Tensor]:
    """What a batch's outputs show, and its mean loss as a live scalar."""
    loss = problem.loss
    if loss.hidden is not None:
        return _Seen(), problem.evaluate(batch.data)
    if loss.is_of_outputs:
        outputs = problem.outputs(batch.data)
        seen = _read(loss, outputs.detach(), batch)
        with problem.forward_context():
            return seen, loss.mean(outputs, batch.data)
    try:
        seen = _read(loss, problem.fixed_outputs(batch.data), batch)
    except HiddenOutputsError as error:
        seen = _Seen(hidden=error.got)
    return replace(seen, has_run=True), problem.evaluate(batch.data)


def _read(loss: Loss, outputs: Tensor, batch: WeightedBatch) -> _Seen:
    """Labels are checked here, before the loss reads them."""
    loss.check(outputs, batch.data)
    with torch.no_grad():
        right, of = loss.correct(outputs, batch.data) or (0.0, 0.0)
        mean = float(loss.mean(outputs, batch.data)) if loss.is_claim else None
    return _Seen(float(right), float(of), mean)


def _why_another(problem: Objective, value: Tensor, mean: float | None) -> str | None:
    """Why a loss is not what was made of its outputs; None where it is."""
    if mean is None or same_mean(value, mean):
        return None
    return f"the loss {problem.loss.name!r} is not that of the model's outputs alone"


def _gradient(problem: Objective, value: Tensor, batch: WeightedBatch) -> tuple[Tensor | None, ...]:
    """The batch's gradient as autograd gives it, None where a parameter is not reached."""
    if not value.requires_grad:
        return (None,) * len(problem.parameters)
    try:
        return torch.autograd.grad(value, problem.parameters.tensors, allow_unused=True)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        run = partial(problem.evaluate, batch.data)
        raise no_gradient(problem.model, run, error) from None


def _flat(part: Tensor | None, tensor: Tensor) -> Tensor:
    """A tensor's part of the gradient, with its zeros."""
    found = torch.zeros_like(tensor, requires_grad=False) if part is None else part
    return (found.to_dense() if found.is_sparse else found).reshape(-1)


def _independent(problem: Objective) -> UnsoundError:
    names = problem.parameters.names
    some = f"{', '.join(names[:5])} ({len(names)} tensors)"
    if len(names) < len(problem.trainable):
        return UnsoundError(
            "the loss depends on no parameter that the matrix is restricted to",
            some,
            "--params of others, or no torch.no_grad() or .detach() between these and the loss",
        )
    return UnsoundError(
        "the loss does not depend on any parameter through autograd",
        "a loss without a gradient",
        "no torch.no_grad(), .detach() or .item() between parameters and loss",
    )


_TRIED = 2
"""Examples on which blocks are run again to see whether the gradient is the same."""


def _tried_again(problem: Objective) -> float:
    """See that the gradient is what it was where blocks are run again by themselves.

    It is not where one reads or leaves something beside what it is given: a cache, a counter, or
    what another block has left.

    Returns:
        The gradients that it took.

    Raises:
        UsageError: it is another, or there is none.
    """
    if not problem.blocks:
        return 0.0
    sample, got = problem.sample(_TRIED), ""

    def slopes() -> list[Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # whether the loss is random is another question
            value = problem.evaluate(sample.data)
            _require_own_weights(problem, value)
            parts = _gradient(problem, value, sample)
        return list(map(_flat, parts, problem.parameters.tensors))

    with problem.forward_context():
        expected = slopes()
        try:
            with problem.recomputing() as calls:
                found = slopes()
        except Exception as error:  # of any kind: the code is the user's
            if is_out_of_memory(error):
                raise
            got = first_line(error) or type(error).__name__
        else:
            off = math.hypot(*(float((a - b).norm()) for a, b in zip(found, expected, strict=True)))
            size = math.hypot(*(float(part.norm()) for part in expected))
            if not calls[0]:
                got = f"none of {len(problem.blocks)} blocks is called as a function"
            elif not off <= tolerance(problem.dtype) * size:
                got = f"a gradient that is off by {off / size:.2g} of its length"
    if got:
        raise UsageError(
            "the model's blocks cannot be run again by themselves",
            got,
            "no --checkpoint-activations; or blocks that read and write nothing but their "
            "arguments (of a Hugging Face model, use_cache = false)",
        )
    return (2 * problem.gradient_cost + FORWARD) * problem.share_of(sample.count)


def _require_own_weights(problem: Objective, value: Tensor) -> None:
    """See that a copy of the model reads none of the weights that it was copied from.

    A function that closes over a module of the model, as a hook may, still reads the old one.
    """
    originals = [p for p in problem.originals if p.requires_grad]
    if not originals or not value.requires_grad:
        return
    slopes = torch.autograd.grad(value, originals, allow_unused=True, retain_graph=True)
    if any(slope is not None for slope in slopes):
        raise UnsoundError(
            "a copy of the model in another type or place still reads your model's weights",
            f"{sum(slope is not None for slope in slopes)} of {len(originals)} tensors",
            "hand over a model that has the --dtype and is on the --device already",
        )


def _require_finite_loss(problem: Objective, value: Tensor, batch: WeightedBatch) -> None:
    require_number(problem.loss, value)
    if not torch.isfinite(value):
        broken = [t for t in tensors_of(batch.data) if not torch.isfinite(t).all()]
        raise UnsoundError(
            "the loss is not finite",
            f"{float(value.detach())} on batch {batch.index}"
            + (" whose inputs hold NaN or infinity" if broken else ""),
            "clean inputs" if broken else "--dtype float64, or a checkpoint that has converged",
        )


def _require_finite_gradient(problem: Objective, gradient: Tensor) -> None:
    parts = zip(problem.parameters, problem.parameters.split(gradient), strict=True)
    bad = [p.name for p, part in parts if not torch.isfinite(part).all()]
    if bad:
        raise UnsoundError(
            "the gradient is not finite",
            f"NaN or infinity in the gradient of {', '.join(bad[:5])} ({len(bad)} tensors)",
            "inputs without infinities, and no sqrt or norm of exactly 0 in model or loss",
        )
