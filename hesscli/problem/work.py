"""What a pass through a model takes: priced as on one core, but counted, so that none matters."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hesscli.meter import Algebra

_OPERATION, _NUMBER, _MULTIPLIED, _WEIGHT = 18e3, 0.75, 0.025, 0.6
"""Nanoseconds of calling an operation, of making a number, of a multiplication in a product, and
of reading a weight or writing its gradient, all in float32 on a forward pass: fitted to gradients
of six networks of 300 weights to 27 million."""
_WIDE = 2
"""Times as long a multiplication takes in a wider type than its width says: kernels are fewer."""
_MADE, _READ = 4.5, 0.7
"""Of an entry of a long vector in float64, in memory that is taken anew, or was there."""
_GRADIENT = 3
"""Forward passes that a gradient takes."""


@dataclass(frozen=True)
class PassWork:
    """Of a forward pass.

    Attributes:
        operations: that are called.
        numbers: that they make for an example.
        multiplied: pairs of numbers that products and convolutions multiply for an example.
        weights: that are read.
    """

    operations: int = 0
    numbers: int = 0
    multiplied: int = 0
    weights: int = 0

    def nanoseconds(self, count: int, dtype: torch.dtype) -> float:
        """Of so many examples in a type, of which a wider one takes as many times longer."""
        width = dtype.itemsize / torch.float32.itemsize
        multiplied = _MULTIPLIED * self.multiplied * (_WIDE if width > 1 else 1)
        each = count * (_NUMBER * self.numbers + multiplied)
        return _OPERATION * self.operations + width * (each + _WEIGHT * self.weights)


def of_algebra(work: Algebra, forward: float) -> float:
    """Gradients that it takes, where a forward pass takes so many nanoseconds."""
    entries = _MADE * work.made + _READ * work.read
    return (entries + _MULTIPLIED * work.multiplied) / (_GRADIENT * forward)
