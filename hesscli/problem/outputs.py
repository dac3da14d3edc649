"""What a model returns: the tensor that a named loss reads, or a whole tree as one row an example.

A loss of one's own gets what the model returned, be it a tensor, a tuple, a dict, a data class or
an object that holds some. Gauss-Newton matrices and per-example gradients want one tensor with
one row an example, so the tensors of a tree are laid side by side, and taken apart again when
the loss reads them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hesscli.errors import InputError, UsageError
from hesscli.problem.batches import shape_of
from hesscli.problem.precision import read_by_loss

_PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)
"""Leaves beside tensors that may be kept: they say the same of every batch, or are noticed."""


class HiddenOutputsError(UsageError):
    """Outputs that cannot be read as one row an example; ``got`` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            "the model's outputs are not one row an example",
            reason,
            "--matrix hessian, which needs no outputs",
        )


def named_output(raw: Any, output: str | int | None = None) -> Tensor:
    """The tensor that a named loss reads.

    Args:
        raw: what the model returned.
        output: a key, attribute or index of it; default the only floating tensor that there is,
            else ``.logits``.

    Raises:
        InputError: there is no such tensor, or there are several and none is named.
    """
    return read_by_loss(_named(raw, output))


def _named(raw: Any, output: str | int | None) -> Tensor:
    if output is not None:
        return _only(_chosen(raw, output), f"output {output!r}", raw)
    if isinstance(raw, Tensor):
        return raw
    if len(_floating(raw)) > 1:
        logits = raw.get("logits") if isinstance(raw, Mapping) else getattr(raw, "logits", None)
        if isinstance(logits, Tensor):
            return logits
    return _only(raw, f"the model's output, a {type(raw).__name__}", raw)


def _chosen(raw: Any, output: str | int) -> Any:
    """A key, attribute or index of what the model returned."""
    if isinstance(raw, Tensor):
        raise InputError(
            f"the model has no output {output!r}",
            f"a single tensor {tuple(raw.shape)}",
            "no `output`: the loss reads the tensor that there is",
        )
    if isinstance(raw, Mapping) and output in raw:
        return raw[output]
    if isinstance(output, str) and hasattr(raw, output):
        return getattr(raw, output)
    if isinstance(output, int) and not isinstance(raw, Mapping):
        try:
            return raw[output]
        except (IndexError, KeyError, TypeError):
            pass
    raise InputError(f"the model has no output {output!r}", _told(raw), _line(raw))


def _only(part: Any, what: str, raw: Any) -> Tensor:
    """The one floating tensor in a part of the output."""
    if isinstance(part, Tensor):
        return part
    found = _floating(part)
    if not found:
        raise InputError(
            f"{what} holds no tensor",
            _told(raw),
            "a model that returns a tensor or .logits, or [loss] step = 'module:function'",
        )
    if len(found) > 1:
        what = f"a named loss reads one tensor, and there are several outputs in {what}"
        raise InputError(what, _told(raw), _line(raw))
    return next(iter(found.values()))


def _told(raw: Any) -> str:
    """An output's tensors for people: "a tuple of 2 outputs: 0 (N, 4), 1 (N, 2)"."""
    tensors = _floating(raw)
    count = max((len(tensor) for tensor in tensors.values() if tensor.dim()), default=0)
    found = [f"{place} {shape_of(tensor, count)}" for place, tensor in tensors.items()]
    more = ", ..." if len(found) > 6 else ""
    return f"a {type(raw).__name__} of {len(found)} outputs: {', '.join(found[:6])}{more}"


def _line(raw: Any) -> str:
    """What to write, with the first place there is."""
    top = next(iter(_floating(raw)), "logits").split(".")[0]
    value = top if top.isdecimal() else f'"{top}"'
    return (
        f"output = {value} under [model], or Problem(..., output={value}), or another of these; "
        "a [loss] factory reads them all"
    )


# -- trees -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Slot:
    """Where a tensor was."""

    index: int


def _children(node: Any) -> dict[str, Any]:
    """What a container holds by its place; nothing where it is a leaf."""
    if isinstance(node, (Tensor, _Slot, nn.Module, type)):
        return {}
    if isinstance(node, Mapping):
        return {str(key): value for key, value in node.items()}
    if isinstance(node, (tuple, list)):
        return {str(index): value for index, value in enumerate(node)}
    if is_dataclass(node):
        return {field.name: getattr(node, field.name) for field in fields(node)}
    return dict(getattr(node, "__dict__", {}))


def _leaves(node: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves with their places, such as "hidden.0"; what is empty is a leaf too."""
    children = _children(node)
    if not children:
        yield place, node
    for name, child in children.items():
        yield from _leaves(child, f"{place}.{name}" if place else name)


def _floating(raw: Any) -> dict[str, Tensor]:
    """The floating tensors by their places."""
    tensors = {place: leaf for place, leaf in _leaves(raw) if isinstance(leaf, Tensor)}
    return {place: tensor for place, tensor in tensors.items() if tensor.is_floating_point()}


def _mapped(function: Callable[[Any], Any], node: Any) -> Any:
    """The same tree with ``function`` applied to tensors and slots; what holds them is copied."""
    if isinstance(node, (Tensor, _Slot)):
        return function(node)
    if not any(isinstance(leaf, (Tensor, _Slot)) for _, leaf in _leaves(node)):
        return node
    if isinstance(node, (tuple, list)):
        make = getattr(node, "_make", type(node))
        return make([_mapped(function, value) for value in node])
    made = copy.copy(node)
    if isinstance(node, Mapping):
        for key, value in node.items():
            made[key] = _mapped(function, value)
        return made
    for name, value in _children(node).items():
        object.__setattr__(made, name, _mapped(function, value))
    return made


# -- rows ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How the tensors of a tree lie side by side in one row an example.

    ``shapes`` and ``dtypes`` are theirs, without the examples; ``plain`` is what the tree holds
    besides.
    """

    template: Any
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    plain: tuple[tuple[str, Any], ...]

    def is_like(self, other: Layout) -> bool:
        """Whether rows of the one may be read as those of the other, but for their types."""
        return (self.shapes, self.plain) == (other.shapes, other.plain)

    def tree(self, rows: Tensor) -> Any:
        """What the model returned, from its rows ``(N, M)``."""
        pieces = torch.split(rows, [shape.numel() for shape in self.shapes], 1)

        def filled(slot: _Slot) -> Tensor:
            piece: Tensor = pieces[slot.index].reshape(len(rows), *self.shapes[slot.index])
            dtype = self.dtypes[slot.index]
            return piece.to(dtype) if dtype.is_floating_point else piece.detach().round().to(dtype)

        return _mapped(filled, self.template)


def rows_of(raw: Any, count: int) -> tuple[Tensor, Layout]:
    """A tree's tensors side by side, ``(N, M)``, and how to read them.

    Whole numbers and masks go along as floating numbers that have no slope.

    Args:
        raw: what the model returned.
        count: N, the examples of the batch.

    Raises:
        HiddenOutputsError: a tensor has not one row an example, or the tree holds what is
            neither a tensor nor a plain value.
    """
    try:
        leaves = list(_leaves(raw))
        tensors = [leaf for _, leaf in leaves if isinstance(leaf, Tensor)]
        slots = map(_Slot, range(len(tensors)))
        template = _mapped(lambda _: next(slots), raw)
    except Exception as error:  # of any kind: a container that holds itself or takes no other value
        raise HiddenOutputsError(f"a {type(raw).__name__} ({type(error).__name__})") from None
    kinds = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
    if not kinds:
        raise HiddenOutputsError(f"a {type(raw).__name__} without floating tensors")
    widest = max(kinds, key=lambda dtype: torch.finfo(dtype).bits)
    for place, leaf in leaves:
        if (reason := _why_no_row(leaf, count, widest)) is not None:
            raise HiddenOutputsError(f"output {place} is {reason}")
    return (
        torch.cat([tensor.reshape(count, -1).to(widest) for tensor in tensors], 1),
        Layout(
            template,
            tuple(tensor.shape[1:] for tensor in tensors),
            tuple(tensor.dtype for tensor in tensors),
            tuple((place, leaf) for place, leaf in leaves if not isinstance(leaf, Tensor)),
        ),
    )


def _why_no_row(leaf: Any, count: int, widest: torch.dtype) -> str | None:
    """Why a leaf cannot lie in rows of floating numbers, or None where it can."""
    if not isinstance(leaf, Tensor):
        empty = isinstance(leaf, (tuple, list, Mapping))
        return None if empty or isinstance(leaf, _PLAIN) else f"a {type(leaf).__name__}"
    if leaf.dim() == 0 or len(leaf) != count:
        return f"of shape {tuple(leaf.shape)} for {count} examples"
    if leaf.is_complex() or leaf.is_sparse:
        return f"of type {leaf.dtype}, {leaf.layout}"
    whole = leaf.dtype in (torch.int32, torch.int64) and leaf.numel() > 0
    if whole and float(leaf.abs().max()) > 1 / torch.finfo(widest).eps:
        return f"of numbers too large for {widest}"
    return None
