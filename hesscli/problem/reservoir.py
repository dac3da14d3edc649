"""A fair choice among items whose number is not known before the last was seen."""

from __future__ import annotations

import numpy as np

from hesscli.problem.batches import Batch, owned


class Reservoir:
    """At most ``capacity`` items of a stream: the first, or at random (Vitter 1985, algorithm R).

    Vitter, "Random sampling with a reservoir", ACM TOMS 11 (1985), section 2.
    """

    def __init__(self, capacity: int | None, first: bool, generator: np.random.Generator) -> None:
        self.capacity, self.first, self.generator = capacity, first, generator
        self.kept: list[Batch] = []
        self.seen = 0

    def offer(self, item: Batch) -> bool:
        """Take or leave the next item; False where no later one can be taken."""
        full = len(self.kept) == self.capacity
        if full and self.first:
            return False
        slot = int(self.generator.integers(self.seen + 1)) if full else self.seen
        if self.capacity is None or slot < self.capacity:
            self.kept[slot : slot + 1] = [owned(item)]
        self.seen += 1
        return True
