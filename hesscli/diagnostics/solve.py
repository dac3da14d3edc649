"""(F̂ + λI) y = x: how well y solves it, conjugate gradients, and other dampings."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from hesscli import world
from hesscli.diagnostics.saliency import (
    correlated,
    rank_correlation,
    saliencies,
    sampled_places,
)
from hesscli.diagnostics.window import Collected
from hesscli.engines.conjugate_gradients import ConjugateGradients
from hesscli.engines.mfac import Gram, StaticFisher
from hesscli.engines.mfac.static import Part
from hesscli.engines.mfac.work import InverseWork, spanned
from hesscli.meter import Algebra
from hesscli.operators.base import Operator
from hesscli.results import DampingPoint, Refinement, ResidualReport, Snapshot
from hesscli.state import State

# -- (F̂ + λI) y = x, how well y solves it, and conjugate gradients where that is not enough -------


@dataclass(frozen=True)
class Solved:
    """y, float64 ``(d,)``, with its certificate."""

    direction: Tensor
    residual: ResidualReport
    refinement: Refinement | None


class Solving:
    """The solve with a window, and conjugate gradients with the operator where that is asked.

    Args:
        operator: the matrix that the user cares about.
        fisher: the window's matrix, damped.
        right: x ``(d,)``.
        refine: relative residual against operator + λI to come down to; None to leave y as the
            window has it.
    """

    def __init__(
        self, operator: Operator, fisher: StaticFisher, right: Tensor, refine: float | None
    ) -> None:
        self.operator, self.fisher, self.refine = operator, fisher, refine
        self.right = right.double()
        self._from_window = self._precondition(self.right)
        self._residual: ResidualReport | None = None
        self._solver: ConjugateGradients | None = None
        if refine is not None:
            self._solver = ConjugateGradients(
                self._damped,
                self.right,
                precondition=self._preconditioned,
                dtype=operator.problem.dtype,
            )

    def count(self) -> None:
        """Add to the meter what the inverse and its solve have taken, unless that was kept."""
        self._count(self.fisher.work.built + self.fisher.work.first_solved)
        self.operator.meter.keep()

    def steps(self) -> Iterator[Snapshot]:
        """Iterations of conjugate gradients where they are asked for, and the residual.

        Raises:
            UnsoundError: a product is not finite.
        """
        solver, refine = self._solver, self.refine
        while solver and refine and not (solver.done or solver.residual <= refine):
            solver.step()
            self.operator.meter.keep()
            yield Snapshot(
                phase="refining", done=float(solver.iterations), estimate=solver.residual
            )
        if self._residual is None:
            self._measure()
            yield Snapshot(phase="refining", estimate=self.solved.residual.operator)

    def state_dict(self) -> State:
        """Of conjugate gradients, and the residual; the window's solve is as soon made again."""
        return {
            "solver": None if self._solver is None else self._solver.state_dict(),
            "residual": None if self._residual is None else asdict(self._residual),
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from where another solve of the same system was."""
        if self._solver is not None:
            self._solver.load_state_dict(state["solver"])
        if state["residual"] is not None:
            self._residual = ResidualReport(**state["residual"])

    @property
    def direction(self) -> Tensor:
        """The solution so far ``(d,)``."""
        if self._solver is not None and self._solver.residual < 1:
            # Where the matrix curves down, no step may have come nearer than y = 0: no answer.
            return self._solver.solution
        return self._from_window

    @cached_property
    def solved(self) -> Solved:
        """The solution, and what a product says of it."""
        solver, refine, direction = self._solver, self.refine, self.direction
        residual = self._residual or self._measure()
        if solver is None or refine is None:
            return Solved(direction, residual, None)
        found = residual.operator or 0.0
        refinement = Refinement(
            tolerance=refine,
            iterations=solver.iterations,
            residual=found,
            converged=found <= refine,
            negative_curvature=solver.negative_curvature,
        )
        return Solved(direction, residual, refinement)

    def _measure(self) -> ResidualReport:
        """Make the product that says how good the solution is."""
        direction, window = self.direction, self.fisher.window
        image = window.whole(self.fisher.multiply(direction[window.place]))
        self._count(self.fisher.work.multiplied)
        self._residual = ResidualReport(
            window=relative_residual(image, self.right),
            operator=relative_residual(self._damped(direction), self.right),
            operator_name=self.operator.name,
        )
        self.operator.meter.keep()
        return self._residual

    def _damped(self, vector: Tensor) -> Tensor:
        return self.operator.apply(vector[None])[0] + self.fisher.damping * vector

    def _preconditioned(self, vector: Tensor) -> Tensor:
        self._count(self.fisher.work.solved_again)
        return self._precondition(vector)

    def _count(self, work: Algebra) -> None:
        self.operator.meter.add(self.operator.problem.algebra(work))

    def _precondition(self, vector: Tensor) -> Tensor:
        window = self.fisher.window
        return window.whole(self.fisher.ihvp(vector[window.place]).vector)


def relative_residual(image: Tensor, right: Tensor) -> float | None:
    """‖Ay − x‖ / ‖x‖; None where x is zero."""
    size = float(torch.linalg.vector_norm(right))
    return float(torch.linalg.vector_norm(image - right)) / size if size else None


# -- What different dampings make of a window: how much is data, and how much is λ -----------------


RELATIVE = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
_MOST_DIRECTIONS = 1 << 28
"""Numbers in the solutions that are held at once."""
_IMAGES = 1 << 27
"""Bytes of products with them that are held at once, unless one has more."""


def sweep(
    operator: Operator,
    collected: Collected,
    weights: Tensor,
    right: Tensor,
    own: Tensor | None,
) -> Generator[Snapshot, None, tuple[DampingPoint, ...]]:
    """One point for each damping, the largest first; none where the gradients are all zero.

    Blocks are read once for all dampings. Leverage and ranks are those of a quarter of a million
    weights drawn by chance where there are more: then known to 0.002.

    Args:
        operator: the matrix that the user cares about: one product a damping.
        collected: the window.
        weights: ``(d,)``, for their saliencies.
        right: x ``(d,)``.
        own: the diagonal of the inverse at the window's own damping, where it is known.
    """
    unit, dtype = collected.damping_unit, operator.problem.dtype
    if not unit or not sweeps(len(weights)):
        return ()
    dampings, right = [relative * unit for relative in RELATIVE], right.double()
    window, places = collected.window, sampled_places(len(weights), weights.device)
    directions = torch.empty(len(dampings), len(right), dtype=dtype, device=right.device)
    diagonals = torch.zeros(len(dampings), len(places), dtype=torch.float64, device=right.device)

    def damped(parts: Iterator[Part]) -> Generator[None, None, None]:
        for part in parts:
            start, stop = (window.place.start + end for end in _ends(part.columns))
            first, last = torch.searchsorted(places, places.new_tensor((start, stop))).tolist()
            inside = places[first:last] - start
            for damping, direction, diagonal in zip(dampings, directions, diagonals, strict=True):
                solved, entries = part.damped(damping).plain(right[None, start:stop])
                direction[start:stop], diagonal[first:last] = solved[0], entries[inside]
            yield

    for _ in damped(collected.fisher.shared_parts()):
        yield Snapshot(phase="inverting")
    for _ in world.abreast(damped(collected.fisher.parts())):
        yield Snapshot(phase="inverting")
    for direction in directions:
        window.completed(direction, slice(0, window.columns))
    diagonals = window.added_up(diagonals)
    if with_own := own is None:
        own = window.whole(collected.fisher.diagonal())
    own = own[places]
    saliency = saliencies(weights[places], own)
    residuals = yield from _residuals(operator, dampings, directions, right)
    shares = _span_shares(collected, directions)
    cosines = [*(_cosine(a, b) for a, b in pairwise(directions)), None]
    operator.meter.add(operator.problem.algebra(swept(collected.fisher.work, with_own)))
    return tuple(
        DampingPoint(
            relative=relative,
            absolute=damping,
            span_share=share,
            cosine=cosine,
            leverage=float((1 - damping * diagonal).median()),
            rank_correlation=rank_correlation(saliencies(weights[places], diagonal), saliency),
            operator_residual=residual,
        )
        for relative, damping, diagonal, share, cosine, residual in zip(
            RELATIVE,
            dampings,
            diagonals,
            shares,
            cosines,
            residuals,
            strict=True,
        )
    )


def swept(work: InverseWork, with_own: bool = False) -> Algebra:
    """What the other dampings take beside products.

    Args:
        work: of an inverse of the same window.
        with_own: whether its own diagonal is to be made as well.
    """
    size, count = int(work.sizes.sum()), len(RELATIVE)
    found = work.damped(count) + spanned(work.rows, size, work.dtype, count)
    found += (correlated(size) + Algebra(made=size)).times(count)
    return found + work.diagonal if with_own else found


def sweeps(size: int) -> bool:
    """Whether the solutions of so many entries can be held at once."""
    return len(RELATIVE) * size <= _MOST_DIRECTIONS


def _ends(columns: slice) -> tuple[int, int]:
    return columns.start, columns.stop


def _residuals(
    operator: Operator, dampings: Sequence[float], directions: Tensor, right: Tensor
) -> Generator[Snapshot, None, list[float | None]]:
    """Of each damping's direction against the matrix itself."""
    found = list[float | None]()
    size = max(1, _IMAGES // (torch.float64.itemsize * len(right)))
    for start in range(0, len(dampings), size):
        block = directions[start : start + size]
        images = operator.apply(block)
        for image, direction, damping in zip(images, block, dampings[start:], strict=False):
            found.append(relative_residual(image.add_(direction, alpha=damping), right))
        yield Snapshot(phase="inverting", done=float(len(found)), total=float(len(dampings)))
    return found


def _span_shares(collected: Collected, directions: Tensor) -> Sequence[float | None]:
    """‖P y‖ / ‖y‖ with P the projection to the span of the window's rows."""
    window = collected.window
    values, vectors = torch.linalg.eigh(Gram(window).matrix)
    kept = values > len(values) * torch.finfo(torch.float32).eps * values[-1]
    projected = window.added_up(window.project(directions[:, window.place]))
    inside = projected @ vectors[:, kept] / values[kept].sqrt()
    sizes = torch.linalg.vector_norm(directions, dim=1, dtype=torch.float64)
    shares = torch.linalg.vector_norm(inside, dim=1) / sizes
    return [
        min(share, 1.0) if size else None
        for share, size in zip(shares.tolist(), sizes.tolist(), strict=True)
    ]


def _cosine(one: Tensor, other: Tensor) -> float | None:
    one, other = one.double(), other.double()
    sizes = torch.linalg.vector_norm(one) * torch.linalg.vector_norm(other)
    return float(one @ other / sizes) if sizes else None
