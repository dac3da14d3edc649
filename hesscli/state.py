"""What work under way leaves behind for another process to go on from.

A state is a dictionary of plain values, lists and dictionaries of them, arrays, tensors, and
:class:`Rows`. It is given by reference, as torch's optimizers give theirs: what is made of it must
be made before the work goes on. Who loads it makes copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

State = dict[str, Any]


def bytes_of(state: Any) -> int:
    """What the arrays of a state take, its rows included."""
    match state:
        case dict():
            return sum(map(bytes_of, state.values()))
        case list() | tuple():
            return sum(map(bytes_of, state))
        case Rows():
            return sum(map(bytes_of, state.parts))
    return getattr(state, "nbytes", 0)


class Rows:
    """Rows that stay as they are once they are there: a file of them is only ever added to.

    Args:
        parts: tensors ``(k, d)`` of one type, one below the other.
    """

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def dtype(self) -> Any:
        """Of all of them."""
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all of them as one tensor."""
        return len(self), *self.parts[0].shape[1:]

    def since(self, first: int) -> Iterator[Any]:
        """Blocks of the rows from ``first`` on."""
        for part in self.parts:
            if first < len(part):
                yield part[first:] if first else part
            first = max(first - len(part), 0)

    def copy_to(self, rows: Any) -> None:
        """Write all of them into the first rows of a tensor."""
        start = 0
        for block in self.since(0):
            rows[start : start + len(block)].copy_(block)
            start += len(block)


@dataclass
class Parted:
    """A state's plain values, and its arrays and rows by their places in it."""

    plain: Any = None
    arrays: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Rows] = field(default_factory=dict)

    @classmethod
    def of(cls, state: Any) -> Parted:
        """Take a state apart, by reference."""
        found = cls()
        found.plain = found._part(state, "")
        return found

    @property
    def nbytes(self) -> int:
        """Of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def _part(self, value: Any, place: str) -> Any:
        match value:
            case dict():
                return {name: self._part(each, f"{place}/{name}") for name, each in value.items()}
            case list() | tuple():
                return [self._part(each, f"{place}/{i}") for i, each in enumerate(value)]
            case Rows():
                self.rows[place] = value
                return {"@rows": place}
            case Tensor():
                self.arrays[place] = value
                return {"@tensor": place}
            case np.ndarray():
                self.arrays[place] = torch.from_numpy(np.ascontiguousarray(value))
                return {"@array": place}
            case np.generic():
                return value.item()
        return value


def joined(plain: Any, arrays: Mapping[str, Tensor], rows: Mapping[str, Rows]) -> Any:
    """The state that was taken apart."""
    match plain:
        case {"@rows": place}:
            return rows[place]
        case {"@tensor": place}:
            return arrays[place]
        case {"@array": place}:
            return arrays[place].numpy()
        case dict():
            return {name: joined(each, arrays, rows) for name, each in plain.items()}
        case list():
            return [joined(each, arrays, rows) for each in plain]
    return plain


class Saved(Protocol):
    """A part of some work that has a state of its own."""

    def state_dict(self) -> State:
        """All there is to go on from, by reference, whatever step came last."""

    def load_state_dict(self, state: State) -> None:
        """Be where another was that was made in the same way."""


class Stateful(Saved, Protocol):
    """Work whose state can be saved between two of its steps."""

    @property
    def lasting(self) -> bool:
        """Whether more can be asked of it once it has ended, to a smaller error."""


class Joinable(Stateful, Protocol):
    """Work that can be the sum of what others have done of it, each another part."""

    def join(self, state: State) -> None:
        """Add what another has done; whose parts join takes no steps of its own."""


class Timed(Protocol):
    """What knows how long it has been."""

    earlier: float
    """Seconds that were taken before this process."""

    @property
    def seconds(self) -> float:
        """All of them."""
