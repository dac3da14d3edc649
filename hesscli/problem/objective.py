"""A loss as a function of a model's parameters, over frozen and weighted batches of examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from hesscli import world
from hesscli.memory import Together, free_bytes, is_out_of_memory, room_for_more
from hesscli.meter import BACKWARD, FORWARD, Algebra
from hesscli.parameters import Parameters
from hesscli.problem.batches import (
    Batch,
    form_of,
    joined,
    map_tensors,
    near,
    place,
    rows,
    size_of,
)
from hesscli.problem.convolutions import as_products
from hesscli.problem.forward import flat_gradient, retyped, standing_in, undisturbed
from hesscli.problem.freezing import FrozenData
from hesscli.problem.independence import MUST_FIT, Independence
from hesscli.problem.losses import Loss
from hesscli.problem.precision import Narrowing, Precision, Widened, tolerance
from hesscli.problem.recomputing import recomputed
from hesscli.problem.restriction import held_fixed, shares_of_way_back
from hesscli.problem.work import of_algebra
from hesscli.sums import off_mean
from hesscli.units import human_bytes

_EXAMPLES = 8
"""That are run in float64 to see what becomes of it."""
_CHECKS_IN_FLOAT64 = 28
"""Times the weights that checks take at most: the weights in float64, and a dozen vectors."""
_NUMBERS_AT_ONCE, _TIMES_THE_WEIGHTS = 1 << 22, 2
"""That the examples of a batch may make at least."""
_NUMBERS_TO_PAY = 1 << 20
"""Below which calling operations takes longer than what they compute: five small networks took two
to five times as long in batches of a sixteenth of that, and as long in larger ones."""
_STAYS = 0.1
"""Of a device's free memory, what frozen examples may take for good."""


@dataclass(frozen=True)
class WeightedBatch:
    """One batch on the device; ``weight`` is its share of the whole weight mass.

    Of batches that were joined ``index`` is the first's number.
    """

    index: int
    data: Batch
    weight: float
    count: int


@dataclass(frozen=True)
class _Grown:
    """Whether a batch larger than the user's has the loss of its parts, and what that took."""

    is_same: bool
    gradients: float = 0.0


class Objective:
    """The mean of a loss over batches, by their mass.

    Args:
        model: whose parameters it is a function of.
        parameters: those that it is differentiated by, one at least.
        trainable: those that weight decay is on, these included; default these.
        autocast: the type that products are made in, where it is not the weights'.
        blocks: of the model, which keep nothing of a pass but what they are given.
        loss: settled on this model.
        data: frozen batches.
        independence: what is known of the examples of a batch.
        masses: the weight of every batch.
        weight_decay: coefficient of ½‖θ‖², which no batch's loss has.
        originals: the parameters that the model's are copies of, if they are.
        must_fit: what to try where the model or its loss raises.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Parameters,
        loss: Loss,
        data: FrozenData,
        independence: Independence,
        masses: Sequence[float],
        weight_decay: float,
        originals: Sequence[Tensor] = (),
        must_fit: str = MUST_FIT,
        trainable: Parameters | None = None,
        autocast: torch.dtype | None = None,
        blocks: Sequence[nn.Module] = (),
    ) -> None:
        self.model, self.parameters, self.loss = model, parameters, loss
        self.data, self.independence, self.masses = data, independence, masses
        self.total_weight, self.weight_decay = sum(masses), weight_decay
        self.originals, self.must_fit = originals, must_fit
        self.trainable = parameters if trainable is None else trainable
        self._fixed = self.trainable.without(parameters).tensors
        self.device: torch.device = self.trainable[0].tensor.device
        self.dtype: torch.dtype = self.trainable[0].tensor.dtype
        self._own, self._autocast, self.blocks = self.dtype, autocast, blocks
        self.together = Together()
        self.retypings = 0  # a graph that was made before one is cut off from the parameters
        self._widened = self._is_widening = False
        self._joint: dict[int, tuple[tuple[int, ...], ...]] = {}
        self._batches = data.batches
        if self.device.type == "cuda":
            self._batches = near(data.batches, self.device, _STAYS * free_bytes(self.device))

    # -- data ----------------------------------------------------------------------------------

    @property
    def num_batches(self) -> int:
        """Number of frozen batches."""
        return len(self._batches)

    @property
    def sampling_fraction(self) -> float | None:
        """Kept examples over available ones; None where the loader was not seen to the end."""
        return self.data.fraction

    @property
    def couples_examples(self) -> str | None:
        """What makes an example's output or loss depend on its batch, or None."""
        return self.independence.mixes

    @property
    def separable(self) -> bool:
        """Whether a batch may be taken apart: rows are examples and nothing mixes them."""
        return self.data.sliceable and self.independence.mixes is None

    @cached_property
    def indices(self) -> tuple[int, ...]:
        """The batches that weigh something."""
        return tuple(i for i, mass in enumerate(self.masses) if mass > 0)

    def batches(self) -> Iterator[WeightedBatch]:
        """All batches that weigh something, one at a time on the device."""
        return map(self.batch, self.indices)

    def batch(self, *indices: int) -> WeightedBatch:
        """One batch on the device, or some of :meth:`joint` as one."""
        share = sum(self.masses[i] for i in indices) / self.total_weight
        parts = [place(self._batches[i], self.device, self.dtype) for i in indices]
        data = parts[0] if len(parts) == 1 else joined(parts)
        return WeightedBatch(indices[0], data, share, sum(self.data.counts[i] for i in indices))

    def joint(self, among: Sequence[int] | None = None) -> tuple[tuple[int, ...], ...]:
        """Batches that are best computed as one, where what is wanted is their sum or their rows.

        Examples that are independent are cut into more batches than a gradient needs, so that
        these show how examples differ. Joined they are no larger than the user's own, unless those
        are too small to pay and more are seen to make the same; no larger than pays, and no fewer
        than there are ranks, if that is possible. Some batches of a run, which may be joined to
        others of another, are no larger than the user's own.

        Args:
            among: the numbers of some batches; default all that weigh something.
        """
        if among is not None:
            return self._joined(among, world.size(), self.data.together)
        if (ranks := world.size()) not in self._joint:
            self._joint[ranks] = self._joined(self.indices, ranks, self._paying)
        return self._joint[ranks]

    def unshared(self) -> tuple[tuple[int, ...], ...]:
        """The same where one process computes all: whatever is made of these is made by any ranks.

        By their loss and gradient a ledger recognises a problem.
        """
        return self._joined(self.indices, 1, self._paying)

    @property
    def _paying(self) -> int:
        """Examples in a batch of the user's, or more where that is too small to pay."""
        if not (self._may_be_joined and self._grown.is_same):
            return self.data.together
        return max(self.data.together, _NUMBERS_TO_PAY // self.independence.numbers)

    def _joined(
        self, among: Sequence[int], ranks: int, together: int
    ) -> tuple[tuple[int, ...], ...]:
        if len(among) < 2 or not self._may_be_joined:
            return tuple((index,) for index in among)
        most = min(together, self.at_once(self.independence.numbers))
        groups = list(_to_be_joined(self.data.batches, among, most))
        if len(groups) < ranks:
            each = -(-len(among) // ranks) * max(self.data.counts[i] for i in among)
            groups = list(_to_be_joined(self.data.batches, among, each))
        return tuple(map(tuple, groups))

    @property
    def _may_be_joined(self) -> bool:
        """Whether the loss of some batches as one is known to be theirs."""
        return self.separable and self.independence.proven and self.independence.numbers > 0

    @cached_property
    def _grown(self) -> _Grown:
        """What a batch that pays makes, where it is larger than any of the user's.

        Examples were seen to be independent in batches that the user has. A model may have made
        room for no more of them, or may do something else with more, be it on the way back alone.
        """
        most = _NUMBERS_TO_PAY // self.independence.numbers
        group = max(_to_be_joined(self.data.batches, self.indices, most), key=len)
        if len(group) < 2 or sum(self.data.counts[i] for i in group) <= self.data.together:
            return _Grown(is_same=True)
        losses = list[tuple[float, Tensor]]()

        def slopes() -> Iterator[tuple[float, Tensor]]:
            for index in group:
                value, slope = self._seen_as(index)
                losses.append((self.masses[index], value))
                yield self.masses[index], slope

        try:
            with self.forward_context(), self.recomputing():
                value, slope = self._seen_as(*group)
                off = max(off_mean(slope, slopes()), off_mean(value, losses))
        except Exception:  # of any kind: the code is the user's, made for smaller batches
            return _Grown(is_same=False)
        seen = self.gradient_cost * self.share_in([group, *((i,) for i in group)])
        return _Grown(off <= tolerance(self.autocast or self.dtype), seen)

    def _seen_as(self, *indices: int) -> tuple[Tensor, Tensor]:
        """Loss and gradient of batches as one, in float64."""
        value = self.evaluate(self.batch(*indices).data)
        slope = flat_gradient(value, self.parameters.tensors)
        return value.detach().double().reshape(1), slope

    def at_once(self, numbers: int) -> int:
        """Examples in a batch that pays, where each makes so many numbers on its way to the loss.

        Once calls of operations and reading the weights cost little beside them, larger batches
        only take more memory.
        """
        return max(1, max(_NUMBERS_AT_ONCE, _TIMES_THE_WEIGHTS * self.trainable.size) // numbers)

    def batch_of(self, batch: Batch, index: int, weight: float) -> WeightedBatch:
        """Kept examples as a batch on the device, in the present type."""
        return WeightedBatch(index, place(batch, self.device, self.dtype), weight, size_of(batch))

    def sample(self, count: int) -> WeightedBatch:
        """Examples of one form from all over the batches, as a batch of its own."""
        return next(Sample.of(self, count).batches())

    # -- the function --------------------------------------------------------------------------

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """What every forward and backward pass runs in; no buffer of the model changes."""
        with held_fixed(self._fixed), undisturbed(self.model, self.device), self._widening():
            yield

    @contextmanager
    def recomputing(self) -> Iterator[list[int]]:
        """Meanwhile, blocks that are to be run again keep nothing; yields the number of calls.

        Both the passes and their way back are to be in :meth:`forward_context`, and whoever looks
        at a graph or at modules within a pass does not want this.
        """
        with recomputed(self.blocks) as calls:
            yield calls

    @property
    def autocast(self) -> torch.dtype | None:
        """The type that products are made in now, where it is not that of the weights.

        Theirs it is where differences or checks have them in float64.
        """
        return self._autocast if self.dtype == torch.float32 else None

    @contextmanager
    def mixed(self) -> Iterator[None]:
        """What products run in besides: autocast, where that was asked for.

        Casts of weights are not kept from one pass to the next: the weights may have moved.
        """
        if self.autocast is None:
            yield
            return
        with torch.autocast(self.device.type, self.autocast, cache_enabled=False):
            yield

    @contextmanager
    def _widening(self) -> Iterator[None]:
        """Casts and constants widened, where that is wanted now and not done already."""
        if not self._widened or self._is_widening:
            yield
            return
        self._is_widening = True
        try:
            with Widened():
                yield
        finally:
            self._is_widening = False

    def evaluate(self, batch: Batch, theta: Mapping[str, Tensor] | None = None) -> Tensor:
        """Mean loss of a batch, without weight decay, as a live scalar.

        ``theta`` stands in for the parameters that it names; None leaves the model as it is.
        """
        with self.forward_context(), standing_in(self.model, theta):
            return self.loss.evaluate(self.model, batch)

    def outputs(self, batch: Batch, theta: Mapping[str, Tensor] | None = None) -> Tensor:
        """Model outputs of a batch as a live tensor."""
        with self.forward_context(), standing_in(self.model, theta):
            return self.loss.outputs(self.model, batch)

    @cached_property
    def way_back(self) -> float:
        """Work of a backward pass, in gradients by all of the model's parameters."""
        return self.ways_back([self.parameters.tensors])[0]

    def ways_back(self, groups: Sequence[Sequence[Tensor]]) -> list[float]:
        """Work of backward passes that end at some of the parameters each, in the same unit."""

        def loss_of_an_example() -> Tensor:
            return self.loss.evaluate(self.model, self.sample(1).data)

        with self.forward_context():
            shares = shares_of_way_back(loss_of_an_example, self.model, groups)
        return [BACKWARD * share for share in shares]

    @property
    def gradient_cost(self) -> float:
        """Work of its gradient, in the same: a whole forward pass, and the way back.

        Where blocks are run again for that, another forward pass.
        """
        return (2 if self.blocks else 1) * FORWARD + self.way_back

    @cached_property
    def _passes(self) -> int:
        """Batches in which the user would go through all examples."""
        if not (self.separable and self.independence.proven):
            return len(self.indices)
        own = self.data.together  # of which some may have been put into one of these
        together = len(list(_to_be_joined(self.data.batches, self.indices, own)))
        return max(together, -(-self.data.count // own)) if own else together

    def share_of(self, count: int, dtype: torch.dtype | None = None) -> float:
        """Work of a pass over so many examples at once, beside that over all in the user's batches.

        A pass calls its operations and reads every weight, however few examples there are.

        Args:
            count: of the examples.
            dtype: that it is made in, by default the present one: a wider one has more to read.
        """
        work = self.independence.work
        if not work.numbers:
            return count / self.data.count
        return work.nanoseconds(count, dtype or self.dtype) / self._forward

    def share_in(self, groups: Iterable[Sequence[int]]) -> float:
        """The same of batches by number, those of a group computed as one."""
        return sum(self.share_of(sum(self.data.counts[i] for i in group)) for group in groups)

    @property
    def joint_share(self) -> float:
        """The same of all kept examples, in batches as :meth:`joint` has them."""
        return self.share_in(self.joint())

    def vectors(self, made: float, read: float = 0.0, size: int | None = None) -> float:
        """Gradients that it takes to make so many long vectors, and to go through so many.

        Args:
            made: in memory that is taken anew.
            read: or written, where they were before.
            size: of each, by default as many entries as there are parameters.
        """
        entries = self.parameters.size if size is None else size
        return self.algebra(Algebra(made, read).times(entries))

    def algebra(self, work: Algebra) -> float:
        """Gradients that work with vectors and matrices takes."""
        if not self.independence.numbers:
            return 0.0
        return of_algebra(work, self._forward)

    @cached_property
    def _forward(self) -> float:
        """What a pass over all kept examples takes in the user's batches."""
        work, own = self.independence.work, self._own
        once_more = (self._passes - 1) * work.nanoseconds(0, own)
        return work.nanoseconds(self.data.count, own) + once_more

    @property
    def trial_work(self) -> float:
        """Of finding whether examples are independent, and what becomes of it in float64."""
        wide = torch.float64 if self.precision.numbers else self._own
        compared = FORWARD * sum(self.share_of(count, wide) for count in self.independence.passes)
        seen = (2 * FORWARD + BACKWARD) * self.share_of(min(_EXAMPLES, self.data.count), wide)
        grown = self._grown.gradients if self._may_be_joined else 0.0
        return compared + grown + (seen if self.precision.numbers else 0.0)

    def fixed_outputs(self, batch: Batch) -> Tensor:
        """Model outputs of a batch without their graph; models may differentiate on their way."""
        return self.outputs(batch).detach()

    @contextmanager
    def in_dtype(self, dtype: torch.dtype, *, widened: bool | None = None) -> Iterator[None]:
        """Compute in another floating type meanwhile; the original tensors come back untouched.

        Args:
            dtype: the type.
            widened: in float64, whether what the code casts to less is widened too; default where
                it would not be float64 otherwise.
        """
        if widened is None:
            widened = dtype == torch.float64 and self.precision.widened
        previous = self.dtype, self._widened
        self.retypings += 1
        try:
            with retyped(self.model, dtype), as_products():
                self.dtype, self._widened = dtype, widened
                yield
        finally:
            self.dtype, self._widened = previous
            self.retypings += 1

    @cached_property
    def has_room_for_float64(self) -> bool:
        """Whether it can be put to the test in float64; a run that goes on keeps what it found."""
        return self.dtype == torch.float64 or self._float64_bytes <= room_for_more(self.device)

    @property
    def _float64_bytes(self) -> int:
        return _CHECKS_IN_FLOAT64 * sum(p.nbytes for p in self.model.parameters())

    @cached_property
    def precision(self) -> Precision:
        """What becomes of it where float64 is asked for."""
        own = torch.float32 if self.dtype == torch.float64 else self.dtype
        if not self.has_room_for_float64:
            numbers = self._seen(self.sample(_EXAMPLES))[2]
            return Precision(own, own, numbers, human_bytes(self._float64_bytes))
        seen = self._seen_in_float64(widened=False)
        plain, numbers = (own, 0) if seen is None else seen
        if plain != torch.float64:
            wider = self._seen_in_float64(widened=True)
            if wider is not None and wider[0] == torch.float64:
                return Precision(plain, *wider)
        return Precision(plain, plain, numbers)

    def _seen_in_float64(self, *, widened: bool) -> tuple[torch.dtype, int] | None:
        """The narrowest type, and how much is made for an example; None where it does not run."""
        with self.in_dtype(torch.float64, widened=widened):
            sample = self.sample(_EXAMPLES)
            try:
                value, narrowest, numbers = self._seen(sample)
                # Compiled code may run as Python while it is watched, and not be widened otherwise.
                with self.forward_context(), self.recomputing():
                    unwatched = self.evaluate(sample.data)
                    if unwatched.requires_grad:
                        torch.autograd.grad(unwatched, self.parameters.tensors, allow_unused=True)
            except Exception as error:  # of any kind: the code is the user's, made for another type
                if is_out_of_memory(error):
                    raise
                return None
        change = abs(float(value.detach()) - float(unwatched.detach()))
        size = max(1.0, abs(float(value.detach())))
        if widened and not change <= tolerance(torch.float64) * size:
            return None
        return narrowest, self.independence.numbers or numbers  # its own are of the user's kernels

    def _seen(self, sample: WeightedBatch) -> tuple[Tensor, torch.dtype, int]:
        """The loss of a few, the narrowest type on the way there, and numbers made for an example.

        Of types only those are told that float64 was turned into.
        """
        watch = Narrowing()
        with watch, self.recomputing():
            value = self.evaluate(sample.data)
        return value, watch.narrowest, watch.numbers // sample.count

    @property
    def is_doubled(self) -> bool:
        """Whether it computes in float64 now, as far as it can."""
        return self.dtype == torch.float64 and (self._widened or not self.precision.widened)


# -- A few examples from all over the batches, on which products are put to the test ---------------
# What goes wrong may go wrong on some examples alone: on those that take a branch, say. The first
# rows of the first batch would miss it, so rows come from as many batches as there are, or can be.


@dataclass(frozen=True)
class Sample:
    """Some of a problem's examples as batches, with weights that sum to 1.

    They are kept as the data is, so that they can be had in whatever type the problem is in.

    Args:
        problem: whose examples.
        parts: batches of them.
        masses: of the parts.
        separable: whether a part's rows are examples that can be taken apart.
    """

    problem: Objective
    parts: tuple[Batch, ...]
    masses: tuple[float, ...]
    separable: bool

    @classmethod
    def of(cls, problem: Objective, count: int, together: int | None = None) -> Sample:
        """About so many examples that weigh something: rows, or else whole batches.

        Batches of examples that are proven independent are joined: one pass costs less than many.

        Args:
            problem: whose examples.
            count: of them.
            together: rows in a part at most, which bounds the memory that a part needs.
        """
        if problem.separable and problem.loss.shows_examples:
            stacked = _stacked(_rows_across(problem, count))
            parts = [piece for part in stacked for piece in _pieces(part, together or count)]
            return cls(problem, tuple(parts), tuple(_mass(problem, p) for p in parts), True)
        chosen: list[int] = []
        for index in problem.indices:
            chosen.append(index)
            if sum(problem.data.counts[i] for i in chosen) >= count:
                break
        groups = [[i] for i in chosen]
        separable = problem.separable and problem.independence.unseen is None
        if separable:
            groups = list(_to_be_joined(problem.data.batches, chosen, together or count))
        return cls(
            problem,
            tuple(joined([problem.data.batches[i] for i in group]) for group in groups),
            tuple(sum(problem.masses[i] for i in group) for group in groups),
            separable,
        )

    @property
    def count(self) -> int:
        """Examples in the sample."""
        return sum(map(size_of, self.parts))

    @property
    def share(self) -> float:
        """Work of a pass over it beside that of one over all kept examples."""
        return sum(self.problem.share_of(size_of(part)) for part in self.parts)

    def batches(self) -> Iterator[WeightedBatch]:
        """The parts in the problem's present type."""
        total = sum(self.masses)
        for index, (part, mass) in enumerate(zip(self.parts, self.masses, strict=True)):
            yield self.problem.batch_of(part, index, mass / total)

    def evaluate(self) -> Tensor:
        """The mean loss over them, as a live scalar, whose way back is gone in forward_context."""
        with self.problem.recomputing():
            terms = [b.weight * self.problem.evaluate(b.data) for b in self.batches()]
        return torch.stack([term.reshape(()) for term in terms]).sum()

    def halves(self) -> tuple[Sample, ...]:
        """Two samples that make this one; none where it cannot be taken apart."""
        if len(self.parts) > 1:
            middle = len(self.parts) // 2
            cuts = [slice(None, middle), slice(middle, None)]
            return tuple(
                Sample(self.problem, self.parts[cut], self.masses[cut], self.separable)
                for cut in cuts
            )
        (part,) = self.parts
        if not self.separable or self.count < 2:
            return ()
        middle, end = self.count // 2, self.count
        pieces = rows(part, 0, middle), rows(part, middle, end)
        return tuple(
            Sample(self.problem, (piece,), (_mass(self.problem, piece),), True) for piece in pieces
        )


def _rows_across(problem: Objective, count: int) -> Iterator[Batch]:
    """Rows that weigh something, evenly out of batches that are evenly chosen."""
    chosen = _spread(problem.indices, count)
    for number, index in enumerate(chosen):
        share = (number + 1) * count // len(chosen) - number * count // len(chosen)
        batch = problem.data.batches[index]
        heavy = problem.loss.masses(batch).nonzero()[:, 0].tolist()
        if places := _spread(heavy, share):
            taken = torch.tensor(places, device="cpu")
            yield map_tensors(lambda tensor, taken=taken: tensor[taken], batch)  # type: ignore[misc]


def _spread(values: Sequence[int], count: int) -> Sequence[int]:
    """So many of a list, evenly, or all there are."""
    size = len(values)
    return values if size <= count else [values[i * size // count] for i in range(count)]


def _stacked(pieces: Iterator[Batch]) -> list[Batch]:
    """Pieces of equal shape put together: examples of other lengths stay apart."""
    groups: dict[Any, list[Batch]] = {}
    for piece in pieces:
        groups.setdefault(form_of(piece), []).append(piece)
    return list(map(joined, groups.values()))


def _to_be_joined(
    batches: Sequence[Batch], chosen: Iterable[int], most: int
) -> Iterator[list[int]]:
    """Runs of batches of equal shape, of so many rows at most where one alone has no more."""
    for _, run in groupby(chosen, lambda index: form_of(batches[index])):
        group, count = list[int](), 0
        for index in run:
            size = size_of(batches[index])
            if group and count + size > most:
                yield group
                group, count = [], 0
            group.append(index)
            count += size
        yield group


def _pieces(part: Batch, size: int) -> Iterator[Batch]:
    """A batch in pieces of at most so many rows."""
    for start in range(0, size_of(part), size):
        yield rows(part, start, min(start + size, size_of(part)))


def _mass(problem: Objective, batch: Batch) -> float:
    """Weight mass of examples; a step is asked for it, which runs the model."""
    with problem.forward_context():
        placed = place(batch, problem.device, problem.dtype)
        return problem.loss.mass(problem.model, placed, size_of(batch))
