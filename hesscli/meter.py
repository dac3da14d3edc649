"""How much work is done, in passes over all kept examples: counted, so that no machine matters.

What takes long and is not a generator takes a function ``on_step`` and calls it after each
product, or what is about as long. It may end the work: by a KeyboardInterrupt, since code that
tries out what a model's own code does lets no other exception but hesscli's through.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace

import torch

from hesscli import world

OnStep = Callable[[], object]


def go_on() -> None:
    """Nothing ends it."""


FORWARD, BACKWARD = 1 / 3, 2 / 3
"""Of the work of a gradient: what a pass through the model takes, and what its way back."""


@dataclass(frozen=True)
class Algebra:
    """Work with long vectors and matrices, beside passes through a model.

    Attributes:
        made: entries in float64, in memory that is taken anew.
        read: entries, or written where they were before.
        multiplied: pairs of entries, in float32; of float64 each counts as two.
    """

    made: float = 0.0
    read: float = 0.0
    multiplied: float = 0.0

    def times(self, factor: float) -> Algebra:
        """So many times as much."""
        return Algebra(*(factor * each for each in astuple(self)))

    def __add__(self, other: Algebra) -> Algebra:
        both = zip(astuple(self), astuple(other), strict=True)
        return Algebra(*(one + another for one, another in both))


@dataclass
class Meter:
    """What a run has cost; all that computes for it adds to the same one.

    Attributes:
        products: matrix-vector products over all kept examples.
        gradients: all work, in gradients over all kept examples.
        kept: both, when a state last changed that could be saved: what was done since would have
            to be done again.
        earlier: products that were made before this process.
    """

    products: float = 0.0
    gradients: float = 0.0
    kept: tuple[float, float] = (0.0, 0.0)
    earlier: float = 0.0

    def add(self, gradients: float, share: float = 1.0, *, products: float = 0.0) -> None:
        """Count work on some of the data.

        Args:
            gradients: what it would take over all of it.
            share: of the examples, or of the work that all of them are.
            products: over all of it, as a sum of shares; their work is in ``gradients``.
        """
        self.gradients += gradients * share
        self.products += products

    def keep(self) -> None:
        """Take note that what all this work was for is in a state now."""
        self.kept = self.products, self.gradients

    @contextmanager
    def pooled(self) -> Iterator[None]:
        """Work that ranks share: once it is done, each counts what all have done."""
        products, gradients = self.products, self.gradients
        yield
        if world.size() > 1:
            done = world.gathered((self.products - products, self.gradients - gradients))
            self.products = products + sum(one for one, _ in done)
            self.gradients = gradients + sum(one for _, one in done)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Work that was counted when another process did it."""
        before = self.products, self.gradients
        yield
        self.products, self.gradients = before

    def go_back(self, kept: tuple[float, float]) -> None:
        """Count on from where a state was saved."""
        self.earlier += kept[0] - self.products
        self.products, self.gradients = self.kept = kept


@dataclass
class Spent:
    """Work that was done, or is foreseen: as a meter counts it, and in seconds.

    Of these, more ranks would have fewer of the ``shared`` ones each.
    """

    products: float = 0.0
    gradients: float = 0.0
    seconds: float = 0.0
    shared: float = 0.0

    def times(self, factor: float) -> Spent:
        """So many times as much."""
        return Spent(*(factor * each for each in astuple(self)))

    def dealt(self, gain: float) -> Spent:
        """What it takes where all of it is dealt out to ranks, so many times as fast as one."""
        return replace(self, seconds=self.seconds / gain, shared=self.seconds / gain)

    def alone(self) -> Spent:
        """The same done by each rank by itself."""
        return replace(self, shared=0.0)

    def add(self, other: Spent) -> None:
        """As much more."""
        self.products += other.products
        self.gradients += other.gradients
        self.seconds += other.seconds
        self.shared += other.shared

    def __add__(self, other: Spent) -> Spent:
        both = zip(astuple(self), astuple(other), strict=True)
        return Spent(*(one + another for one, another in both))


def now(device: torch.device) -> float:
    """When all that was asked of a device is done, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def watched(meter: Meter) -> Iterator[Spent]:
    """What is done within, once it is done."""
    spent, products, gradients = Spent(), meter.products, meter.gradients
    began = time.perf_counter()
    try:
        yield spent
    finally:
        spent.products += meter.products - products
        spent.gradients += meter.gradients - gradients
        spent.seconds += time.perf_counter() - began
