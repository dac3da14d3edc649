"""Which of the tensors in a ``torch.save`` file are the model's weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from hesscli.errors import InputError, nearest

Place = tuple[str, ...]

_USUAL_NAMES = frozenset(
    {"model", "model_state", "model_state_dict", "module", "net", "net_state_dict", "network"}
    | {"parameters", "params", "state", "state_dict", "weights"}
)
AVERAGED = re.compile(r"(^|[_.-])(ema|swa|avg|average|averaged|polyak)([_.-]|$)", re.IGNORECASE)
_BESIDE_MODEL = re.compile(r"optim|sched|scaler|rng|_extra_state$", re.IGNORECASE)
_DEEPEST = 3
_MOST_NAMED = 5


@dataclass(frozen=True)
class Found:
    """The weights of a checkpoint, and the module itself where the file carried one."""

    weights: Mapping[str, Tensor]
    module: nn.Module | None = None
    notes: tuple[str, ...] = ()

    def noted(self, notes: Sequence[str]) -> Found:
        """The same with more notes, which come first."""
        return replace(self, notes=(*notes, *self.notes))


class SeveralSetsError(InputError):
    """A file holds several sets of weights, and none of them alone can be meant."""

    def __init__(self, what: str, path: Path, names: Sequence[str]) -> None:
        lines = ", ".join(names[:_MOST_NAMED])
        hint = f"name the one that you mean at the top of the spec: {key_line(names[-1])}"
        super().__init__(what, f"{path}: {lines}", hint)
        self.names = tuple(names)


def key_line(name: str) -> str:
    """The line of a spec that chooses a set of weights."""
    return f"checkpoint_keys = {{ key = {json.dumps(name, ensure_ascii=False)} }}"


def find_weights(payload: object, path: Path, key: str | None = None) -> Found:
    """Pick the model out of what a file held: alone, or nested beside optimizer and settings.

    An average of the weights is another model: it is never chosen in place of the plain one, but
    by its ``key``.

    Raises:
        SeveralSetsError: it cannot be known which set is meant.
        InputError: there is none, or none at ``key``.
    """
    places = _places(payload, (), set())
    averaged = [place for place in places if any(AVERAGED.search(name) for name in place)]
    plain = {place: held for place, held in places.items() if place not in averaged}
    chosen = _choose(plain, averaged, path) if key is None else _named(places, key, path)
    held = places[chosen]
    notes = tuple(
        f"averaged weights left aside: {_spell(place)}" for place in averaged if key is None
    )
    if isinstance(held, nn.Module):
        return Found(held.state_dict(), held, notes)
    return Found(held, None, notes)


def _places(
    node: object, place: Place, seen: set[int]
) -> dict[Place, dict[str, Tensor] | nn.Module]:
    """Every set of named tensors, by the keys that lead to it first; optimizers are passed over."""
    if id(node) in seen:  # a pickle may hold one dictionary at many places
        return {}
    seen.add(id(node))
    if isinstance(node, nn.Module):
        return {place: node}
    if not isinstance(node, Mapping) or {"state", "param_groups"} <= node.keys():
        return {}
    named = {key: value for key, value in node.items() if isinstance(key, str)}
    tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
    found: dict[Place, dict[str, Tensor] | nn.Module] = {place: tensors} if tensors else {}
    for key, value in named.items():
        if len(place) < _DEEPEST and not _BESIDE_MODEL.search(key):
            found |= _places(value, (*place, key), seen)
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
    raise SeveralSetsError(what, path, [_spell(place) for place in candidates])


def _named(places: Mapping[Place, object], key: str, path: Path) -> Place:
    """The place that a spec names."""
    spelled = {_spell(place): place for place in places}
    if key in spelled:
        return spelled[key]
    close = nearest(key, spelled)
    got = f"{path}: {', '.join(list(spelled)[:_MOST_NAMED]) or 'no named tensors'}"
    hint = key_line(close) if close else "correct key under [checkpoint_keys] in the spec"
    raise InputError(f"the checkpoint holds no weights at {key!r}", got, hint)


def _within(inner: Place, outer: Place) -> bool:
    return len(inner) > len(outer) and inner[: len(outer)] == outer


def _spell(place: Place) -> str:
    return ".".join(place) or "(top level)"
