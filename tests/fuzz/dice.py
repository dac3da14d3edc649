"""The random choices of one network, all from one seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Dice:
    """Choices from Python's generator, tensors from torch's, both seeded by one number."""

    def __init__(self, *seed: int) -> None:
        self.choices = random.Random(repr(seed))
        torch.manual_seed(self.choices.getrandbits(62))
        self.dtype = torch.float64 if self.chance(0.5) else torch.float32

    def chance(self, probability: float) -> bool:
        return self.choices.random() < probability

    def between(self, low: int, high: int) -> int:
        """An integer, both ends included."""
        return self.choices.randint(low, high)

    def uniform(self, low: float, high: float) -> float:
        return self.choices.uniform(low, high)

    def one_of(self, options: Sequence[T]) -> T:
        return self.choices.choice(options)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(self.dtype)

    def classes(self, count: int, *shape: int) -> Tensor:
        return torch.randint(0, count, shape)

    def positive(self, count: int) -> list[float]:
        """Numbers that float32 holds exactly, so that rewriting them loses nothing."""
        return [self.between(1, 12) / 4 for _ in range(count)]


def words(*expressions: str) -> tuple[str, ...]:
    """Regular expressions that a message is searched for, any case."""
    return expressions


Batch = Any
