"""The kernels of twice_differentiable against torch's own, to second order."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hesscli.operators.kernels import twice_differentiable
from hesscli.problem.convolutions import as_product, as_products, met


def second_order(run: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Value, gradient and one Hessian-vector product of a curved function of the output."""
    value = run(*leaves)
    slopes = torch.autograd.grad(value.tanh().square().sum(), leaves, create_graph=True)
    generator = torch.Generator().manual_seed(1)
    probes = [torch.randn(s.shape, generator=generator, dtype=s.dtype) for s in slopes]
    return [value, *slopes, *torch.autograd.grad(slopes, leaves, probes)]


def assert_same(run: Callable[..., Tensor], leaves: list[Tensor], *, replaced: bool = True) -> None:
    plain = second_order(run, leaves)
    with twice_differentiable():
        ours = second_order(run, leaves)
    for ours_part, plain_part in zip(ours, plain, strict=True):
        # Sums of some hundred products of order one: a thousand ulps are generous.
        torch.testing.assert_close(ours_part, plain_part, rtol=1e-11, atol=1e-12)
    assert ("_Convolution" in str(graph_of(run, leaves))) == replaced


def graph_of(run: Callable[..., Tensor], leaves: list[Tensor]) -> list[str]:
    """Names of the graph's nodes, to see that the replacement really took place."""
    with twice_differentiable():
        pending, names = [run(*leaves).grad_fn], []
    while pending:
        node = pending.pop()
        if node is not None:
            names.append(type(node).__name__)
            pending += [n for n, _ in node.next_functions]
    return names


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("function", "shape", "kernel", "options"),
    [
        (F.conv1d, (2, 4, 9), (6, 4, 3), {"stride": 2, "padding": 1}),
        (F.conv1d, (2, 4, 9), (6, 2, 3), {"groups": 2, "dilation": 2}),
        (F.conv2d, (2, 4, 7, 6), (6, 4, 3, 2), {"stride": (2, 1), "padding": (1, 0)}),
        (F.conv2d, (2, 4, 7, 6), (4, 1, 3, 3), {"groups": 4, "padding": 1}),
        (F.conv2d, (2, 3, 9, 9), (5, 3, 3, 3), {"dilation": 2, "stride": 2}),
        (F.conv3d, (2, 2, 5, 4, 5), (3, 2, 2, 2, 2), {"padding": 1}),
        # Of these some taps meet nothing but padding, the last of which has other widths by side.
        (F.conv2d, (4, 4, 1, 1), (3, 4, 3, 3), {"padding": 1}),
        (F.conv2d, (4, 4, 2, 2), (3, 4, 3, 3), {"stride": 2, "padding": 1}),
        (F.conv2d, (2, 4, 1, 7), (3, 4, 5, 3), {"padding": (3, 1)}),
        (F.conv1d, (2, 4, 5), (6, 2, 3), {"groups": 2, "dilation": 8, "padding": 8}),
        (F.conv1d, (2, 4, 3), (6, 4, 5), {"stride": 3, "padding": 3}),
    ],
)
def test_convolutions(
    function: Callable[..., Tensor], shape: tuple, kernel: tuple, options: dict, bias: bool
) -> None:
    leaves = [leaf(*shape), leaf(*kernel), *([leaf(kernel[0])] if bias else [])]
    assert_same(lambda x, w, b=None: function(x, w, b, **options), leaves)


def naive(size: int, under: int, move: int, pad: int, step: int) -> set[int]:
    """The taps that meet something: those whose weights a convolution of ones differs by."""
    kernel = torch.eye(under).view(under, 1, under)
    images = F.conv1d(torch.ones(1, 1, size), kernel, None, move, pad, step)
    return set(images.sum(2).nonzero()[:, 1].tolist())


def test_taps_that_meet_padding_alone_are_left_out() -> None:
    """All that meet something stay, and no more on either side of them; widths keep the places."""
    for case in itertools.product((1, 2, 3, 6), (1, 2, 3, 5), (1, 2, 3), (0, 1, 2, 4), (1, 2, 5)):
        size, under, move, pad, step = case
        if size + 2 * pad < step * (under - 1) + 1:
            continue
        x, w = torch.randn(1, 1, size), torch.randn(2, 1, under)
        around, narrow, (padding,) = met(x, w, [move], [pad], [step])
        if taps := naive(*case):
            assert narrow.shape[2] == max(taps) - min(taps) + 1, case
            torch.testing.assert_close(narrow, w[..., min(taps) : max(taps) + 1])
        ours = F.conv1d(around, narrow, None, move, padding, step)
        torch.testing.assert_close(ours, F.conv1d(x, w, None, move, pad, step))


def test_which_taps_meet_the_input_takes_no_longer_where_it_is_long() -> None:
    """As for kernels as long as a sequence, all of which a search through all outputs goes over."""
    x, w = torch.empty(1, 1, 10**7, device="meta"), torch.empty(1, 1, 3)
    began = time.process_time()
    assert met(x, w, [1], [10**7], [1])[1] is w
    assert time.process_time() - began < 0.5  # such a search takes 2 s


@pytest.mark.parametrize("held", [0, 1])
def test_a_convolution_with_one_side_held(held: int) -> None:
    leaves = [leaf(2, 3, 5, 5), leaf(4, 3, 3, 3)]
    other = leaves.pop(held).detach()
    order = (lambda a: F.conv2d(other, a)) if held == 0 else (lambda a: F.conv2d(a, other))
    assert_same(order, leaves)


def test_two_convolutions_in_a_row() -> None:
    leaves = [leaf(2, 3, 6, 6), leaf(4, 3, 3, 3), leaf(2, 4, 3, 3)]
    assert_same(lambda x, v, w: F.conv2d(F.conv2d(x, v).relu(), w), leaves)


def test_unbatched_and_same_padding_pass_through() -> None:
    assert_same(F.conv2d, [leaf(3, 6, 6), leaf(4, 3, 3, 3)], replaced=False)
    leaves = [leaf(1, 3, 6, 6), leaf(4, 3, 3, 3)]
    assert_same(lambda x, w: F.conv2d(x, w, padding="same"), leaves, replaced=False)


def names_of(value: Tensor) -> set[str]:
    pending, names = [value.grad_fn], set[str]()
    while pending:
        if (node := pending.pop()) is not None:
            names.add(node.name())
            pending += [each for each, _ in node.next_functions]
    return names


@pytest.mark.parametrize(
    ("shape", "kernel", "options"),
    [
        ((2, 3, 3, 3), (9, 3, 2, 2), {}),
        ((2, 3, 4, 5), (9, 3, 3, 3), {"stride": (3, 2), "padding": (1, 0)}),
        ((3, 2, 5, 5), (30, 2, 3, 2), {"dilation": 2, "stride": 2, "padding": [1]}),
        ((1, 4, 1, 1), (5, 4, 1, 1), {"bias": True}),
        ((2, 4, 1, 1), (5, 4, 3, 3), {"padding": 1}),
        ((2, 4, 2, 1), (5, 4, 3, 3), {"stride": 2, "padding": 1, "bias": True}),
    ],
)
def test_deep_convolutions_in_float64_are_products(
    shape: tuple, kernel: tuple, options: dict
) -> None:
    """With more outputs than positions, to second order, and on either way there."""
    leaves = [leaf(*shape), leaf(*kernel)] + [leaf(kernel[0])] * options.pop("bias", False)

    def run(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return F.conv2d(x, w, b, **options)

    plain = second_order(run, leaves)
    for mode in (as_products, twice_differentiable):
        with mode():
            ours, names = second_order(run, leaves), names_of(run(*leaves))
        assert not any("Convolution" in name for name in names)
        for ours_part, plain_part in zip(ours, plain, strict=True):
            torch.testing.assert_close(ours_part, plain_part, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "kernel", "options", "dtype"),
    [
        ((2, 3, 3, 3), (9, 3, 2, 2), {}, torch.float32),
        ((2, 3, 6, 6), (9, 3, 2, 2), {}, torch.float64),
        ((1, 4, 3, 3), (8, 2, 3, 3), {"groups": 2}, torch.float64),
        ((3, 3, 3), (9, 3, 3, 3), {}, torch.float64),
        ((1, 3, 3, 3), (9, 3, 3, 3), {"padding": "same"}, torch.float64),
    ],
)
def test_other_convolutions_are_torchs_own(
    shape: tuple, kernel: tuple, options: dict, dtype: torch.dtype
) -> None:
    x, w = torch.randn(shape, dtype=dtype), torch.randn(kernel, dtype=dtype)
    assert as_product(x, w, **options) is None


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (5, 3, 4, 2)])
def test_batch_norm_in_evaluation_mode(shape: tuple, affine: bool) -> None:
    mean, variance = torch.randn(3).double(), torch.rand(3).double() + 0.1
    leaves = [leaf(*shape), *([leaf(3), leaf(3)] if affine else [])]

    def run(x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        return F.batch_norm(x, mean, variance, w, b, eps=1e-3)

    assert_same(run, leaves, replaced=False)
    assert not any("BatchNorm" in name for name in graph_of(run, leaves))


def test_batch_norm_in_training_mode_passes_through() -> None:
    leaves = [leaf(5, 3, 4), leaf(3), leaf(3)]

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, w, b, training=True)

    assert_same(run, leaves, replaced=False)
    assert any("BatchNorm" in name for name in graph_of(run, leaves))
