"""A window of a problem's gradients: which rows, how many, damped by how much, in which blocks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hesscli import world
from hesscli.diagnostics.measurement import Pace, Work
from hesscli.engines.mfac import GradientWindow, ShardedWindow, StaticFisher
from hesscli.engines.mfac.static import Sizes, kept_bytes
from hesscli.engines.mfac.work import InverseWork, stored
from hesscli.errors import UnsoundError, UsageError
from hesscli.memory import available_bytes
from hesscli.meter import Algebra, OnStep, Spent
from hesscli.operators.base import Operator
from hesscli.operators.per_example.rows import Rows, fitting_kind
from hesscli.parameters import Parameters
from hesscli.problem.problem import Problem
from hesscli.results import LOW_LEVERAGE, Snapshot, WindowReport
from hesscli.units import human_bytes
from hesscli.vocabulary import WINDOW_DTYPES, RowKind, WindowBlocks

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in WINDOW_DTYPES}
USUAL_ROWS = 512
FEWEST_ROWS = 16
_USUAL_BYTES = 3 << 29
"""That a window takes unless more are asked for: what it costs grows with its rows."""
_BLOCKS_IN_WINDOW = 4
"""Rows for each entry of a block, at least: below that its inverse is mostly noise."""


@dataclass(frozen=True)
class WindowOptions:
    """How a window is to be made.

    Args:
        rows: ``auto``, ``sampled``, ``example`` or ``microbatch:N``; ``auto`` is ``sampled``
            wherever the loss allows it.
        size: number of rows; None for 512, or as many as fit in 1.5 GiB and in a quarter of the
            free memory of each rank, at least 16.
        dtype: that rows are kept in: ``float32``, ``bfloat16`` or ``float64``.
        file: where rows are kept, in place of memory.
        blocks: ``auto`` (at most a quarter as many entries as there are rows), ``whole``,
            ``layer`` or a number of entries.
        damping: λ in units of tr F̂ / d, or in its own.
        absolute: whether it is in its own.
    """

    rows: str = "auto"
    size: int | None = None
    dtype: str = "float32"
    file: Path | None = None
    blocks: str = "auto"
    damping: float = 1e-3
    absolute: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.damping < math.inf:
            raise UsageError(
                "--damping must be above 0", f"{self.damping}", "--damping 1e-3 or abs:1e-5"
            )
        if self.dtype not in DTYPES:
            raise UsageError("no dtype for a window", repr(self.dtype), " or ".join(DTYPES))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type by that name."""
        return DTYPES[self.dtype]

    def count(self, problem: Problem) -> int:
        """Rows to make room for."""
        if self.size is not None:
            return self.size
        room = available_bytes(problem.device) // 4
        row = problem.parameters.size * self.torch_dtype.itemsize
        most = world.size() * min(room, _USUAL_BYTES) // row
        return USUAL_ROWS if self.file else max(FEWEST_ROWS, min(USUAL_ROWS, most))

    def empty(self, problem: Problem) -> GradientWindow:
        """A window with no rows yet; of many ranks each has some of its columns.

        Raises:
            UsageError: it is larger than memory or disk.
        """
        kind = ShardedWindow if world.size() > 1 else GradientWindow
        return kind(
            self.count(problem),
            problem.parameters.size,
            dtype=self.torch_dtype,
            path=self.file,
            device=problem.device,
        )


@dataclass(frozen=True)
class Collected:
    """A window and the matrix that it stands for; ``reason`` is why its rows are no better."""

    window: GradientWindow
    fisher: StaticFisher
    sizes: Sizes | None
    kind: RowKind
    reason: str
    options: WindowOptions
    cut_short: bool = False

    @property
    def damping_unit(self) -> float:
        """Tr F̂ / d."""
        return self.window.mean_square() / self.window.columns

    def reached(self, places: Sequence[slice]) -> list[bool]:
        """Whether any row is anything but zero in some ranges of all columns."""
        window = self.window
        tiles = ((tile for _, tile in window.tiles(window.own(place))) for place in places)
        found = torch.tensor(
            [any(bool(tile.any()) for tile in each) for each in tiles], device="cpu"
        ).double()
        return [bool(each) for each in window.added_up(found)]

    def report(self) -> WindowReport:
        """What the window is, as results have it."""
        file = self.options.file
        return WindowReport(
            rows=self.window.count,
            row_kind=str(self.kind),
            damping=self.fisher.damping,
            relative_damping=self.fisher.damping / self.damping_unit if self.damping_unit else 0.0,
            blocks=self.options.blocks,
            largest_block=self.window.columns if self.sizes is None else int(self.sizes.max()),
            dtype=self.options.dtype,
            num_bytes=self.window.capacity * self.window.columns * self.window.dtype.itemsize,
            file=None if file is None else str(file),
        )


def collect(
    operator: Operator,
    window: GradientWindow,
    options: WindowOptions,
    seed: int,
    enough: Callable[[int], bool],
    watch: Callable[[str], OnStep],
    paid: int = 0,
    cut_short: bool = False,
) -> Generator[Snapshot, None, Collected]:
    """Fill a window with a problem's gradients, and make it the matrix that it stands for.

    Args:
        operator: of the problem whose gradients they are; its meter counts them.
        window: with room for them, and the first of them where they were collected before.
        options: which and how many.
        seed: of sampled rows.
        enough: whether so many rows must do, for want of time.
        watch: of a phase makes what looks at the time between its steps.
        paid: how many rows were counted, though the window may not have them any more.
        cut_short: no more rows are to be collected, since there was no time for them.

    Raises:
        UsageError: rows or blocks that cannot be.
        UnsoundError: all gradients are zero, or examples depend on each other.
    """
    problem = operator.problem
    kind, reason = kind_of(problem, options.rows)
    source, wanted = Rows(problem, kind, seed, operator.meter), window.capacity

    def told() -> Snapshot:
        done, total = float(window.count), float(wanted)
        return Snapshot(phase="collecting gradients", done=done, total=total)

    with operator.meter.uncounted():
        for block in source.take(paid, window.count):
            window.extend(block)
            yield told()
    for block in source.take(paid if cut_short else wanted, window.count):
        window.extend(block)
        operator.meter.add(problem.algebra(stored(len(block), window.columns, window.dtype)))
        operator.meter.keep()
        yield told()
        if cut_short := window.count < wanted and enough(window.count):
            break
    damping = damping_of(window, options)
    sizes = block_sizes(layer_sizes(problem.parameters), options.blocks, window.count)
    fisher = StaticFisher(window, damping, blocks=sizes, on_step=watch("inverting"))
    return Collected(window, fisher, sizes, kind, reason, options, cut_short)


def rows_to_be_had(problem: Problem, options: WindowOptions) -> int:
    """As many rows as the window has room for, or as the data give.

    Raises:
        UsageError: rows that cannot be.
    """
    kind, _ = kind_of(problem, options.rows)
    return int(min(options.count(problem), Rows(problem, kind).available))


_TIMED_NUMBERS = 1 << 20
"""Numbers of a window whose inversion is timed, at least a block of them."""


def collecting(problem: Problem, options: WindowOptions, rows: int, pace: Pace) -> Work:
    """So many rows of a window."""
    kind, _ = kind_of(problem, options.rows)
    examples = rows * (kind.size if kind.name == "microbatch" else 1)
    storing = problem.algebra(stored(rows, problem.parameters.size, options.torch_dtype))
    held = rows * problem.parameters.size * options.torch_dtype.itemsize
    note = f"{rows} rows take {human_bytes(held)}"
    if (ranks := world.size()) > 1:
        held = -(-held // ranks)
        note += f", {human_bytes(held)} on each of {ranks} ranks"
    return Work(
        phase="collecting gradients",
        spent=pace.gradient.times(examples / problem.data.count).alone() + Spent(gradients=storing),
        num_bytes=0 if options.file else held,
        note=note,
    )


def inverting(problem: Problem, options: WindowOptions, rows: int) -> Work:
    """The inverse of so many rows' matrix, as a part of it is timed."""

    def solve(window: GradientWindow, sizes: Sizes) -> None:
        fisher = StaticFisher(window, 1.0, blocks=sizes)
        fisher.ihvp(torch.ones(window.size, device="cpu"))
        fisher.diagonal()

    work = inverse_work(problem, options, rows)
    held = kept_bytes(work.sizes, rows, world.size())
    taken = work.built + work.first_solved + work.multiplied
    spent = timed_on_columns(problem, options, rows, solve, taken)
    note = f"what inverts them {human_bytes(held)}"
    return Work(phase="inverting", spent=spent, num_bytes=held, note=note)


def inverse_work(problem: Problem, options: WindowOptions, rows: int) -> InverseWork:
    """What the inverse of so many rows' matrix takes."""
    sizes = block_sizes(layer_sizes(problem.parameters), options.blocks, rows)
    sizes = np.array([problem.parameters.size]) if sizes is None else sizes
    kept = kept_bytes(sizes, rows, world.size()) > 0
    return InverseWork(sizes, rows, options.torch_dtype, kept)


def timed_on_columns(
    problem: Problem,
    options: WindowOptions,
    rows: int,
    work: Callable[[GradientWindow, Sizes], None],
    taken: Algebra,
) -> Spent:
    """What something takes with a whole window, by how long it takes with some of its columns.

    Of many ranks each has as many columns as the others.

    Args:
        problem: whose gradients they would be.
        options: of the window.
        rows: of it.
        work: that is timed.
        taken: what it is with the whole window, as a meter counts it.
    """
    size = problem.parameters.size
    sizes = block_sizes(layer_sizes(problem.parameters), options.blocks, rows)
    largest = size if sizes is None else int(sizes.max())
    columns = min(size, max(_TIMED_NUMBERS // rows, min(largest, rows)))
    own = np.full(columns // min(largest, columns), min(largest, columns))
    window = GradientWindow(rows, own.sum(), dtype=options.torch_dtype, device=problem.device)
    window.extend(torch.randn(rows, window.size, device="cpu").to(problem.device))
    began = time.perf_counter()
    work(window, own)
    seconds = (time.perf_counter() - began) * size / (window.size * world.size())
    return Spent(gradients=problem.algebra(taken), seconds=seconds)


def layer_sizes(parameters: Parameters) -> list[int]:
    """Entries of each layer."""
    return [place.stop - place.start for place in parameters.layer_places()]


def block_sizes(layers: Sequence[int], rule: str, rows: int, multiple: int = 1) -> Sizes | None:
    """Sizes of consecutive blocks, none of which reaches beyond a layer; None for a whole one.

    Args:
        layers: entries of each.
        rule: as it is typed.
        rows: of the window.
        multiple: of how many entries a block is, where a layer is.

    Raises:
        UsageError: no such rule.
    """
    asked = WindowBlocks.parse(rule)
    if asked.kind == "whole":
        return None
    if asked.kind == "layer":
        return np.array(layers)
    most = max(1, rows // _BLOCKS_IN_WINDOW) if asked.kind == "auto" else asked.number
    most = max(multiple, most // multiple * multiple)
    return np.concatenate([_cut(layer, most) for layer in layers])


def _cut(total: int, most: int) -> Sizes:
    """Blocks of one size, and what is left over."""
    whole, rest = divmod(total, most)
    return np.concatenate([np.full(whole, most), np.full(int(rest > 0), rest)])


_NO_LEVERAGE = 1e-9
"""What rounding may make of none."""


def raising_leverage(leverages: Sequence[float], window: WindowReport, *, absolute: bool) -> str:
    """What it takes for medians of some layers' leverages to come to where data decide.

    A weight's λ ℓ / (1 − ℓ) is F̂_qq − F̂_qS (F̂_SS + λI)⁻¹ F̂_Sq with S the others of its block, which
    grows with λ: at a λ above what it is now, ℓ is below a half. A lower one may be wanted still.

    Args:
        leverages: the medians ℓ, each below a half.
        window: in which they are so.
        absolute: whether damping is typed in its own unit.
    """
    if window.largest_block > (most := max(1, window.rows // _BLOCKS_IN_WINDOW)):
        return f"--blocks {most}, of no more weights than {window.rows} rows tell apart"
    told = [leverage for leverage in leverages if leverage > _NO_LEVERAGE]
    if not told:
        return "rows are next to zero for most of these weights, whatever the options"
    typed = window.damping if absolute else window.relative_damping
    most_damping = typed * min(leverage / (1 - leverage) for leverage in told)
    unit = "abs:" if absolute else ""
    return f"{LOW_LEVERAGE:.0%} takes --damping {unit}{most_damping:.2g} or less"


def kind_of(problem: Problem, rows: str) -> tuple[RowKind, str]:
    """The kind of rows that is asked for, or fits; and why that is no better.

    Raises:
        UsageError: no such kind.
    """
    return fitting_kind(problem) if rows == "auto" else (RowKind.parse(rows), "")


def damping_of(window: GradientWindow, options: WindowOptions) -> float:
    """λ itself, from what was typed of it.

    Raises:
        UnsoundError: all gradients are zero, so that there is nothing to measure it by.
    """
    if options.absolute:
        return options.damping
    size = window.mean_square() / window.columns
    if size == 0:
        raise UnsoundError(
            "all gradients in the window are zero",
            f"{window.count} rows",
            "--rows sampled, or --damping abs:1e-5 for what is left of the matrix",
        )
    return options.damping * size
