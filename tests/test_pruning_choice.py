"""Which weights may go, in which groups, how many, and which of them do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hesscli.diagnostics.pruning_choice import Aim, Candidates, in_groups, least
from hesscli.errors import UsageError
from hesscli.parameters import Parameters
from hesscli.vocabulary import Pattern


class Tied(nn.Module):
    """One matrix at two places, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 5), nn.Linear(5, 5, bias=False)
        self.two.weight = self.one.weight


def test_tied_weights_count_once() -> None:
    assert Candidates(Parameters.of(Tied())).count == 25


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("steps", [1, 5])
def test_counts_add_up_and_fall_geometrically(per_layer: bool, steps: int) -> None:
    sizes = (7, 11, 13, 3)
    net = nn.Sequential(*(nn.Linear(1, size, bias=False) for size in sizes))
    candidates = Candidates(Parameters.of(net))
    for sparsity in (0.1, 0.5, 0.77, 0.97):
        aim, zeros = Aim(sparsity, steps, per_layer), torch.zeros(34, dtype=torch.bool)
        totals = [sum(n for _, n in step) for step in candidates.targets(aim, zeros)]
        wanted = [34 * (1 - (1 - sparsity) ** (k / steps)) for k in range(1, steps + 1)]
        assert totals == [round(one) for one in wanted]
        *_, last = candidates.targets(aim, zeros)
        for place, count in last:
            assert abs(count - sparsity * (place.stop - place.start)) <= 1


def test_of_equal_costs_the_first_go() -> None:
    costs = torch.tensor([1.0, 0, 0, 0, 2, 0])
    assert least(costs, [(slice(0, 6), 2)]).tolist() == [False, True, True, False, False, False]


def test_where_all_are_zero_none_can_go() -> None:
    """Whether or not the pattern counts all of them."""
    parameters = Parameters.of(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)))
    for pattern in (None, Pattern.parse("2:4")):
        candidates = Candidates(parameters, pattern)
        zeros = torch.ones(candidates.count, dtype=torch.bool)
        for aim in (Aim(0.5, pattern=pattern), Aim(0.99, 3, per_layer=True, pattern=pattern)):
            with pytest.raises(UsageError, match="there is no weight to prune"):
                list(candidates.targets(aim, zeros))


def test_lengths_of_rows_are_no_weights() -> None:
    """As ``weight_norm`` has them, in a column: without one, the row would not go but be 0/0."""
    torch_own = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    older = nn.Linear(3, 4)
    older.weight_g, older.weight_v = nn.Parameter(torch.ones(4, 1)), older.weight
    del older.weight
    for model in (torch_own, older):
        assert Candidates(Parameters.of(model)).count == 12


def test_no_sparsity_is_all_or_nothing() -> None:
    for sparsity in (0.0, 1.0, 1.5):
        with pytest.raises(UsageError, match="--sparsity"):
            Aim(sparsity)


class Conv1D(nn.Module):
    """As transformers has it: inputs first."""

    def __init__(self) -> None:
        super().__init__()
        self.nf = 6
        self.weight = nn.Parameter(torch.zeros(8, 6))


MAPS = [
    (nn.Linear(8, 6), lambda w: w),
    (nn.Conv2d(8, 6, 3), lambda w: w),
    (nn.Conv2d(16, 6, 1, groups=2), lambda w: w),
    (nn.ConvTranspose2d(8, 6, 2), lambda w: w.transpose(0, 1)),
    (
        nn.ConvTranspose1d(16, 6, 2, groups=2),
        lambda w: torch.cat([part.transpose(0, 1) for part in w.chunk(2)]),
    ),
    (Conv1D(), lambda w: w.T),
]


@pytest.mark.parametrize(("module", "by_output"), MAPS, ids=[str(module) for module, _ in MAPS])
@pytest.mark.parametrize("pattern", ["2:4", "3x4", "1x8"])
def test_a_group_is_of_weights_that_meet_the_same_inputs(
    module: nn.Module, by_output: object, pattern: str
) -> None:
    """With each weight its place, by output and input."""
    parameters = Parameters.of(module).select("weight")
    groups = Pattern.parse(pattern)
    columns = Candidates(parameters, groups).columns
    weight = parameters[0].tensor
    assert sorted(columns.tolist()) == list(range(weight.numel()))
    assert callable(by_output)
    table: Tensor = by_output(torch.arange(weight.numel()).view(weight.shape))
    found = {tuple(group.tolist()) for group in columns.view(-1, groups.size)}
    rows, inputs = groups.outputs, groups.inputs
    for output in range(0, table.shape[0], rows):
        for begin in range(0, table.shape[1], inputs):
            block = table[output : output + rows, begin : begin + inputs]
            for place in block.reshape(rows, inputs, -1).permute(2, 0, 1):
                assert tuple(place.flatten().tolist()) in found


def test_groups_do_not_reach_from_one_group_of_channels_to_another() -> None:
    """Neither outputs of a grouped convolution nor inputs of a transposed one."""
    for module in (nn.Conv1d(4, 6, 1, groups=2), nn.ConvTranspose1d(6, 4, 1, groups=2)):
        parameters = Parameters.of(module).select("weight")
        pattern = Pattern.parse("2x1" if isinstance(module, nn.Conv1d) else "1x2")
        with pytest.raises(UsageError, match="no weight may go"):
            Candidates(parameters, pattern)


def test_gains_and_tokens_of_any_rank_stay() -> None:
    net = nn.Sequential(nn.LayerNorm([3, 4]), nn.Linear(4, 1), nn.Conv2d(3, 3, 1, groups=3))
    net.register_parameter("token", nn.Parameter(torch.ones(1, 1, 5)))
    net.register_parameter("table", nn.Parameter(torch.ones(1, 3, 5)))
    assert Candidates(Parameters.of(net)).parameters.names == ("table", "1.weight", "2.weight")


def test_what_has_gone_of_a_group_costs_nothing() -> None:
    """Neither more nor less: the cheapest of three blocks of two is the second."""
    costs = torch.tensor([-1.0, 0.8, 0.1, 0.5, 0.3, 0.4])
    gone = costs < 0
    found = in_groups(costs, gone, [(slice(0, 6), 2)], Pattern.parse("1x2"))
    assert found.tolist() == [True, False, True, True, False, False]


def test_groups_that_have_gone_count_as_so_many_weights() -> None:
    candidates = Candidates(Parameters.of(nn.Linear(8, 2, bias=False)), Pattern.parse("1x4"))
    zeros = torch.zeros(16, dtype=torch.bool)
    zeros[:5] = True
    aim = Aim.of(0.75, 2, False, "1x4")
    assert [number for ((_, number),) in candidates.targets(aim, zeros)] == [9, 12]
    zeros[:] = True
    with pytest.raises(UsageError, match="no weight to prune"):
        next(candidates.targets(aim, zeros))
