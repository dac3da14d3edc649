"""All families that a watched pass suggests."""

from __future__ import annotations

from hesscli.engines.symmetry.candidates import Factors
from hesscli.engines.symmetry.families import Family
from hesscli.engines.symmetry.moving import Moving
from hesscli.engines.symmetry.streams import Streams
from hesscli.engines.symmetry.supposed import Supposed
from hesscli.engines.symmetry.watch import Watch
from hesscli.parameters import Parameters


def candidates(watch: Watch, parameters: Parameters) -> list[Family]:
    """Families to be tested, in the order in which a pass met them.

    Args:
        watch: the pass.
        parameters: that it was watched with, in this order in the flat vector.
    """
    factors = Factors(watch.seen, parameters)
    moving = Moving(watch.constants, parameters.size, factors.tell)
    every = [
        *factors.families(),
        *moving.families(),
        *Streams(factors, moving).families(),
        *Supposed(factors).families(),
    ]
    return [family for family in every if family.num_directions]
