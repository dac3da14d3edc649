"""Probe vectors: keyed by (seed, batch, probe) and by each entry's place in the full vector."""

from __future__ import annotations

import torch
from torch import Tensor

from hesscli import streams
from hesscli.engines.hutchinson.statistics import Sharing
from hesscli.operators.base import Operator
from hesscli.parameters import Parameters
from hesscli.streams import Distribution

_PROBES = 0x9806E5
"""Separates probe streams from other uses of a seed."""


class Probes:
    """Rows of probes for an operator's parameters."""

    def __init__(
        self, operator: Operator, seed: int, sharing: Sharing, distribution: Distribution
    ) -> None:
        self.operator, self.seed, self.sharing = operator, seed, sharing
        self._sample = streams.SAMPLERS[distribution]
        self._runs = _contiguous_runs(operator.parameters)

    def block(self, batch: int, first: int, count: int) -> Tensor:
        """Probes ``first … first + count`` of a batch, ``(count, d)`` in the problem's dtype."""
        return torch.stack([self._vector(batch, probe) for probe in range(first, first + count)])

    def _vector(self, batch: int, probe: int) -> Tensor:
        owner = streams.SHARED if self.sharing == "shared" else batch
        stream = streams.key(_PROBES, self.seed, owner, probe)
        problem = self.operator.problem
        parts = [
            self._sample(stream, offset, size, dtype=problem.dtype, device=problem.device)
            for offset, size in self._runs
        ]
        return torch.cat(parts)


def _contiguous_runs(parameters: Parameters) -> list[tuple[int, int]]:
    """(offset, size) of stretches without a gap, so that a whole network is one call."""
    runs: list[tuple[int, int]] = []
    for parameter in parameters:
        if runs and sum(runs[-1]) == parameter.offset:
            runs[-1] = (runs[-1][0], runs[-1][1] + parameter.numel)
        else:
            runs.append((parameter.offset, parameter.numel))
    return runs
