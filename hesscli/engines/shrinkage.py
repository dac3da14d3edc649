"""Shrinkage of a noisy diagonal towards what is known of its shape, with bars that know of it.

James–Stein estimation, positive part, layer by layer: where noise is most of what was measured,
little of it is kept (Efron & Morris 1973, "Stein's estimation rule and its competitors", section
3). No entry moves by more than a few of its own standard errors (their "limited translation" of
1972), so that one without noise stays where it is; and each layer keeps its sum.

The bar of an entry that was moved by Δ is the root of s² + Δ². At whatever distance the truth
lies from the shape, and however much of it is kept, ±1.96 of that covers 95% and more: it is
conservative where much was moved, and the plain bar where little was.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from hesscli.engines.diagonal import Diagonal

_FURTHEST = 5.0
"""Standard errors that an entry may be moved by."""


def shrunk(layer: Diagonal, prior: Tensor) -> tuple[Diagonal, float]:
    """A layer's entries, pulled towards the multiple of a prior that has their sum.

    Args:
        layer: its entries, with replicates of their error.
        prior: shape to be pulled towards ``(d,)``, scaled to fit; its signs do not count.

    Returns:
        The entries with how far they were moved, and the share of their distance from the prior
        that was to be kept: 1 where there is no noise, none that is known, or no shape where it is.
    """
    if not layer.freedom:
        return layer, 1.0
    values, error = layer.values, layer.stderr()
    noisy = (error > 0).double()
    shape = prior.abs() * noisy
    size = float(shape.sum())
    if not size:
        return layer, 1.0
    distance = (values - shape * (float(values @ noisy) / size)) * noisy
    spread = float(distance @ distance)
    kept = max(0.0, 1 - float(error @ error) / spread) if spread else 1.0
    furthest = _FURTHEST * error
    moved = ((kept - 1) * distance).clamp(-furthest, furthest)
    moved -= error * (moved.sum() / error.sum())  # what the limit has taken from the sum
    return replace(layer, values=values + moved, moved=moved), kept
