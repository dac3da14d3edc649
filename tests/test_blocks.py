"""AdaHessian's blocks against loops over entries."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from hesscli.engines.hutchinson.blocks import Blocks
from hesscli.errors import UsageError
from hesscli.vocabulary import BlockRule

SHAPES = [(), (1,), (5,), (4, 6), (6, 70), (8, 64), (3, 32), (4, 3, 5), (4, 3, 3, 3), (2, 3, 1, 1)]
SHAPES += [(2, 3, 2, 2, 2), (0, 3), (3, 0), (2, 0, 3)]
RULES = ["auto", "image", "row", "kernel", "channel", "head:2", "1", "5", "32", "1000"]


def block_of(index: tuple[int, ...], shape: tuple[int, ...], rule: str) -> tuple[object, ...]:
    """What the block of an entry is called, from the table of rules."""
    if len(shape) < 2:
        return index
    if rule == "image" and len(shape) == 2:
        return index
    along = sum(i * math.prod(shape[k + 1 :]) for k, i in enumerate(index) if k > 0)
    if rule == "row":
        return (index[0],)
    if rule == "channel":
        return (index[1],)
    if rule.startswith("head") and len(shape) == 2 and shape[0] % int(rule[5:]) == 0:
        return (index[0] * int(rule[5:]) // shape[0],)
    if rule.isdecimal():
        return index[0], along // int(rule)
    return index[:2] if len(shape) > 2 else (index[0], along // 32)


def naive(tensor: torch.Tensor, rule: str) -> tuple[dict[tuple[object, ...], list[float]], list]:
    members: dict[tuple[object, ...], list[float]] = {}
    indices = list(itertools.product(*map(range, tensor.shape)))
    for index in indices:
        block = block_of(index, tuple(tensor.shape), rule)
        members.setdefault(block, []).append(float(tensor[index]))
    return members, [block_of(index, tuple(tensor.shape), rule) for index in indices]


def cases() -> list[tuple[tuple[int, ...], str]]:
    return [(shape, rule) for shape in SHAPES for rule in RULES]


@pytest.mark.parametrize(("shape", "rule"), cases())
def test_blocks_are_their_naive_twin(shape: tuple[int, ...], rule: str) -> None:
    tensor = torch.randn(shape, dtype=torch.float64)
    blocks = Blocks.of(shape, BlockRule.parse(rule))
    members, owners = naive(tensor, rule)
    assert blocks.count == len(members)
    assert sorted(blocks.sizes().tolist()) == sorted(map(len, members.values()))
    means = sorted(np.mean(entries) for entries in members.values())
    np.testing.assert_allclose(sorted(blocks.means(tensor).tolist()), means, atol=1e-14)
    spread = [np.mean(members[owner]) for owner in owners]
    average = blocks.average(tensor)
    assert average.shape == tensor.shape
    np.testing.assert_allclose(average.reshape(-1), spread, atol=1e-14)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(5,), (6, 70), (4, 3, 3, 3)])
def test_means_and_sizes_are_in_one_order_and_rows_of_tensors_at_once(
    rule: str, shape: tuple[int, ...]
) -> None:
    stack = torch.randn(2, 3, *shape)
    blocks = Blocks.of(shape, BlockRule.parse(rule))
    means, average = blocks.means(stack), blocks.average(stack)
    assert means.shape == (2, 3, blocks.count)
    rounding = 2 * int(blocks.sizes().max()) * 2.0**-24 * float(stack.abs().max())
    for many, one in (
        (average[1, 2], blocks.average(stack[1, 2])),
        (means[1, 2], blocks.means(stack[1, 2])),
    ):
        torch.testing.assert_close(many, one, rtol=0, atol=rounding)
    total = (means * blocks.sizes()).sum(-1)
    # float32 sums of some hundred unit normals, in another order
    torch.testing.assert_close(total, stack.flatten(2).sum(-1), rtol=0, atol=1e-3)
    torch.testing.assert_close(blocks.means(average), means)


@pytest.mark.parametrize(
    ("shape", "rule", "applied", "count"),
    [
        ((64, 3, 7, 7), "auto", "kernel", 192),
        ((10, 100), "auto", "32", 40),
        ((10,), "auto", "none", 10),
        ((), "row", "none", 1),
        ((10, 100), "kernel", "32", 40),
        ((10, 100), "image", "none", 1000),
        ((8, 4, 3, 3), "image", "kernel", 32),
        ((8, 4, 3), "head:4", "kernel", 32),
        ((24, 8), "head:12", "head:12", 12),
        ((8, 4, 3, 3), "row", "row", 8),
        ((8, 4, 3, 3), "channel", "channel", 4),
        ((8, 4, 3, 3), "10", "10", 32),
    ],
)
def test_the_rule_that_applied_is_named(
    shape: tuple[int, ...], rule: str, applied: str, count: int
) -> None:
    blocks = Blocks.of(shape, BlockRule.parse(rule))
    assert (blocks.rule, blocks.count) == (applied, count)


def test_the_mean_is_signed_and_keeps_the_dtype() -> None:
    tensor = torch.tensor([[1.0, -1.0, 3.0]], dtype=torch.bfloat16)
    average = Blocks.of((1, 3), BlockRule.parse("2")).average(tensor)
    assert average.tolist() == [[0.0, 0.0, 3.0]]
    assert average.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "text",
    ["", "rows", "Row", "head", "head:", "head:0", "head:-2", "0", "-4", "3.5", "4x", "head:2:3"],
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as refusal:
        BlockRule.parse(text)
    lines = str(refusal.value).splitlines()
    assert len(lines) == 3
    assert repr(text) in lines[1]


def test_heads_that_do_not_divide_the_rows_leave_them_to_auto() -> None:
    assert Blocks.of((10, 64), BlockRule.parse("head:4")).rule == "32"
