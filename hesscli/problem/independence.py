"""Whether examples are independent: whether a batch may be cut without becoming another function.

A model may mix the examples of a batch (batch statistics in whatever form), a loss may (contrast,
ranking, a mean over what a mask leaves), and a sum is no mean. None of it can be read off the
code, so batches are taken apart and compared with their parts: outputs row by row, losses as the
mass-weighted mean or the sum of the parts'. Until that is proven, batches stay as the user made
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hesscli.memory import is_out_of_memory
from hesscli.problem.batches import Batch, is_sliceable, map_tensors, place, size_of, tensors_of
from hesscli.problem.blame import differing_module, label
from hesscli.problem.convolutions import as_products
from hesscli.problem.factory import blamed_on_user
from hesscli.problem.forward import flat_gradient, moved, retyped, undisturbed
from hesscli.problem.losses import Loss, StepLoss, UserLoss, require_number
from hesscli.problem.outputs import HiddenOutputsError
from hesscli.problem.precision import Narrowing, Widened, tolerance
from hesscli.problem.work import PassWork
from hesscli.results import Observe, Reduction, Snapshot, tell
from hesscli.sums import off_mean

MIN_GROUPS = 16
"""Random batches at least, so that error bars from data have degrees of freedom."""

MODEL_RAISED = "the model or its loss raised an error"
MUST_FIT = "[model], [data] and [loss] that fit together"

_MODEL_BATCHES = 3
"""Batches on which the model is run on parts; a loss of one's own is tried on all of them."""
_ROWS = 16
"""Rows that named losses are tried on, but of the first batch: they mix no more than the model."""
_QUARTERED = 16
"""Rows from which on they are tried in quarters."""
_MOST_NUMBERS = 1 << 23
"""Numbers in the outputs of the first batch's rows, lest the trial takes more than the run.

On the way to the loss so many are made at most of rows that are more than the user's.
"""
_ABSOLUTE = 1e3
"""Rounding, in eps, of a loss that is a difference of numbers of order one."""

_APART = 1e-2
"""How far, relatively, weights are moved from where a loss is zero."""

Places = Sequence[int]
Part = Callable[[Places], Batch]
"""Makes a batch of some examples of another, by their places in it."""


def must_fit(data: Any) -> str:
    """What to try where the user's code raises on batches of these data."""
    if not isinstance(data, (list, tuple)):
        return MUST_FIT
    return f"a list of single examples goes in as DataLoader(examples, batch_size=32); {MUST_FIT}"


def sliced(batch: Batch) -> Part:
    """Parts of a batch whose tensors have one row an example."""
    return lambda places: map_tensors(lambda tensor: _take(tensor, places), batch)


_NOTHING = PassWork()


@dataclass(frozen=True)
class Independence:
    """What was found.

    Attributes:
        mixes: what makes an example depend on its batch; None where nothing was seen to.
        unseen: why that could not be tested, else None.
        reduction: what a loss function of the user's does over its batch.
        rounded: what it does to the loss that inputs were rounded to the model's type, if much.
        change: the largest relative change that was seen.
        bound: what rounding may do.
        work: of a pass on the way to the loss; of none where nothing was run.
        passes: rows in each pass that was made to compare them.
    """

    mixes: str | None
    unseen: str | None
    reduction: Reduction
    rounded: str | None
    change: float
    bound: float
    work: PassWork = _NOTHING
    passes: tuple[int, ...] = ()

    @property
    def numbers(self) -> int:
        """That are made for one example on the way to the loss."""
        return self.work.numbers

    @property
    def proven(self) -> bool:
        """Whether batches may be cut at will."""
        return self.mixes is None and self.unseen is None


class IndependenceTest:
    """Takes the user's batches one after the other, whole and in parts.

    Args:
        model: in the mode that it is analysed in; left as it was.
        loss: what is computed of it.
        device: where to compute.
        dtype: the type that is analysed; float64 is tried first.
        hint: what to try where the model or its loss raises.
        observe: told of each batch that was compared; may end it.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        device: torch.device,
        dtype: torch.dtype,
        hint: str = MUST_FIT,
        observe: Observe | None = None,
    ) -> None:
        self.model, self.loss, self.device, self.hint = model, loss, device, hint
        self.observe = observe
        self._own = self._dtype = dtype
        self._bound = tolerance(dtype)
        self._batches = self._tried = 0
        self._change = 0.0
        self._weights = [p for p in model.parameters() if p.requires_grad]  # now, whatever is held
        self._mixes: str | None = None
        self._random = self._widened = False
        self._rounded: str | None = None
        self._outputs_each, self._work = 0, _NOTHING
        self._passes: list[int] = []
        # A loss that says "sum" is already divided by its mass.
        self._reductions: set[Reduction] = {"mean"}
        if loss.reduction is None:
            self._reductions = {"mean", "sum"}

    @property
    def result(self) -> Independence:
        """What was found so far."""
        return Independence(
            mixes=self._mixes,
            unseen=self._unseen,
            reduction="sum" if self._reductions == {"sum"} else "mean",
            rounded=self._rounded,
            change=self._change,
            bound=self._bound,
            work=self._work,
            passes=tuple(self._passes),
        )

    @property
    def separable(self) -> bool:
        """Whether batches may be cut anew; steps are left alone where they are groups enough."""
        enough = isinstance(self.loss, StepLoss) and self._batches >= MIN_GROUPS
        return self.result.proven and not enough

    @property
    def _unseen(self) -> str | None:
        if self._random:
            return "the outputs are random"
        return None if self._tried else "one example a batch, or no rows of examples"

    def see(self, batch: Batch, part: Part) -> None:
        """Compare a batch with its parts.

        Args:
            batch: of the user's, on the CPU.
            part: makes parts of it.

        Raises:
            HesscliError: the model or its loss does not take the whole batch.
        """
        self._batches += 1
        count = size_of(batch)
        if self._batches == 1:
            with blamed_on_user(MODEL_RAISED, self.hint):
                self._meet(batch if count <= _ROWS else part(range(_ROWS)))
        if count < 2 or not self.wants_more:
            return
        most = _ROWS if self._tried else max(_ROWS, _MOST_NUMBERS // max(1, self._outputs_each))
        if not self._is_users and count > most:
            count, batch = most, part(range(most))
        with self._running(self._dtype):
            value = self._compare(batch, part, count)
            if self._is_users and abs(value) <= _ABSOLUTE * torch.finfo(self._dtype).eps:
                with moved(self._weights, _APART):  # of nothing, everything is the mean and the sum
                    self._compare(batch, part, count)
        self._tried += 1
        tell(self.observe, Snapshot(phase="comparing batches with their parts"))

    def see_frozen(self, batches: Iterable[Batch]) -> None:
        """Compare batches that were frozen elsewhere."""
        for batch in batches:
            if is_sliceable(batch):
                self.see(batch, sliced(batch))

    def grows(self, batch: Batch, own: int) -> bool:
        """Whether a batch larger than the user's makes what its pieces make, as they are used to.

        Loss and gradient are compared: a loss may be zero, or the same by another way back. Of
        large networks there are fewer rows in it, but twice the user's.

        Args:
            batch: of examples that were found to be independent, on the CPU.
            own: examples in a batch of the user's.
        """
        most = max(2 * own, _MOST_NUMBERS // max(1, self._work.numbers))
        count = min(size_of(batch), most)
        pieces = [range(start, min(start + own, count)) for start in range(0, count, own)]
        with self._running(self._dtype), moved(self._weights, _APART):
            try:
                return self._are_parts(batch, range(count), pieces) <= self._bound
            except Exception:  # of any kind: there is no room, or the code is made for fewer
                return False

    def _are_parts(self, batch: Batch, all_places: Places, pieces: Sequence[Places]) -> float:
        """How far loss and gradient of a batch are from those of its pieces, which is relative."""
        whole, slope = self._slope(batch, all_places)
        parts, is_mean = list[_Piece](), self.result.reduction == "mean"

        def slopes() -> Iterator[tuple[float, Tensor]]:
            for places in pieces:
                part, its_slope = self._slope(batch, places)
                parts.append(part)
                yield part.mass if is_mean else 1.0, its_slope

        off = off_mean(slope if is_mean else slope.div_(len(pieces)), slopes())
        return max(off, self._change_of_loss(whole, parts, self.result.reduction))

    def _slope(self, batch: Batch, places: Places) -> tuple[_Piece, Tensor]:
        """Loss and mass of some examples, and their gradient, float64."""
        piece = _Piece(places, self._placed(sliced(batch)(places)))
        self._passes += [len(places)] * 3  # there, and the way back
        value, piece.mass = self.loss.value_and_mass(self.model, piece.batch, len(places))
        piece.value = float(value.detach())
        if not value.requires_grad:
            return piece, torch.zeros(1, dtype=torch.float64, device=self.device)
        reached = [p for p in self._weights if p.requires_grad]
        return piece, flat_gradient(value, reached)

    @property
    def _is_users(self) -> bool:
        """Whether the loss is a function of the user's."""
        return isinstance(self.loss, (UserLoss, StepLoss))

    @property
    def _reads_loss(self) -> bool:
        """Whether the loss may mix what the model does not."""
        return self._is_users or self.loss.is_claim

    @property
    def wants_more(self) -> bool:
        """Whether one more batch would tell anything."""
        if self._mixes is not None or self._random:
            return False
        if isinstance(self.loss, UserLoss):
            return True
        most = MIN_GROUPS if isinstance(self.loss, StepLoss) else _MODEL_BATCHES
        return self._tried < most

    def _meet(self, batch: Batch) -> None:
        """Run the first batch as it is; then find whether float64 is to be had."""
        with self._running(self._own):
            self._check(self._placed(batch))
            self._rounded = self._what_rounding_does(batch)
        if self._own == torch.float64:
            return
        narrowest = self._narrowest_in_float64(batch)
        if narrowest not in (None, torch.float64):
            self._widened = True
            if self._narrowest_in_float64(batch) == torch.float64:
                narrowest = torch.float64
            else:
                self._widened = False
        if narrowest is not None:
            self._dtype, self._bound = torch.float64, tolerance(narrowest)

    def _narrowest_in_float64(self, batch: Batch) -> torch.dtype | None:
        """The narrowest type that values have where float64 is asked for; None if it fails."""
        watch = Narrowing()
        try:
            with self._running(torch.float64), watch:
                self.loss.evaluate(self.model, place(batch, self.device, torch.float64))
        except Exception as error:  # of any kind: the code is the user's, made for another type
            if is_out_of_memory(error):
                raise
            return None
        return watch.narrowest

    def _what_rounding_does(self, batch: Batch) -> str | None:
        """Whether inputs of a wider type than the model's make another loss in their own.

        Most models take none but their own type, so that somebody rounds them before.
        """
        eps = torch.finfo(self._own).eps
        floating = [t for t in tensors_of(batch) if t.is_floating_point()]
        wider = [t.dtype for t in floating if torch.finfo(t.dtype).eps < eps]
        if not wider:
            return None
        value = float(self.loss.evaluate(self.model, self._placed(batch)).detach())
        as_given = map_tensors(lambda t: t.to(self.device), batch)
        try:
            unrounded = float(self.loss.evaluate(self.model, as_given).detach())
        except Exception as error:  # of any kind: it takes no other type
            if is_out_of_memory(error):
                raise
            return None
        if abs(unrounded - value) <= tolerance(self._own) * max(abs(unrounded), abs(value), 1.0):
            return None
        given, own = (str(kind).removeprefix("torch.") for kind in (wider[0], self._own))
        change = f"a loss of {unrounded:.6g} becomes {value:.6g}"
        return f"{given} inputs were rounded to the model's {own}: {change}"

    def _check(self, batch: Batch) -> None:
        """What the loss is of this model, outputs and targets that can be meant together."""
        self.loss = self.loss.settled(self.model, [batch])
        if self.loss.hidden is None:
            outputs = self.loss.outputs(self.model, batch)
            self._outputs_each = outputs.numel() // max(1, size_of(batch))
            self.loss.check(outputs, batch)
        with Narrowing() as watch:
            value = self.loss.evaluate(self.model, batch)
        count = max(1, size_of(batch))
        self._work = PassWork(
            operations=watch.operations,
            numbers=watch.numbers // count,
            multiplied=watch.multiplied // count,
            weights=sum(p.numel() for p in self.model.parameters()),
        )
        require_number(self.loss, value)

    @contextmanager
    def _running(self, dtype: torch.dtype) -> Iterator[None]:
        """The model in a type; with gradients on, for user's code may take some."""
        with ExitStack() as stack:
            if dtype != self._own:
                stack.enter_context(retyped(self.model, dtype))
                stack.enter_context(as_products())
            stack.enter_context(undisturbed(self.model, self.device))
            if self._widened and dtype == torch.float64:
                stack.enter_context(Widened())
            yield

    def _placed(self, batch: Batch) -> Batch:
        return place(batch, self.device, self._dtype)

    # -- one batch -----------------------------------------------------------------------------

    def _compare(self, batch: Batch, part: Part, count: int) -> float:
        """Put a batch to the test; its loss."""
        whole = self._run(self._placed(batch), count)
        runs_model = self._tried < _MODEL_BATCHES or whole.outputs is None
        splits: list[list[_Piece]] = []
        for split in _splits(count):
            splits.append([])
            for places in split:
                piece = _Piece(places, self._placed(part(places)))
                change = self._change_alone(whole, piece, runs_model=runs_model)
                if not change <= self._bound:
                    self._blame(whole, piece, change)
                    return whole.value
                self._change = max(self._change, change)
                splits[-1].append(piece)
        if self._reads_loss:
            self._add_up(whole, splits)
        return whole.value

    def _run(self, batch: Batch, count: int) -> _Piece:
        whole = _Piece(range(count), batch, self._outputs(batch, count))
        self._weigh(whole, whole.outputs)
        return whole

    def _change_alone(self, whole: _Piece, piece: _Piece, *, runs_model: bool) -> float:
        """How much a part's rows change by themselves; its loss and mass are noted."""
        try:
            rows = None if whole.outputs is None else _take(whole.outputs, piece.places)
            mine = self._outputs(piece.batch, len(piece.places)) if runs_model else rows
            self._weigh(piece, mine)
            if rows is None or mine is None or mine is rows:
                return 0.0
            if rows.shape == mine.shape:
                return _relative(rows, mine)
            # Padded to another width: the examples' losses are compared.
            losses = self.loss.numerators(whole.outputs, whole.batch)  # type: ignore[arg-type]
            return _relative(_take(losses, piece.places), self.loss.numerators(mine, piece.batch))
        except Exception as error:  # what code that refuses fewer examples does to them: all
            if is_out_of_memory(error):
                raise
            return math.inf

    def _outputs(self, batch: Batch, count: int) -> Tensor | None:
        """One row an example, or None where there is no such thing."""
        if self.loss.hidden is not None:
            return None
        self._passes.append(count)
        try:
            outputs = self.loss.outputs(self.model, batch).detach()
        except HiddenOutputsError:
            return None
        return outputs if outputs.dim() and len(outputs) == count else None

    def _weigh(self, piece: _Piece, outputs: Tensor | None) -> None:
        """Note the loss of a piece with such outputs, where that is asked, and its mass."""
        count = len(piece.places)
        if self._reads_loss and (outputs is None or self.loss.is_claim):
            value, piece.mass = self.loss.value_and_mass(self.model, piece.batch, count)
            piece.value = float(value.detach())
            return
        piece.mass = self.loss.mass(self.model, piece.batch, count)
        if self._reads_loss and outputs is not None:
            piece.value = float(self.loss.mean(outputs, piece.batch).detach())

    def _add_up(self, whole: _Piece, splits: list[list[_Piece]]) -> None:
        """Strike out the reductions by which the parts' losses do not make the whole's."""
        changes = {
            reduction: max(self._change_of_loss(whole, split, reduction) for split in splits)
            for reduction in self._reductions
        }
        self._reductions = {r for r, change in changes.items() if change <= self._bound}
        least = min(changes.values())
        if self._reductions:
            self._change = max(self._change, least)
        elif self._is_random(whole.batch):
            self._random = True
        else:
            self._change, self._mixes = least, f"the loss {self.loss.name}"

    def _change_of_loss(self, whole: _Piece, parts: list[_Piece], reduction: Reduction) -> float:
        if reduction == "mean":  # what weighs nothing has none, be it zero or not a number
            parts = [part for part in parts if part.mass]
        mass = sum(part.mass for part in parts) or math.nan
        terms = [p.value * (p.mass / mass if reduction == "mean" else 1.0) for p in parts]
        rounding = _ABSOLUTE * torch.finfo(self._dtype).eps / self._bound
        size = max(abs(whole.value), sum(map(abs, terms)), rounding)
        return _or_infinite(abs(sum(terms) - whole.value) / size)

    def _blame(self, whole: _Piece, piece: _Piece, change: float) -> None:
        """Name what mixes; outputs that differ from run to run say nothing of it."""
        if self._is_random(whole.batch):
            self._random = True
            return

        def same(together: Tensor, alone: Tensor) -> bool:
            if not together.dim() or len(together) <= max(piece.places):
                return True
            rows = _take(together, piece.places)
            return rows.shape != alone.shape or _relative(rows, alone) <= self._bound

        module = None
        if math.isfinite(change):
            run = partial(self.loss.outputs, self.model)
            module = differing_module(
                self.model, partial(run, whole.batch), partial(run, piece.batch), same
            )
        self._change, self._mixes = change, module or label("", self.model)

    def _is_random(self, batch: Batch) -> bool:
        first, second = (float(self.loss.evaluate(self.model, batch).detach()) for _ in range(2))
        return not abs(first - second) <= self._bound * max(abs(first), abs(second))


@dataclass
class _Piece:
    """Some examples of a batch, what the model makes of them, their loss and its mass."""

    places: Places
    batch: Batch
    outputs: Tensor | None = None
    value: float = 0.0
    mass: float = 0.0


def _take(tensor: Tensor, places: Places) -> Tensor:
    return tensor[torch.as_tensor(places, device=tensor.device)]


def _splits(count: int) -> Iterator[list[list[int]]]:
    """Pairs of whatever arrangement are broken, and no example is alone if that can be helped.

    Random quarters break three pairs of four. Where there are too few examples for them, halves
    and a random third against the rest do.
    """
    order = np.random.Generator(np.random.Philox(key=count)).permutation(count).tolist()
    if count >= _QUARTERED:
        yield [order[part::4] for part in range(4)]
        return
    yield [list(range(count // 2)), list(range(count // 2, count))]
    if count > 2:
        third = max(count // 3, min(2, count // 2))
        yield [order[:third], order[third:]]


def _relative(value: Tensor, other: Tensor) -> float:
    value, other = value.double(), other.double()  # whole numbers and masks have no norm
    scale = torch.maximum(value.norm(), other.norm())
    difference = float((value - other).norm())
    return _or_infinite(difference / float(scale)) if difference else _or_infinite(difference)


def _or_infinite(change: float) -> float:
    return change if math.isfinite(change) else math.inf
