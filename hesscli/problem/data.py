"""Kept examples, and how many of them there shall be."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hesscli.problem.batches import Batch, leaves_of, owned, tensors_of


@dataclass(frozen=True)
class FrozenData:
    """Kept batches on the CPU.

    ``available`` is the number of examples that the loader has, None where it was not seen to
    the end. ``sliceable`` says that rows are examples; else a batch is the smallest unit.
    ``changing`` says that some came out otherwise when they were fetched again.
    """

    batches: tuple[Batch, ...]
    counts: tuple[int, ...]
    available: int | None
    sliceable: bool
    sha256: str
    changing: bool = False

    @property
    def count(self) -> int:
        """Number of kept examples."""
        return sum(self.counts)

    @property
    def fraction(self) -> float | None:
        """Kept examples over available ones; None where the loader was not seen to the end."""
        return None if self.available is None else self.count / self.available

    @property
    def nbytes(self) -> int:
        """Memory that the kept examples take."""
        return sum(t.nbytes for batch in self.batches for t in tensors_of(batch))


def digest_of(batches: Sequence[Batch]) -> str:
    """SHA-256 over order, shapes, types and bytes of the kept tensors, and over other values."""
    digest = hashlib.sha256()
    for leaf in leaves_of(batches):
        if isinstance(leaf, Tensor):
            digest.update(f"{tuple(leaf.shape)}{leaf.dtype}".encode())
            digest.update(leaf.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(leaf, (str, int, float)):
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


# -- A fair choice among items whose number is not known before the last was seen ------------------


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
