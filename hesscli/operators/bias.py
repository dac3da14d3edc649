"""What autocast does to products: measured against float64 on some examples.

The rounding of float32 is another for every probe. That of bfloat16 is in weights and activations,
which all probes share, so that no number of them takes its mean away: it is a bias.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import stdtrit
from torch import Tensor

from hesscli import randomness
from hesscli.meter import OnStep, go_on
from hesscli.operators.curvature import Curvature
from hesscli.operators.trials import Product
from hesscli.parameters import LayerSums, Parameters
from hesscli.problem.objective import Sample
from hesscli.problem.precision import doubled

Array = NDArray[np.float64]

_PIECES, _EACH = 8, 4
"""Pieces of the examples, where there are enough, and the vectors of signs that each has."""
_STREAM = 0xB1A5
"""Separates them from other streams."""
_SURE = 0.975
_STEPS = 2
"""Of the power method, for the vector whose product is the furthest off."""
_FURTHER = 2.0
"""Times as far off as after these steps, at most."""


@dataclass(frozen=True)
class Bias:
    """How far off products with a matrix A are, by those with signs v on some examples.

    Attributes:
        entries: how far off entries of v ⊙ Av are in the mean, one sigma, float64 ``(d,)``.
        products: the length of a product's error beside the largest product, for unit vectors.
    """

    entries: Tensor
    products: float
    _forms: Tensor
    _errors: Tensor
    _parameters: Parameters

    @property
    def forms(self) -> float:
        """Error of vᵀAv in the mean, beside its size."""
        size = _size(self._forms.sum(1, keepdim=True))
        return float((_bound(self._errors.sum(1, keepdim=True)) / np.where(size, size, np.inf))[0])

    def of_sums(self, size: Array, whole: Parameters) -> Array:
        """How far off means of vᵀAv are at most, by layer and in all ``(L + 1,)``.

        In proportion where forms are larger than on the examples that were looked at.

        Args:
            size: root mean square of the forms ``(L + 1,)``.
            whole: whose layers these are.
        """
        layers = LayerSums(self._parameters, whole)
        forms, errors = layers.of_tensors(self._forms), layers.of_tensors(self._errors)
        known = _size(forms)
        larger = np.divide(size, known, out=np.ones_like(size), where=known > 0)
        return np.asarray(_bound(errors) * np.maximum(larger, 1.0))


def measured(operator: Curvature, sample: Sample, on_step: OnStep = go_on) -> Bias:
    """What is off in an operator's products with some examples.

    Args:
        operator: whose products are made under autocast.
        sample: the examples.
        on_step: called after each product; may end it.
    """
    parameters, pieces = operator.parameters, list(_pieces(sample))
    total = torch.zeros(parameters.size, dtype=torch.float64, device=operator.problem.device)
    squares = torch.zeros_like(total)
    forms, errors = list[Tensor](), list[Tensor]()
    furthest, largest = total, total
    for number in range(_PIECES):
        signs = torch.stack([_signs(operator, _EACH * number + i) for i in range(_EACH)])
        exact, off = _compared(operator, pieces[number % len(pieces)], signs, on_step)
        furthest, largest = off[0], exact[0]
        forms.append(_by_tensor(signs * exact, parameters))
        mean = (signs * off).mean(0)
        errors.append(_by_tensor(mean[None], parameters))
        total += mean
        squares += mean.square()
    length, top = 0.0, 0.0
    for _ in range(_STEPS):
        exact, off = _compared(operator, sample, _units(furthest, largest), on_step)
        length = max(length, float(off.norm(dim=1).max()))
        top = max(top, float(exact.norm(dim=1).max()))
        furthest, largest = off[0], exact[1]
    mean = total / _PIECES
    spread = (squares / _PIECES - mean.square()).clamp_(min=0) / (_PIECES - 1)
    return Bias(
        entries=(mean.square() + spread).sqrt_(),
        products=_FURTHER * length / top if top else 0.0,
        _forms=torch.cat(forms).cpu(),
        _errors=torch.cat(errors).cpu(),
        _parameters=parameters,
    )


def _pieces(sample: Sample) -> Iterator[Sample]:
    """The sample in as many parts as there are vectors, or as it can be taken apart in."""
    pieces, count = [sample], 1
    while len(pieces) < _PIECES:
        pieces = [half for piece in pieces for half in (piece.halves() or (piece,))]
        if len(pieces) == count:
            break
        count = len(pieces)
    yield from pieces


def _compared(
    operator: Curvature, sample: Sample, block: Tensor, on_step: OnStep
) -> tuple[Tensor, Tensor]:
    """Products ``(k, d)`` in float64, and how far off they are under autocast."""
    own = Product(operator, sample)(block.to(operator.problem.dtype))
    on_step()
    with doubled(operator.problem):
        exact = Product(operator, sample)(block)
    on_step()
    return exact, own.double() - exact


def _signs(operator: Curvature, number: int) -> Tensor:
    return randomness.at(
        operator.parameters.runs,
        randomness.rademacher,
        randomness.key(_STREAM, number),
        dtype=torch.float64,
        device=operator.problem.device,
    )


def _units(*vectors: Tensor) -> Tensor:
    """Rows of length one, or zero."""
    return torch.stack([v / v.norm().clamp_min(1e-300) for v in vectors])


def _by_tensor(rows: Tensor, parameters: Parameters) -> Tensor:
    """Sums ``(k, P)`` over each parameter's entries."""
    parts = torch.split(rows, list(parameters.sizes), dim=1)
    return torch.stack([part.sum(1) for part in parts], dim=1)


def _size(rows: Tensor) -> Array:
    """Root mean square of each column."""
    return np.asarray(rows.square().mean(0).sqrt().numpy())


def _bound(rows: Tensor) -> Array:
    """What the mean of each column's like is below, in size, whichever way it goes."""
    count = len(rows)
    spread = rows.std(0) * (float(stdtrit(count - 1, _SURE)) / math.sqrt(count))
    return np.asarray((rows.mean(0).abs() + spread).numpy())
