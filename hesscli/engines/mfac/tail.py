"""A Cholesky factor that follows rows which are replaced in turn."""

from __future__ import annotations

import torch
from torch import Tensor

from hesscli.engines.mfac.factor import Factor, factorised

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

    @property
    def used_up(self) -> bool:
        """Whether the next slot to be replaced is not in the tail."""
        return self._replaced == self.length

    def replace(self) -> None:
        """Take note that the next slot has another row."""
        self._replaced += 1

    def factor(self) -> Factor:
        """As of now.

        Raises:
            NotPositiveError: rounding has made A indefinite.
        """
        if self._known < self._replaced:
            self._follow()
        scales = (self._gram.diagonal() + self._shift).sqrt()
        return Factor(self._lower, scales, self._order)

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
