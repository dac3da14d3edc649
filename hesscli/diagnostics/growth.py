"""Whether memory grows from product to product, beyond what a measurement itself keeps.

Once blocks have reached their size, a product takes what the one before it gave back. What grows
all the same is kept by somebody: a model that appends to a list, or a loss that remembers. Such a
run would be killed where there is no more, and what it has would be lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from hesscli.errors import UnsoundError
from hesscli.memory import available_bytes, taken_bytes
from hesscli.operators.base import BLOCK_BYTES
from hesscli.results import Snapshot
from hesscli.state import State, bytes_of
from hesscli.units import human_bytes

_SETTLED = 100
"""Products after which blocks have reached their size."""
_EVERY = 0.5
"""Seconds between two looks."""
_SLACK, _SHARE = 8 * BLOCK_BYTES, 1 / 2
"""Growth that is none yet, in bytes and in units of what was taken: allocators keep some blocks."""
_LEFT = 1 / 8
"""Of the growth, which must be left of the memory for the work to go on."""


class ExhaustedError(UnsoundError):
    """Memory has grown until hardly any is left."""


class Growth:
    """Looks at memory between the steps of a run.

    Args:
        device: whose memory.

    Attributes:
        warning: what there is to say of it, if anything.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.warning: str | None = None
        self._phase: str | None = None
        self._first, self._looked = 0.0, 0.0
        self._settled: tuple[int, int] | None = None

    def look(self, snapshot: Snapshot, state: Callable[[], State]) -> None:
        """Between two steps.

        Args:
            snapshot: of a phase and its products.
            state: what is kept of the work.

        Raises:
            ExhaustedError: as much as it has grown by is all but left.
        """
        if snapshot.phase != self._phase or snapshot.done is None:
            self._phase, self._first, self._settled = snapshot.phase, snapshot.done or 0.0, None
            return
        products, now = snapshot.done - self._first, time.monotonic()
        if products < _SETTLED or now - self._looked < _EVERY:
            return
        self._looked = now
        if self._settled is None:
            self._settled = taken_bytes(self.device), bytes_of(state())
            return
        before, kept = self._settled
        least, grown = _SLACK + _SHARE * before, taken_bytes(self.device) - before
        if grown > least and (grown := grown - bytes_of(state()) + kept) > least:
            self._tell(grown, products)

    def _tell(self, grown: int, products: float) -> None:
        told = (
            f"by {human_bytes(grown)} in {products:.0f} products, and none of it is the run's own"
        )
        self.warning = (
            f"memory has grown {told}: the model or its loss keeps something of each pass"
        )
        if (left := available_bytes(self.device)) < _LEFT * grown:
            raise ExhaustedError(
                "memory is all but used up",
                f"it has grown {told}; {human_bytes(left)} are left",
                "a model and a loss that keep nothing from one pass to the next, as a list that "
                "is appended to does",
            )
