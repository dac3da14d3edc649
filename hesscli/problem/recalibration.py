"""Batch norm whose running statistics are taken anew, of weights that are not what they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hesscli.meter import FORWARD, Meter, OnStep, go_on
from hesscli.problem.problem import Problem

Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def norms_of(model: nn.Module) -> list[Norm]:
    """Batch norms that use running statistics."""
    return [
        module
        for module in model.modules()
        if isinstance(module, Norm) and module.running_mean is not None and not module.training
    ]


@contextmanager
def recalibrated(problem: Problem, meter: Meter, on_step: OnStep = go_on) -> Iterator[None]:
    """Meanwhile let running statistics be the means over all kept batches, in one pass.

    Each layer sees what the layers before it give with the statistics of the batch, as in training
    with ``momentum=None``. A batch counts by its examples; one of a single example is left out.

    Args:
        problem: whose model has batch norms that use running statistics.
        meter: counts the pass.
        on_step: called after each batch; may end it.
    """
    norms = norms_of(problem.model)
    seen = {id(norm): _Seen() for norm in norms}
    with _in_training(norms), torch.no_grad(), ExitStack() as hooks:
        for norm in norms:
            hooks.callback(norm.register_forward_pre_hook(seen[id(norm)]).remove)
        for group in problem.joint():
            batch = problem.batch(*group)
            if batch.count > 1:
                for one in seen.values():
                    one.weight = float(batch.count)
                problem.evaluate(batch.data)
            meter.add(FORWARD, problem.share_of(batch.count))
            on_step()
    kept = [(norm.running_mean, norm.running_var) for norm in norms]
    try:
        for norm in norms:
            if (found := seen[id(norm)]).total:
                norm.running_mean = found.mean.to(norm.running_mean)
                norm.running_var = found.variance.to(norm.running_var)
        yield
    finally:
        for norm, (mean, variance) in zip(norms, kept, strict=True):
            norm.running_mean, norm.running_var = mean, variance


class _Seen:
    """Means of what a batch norm was given, each batch by its weight."""

    def __init__(self) -> None:
        self.weight, self.total = 0.0, 0.0
        self._sums: Tensor | None = None

    def __call__(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        values = inputs[0].detach().double().transpose(0, 1).flatten(1)
        both = torch.stack([values.mean(1), values.var(1)])
        self._sums = self.weight * both if self._sums is None else self._sums + self.weight * both
        self.total += self.weight

    @property
    def mean(self) -> Tensor:
        assert self._sums is not None
        return self._sums[0] / self.total

    @property
    def variance(self) -> Tensor:
        assert self._sums is not None
        return self._sums[1] / self.total


@contextmanager
def _in_training(norms: list[Norm]) -> Iterator[None]:
    try:
        for norm in norms:
            norm.training = True
        yield
    finally:
        for norm in norms:
            norm.training = False
