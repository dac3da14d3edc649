"""Shrinkage of a noisy diagonal towards what is known of its shape.

James–Stein estimation, positive part, layer by layer: where noise is most of what was measured,
little of it is kept (Efron & Morris 1973, "Stein's estimation rule and its competitors", section
3). It lowers the mean squared error of the entries together and distorts their sum, so layer
traces are reported unshrunk; the error bars of the unshrunk entries are kept, which is
conservative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hesscli.engines.diagonal import Diagonal


def shrunk(layer: Diagonal, prior: Tensor) -> tuple[Tensor, float]:
    """A layer's entries, pulled towards the multiple of a prior that fits them best.

    Args:
        layer: its entries, with replicates of their error.
        prior: shape to be pulled towards ``(d,)``, scaled to fit.

    Returns:
        The entries, and the share of their distance from the prior that was kept.
    """
    values = layer.values
    size = float(prior @ prior)
    fitted = prior * (float(values @ prior) / size) if size else torch.zeros_like(values)
    distance = values - fitted
    spread = float(distance @ distance)
    energy = layer.squared_norm().bias
    kept = max(0.0, 1 - energy / spread) if spread else 1.0
    return fitted + kept * distance, kept
