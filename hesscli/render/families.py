"""Families of symmetries as tables and pictures name them: the kind, and the layers acted on."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from hesscli.render import words

_INDENT = "  "
"""Of further lines."""


def family_label(kind: str, layers: Sequence[str], width: int) -> str:
    """``kind: layers``, where that is too long without some modules that layers lie in.

    Args:
        kind: of the family; it is cut last of all.
        layers: that it acts on, in order.
        width: characters that there is room for.
    """
    labels = (f"{kind}: {each}" for each in _ever_shorter(layers))
    fitting = (label for label in labels if len(label) <= width)
    return next(fitting, words.shorten(kind, width))


def family_lines(kind: str, layers: Sequence[str], width: int) -> str:
    """The same on as many lines as it takes, where one has no room for a kind and two layers."""
    label = family_label(kind, layers, width)
    is_counted = len(layers) == 2 and label.endswith("2 layers")
    if label.startswith(f"{kind}:") and not is_counted:
        return label
    wrap = textwrap.TextWrapper(width, subsequent_indent=_INDENT, break_on_hyphens=False)
    first = wrap.wrap(f"{kind}:")
    wrap.initial_indent = _INDENT
    return "\n".join(first + wrap.wrap(layers_label(layers, width - len(_INDENT))))


def layers_label(layers: Sequence[str], width: int) -> str:
    """Layers, without some modules that they lie in where that is too long."""
    labels = list(_ever_shorter(layers))
    return next((label for label in labels if len(label) <= width), labels[-1])


@dataclass
class _Layer:
    """A layer's name, with a gap between the modules that are left of it."""

    head: list[str]
    tail: list[str]
    has_gap: bool = False

    def __str__(self) -> str:
        between = "…" if self.has_gap else "." if self.head else ""
        return ".".join(self.head) + between + ".".join(self.tail)

    @property
    def can_be_cut(self) -> bool:
        return bool(self.head) or len(self.tail) > 1

    def cut(self) -> None:
        """Leave one more module out, of the first the last."""
        if self.head:
            self.head.pop()
        else:
            self.tail.pop(0)
        self.has_gap = True


def _ever_shorter(layers: Sequence[str]) -> Iterator[str]:
    """Layers, where they are more than two the first and the last; in the end their number."""
    many = f" ({words.count(len(layers), 'layer')})" if len(layers) > 2 else ""
    ends = [
        _Layer([], name.split(".")) for name in (layers if not many else layers[:: len(layers) - 1])
    ]
    between = " … " if many else ", "
    yield between.join(map(str, ends)) + many
    if len(ends) == 2 and not many:
        modules = zip(ends[0].tail[:-1], ends[1].tail[:-1], strict=False)
        for _ in takewhile(lambda pair: pair[0] == pair[1], list(modules)):
            ends[1].cut()
        yield between.join(map(str, ends))
    for end in ends:
        if not end.has_gap:
            end.head, end.tail = end.tail[:-1], end.tail[-1:]
    while left := [end for end in ends if end.can_be_cut]:
        max(left, key=lambda end: len(str(end))).cut()
        yield between.join(map(str, ends)) + many
    if len(layers) > 1:
        yield words.count(len(layers), "layer")
