"""What trace, diag and ihvp will cost, from first steps on a few batches."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from scipy.special import ndtri

from hesscli.diagnostics.choice import Choice, Draw, choose
from hesscli.diagnostics.measurement import Tolerance, first_look, miss_probability
from hesscli.diagnostics.predictions import changes_of
from hesscli.diagnostics.run import Run, beyond, peak_bytes
from hesscli.diagnostics.saliency import GROUPS
from hesscli.diagnostics.solve import RELATIVE
from hesscli.diagnostics.window import FEWEST_ROWS, WindowOptions, block_sizes, rows_to_be_had
from hesscli.engines.diagonal import Diagonal
from hesscli.engines.entries import Entries
from hesscli.engines.hutchinson.table import Table
from hesscli.memory import available_bytes
from hesscli.operators.base import Operator
from hesscli.parameters import Parameter
from hesscli.randomness import key
from hesscli.results import PlannedCommand
from hesscli.units import human_bytes

# -- What a tolerance will cost, from an estimator's first steps on a few batches ------------------


PILOT_BATCHES = 16
PILOT_PROBES = 2
_PILOT_SEED = 0x91707
"""The pilot's probes are its own: a plan must not be made of the numbers that it plans."""
_MOST_LOOKS = 40


@dataclass(frozen=True)
class Pilot:
    """An estimator that has seen a few batches, and what that took.

    ``probes`` were drawn for each of them, 0 where the estimator is exact; ``scale`` is how many
    times as large all the data is. ``chosen`` is what proof and choice took in gradients, and
    ``gradients`` what the batches did.
    """

    choice: Choice
    chosen: float
    gradients: float
    seconds: float
    scale: float
    probes: int

    def plan(
        self, command: str, tolerance: Tolerance, miss: float, budget: float | None
    ) -> PlannedCommand:
        """Work, time and memory of ``trace`` or ``diag`` to a tolerance."""
        counts, look, goal = self._counts(command, tolerance, miss)
        times = self.scale * (counts / self.probes if self.probes else 1.0)
        seconds = self.seconds * times
        estimator = self.choice.estimator
        replicates = 0 if command == "trace" else _replicate_bytes(estimator.entries)
        notes = [f"{self.choice.name}: {self.choice.note}", goal.format(look=look)]
        notes.extend(beyond(seconds, budget))
        return PlannedCommand(
            command=command,
            products=float(counts) if estimator.probes is not None else 0.0,
            gradients=self.chosen + self.gradients * times,
            seconds=seconds,
            peak_bytes=peak_bytes(estimator.operator.device) + replicates,
            note="; ".join(notes),
        )

    def _counts(self, command: str, tolerance: Tolerance, miss: float) -> tuple[int, int, str]:
        """Probes of each batch, the look that ends it, and in words what it waits for."""
        if not self.probes:
            return 0, 1, "one pass"
        table = self.choice.estimator.table()
        assert table is not None  # every batch of the pilot has its probes
        error, wanted, goal = (
            self._of_trace(table, tolerance) if command == "trace" else self._of_diagonal(tolerance)
        )
        counts, look = first_look("fresh", len(self.choice.estimator.operator.masses)), 1
        size = self.choice.estimator.parameters.size
        while wanted and look < _MOST_LOOKS:
            quantile = 1.0 if command == "diag" else _normal(miss, look)
            if quantile * error * math.sqrt(self.probes / (counts * self.scale)) <= wanted:
                break
            counts, look = 2 * counts, look + 1
            if self.choice.rethink is not None and counts >= size:
                return size, look, f"{size} unit vectors, which are fewer than its probes"
        return counts, look, f"{goal} expected after {counts} probes a batch"

    def _of_trace(self, table: Table, tolerance: Tolerance) -> tuple[float, float, str]:
        estimator = self.choice.estimator
        estimate = float(table.estimate[-1] + estimator.decay_traces()[-1])
        wanted = tolerance.half_width(estimate)
        return math.sqrt(float(table.within.value[-1])), wanted, f"± {wanted:.3g}"

    def _of_diagonal(self, tolerance: Tolerance) -> tuple[float, float, str]:
        found: Diagonal = self.choice.estimator.diagonal(1.0)
        norm = found.squared_norm().estimate ** 0.5
        wanted = max(tolerance.relative or 0.0, (tolerance.absolute or 0.0) / norm if norm else 0.0)
        return found.relative_error(), wanted, f"an error of {wanted:.0%} of the norm"


def run_pilot(run: Run, method: str, seed: int) -> Pilot:
    """One batch of what is exact, else two fresh probes on each of up to sixteen batches."""
    operator, problem = run.operator, run.problem
    draw = Draw(key(_PILOT_SEED, seed), entries=Entries(problem.parameters, problem.device))
    meter, on_step = operator.meter, run.clock.watch("pilot")
    choice = choose(operator, method, replace(draw, batches=1), on_step)
    chosen, probes = meter.gradients, 0
    if not choice.estimator.exact:
        choice = choose(operator, method, replace(draw, batches=PILOT_BATCHES), on_step)
        probes = PILOT_PROBES
    began, before = time.perf_counter(), meter.gradients
    for _ in choice.estimator.extend(max(1, probes)):
        on_step()
    seconds, gradients = time.perf_counter() - began, meter.gradients - before
    counts = problem.data.counts
    seen = sum(counts[i] for i in choice.estimator.indices)
    return Pilot(choice, chosen, gradients, seconds, sum(counts) / seen, probes)


def _replicate_bytes(entries: Entries | None) -> int:
    """Of a source with noise within batches and between them, and a round under way."""
    if entries is None:
        return 0
    return 2 * entries.parameters.size * (8 + 8 * entries.replicates)


def _normal(miss: float, look: int) -> float:
    return float(ndtri(1 - miss_probability(miss, look) / 2))


# -- What ``hesscli ihvp`` will take: its window, what is made of it, and time at most -------------


_ROW_GRADIENTS = 4 / 3
_GEMM = 1024
"""Order of the product that is timed."""


def plan_ihvp(
    operator: Operator,
    options: WindowOptions,
    gradient_seconds: float,
    product_seconds: float,
    budget: float | None,
) -> PlannedCommand:
    """Work, time and memory of a sensitivity study in which every batch is seen.

    Args:
        operator: the matrix that predicts losses.
        options: of the window.
        gradient_seconds: of a full-data gradient.
        product_seconds: of a full-data product.
        budget: seconds that the command will be given.
    """
    problem = operator.problem
    size, rows = problem.parameters.size, rows_to_be_had(problem, options)
    largest = max(block_sizes(problem.parameters, options.blocks, rows) or (size,))
    gradients = problem.prove().gradients + _ROW_GRADIENTS * rows / problem.data.count
    products = 1 + len(RELATIVE)
    changes = sum(map(_changes, map(problem.parameters.in_layer, problem.layer_names)))
    graph, each = operator.cost
    gradients += 2 * graph + products * each
    gradients += len(problem.layer_names) * graph + changes * each
    sweeps = 2 + GROUPS + len(RELATIVE)
    inverting = sweeps * 2.0 * rows * min(rows, largest) * size / _rate(problem.device)
    seconds = (
        _ROW_GRADIENTS * rows / problem.data.count * gradient_seconds
        + (products + changes) * product_seconds
        + inverting
    )
    window = rows * size * options.torch_dtype.itemsize
    factors = 8 * size * largest if largest <= rows else 4 * size * rows
    notes = [
        f"{rows} rows take {human_bytes(window)}, what inverts them {human_bytes(factors)}; a copy "
        f"for queries of single elements of the whole matrix {human_bytes(4 * size * rows)} more",
        f"{changes} changes of {len(problem.layer_names)} layers, at most: batches are seen until "
        "all predictions are known to 20%",
    ]
    if rows < FEWEST_ROWS:
        notes.append(f"refused: a ranking takes {FEWEST_ROWS} rows, and {rows} are to be had")
    if options.file is None and window > available_bytes(problem.device):
        notes.append(
            "more than the memory that is free: a smaller --window, --window-dtype "
            "bfloat16 or --window-file FILE"
        )
    notes.extend(beyond(seconds, budget))
    return PlannedCommand(
        command="ihvp",
        products=float(products + changes),
        gradients=gradients,
        seconds=seconds,
        peak_bytes=peak_bytes(problem.device) + factors + (0 if options.file else window),
        note="; ".join(notes),
    )


def _changes(layer: Sequence[Parameter]) -> int:
    """How many changes of a layer are predicted."""
    return len(changes_of(layer, torch.zeros(sum(p.numel for p in layer))))


def _rate(device: torch.device) -> float:
    """Float64 operations in a second, of a matrix product."""
    a = torch.ones(_GEMM, _GEMM, dtype=torch.float64, device=device)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - began)
    return 2.0 * _GEMM**3 / sorted(times)[1]
