"""Measurements, and the one loop that drives them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from hesscli import world
from hesscli.arithmetic import in_full_precision
from hesscli.diagnostics.growth import ExhaustedError
from hesscli.diagnostics.keeping import UNKEPT, Ledger
from hesscli.diagnostics.run import Clock
from hesscli.errors import BudgetError, first_line
from hesscli.memory import is_out_of_memory
from hesscli.meter import Spent
from hesscli.results import Snapshot, Status
from hesscli.state import Stateful


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast this machine is with a matrix: what its parts take over all kept examples.

    It is that of all ranks together, which torchrun has started, where batches are dealt out.

    Attributes:
        gradient: of the loss, in the user's batches.
        graph: that products share, in the same.
        product: on its batches' graphs.
        graph_bytes: that the graphs of all batches hold.
        joint: times as long all this takes where batches are computed together as they best are.
        apart: and where each is computed by itself.
    """

    gradient: Spent
    graph: Spent
    product: Spent
    graph_bytes: int
    joint: float = 1.0
    apart: float = 1.0

    def gradients(self, count: float) -> Spent:
        """Of so many, of batches that are computed together."""
        return self.gradient.times(self.joint * count)

    def products(self, count: float, graphs: float = 1.0) -> Spent:
        """Of so many, of batches that are computed together, on graphs that are made so often."""
        return self._products(count, graphs, self.joint)

    def products_apart(self, count: float, graphs: float = 1.0) -> Spent:
        """The same where each batch's product is wanted."""
        return self._products(count, graphs, self.apart)

    def _products(self, count: float, graphs: float, work: float) -> Spent:
        each = self.graph.times(graphs) + self.product.times(count)
        return replace(each.times(work), products=each.products)


@dataclass(frozen=True, kw_only=True)
class Work:
    """A stage of a measurement, and what it is expected to take.

    Attributes:
        phase: what is done in it.
        spent: all work, in passes over all kept examples and in seconds of this machine.
        num_bytes: that it holds, beside what products and the stages before it do.
        note: what a reader of the plan should know of it.
    """

    phase: str
    spent: Spent
    num_bytes: int = 0
    note: str = ""


class Measurement(Stateful, Protocol):
    """Work that is done step by step, and whose result so far can be read off between two steps."""

    def steps(self) -> Iterator[Snapshot]:
        """The work, to its own end; yields only where what there is so far is whole."""

    @property
    def ready(self) -> bool:
        """Whether there is a result, however rough."""

    def expected(self, pace: Pace) -> Iterable[Work]:
        """Its stages in order, and what they take in all, as far as can be told by now.

        Raises:
            HesscliError: what will end it, where that can be told.
        """


@in_full_precision()
def drive(
    clock: Clock, measurement: Measurement, ledger: Ledger = UNKEPT, ending: float = 0.0
) -> Status | None:
    """Let a measurement take its steps until it ends, time or memory is up, or nobody wants more.

    Args:
        clock: knows what time there is, and whom to tell.
        measurement: goes on from where it was, if it was kept.
        ledger: is told whenever its state is whole. Where Ctrl-C comes within a step, it is not.
        ending: seconds that reading its result off will take.

    Returns:
        None where it came to its own end; else ``budget``, or ``interrupted`` by somebody or by
        want of memory, of which the clock then has a word.

    Raises:
        BudgetError: time was up before there was any result.
        KeyboardInterrupt: nor was there one when nobody wanted more.
        Exception: nor when memory ran out, and of any other kind.
    """
    clock.ending = ending
    ledger.begin(measurement)
    whole = False
    try:
        for snapshot in measurement.steps():
            whole = True
            ledger.step()
            if clock.growth is not None:
                with world.apart():
                    clock.growth.look(snapshot, measurement.state_dict)
            clock.within_budget(snapshot)
            whole = False
    except (BudgetError, KeyboardInterrupt) as end:
        at_budget = isinstance(end, BudgetError)
        if whole or at_budget:  # the clock is looked at where nothing is torn
            ledger.cut(at_budget)
        if not measurement.ready:
            raise
        return "budget" if at_budget else "interrupted"
    except Exception as error:
        if not (is_out_of_memory(error) or isinstance(error, ExhaustedError)):
            raise
        if whole:
            ledger.cut(False)
        if not measurement.ready:
            raise
        why = error.got if isinstance(error, ExhaustedError) else first_line(error)
        clock.cut_by = f"memory ran out, and this is what there was by then: {why}"
        return "interrupted"
    ledger.end()
    return None
