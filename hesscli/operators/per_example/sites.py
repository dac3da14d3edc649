"""Per-example parameter gradients of known modules, one by one and as sums of their squares.

A site stands for a module on one batch. A module that is called several times has the
positions of all its calls in a row, since an example's gradient sums over them. Whether a site
tells the truth of a module (which may be of a subclass, or used in other ways too) is for its
caller to check.

Shapes: N examples, G groups, P positions, J inputs and O outputs of a product, W or D features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hesscli.operators.per_example.calls import BareLinear, Tied
from hesscli.operators.per_example.squares import (
    pairs_are_cheaper,
    room,
    squared_norms,
    squared_products,
)
from hesscli.parameters import Parameters
from hesscli.sums import add_rows

# -- Per-example parameter gradients of known modules, from their inputs and output gradients ------


Named = dict[str, Tensor]
"""A tensor for each of a module's parameters, by their names in it."""


class Site(ABC):
    """A module and its inputs.

    Args:
        module: of a kind that the class knows.
        inputs: of each call, ``(N·m, ...)``: m rows an example, one after the other.
        count: N.
    """

    def __init__(self, module: Any, inputs: Sequence[Tensor], count: int) -> None:
        self.module, self.count = module, count
        self.inputs = self.by_example([self.prepare(x) for x in inputs])

    def add_squares(self, columns: Sequence[Sequence[Tensor]], into: Named) -> None:
        """Σ over examples and columns of squared gradients, a few examples at a time.

        Args:
            columns: for each the gradients of every call's output, in the output's shape.
            into: float64 totals of the parameters that are wanted, which are added to.
        """
        for inputs, gradients in self._parts(columns):
            found = self.squares_of(inputs, gradients)
            for name, total in into.items():
                add_rows(total.view(-1), found[name].reshape(-1), 1.0)

    def norms(self, columns: Sequence[Sequence[Tensor]]) -> Named:
        """Σ over columns of each example's squared gradient norm, ``(N,)`` float64; likewise."""
        found: dict[str, list[Tensor]] = {}
        for inputs, gradients in self._parts(columns):
            for name, value in self.norms_of(inputs, gradients).items():
                found.setdefault(name, []).append(value.double())
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _parts(self, columns: Sequence[Sequence[Tensor]]) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Inputs and columns of a few examples after the other, in this kind's own layout."""
        split = [self.by_example(column) for column in columns]
        size = max(1, room(columns[0][0]) // self.numbers_each(split))
        for start in range(0, self.count, size):
            part = slice(start, start + size)
            inputs = self.read([x[part] for x in self.inputs])
            yield inputs, [self.read_gradients([g[part] for g in column]) for column in split]

    def each(self, column: Sequence[Tensor], part: slice = slice(None)) -> Named:
        """Gradients ``(n, *shape)`` of single examples.

        Args:
            column: the gradients of every call's output, in the output's shape.
            part: which examples, default all.
        """
        inputs = self.read([x[part] for x in self.inputs])
        return self.each_of(inputs, self.read_gradients([g[part] for g in self.by_example(column)]))

    def totals(self, column: Sequence[Tensor]) -> Named:
        """Σ over examples of gradients, a few at a time: what autograd makes of a batch."""
        sums: Named = {}
        numbers = sum(p.numel() for p in self.module.parameters())
        size = max(1, room(column[0]) // max(1, numbers))
        for start in range(0, self.count, size):
            for name, value in self.each(column, slice(start, start + size)).items():
                total = value.sum(0, dtype=torch.float64)
                sums[name] = sums[name] + total if name in sums else total
        return sums

    def by_example(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Views ``(N, m, ...)`` of a call's batch, example by example."""
        return [v.reshape(self.count, -1, *v.shape[1:]) for v in values]

    def prepare(self, values: Tensor) -> Tensor:
        """What of an input is kept."""
        return values

    @abstractmethod
    def numbers_each(self, columns: Sequence[Sequence[Tensor]]) -> int:
        """Numbers that are made for one example while it is squared."""

    @abstractmethod
    def read(self, inputs: Sequence[Tensor]) -> Tensor:
        """Inputs of all calls, each ``(n, m, ...)``, in this kind's own layout."""

    @abstractmethod
    def read_gradients(self, gradients: Sequence[Tensor]) -> Tensor:
        """Output gradients of all calls, each ``(n, m, ...)``, in that layout."""

    @abstractmethod
    def each_of(self, inputs: Tensor, gradients: Tensor) -> Named:
        """Gradients ``(n, *shape)`` of some examples."""

    @abstractmethod
    def squares_of(self, inputs: Tensor, columns: Sequence[Tensor]) -> Named:
        """Σ over some examples, and over columns, of squared gradients."""

    @abstractmethod
    def norms_of(self, inputs: Tensor, columns: Sequence[Tensor]) -> Named:
        """Σ over columns of some examples' squared gradient norms, ``(n,)``."""


class Product(Site):
    """y = W a + b at every position: inputs (n, G, P, J), gradients (n, G, O, P)."""

    def numbers_each(self, columns: Sequence[Sequence[Tensor]]) -> int:
        """The windows of the input, the gradients, and what is made of the two."""
        first = [x[:1] for x in self.inputs]
        _, groups, positions, width = self.read(first).shape
        outputs, many = self.outputs // groups, len(columns)
        numbers = groups * positions * (width + many * outputs)
        if pairs_are_cheaper(many, outputs, positions, width):
            return positions * numbers
        return numbers + groups * many * outputs * width

    @property
    def outputs(self) -> int:
        """Features, or channels, of the output."""
        return len(self.module.weight)

    def each_of(self, inputs: Tensor, gradients: Tensor) -> Named:
        """Gradients summed over positions."""
        made = torch.matmul(gradients, inputs)
        return {
            "weight": made.view(len(made), *self.module.weight.shape),
            "bias": gradients.sum(3).flatten(1),
        }

    def squares_of(self, inputs: Tensor, columns: Sequence[Tensor]) -> Named:
        """Squared gradients: the weight's by the cheaper order of sums, the bias's directly."""
        gradients = torch.stack(list(columns), 1)
        bias = gradients.sum(4).square_().sum((0, 1))
        return {"weight": squared_products(gradients, inputs), "bias": bias}

    def norms_of(self, inputs: Tensor, columns: Sequence[Tensor]) -> Named:
        """Squared norms: the weight's by the cheaper order of sums, the bias's directly."""
        gradients = torch.stack(list(columns), 1)
        bias = gradients.sum(4).square_().sum((1, 2, 3))
        return {"weight": squared_norms(gradients, inputs), "bias": bias}


class LinearSite(Product):
    """``nn.Linear``; whatever stands between examples and features is a position."""

    def read(self, inputs: Sequence[Tensor]) -> Tensor:
        """Inputs as (n, 1, P, J)."""
        return _joined([x.flatten(1, -2)[:, None] for x in inputs], 2)

    def read_gradients(self, gradients: Sequence[Tensor]) -> Tensor:
        """Gradients in the outputs as (n, 1, O, P)."""
        return self.read(gradients).transpose(2, 3)


class TiedSite(LinearSite):
    """A weight that positions are multiplied with, and whose rows others look up.

    An example's gradient is Σ_p g_p a_pᵀ over both: what a lookup gives back is as the input of a
    product whose gradient is one at the row and zero elsewhere.
    """

    def add_squares(self, columns: Sequence[Sequence[Tensor]], into: Named) -> None:
        """Likewise, a column at a time: each has inputs of its own."""
        for column in columns:
            super().add_squares([column], into)

    def norms(self, columns: Sequence[Sequence[Tensor]]) -> Named:
        """Likewise."""
        found = [super(TiedSite, self).norms([column]) for column in columns]
        return {name: torch.stack([f[name] for f in found]).sum(0) for name in found[0]}

    def numbers_each(self, columns: Sequence[Sequence[Tensor]]) -> int:
        """Positions of products and of lookups have a row of outputs each."""
        rows = sum(x[0].numel() if _is_lookup(x) else x[0, ..., 0].numel() for x in self.inputs)
        outputs, width = map(int, self.module.weight.shape)
        numbers = rows * (width + outputs)
        if pairs_are_cheaper(1, outputs, rows, width):
            return rows * numbers
        return numbers + outputs * width

    def _parts(self, columns: Sequence[Sequence[Tensor]]) -> Iterator[tuple[Tensor, list[Tensor]]]:
        split = self.by_example(columns[0])
        size = max(1, room(columns[0][0]) // self.numbers_each([split]))
        for start in range(0, self.count, size):
            inputs, gradients = self._paired(split, slice(start, start + size))
            yield inputs, [gradients]

    def each(self, column: Sequence[Tensor], part: slice = slice(None)) -> Named:
        """Gradients ``(n, *shape)`` of single examples."""
        return self.each_of(*self._paired(self.by_example(column), part))

    def _paired(self, column: Sequence[Tensor], part: slice) -> tuple[Tensor, Tensor]:
        """Inputs and gradients of all positions of some examples."""
        inputs, gradients = list[Tensor](), list[Tensor]()
        for x, g in zip(self.inputs, column, strict=True):
            looks_up = _is_lookup(x)
            inputs.append(g[part] if looks_up else x[part])
            gradients.append(self._chosen(x[part], g) if looks_up else g[part])
        return self.read(inputs), self.read_gradients(gradients)

    def _chosen(self, rows: Tensor, like: Tensor) -> Tensor:
        """One at the row that is looked up, but for padding's, whose gradient is zero by decree."""
        chosen = functional.one_hot(rows.long(), len(self.module.weight)).to(like.dtype)
        padding = self.module.padding_idx
        return chosen if padding is None else chosen * (rows != padding)[..., None]


def _is_lookup(input: Tensor) -> bool:
    return not input.is_floating_point()


class TransposedSite(LinearSite):
    """``Conv1D`` of transformers, GPT-2's linear layer: y = a W + b, W of inputs by outputs."""

    def each_of(self, inputs: Tensor, gradients: Tensor) -> Named:
        """Gradients summed over positions."""
        return {
            "weight": torch.matmul(gradients, inputs)[:, 0].transpose(1, 2).contiguous(),
            "bias": gradients.sum(3).flatten(1),
        }

    def squares_of(self, inputs: Tensor, columns: Sequence[Tensor]) -> Named:
        """Squared gradients as a linear layer's, the weight's turned."""
        found = super().squares_of(inputs, columns)
        return found | {"weight": found["weight"][0].T.contiguous()}

    @property
    def outputs(self) -> int:
        """Features of the output."""
        return int(self.module.weight.shape[1])


class ConvolutionSite(Product):
    """``nn.Conv1d``, ``2d`` and ``3d``: a product with every window of the padded input."""

    def prepare(self, values: Tensor) -> Tensor:
        """The padded input of a convolution."""
        mode = "constant" if self.module.padding_mode == "zeros" else self.module.padding_mode
        return functional.pad(values, _padding(self.module), mode)

    def read(self, inputs: Sequence[Tensor]) -> Tensor:
        """Windows of the input as (n, G, P, J)."""
        return _joined([self._grouped(self._windows(x)) for x in inputs], 3).transpose(2, 3)

    def read_gradients(self, gradients: Sequence[Tensor]) -> Tensor:
        """Gradients in the outputs as (n, G, O, P)."""
        return _joined([self._grouped(g.flatten(3)) for g in gradients], 3)

    def _grouped(self, values: Tensor) -> Tensor:
        """From (n, m, G·X, P) to (n, G, X, m·P)."""
        groups, (channels, positions) = self.module.groups, values.shape[2:]
        split = values.reshape(*values.shape[:2], groups, channels // groups, positions)
        return split.movedim(1, 3).flatten(3)

    def _windows(self, x: Tensor) -> Tensor:
        """Copies of what lies under each position of the kernel, (n, m, G·J, P)."""
        conv, dims = self.module, len(self.module.kernel_size)
        for axis in range(dims):
            size, stride, step = conv.kernel_size[axis], conv.stride[axis], conv.dilation[axis]
            x = x.unfold(3 + axis, (size - 1) * step + 1, stride)[..., ::step]
        kernel_first = [0, 1, 2, *range(3 + dims, 3 + 2 * dims), *range(3, 3 + dims)]
        return x.permute(kernel_first).flatten(2, 2 + dims).flatten(3)


class ScaleSite(Site):
    """y = w x̂ + b of affine norms: inputs x̂ (n, P, W), gradients (n, P, W)."""

    def prepare(self, values: Tensor) -> Tensor:
        """The normalised input: what the module makes with w = 1 and b = 0."""
        plain = {name: _constant(name, p) for name, p in self.module.named_parameters()}
        result: Tensor = torch.func.functional_call(self.module, plain, (values,))
        return result

    def numbers_each(self, columns: Sequence[Sequence[Tensor]]) -> int:
        """The input, one gradient at a time, and their product."""
        return 3 * sum(x[0].numel() for x in self.inputs)

    def read(self, inputs: Sequence[Tensor]) -> Tensor:
        """Normalised inputs as (n, P, W)."""
        return _joined([self._by_position(x) for x in inputs], 1)

    def read_gradients(self, gradients: Sequence[Tensor]) -> Tensor:
        """Gradients in the outputs as (n, P, W)."""
        return self.read(gradients)

    def each_of(self, inputs: Tensor, gradients: Tensor) -> Named:
        """Gradients summed over positions."""
        return {"weight": (gradients * inputs).sum(1), "bias": gradients.sum(1)}

    def squares_of(self, inputs: Tensor, columns: Sequence[Tensor]) -> Named:
        """Gradients summed over positions, squared."""
        made = [self.each_of(inputs, column) for column in columns]
        return {n: torch.stack([m[n] for m in made]).square_().sum((0, 1)) for n in made[0]}

    def norms_of(self, inputs: Tensor, columns: Sequence[Tensor]) -> Named:
        """The same, summed over entries instead of examples."""
        made = [self.each_of(inputs, column) for column in columns]
        return {n: torch.stack([m[n] for m in made]).square_().sum((0, 2)) for n in made[0]}

    def _by_position(self, values: Tensor) -> Tensor:
        """From (n, m, ...) to (n, P, W)."""
        if isinstance(self.module, (nn.LayerNorm, nn.RMSNorm)):
            return values.reshape(len(values), -1, self.module.weight.numel())
        if values.dim() == 3:
            return values
        return values.flatten(3).transpose(2, 3).flatten(1, 2)


class LookupSite(Site):
    """``nn.Embedding``: inputs (n, P) of row numbers, gradients (n, P, D)."""

    def numbers_each(self, columns: Sequence[Sequence[Tensor]]) -> int:
        """One gradient at a time, and its sums."""
        return 2 * sum(g[0].numel() for g in columns[0])

    def read(self, inputs: Sequence[Tensor]) -> Tensor:
        """Numbers of the rows that are looked up, (n, P)."""
        return _joined([x.flatten(1) for x in inputs], 1).long()

    def read_gradients(self, gradients: Sequence[Tensor]) -> Tensor:
        """Gradients in the outputs as (n, P, D)."""
        return _joined([g.flatten(1, -2) for g in gradients], 1)

    def each_of(self, inputs: Tensor, gradients: Tensor) -> Named:
        """Gradients of a table each, in whose rows positions that look them up are summed."""
        table, counted = self.module.weight, self._counted(inputs)
        sums = gradients.new_zeros(len(inputs) * len(table), table.shape[1])
        sums.index_add_(0, self._places(inputs)[counted], gradients[counted])
        return {"weight": sums.view(len(inputs), *table.shape)}

    def squares_of(self, inputs: Tensor, columns: Sequence[Tensor]) -> Named:
        """Positions of one example that look up one row are summed before they are squared."""
        total, table = torch.zeros_like(self.module.weight, requires_grad=False), self.module.weight
        for found, squares in self._looked_up(inputs, columns):
            total.index_add_(0, found % len(table), squares)
        return {"weight": total}

    def norms_of(self, inputs: Tensor, columns: Sequence[Tensor]) -> Named:
        """The same, summed by example."""
        total = columns[0].new_zeros(len(inputs))
        for found, squares in self._looked_up(inputs, columns):
            total.index_add_(0, found // len(self.module.weight), squares.sum(1))
        return {"weight": total}

    def _looked_up(
        self, inputs: Tensor, columns: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """For each column the rows that have a gradient, and its squares ``(rows, D)``."""
        table, counted = self.module.weight, self._counted(inputs)
        found, owner = torch.unique(self._places(inputs)[counted], return_inverse=True)
        for column in columns:
            sums = column.new_zeros(len(found), table.shape[1])
            sums.index_add_(0, owner, column[counted])
            yield found, sums.square_()

    def _places(self, inputs: Tensor) -> Tensor:
        """Rows that are looked up, in a table of each example's own, one below the other."""
        example = torch.arange(len(inputs), device=inputs.device)[:, None]
        return example * len(self.module.weight) + inputs

    def _counted(self, inputs: Tensor) -> Tensor:
        """Positions that do not look up the padding row, whose gradient is zero by decree."""
        padding = self.module.padding_idx
        return torch.ones_like(inputs, dtype=torch.bool) if padding is None else inputs != padding


_NORMS = (
    *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.SyncBatchNorm),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)


def site_class(module: nn.Module) -> type[Site] | None:
    """The kind of site that fits a module, if any does."""
    if isinstance(module, Tied):
        return TiedSite
    if isinstance(module, (nn.Linear, BareLinear)):
        return LinearSite
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return TransposedSite
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return ConvolutionSite
    if isinstance(module, _NORMS):
        return ScaleSite
    if isinstance(module, nn.Embedding) and module.max_norm is None:
        return LookupSite
    return None


def known_modules(model: nn.Module, parameters: Parameters) -> dict[nn.Module, dict[str, int]]:
    """Modules of a known kind, and the places of those parameters that no other module owns.

    Matrices of other modules that are called weights may be those of linear maps.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, tensor in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(tensor), []).append((module, name))
    known: dict[nn.Module, dict[str, int]] = {}
    others: dict[tuple[nn.Module, str], int] = {}
    for position, parameter in enumerate(parameters):
        homes = owners[id(parameter.tensor)]
        if len(homes) > 1 and parameter.tensor.dim() == 2:
            known[Tied(parameter.tensor, [module for module, _ in homes])] = {"weight": position}
        elif len(homes) == 1:
            module, name = homes[0]
            if site_class(module) is not None and name in ("weight", "bias"):
                known.setdefault(module, {})[name] = position
            else:
                others[module, name] = position
    for (module, name), position in others.items():
        weight, bias = getattr(module, name), name.replace("weight", "bias")
        if "weight" in name and weight.dim() == 2:
            names = {"weight": position}
            if (module, bias) in others:
                names["bias"] = others[module, bias]
            known[BareLinear(weight, getattr(module, bias, None))] = names
    return known


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """All calls' positions in a row, without a copy of a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _padding(conv: Any) -> list[int]:
    """What a convolution pads, as ``functional.pad`` takes it: the last dimension first."""
    if conv.padding == "valid":
        return [0] * 2 * len(conv.kernel_size)
    if conv.padding == "same":  # more of it behind where it is odd
        sizes = zip(conv.dilation, conv.kernel_size, strict=True)
        wanted = [step * (size - 1) for step, size in sizes]
        pairs = [(total // 2, total - total // 2) for total in wanted]
    else:
        pairs = [(size, size) for size in conv.padding]
    return [size for pair in reversed(pairs) for size in pair]


def _constant(name: str, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if name == "bias" else torch.ones_like(like)
