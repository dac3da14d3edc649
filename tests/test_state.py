"""Whatever is saved of an engine at any step, another goes on from to the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hesscli import Hessian
from hesscli.diagnostics.choice import Draw, choose
from hesscli.engines.conjugate_gradients import ConjugateGradients
from hesscli.engines.entries import Entries
from hesscli.engines.estimator import Estimator
from hesscli.engines.hutchinson.table import Sharing
from hesscli.engines.lanczos import Lanczos
from hesscli.engines.mfac import GradientWindow
from hesscli.engines.unit_vectors import UnitVectors
from hesscli.meter import Meter
from hesscli.problem.freezing import FrozenData
from hesscli.problem.problem import Problem
from hesscli.state import Rows, State

BATCHES = (4, 3, 5)
OUTPUTS = 40
"""More than there are backward passes for, unless they are asked for: columns are drawn."""


@cache
def problem(outputs: int = OUTPUTS) -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs))
    pairs = tuple((torch.randn(n, 3), torch.randn(n, outputs)) for n in BATCHES)
    return Problem(model, "mse", FrozenData(pairs, BATCHES, 2 * sum(BATCHES), True, "by hand"))


def copied(state: Any) -> Any:
    """What another process would have of it."""
    match state:
        case dict():
            return {name: copied(value) for name, value in state.items()}
        case list() | tuple():
            return [copied(value) for value in state]
        case Rows():
            return Rows(*(part.clone() for part in state.since(0)))
        case Tensor():
            return state.clone()
        case np.ndarray():
            return state.copy()
    return state


def flat(state: Any) -> Iterator[Any]:
    """Everything in it, arrays as bytes."""
    match state:
        case dict():
            yield list(state)
            for value in state.values():
                yield from flat(value)
        case list() | tuple():
            yield len(state)
            for value in state:
                yield from flat(value)
        case Rows():
            yield torch.cat(list(state.since(0))).view(torch.uint8).numpy().tobytes()
        case Tensor():
            yield state.numpy().tobytes()
        case _:
            yield state.tobytes() if isinstance(state, np.ndarray) else state


@dataclass
class Work:
    """Something that goes on in steps."""

    of: Any
    steps: Iterator[object]
    meter: Meter


def estimator(
    method: str, outputs: int = OUTPUTS, *, entries: bool, sharing: Sharing = "fresh"
) -> Work:
    given = problem(outputs)
    operator = Hessian(given)
    kept = Entries(given.parameters, given.device) if entries else None
    found = choose(operator, method, Draw(3, sharing=sharing, entries=kept)).estimator

    def steps() -> Iterator[None]:
        for count in (2, 5):
            yield from found.extend(count)

    operator.meter.keep()
    return Work(found, steps(), operator.meter)


def units() -> Work:
    given = problem(2)
    operator = Hessian(given)
    entries = Entries(given.parameters, given.device)
    stream = entries.stream(given.parameters, exact=True)
    found = Estimator(operator, gauss_newton=UnitVectors(operator, stream), entries=entries)
    return Work(found, found.extend(1), operator.meter)


def matrix(size: int) -> Tensor:
    torch.manual_seed(1)
    factor = torch.randn(size, 2 * size, dtype=torch.float64)
    return factor @ factor.T / size


def lanczos(steps: int, *, rank: int | None = None) -> Work:
    size = 9
    A = matrix(size)
    if rank is not None:
        A[rank:], A[:, rank:] = 0, 0
    found = Lanczos(lambda v: A @ v, size, seed=2, reserve=2)

    def run() -> Iterator[None]:
        while found.count < steps:
            found.step()
            yield

    return Work(found, run(), Meter())


def conjugate_gradients() -> Work:
    A = matrix(12)
    found = ConjugateGradients(lambda v: A.float() @ v.float(), A[0], dtype=torch.float32)

    def run() -> Iterator[None]:
        while not found.done:
            found.step()
            yield

    return Work(found, run(), Meter())


def window() -> Work:
    rows = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    found = GradientWindow(6, 5, dtype=torch.bfloat16)

    def run() -> Iterator[None]:
        while found.count < 6:
            found.extend(rows[found.count : found.count + 2])
            yield

    return Work(found, run(), Meter())


WORK: dict[str, Callable[[], Work]] = {
    "plain probes": lambda: estimator("hutchinson", entries=False),
    "probes with entries": lambda: estimator("hutchinson", entries=True),
    "shared probes": lambda: estimator("hutchinson", entries=True, sharing="shared"),
    "probes by layer": lambda: estimator("stratified", entries=True),
    "deflated probes": lambda: estimator("deflated", entries=True),
    "columns and probes": lambda: estimator("split", entries=True),
    "columns and probes of traces": lambda: estimator("split", entries=False),
    "all columns": lambda: estimator("split", 2, entries=True),
    "unit vectors": units,
    "Lanczos": lambda: lanczos(6),
    "Lanczos to the end": lambda: lanczos(9),
    "Lanczos with a breakdown": lambda: lanczos(9, rank=4),
    "conjugate gradients": conjugate_gradients,
    "a window": window,
}


def ended(work: Work) -> tuple[list[Any], tuple[float, float]]:
    for _ in work.steps:
        pass
    return list(flat(work.of.state_dict())), (work.meter.products, work.meter.gradients)


def saved(work: Work) -> Iterator[tuple[State, tuple[float, float]]]:
    """After each step."""
    for _ in work.steps:
        yield copied(work.of.state_dict()), work.meter.kept


@pytest.mark.parametrize("name", WORK)
def test_from_any_step_it_goes_on_to_the_same_bits(name: str) -> None:
    expected = ended(WORK[name]())
    states = list(saved(WORK[name]()))
    assert len(states) > 2
    for state, kept in states:
        again = WORK[name]()
        again.meter.go_back(kept)
        again.of.load_state_dict(state)
        assert ended(again) == expected


@pytest.mark.parametrize("name", WORK)
def test_a_state_that_was_loaded_is_the_one_that_was_saved(name: str) -> None:
    for state, _ in saved(WORK[name]()):
        again = WORK[name]()
        again.of.load_state_dict(state)
        assert list(flat(again.of.state_dict())) == list(flat(state))


@pytest.mark.parametrize("name", [name for name in WORK if name.startswith("Lanczos")])
def test_rows_that_were_there_stay_as_they_were(name: str) -> None:
    seen = torch.empty(0, 9, dtype=torch.float64)
    for state, _ in saved(WORK[name]()):
        rows = torch.cat(list(state["rows"].since(0)))
        assert torch.equal(rows[: len(seen)], seen)
        seen = rows


def test_rows_are_read_from_where_one_has_got_to() -> None:
    whole = torch.arange(12.0).view(6, 2)
    for cuts in ([], [2], [0, 3], [1, 5], [6]):
        parts = torch.tensor_split(whole, cuts)
        rows = Rows(*parts)
        assert len(rows) == 6
        for first in range(7):
            left = [block for block in rows.since(first) if len(block)]
            assert torch.equal(torch.cat([whole[:first], *left]), whole)
        copy = torch.full((8, 2), math.nan)
        rows.copy_to(copy)
        assert torch.equal(copy[:6], whole)
