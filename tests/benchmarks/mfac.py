"""What inverses of a window of gradients cost and how many digits they have.

    python tests/benchmarks/mfac.py [speed] [digits] [file] [replacements]

All of it takes ten minutes, 6 GiB of memory and 4 GiB of disk. Times are CPU times on one thread,
each beside what it is compared with, turn by turn, and the median of the turns' ratios is shown:
a machine that slows down or is shared slows both.

The naive twin is the recursion of the paper (Frantar, Kurtic & Alistarh 2021, section 3.2): one
row after the other, each with two products with all rows so far. It is made of the fastest
products there are, whose share of the memory bandwidth is shown. A few of its steps are timed
and all of them integrated from these, since the steps grow linearly.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hesscli.engines.mfac import GradientWindow, Gram, StaticFisher, WindowedFisher

CONSOLE = Console()
GIB = 2**30


def seconds(work: Callable[[], object]) -> float:
    """CPU time."""
    start = time.process_time()
    work()
    return time.process_time() - start


def ratio(
    work: Callable[[], object], unit: Callable[[], object], rounds: int
) -> tuple[float, float]:
    """Median time of some work, and of its ratio to a unit made before and after it."""
    times, ratios, before = [], [], seconds(unit)
    for _ in range(rounds):
        times.append(seconds(work))
        after = seconds(unit)
        ratios.append(2 * times[-1] / (before + after))
        before = after
    return statistics.median(times), statistics.median(ratios)


class Report:
    """A table of what was found and what is wanted."""

    def __init__(self, title: str) -> None:
        self._table = Table("", "found", "wanted", "", title=title, title_justify="left")
        self.good = True

    def add(self, name: str, found: str, wanted: str = "", good: bool | None = None) -> None:
        """One line."""
        self.good &= good is not False
        self._table.add_row(name, found, wanted, "" if good is None else "ok" if good else "NO")

    def show(self) -> bool:
        """Whether all is as wanted."""
        CONSOLE.print(self._table)
        return self.good


def window_of(rows: int, columns: int, path: Path | None = None) -> GradientWindow:
    """Rows with a common part and columns of different size, as gradients have."""
    generator = torch.Generator().manual_seed(0)
    scales = 0.01 * torch.exp(torch.randn(columns, generator=generator))
    common = torch.randn(columns, generator=generator)
    window = GradientWindow(rows, columns, path=path)
    for _ in range(rows):
        window.push(scales * (torch.randn(columns, generator=generator) + 0.3 * common))
    return window


class Recursion:
    """The naive twin: v_i = (F̂_{i-1} + λI)⁻¹ g_i, which needs all v before."""

    def __init__(self, rows: Tensor, damping: float) -> None:
        self.rows, self.damping, count = rows, damping, len(rows)
        self.solved = torch.empty_like(rows)
        self.norms = torch.empty(count)

    def step(self, i: int) -> None:
        """One row: 2 i d multiplications twice over."""
        row, solved = self.rows[i], self.solved[:i]
        overlaps = torch.mv(solved, row).div_(self.norms[:i])
        torch.addmv(row / self.damping, solved.T, overlaps, alpha=-1, out=self.solved[i])
        self.norms[i] = len(self.rows) + torch.dot(row, self.solved[i])

    def all(self) -> None:
        """The whole recursion."""
        for i in range(len(self.rows)):
            self.step(i)


def naive_agrees() -> None:
    """The twin is right, where it is small enough to be seen whole."""
    window = window_of(32, 500)
    twin = Recursion(window.rows.double(), 1e-3)
    twin.norms = twin.norms.double()
    twin.all()
    x = torch.randn(500, dtype=torch.float64)
    y = x / 1e-3 - twin.solved.T @ ((twin.solved @ x) / twin.norms)
    assert torch.allclose(y, StaticFisher(window, 1e-3, precise=True).ihvp(x).vector, rtol=1e-9)


def speed() -> bool:
    """270,000 parameters and 1,024 rows."""
    naive_agrees()
    rows, columns, damping = 1024, 270_000, 1e-3
    window = window_of(rows, columns)
    report = Report(f"{columns:,} columns, {rows:,} rows, 1 thread")
    x = torch.randn(columns)
    coefficients = torch.randn(rows)

    def read() -> None:
        torch.mv(window.rows, x)

    def read_twice() -> None:
        torch.mv(window.rows, x)
        torch.mv(window.rows.T, coefficients)

    bandwidth = window.nbytes / min(seconds(read) for _ in range(3))
    naive, share = _naive_seconds(window, damping, bandwidth)
    report.add("share of bandwidth of the naive twin", f"{share:.0%}", "60%", share >= 0.6)

    def precompute() -> None:
        StaticFisher(window, damping).diagonal()

    ours = min(seconds(precompute) for _ in range(2))
    report.add("naive recursion, integrated", f"{naive:.0f} s")
    report.add("Gram matrix, factor, V and diagonal", f"{ours:.1f} s")
    report.add("times as fast", f"{naive / ours:.1f}", "2.2", naive / ours >= 2.2)

    fisher = StaticFisher(window, damping)
    vector = torch.randn(columns)
    took, times = ratio(lambda: fisher.ihvp(vector), read_twice, 7)
    report.add("product, of reading twice", f"{took:.2f} s, {times:.2f}", "1.5", times <= 1.5)
    took, times = ratio(lambda: fisher.member(7), read, 7)
    report.add(
        "product of a row, of reading once", f"{took:.2f} s, {times:.2f}", "1.8", times <= 1.8
    )
    eight = torch.randn(8, columns)
    took, times = ratio(lambda: fisher.ihvp_many(eight), read_twice, 3)
    report.add("8 products at once, of reading twice", f"{took:.2f} s, {times:.2f}")

    following = WindowedFisher(window, damping)
    following.member(0)
    gradients = iter(torch.randn(64, columns))

    def replace() -> None:
        following.push(next(gradients))
        following._current()

    took, times = ratio(replace, lambda: following._gram.row(3), 7)
    report.add("replacement, of one row of GGᵀ", f"{took:.3f} s, {times:.2f}", "1.5", times <= 1.5)

    fisher = StaticFisher(window, damping)
    report.add("table for elements", f"{fisher.table_nbytes / GIB:.2f} GiB")
    fisher.element(0, 0)
    pairs = torch.randint(0, columns, (20_000, 2)).tolist()
    took = seconds(lambda: [fisher.element(i, j) for i, j in pairs]) / len(pairs)
    report.add("element", f"{1e6 * took:.1f} µs", "20 µs", took < 20e-6)
    return report.show()


def _naive_seconds(window: GradientWindow, damping: float, bandwidth: float) -> tuple[float, float]:
    """All of the recursion, and what share of the bandwidth it has."""
    rows = window.rows
    twin = Recursion(rows, damping)
    twin.solved.copy_(rows)  # as good as any numbers for a time
    twin.norms.fill_(1.0)
    marks = [len(rows) * k // 8 for k in range(1, 8)]
    times = [min(seconds(lambda i=i: twin.step(i)) for _ in range(2)) for i in marks]
    slope = sum(t * i for t, i in zip(times, marks, strict=True)) / sum(i * i for i in marks)
    share = 2 * rows[0].nbytes / bandwidth / slope
    return slope * len(rows) ** 2 / 2, share


def digits() -> bool:
    """2.7 million parameters, where what cancels shows."""
    rows, columns, damping = 256, 2_700_000, 1e-5
    window = window_of(rows, columns)
    report = Report(f"{columns:,} columns, {rows} rows, λ = {damping:g}")
    unit = window.mean_square() / columns
    report.add("λ relative to tr F̂ / d", f"{damping / unit:.2g}")
    fisher = StaticFisher(window, damping, precise=False)
    A = Gram(window, exact=True).matrix.clone()
    A.diagonal().add_(rows * damping)
    slots = [0, 100, 255]
    coefficients = torch.cholesky_solve(
        torch.eye(rows, dtype=torch.float64), torch.linalg.cholesky(A)
    )
    worst = bound = 0.0
    for slot, true in zip(slots, rows * window.combine(coefficients[slots]), strict=True):
        found = fisher.member(slot)
        worst = max(worst, float((found.vector - true).norm() / true.norm()))
        bound = max(bound, found.error)
    report.add("error of a row's product", f"{worst:.1e}", "1e-4", worst <= 1e-4)
    report.add("its bound", f"{bound:.1e}", "holds", worst <= bound)
    general = StaticFisher(window, damping).ihvp(window.rows[100])
    true = rows * window.combine(coefficients[[100]])[0]
    worst = float((general.vector - true).norm() / true.norm())
    report.add("the same row as any vector", f"{worst:.1e}")
    report.add("its bound", f"{general.error:.1e}", "holds", worst <= general.error)
    return report.show()


def in_file() -> bool:
    """4 GiB on disk in 1.5 GiB of memory, in a process of its own."""
    report = Report("a window of 4 GiB in a file")
    run = subprocess.run(
        [sys.executable, __file__, "child"],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for line in run.stdout.splitlines():
        name, value = line.rsplit(" ", 1)
        if name == "peak":
            report.add("peak memory", f"{float(value):.2f} GiB", "1.5 GiB", float(value) < 1.5)
        else:
            report.add(name, f"{float(value):.1f} s")
    return report.show()


def child() -> None:
    """What the process of its own does."""
    rows, columns = 1024, 2**20
    row = torch.randn(columns)
    with (
        tempfile.TemporaryDirectory(dir=Path.home()) as folder,
        GradientWindow(rows, columns, path=Path(folder) / "window") as window,
    ):
        start = time.perf_counter()
        for i in range(rows):
            window.push(row.roll(977 * i))
        print("pushing", time.perf_counter() - start)
        start = time.perf_counter()
        fisher = StaticFisher(window, 1e-3)
        print("inverting", time.perf_counter() - start)
        for name, work in {
            "product": lambda: fisher.ihvp(torch.randn(columns)),
            "product of a row": lambda: fisher.member(3),
            "diagonal": fisher.diagonal,
        }.items():
            start = time.perf_counter()
            work()
            print(name, time.perf_counter() - start)
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def replacements() -> bool:
    """Ten thousand of them, with a solve after each."""
    rows, columns, times, damping = 256, 4096, 10_000, 1e-5
    report = Report(f"{times:,} replacements, {columns:,} columns, {rows} rows")
    window = window_of(rows, columns)
    fisher = WindowedFisher(window, damping)
    fisher.member(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def replace() -> None:
        for _ in range(times):
            fisher.member(fisher.push(torch.randn(columns)))

    took = seconds(replace)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    fresh = WindowedFisher(window, damping)
    x = torch.randn(columns)
    off = max(
        float((one - other).norm() / other.norm())
        for one, other in (
            (fisher.member(9).vector, fresh.member(9).vector),
            (fisher.ihvp(x).vector, fresh.ihvp(x).vector),
        )
    )
    single = [seconds(lambda: _refactor(fresh)) for _ in range(5)]
    report.add("a replacement and a solve", f"{1e3 * took / times:.2f} ms")
    report.add("a factor made anew", f"{1e3 * statistics.median(single):.2f} ms")
    report.add("drift", f"{off:.1e}", "1e-5: float32", off < 1e-5)
    report.add("growth", f"{grown:.0f} MiB", "10 MiB", grown < 10)
    return report.show()


def _refactor(fisher: WindowedFisher) -> None:
    fisher._tail = fisher._system = None
    fisher._current()


PARTS = {"speed": speed, "digits": digits, "file": in_file, "replacements": replacements}


def main() -> None:
    """Run what is asked for."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    chosen = parser.parse_args().parts or list(PARTS)
    if chosen == ["child"]:
        child()
        return
    good = [PARTS[part]() for part in chosen]
    if not all(good):
        raise SystemExit("not all is as wanted")


if __name__ == "__main__":
    main()
