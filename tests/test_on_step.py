"""Long work that is no generator is ended by ``on_step``, and leaves everything as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hesscli import Hessian
from hesscli.engines.hutchinson.designs import common_share, deflated_ratio, stratified_ratio
from hesscli.engines.mfac import GradientWindow, StaticFisher
from hesscli.meter import OnStep
from hesscli.operators.exactness import exact_parameters
from hesscli.operators.preflight import preflight
from hesscli.problem.freezing import FrozenData
from hesscli.problem.problem import Problem

SIZES = (16, 8)


def problem() -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    pairs = tuple((torch.randn(n, 3), torch.randn(n, 1)) for n in SIZES)
    return Problem(model, "mse", FrozenData(pairs, SIZES, sum(SIZES), True, "by hand"))


def window(columns: int) -> GradientWindow:
    found = GradientWindow(6, columns)
    found.extend(torch.randn(6, columns, generator=torch.Generator().manual_seed(0)))
    return found


Work = Callable[[Problem, OnStep], object]
WORK: dict[str, tuple[Work, int]] = {
    "preflight": (lambda p, look: preflight(p, Hessian, on_step=look), 8),
    "central differences": (
        lambda p, look: preflight(p, Hessian, "finite-difference", on_step=look), 6
    ),
    "exactness": (lambda p, look: exact_parameters(p, on_step=look), 2),
    "probes by layer": (lambda p, look: stratified_ratio(Hessian(p), 0, look), 2),
    "deflation": (lambda p, look: common_share(Hessian(p), 0, look), 2),
    "a plan of it": (lambda p, look: deflated_ratio(Hessian(p), 4, 0, look), 5),
    "a whole inverse": (lambda _, look: StaticFisher(window(10_000), 0.1, on_step=look), 4),
    "blocks above the rows": (
        lambda _, look: StaticFisher(window(40), 0.1, blocks=[20, 20], on_step=look), 4
    ),
    "blocks below": (
        lambda _, look: StaticFisher(window(20_000), 0.1, blocks=[4] * 5_000, on_step=look), 5
    ),
}  # fmt: skip
"""Each with how often it looks, at least."""


class Look:
    """Ctrl-C at a look."""

    def __init__(self, at: int) -> None:
        self.at, self.looks = at, 0

    def __call__(self) -> None:
        self.looks += 1
        if self.looks == self.at:
            raise KeyboardInterrupt


def standing(of: Problem) -> tuple[torch.dtype, list[Tensor]]:
    return of.dtype, [tensor.detach().clone() for tensor in of.parameters.tensors]


@pytest.mark.parametrize("name", WORK)
def test_it_ends_at_any_step_and_puts_everything_back(name: str) -> None:
    work, least = WORK[name]
    never = Look(0)
    work(problem(), never)
    assert never.looks >= least
    for at in range(1, never.looks + 1):
        given = problem()
        dtype, weights = standing(given)
        with pytest.raises(KeyboardInterrupt):
            work(given, Look(at))
        assert given.dtype == dtype
        assert all(map(torch.equal, standing(given)[1], weights))
