"""Which of the tensors in a ``torch.save`` file are the model's weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from hesscli.errors import InputError

Place = tuple[str, ...]

_USUAL_NAMES = frozenset(
    {"model", "model_state", "model_state_dict", "module", "net", "net_state_dict", "network"}
    | {"parameters", "params", "state", "state_dict", "weights"}
)
_AVERAGED = re.compile(r"(^|[_.-])(ema|swa|avg|average|averaged|polyak)([_.-]|$)", re.IGNORECASE)
_BESIDE_MODEL = re.compile(r"optim|sched|scaler|rng|_extra_state$", re.IGNORECASE)
_DEEPEST = 3


@dataclass(frozen=True)
class Found:
    """The weights of a checkpoint, and the module itself where the file carried one."""

    weights: Mapping[str, Tensor]
    module: nn.Module | None = None
    notes: tuple[str, ...] = ()


def find_weights(payload: object, path: Path) -> Found:
    """Pick the model out of what a file held: alone, or nested beside optimizer and settings.

    An average of the weights is another model: it is never chosen in place of the plain one.
    """
    places = _places(payload, ())
    averaged = [place for place in places if any(_AVERAGED.search(name) for name in place)]
    plain = {place: held for place, held in places.items() if place not in averaged}
    chosen = _choose(plain, averaged, path)
    held = plain[chosen]
    notes = tuple(f"averaged weights left aside: {_spell(place)}" for place in averaged)
    if isinstance(held, nn.Module):
        return Found(held.state_dict(), held, notes)
    return Found(held, None, notes)


def _places(node: object, place: Place) -> dict[Place, dict[str, Tensor] | nn.Module]:
    """Every set of named tensors, by the keys that lead to it; optimizers are passed over."""
    if isinstance(node, nn.Module):
        return {place: node}
    if not isinstance(node, Mapping) or {"state", "param_groups"} <= node.keys():
        return {}
    named = {key: value for key, value in node.items() if isinstance(key, str)}
    tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
    found: dict[Place, dict[str, Tensor] | nn.Module] = {place: tensors} if tensors else {}
    for key, value in named.items():
        if len(place) < _DEEPEST and not _BESIDE_MODEL.search(key):
            found |= _places(value, (*place, key))
    return found


def _choose(plain: Mapping[Place, object], averaged: list[Place], path: Path) -> Place:
    """The one place that can be meant; tensors beside a nested model are not part of it."""
    usual = [place for place in plain if place and _USUAL_NAMES.issuperset(place)]
    inner = [place for place in usual if not any(_within(other, place) for other in usual)]
    candidates = inner or list(plain)
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        what = "the checkpoint holds several sets of weights"
    elif averaged:
        what, candidates = "the checkpoint holds only averaged weights", averaged
    else:
        hint = "save model.state_dict() with torch.save"
        raise InputError("the checkpoint holds no named tensors", str(path), hint)
    names = ", ".join(map(_spell, candidates))
    keys = "".join(f"[{key!r}]" for key in candidates[-1])
    hint = f"save the one that you mean: torch.save(torch.load({path.name!r}){keys}, 'weights.pt')"
    raise InputError(what, f"{path}: {names}", hint)


def _within(inner: Place, outer: Place) -> bool:
    return len(inner) > len(outer) and inner[: len(outer)] == outer


def _spell(place: Place) -> str:
    return ".".join(place) or "(top level)"
