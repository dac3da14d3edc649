"""A seeded slice of ``make fuzz``, and whether its judge would notice."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from fuzz.__main__ import PLAIN, Job, faults, jobs
from fuzz.blocks import Planted
from fuzz.dice import Dice
from fuzz.grammar import Subject, plain
from fuzz.judge import judge
from fuzz.plants import PLANTS
from fuzz.truth import objective, truth
from torch import Tensor

STEP = 1e-4


def by_differences(subject: Subject) -> Tensor:
    """The Hessian's diagonal by second differences of the network as it is: no autograd in it."""
    model = copy.deepcopy(subject.model).double()
    entries = []
    with torch.no_grad():
        middle = objective(subject, model)
        for tensor in (p for p in model.parameters() if p.requires_grad):
            for entry in tensor.view(-1):
                kept, ends = entry.clone(), []
                for sign in (1, -1):
                    entry.copy_(kept + sign * STEP)
                    ends.append(objective(subject, model))
                entry.copy_(kept)
                entries.append((ends[0] - 2 * middle + ends[1]) / STEP**2)
    return torch.stack(entries)


@pytest.mark.parametrize(
    "plant",
    [
        "a second derivative that is lost",
        "a second derivative that is lost on some rows",
        "a function without second derivative",
        "weight norm",
        "a gradient that a hook changes",
        "a loss that reads parameters",
        "a loss of a nested of outputs",
        "a contrastive loss",
        "weights of tokens",
        "a function of one's own that sums",
    ],
)
def test_truth_is_that_of_differences_of_the_loss(plant: str) -> None:
    """But for entries whose steps cross a kink, of which there are few.

    A second difference errs by 4 eps |L| / h², and by h² L'''' / 12.
    """
    subject = PLANTS[plant].sow(Dice(2, 7))
    known = truth(subject)
    error = (by_differences(subject) - known.diagonal).abs()
    rounding = 64 * torch.finfo(torch.float64).eps * (1 + abs(known.loss)) / STEP**2
    allowed = rounding + 1e-4 * known.diagonal.abs().max()
    assert (error <= allowed).double().mean() > 0.9


def test_planted_functions_are_the_plain_ones_but_for_their_derivatives() -> None:
    x = torch.linspace(-2, 2, 12, dtype=torch.float64).view(3, 4)
    found = 0
    for number, plant in enumerate(PLANTS.values()):
        for module in plant.sow(Dice(number, 8)).model.modules():
            if isinstance(module, Planted):
                found += 1
                got, plain_one = module.misleading(x), module.plain(x)
                torch.testing.assert_close(got.double(), plain_one, rtol=1e-6, atol=1e-6)
    assert found > 8


@pytest.mark.parametrize("factor", [0.9, 1.001])
def test_the_judge_notices_another_function(factor: float) -> None:
    dice = Dice(3, 9)
    subject = plain(dice)
    total = subject.objective.total

    def other(outputs: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        value, mass = total(outputs, targets)
        return factor * value, mass

    altered = replace(subject, objective=replace(subject.objective, total=other))
    assert judge(altered, Dice(3, 9)).verdict == "wrong"


def test_the_judge_notices_a_refusal_for_another_reason() -> None:
    subject = PLANTS["a random operation"].sow(Dice(1, 10))
    assert judge(subject, Dice(1, 10)).verdict == "refused"
    assert judge(replace(subject, causes=("weather",)), Dice(1, 10)).verdict == "misnamed"


def test_a_number_gives_the_same_network_again() -> None:
    first, again = (plain(Dice(11, True)) for _ in range(2))
    assert first.form == again.form
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


@pytest.mark.parametrize("chunk", range(4))
def test_planted_faults_are_refused_or_named_or_the_numbers_are_right(chunk: int) -> None:
    chosen = jobs(range(len(PLANTS)), ())[chunk::4]
    assert not faults([(job, job.run(brief=True)) for job in chosen])


@pytest.mark.parametrize("chunk", range(2))
def test_nothing_planted_raises_no_alarm(chunk: int) -> None:
    chosen = [Job(number, PLAIN) for number in range(chunk, 10, 2)]
    assert not faults([(job, job.run(brief=True)) for job in chosen])
