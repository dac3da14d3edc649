"""Named parameters as one flat vector: offsets, layers, selection by glob."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from hesscli.errors import UsageError


@dataclass(frozen=True)
class Parameter:
    """One tensor and its place in the flat vector of the whole network.

    ``offset`` counts in the full vector whatever is selected, so that probes, which are keyed
    by it, do not change when the matrix is restricted. ``names`` are all that it goes by, more
    than one where it is tied. ``owner`` is the first module that has it.
    """

    name: str
    layer: str
    tensor: Tensor
    offset: int
    names: tuple[str, ...]
    owner: nn.Module | None = field(default=None, repr=False, compare=False)

    @property
    def numel(self) -> int:
        """Number of its entries."""
        return self.tensor.numel()


class Parameters(Sequence[Parameter]):
    """An ordered selection of a network's trainable parameters.

    A layer is the module that owns the tensors; tensors owned by the root are layers of their
    own, and tied ones belong to their first owner.
    """

    def __init__(self, items: Iterable[Parameter]) -> None:
        self._items = tuple(items)
        self.tensors = tuple(p.tensor for p in self._items)
        self.sizes = tuple(p.numel for p in self._items)
        self.size = sum(self.sizes)

    @classmethod
    def of(cls, model: nn.Module) -> Parameters:
        """All parameters of ``model`` that require a gradient, in its own order."""
        items: list[Parameter] = []
        names: dict[int, list[str]] = {}
        for name, tensor in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
        modules, offset = dict(model.named_modules(remove_duplicate=False)), 0
        for name, tensor in model.named_parameters():
            if tensor.requires_grad:
                path = name.rpartition(".")[0]
                owner, every = modules[path], tuple(names[id(tensor)])
                items.append(Parameter(name, path or name, tensor, offset, every, owner))
                offset += tensor.numel()
        return cls(items)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._items[index]

    def __len__(self) -> int:
        return len(self._items)

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names as in the checkpoint."""
        return tuple(p.name for p in self._items)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of layers that have an entry, each once, in order."""
        return tuple(dict.fromkeys(p.layer for p in self._items if p.numel))

    def in_layer(self, layer: str) -> tuple[Parameter, ...]:
        """The parameters that ``layer`` owns."""
        return tuple(p for p in self._items if p.layer == layer)

    def places(self) -> tuple[slice, ...]:
        """Where each parameter lies in the flat vector of these."""
        return _consecutive(self.sizes)

    def layer_places(self) -> tuple[slice, ...]:
        """Where each of :attr:`layers` lies in the flat vector: its tensors are neighbours."""
        return _consecutive(sum(p.numel for p in self.in_layer(layer)) for layer in self.layers)

    def select(self, *patterns: str) -> Parameters:
        """The parameters that globs match: one of their names, or a module that they lie under.

        ``!GLOB`` leaves out what it matches, wherever it stands; with none but such, the rest is
        what remains of all.

        Raises:
            UsageError: a glob matches nothing, the nearest names being in the hint; or all that
                is matched is left out.
        """
        taken, left_out = set[str](), set[str]()
        for pattern in patterns:
            (left_out if pattern.startswith("!") else taken).update(self._matched(pattern))
        if all(pattern.startswith("!") for pattern in patterns):
            taken.update(self.names)
        if not taken - left_out:
            raise UsageError(
                "no parameter is left",
                " ".join(f"--params {pattern!r}" for pattern in patterns),
                "fewer patterns with !, or another without",
            )
        chosen = taken - left_out
        return Parameters(p for p in self._items if p.name in chosen)

    def _matched(self, pattern: str) -> list[str]:
        glob = pattern.removeprefix("!")
        found = [p.name for p in self._items if any(matches(glob, name) for name in p.names)]
        if found:
            return found
        names = dict.fromkeys(part for p in self._items for name in p.names for part in _up(name))
        near = difflib.get_close_matches(glob.strip("*?"), names, n=3, cutoff=0.3)
        raise UsageError(
            "no parameter matches the pattern",
            f"--params {pattern!r}",
            f"one of {', '.join(near or self.layers[:5])} (of {len(self.layers)} layers)",
        )

    def portions(self, count: int) -> tuple[Parameters, ...]:
        """All of them in their order, in about so many groups of about equal size."""
        groups, held = [list[Parameter]()], 0
        for parameter in self._items:
            if held and held + parameter.numel > self.size / count:
                groups.append([])
                held = 0
            groups[-1].append(parameter)
            held += parameter.numel
        return tuple(map(Parameters, groups))

    def without(self, others: Parameters) -> Parameters:
        """All but some."""
        left_out = set(others.names)
        return Parameters(p for p in self._items if p.name not in left_out)

    @cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """(offset, size) of stretches without a gap, so that a whole network is one draw."""
        runs: list[tuple[int, int]] = []
        for parameter in self._items:
            if runs and sum(runs[-1]) == parameter.offset:
                offset, size = runs.pop()
                runs.append((offset, size + parameter.numel))
            else:
                runs.append((parameter.offset, parameter.numel))
        return tuple(runs)

    def split(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Views of a flat vector ``(size,)`` in the parameters' shapes."""
        parts = torch.split_with_sizes(vector, self.sizes)
        return tuple(v.view(p.tensor.shape) for v, p in zip(parts, self._items, strict=True))

    def by_name(self, vector: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """A flat vector as arrays in the parameters' shapes, for a file."""
        parts = self.split(vector.to(dtype).cpu())
        return {name: part.numpy() for name, part in zip(self.names, parts, strict=True)}

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`split`: one vector ``(size,)``."""
        if not tensors:
            return torch.zeros(0, device="cpu")
        return torch.cat([t.reshape(-1) for t in tensors])

    def layer_index(self) -> Tensor:
        """For each parameter tensor, the position of its layer in :attr:`layers`."""
        position = {layer: i for i, layer in enumerate(self.layers)}
        # A tensor without entries adds nothing, wherever it is counted.
        return torch.tensor(
            [position.get(p.layer, 0) for p in self._items], dtype=torch.long, device="cpu"
        )


def _consecutive(sizes: Iterable[int]) -> tuple[slice, ...]:
    ends = itertools.accumulate(sizes, initial=0)
    return tuple(slice(start, stop) for start, stop in itertools.pairwise(ends))


def _up(name: str) -> Iterator[str]:
    """A parameter's name, and those of the modules that it lies under, the innermost first."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def matches(pattern: str, name: str) -> bool:
    """Whether a glob means ``name``: as a whole, or as a module that ``name`` lies under."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, pattern + ".*")


def match_layers(
    pattern: str, layer_names: Sequence[str], parameter_names: Sequence[str]
) -> tuple[str, ...]:
    """Layers that a ``--layer`` glob selects, by their own name or one of their parameters'.

    Raises:
        UsageError: nothing matches.
    """
    owners = {name.rpartition(".")[0] or name for name in parameter_names if matches(pattern, name)}
    found = tuple(n for n in layer_names if matches(pattern, n) or n in owners)
    if not found:
        near = difflib.get_close_matches(pattern.strip("*?"), layer_names, n=3, cutoff=0.3)
        raise UsageError(
            "no layer matches the pattern",
            f"--layer {pattern!r}",
            f"one of {', '.join(near or layer_names[:5])} (of {len(layer_names)} layers)",
        )
    return found


# -- From rows of entries to sums by layer: the columns of every table -----------------------------


class LayerSums:
    """Sums over each layer's entries and over all, in the layers of a whole network.

    Args:
        parameters: the entries of a row, some or all of the whole's.
        whole: whose layers the columns are; default ``parameters``.
    """

    def __init__(self, parameters: Parameters, whole: Parameters | None = None) -> None:
        self._sizes = parameters.sizes
        layers = (parameters if whole is None else whole).layers
        position = {layer: i for i, layer in enumerate(layers)}
        # A tensor without entries adds nothing, wherever it is counted.
        columns = [position.get(p.layer, 0) for p in parameters]
        self._columns = torch.tensor(columns, dtype=torch.long, device="cpu")
        self.num_layers = len(layers)

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows ``(P, d)`` to float64 ``(P, L + 1)`` on their device, the total last."""
        parts = torch.split(rows, list(self._sizes), dim=1)
        sums = [part.sum(1, dtype=torch.float64) for part in parts]
        empty = rows.new_zeros(len(rows), 0, dtype=torch.float64)
        return self.of_tensors(torch.stack(sums, dim=1) if sums else empty)

    def of_tensors(self, sums: Tensor) -> Tensor:
        """The same of float64 sums over the entries of each parameter ``(P, tensors)``."""
        layers = sums.new_zeros(len(sums), self.num_layers)
        if sums.shape[1]:
            self._columns = self._columns.to(sums.device)  # copied once, not for each block
            layers.index_add_(1, self._columns, sums)
        return torch.cat([layers, layers.sum(1, keepdim=True)], dim=1)
