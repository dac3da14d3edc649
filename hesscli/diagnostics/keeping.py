"""What a run hands over to be kept, so that another can go on from it; who keeps it is not here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

from hesscli.meter import Meter
from hesscli.state import State, Stateful, Timed


class Kept:
    """Work whose state is some of its attributes, and over once it has ended."""

    kept: ClassVar[tuple[str, ...]]
    """Their names."""
    lasting = False

    def state_dict(self) -> State:
        """These attributes."""
        return {name: getattr(self, name) for name in self.kept}

    def load_state_dict(self, state: State) -> None:
        """Have those of another."""
        for name in self.kept:
            setattr(self, name, state[name])


class Ledger(Protocol):
    """Where a run is kept."""

    def attach(self, clock: Timed, meter: Meter) -> None:
        """Keep what these say as well, and let them go on from what was kept."""

    def recognise(self, facts: Mapping[str, Any]) -> None:
        """Take note of what the run is of.

        Raises:
            UsageError: what was kept is of another.
        """

    def decided(self, name: str, decide: Callable[[], Any]) -> Any:
        """What was decided before; or it is decided now, as plain values, and kept."""

    def begin(self, work: Stateful) -> None:
        """Keep this work too, and let it go on from what was kept."""

    def step(self) -> None:
        """The work is between two steps."""

    def cut(self, at_budget: bool) -> None:
        """It ends here, between two steps, with more to do: at its budget, or interrupted."""

    def end(self) -> None:
        """It has come to its own end."""

    def close(self) -> None:
        """So has the run, or it was cut."""


class Unkept:
    """Keeps nothing."""

    def attach(self, _clock: Timed, _meter: Meter) -> None:
        """Nothing was kept."""

    def recognise(self, _facts: Mapping[str, Any]) -> None:
        """Any will do."""

    def decided(self, _name: str, decide: Callable[[], Any]) -> Any:
        """It is decided now."""
        return decide()

    def begin(self, _work: Stateful) -> None:
        """It begins anew."""

    def step(self) -> None:
        """Nothing is to be done."""

    end = close = step

    def cut(self, _at_budget: bool) -> None:
        """Nothing is written."""


UNKEPT = Unkept()
