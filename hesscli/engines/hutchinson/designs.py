"""From a block of probes to unbiased estimates of a batch's diagonal."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from hesscli.engines.entries import Stream
from hesscli.engines.hutchinson.probes import Probes
from hesscli.engines.hutchinson.statistics import Array
from hesscli.operators.base import Operator, Term
from hesscli.streams import key

_REGIME, _REGIME_PROBES = 0x4E61, 8
"""The regime test's own probes."""


class Design(ABC):
    """How probes are turned into products.

    ``name`` is what the report calls it, ``products`` how many of them a probe takes, and
    ``stream`` holds the entries that are known without probes, if there are any.
    """

    name: str
    products = 1
    stream: Stream | None = None

    @abstractmethod
    def estimates(self, term: Term, block: Tensor) -> Tensor:
        """Probes ``(P, d)`` to as many estimates of the batch's diagonal, less the offset."""

    def prepare(self) -> Iterator[None]:
        """What is to be done once before any probe, in steps; nothing by default."""
        yield from ()

    def offset(self, batch: int) -> Array:
        """What is known of a batch's traces without probes, to be added: ``(L + 1,)`` or 0."""
        return np.zeros(())


class Plain(Design):
    """v ⊙ Av: one product a probe, whose noise is all of A off the diagonal."""

    name = "hutchinson"

    def estimates(self, term: Term, block: Tensor) -> Tensor:
        """One product a probe."""
        return block * term.apply(block)


class Stratified(Design):
    """v_l ⊙ (A v_l)_l for each layer l apart: no noise from between the layers.

    Costs a product for each layer, and pays where most of A off its diagonal lies between
    layers, as it does in untrained networks.
    """

    name = "stratified"

    def __init__(self, operator: Operator) -> None:
        parameters = operator.parameters
        self._strata = [
            [i for i, p in enumerate(parameters) if p.layer == layer] for layer in parameters.layers
        ]
        self._sizes = list(parameters.sizes)
        self.products = len(self._strata)

    def estimates(self, term: Term, block: Tensor) -> Tensor:
        """One product a probe and layer."""
        found = torch.zeros_like(block)
        into, given = self._split(found), self._split(block)
        for stratum, products in self.pushed(term, block):
            parts = self._split(products)
            for i in stratum:
                into[i].copy_(given[i] * parts[i])
        return found

    def pushed(self, term: Term, block: Tensor) -> Iterator[tuple[list[int], Tensor]]:
        """For each layer, the places of its tensors and the products of its probes alone."""
        given = self._split(block)
        for stratum in self._strata:
            alone = torch.zeros_like(block)
            parts = self._split(alone)
            for i in stratum:
                parts[i].copy_(given[i])
            yield stratum, term.apply(alone)

    def _split(self, rows: Tensor) -> tuple[Tensor, ...]:
        return torch.split(rows, self._sizes, dim=1)


def stratified_ratio(operator: Operator, seed: int) -> float:
    """Work of stratified probes over that of plain ones for the same error of the trace.

    The same products say both: a layer's probe gives its own quadratic form, and all of them
    add up to that of the whole probe. Measured on one batch.
    """
    design = Stratified(operator)
    term = next(iter(operator.batches()))
    block = Probes(operator, key(_REGIME, seed), "fresh", "rademacher").block(0, 0, _REGIME_PROBES)
    whole = torch.zeros(len(block), dtype=torch.float64, device=block.device)
    own = 0.0
    for stratum, products in design.pushed(term, block):
        forms = (block * products).double()
        whole += forms.sum(1)
        parts = torch.split(forms, list(operator.parameters.sizes), dim=1)
        own += float(torch.stack([parts[i].sum(1) for i in stratum]).sum(0).var())
    plain = float(whole.var())
    return design.products * own / plain if plain else float("inf")


def common_share(operator: Operator, seed: int) -> float:
    """Share of a batch's probe noise that its matrix has in common with another batch's.

    The correlation of two batches' quadratic forms of the same probes. A basis from the mean of
    all batches can take away no more than that; with a single batch it is everything.
    """
    terms = list(itertools.islice(operator.batches(), 2))
    if len(terms) == 1:
        return 1.0
    probes = Probes(operator, key(_REGIME, seed), "shared", "rademacher")
    block = probes.block(0, 0, _REGIME_PROBES)
    one, other = ((block * term.apply(block)).sum(1, dtype=torch.float64) for term in terms)
    one, other = one - one.mean(), other - other.mean()
    size = float(one.norm() * other.norm())
    return float(one @ other) / size if size else 0.0
