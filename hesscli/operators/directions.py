"""Where operators are put to the test: along which vectors, at which weights, by which steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hesscli import streams
from hesscli.operators.products import STEP, flatten
from hesscli.parameters import Parameters
from hesscli.problem.forward import moved
from hesscli.problem.problem import Problem
from hesscli.problem.sampling import Sample

_ATTEMPTS = ((STEP / 2, 0.0), (STEP / 10, 1e-3), (STEP / 100, 1e-3))
"""Step along a unit direction, and relative shift of the weights: a kink that the weights sit
on, or that a step crosses, says nothing about the mode. No step is that of the mode of central
differences, which would be compared with itself."""

_LEAST = 4
"""Examples that are not taken apart any more: a wrong one among them shows."""

Measure = Callable[[Sample, Tensor, float], tuple[float, float]]
"""A relative error on some examples along a unit direction with a step, and what is allowed."""


class MismatchError(Exception):
    """Something that runs and is wrong."""


def vectors(problem: Problem, count: int) -> Tensor:
    """The first Rademacher rows ``(count, d)`` of a fixed stream."""
    rows = [
        streams.rademacher(
            streams.key(0x5EED, i),
            0,
            problem.parameters.size,
            dtype=problem.dtype,
            device=problem.device,
        )
        for i in range(count)
    ]
    return torch.stack(rows)


def within_bound(sample: Sample, measure: Measure, what: str) -> tuple[float, float]:
    """An error within what is allowed, at one of a few points and steps.

    The more examples, the more kinks lie within a step: where they are too many, halves of the
    sample must each be right by themselves.

    Args:
        sample: examples of a problem in float64.
        measure: what compares with a difference.
        what: what a mismatch is called.

    Raises:
        MismatchError: some examples have none; the layers are named.
    """
    errors = []
    for number, attempt in enumerate(_ATTEMPTS):
        with _at(sample.problem, number, attempt) as (direction, step):
            value, bound = measure(sample, direction, step)
        if value <= bound:
            return value, bound
        errors.append(value)
    if sample.count > _LEAST and (halves := sample.halves()):
        found = [within_bound(half, measure, what) for half in halves]
        return max(found, key=lambda pair: pair[0] / pair[1])

    def is_wrong(mask: Tensor) -> bool:
        part = mask * direction
        value, bound = measure(sample, part / part.norm(), step)
        return not value <= bound

    with _at(sample.problem, number, attempt) as (direction, step):
        layers = layers_where(sample.problem.parameters, is_wrong)
    raise MismatchError(f"{what} by {min(errors):.2%}{layers}")


@contextmanager
def _at(
    problem: Problem, number: int, attempt: tuple[float, float]
) -> Iterator[tuple[Tensor, float]]:
    """The weights of an attempt, and its unit direction and step."""
    step, shift = attempt
    direction = vectors(problem, number + 1)[-1] * moving(problem)
    with moved(problem.parameters.tensors, shift):
        yield direction / direction.norm(), step


def layers_where(parameters: Parameters, is_wrong: Callable[[Tensor], bool]) -> str:
    """Names the layers along whose own directions something is wrong, given as masks (d,)."""
    wrong = []
    for layer in parameters.layers:
        mask = [
            torch.full_like(p.tensor, p.layer == layer, requires_grad=False) for p in parameters
        ]
        if is_wrong(flatten(mask)):
            wrong.append(layer)
    more = ", ..." if len(wrong) > 5 else ""
    return f", in {', '.join(wrong[:5])}{more}" if wrong else ""


def moving(problem: Problem) -> Tensor:
    """Zero at padding rows of embeddings, which no gradient reaches though outputs use them."""
    rows = {
        module.weight: module.padding_idx
        for module in problem.model.modules()
        if isinstance(module, nn.Embedding)
    }
    masks = [torch.ones_like(t, requires_grad=False) for t in problem.parameters.tensors]
    for tensor, mask in zip(problem.parameters.tensors, masks, strict=True):
        if (row := rows.get(tensor)) is not None:
            mask[row] = 0
    return flatten(masks)
