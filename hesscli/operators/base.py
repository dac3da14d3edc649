"""Operators: curvature matrices as weighted means of batch terms, seen only through products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Self, overload

import numpy as np
import torch
from torch import Tensor

from hesscli import world
from hesscli.errors import UnsoundError, UsageError
from hesscli.memory import is_out_of_memory, room_for_more
from hesscli.meter import FORWARD, OnStep, go_on
from hesscli.operators.curvature import Curvature
from hesscli.operators.preflight import checked
from hesscli.operators.products import Apply
from hesscli.parameters import Parameters
from hesscli.problem.objective import WeightedBatch
from hesscli.problem.precision import doubled
from hesscli.results import Preflight
from hesscli.state import State
from hesscli.sums import distance, is_finite, rounding_of_sum, shared_sum
from hesscli.torch_private import storages_kept
from hesscli.vocabulary import Mode

# -- Operators: curvature matrices as weighted means of batch terms, seen only through products ----


BLOCK_BYTES = 1 << 26
"""Bytes of probes that are held at once (and as many of products)."""
_AROUND, _SIDE_BY_SIDE = 8, 5
"""Of what a loss keeps for its gradient, in forward mode: what a product takes in any case, and for
each vector. At four networks 4 to 8 times were measured, and 2.2 to 5.1."""


_MADE, _READ = 1, 4
"""Vectors that are made for a product, in half of float64's width in parts and as one, and that
are gone through where it is added to others."""


@dataclass
class LiveTerm:
    """One batch's matrix on one retained graph, which is made by the first product.

    It is made anew where the problem has computed in another type since: autograd then knows its
    leaves no more, and would give zeros.

    The first product must be finite: an operation without a second derivative where it stands,
    such as the norm of 0, spoils all of them.
    """

    batch: WeightedBatch
    operator: Operator
    counted: int | None = None
    """How often the problem had changed its type when its graph, which another process had made
    and counted, was still good."""
    is_sample: bool = False
    """Whether it is a few of the examples, on which each pass costs more than their share."""
    _apply: Apply | None = field(default=None, repr=False)
    _made: int = field(default=0, repr=False)

    @property
    def index(self) -> int:
        """The batch's number."""
        return self.batch.index

    @property
    def weight(self) -> float:
        """The batch's share of the weight mass."""
        return self.batch.weight

    @property
    def _share(self) -> float:
        """Work of a pass beside that of one over all kept examples."""
        problem = self.operator.problem
        if self.is_sample:
            return problem.share_of(self.batch.count)
        return self.batch.count / problem.data.count

    def is_made_at(self, retypings: int) -> bool:
        """Whether its graph serves, or will where it is counted, after so many changes of type."""
        return retypings == (self.counted if self._apply is None else self._made)

    def apply(self, block: Tensor, on_step: OnStep = go_on) -> Tensor:
        """Products with a block of vectors: ``(k, d)`` to ``(k, d)``, in the problem's dtype.

        Args:
            block: the vectors.
            on_step: called between two products, where they are not made together; may end it.

        Raises:
            UnsoundError: the first product is not finite.
        """
        operator, share = self.operator, self._share
        with operator.problem.forward_context():
            is_first = self._apply is None
            if self._apply is None or self._made != operator.problem.retypings:
                self._apply, self._made = operator.live(self.batch), operator.problem.retypings
                if self.counted != self._made:
                    operator.meter.add(operator.cost[0], share)
                self.counted = None
            products, made = list[Tensor](), 0
            try:
                for rows in torch.split(block, len(block) if operator.is_batched else 1):
                    if products:
                        on_step()
                    products.append(operator.problem.together(self._apply, rows))
                    made += len(rows)
            finally:
                part = self.batch.count / operator.problem.data.count
                operator.meter.add(made * operator.cost[1], share, products=made * part)
                size = operator.parameters.size
                operator.meter.add(operator.problem.vectors(_MADE * made, _READ * made, size))
        product = torch.cat(products) if len(products) > 1 else products[0]
        if is_first and not is_finite(product):
            raise _not_finite(operator, self.batch, block)
        return product


class Operator(Curvature):
    """A symmetric d × d matrix of a :class:`Problem`: Σ weight_b · A_b + decay · I.

    It is a :class:`Source` to engines. Products are put to the test before the first, once for a
    problem, as those of a command are. ``A @ V`` takes ``(d,)`` or ``(d, k)``, as a tensor or an
    array, and gives the same kind.
    """

    def check(self) -> Preflight:
        """Put the products to the test, unless that was done before.

        Raises:
            UnsoundError: the problem's curvature would mean nothing, or not in this mode.
        """
        return checked(self.problem, type(self), self._wanted)

    @property
    def mode(self) -> Mode:
        """Autodiff mode of the products."""
        return self.check().mode if self._wanted == "auto" else self._wanted

    @property
    def dtype(self) -> torch.dtype:
        """The problem's present type."""
        return self.problem.dtype

    @property
    def device(self) -> torch.device:
        """The device of the problem."""
        return self.problem.device

    @property
    def masses(self) -> Sequence[float]:
        """Weight masses of all batches."""
        return self.problem.masses

    @property
    def counts(self) -> Sequence[int]:
        """Examples in each of all batches."""
        return self.problem.data.counts

    @property
    def indices(self) -> Sequence[int]:
        """The batches that weigh something."""
        return self.problem.indices

    @property
    def sampling_fraction(self) -> float | None:
        """Kept examples over available ones, None where that is not known."""
        return self.problem.sampling_fraction

    @property
    def independent(self) -> bool:
        """Whether examples are independent of each other."""
        return self.problem.couples_examples is None

    @property
    def shape(self) -> tuple[int, int]:
        """Its rows and columns, (d, d)."""
        return self.parameters.size, self.parameters.size

    def batches(self, among: Sequence[int] | None = None) -> Iterator[LiveTerm]:
        """The terms, one at a time: a term's graph is freed when the next is taken.

        Args:
            among: the numbers of some batches; default all that weigh something.

        Raises:
            UnsoundError: the products did not pass their checks.
        """
        self.check()
        for index in self.indices if among is None else among:
            yield LiveTerm(self.problem.batch(index), self)

    def shared(self) -> Iterator[LiveTerm]:
        """This rank's terms, of batches that are best computed as one: for sums over all.

        Raises:
            UnsoundError: the products did not pass their checks.
        """
        self.check()
        for group in world.share(self.problem.joint()):
            yield LiveTerm(self.problem.batch(*group), self)

    def restrict(self, *patterns: str) -> Operator:
        """The diagonal block of the parameters that globs select, as ``--params`` takes them.

        Raises:
            UsageError: a glob matches no parameter, or none is left.
        """
        return self.block(self.parameters.select(*patterns))

    def block(self, parameters: Parameters) -> Self:
        """The diagonal block of some parameters; its work is counted with this operator's."""
        return self._as(parameters, in_full=self._in_full)

    def in_full(self) -> Self:
        """The same matrix with products in the type of the weights, without autocast."""
        return self if self.autocast is None else self._as(self.parameters, in_full=True)

    def _as(self, parameters: Parameters, *, in_full: bool) -> Self:
        """The same with other settings; its work is counted with this one's."""
        return type(self)(
            self.problem,
            parameters=parameters,
            mode=self._wanted,
            meter=self.meter,
            in_full=in_full,
        )

    @overload
    def __matmul__(self, vectors: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, vectors: np.ndarray) -> np.ndarray: ...
    def __matmul__(self, vectors: Tensor | np.ndarray) -> Tensor | np.ndarray:
        if isinstance(vectors, np.ndarray):
            return (self @ torch.from_numpy(vectors.copy())).numpy()
        if vectors.dim() not in (1, 2) or len(vectors) != self.parameters.size:
            raise UsageError(
                f"the operator is {self.shape[0]} × {self.shape[1]}",
                f"vectors of shape {tuple(vectors.shape)}",
                f"({self.shape[0]},) or ({self.shape[0]}, k)",
            )
        exact = vectors if vectors.is_floating_point() else vectors.double()
        products = self.apply(exact.T if exact.dim() == 2 else exact[None])
        return (products.T if exact.dim() == 2 else products[0]).to(exact)

    def apply(self, block: Tensor) -> Tensor:
        """Products with rows ``(k, d)``, summed over the batches in float64.

        Of many ranks each makes those of its share of the batches, and all have the sum.
        """
        differs = self.mode == "finite-difference"
        with doubled(self.problem) if differs else nullcontext():
            rows = block.to(self.problem.device, self.problem.dtype)
            size = self.block_size
            blocks = [rows[start : start + size] for start in range(0, len(rows), size)]
            total = torch.zeros_like(rows, dtype=torch.float64)
            if self.decay:
                total.add_(rows, alpha=self.decay)
            with self.meter.pooled():
                return shared_sum(self.shared(), total, lambda term: map(term.apply, blocks))

    @property
    def block_size(self) -> int:
        """Vectors that are handed to a term at once."""
        bytes_each: int = self.parameters.size * self.problem.dtype.itemsize
        return max(1, min(32, BLOCK_BYTES // max(1, bytes_each)))

    def vectors_that_fit(self) -> int | None:
        """How many of a block have room in the model side by side; None where they go one by one.

        At least one, whatever it takes: it is not known that well.
        """
        if self.mode != "forward-over-reverse":
            return None
        groups = self.problem.joint()
        largest = max(groups, key=lambda group: sum(self.counts[i] for i in group))
        batch = self.problem.batch(*largest)
        kept = dict[int, int]()
        with storages_kept(kept):
            self.problem.evaluate(batch.data)
        self.meter.add(FORWARD, batch.count / self.problem.data.count)
        held = max(1, sum(kept.values()))
        room = room_for_more(self.device) - _AROUND * held
        return max(1, min(self.block_size, room // (_SIDE_BY_SIDE * held)))

    def to_dense(self) -> Tensor:
        """The whole matrix from unit vectors, float64 ``(d, d)`` on the CPU; for small d."""
        identity = torch.eye(self.parameters.size, dtype=self.problem.dtype)
        return self.apply(identity).T.contiguous().cpu()


def _not_finite(operator: Operator, batch: WeightedBatch, block: Tensor) -> UnsoundError:
    """The refusal of products with NaN or infinity, and what would make them finite."""
    got = f"NaN or infinity on batch {batch.index}, though loss and gradient are finite"
    if operator.mode == "finite-difference":
        hint = "a checkpoint from before the run diverged"
    elif _is_finite_in_float64(operator, batch, block):
        hint = "--dtype float64: it overflows in a narrower type"
    else:
        hint = (
            "--mode finite-difference, which takes no second derivative, or no norm or root of "
            "exactly 0 in model or loss"
        )
    return UnsoundError("a curvature product is not finite", got, hint)


def _is_finite_in_float64(operator: Operator, batch: WeightedBatch, block: Tensor) -> bool:
    problem = operator.problem
    if problem.dtype == torch.float64:
        return False
    try:
        with doubled(problem), problem.forward_context():
            return is_finite(operator.live(problem.batch(batch.index))(block.double()))
    except Exception:  # of any kind: the code is the user's, made for another type
        return False


# -- Products with one matrix again and again: graphs are kept from one to the next ----------------


_FEW = 8
"""Examples on which rounding is measured, or one batch where it has more."""
_UNSEEN = 2.0
"""Rounding of the other examples may be so many times that of the few."""


@dataclass(frozen=True)
class _Part:
    """Some batches as one, and how many times their rounding that of all may be beside its size.

    Their products are larger than those of all where they cancel.
    """

    group: tuple[int, ...]
    times: float


class Retained:
    """A vector's product over all the batches, summed in float64.

    A batch's graph takes a gradient's work to make and each product on it two, so that keeping it
    saves a third. Graphs are kept as long as they fit; the other batches make theirs anew, and so
    do modes that have no graph of their own to keep.

    Args:
        operator: the matrix.
        room: bytes that the graphs may take.
        on_step: called after each batch; may end the product, which can be made again.
    """

    def __init__(self, operator: Operator, room: int, on_step: OnStep = go_on) -> None:
        self.operator, self._on_step = operator, on_step
        self._room = room if operator.mode == "double-backward" else 0
        self._groups = {group[0]: group for group in operator.problem.joint()}
        self._kept: dict[int, LiveTerm] = {}
        self._elsewhere: dict[int, bool] = {}
        self._parts: dict[int, float] = {}
        self._storages: set[int] = set()
        self._measured: dict[int, _Part] = {}
        self._vectors: tuple[Tensor, Tensor] | None = None

    def __call__(self, vector: Tensor) -> Tensor:
        """A v in float64, weight decay included: good until the next is made in its place."""
        operator, (row, total) = self.operator, self._held()
        row[0].copy_(vector)
        parts = dict[int, float]()

        def product(term: LiveTerm) -> Iterator[Tensor]:
            found = self._apply(term, row)
            parts[term.index] = term.weight * float(found.norm())
            self._on_step()
            yield found

        total.zero_()
        if operator.decay:
            total.add_(row, alpha=operator.decay)
        with operator.meter.pooled():
            total = shared_sum(operator.shared(), total, product)
        every = world.gathered((parts, self._graphs()))
        self._elsewhere = {i: fresh for _, graphs in every for i, fresh in graphs.items()}
        for sizes, _ in every:
            for index, part in sizes.items():
                self._parts[index] = max(part, self._parts.get(index, 0.0))
        return total[0]

    def rounding(self, vectors: Tensor) -> float:
        """How far off a product with one of some unit vectors may be.

        Measured where products have had their largest part so far: errors come from where the
        curvature does, and that may be a few examples. The sum over the batches is off by as much
        as the order of its additions can make it, which ranks have their own of.

        Args:
            vectors: orthonormal rows ``(k, d)``, float64.
        """
        problem, size = self.operator.problem, sum(self._parts.values())
        order = rounding_of_sum(len(self._parts), torch.float64) * size
        if problem.is_doubled or not problem.precision.is_float64:
            return order
        heaviest = sorted(self._parts, key=lambda index: -self._parts[index])[:2]
        with self.operator.meter.pooled():
            with world.apart():
                mine = [self._seen(index, vectors) for index in world.share(heaviest)]
            found = [one for each in world.gathered(mine) for one in each]
        self._measured |= {index: part for index, part, _ in found}
        relative = max(part.times * error for _, part, error in found)
        return relative * size + order

    def _seen(self, index: int, vectors: Tensor) -> tuple[int, _Part, float]:
        """Of a group that is named by its first batch: on which part of it, and which error."""
        part = self._measured.get(index) or self._heaviest(self._groups[index], vectors[:1])
        return index, part, self._relative_error(part.group, vectors)

    def _heaviest(self, group: tuple[int, ...], vector: Tensor) -> _Part:
        """Few of the examples of a group, in whose product with a vector they have most part."""
        row = vector.to(self.operator.problem.device, self.operator.problem.dtype)
        times, whole = 1.0, None
        while len(group) > 1 and sum(self.operator.counts[i] for i in group) > _FEW:
            if whole is None:
                whole, times = self._weighted(group, row), _UNSEEN
            halves, size = (group[: len(group) // 2], group[len(group) // 2 :]), float(whole.norm())
            first = self._weighted(halves[0], row)
            products = first, whole.sub_(first)
            sizes = [float(product.norm()) for product in products]
            times *= max(1.0, sum(sizes) / (size or 1.0))
            larger = int(sizes[1] > sizes[0])
            group, whole = halves[larger], products[larger]
        return _Part(group, times)

    def _weighted(self, group: tuple[int, ...], row: Tensor) -> Tensor:
        """What some batches have of a product."""
        term = self._term(group)
        return term.apply(row).mul_(term.weight)

    def _term(self, group: tuple[int, ...]) -> LiveTerm:
        """The batches of a group as one, on the graph that was kept of them if there is one."""
        kept = self._kept.get(group[0])
        if kept is not None and self._groups.get(group[0]) == group:
            return kept
        return LiveTerm(self.operator.problem.batch(*group), self.operator, is_sample=True)

    def _relative_error(self, group: tuple[int, ...], vectors: Tensor) -> float:
        """Error of a group's products with some vectors, beside the largest of them."""
        problem, operator = self.operator.problem, self.operator
        own = self._term(group).apply(vectors.to(problem.device, problem.dtype))
        with doubled(problem):
            exact = LiveTerm(problem.batch(*group), operator, is_sample=True)
            products = exact.apply(vectors.to(problem.device))
        size = float(products.norm(dim=1).max())
        return max(map(distance, own, products)) / size if size else 0.0

    def state_dict(self) -> State:
        """Whose graphs are kept, of which some are to be made anew, and how large products were."""
        graphs = {**self._elsewhere, **self._graphs()}
        return {
            "kept": list(graphs),
            "fresh": list(graphs.values()),
            "batches": list(self._parts),
            "parts": list(self._parts.values()),
            "measured": {str(index): asdict(part) for index, part in self._measured.items()},
        }

    def load_state_dict(self, state: State) -> None:
        """Keep the graphs that another kept: they are made anew, but not counted again.

        Where it had joined other batches, as for another number of ranks, graphs begin anew.
        """
        problem, made = self.operator.problem, self.operator.problem.retypings
        firsts = {index: group[0] for group in self._groups.values() for index in group}
        self._parts = {}
        for index, part in zip(state["batches"], state["parts"], strict=True):
            self._parts[firsts[index]] = self._parts.get(firsts[index], 0.0) + part
        if self._parts and set(state["batches"]) != self._groups.keys():
            return
        self._elsewhere = dict(zip(state["kept"], state["fresh"], strict=True))
        mine = {group[0] for group in world.share(problem.joint())}
        own = self._elsewhere.keys() & mine
        fresh = {index: self._elsewhere.pop(index) for index in sorted(own)}
        self._kept = {
            index: LiveTerm(
                problem.batch(*self._groups[index]),
                self.operator,
                made if fresh[index] else None,
            )
            for index in fresh
        }
        self._measured = {
            int(index): _Part(tuple(part["group"]), part["times"])
            for index, part in state["measured"].items()
        }
        if self._parts:  # all that fit have been kept by then
            self._room = 0

    def forget(self) -> None:
        """Give the graphs back; the next product makes new ones."""
        self._kept.clear()
        self._room, self._vectors = 0, None

    def _held(self) -> tuple[Tensor, Tensor]:
        """Where a vector and its product are: memory that is taken anew is slow at first."""
        if self._vectors is None:
            problem, size = self.operator.problem, self.operator.parameters.size
            like = partial(torch.empty, 1, size, device=problem.device)
            self._vectors = like(dtype=problem.dtype), like(dtype=torch.float64)
        return self._vectors

    def _graphs(self) -> dict[int, bool]:
        """Whose graphs are kept here, and whether they serve as they are."""
        made = self.operator.problem.retypings
        return {index: term.is_made_at(made) for index, term in self._kept.items()}

    def _apply(self, term: LiveTerm, row: Tensor) -> Tensor:
        """A product; where memory runs out for it, all graphs that were kept are given back."""
        try:
            return self._on_a_graph(term, row)
        except Exception as error:
            if not (self._kept and is_out_of_memory(error)):
                raise
        self.forget()
        self.operator.problem.together.ran_out("each product made the graphs of its batches anew")
        return term.apply(row)

    def _on_a_graph(self, term: LiveTerm, row: Tensor) -> Tensor:
        """A product on the graph that was kept, or else on a new one, kept if there is room."""
        if term.index in self._kept or self._room <= 0:
            return self._kept.get(term.index, term).apply(row)
        sizes: dict[int, int] = {}
        with storages_kept(sizes):
            product = term.apply(row)
        self._room -= sum(size for place, size in sizes.items() if place not in self._storages)
        if self._room >= 0:
            self._kept[term.index] = term
            self._storages.update(sizes)
        return product
