"""Which parameters are added to what, and who reads it: where constants could move between them.

Beside each tensor of a pass lies what was added on its way, parameter by parameter, with the entry
that each of its numbers has. Whatever is linear and knows no channel hands that on. Where two
parameters are read in all the same places, what is added to one may be taken from the other; and
what only maps read comes out of them as their weights times it, which their own biases may take
back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hesscli.engines.symmetry.known import Call, Key, Known, key_of, tensors_in
from hesscli.engines.symmetry.maps import statistics
from hesscli.engines.symmetry.pointwise import POOLS, SILENT, VIEWS, on_cpu

ABSENT = -1
"""The entry of a number to which a parameter is not added."""


@dataclass(frozen=True)
class Addend:
    """What is added to a tensor.

    Its entries have the tensor's shape and, as far as they repeat, no memory.

    Attributes:
        adder: its number.
        entries: that each number of the tensor has, of the flat vector or of a map's outcome.
        factor: by which it was multiplied since.
    """

    adder: int
    entries: Tensor
    factor: float = 1.0


@dataclass(frozen=True)
class Adder:
    """A parameter that is added, or what a map makes of a constant.

    Attributes:
        made_by: the reading of the map that does; None of a parameter.
        table: all of one whose rows are looked up, which get the same: more may be than were seen.
        is_padded: whether autograd leaves a row of it without its gradient, wherever it is met.
    """

    made_by: int | None = None
    table: Tensor | None = None
    is_padded: bool = False


@dataclass(frozen=True)
class Reading:
    """A tensor that is read where a constant would show.

    Attributes:
        addends: of it.
        weights: of a map, entries of the flat vector ``(outputs, inputs, ·)``, or ``(outputs, 1)``
            where each has one input; absent where an output does not read an input. None where
            nothing can take a constant back.
        inputs: the map's input of each of its numbers.
        scale: of each output, where that is fixed.
    """

    addends: tuple[Addend, ...]
    weights: Tensor | None = None
    inputs: Tensor | None = None
    scale: Tensor | None = None


@dataclass
class Constants:
    """What a pass shows of them.

    Attributes:
        adders: by their numbers.
        readings: one after the other.
    """

    adders: list[Adder] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    _numbers: dict[tuple[int, int, bool], int] = field(default_factory=dict)
    _addends: dict[Key, tuple[Addend, ...]] = field(default_factory=dict)
    _shares: set[Key] = field(default_factory=set)
    _made: int = 0

    def follow(self, known: Known, call: Call, outs: list[Tensor]) -> None:
        """Take note of an operation, before its results are known for what they are."""
        given = list(tensors_in((call.args, tuple(call.kwargs.values()))))
        kept = {key: found for key, found in self._followed(known, call).items() if found}
        if call.name not in _HANDLERS:
            for tensor in given:
                self._read(self._of(tensor))
        is_shares = call.name in ("_softmax", "_safe_softmax")
        passes = call.name in (*VIEWS, "_softmax", "_safe_softmax")
        shares = is_shares or (passes and any(key_of(t) in self._shares for t in given[:1]))
        for out in outs:
            key = key_of(out)
            self._addends.pop(key, None)
            if key in kept:
                self._addends[key] = kept[key]
            self._shares.discard(key)
            if shares:
                self._shares.add(key)

    def _followed(self, known: Known, call: Call) -> dict[Key, tuple[Addend, ...]]:
        handler = _HANDLERS.get(call.name)
        if handler is None:
            return {}
        try:
            return handler(self, known, call)
        except (IndexError, RuntimeError, TypeError, ValueError):
            for tensor in tensors_in(call.args):
                self._read(self._of(tensor))
            return {}

    def _of(self, value: Any) -> tuple[Addend, ...]:
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return ()
        return self._addends.get(key_of(value), ())

    def _read(self, addends: tuple[Addend, ...]) -> None:
        if addends:
            self.readings.append(Reading(addends))

    def _parameter(
        self, entries: Tensor, *, is_table: bool = False, is_padded: bool = False
    ) -> Addend:
        """A parameter as it is added, by where in the flat vector it lies."""
        first, last = (int(end) for end in entries.aminmax())
        number = self._numbers.setdefault((first, last, is_table), len(self.adders))
        if number == len(self.adders):
            self.adders.append(Adder(table=entries if is_table else None, is_padded=is_padded))
        return Addend(number, entries)

    def _terms(self, known: Known, value: Any) -> tuple[Addend, ...]:
        """What a term of a sum adds: a parameter itself, or what was added to it."""
        if known.is_entries(value):
            return (self._parameter(known.entries[key_of(value)]),)
        return self._of(value)

    # -- operations ------------------------------------------------------------------------------

    def view(self, known: Known, call: Call) -> dict[Key, tuple[Addend, ...]]:
        """The same numbers in another order."""
        found = dict[Key, tuple[Addend, ...]]()
        addends = self._of(call.args[0])
        rest = on_cpu(call.args[1:])
        if addends and any(isinstance(each, torch.dtype) for each in rest):
            raise TypeError
        for addend in addends:
            if call.name in ("_to_copy", "clone", "alias", "detach", "lift_fresh", "contiguous"):
                moved = [addend.entries]
            elif call.name in ("view", "_unsafe_view", "reshape", "_reshape_alias"):
                moved = [addend.entries.reshape(call.result.shape)]
            else:
                moved = list(tensors_in(call.func(addend.entries, *rest, **call.kwargs)))
            for out, entries in zip(tensors_in(call.result), moved, strict=True):
                kept = Addend(addend.adder, entries, addend.factor)
                found[key_of(out)] = (*found.get(key_of(out), ()), kept)
        return found

    def sum(self, known: Known, call: Call) -> dict[Key, tuple[Addend, ...]]:
        """What both terms have."""
        one, other = call.args[:2]
        signs = {"add": (1.0, 1.0), "sub": (1.0, -1.0), "rsub": (-1.0, 1.0)}[call.name]
        if call.kwargs.get("alpha", 1) != 1:
            raise ValueError
        terms = [(self._terms(known, one), signs[0]), (self._terms(known, other), signs[1])]
        return self._gathered(call.result, terms)

    def _gathered(
        self, out: Tensor, terms: list[tuple[tuple[Addend, ...], float]]
    ) -> dict[Key, tuple[Addend, ...]]:
        every = [
            Addend(each.adder, each.entries.expand(out.shape), sign * each.factor)
            for addends, sign in terms
            for each in addends
        ]
        return {key_of(out): tuple(every)}

    def scaled(self, known: Known, call: Call) -> dict[Key, tuple[Addend, ...]]:
        """Times a number that is the same for all."""
        one, other = call.args[:2]
        if self._of(other) and not self._of(one) and call.name == "mul":
            one, other = other, one
        addends, power = self._of(one), -1.0 if call.name == "div" else 1.0
        if isinstance(other, Tensor):
            if not addends:
                return {}
            depends = key_of(other) in known.live or known.is_entries(other) or self._of(other)
            if other.numel() != 1 or depends:
                raise ValueError
            other = float(other.detach())
        factor = float(other) ** power
        return {
            key_of(call.result): tuple(
                Addend(a.adder, a.entries.expand(call.result.shape), a.factor * factor)
                for a in addends
            )
        }

    def joined(self, known: Known, call: Call) -> dict[Key, tuple[Addend, ...]]:
        """Each part has what was added to it, and nothing elsewhere."""
        parts, rest, every = call.args[0], call.args[1:], list[Addend]()
        for number, part in enumerate(parts):
            for each in self._terms(known, part):
                pieces = [torch.full(other.shape, ABSENT, device="cpu") for other in parts]
                pieces[number] = each.entries
                whole = call.func(pieces, *rest, **call.kwargs)
                every.append(Addend(each.adder, whole, each.factor))
        return {key_of(call.result): tuple(every)}

    def pooled(self, known: Known, call: Call) -> dict[Key, tuple[Addend, ...]]:
        """A mean keeps what is the same for all that it is of."""
        addends, out = self._of(call.args[0]), next(tensors_in(call.result))
        if not addends:
            return {}
        if call.name == "mean":
            shape, dims = call.args[0].shape, call.args[1]
            kept = [d % len(shape) for d in dims]
        elif call.name.startswith(("avg", "_adaptive")):
            if call.name.startswith("avg") and any(call.args[3] if len(call.args) > 3 else ()):
                raise ValueError  # zeros around it are not the same
            kept = list(
                range(call.args[0].dim() - (3 if "3d" in call.name else 2), call.args[0].dim())
            )
        else:
            raise ValueError
        found = list[Addend]()
        for each in addends:
            first = each.entries
            for dim in kept:
                first = first.narrow(dim, 0, 1)
            if bool((each.entries != first).any()):
                raise ValueError
            shaped = first if first.dim() == out.dim() else first.reshape(out.shape)
            found.append(Addend(each.adder, shaped.expand(out.shape), each.factor))
        return {key_of(out): tuple(found)}

    def product(self, known: Known, call: Call) -> dict[Key, tuple[Addend, ...]]:
        """A map, or shares of a whole that all add up to one."""
        args = list(call.args)
        bias = args.pop(0) if call.name in ("addmm", "baddbmm") else None
        (one, other), out = args[:2], call.result
        terms = [(self._terms(known, bias), 1.0)]
        if known.is_entries(other) and known.entries[key_of(other)].dim() == 2:
            made = self._mapped(self._of(one), known.entries[key_of(other)].mT, one, 1)
            terms.append((self._placed(made, out, 1), 1.0))
        elif known.is_entries(one) and known.entries[key_of(one)].dim() == 2:
            made = self._mapped(self._of(other), known.entries[key_of(one)], other, 0)
            terms.append((self._placed(made, out, 0), 1.0))
        elif key_of(one) in self._shares and not self._of(one):
            terms.append((self._averaged(self._of(other), out), 1.0))
        else:
            self._read(self._of(one))
            self._read(self._of(other))
        return self._gathered(out, terms)

    def _averaged(self, addends: tuple[Addend, ...], out: Tensor) -> tuple[Addend, ...]:
        for each in addends:
            if bool((each.entries != each.entries.narrow(-2, 0, 1)).any()):
                raise ValueError
        return tuple(
            Addend(a.adder, a.entries.narrow(-2, 0, 1).expand(out.shape), a.factor) for a in addends
        )

    def _mapped(
        self, addends: tuple[Addend, ...], weights: Tensor, tensor: Tensor, dim: int
    ) -> Tensor | None:
        """A map reads a tensor: the entries of what comes of a constant, output by output."""
        if not addends:
            return None
        shape = [1] * tensor.dim()
        shape[dim] = -1
        inputs = torch.arange(tensor.shape[dim], device="cpu").view(shape).expand(tensor.shape)
        return self._made_of(Reading(addends, weights, inputs))

    def _made_of(self, reading: Reading) -> Tensor:
        assert reading.weights is not None
        made = torch.arange(self._made, self._made + len(reading.weights), device="cpu")
        self._made += len(made)
        self.adders.append(Adder(made_by=len(self.readings)))
        self.readings.append(reading)
        return made

    def _placed(self, made: Tensor | None, out: Tensor, dim: int) -> tuple[Addend, ...]:
        if made is None:
            return ()
        shape = [1] * out.dim()
        shape[dim] = -1
        return (Addend(len(self.adders) - 1, made.view(shape).expand(out.shape)),)

    def convolution(self, known: Known, call: Call) -> dict[Key, tuple[Addend, ...]]:
        """A map whose weights add up over its window, where no zeros are around."""
        tensor, weight, bias = call.args[:3]
        padding, transposed, groups = call.args[4], call.args[6], call.args[8]
        terms = [(self._by_channel(known, bias, call.result), 1.0)]
        addends = self._of(tensor)
        if addends and (any(padding) or transposed or not known.is_entries(weight)):
            self._read(addends)
        elif addends:
            made = self._mapped(addends, _whole(known.entries[key_of(weight)], groups), tensor, 1)
            terms.append((self._placed(made, call.result, 1), 1.0))
        return self._gathered(call.result, terms)

    def _by_channel(self, known: Known, bias: Any, out: Tensor) -> tuple[Addend, ...]:
        if not known.is_entries(bias):
            return ()
        shape = (1, -1, *(1,) * (out.dim() - 2))
        one = self._parameter(known.entries[key_of(bias)])
        return (Addend(one.adder, one.entries.view(shape).expand(out.shape)),)

    def looked_up(self, known: Known, call: Call) -> dict[Key, tuple[Addend, ...]]:
        """Rows of a table, for which its first stands."""
        if not known.is_entries(call.args[0]):
            self._read(self._of(call.args[0]))
            return {}
        table = known.entries[key_of(call.args[0])]
        entries = table[0].expand(call.result.shape)
        padding = call.args[2] if len(call.args) > 2 else -1
        found = self._parameter(table, is_table=True, is_padded=padding >= 0)
        return {key_of(call.result): (Addend(found.adder, entries),)}

    def normed(self, known: Known, call: Call) -> dict[Key, tuple[Addend, ...]]:
        """Its bias is added; of the fixed statistics of batch norm more is known."""
        out = next(tensors_in(call.result))
        bias = call.args[2] if "batch" in call.name or "group" in call.name else None
        if call.name == "native_layer_norm" and known.is_entries(call.args[3]):
            one = self._parameter(known.entries[key_of(call.args[3])])
            self._read(self._of(call.args[0]))
            return {key_of(out): (Addend(one.adder, one.entries.expand(out.shape)),)}
        terms = [(self._by_channel(known, bias, out), 1.0)]
        addends = self._of(call.args[0])
        fixed = statistics(call) if "batch" in call.name else None
        if addends and fixed is not None and known.is_entries(call.args[1]):
            gains = known.entries[key_of(call.args[1])]
            shape = (1, -1, *(1,) * (out.dim() - 2))
            inputs = torch.arange(len(gains), device="cpu").view(shape).expand(out.shape)
            made = self._made_of(Reading(addends, gains[:, None], inputs, fixed[1].reciprocal()))
            terms.append((self._placed(made, out, 1), 1.0))
        else:
            self._read(addends)
        return self._gathered(out, terms)


def distinct_places(*tensors: Tensor) -> list[np.ndarray]:
    """The numbers of tensors of one shape, flat, without dimensions along which all repeat."""
    for dim in range(tensors[0].dim()):
        if tensors[0].shape[dim] and all(tensor.stride(dim) == 0 for tensor in tensors):
            tensors = tuple(tensor.narrow(dim, 0, 1) for tensor in tensors)
    return [tensor.numpy().ravel() for tensor in tensors]


def _whole(weights: Tensor, groups: int) -> Tensor:
    """A convolution's entries ``(outputs, inputs, ·)``, absent where groups are apart."""
    if groups == 1:
        return weights
    outputs, depth = weights.shape[:2]
    whole = torch.full((outputs, depth * groups, *weights.shape[2:]), ABSENT, device="cpu")
    first = torch.arange(outputs, device="cpu") // (outputs // groups) * depth
    inputs = first[:, None] + torch.arange(depth, device="cpu")
    whole[torch.arange(outputs, device="cpu")[:, None], inputs] = weights
    return whole


_Handler = Callable[[Constants, Known, Call], dict[Key, tuple[Addend, ...]]]


def _silent(_self: Constants, _known: Known, _call: Call) -> dict[Key, tuple[Addend, ...]]:
    return {}


def _table() -> dict[str, _Handler]:
    found: dict[str, _Handler] = {}
    for names, handler in (
        (VIEWS, Constants.view),
        (("add", "sub", "rsub"), Constants.sum),
        (("mul", "div"), Constants.scaled),
        (("cat",), Constants.joined),
        (("mean", *POOLS), Constants.pooled),
        (("mm", "bmm", "addmm", "baddbmm"), Constants.product),
        (("convolution", "_convolution", "mkldnn_convolution"), Constants.convolution),
        (("embedding",), Constants.looked_up),
        (
            (
                "native_layer_norm",
                "native_group_norm",
                "native_batch_norm",
                "_native_batch_norm_legit",
                "cudnn_batch_norm",
            ),
            Constants.normed,
        ),
        (
            tuple(n for n in SILENT if n.startswith(("empty", "zeros", "ones", "new_", "is_"))),
            _silent,
        ),
    ):
        found |= dict.fromkeys(names, handler)
    return found


_HANDLERS = _table()
