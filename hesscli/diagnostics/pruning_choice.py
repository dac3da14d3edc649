"""Which weights may go, how many of them, and which do where each costs what it does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Self

import torch
from torch import Tensor

from hesscli.errors import UsageError
from hesscli.parameters import Parameter, Parameters
from hesscli.vocabulary import USUAL_SPARSITY, Pattern


@dataclass(frozen=True)
class Aim:
    """A sparsity and the way there.

    Args:
        sparsity: share of the weights that are to be zero.
        steps: in each the same share of the weights that are left goes.
        per_layer: each layer is to have the sparsity, and not all together.
        pattern: of which groups are to be.
    """

    sparsity: float
    steps: int = 1
    per_layer: bool = False
    pattern: Pattern | None = None

    @classmethod
    def of(cls, sparsity: float | None, steps: int, per_layer: bool, pattern: str | None) -> Self:
        """From what was typed.

        Raises:
            UsageError: no such pattern or sparsity, or one that is not the other's.
        """
        if pattern is None:
            return cls(USUAL_SPARSITY if sparsity is None else sparsity, steps, per_layer)
        groups = Pattern.parse(pattern)
        if sparsity is not None and not math.isclose(sparsity, groups.sparsity):
            raise UsageError(
                "--sparsity is not that of --pattern",
                f"{100 * sparsity:g}%, and {pattern} has {100 * groups.sparsity:g}%",
                f"--pattern {pattern} alone",
            )
        return cls(groups.sparsity, steps, per_layer, groups)

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise UsageError(
                "--sparsity must be above 0 and below 100%",
                f"{100 * self.sparsity:g}%",
                "--sparsity 90%",
            )


class Candidates:
    """The weights that may go: entries of matrices and kernels, each tied one once.

    Args:
        parameters: those of the matrix.
        pattern: of groups of weights for consecutive inputs; tensors that cannot be cut into such
            stay whole.

    Attributes:
        columns: where they are in the flat vector ``(C,)``, layer by layer and group by group.
        layers: places of each layer's among them, by its name; only of those that have some.
        parameters: the tensors that they are of.
        whole: names of those matrices and kernels that no group fits.

    Raises:
        UsageError: there are none.
    """

    def __init__(self, parameters: Parameters, pattern: Pattern | None = None) -> None:
        every = [p for p in parameters if p.tensor.dim() > 1 and p.numel]
        size = 1 if pattern is None else pattern.size
        self.parameters = Parameters(p for p in every if p.tensor.shape[1] % size == 0)
        self.whole = tuple(p.name for p in every if p.tensor.shape[1] % size)
        if self.whole and not len(self.parameters):
            raise UsageError(
                "no weight may go: no tensor has a multiple of so many inputs",
                f"--pattern {pattern}, for {', '.join(self.whole[:5])}",
                "another --pattern, or --sparsity without one",
            )
        if not len(self.parameters):
            raise UsageError(
                "no weight may go: biases, gains and other vectors stay",
                ", ".join(parameters.names[:5]),
                "--params that takes a matrix or a kernel, or none for all of them",
            )
        starts = {
            p.name: place.start for p, place in zip(parameters, parameters.places(), strict=True)
        }
        self.columns = torch.cat([_inputs_last(p, starts[p.name]) for p in self.parameters])
        sizes = dict.fromkeys(self.parameters.layers, 0)
        for parameter in self.parameters:
            sizes[parameter.layer] += parameter.numel
        ends = pairwise(accumulate(sizes.values(), initial=0))
        self.layers = {name: slice(*span) for name, span in zip(sizes, ends, strict=True)}

    @property
    def count(self) -> int:
        """C."""
        return len(self.columns)

    def targets(self, aim: Aim, zeros: Tensor) -> Iterator[list[tuple[slice, int]]]:
        """How many are to be zero after each step, in the whole or in each layer.

        The share that is left falls geometrically. Counts of layers are rounded so that those of
        all add up to the whole's.

        Args:
            aim: the sparsity and the number of steps.
            zeros: which are zero before the first ``(C,)``.

        Raises:
            UsageError: more than are to be are so already.
        """
        spans = self.layers if aim.per_layer else {"": slice(0, self.count)}
        counts = {name: int(zeros[place].sum()) for name, place in spans.items()}
        sparse = {n: counts[n] / (p.stop - p.start) for n, p in spans.items()}
        worst = max(sparse, key=lambda name: sparse[name])
        if counts[worst] > math.ceil(aim.sparsity * (spans[worst].stop - spans[worst].start)):
            share = f"{100 * sparse[worst]:.4g}%"
            spared = f"--params '!{worst}'" if worst else "a checkpoint with weights to prune"
            raise UsageError(
                "the weights are sparser already",
                f"{share} of {worst or 'them'} are zero, and --sparsity {100 * aim.sparsity:g}%",
                f"--sparsity above {share}" if sparse[worst] < 1 else spared,
            )
        for step in range(1, aim.steps + 1):
            found, end = [], 0.0
            for name, place in spans.items():
                left = (1 - sparse[name]) ** (1 - step / aim.steps)
                left *= (1 - aim.sparsity) ** (step / aim.steps)
                begin, end = end, end + (1 - left) * (place.stop - place.start)
                found.append((place, max(counts[name], round(end) - round(begin))))
            yield found


def _inputs_last(parameter: Parameter, start: int) -> Tensor:
    """Where its entries are in the flat vector, those for consecutive inputs side by side."""
    places = torch.arange(start, start + parameter.numel)
    return places.view(parameter.tensor.shape).movedim(1, -1).reshape(-1)


def in_groups(
    costs: Tensor, gone: Tensor, targets: Sequence[tuple[slice, int]], pattern: Pattern
) -> Tensor:
    """Which go where each costs what it costs alone ``(C,)``: as :func:`by_groups`."""
    count = pattern.size - pattern.kept
    each = costs.view(-1, pattern.size)
    found = torch.sort(each, dim=1, stable=True)
    chosen = torch.zeros_like(each, dtype=torch.bool).scatter_(1, found.indices[:, :count], True)
    return by_groups(chosen, found.values[:, :count].sum(1), gone, targets, pattern)


def by_groups(
    chosen: Tensor,
    costs: Tensor,
    gone: Tensor,
    targets: Sequence[tuple[slice, int]],
    pattern: Pattern,
) -> Tensor:
    """Let those go that are chosen in the groups where this costs least.

    Args:
        chosen: of each group ``(r, M)``.
        costs: of each group ``(r,)``.
        gone: which have gone already ``(C,)``: whole groups, or zeros from before.
        targets: how many weights are to have gone, in each stretch.
        pattern: M, and how many of them stay.
    """
    count = pattern.size - pattern.kept
    before = gone.view(-1, pattern.size)
    costs = costs.masked_fill(before.sum(1) >= count, -1.0)
    groups = [
        (slice(p.start // pattern.size, p.stop // pattern.size), round(number / count))
        for p, number in targets
    ]
    done = before.sum(1) >= count
    which = least(costs, groups) & ~done
    return (before | (chosen & which[:, None])).view(-1)


def least(costs: Tensor, targets: Sequence[tuple[slice, int]]) -> Tensor:
    """Which have the lowest costs of each stretch; of equal ones the first. ``(C,)``, boolean."""
    chosen = torch.zeros(len(costs), dtype=torch.bool)
    for place, count in targets:
        chosen[place][torch.sort(costs[place], stable=True).indices[:count]] = True
    return chosen
