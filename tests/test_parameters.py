"""Parameters as one flat vector: names, layers, offsets, globs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hesscli.errors import ExitCode, UsageError
from hesscli.parameters import Parameters, match_layers


class Net(nn.Module):
    """A root-owned tensor, a tied one, a frozen one, and names that share prefixes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale_weight = nn.Parameter(torch.ones(3))
        self.embed = nn.Embedding(5, 4)
        self.conv1 = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2))
        self.conv10 = nn.Linear(2, 4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embed.weight
        self.conv10.bias.requires_grad_(False)


@pytest.fixture
def parameters() -> Parameters:
    return Parameters.of(Net())


NAMES = (
    "scale_weight",
    "embed.weight",
    "conv1.0.weight",
    "conv1.0.bias",
    "conv1.2.weight",
    "conv1.2.bias",
    "conv10.weight",
    "head.bias",
)


def test_names_layers_and_offsets(parameters: Parameters) -> None:
    assert parameters.names == NAMES
    assert parameters.layers == ("scale_weight", "embed", "conv1.0", "conv1.2", "conv10", "head")
    assert [p.offset for p in parameters] == [0, 3, 23, 31, 33, 37, 39, 47]
    assert parameters.size == 52
    assert [p.name for p in parameters.in_layer("conv1.2")] == ["conv1.2.weight", "conv1.2.bias"]
    assert parameters.layer_index().tolist() == [0, 1, 2, 2, 3, 3, 4, 5]


def test_tied_tensors_belong_to_their_first_owner_alone(parameters: Parameters) -> None:
    assert "head.weight" not in parameters.names
    assert len({id(t) for t in parameters.tensors}) == len(parameters)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*", NAMES),
        ("conv1", NAMES[2:6]),
        ("conv1*", NAMES[2:7]),
        ("conv1.2", NAMES[4:6]),
        ("conv1.?", NAMES[2:6]),
        ("conv1.2.bias", ("conv1.2.bias",)),
        ("*.bias", ("conv1.0.bias", "conv1.2.bias", "head.bias")),
        # The root's own tensor is a layer by name: the others' weights must not be lost for it.
        ("*weight", tuple(name for name in NAMES if name.endswith("weight"))),
        ("scale_weight", ("scale_weight",)),
        ("[eh]*", ("embed.weight", "head.bias")),
    ],
)
def test_globs(parameters: Parameters, pattern: str, names: tuple[str, ...]) -> None:
    chosen = parameters.select(pattern)
    assert chosen.names == names
    whole = {p.name: p.offset for p in parameters}
    assert {p.name: p.offset for p in chosen} == {name: whole[name] for name in names}
    layers = match_layers(pattern, parameters.layers, parameters.names)
    assert layers == chosen.layers
    assert chosen.select("*").names == names


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("conv11", "conv10"), ("heat", "head"), ("Conv10", "conv10"), ("?", "scale_weight")],
)
def test_unmatched_globs_name_what_is_near(parameters: Parameters, pattern: str, near: str) -> None:
    with pytest.raises(UsageError) as caught:
        parameters.select(pattern)
    assert caught.value.exit_code == ExitCode.USAGE
    assert repr(pattern) in caught.value.got
    assert near in caught.value.hint
    assert "of 6 layers" in caught.value.hint


def test_split_is_the_inverse_of_flatten(parameters: Parameters) -> None:
    vector = torch.arange(52.0)
    parts = parameters.split(vector)
    assert [tuple(part.shape) for part in parts] == [tuple(t.shape) for t in parameters.tensors]
    assert all(part.reshape(-1)[0] == p.offset for part, p in zip(parts, parameters, strict=True))
    assert torch.equal(parameters.flatten(parts), vector)
    columns: Tensor = vector[:, None].expand(52, 3).clone()
    assert torch.equal(parameters.flatten(parameters.split(columns[:, 1])), vector)
    assert parameters.flatten([]).shape == (0,)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 100])
def test_portions_are_all_of_it_in_order_and_no_larger_than_they_must(
    parameters: Parameters, count: int
) -> None:
    found = parameters.portions(count)
    assert [p for portion in found for p in portion] == list(parameters)
    for portion in found:
        assert 0 < portion.size <= max(parameters.size / count, max(portion.sizes))
    assert len(found) == 1 or count > 1
