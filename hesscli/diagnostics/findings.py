"""A diagonal in all its readings: entries, layers, blocks, and how far they are off."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hesscli.diagnostics.block_variance import block_report
from hesscli.diagnostics.estimation import Outcome
from hesscli.diagnostics.reporting import layers
from hesscli.diagnostics.summary import Summary, histogram_edges, summarise, total_histogram
from hesscli.engines.diagonal import Diagonal, shrunk
from hesscli.engines.hutchinson.blocks import BlockRule
from hesscli.engines.hutchinson.designs import Plain
from hesscli.engines.hutchinson.engine import Hutchinson
from hesscli.engines.stopping import Tolerance
from hesscli.problem.problem import Problem
from hesscli.results import BlockReport, DiagonalReport, LayerDiagonal, ParameterReport


@dataclass(frozen=True)
class Faced:
    """The noise that AdaHessian's own probes would have, beside a diagonal without any."""

    engine: Hutchinson
    noise: Tensor


@dataclass(frozen=True)
class Found:
    """A diagonal in all its readings.

    ``unbiased`` has the estimator's own values, for what is linear or quadratic in them; in
    ``best`` what was probed is shrunk towards the shape of what is known, layer by layer.
    """

    problem: Problem
    outcome: Outcome
    faced: Faced | None
    rule: BlockRule
    confidence: float

    @cached_property
    def unbiased(self) -> Diagonal:
        """The estimator's own entries."""
        return self.outcome.estimator.diagonal(self.problem.sampling_fraction or 1.0)

    @property
    def best(self) -> Diagonal:
        """Entries shrunk where that lowers their error, with bars that count it."""
        return self._shrunk[0]

    @cached_property
    def _shrunk(self) -> tuple[Diagonal, tuple[float, ...] | None]:
        """The entries, and what was kept of each layer's noisy part."""
        found, estimator = self.unbiased, self.outcome.estimator
        probed = estimator.probed_diagonal(self.problem.sampling_fraction or 1.0)
        known = estimator.known_diagonal()
        if probed is None or probed.noise is None or known is None:
            return found, None
        moved, kept = torch.zeros_like(found.values), []
        for _, place in self._slices():
            part, share = shrunk(probed.part(place), known[place])
            if part.moved is not None:
                moved[place] = part.moved
            kept.append(share)
        return replace(found, values=found.values + moved, moved=moved), tuple(kept)

    def report(self) -> DiagonalReport:
        """Of the whole diagonal."""
        found = self.unbiased
        whole = total_histogram([s.histogram for s in self._summaries])
        entries = sum(whole.counts)
        negative = float((self.best.values < 0).sum())
        return DiagonalReport(
            norm=found.squared_norm().estimate ** 0.5,
            relative_error=_finite(found.relative_error()),
            relative_error_bound=_finite(found.relative_error_bound(1 - self.outcome.reading.miss)),
            confidence=self.confidence,
            negative_fraction=negative / entries,
            histogram=whole,
            shrinkage=self._shrunk[1],
        )

    def layers(self, tolerance: Tolerance) -> Iterator[LayerDiagonal]:
        """Each layer's trace, entries and blocks."""
        traces = layers(self.problem, self.outcome, tolerance)
        pieces = zip(traces, self._slices(), self._summaries, strict=True)
        for trace, (layer, place), summary in pieces:
            facts = {field.name: getattr(summary, field.name) for field in fields(summary)}
            facts["mean"] = trace.estimate / trace.num_parameters
            shared = {field.name: getattr(trace, field.name) for field in fields(trace)}
            yield LayerDiagonal(**shared, **facts, block=self._block(layer, place))

    @cached_property
    def _summaries(self) -> list[Summary]:
        edges = histogram_edges(self.best.values)
        return [
            summarise(self.best.part(place), self._reports(layer), edges)
            for layer, place in self._slices()
        ]

    def _block(self, layer: str, place: slice) -> BlockReport:
        noise = None if self.faced is None else self.faced.noise[:, place]
        plain = self._plain_probes()
        count = None if plain is None else plain.count * len(plain.indices)
        return block_report(
            self.unbiased.part(place),
            [p.shape for p in self._reports(layer)],
            self.rule,
            confidence=self.confidence,
            probe_noise=noise,
            num_probes=count,
        )

    def _plain_probes(self) -> Hutchinson | None:
        """Probes of the whole matrix, one product each, as AdaHessian draws them."""
        if self.faced is not None:
            return self.faced.engine
        probes = self.outcome.estimator.probes
        if probes is None or self.outcome.estimator.gauss_newton is not None:
            return None
        return probes if isinstance(probes.design, Plain) else None

    def _slices(self) -> Iterator[tuple[str, slice]]:
        """Layers and their places in the vector, where each layer's tensors follow each other."""
        start = 0
        for layer in self.problem.parameters.layers:
            stop = start + sum(p.numel for p in self.problem.parameters.in_layer(layer))
            yield layer, slice(start, stop)
            start = stop

    def _reports(self, layer: str) -> list[ParameterReport]:
        return [
            ParameterReport(name=p.name, shape=tuple(p.tensor.shape))
            for p in self.problem.parameters.in_layer(layer)
        ]

    def by_name(self, vector: Tensor) -> dict[str, Any]:
        """Arrays in the shapes of the parameters, float64 only where that says more."""
        kind = torch.float64 if self.problem.dtype == torch.float64 else torch.float32
        parts = self.problem.parameters.split(vector.to(kind))
        names = self.problem.parameters.names
        return {name: part.numpy() for name, part in zip(names, parts, strict=True)}


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None
