"""From a table to intervals: estimates, variances and rounding, layer by layer and in all."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hesscli.engines.estimator import Estimator
from hesscli.engines.hutchinson.statistics import Array, MeanSquare, Table


@dataclass(frozen=True)
class Rounding:
    """Error of a quadratic form relative to its size, root mean square.

    Where it is not ``known``, it is what is allowed for: nobody could measure it.
    """

    relative: float
    known: bool = True


@dataclass(frozen=True)
class Reading:
    """Numbers with half-widths, each ``(L + 1,)``: the layers, and the total last.

    ``variance`` is about all available examples; ``rounding`` is part of ``half_width``.
    ``fraction`` is the share of the loader's examples that they rest on.
    """

    table: Table
    estimate: Array
    variance: MeanSquare
    half_width: Array
    rounding: Array
    fraction: float
    miss: float

    def interval(self, column: int = -1) -> tuple[float, float]:
        """Of a layer, or of the total; without ends where nothing is known."""
        value, width = float(self.estimate[column]), float(self.half_width[column])
        return value - width, value + width

    def population_interval(self) -> tuple[float, float] | None:
        """Of the total, for unseen examples of the same kind."""
        if self.table.between is None:
            return None
        width = self.table.half_width(0.0, self.miss)[-1] + self.rounding[-1]
        return float(self.estimate[-1] - width), float(self.estimate[-1] + width)

    def data_half_width(self) -> float:
        """The part of the total's half-width that no number of probes can take away."""
        width = self.table.data_half_width(self.fraction, self.miss)
        return float(width[-1] + self.rounding[-1])

    @property
    def random_share(self) -> float:
        """Share of the total's variance that more probes and drawn columns would shrink."""
        variance = float(self.variance.value[-1])
        return float(self.table.within.value[-1]) / variance if variance else 0.0


def read(estimator: Estimator, miss: float, relative: float) -> Reading | None:
    """What an estimator's table says with intervals that miss with probability ``miss``.

    Args:
        estimator: rounds so far; a first one that was stopped counts as a sample of the batches.
        miss: probability.
        relative: error of a quadratic form relative to its size, root mean square.

    Returns:
        None before there is anything to read.
    """
    table = estimator.table()
    if table is None:
        return None
    # Where the loader's size is not known, intervals are about the kept examples.
    fraction = (estimator.problem.sampling_fraction or 1.0) * estimator.coverage()
    variance = table.variance(fraction)
    # A layer whose forms cancel is rounded as what they are made of, which is the whole's.
    unit = torch.finfo(estimator.problem.dtype).eps
    rounding = relative * table.root_mean_square + unit * table.root_mean_square[-1]
    return Reading(
        table=table,
        estimate=table.estimate + estimator.decay_traces(),
        variance=variance,
        half_width=table.half_width(fraction, miss) + rounding,
        rounding=rounding,
        fraction=fraction,
        miss=miss,
    )
