"""What is done with a window's rows is counted: as torch is seen to do it, stage by stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hesscli
from hesscli import WindowOptions
from hesscli.diagnostics.run import Clock, started
from hesscli.diagnostics.saliency import _SETS
from hesscli.diagnostics.solve import RELATIVE
from hesscli.diagnostics.window import collect, inverse_work
from hesscli.engines.mfac import GradientWindow, Gram, StaticFisher, static
from hesscli.engines.mfac.pruning import compensation
from hesscli.engines.mfac.subsets import inverse_diagonals
from hesscli.engines.mfac.work import InverseWork, spanned
from hesscli.meter import Algebra
from hesscli.problem.objective import Objective

FACTOR, INVERSE, EIGEN = 1.5, 2.5, 12
"""Multiplications in float32 that are counted, beside k³, where a k×k matrix is factorised, its
factor inverted, and its eigenvalues found: fitted to time."""


class Seen(TorchDispatchMode):
    """Pairs that products multiply, float64 as two, and rows of small matrices by their size."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = 0.0
        self.factorised, self.inverted = Counter[int](), Counter[int]()

    @property
    def multiplied(self) -> float:
        """As it is counted."""
        matrices = ((FACTOR, self.factorised), (INVERSE, self.inverted))
        return self.pairs + sum(
            price * size**2 * count for price, found in matrices for size, count in found.items()
        )

    def __torch_dispatch__(self, op: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        wide = (
            2 if any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in args) else 1
        )
        if name in ("mm", "bmm", "mv", "dot"):
            self.pairs += wide * found.numel() * args[0].shape[-1]
        elif name in ("cholesky_solve", "_cholesky_solve_helper"):
            self.pairs += wide * args[0].numel() * args[1].shape[-1]
        elif name == "linalg_cholesky_ex":
            self.factorised[args[0].shape[-1]] += args[0].shape[:-1].numel()
        elif name in ("linalg_solve_triangular", "cholesky_inverse"):
            self.inverted[args[0].shape[-1]] += args[0].shape[:-1].numel()
        elif name == "_linalg_eigh":
            self.pairs += EIGEN * len(args[0]) ** 3
        return found


def window_of(rows: int, columns: int) -> GradientWindow:
    window = GradientWindow(rows, columns)
    window.extend(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)))
    return window


def dampings(fisher: StaticFisher) -> None:
    """As a sweep makes them."""
    x = torch.ones(1, fisher.window.size, dtype=torch.float64)
    for part in fisher.parts():
        for number in range(3):
            part.damped(10.0**-number).plain(x[:, part.columns])


def pruned(fisher: StaticFisher) -> None:
    ones = torch.ones(fisher.window.size)
    compensation(fisher, ones, ones.cumsum(0) % 3 == 0)


STAGES: dict[str, tuple[Callable[[StaticFisher], object], Callable[[InverseWork], Algebra]]] = {
    "a solve": (lambda f: f.ihvp(torch.ones(f.window.size)), lambda w: w.first_solved),
    "a product": (lambda f: f.multiply(torch.ones(f.window.size)), lambda w: w.multiplied),
    "a diagonal": (lambda f: f.diagonal(), lambda w: w.diagonal),
    "dampings": (dampings, lambda w: w.damped(3)),
    "what stays": (pruned, lambda w: w.compensated),
}


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("rows", "sizes"),
    [(128, [32] * 12), (256, [32] * 12), (256, [64] * 6), (64, [320, 64]), (300, [640])],
)
def test_a_stage_is_counted_as_it_is_done(
    rows: int, sizes: list[int], stage: str, kept: bool
) -> None:
    """Twice the rows or the columns in a block, and in one block: all that is large is there once.

    A tenth is what is small beside it: products of matrices with few vectors.
    """
    do, count = STAGES[stage]
    with patch.object(static, "_KEPT", static._KEPT if kept else 0), Seen() as seen:
        fisher = StaticFisher(window_of(rows, sum(sizes)), 1e-2, blocks=sizes)
        do(fisher)
    work = fisher.work
    assert work.kept == kept
    assert (work.built.multiplied > 0) == kept
    total = (work.built + count(work)).multiplied
    few = 2 * 2 * sum(sizes) * max(rows, *sizes)  # a vector's way through all rows or matrices
    assert total == pytest.approx(seen.multiplied, rel=0.1, abs=few)


def test_subsets_and_projections_are_counted_as_they_are_made() -> None:
    for rows, sizes in ((128, [32] * 12), (256, [64] * 6), (64, [400]), (300, [640])):
        with Seen() as seen:
            window = window_of(rows, sum(sizes))
            inverse_diagonals(window, slice(0, sum(sizes)), np.array(sizes), 1e-2, _SETS)
        work = InverseWork(np.array(sizes), rows, torch.float32, kept=False)
        assert work.subsets(_SETS).multiplied == pytest.approx(seen.multiplied, rel=0.1)
        with Seen() as seen:
            torch.linalg.eigh(Gram(window).matrix)
            window.project(torch.ones(6, sum(sizes)))
        assert spanned(rows, sum(sizes), torch.float32, 6).multiplied == seen.multiplied


@contextmanager
def counted() -> Iterator[list[Algebra]]:
    """All work with vectors and matrices that a run counts."""
    found, usual = list[Algebra](), Objective.algebra

    def told(problem: Objective, work: Algebra) -> float:
        found.append(work)
        return usual(problem, work)

    with patch.object(Objective, "algebra", told):
        yield found


def classifier() -> hesscli.Problem:
    """Of 64 examples, in two layers of many blocks each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32))
    pairs = torch.utils.data.TensorDataset(torch.randn(64, 16), torch.randint(32, (64,)))
    return hesscli.Problem(model, "cross_entropy", pairs, batch_size=64)


@pytest.mark.parametrize("blocks", ["auto", "layer", "whole", "40"])
@pytest.mark.parametrize("kept", [True, False])
def test_a_plan_counts_the_inverse_that_a_run_makes(blocks: str, kept: bool) -> None:
    problem, options = classifier(), WindowOptions(size=32, blocks=blocks, dtype="float64")
    with (
        patch.object(static, "_KEPT", static._KEPT if kept else 0),
        started(problem, "hessian", "auto", Clock(None, None)) as run,
        options.empty(problem) as window,
    ):
        stage = collect(run.operator, window, options, 0, lambda _: False, run.clock.watch)
        try:
            while True:
                next(stage)
        except StopIteration as end:
            made = end.value.fisher.work
        planned = inverse_work(problem, options, window.count)
    assert made.sizes.tolist() == planned.sizes.tolist()
    assert astuple(made)[1:] == astuple(planned)[1:]
    assert planned.kept == kept


@pytest.mark.parametrize("kept", [True, False])
def test_a_run_counts_each_stage_once(kept: bool) -> None:
    """No pass through the model factorises a matrix: of these all are the window's.

    Its inverse, those of other dampings, and that of each set of rows.
    """
    problem = classifier()
    options = WindowOptions(size=64, blocks="32")
    keeping = patch.object(static, "_KEPT", static._KEPT if kept else 0)
    with keeping, counted() as all_work, Seen() as seen:
        result = hesscli.sensitivity(problem, window=options, budget=None)
    size, rows, block = problem.parameters.size, 64, 32
    assert result.window.rows == rows
    anew = 1 if kept else 3  # a solve, a product and the sweep have matrices of their own
    assert seen.factorised[block] == size * (1 + len(RELATIVE) + len(_SETS))
    assert seen.inverted[block] == size * (len(RELATIVE) + len(_SETS))
    squares = 2 * rows * block * size * (anew + 1)  # and the sets' groups
    factors = FACTOR * block**2 * seen.factorised[block]
    inverses = INVERSE * block**2 * seen.inverted[block]
    gram = size * (rows**2 + 2 * len(RELATIVE) * rows) + EIGEN * rows**3
    taken = squares + factors + inverses + gram
    total = sum(work.multiplied for work in all_work)
    assert total == pytest.approx(taken, rel=0.1)
    assert result.cost.gradients > problem.algebra(Algebra(multiplied=taken))
