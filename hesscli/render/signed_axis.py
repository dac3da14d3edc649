"""An axis of sizes: logarithmic on either side of zero, as far as there is anything."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from hesscli.render import canvas

_AIR = 1.3
_LABEL = 0.55  # inches from one label's middle to the next


def scale_by_size(axes: Axes, edges: tuple[float, ...]) -> None:
    """Scale the x axis for some bins: plainly logarithmic where all are positive.

    Else it is linear in the bin around zero, which gets a small share of the axis.
    """
    low, high = (edges[0], edges[-1]) if edges else (0.0, 0.0)
    if low > 0:
        axes.set_xscale("log")
        axes.set_xlim(low / _AIR, high * _AIR)
        return
    threshold = min((abs(edge) for edge in edges if edge), default=1.0)
    left, right = (max(end, threshold) for end in (-low, high))
    decades = math.log10(left / threshold) + math.log10(right / threshold)
    axes.set_xscale("symlog", linthresh=threshold, linscale=max(0.035 * decades, 0.03))
    axes.set_xlim(-left * _AIR, right * _AIR)


def label_sizes(axes: Axes, edges: tuple[float, ...], width: float) -> None:
    """Label zero and round sizes as they have room on an axis of so many inches."""
    low, high = axes.get_xlim()
    least = min((abs(edge) for edge in edges if edge), default=1.0)
    last, first = (math.floor(math.log10(size)) for size in (max(-low, high), least))
    powers = [10.0**power for power in range(last, first - 1, -1)]
    digits = (1, 2, 5) if len(powers) < 4 else (1,)
    sizes = [digit * power for digit in digits for power in powers]
    signed = [sign * size for size in sizes if size >= 0.999 * least for sign in (1, -1)]
    kept = canvas.apart(axes, [0.0, *signed], _LABEL / width)
    axes.set_xticks(kept, [f"{tick:g}" for tick in kept])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", length=0)
    axes.spines["bottom"].set_visible(False)
