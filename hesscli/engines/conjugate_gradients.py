"""Preconditioned conjugate gradients, honest about rounding.

The residual x − Ay that the recursion carries goes on falling when the true one no longer does,
since products are rounded. How far the two may have come apart is kept count of; where the
recursion's may be nothing else, the true residual is computed and takes its place (residual
replacement: van der Vorst & Ye 2000, "Residual replacement strategies for Krylov subspace
iterative methods for the convergence of true residuals"), and where that does not help any more
the solve ends. How much rounding is in a product with y is measured by another one with ¾y, which
is rounded otherwise; a residual of which it makes half is as small as it gets.

Each direction is made conjugate to the last by its own product, and each step minimises along it:
both stay true of a preconditioner that is itself rounded (flexible conjugate gradients).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from hesscli.engines.lanczos import ROUNDING
from hesscli.errors import UnsoundError
from hesscli.state import State

Map = Callable[[Tensor], Tensor]

_GAIN = 0.5
"""What a true residual must come down to, of the last one that did, to be worth going on for."""
_PATIENCE = 10
"""Steps after which one within rounding is computed anew even if it has not come down so far."""
_IN_VAIN = 100
"""Steps without a gain, beside as many as there were before any doubt, after which a solve is held
up."""

_OTHERWISE = 0.75
"""A multiple of a vector that has other digits."""

_POWERS = 4
"""Products that go into ‖A‖, beside whose rounding a curvature must be negative."""


@dataclass(frozen=True)
class _State:
    """Where a solve is: replaced as a whole, so that no step is ever half made.

    ``left`` is the residual vector of ``point`` as the recursion has it and ``residual`` its
    relative norm. ``since`` counts the steps since it was computed anew, ``reach`` is ‖y‖ then
    plus Σ‖change of y‖ since, and ``floor`` the last that was a gain, after ``gained`` steps.
    ``image`` is A·direction over direction·A·direction; ``largest`` the largest ‖Ap‖/‖p‖;
    ``noise`` the size of rounding in Ay, measured when a residual is first computed anew, which is
    after ``sure`` steps.
    """

    point: Tensor
    left: Tensor
    residual: float
    floor: float
    reach: float
    best: Tensor
    best_residual: float
    ended: bool
    iterations: int = 0
    gained: int = 0
    since: int = 0
    largest: float = 0.0
    noise: float | None = None
    sure: int = 0
    direction: Tensor | None = None
    image: Tensor | None = None
    negative_curvature: float | None = None


class ConjugateGradients:
    """The solution y of Ay = x with a fixed symmetric matrix, one product a step.

    Only the step that meets negative curvature makes a few more, to make sure of it, and the
    first that computes a residual anew one more, to measure its rounding.

    Args:
        product: A, damping included: ``(d,)`` to ``(d,)``. What it returns may be float32.
        right: x ``(d,)``.
        precondition: an approximate inverse of A, positive definite; default none.
        start: where to begin, at the cost of one product; default zero, which costs none.
        dtype: in which the product computes: below its rounding neither a residual nor a
            curvature means anything.

    Vectors are float64 whatever the product computes in.

    Raises:
        UnsoundError: the first residual is not finite.
    """

    def __init__(
        self,
        product: Map,
        right: Tensor,
        *,
        precondition: Map | None = None,
        start: Tensor | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self._product, self._precondition = product, precondition
        self._unit = ROUNDING * torch.finfo(dtype).eps
        self._right = right.detach().to(torch.float64, copy=True)
        (self._size,) = _norms(self._right)
        point, left = torch.zeros_like(self._right), self._right
        residual, reach = float(self._size != 0), 0.0
        if self._size and start is not None:
            point = start.detach().to(self._right, copy=True)
            left = self._left_by(point)
            size, reach = _norms(left, point)
            residual = self._relative(size)
        self._state = _State(
            point=point,
            left=left,
            residual=residual,
            floor=residual,
            reach=reach,
            best=point,
            best_residual=residual,
            ended=residual == 0,
        )

    @property
    def iterations(self) -> int:
        """Steps made along a direction; those that only computed the true residual not counted."""
        return self._state.iterations

    @property
    def solution(self) -> Tensor:
        """The y of smallest residual so far ``(d,)``; not to be changed."""
        return self._state.best

    @property
    def residual(self) -> float:
        """‖x − Ay‖ / ‖x‖ of :attr:`solution`: the recursion's, while rounding is smaller than it.

        Zero where x is zero.
        """
        return self._state.best_residual

    @property
    def negative_curvature(self) -> float | None:
        """pᵀAp / pᵀp of the direction at which the solve ended, if below zero beyond rounding."""
        return self._state.negative_curvature

    @property
    def done(self) -> bool:
        """Whether no step helps: y is exact, rounding holds it up, or A is not positive."""
        return self._state.ended

    def true_residual(self) -> float:
        """‖x − Ay‖ / ‖x‖ of :attr:`solution`, computed anew with one product.

        Raises:
            UnsoundError: the product is not finite.
        """
        (size,) = _norms(self._left_by(self.solution))
        return self._relative(size) if self._size else size

    def step(self) -> None:
        """Make one more product; none once the solve is done.

        Whatever the product or the preconditioner raises, nothing has changed, and the step can
        be made again.

        Raises:
            UnsoundError: the product, or what the preconditioner gives, is not finite.
        """
        if self.done:
            return
        self._state = self._verified() if self._due else self._moved()

    def state_dict(self) -> State:
        """Where the solve is."""
        return {field.name: getattr(self._state, field.name) for field in fields(_State)}

    def load_state_dict(self, state: State) -> None:
        """Be where another of the same system was."""

        def placed(value: object) -> object:
            return value.to(self._right, copy=True) if isinstance(value, Tensor) else value

        self._state = _State(**{name: placed(value) for name, value in state.items()})  # type: ignore[arg-type]

    @property
    def _due(self) -> bool:
        """Whether the next product goes into the true residual."""
        state = self._state
        waited = state.since >= _PATIENCE or state.residual <= _GAIN * state.floor
        return waited and state.since > 0 and self._doubtful(state)

    def _doubtful(self, state: _State) -> bool:
        """Whether the recursion's residual may be nothing but rounding."""
        return state.residual * self._size <= self._unit * state.largest * state.reach

    def _moved(self) -> _State:
        """After a step along the next direction, to the minimum on it."""
        state = self._state
        direction = self._next_direction()
        image = self._image(direction)
        curvature, slope = direction @ image, direction @ state.left
        length = slope / curvature
        left = state.left - length * image
        scalars = [curvature, length, *map(torch.linalg.vector_norm, (direction, image, left))]
        bent, step, size, stretched, remains = torch.stack(scalars).tolist()
        _refuse_if_not_finite(size, f"preconditioned residual {state.iterations + 1}")
        _refuse_if_not_finite(stretched, f"product {state.iterations + 1}")
        largest = max(state.largest, stretched / size) if size else state.largest
        if not (bent > 0 and math.isfinite(remains)):
            beyond = bent < 0 and bent < -self._unit * self._stretch(image) * size**2
            return replace(state, ended=True, negative_curvature=bent / size**2 if beyond else None)
        moved = replace(
            state,
            point=state.point + length * direction,
            left=left,
            residual=remains / self._size,
            iterations=state.iterations + 1,
            since=state.since + 1,
            reach=state.reach + abs(step) * size,
            largest=largest,
            direction=direction,
            image=image / curvature,
        )
        return moved if self._doubtful(moved) else _with_best(moved)

    def _verified(self) -> _State:
        """After the true residual took the recursion's place; ended if rounding holds it up."""
        state = self._state
        left = self._left_by(state.point)
        size, off, reach = _norms(left, left - state.left, state.point)
        residual, apart = self._relative(size), off / self._size
        noise, sure = state.noise, state.sure
        if noise is None:
            noise, sure = self._noise(state.point, left), state.iterations
        after = replace(state, left=left, residual=residual, since=0, reach=reach)
        after = replace(after, noise=noise, sure=sure)
        if size <= 2 * noise:
            after = replace(after, ended=True)
        elif residual <= _GAIN * state.floor:
            after = replace(after, floor=residual, gained=state.iterations)
        else:
            in_vain = state.iterations >= state.gained + state.sure + _IN_VAIN
            after = replace(after, ended=in_vain or apart > residual / 2)
        return _with_best(after)

    def _next_direction(self) -> Tensor:
        """The preconditioned residual, made conjugate to the last direction."""
        state = self._state
        given = state.left if self._precondition is None else self._precondition(state.left)
        direction = given.to(torch.float64, copy=True)
        if state.direction is not None and state.image is not None:
            direction -= (direction @ state.image) * state.direction
        return direction

    def _stretch(self, vector: Tensor) -> float:
        """‖A‖ from below, by the power method: directions may all have been flat ones."""
        for _ in range(_POWERS):
            vector = self._image(vector / torch.linalg.vector_norm(vector))
        return _norms(vector)[0]

    def _noise(self, point: Tensor, left: Tensor) -> float:
        """‖what rounding does to A y, twice‖, of y with x − Ay ``left``."""
        again = self._image(_OTHERWISE * point) / _OTHERWISE
        (size,) = _norms(again - (self._right - left))
        return size

    def _image(self, vector: Tensor) -> Tensor:
        return self._product(vector).to(torch.float64)

    def _left_by(self, point: Tensor) -> Tensor:
        return self._right - self._image(point)

    def _relative(self, size: float) -> float:
        _refuse_if_not_finite(size, "the product with a solution")
        return size / self._size


def _with_best(state: _State) -> _State:
    if state.residual < state.best_residual:
        return replace(state, best=state.point, best_residual=state.residual)
    return state


def _norms(*vectors: Tensor) -> list[float]:
    """Read together, for each reading makes a GPU wait."""
    norms: list[float] = torch.stack([torch.linalg.vector_norm(v) for v in vectors]).tolist()
    return norms


def _refuse_if_not_finite(size: float, where: str) -> None:
    if not math.isfinite(size):
        raise UnsoundError(
            "a curvature product is not finite",
            f"NaN or infinity in {where} of conjugate gradients",
            "--dtype float64, or a checkpoint from before the run diverged",
        )
