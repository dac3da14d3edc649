"""Engines on a graph of somebody's own, as an optimizer's step has one: no Problem is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hesscli.engines.entries import Entries
from hesscli.engines.estimator import Estimator, read
from hesscli.engines.hutchinson.designs import Deflated, Stratified, common_share
from hesscli.engines.hutchinson.engine import Hutchinson
from hesscli.engines.per_example import PerExample
from hesscli.meter import Meter, OnStep, go_on
from hesscli.operators.products import hessian_double_backward
from hesscli.parameters import Parameters

N, K = 9, 2
EPS = 2.0**-52


class Live:
    """A step's loss, one batch of weight mass 1: the source and its only term."""

    decay, block_size = 0.0, 4
    dtype, device = torch.float64, torch.device("cpu")
    masses, counts, indices = (1.0,), (N,), (0,)
    sampling_fraction, independent = 1.0, True
    index, weight = 0, 1.0

    def __init__(self, model: nn.Module, loss: Tensor) -> None:
        self.parameters, self.meter = Parameters.of(model), Meter()
        self._products = hessian_double_backward(lambda _: loss, self.parameters.tensors)

    def apply(self, block: Tensor, _on_step: OnStep = go_on) -> Tensor:
        return self._products(block)

    def batches(self, _among: object = None) -> Iterator[Live]:
        yield self

    def in_full(self) -> Live:
        return self

    def bias(self, _on_step: OnStep = go_on) -> None:
        return None


class Step:
    """A small network, its outputs on a batch and their mean square, all live."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, K)
        self.model = nn.Sequential(*layers).double()
        self.outputs = self.model(torch.randn(N, 3, dtype=torch.float64))
        self.loss = self.outputs.square().mean()

    @property
    def jacobian(self) -> Tensor:
        """(N·K, d), one backward pass an output."""
        rows = [
            torch.autograd.grad(each, list(self.model.parameters()), retain_graph=True)
            for each in self.outputs.flatten()
        ]
        return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])

    @property
    def hessian(self) -> Tensor:
        """(d, d), dense."""
        tensors = list(self.model.parameters())
        slopes = torch.autograd.grad(self.loss, tensors, create_graph=True)
        flat = torch.cat([part.flatten() for part in slopes])
        rows = [torch.autograd.grad(entry, tensors, retain_graph=True) for entry in flat]
        return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


@pytest.fixture
def step() -> Step:
    return Step()


@pytest.mark.parametrize("design", ["hutchinson", "stratified", "deflated"])
def test_trace_and_diagonal_of_a_live_loss(step: Step, design: str) -> None:
    live, dense = Live(step.model, step.loss), step.hessian
    entries = Entries(live.parameters, live.device)
    stream = entries.stream(live.parameters, exact=False)
    designs = {
        "hutchinson": lambda: None,
        "stratified": lambda: Stratified(live),
        "deflated": lambda: Deflated(
            live, 4, 0, entries.stream(live.parameters, exact=True), live.parameters
        ),
    }
    engine = Hutchinson(live, seed=0, design=designs[design](), stream=stream)
    estimator = Estimator(live, probes=engine, entries=entries)
    for _ in estimator.extend(64):
        pass
    reading = read(estimator, 1e-6, EPS)
    assert reading is not None
    low, high = reading.interval()
    assert low <= float(dense.trace()) <= high
    assert high - low < float(dense.trace())
    assert float(reading.estimate[:-1].sum()) == pytest.approx(float(reading.estimate[-1]))
    found = estimator.diagonal(1.0)
    assert found.noise is not None
    off = (found.values - dense.diagonal()) / found.noise.double().square().mean(0).sqrt()
    assert float(off.square().mean().sqrt()) < 2  # of bars of 16 replicates each
    if design == "hutchinson":
        blocks = [engine.probes.block(0, first, 1) for first in range(64)]
        forms = [float(v @ dense @ v.T) for v in blocks]
        size = float(dense.abs().sum()) * len(dense) * EPS
        np.testing.assert_allclose(engine.cells[0][:, -1], forms, rtol=0, atol=size)
        assert live.meter.gradients == 0  # whoever makes the products counts them


def test_one_batch_has_all_of_its_noise_in_common(step: Step) -> None:
    assert common_share(Live(step.model, step.loss), 0) == 1.0


class LivePass(Live):
    """The same step, whose examples can be told apart: of the mean of K squares, A = 2/K I."""

    def __init__(self, step: Step) -> None:
        super().__init__(step.model, step.loss)
        self.step, self.num_columns, self.most = step, K, 100
        self.columns = self

    def passes(self) -> LivePass:
        return self

    def joint(self, among: Sequence[int]) -> list[tuple[int, ...]]:
        return [(index,) for index in among]

    def of(self, batches: Sequence[int]) -> Iterator[tuple[int, LivePass]]:
        yield 0, self

    def column(self, index: int) -> tuple[float, Tensor]:
        column = torch.zeros(N, K, dtype=torch.float64)
        column[:, index] = (2 / (N * K)) ** 0.5  # the batch weighs 1, not N
        return 1.0, column

    def pull(self, columns: Sequence[Tensor]) -> Tensor:
        """Rows J_iᵀ s_i of all examples and columns, ``(N, C, d)``."""
        tensors = list(self.step.model.parameters())

        def row(output: Tensor, weight: Tensor) -> Tensor:
            parts = torch.autograd.grad(output @ weight, tensors, retain_graph=True)
            return torch.cat([part.flatten() for part in parts])

        pairs = zip(self.step.outputs, torch.stack(list(columns), 1), strict=True)
        return torch.stack([torch.stack([row(o, s) for s in each]) for o, each in pairs])

    def norms(self, pulled: Tensor) -> Tensor:
        parts = torch.split(pulled.square().sum(1), list(self.parameters.sizes), 1)
        return torch.stack([part.sum(1) for part in parts], 1)

    def squares(self, pulled: Tensor) -> Tensor:
        return pulled.square().sum((0, 1))


def test_the_gauss_newton_diagonal_of_a_live_loss(step: Step) -> None:
    live = LivePass(step)
    entries = Entries(live.parameters, live.device)
    stream = entries.stream(live.parameters, exact=True)
    engine = PerExample(live, stream=stream)
    estimator = Estimator(live, gauss_newton=engine, entries=entries)
    for _ in estimator.extend(1):
        pass
    assert estimator.exact
    dense = 2 / (N * K) * step.jacobian.T @ step.jacobian
    rounding = N * K * EPS * float(dense.abs().max())
    torch.testing.assert_close(
        estimator.diagonal(1.0).values, dense.diagonal(), rtol=0, atol=rounding
    )
    traces = estimator.gauss_newton_traces()
    assert traces is not None
    assert float(traces[-1]) == pytest.approx(float(dense.trace()), rel=N * K * EPS * len(dense))
