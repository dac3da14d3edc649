"""How a loss uses its parameters: which channel of which map each number on its way belongs to.

One forward pass is watched, operation by operation. Each tensor that scales as a whole with a
channel of some map, gain or embedding carries the channels' numbers beside it, and each view of a
parameter its entries' numbers: whatever slices, reshapes and repeats the one does so to the other.
Where a map reads such a tensor, its columns could undo what scales the channel. What comes of it is
a proposal and no more: it is put to the test elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from hesscli.engines.symmetry import maps, pointwise
from hesscli.engines.symmetry.constants import Constants
from hesscli.engines.symmetry.known import Call, Key, Known, key_of, tensors_in
from hesscli.engines.symmetry.seen import Seen
from hesscli.torch_private import TorchDispatchMode

_Value = TypeVar("_Value")


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the channels of a pass, each operation as it runs.

    Args:
        tensors: the parameters.
        offsets: of each in the flat vector.
    """

    def __init__(self, tensors: Sequence[Tensor], offsets: Sequence[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known, self.constants, self._alive = Known(), Constants(), list[Any]()
        self._handlers = pointwise.table() | maps.table()
        for tensor, offset in zip(tensors, offsets, strict=True):
            if tensor.numel():
                entries = torch.arange(offset, offset + tensor.numel(), device="cpu")
                entries = entries.view(tensor.shape)
                self._known.entries[key_of(tensor)] = entries

    @property
    def seen(self) -> Seen:
        """What the pass has shown so far."""
        return self._known.seen

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would import its compiler, two seconds, to keep it away from this class."""
        return False

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ) -> Any:
        kwargs, known = kwargs or {}, self._known
        given = _strided((args, tuple(kwargs.values())))
        keys = [key_of(tensor) for tensor in given]
        matter = any(k in known.entries or k in known.flows or k in known.scores for k in keys)
        is_live = any(k in known.live or k in known.entries for k in keys)
        name = func.overloadpacket.__name__
        in_place = name.endswith("_") and not name.startswith("_")
        name = name.removesuffix("_") if in_place else name
        asked = func, args
        if in_place and name in pointwise.VIEWS:  # whose tensor is no longer as it was
            asked = getattr(torch.ops.aten, name), (args[0].detach(), *args[1:])
        result = func(*args, **kwargs)
        made = _strided(result)
        self._alive.append((given, made))  # or their places would be taken by others
        call = Call(asked[0], name, asked[1], kwargs, result)
        self.constants.follow(known, call, made)
        if matter:
            self._follow(call)
        for key in map(key_of, made):
            if name == "detach" and key in keys:
                continue
            _replace(known.flows, call.flows, key)
            _replace(known.entries, call.entries, key)
            _replace(known.scores, call.scores, key)
            if name not in ("mul", "div"):
                known.normal.pop(key, None)
            if is_live:
                known.live.add(key)
        return result

    def _follow(self, call: Call) -> None:
        """Tell what becomes of channels; where a call is of a form that is not known, nothing."""
        handler = self._handlers.get(call.name, Known.unknown)
        try:
            handler(self._known, call)
        except (IndexError, RuntimeError, TypeError, ValueError):
            call.flows.clear()
            call.entries.clear()
            call.scores.clear()
            self._known.unknown(call)


def _strided(tree: Any) -> list[Tensor]:
    """The tensors of a tree that have a place each."""
    return [tensor for tensor in tensors_in(tree) if tensor.layout == torch.strided]


def _replace(kept: dict[Key, _Value], found: dict[Key, _Value], key: Key) -> None:
    """Let a place have what was found of it, and nothing of what was there before."""
    kept.pop(key, None)
    if key in found:
        kept[key] = found[key]
