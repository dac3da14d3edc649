"""Products with one matrix again and again: graphs are kept from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from hesscli import world
from hesscli.memory import is_out_of_memory
from hesscli.meter import OnStep, go_on
from hesscli.operators.base import LiveTerm, Operator
from hesscli.problem.precision import doubled
from hesscli.state import State
from hesscli.sums import distance, rounding_of_sum, shared_sum
from hesscli.torch_private import storages_kept

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
    """A vector's product over all the batches, summed in float64 where it is a sum.

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
        self._row: Tensor | None = None
        self._total: Tensor | None = None

    def __call__(self, vector: Tensor) -> Tensor:
        """A v, weight decay included: good until the next is made in its place."""
        operator, row = self.operator, self._copied(vector)
        parts = dict[int, float]()

        def product(term: LiveTerm) -> Iterator[Tensor]:
            found = self._apply(term, row)
            parts[term.index] = term.weight * float(found.norm())
            self._on_step()
            yield found

        with operator.meter.pooled():
            total = self._alone(product) if self._is_one else self._added_up(row, product)
        every = world.gathered((parts, self._graphs()))
        self._elsewhere = {i: fresh for _, graphs in every for i, fresh in graphs.items()}
        for sizes, _ in every:
            for index, part in sizes.items():
                self._parts[index] = max(part, self._parts.get(index, 0.0))
        return total[0]

    @property
    def _is_one(self) -> bool:
        """Whether one batch's product is all there is, which has all the weight then."""
        return len(self._groups) == 1 and not self.operator.decay and world.size() == 1

    def _alone(self, product: Callable[[LiveTerm], Iterator[Tensor]]) -> Tensor:
        ((found,),) = map(product, self.operator.shared())
        return found

    def _added_up(self, row: Tensor, product: Callable[[LiveTerm], Iterator[Tensor]]) -> Tensor:
        """In float64, on all ranks."""
        if self._total is None:
            self._total = torch.empty_like(row, dtype=torch.float64)
        self._total.zero_()
        if self.operator.decay:
            self._total.add_(row, alpha=self.operator.decay)
        return shared_sum(self.operator.shared(), self._total, product)

    def rounding(self, vectors: Tensor) -> float:
        """How far off a product with one of some unit vectors may be.

        Measured where products have had their largest part so far: errors come from where the
        curvature does, and that may be a few examples. The sum over the batches is off by as much
        as the order of its additions can make it, which ranks have their own of.

        Args:
            vectors: orthonormal rows ``(k, d)``.
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
        return LiveTerm(self.operator.problem.batch(*group), self.operator)

    def _relative_error(self, group: tuple[int, ...], vectors: Tensor) -> float:
        """Error of a group's products with some vectors, beside the largest of them."""
        problem, operator = self.operator.problem, self.operator
        own = self._term(group).apply(vectors.to(problem.device, problem.dtype))
        with doubled(problem):
            exact = LiveTerm(problem.batch(*group), operator)
            products = exact.apply(vectors.to(problem.device, problem.dtype))
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
        self._room, self._row, self._total = 0, None, None

    def _copied(self, vector: Tensor) -> Tensor:
        """As a row in the problem's type: in memory that is kept, since it is slow at first."""
        if self._row is None:
            problem = self.operator.problem
            self._row = torch.empty(1, len(vector), dtype=problem.dtype, device=problem.device)
        return self._row.copy_(vector[None])

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
