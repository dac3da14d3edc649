"""Which weights may go, how many of them, and which do where each costs what it does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Self

import torch
from torch import Tensor, nn

from hesscli.errors import UsageError
from hesscli.parameters import Parameter, Parameters
from hesscli.torch_private import Convolution, RunningNorm
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
        own = groups.sparsity
        if own is None:
            return cls(USUAL_SPARSITY if sparsity is None else sparsity, steps, per_layer, groups)
        if sparsity is not None and not math.isclose(sparsity, own):
            raise UsageError(
                "--sparsity is not that of --pattern",
                f"{100 * sparsity:g}%, and {pattern} has {100 * own:g}%",
                f"--pattern {pattern} alone",
            )
        return cls(own, steps, per_layer, groups)

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
        pattern: of groups of weights; tensors that cannot be cut into such stay whole.

    Attributes:
        layers: places of each layer's among them, by its name; only of those that have some.
        parameters: the tensors that they are of.
        whole: names of those matrices and kernels that no group fits.

    Raises:
        UsageError: there are none.
    """

    def __init__(self, parameters: Parameters, pattern: Pattern | None = None) -> None:
        every = [p for p in parameters if p.numel and not _is_vector(p)]
        self._pattern = pattern
        shape = (1, 1) if pattern is None else (pattern.outputs, pattern.inputs)
        fitting = {p.name: _fits(p, *shape) for p in every}
        self.parameters = Parameters(p for p in every if fitting[p.name])
        self.whole = tuple(name for name, fits in fitting.items() if not fits)
        if self.whole and not len(self.parameters):
            raise UsageError(
                "no weight may go: no tensor is of so many outputs and inputs",
                f"--pattern {pattern}, for {', '.join(self.whole[:5])}",
                "another --pattern, or --sparsity without one",
            )
        if not len(self.parameters):
            raise UsageError(
                "no weight may go: biases, gains and other vectors stay",
                ", ".join(parameters.names[:5]),
                "--params that takes a matrix or a kernel, or none for all of them",
            )
        places = zip(parameters, parameters.places(), strict=True)
        self._starts, self._shape = {p.name: place.start for p, place in places}, shape
        sizes = dict.fromkeys(self.parameters.layers, 0)
        for parameter in self.parameters:
            sizes[parameter.layer] += parameter.numel
        ends = pairwise(accumulate(sizes.values(), initial=0))
        self.layers = {name: slice(*span) for name, span in zip(sizes, ends, strict=True)}

    @property
    def count(self) -> int:
        """C."""
        return self.parameters.size

    @cached_property
    def columns(self) -> Tensor:
        """Where they are in the flat vector ``(C,)``, layer by layer and group by group."""
        return torch.cat(
            [_in_groups(p, self._starts[p.name], *self._shape) for p in self.parameters]
        )

    def targets(self, aim: Aim, zeros: Tensor) -> Iterator[list[tuple[slice, int]]]:
        """How many are to be zero after each step, in the whole or in each layer.

        The share that is left falls geometrically. Counts of layers are rounded so that those of
        all add up to the whole's. Of groups those count that are as they are to be.

        Args:
            aim: the sparsity and the number of steps.
            zeros: which are zero before the first ``(C,)``.

        Raises:
            UsageError: more than are to be are so already, or all are.
        """
        if bool(zeros.all()):
            got, hint = f"all {self.count} are zero", "a checkpoint with weights to prune"
            raise UsageError("there is no weight to prune", got, hint)
        spans = self.layers if aim.per_layer else {"": slice(0, self.count)}
        counts = {name: self._done(zeros[place]) for name, place in spans.items()}
        sparse = {n: counts[n] / (p.stop - p.start) for n, p in spans.items()}
        worst = max(sparse, key=lambda name: sparse[name])
        if counts[worst] > math.ceil(aim.sparsity * (spans[worst].stop - spans[worst].start)):
            share = f"{100 * sparse[worst]:.4g}%"
            spared = f"--params '!{worst}'"
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

    def _done(self, zeros: Tensor) -> int:
        """How many of the weights that are to go have gone."""
        if (pattern := self._pattern) is None:
            return int(zeros.sum())
        return pattern.count * int((zeros.view(-1, pattern.size).sum(1) >= pattern.count).sum())


# -- Which tensors have weights that may go, and how these lie in groups ---------------------------


_VECTORS = ("bias", "weight_g", "weight.original0")
"""How names of vectors end, whatever their rank: ``weight_norm`` calls lengths of rows by the last
two."""
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, RunningNorm)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _is_vector(parameter: Parameter) -> bool:
    """Whether it is a gain, a bias or a token, whatever its rank: no map that has inputs."""
    tensor, owner = parameter.tensor, parameter.owner
    if tensor.dim() < 2 or isinstance(owner, _NORMS) or parameter.name.endswith(_VECTORS):
        return True
    is_long = tensor.dim() > 2 and tensor.numel() == max(tensor.shape)
    return is_long and not isinstance(owner, Convolution)


def _fits(parameter: Parameter, outputs: int, inputs: int) -> bool:
    """Whether it can be cut into blocks of so many outputs by so many inputs."""
    places, groups = _by_output(parameter, torch.empty(parameter.tensor.shape, device="meta"))
    return places.shape[0] // groups % outputs == 0 and places.shape[1] % inputs == 0


def _in_groups(parameter: Parameter, start: int, outputs: int, inputs: int) -> Tensor:
    """Where its entries are in the flat vector, those of a block side by side, by inputs last."""
    places = torch.arange(start, start + parameter.numel, device="cpu").view(parameter.tensor.shape)
    places, _ = _by_output(parameter, places)
    rows, columns, *rest = places.shape
    blocks = places.reshape(rows // outputs, outputs, columns // inputs, inputs, *rest)
    return blocks.permute(0, *range(4, blocks.dim()), 2, 1, 3).reshape(-1)


def _by_output(parameter: Parameter, tensor: Tensor) -> tuple[Tensor, int]:
    """A tensor of its shape with outputs first and their inputs second, and in how many groups.

    So is ``Linear``'s, and whatever is not known to be otherwise: transposed convolutions, and
    what transformers calls ``Conv1D``.
    """
    owner = parameter.owner
    groups = owner.groups if isinstance(owner, Convolution) else 1
    if isinstance(owner, _TRANSPOSED):
        inputs, outputs, *rest = tensor.shape
        parts = tensor.reshape(groups, inputs // groups, outputs, *rest)
        return parts.transpose(1, 2).flatten(0, 1), groups
    if type(owner).__name__ == "Conv1D" and hasattr(owner, "nf"):
        return tensor.transpose(0, 1), groups
    return tensor, groups


# -- Which go --------------------------------------------------------------------------------------


def in_groups(
    costs: Tensor, gone: Tensor, targets: Sequence[tuple[slice, int]], pattern: Pattern
) -> Tensor:
    """Which go where each costs what it costs alone ``(C,)``: as :func:`by_groups`."""
    each = costs.view(-1, pattern.size)
    found = torch.sort(each, dim=1, stable=True)
    which = found.indices[:, : pattern.count]
    chosen = torch.zeros_like(each, dtype=torch.bool).scatter_(1, which, True)
    cost = found.values[:, : pattern.count].clamp(min=0).sum(1)  # what is gone costs nothing
    return by_groups(chosen, cost, gone, targets, pattern)


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
    before = gone.view(-1, pattern.size)
    done = before.sum(1) >= pattern.count
    costs = costs.masked_fill(done, -1.0)
    groups = [
        (slice(p.start // pattern.size, p.stop // pattern.size), round(number / pattern.count))
        for p, number in targets
    ]
    which = least(costs, groups) & ~done
    return (before | (chosen & which[:, None])).view(-1)


def least(costs: Tensor, targets: Sequence[tuple[slice, int]]) -> Tensor:
    """Which have the lowest costs of each stretch; of equal ones the first. ``(C,)``, boolean."""
    chosen = torch.zeros_like(costs, dtype=torch.bool)
    for place, count in targets:
        chosen[place][torch.sort(costs[place], stable=True).indices[:count]] = True
    return chosen
