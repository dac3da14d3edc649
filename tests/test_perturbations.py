"""Changes of weights, against twins in plain Python, and on a real network's own tensors."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hesscli import Problem
from hesscli.diagnostics import perturbations
from hesscli.diagnostics.perturbations import (
    BITS,
    PRUNED,
    applied,
    changes_of,
    prune,
    round_to,
)
from hesscli.parameters import Parameter, Parameters

EPS = 2.0**-52
SHAPES = [(1,), (7,), (), (5, 3), (4, 1), (1, 6), (6, 4, 3, 3)]
GRIDS = ("tensor", "channel")


def some(shape: Sequence[int], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def layer(*tensors: Tensor) -> list[Parameter]:
    offsets = itertools.accumulate((t.numel() for t in tensors), initial=0)
    pairs = zip(tensors, offsets, strict=False)
    return [Parameter(f"l.{i}", "l", t, offset, (f"l.{i}",)) for i, (t, offset) in enumerate(pairs)]


def naive_rounding(values: Sequence[float], bits: int) -> list[float]:
    """Python's own round also takes the even one of two that are as near."""
    largest = max(abs(value) for value in values)
    steps = 2 ** (bits - 1) - 1
    return [
        round(value / largest * steps) / steps * largest if largest else 0.0 for value in values
    ]


def bits_of(tensors: Sequence[Tensor]) -> list[bytes]:
    return [t.detach().contiguous().view(torch.uint8).numpy().tobytes() for t in tensors]


# -- rounding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rounding_as_in_plain_python(shape: tuple[int, ...], bits: int, dtype: torch.dtype) -> None:
    weights = some(shape, dtype)
    delta = round_to(weights, bits, "tensor")
    assert delta.dtype == torch.float64
    assert delta.shape == weights.shape
    flat = weights.double().flatten().tolist()
    expected = [new - old for new, old in zip(naive_rounding(flat, bits), flat, strict=True)]
    assert delta.flatten().tolist() == expected
    if not shape:
        return
    rows = [row.flatten().tolist() for row in weights.double()]
    expected = [
        new - old for row in rows for new, old in zip(naive_rounding(row, bits), row, strict=True)
    ]
    assert round_to(weights, bits, "channel").flatten().tolist() == expected


@pytest.mark.parametrize("granularity", GRIDS)
@pytest.mark.parametrize("bits", [*BITS, 12, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rounded_weights_are_on_an_even_grid(bits: int, granularity: Any, dtype: Any) -> None:
    """2^bits − 1 levels at most, zero among them, the largest weight kept; error half a step."""
    for seed in range(20):
        weights = some((3, 400), dtype, seed) * 10.0 ** (seed - 10)
        rounded = weights.double() + round_to(weights, bits, granularity)
        grids = zip(weights.double(), rounded, strict=True)
        whole = [(weights.double().flatten(), rounded.flatten())]
        for before, after in whole if granularity == "tensor" else grids:
            largest = float(before.abs().max())
            step = largest / (2 ** (bits - 1) - 1)
            levels = (after / step).round()
            assert float(levels.abs().max()) == 2 ** (bits - 1) - 1
            assert len(levels.unique()) <= 2**bits - 1
            assert float((after - levels * step).abs().max()) <= 2 * EPS * largest
            assert float((after - before).abs().max()) <= step / 2 * (1 + 2**bits * 4 * EPS)
            assert float(after.abs().max()) == largest
            assert bool((after[before.abs() < 0.499 * step] == 0).all())


def test_levels_that_can_be_taken_are_taken() -> None:
    for bits in BITS:
        weights = torch.linspace(-1, 1, 1001, dtype=torch.float64)
        rounded = weights + round_to(weights, bits, "tensor")
        assert len(rounded.unique()) == 2**bits - 1
        assert torch.equal(rounded.unique(), -rounded.unique().flip(0))
    three = torch.tensor([-0.4, -0.6, 1.0, 0.2, -1.0, 0.6], dtype=torch.float64)
    assert (three + round_to(three, 2, "tensor")).tolist() == [0, -1, 1, 0, -1, 1]


@pytest.mark.parametrize("granularity", GRIDS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rounding_again_changes_nothing(bits: int, granularity: Any, dtype: Any) -> None:
    """To the last bit: what is added lands on the level, and the level on itself."""
    for seed in range(100):
        weights = some((4, 50), dtype, seed) * 3.0 ** (seed - 50)
        rounded = weights.double() + round_to(weights, bits, granularity)
        assert not round_to(rounded, bits, granularity).any()


def test_zeros_stay_zero() -> None:
    weights = torch.zeros(3, 4)
    weights[1] = torch.tensor([1.0, -2.0, 0.0, 4.0])
    for bits, granularity in itertools.product(BITS, GRIDS):
        delta = round_to(weights, bits, granularity)
        assert torch.isfinite(delta).all()
        assert not delta[weights == 0].any()
        assert not round_to(torch.zeros(2, 3), bits, granularity).any()
    tiny = torch.tensor([5e-324, 0.0, -5e-324], dtype=torch.float64)
    assert not round_to(tiny, 2, "tensor").any()


def test_channels_err_less_than_tensors_where_they_differ() -> None:
    weights = some((8, 50)) * 2.0 ** torch.arange(8)[:, None]
    by_channel, by_tensor = (round_to(weights, 4, grid).square().sum() for grid in GRIDS[::-1])
    assert by_channel < 0.5 * by_tensor


# -- pruning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("size", [0, 1, 2, 5, 10, 97])
def test_pruning_takes_the_least_salient(share: float, size: int) -> None:
    weights, saliency = some((size,)), some((size,), seed=1).square()
    delta = prune(weights, saliency, share)
    order = sorted(range(size), key=lambda i: (float(saliency[i]), i))
    gone = set(order[: round(share * size)])
    assert delta.tolist() == [-float(w) if i in gone else 0.0 for i, w in enumerate(weights)]
    assert int((weights + delta == 0).sum()) == round(share * size)


def test_ties_go_by_index() -> None:
    """Long enough for sorts that are not stable to mix them up."""
    saliency = torch.arange(5000) % 2
    delta = prune(torch.ones(5000), saliency, 0.3)
    assert delta.nonzero()[:, 0].tolist() == list(range(0, 3000, 2))


# -- a layer's changes ---------------------------------------------------------------------------


def test_the_changes_of_a_layer_and_their_order() -> None:
    weight, bias = some((6, 4), torch.float32), some((6,), torch.float32, 1)
    saliency = some((30,), seed=2).square()
    changes = list(changes_of(layer(weight, bias), saliency))
    assert [(c.kind, c.level, c.granularity) for c in changes] == [
        *(("prune", share, "weight") for share in (0.1, 0.5, 0.9)),
        *(("round", bits, grid) for bits in (8, 6, 4, 3, 2) for grid in ("tensor", "channel")),
    ]
    for change in changes:
        assert change.delta.dtype == torch.float64
        assert change.delta.shape == (30,)
        assert not change.delta[24:].any(), "biases stay"
        of_weight = change.delta[:24]
        if change.kind == "prune":
            expected = prune(weight.double().flatten(), saliency[:24], change.level)
        else:
            expected = round_to(weight, int(change.level), change.granularity).flatten()
        assert torch.equal(of_weight, expected)


def test_pruning_ranks_over_all_matrices_of_a_layer() -> None:
    """As of attention: biases between them keep their places, and are not counted."""
    tensors = [some((3, 4)), some((3,), seed=1), some((2, 2, 2), seed=2), some((5,), seed=3)]
    saliency = some((28,), seed=4).square()
    eligible = [*range(12), *range(15, 23)]
    flat = torch.cat([t.flatten() for t in tensors])
    order = sorted(eligible, key=lambda i: float(saliency[i]))
    for change, share in zip(changes_of(layer(*tensors), saliency), PRUNED, strict=False):
        gone = order[: round(share * 20)]
        assert sorted(change.delta.nonzero()[:, 0].tolist()) == sorted(gone)
        assert torch.equal(change.delta[gone], -flat[gone])


def test_a_layer_of_vectors_is_changed_itself() -> None:
    """A norm: scales and shifts are pruned together, and rounded on a grid each."""
    scale, shift = some((10,)), some((10,), seed=1)
    saliency = some((20,), seed=2).square()
    changes = list(changes_of(layer(scale, shift), saliency))
    assert [(c.kind, c.level, c.granularity) for c in changes] == [
        *(("prune", share, "weight") for share in PRUNED),
        *(("round", bits, "tensor") for bits in BITS),
    ]
    for change in changes[:3]:
        expected = prune(torch.cat([scale, shift]), saliency, change.level)
        assert torch.equal(change.delta, expected)
    for change in changes[3:]:
        each = [round_to(v, int(change.level), "tensor") for v in (scale, shift)]
        assert torch.equal(change.delta, torch.cat(each))
        assert change.delta.any()


def test_changes_are_the_same_each_time_and_change_nothing(sunspots: Problem) -> None:
    before = bits_of(sunspots.parameters.tensors)
    for name in sunspots.parameters.layers:
        owned = sunspots.parameters.in_layer(name)
        saliency = some((sum(p.numel for p in owned),)).square()
        first, second = (list(changes_of(owned, saliency)) for _ in range(2))
        for one, other in zip(first, second, strict=True):
            assert torch.equal(one.delta, other.delta)
            assert not one.delta.requires_grad
        norms = [float(c.delta.norm()) for c in first]
        assert norms[:3] == sorted(norms[:3])
        for eight, two in ((norms[3], norms[-2]), (norms[4], norms[-1])):
            assert 0 < eight < 0.1 * two
    assert bits_of(sunspots.parameters.tensors) == before


# -- applying them -------------------------------------------------------------------------------


def network(dtype: torch.dtype) -> nn.Module:
    """One weight serves twice, one lies across its memory; NaN, infinity and −0 are among them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 3))
    model[1].weight = model[0].weight
    model[2].weight = nn.Parameter(some((4, 3)).float().T)
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([float("nan"), -0.0, float("inf"), 1e-40]))
    return model.to(dtype)


@pytest.mark.parametrize("scale", [1.0, 0.5, -0.25])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weights_are_changed_meanwhile(dtype: torch.dtype, scale: float) -> None:
    model = network(dtype)
    parameters = Parameters.of(model)
    assert len(parameters) == 4, "the tied one is there once"
    delta, before = some((parameters.size,), seed=1), bits_of(parameters.tensors)
    flat = parameters.flatten([t.detach().double() for t in parameters.tensors])
    expected = (flat + scale * delta).to(dtype)
    with applied(parameters, delta, scale):
        meanwhile = parameters.flatten(parameters.tensors).detach()
        assert torch.equal(meanwhile.nan_to_num(), expected.nan_to_num())
        assert model[1].weight is model[0].weight
    assert bits_of(parameters.tensors) == before
    assert all(t.requires_grad and t.is_leaf for t in parameters.tensors)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_weights_are_put_back_whatever_passes_through(error: type[BaseException]) -> None:
    parameters = Parameters.of(network(torch.float32))
    before = bits_of(parameters.tensors)

    def fail() -> None:
        with applied(parameters, some((parameters.size,)), 1.0):
            assert bits_of(parameters.tensors) != before
            raise error

    with pytest.raises(error):
        fail()
    assert bits_of(parameters.tensors) == before


def test_tensors_that_share_memory_are_put_back() -> None:
    """Copies are made of all before any is changed."""
    weight = some((3, 4))
    parameters = layer(weight, weight[1:])
    before = bits_of([weight])
    with applied(parameters, some((20,)), 1.0):
        assert bits_of([weight]) != before
    assert bits_of([weight]) == before


def test_a_delta_of_the_wrong_length_changes_nothing() -> None:
    parameters = layer(some((3, 4)))
    before = bits_of([parameters[0].tensor])
    with pytest.raises(RuntimeError), applied(parameters, some((11,)), 1.0):
        pytest.fail("it was entered")
    assert bits_of([parameters[0].tensor]) == before


class Interrupted:
    """Ctrl-C before the n-th line that runs in the module under test."""

    def __init__(self, moment: int) -> None:
        self.left, self.rang = moment, False

    def __call__(self, frame: FrameType, event: str, _argument: object) -> Any:
        if frame.f_code.co_filename != perturbations.__file__:
            return None
        if event == "line" and not self.rang:
            self.left -= 1
            if self.left < 0:
                self.rang = True
                raise KeyboardInterrupt
        return self


def test_weights_are_put_back_whenever_ctrl_c_comes() -> None:
    """Before each line in turn, those that put them back included."""
    parameters = Parameters.of(network(torch.float32))
    delta, before = some((parameters.size,)), bits_of(parameters.tensors)
    outer = sys.gettrace()
    for moment in itertools.count():
        interrupted = Interrupted(moment)
        sys.settrace(interrupted)
        try:
            with applied(parameters, delta, 1.0):
                pass
        except KeyboardInterrupt:
            assert interrupted.rang
        finally:
            sys.settrace(outer)
        assert bits_of(parameters.tensors) == before, moment
        if not interrupted.rang:
            break
    assert moment > 30


def test_a_trained_network_rounded_and_put_back(sunspots: Problem) -> None:
    """Three levels meanwhile and another loss; then its own again, exactly."""

    def loss() -> float:
        with torch.no_grad():
            return float(sunspots.evaluate(sunspots.batch(0).data))

    own = loss()
    before = bits_of(sunspots.parameters.tensors)
    for name in sunspots.parameters.layers:
        owned = sunspots.parameters.in_layer(name)
        saliency = some((sum(p.numel for p in owned),)).square()
        for change in list(changes_of(owned, saliency))[-2:]:
            with applied(owned, change.delta, 1.0):
                changed = loss()
                weight = next(p.tensor for p in owned if p.tensor.dim() == 2).detach()
                for row in weight if change.granularity == "channel" else [weight]:
                    assert len(row.abs().unique()) <= 2
            assert changed != own
            assert loss() == own
    assert bits_of(sunspots.parameters.tensors) == before
