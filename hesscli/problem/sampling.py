"""A few examples from all over a problem's batches, on which its products are put to the test.

What goes wrong may go wrong on some examples alone: on those that take a branch, say. The first
rows of the first batch would miss it, so rows come from as many batches as there are, or can be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hesscli.problem.batches import Batch, map_tensors, rows, size_of, tensors_of

if TYPE_CHECKING:
    from hesscli.problem.problem import Problem, WeightedBatch


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

    problem: Problem
    parts: tuple[Batch, ...]
    masses: tuple[float, ...]
    separable: bool

    @classmethod
    def of(cls, problem: Problem, count: int, together: int | None = None) -> Sample:
        """About so many examples that weigh something: rows, or else whole batches.

        Args:
            problem: whose examples.
            count: of them.
            together: rows in a part at most, which bounds the memory that a part needs.
        """
        separable = problem.separable and problem.loss.shows_examples
        if separable:
            stacked = _stacked(_rows_across(problem, count))
            parts = [piece for part in stacked for piece in _pieces(part, together or count)]
            return cls(problem, tuple(parts), tuple(_mass(problem, p) for p in parts), True)
        chosen: list[int] = []
        for index in problem.indices:
            chosen.append(index)
            if sum(problem.data.counts[i] for i in chosen) >= count:
                break
        return cls(
            problem,
            tuple(problem.data.batches[i] for i in chosen),
            tuple(problem.masses[i] for i in chosen),
            False,
        )

    @property
    def count(self) -> int:
        """Examples."""
        return sum(map(size_of, self.parts))

    def batches(self) -> Iterator[WeightedBatch]:
        """The parts in the problem's present type."""
        total = sum(self.masses)
        for index, (part, mass) in enumerate(zip(self.parts, self.masses, strict=True)):
            yield self.problem.batch_of(part, index, mass / total)

    def evaluate(self) -> Tensor:
        """The mean loss over them, as a live scalar."""
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


def _rows_across(problem: Problem, count: int) -> Iterator[Batch]:
    """Rows that weigh something, evenly out of batches that are evenly chosen."""
    chosen = _spread(problem.indices, count)
    for number, index in enumerate(chosen):
        share = (number + 1) * count // len(chosen) - number * count // len(chosen)
        batch = problem.data.batches[index]
        heavy = problem.loss.masses(batch).nonzero()[:, 0].tolist()
        if places := _spread(heavy, share):
            taken = torch.tensor(places)
            yield map_tensors(lambda tensor, taken=taken: tensor[taken], batch)  # type: ignore[misc]


def _spread(values: Sequence[int], count: int) -> Sequence[int]:
    """So many of a list, evenly, or all there are."""
    size = len(values)
    return values if size <= count else [values[i * size // count] for i in range(count)]


def _stacked(pieces: Iterator[Batch]) -> list[Batch]:
    """Pieces of equal shape put together: examples of other lengths stay apart."""
    groups: dict[Any, list[Batch]] = {}
    for piece in pieces:
        form = tuple((tuple(t.shape[1:]), t.dtype) for t in tensors_of(piece))
        groups.setdefault(form, []).append(piece)
    return [_joined(group) for group in groups.values()]


def _pieces(part: Batch, size: int) -> Iterator[Batch]:
    """A batch in pieces of at most so many rows."""
    for start in range(0, size_of(part), size):
        yield rows(part, start, min(start + size, size_of(part)))


def _joined(group: list[Batch]) -> Batch:
    columns = zip(*(tensors_of(piece) for piece in group), strict=True)
    joined = iter([torch.cat(column) for column in columns])
    return map_tensors(lambda _: next(joined), group[0])


def _mass(problem: Problem, batch: Batch) -> float:
    return float(problem.loss.masses(batch).sum())
