"""The table: what became of so many networks, by what was planted in them."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from scipy.stats import binom

from fuzz.dice import Dice
from fuzz.grammar import plain
from fuzz.judge import Report, judge
from fuzz.plants import PLANTS

PLAIN = "nothing planted"


@dataclass(frozen=True)
class Job:
    """One network: its number, and what is planted."""

    number: int
    plant: str

    def run(self, *, brief: bool = False) -> Report:
        """Draw and judge; the same number gives the same network."""
        dice = Dice(self.number, self.plant == PLAIN)
        subject = plain(dice) if self.plant == PLAIN else PLANTS[self.plant].sow(dice)
        return judge(subject, dice, brief=brief)

    def __str__(self) -> str:
        return f"--only {self.number}" + (" --plain" if self.plant == PLAIN else "")


def jobs(planted: Iterable[int], without: Iterable[int]) -> list[Job]:
    """Networks with plants, each plant in turn, and networks without."""
    kinds = list(PLANTS)
    return [Job(n, kinds[n % len(kinds)]) for n in planted] + [Job(n, PLAIN) for n in without]


def _run(job: Job) -> tuple[Job, Report]:
    torch.set_num_threads(1)
    return job, job.run()


def faults(results: Sequence[tuple[Job, Report]]) -> list[str]:
    """What is not as it must be; empty where all is well."""
    found = [
        f"{job} ({job.plant}) {report.verdict}: {'; '.join(report.notes)}"
        for job, report in results
        if report.verdict in ("wrong", "misnamed", "crash")
    ]
    plain_ones = [(job, report) for job, report in results if job.plant == PLAIN]
    warned = [(job, report) for job, report in plain_ones if report.needless]
    due = [(job, report) for job, report in plain_ones if report.exact_is_due]
    inexact = [(job, report) for job, report in due if report.exact is False]
    unknown = [(job, report) for job, report in plain_ones if report.unknown]
    for what, some, all_of_them, share in (
        ("needless warnings", warned, plain_ones, 0.01),
        ("not exact though R has a zero diagonal", inexact, due, 0.01),
        ("unknown", unknown, plain_ones, 0.05),
    ):
        if len(some) > share * len(all_of_them):
            named = "; ".join(f"{job}: {' | '.join(r.needless)[:160]}" for job, r in some[:8])
            found.append(f"{what}: {len(some)} of {len(all_of_them)} ({named})")
    misses = _misses(results)
    if binom.sf(sum(misses) - 1, len(misses), 0.05) < 1e-3:
        found.append(f"{sum(misses)} of {len(misses)} intervals of 95% miss")
    return found


def _misses(results: Sequence[tuple[Job, Report]]) -> list[bool]:
    """Of intervals of right numbers, and of all where nothing is planted: whether each misses."""
    told = [report for job, report in results if report.verdict == "right" or job.plant == PLAIN]
    return [miss for report in told for miss in report.misses]


COLUMNS = ("right", "refused", "warned", "misnamed", "wrong", "crash")


def table(results: Sequence[tuple[Job, Report]]) -> str:
    """One line a plant."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for job, report in results:
        counts[job.plant][report.verdict] += 1
    lines = [f"{'planted':52}{'networks':>9}" + "".join(f"{c:>9}" for c in COLUMNS)]
    for plant in [*PLANTS, PLAIN]:
        if (row := counts.get(plant)) is not None:
            cells = "".join(f"{row[c] or '·':>9}" for c in COLUMNS)
            lines.append(f"{plant:52}{row.total():>9}{cells}")
    misses = _misses(results)
    right = [report for _, report in results if report.verdict == "right"]
    entries = sum(report.entries[0] for report in right)
    missed = sum(report.entries[1] for report in right)
    lines.append(
        f"{len(misses) - sum(misses)} of {len(misses)} intervals hold; "
        f"{entries - missed} of {entries} entries lie within 1.96 standard errors"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Run, print, and return 1 where something is not as it must be."""
    parser = argparse.ArgumentParser(description="Random networks with faults planted in them.")
    parser.add_argument("--count", type=int, default=400, help="networks with plants")
    parser.add_argument("--without", type=int, default=400, help="networks without")
    parser.add_argument("--first", type=int, default=0, help="number of the first network")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--plant", action="append", help="only this plant; repeatable")
    parser.add_argument("--only", type=int, help="this network alone, with all that was found")
    parser.add_argument("--plain", action="store_true", help="with --only: one without a plant")
    options = parser.parse_args(arguments)
    numbers = range(options.first, options.first + options.count)
    chosen = jobs(numbers, range(options.first, options.first + options.without))
    if options.plant:
        chosen = [Job(n, plant) for plant in options.plant for n in _of(plant, options.count)]
    if options.only is not None:
        chosen = jobs((), [options.only]) if options.plain else jobs([options.only], ())
    context = multiprocessing.get_context("fork")
    with context.Pool(max(1, min(options.jobs, len(chosen)))) as pool:
        results = list(pool.imap(_run, chosen))
    print(table(results))
    if options.only is not None:
        print(results[0][1])
    wrong = faults(results)
    print("\n".join(wrong))
    return bool(wrong)


def _of(plant: str, count: int) -> range:
    """The first numbers whose plant it is."""
    step = len(PLANTS)
    return range(list(PLANTS).index(plant), step * count, step)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
