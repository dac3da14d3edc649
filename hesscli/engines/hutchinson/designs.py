"""Probes, and how blocks of them become unbiased estimates of a batch's diagonal."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from hesscli import randomness, world
from hesscli.engines.entries import Stream
from hesscli.engines.hutchinson.table import Array, Sharing
from hesscli.engines.lanczos import Lanczos
from hesscli.errors import UsageError
from hesscli.meter import OnStep, go_on
from hesscli.operators.source import Source, Term
from hesscli.parameters import LayerSums, Parameters
from hesscli.randomness import Distribution, key
from hesscli.state import State
from hesscli.sums import shared_sum

# -- Probe vectors: keyed by (seed, batch, probe) and by each entry's place in the full vector -----


_PROBES = 0x9806E5
"""Separates probe streams from other uses of a seed."""


class Probes:
    """Rows of probes for an operator's parameters."""

    def __init__(
        self, operator: Source, seed: int, sharing: Sharing, distribution: Distribution
    ) -> None:
        self.operator, self.seed, self.sharing = operator, seed, sharing
        self._sample = randomness.SAMPLERS[distribution]

    def block(self, batch: int, first: int, count: int) -> Tensor:
        """Probes ``first … first + count`` of a batch, ``(count, d)`` in the operator's dtype."""
        rows = [self._vector(batch, probe) for probe in range(first, first + count)]
        return torch.stack(rows) if count > 1 else rows[0][None]

    def _vector(self, batch: int, probe: int) -> Tensor:
        owner = randomness.SHARED if self.sharing == "shared" else batch
        stream = randomness.key(_PROBES, self.seed, owner, probe)
        source = self.operator
        return randomness.at(
            source.parameters.runs, self._sample, stream, dtype=source.dtype, device=source.device
        )


# -- From a block of probes to unbiased estimates of a batch's diagonal ----------------------------


_REGIME, REGIME_PROBES = 0x4E61, 8
"""The regime test's own probes, and how many each of its products with a batch takes."""


class Design(ABC):
    """How probes are turned into products.

    ``name`` is what the report calls it, ``products`` how many of them a probe takes, and
    ``stream`` holds the entries that are known without probes, if there are any.
    """

    name: str
    products = 1
    stream: Stream | None = None

    @abstractmethod
    def estimates(self, term: Term, block: Tensor, on_step: OnStep = go_on) -> Tensor:
        """Probes ``(P, d)`` to as many estimates of the batch's diagonal, less the offset.

        ``on_step`` is called between two products; may end it.
        """

    def prepare(self) -> Iterator[None]:
        """What is to be done once before any probe, in steps; nothing by default."""
        yield from ()

    def offset(self, batch: int) -> Array:
        """What is known of a batch's traces without probes, to be added: ``(L + 1,)`` or 0."""
        return np.zeros(())

    def state_dict(self) -> State:
        """What :meth:`prepare` has made so far; nothing by default."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Be as far as another of the same matrix was."""
        assert not state  # nothing by default

    def join(self, state: State) -> None:
        """Be as another is, where that is what this would be."""
        assert not state  # nothing by default


class Plain(Design):
    """v ⊙ Av: one product a probe, whose noise is all of A off the diagonal."""

    name = "hutchinson"

    def estimates(self, term: Term, block: Tensor, on_step: OnStep = go_on) -> Tensor:
        """Plain Hutchinson estimates, one product a probe."""
        return term.apply(block, on_step).mul_(block)


class Stratified(Design):
    """v_l ⊙ (A v_l)_l for each layer l apart: no noise from between the layers.

    Costs a product for each layer, and pays where most of A off its diagonal lies between
    layers, as it does in untrained networks.
    """

    name = "stratified"

    def __init__(self, operator: Source) -> None:
        parameters = operator.parameters
        self._strata = [
            [i for i, p in enumerate(parameters) if p.layer == layer] for layer in parameters.layers
        ]
        self._sizes = list(parameters.sizes)
        self.products = len(self._strata)

    def estimates(self, term: Term, block: Tensor, on_step: OnStep = go_on) -> Tensor:
        """One product a probe and layer."""
        found = torch.zeros_like(block)
        into, given = self._split(found), self._split(block)
        for stratum, products in self.pushed(term, block, on_step):
            parts = self._split(products)
            for i in stratum:
                into[i].copy_(given[i] * parts[i])
        return found

    def pushed(
        self, term: Term, block: Tensor, on_step: OnStep = go_on
    ) -> Iterator[tuple[list[int], Tensor]]:
        """For each layer, the places of its tensors and the products of its probes alone."""
        given = self._split(block)
        for stratum in self._strata:
            alone = torch.zeros_like(block)
            parts = self._split(alone)
            for i in stratum:
                parts[i].copy_(given[i])
            yield stratum, term.apply(alone, on_step)

    def _split(self, rows: Tensor) -> tuple[Tensor, ...]:
        return torch.split(rows, self._sizes, dim=1)


def stratified_ratio(operator: Source, seed: int, on_step: OnStep = go_on) -> float:
    """Work of stratified probes over that of plain ones for the same error of the trace.

    The same products say both: a layer's probe gives its own quadratic form, and all of them
    add up to that of the whole probe. Measured on one batch.
    """
    design = Stratified(operator)
    term = next(iter(operator.batches()))
    block = Probes(operator, key(_REGIME, seed), "fresh", "rademacher").block(0, 0, REGIME_PROBES)
    sizes = list(operator.parameters.sizes)
    given = torch.split(block, sizes, dim=1)
    whole = torch.zeros(len(block), dtype=torch.float64, device=block.device)
    own = 0.0
    for stratum, products in design.pushed(term, block):
        pairs = zip(given, torch.split(products, sizes, dim=1), strict=True)
        forms = torch.stack([(v * image).double().sum(1) for v, image in pairs])
        whole += forms.sum(0)
        own += float(forms[stratum].sum(0).var())
        on_step()
    plain = float(whole.var())
    return design.products * own / plain if plain else float("inf")


def common_share(operator: Source, seed: int, on_step: OnStep = go_on) -> float:
    """How much of what makes probe noise two batches' matrices have in common; 1 of a single one.

    That is ⟨A, B⟩ / (‖A‖ ‖B‖), Frobenius' cosine, of which a basis from the mean of all batches can
    make use. Products with the same probes say it entry by entry, E[(Av)·(Bv)] = ⟨A, B⟩, and so far
    more surely than quadratic forms of them would, which there are only a few of.
    """
    terms = list(itertools.islice(operator.batches(), 2))
    if len(terms) == 1:
        return 1.0
    probes = Probes(operator, key(_REGIME, seed), "shared", "rademacher")
    block = probes.block(0, 0, REGIME_PROBES)
    products = []
    for term in terms:
        products.append(term.apply(block).double())
        on_step()
    one, other = products
    size = float(one.norm() * other.norm())
    return float((one * other).sum()) / size if size else 0.0


# -- Krylov-deflated probes: the large directions exactly, random vectors for what is left ---------
# With Q an orthonormal basis, diag A = diag(A QQᵀ) + diag(A (I − QQᵀ)): the first part is Σ_i (A
# q_i) ⊙ q_i, from products that finding Q has made already; probes of the second have only ‖A (I −
# QQᵀ)‖ for noise, which is small once Q holds the outliers (Chen & Hallman 2023, "Krylov-aware
# stochastic trace estimation", arXiv 2205.01736; Meyer et al. 2021, Hutch++, arXiv 2010.09649).
# Both are linear in A, so that each batch has its own share of them.


class Deflated(Design):
    """v ⊙ A (I − QQᵀ) v with Q from a few steps of Lanczos' method.

    Args:
        operator: the matrix.
        steps: of Lanczos' method, a product over all the data each.
        seed: of its start.
        stream: takes the entries that Q gives, where they are wanted.
        whole: whose layers the tables' columns are.
    """

    name = "deflated"

    def __init__(
        self,
        operator: Source,
        steps: int,
        seed: int,
        stream: Stream | None,
        whole: Parameters,
    ) -> None:
        self.operator, self.steps, self.seed, self.stream = operator, steps, seed, stream
        self._sums = LayerSums(operator.parameters, whole)
        self._offsets: dict[int, Array] = {}
        self._lanczos: Lanczos | None = None
        self._basis: Tensor | None = None

    def prepare(self) -> Iterator[None]:
        """Make the basis, once; what a step that was broken off has left is dropped."""
        if self._basis is not None:
            return
        lanczos, self._lanczos = self._lanczos, None
        if lanczos is None:
            self._offsets.clear()
            if self.stream is not None:
                self.stream.drop_round()
            lanczos = self._begun()
        while lanczos.count < min(self.steps, self.operator.parameters.size):
            self._lanczos = None
            lanczos.step()
            self._lanczos = lanczos
            self.operator.meter.keep()
            yield
        if self.stream is not None:
            self.stream.close_round(1)
        self._lanczos, self._basis = lanczos, lanczos.basis

    def state_dict(self) -> State:
        """The basis so far, and what is known from it."""
        offsets = list(self._offsets.values())
        return {
            "ready": self._basis is not None,
            "lanczos": None if self._lanczos is None else self._lanczos.state_dict(),
            "batches": list(self._offsets),
            "offsets": np.stack(offsets) if offsets else None,
            "stream": None if self.stream is None else self.stream.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Be as far as another of the same matrix was."""
        if state["lanczos"] is None:
            return
        self._lanczos = self._begun()
        self._lanczos.load_state_dict(state["lanczos"])
        self._offsets = dict(zip(state["batches"], np.array(state["offsets"]), strict=True))
        if self.stream is not None:
            self.stream.load_state_dict(state["stream"])
        if state["ready"]:
            self._basis = self._lanczos.basis

    def join(self, state: State) -> None:
        """Have its basis; another's must be the same.

        Raises:
            UsageError: it is not.
        """
        if not state["ready"]:
            return
        if self._lanczos is None:
            self.load_state_dict(state)
        elif not self._lanczos.is_as(state["lanczos"]):
            raise UsageError(
                "the parts were deflated by different directions",
                "machines that round differently",
                "--method hutchinson or stratified, or machines of one kind",
            )

    def _begun(self) -> Lanczos:
        return _lanczos(self.operator, self._product, self.steps, self.seed)

    def estimates(self, term: Term, block: Tensor, on_step: OnStep = go_on) -> Tensor:
        """Estimates outside the deflated directions, one product a probe."""
        assert self._basis is not None  # prepared
        basis = self._basis.to(block.dtype)
        return block * term.apply(block - (block @ basis.T) @ basis, on_step)

    def offset(self, batch: int) -> Array:
        """Traces of a batch's A QQᵀ, by layer and in all."""
        return self._offsets[batch]

    def _product(self, vector: Tensor) -> Tensor:
        """A q without weight decay; each batch's part of the diagonal is kept on the way."""
        row = vector[None].to(self.operator.dtype)
        offsets = dict[int, Array]()

        def product(term: Term) -> Iterator[Tensor]:
            found = term.apply(row).double()
            part = found * vector
            offsets[term.index] = self._sums(part)[0].cpu().numpy()
            if self.stream is not None:
                self.stream.add_exact(term.index, term.weight, part[0])
            yield found

        with self.operator.meter.pooled():
            mine = self.operator.batches(world.share(self.operator.indices))
            nothing = torch.zeros_like(vector[None], dtype=torch.float64)
            total = shared_sum(mine, nothing, product)[0]
            every = world.gathered(offsets)
        for batch, offset in (one for each in every for one in each.items()):
            self._offsets[batch] = self._offsets.get(batch, np.zeros(())) + offset
        return total


def _lanczos(
    operator: Source, product: Callable[[Tensor], Tensor], steps: int, seed: int
) -> Lanczos:
    """Whole on each rank, which takes it out of probes of its own batches."""
    return Lanczos(
        product,
        operator.parameters.size,
        seed=seed,
        dtype=operator.dtype,
        device=operator.device,
        reserve=steps,
    )


_BASIS_BATCHES = 2


def deflated_ratio(operator: Source, steps: int, seed: int, on_step: OnStep = go_on) -> float:
    """Work of deflated probes over that of plain ones for the same error, basis apart.

    That is ‖A (I − QQᵀ)‖² / ‖A‖² of a batch's matrix A, which products with probes estimate as
    their squared lengths, and Q a basis from two others: what they have in common with it is what
    all have. Where there are no more than two batches, Q is of all of them, as it will be.

    Args:
        operator: the matrix.
        steps: of Lanczos' method, as many as the basis will take.
        seed: of its start, and of the probes.
        on_step: called after each product with a batch; may end it.
    """
    *own, tested = itertools.islice(operator.batches(), _BASIS_BATCHES + 1)
    if len(own) < _BASIS_BATCHES:
        own.append(tested)

    def product(vector: Tensor) -> Tensor:
        total = torch.zeros_like(vector, dtype=torch.float64)
        for term in own:
            row = vector[None].to(operator.dtype)
            total += term.weight / len(own) * term.apply(row)[0].double()
            on_step()
        return total

    lanczos = _lanczos(operator, product, steps, seed)
    while lanczos.count < min(steps, operator.parameters.size):
        lanczos.step()
    probes = Probes(operator, key(_REGIME, seed), "fresh", "rademacher")
    block = probes.block(tested.index, 0, REGIME_PROBES)
    basis = lanczos.basis.to(block.dtype)
    left = block - (block @ basis.T) @ basis
    plain, rest = (float(tested.apply(v).double().square().sum()) for v in (block, left))
    on_step()
    return rest / plain if plain else 1.0
