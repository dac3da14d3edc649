"""The inverse of a window's Fisher matrix while gradients come and go."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hesscli.engines.mfac.cholesky import (
    CholeskyFactor,
    NotPositiveError,
    factorised,
    too_little,
)
from hesscli.engines.mfac.gram import Gram
from hesscli.engines.mfac.static import (
    Solution,
    checked_damping,
    checked_rows,
    only,
    size_and_error,
)
from hesscli.engines.mfac.system import ENOUGH, Solved, System
from hesscli.engines.mfac.window import GradientWindow
from hesscli.state import State

# -- A Cholesky factor that follows rows which are replaced in turn --------------------------------


_TAILS = 16
"""Tails in a factor: a shorter one is cheaper to bring up to date, and used up sooner."""


class TailFactor:
    """Factor of A = K + shift·I, in which slots ``first``, ``first + 1``, ... are replaced next.

    They come last in the factor's order, so that what is before them stays as it is:

        A = [[H, B], [Bᵀ, C]] = LLᵀ  with  L = [[L_H, 0], [W, L_S]],  W = (L_H⁻¹B)ᵀ,
        L_S the factor of C − WWᵀ.

    A replaced row costs O(n²) for its row of W and little for L_S. After n / 16 of them the tail
    is used up, and a new factor must be made. Everything comes from K: errors do not build up.

    Args:
        gram: K ``(n, n)``; a view of what changes.
        shift: nλ.
        first: the slot to be replaced next.
    """

    def __init__(self, gram: Tensor, shift: float, first: int) -> None:
        count = len(gram)
        self.length = max(1, count // _TAILS)
        self._gram, self._shift, self._head = gram, shift, count - self.length
        self._order = (torch.arange(count, device=gram.device) + first + self.length) % count
        self._replaced = self._known = 0
        ordered = gram[self._order[:, None], self._order]
        ordered.diagonal().add_(shift)
        self._lower = factorised(ordered).lower

    @classmethod
    def resumed(cls, gram: Tensor, shift: float, state: State) -> TailFactor:
        """One that was saved, of the same matrix: made anew, it would be rounded otherwise."""
        tail = cls.__new__(cls)
        tail._gram, tail._shift = gram, shift
        tail._order, tail._lower = (state[name].to(gram.device) for name in ("order", "lower"))
        tail._lower = tail._lower.clone()
        tail._replaced, tail._known = state["replaced"], state["known"]
        tail.length = max(1, len(gram) // _TAILS)
        tail._head = len(gram) - tail.length
        return tail

    def state_dict(self) -> State:
        """What it is, beside the matrix that it is of."""
        return {
            "order": self._order,
            "lower": self._lower,
            "replaced": self._replaced,
            "known": self._known,
        }

    @property
    def used_up(self) -> bool:
        """Whether the next slot to be replaced is not in the tail."""
        return self._replaced == self.length

    def replace(self) -> None:
        """Take note that the next slot has another row."""
        self._replaced += 1

    def factor(self) -> CholeskyFactor:
        """The Cholesky factor as of now.

        Raises:
            NotPositiveError: rounding has made A indefinite.
        """
        if self._known < self._replaced:
            self._follow()
        scales = (self._gram.diagonal() + self._shift).sqrt()
        return CholeskyFactor(self._lower, scales, self._order)

    def _follow(self) -> None:
        head, L = self._head, self._lower
        new = slice(head + self._known, head + self._replaced)
        beside = self._gram[self._order[:head, None], self._order[new]]
        W = torch.linalg.solve_triangular(L[:head, :head], beside, upper=False).T
        tail = self._order[head:]
        C = self._gram[tail[:, None], tail]
        C.diagonal().add_(self._shift)
        L[new, :head] = W
        L[head:, head:] = factorised(C - L[head:, :head] @ L[head:, :head].T).lower
        self._known = self._replaced


# -- The inverse of a window's Fisher matrix while gradients come and go ---------------------------


class WindowedFisher:
    """(F̂ + λI)⁻¹ of the rows that are in the window now.

    A push costs one sweep over the window for the new row's inner products, and O(n²) for the
    factor; the factor is brought up to date when something is solved for. While the window
    fills, n itself changes, and each solve after a push makes a new factor.

    Products with the window are in float32 as long as that leaves enough digits; in float64
    where it does not, where the window is, and where it has room for more than d / 2 rows.

    Args:
        window: may have rows already.
        damping: λ, absolute.
        enough: bound of a relative error that is left as it is.

    Raises:
        UsageError: λ is not above 0.
    """

    def __init__(self, window: GradientWindow, damping: float, *, enough: float = ENOUGH) -> None:
        self.window, self.damping, self.enough = window, checked_damping(damping), enough
        self._gram = Gram(window, exact=2 * window.capacity > window.size)
        self._seen = window.pushes
        self._tail: TailFactor | None = None
        self._system: System | None = None

    def push(self, gradient: Tensor) -> int:
        """Keep a gradient ``(d,)``, in place of the oldest where the window is full.

        Returns:
            The slot that it is in now.

        Raises:
            UsageError: it has another length.
            UnsoundError: it is not finite; nothing has changed.
        """
        self._catch_up()
        growing = not self.window.full
        slot = self.window.push(gradient)
        self._gram.replace(slot)
        self._seen, self._system = self.window.pushes, None
        if growing or (self._tail is not None and self._tail.used_up):
            self._tail = None
        elif self._tail is not None:
            self._tail.replace()
        return slot

    def ihvp(self, vector: Tensor) -> Solution:
        """(F̂ + λI)⁻¹ x for x ``(d,)``.

        Raises:
            UsageError: x has another length, or the window is empty.
            UnsoundError: λ is lost in rounding.
        """
        rows = checked_rows(vector[None], self.window.size, self.window)
        return self._with_digits(lambda system: system.solve(rows))

    def combination(self, amounts: Tensor) -> Solution:
        """(F̂ + λI)⁻¹ x for x = Gᵀa with a ``(n,)`` in the order of slots: one pass, more digits.

        Raises:
            UsageError: a has another length, or the window is empty.
            UnsoundError: λ is lost in rounding.
        """
        rows = checked_rows(amounts[None], self.window.count, self.window)
        return self._with_digits(lambda system: system.combination(rows))

    def member(self, slot: int) -> Solution:
        """(F̂ + λI)⁻¹ g for the row in a slot."""
        amounts = only(slot, self.window)[None]
        return self._with_digits(lambda system: system.combination(amounts))

    def state_dict(self) -> State:
        """All there is to go on from to the same bits; only full windows' by reference."""
        rows, gram = self.window.rows, self._gram.matrix
        if not self.window.full:  # a part would be written with the whole
            rows, gram = rows.clone(), gram.clone()
        return {
            "damping": self.damping,
            "window": self.window.state_dict() | {"rows": rows},
            "exact": self._gram.exact,
            "gram": gram,
            "tail": None if self._tail is None else self._tail.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Be where another with a window of the same shape was; a damping of one's own stays.

        In a window of another type the rows are rounded otherwise, and their products are of these.
        """
        self.window.load_state_dict(state["window"])
        self._seen, self._system, self._tail = self.window.pushes, None, None
        if state["window"]["rows"].dtype != self.window.dtype:
            self._gram = Gram(self.window, exact=state["exact"])
            return
        self._gram = Gram.of(self.window, state["gram"], exact=state["exact"])
        if state["tail"] is not None and state["damping"] == self.damping:
            shift = self.window.count * self.damping
            self._tail = TailFactor.resumed(self._gram.matrix, shift, state["tail"])

    def _catch_up(self) -> None:
        """See what others have pushed to the window."""
        if self._seen != self.window.pushes:
            self._gram.refresh()
            self._seen, self._tail, self._system = self.window.pushes, None, None

    def _with_digits(self, attempt: Callable[[System], Solved]) -> Solution:
        """What an attempt finds; in float64 from now on where float32 leaves too few digits."""
        (vector,), (error,) = attempt(self._current())
        size, off = size_and_error(vector, error, self.window)
        if not (self._gram.exact or off <= self.enough * size):
            self._sharpen()
            (vector,), (error,) = attempt(self._current())
            size, off = size_and_error(vector, error, self.window)
        return Solution.within(vector, size, off)

    def _sharpen(self) -> None:
        self._gram = Gram(self.window, exact=True)
        self._tail = self._system = None

    def _current(self) -> System:
        self.window.require_rows()
        self._catch_up()
        if self._system is None:
            self._system = System(self._gram, self._factor(), self.damping, self._gram.dtype)
        return self._system

    def _factor(self) -> CholeskyFactor:
        """The Cholesky factor as of now.

        Raises:
            UnsoundError: λ is too small even for float64.
        """
        try:
            return self._followed()
        except NotPositiveError as error:
            if self._gram.exact:
                raise too_little(self.damping, error.missing / self.window.count) from error
        self._sharpen()
        return self._factor()

    def _followed(self) -> CholeskyFactor:
        if self._tail is None:
            first = self.window.pushes % self.window.capacity if self.window.full else 0
            shift = self.window.count * self.damping
            self._tail = TailFactor(self._gram.matrix, shift, first)
        return self._tail.factor()
