"""What the trainings of study.py came to, as Markdown; nothing is trained.

    python tests/benchmarks/study_tables.py

Differences are paired by seed, with 95% t intervals; ± is a standard deviation over seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from lines import Lines
from scipy.stats import t
from study import GRID, OFF, OPTIMIZERS, SEEDS, TASKS, VARIANTS, Run, tuned, tuning

Found = dict[int, dict[str, Any]]
TITLES = {
    "cnn": "Convolutions",
    "text": "Transformer",
    "resnet8": "ResNet-8",
    "resnet20": "ResNet-20",
}
BESIDE = ("Adam", "SGD")


def main() -> None:
    """All tables of the tasks that have come to a test."""
    lines = Lines("study.jsonl", Run)
    for task in TASKS:
        if any(run.task == task and run.phase == "test" for run in lines):
            for text in section(task, lines):
                print(text)


def section(task: str, lines: Lines[Run]) -> Iterator[str]:
    """A task's tables, as far as there are lines for them."""
    size = next(found["parameters"] for run, found in lines.items() if run.task == task)
    epochs, batch = TASKS[task].epochs, TASKS[task].batch
    yield f"### {TITLES[task]}: {size:,} parameters, {epochs} epochs in batches of {batch}"
    yield from rates(task, lines)
    best = {name: lr for name in OPTIMIZERS if (lr := tuned(task, name, lines)) is not None}
    found = {name: by_seed(task, name, lr, lines) for name, lr in best.items()}
    found = {name: seeds for name, seeds in found.items() if seeds}
    if found:
        yield from results(found)
        yield from race(found)
    if "AdaHessian" in found:
        lr = best["AdaHessian"]
        yield from variants(found["AdaHessian"], {v: by_seed(task, v, lr, lines) for v in VARIANTS})
    yield from robustness(task, found, best, lines)


def place(found: dict[str, Any]) -> str:
    """Where a training took place, and beside how many."""
    if "device" not in found:
        return "a CPU"
    return f"an {found['device']} that {found['workers']} of them shared"


def places(found: Iterable[dict[str, Any]]) -> str:
    """Where some did."""
    return " or ".join(dict.fromkeys(map(place, found)))


def by_seed(task: str, optimizer: str, lr: float, lines: Lines[Run]) -> Found:
    """What each seed's training came to."""
    runs = {seed: Run("test", task, optimizer, lr, seed) for seed in range(SEEDS)}
    return {seed: lines[run] for seed, run in runs.items() if run in lines}


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """Markdown, with an empty line before and after."""
    columns = list(columns)
    yield ""
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


# -- Learning rates --------------------------------------------------------------------------------


def rates(task: str, lines: Lines[Run]) -> Iterator[str]:
    """Losses and accuracies on what was held back, the best in bold."""
    share, epochs = TASKS[task].held_back, TASKS[task].tuning_epochs
    tried = [run for name in OPTIMIZERS for run in tuning(task, name) if run in lines]
    yield ""
    yield (
        f"Loss, and accuracy in percent, on {share:.0%} of the training set after {epochs} epochs "
        f"on the rest, by learning rate; one seed, on {places(lines[run] for run in tried)}."
    )

    def row(name: str) -> Iterator[str]:
        middle, runs = TASKS[task].rates[name], tuning(task, name)
        best = tuned(task, name, lines)
        yield f"{name}, {middle:g}"
        for run in runs:
            if run not in lines:
                yield ""
            elif lines[run]["loss"] is None:
                yield "diverges"
            else:
                text = f"{lines[run]['loss']:.3f}, {100 * lines[run]['accuracy']:.1f}"
                yield f"**{text}**" if run.lr == best else text

    yield from table(["", *(f"× {factor:g}" for factor in GRID)], map(row, OPTIMIZERS))


def robustness(
    task: str, found: dict[str, Found], best: dict[str, float], lines: Lines[Run]
) -> Iterator[str]:
    """What is lost away from the best rate, in trainings of full length."""
    off = {
        name: [by_seed(task, name, factor * best[name], lines) for factor in OFF] for name in found
    }
    if any(map(any, off.values())):
        yield (
            "Points of test accuracy lost at multiples of that rate, against the same seed at the "
            "rate itself: the mean over seeds, its standard deviation, and how many. Trained on "
            f"{places(one for each in off.values() for seeds in each for one in seeds.values())}."
        )
        columns = ["", *(f"× {factor:g}" for factor in OFF)]
        rows = ([name, *(lost(one, found[name]) for one in off[name])] for name in found)
        yield from table(columns, rows)


def lost(off: Found, plain: Found) -> str:
    """Of those that diverged it is as much as they have lost when they are ended."""
    both = sorted(set(off) & set(plain))
    points = [100 * (plain[seed]["accuracy"] - off[seed]["accuracy"]) for seed in both]
    if not points:
        return ""
    text = f"{statistics.fmean(points):.2f}"
    text += f" ± {statistics.stdev(points):.2f}" if len(points) > 1 else ""
    gone = sum(off[seed]["diverged"] for seed in both)
    return f"{text} ({len(points)}{f', {gone} diverged' if gone else ''})"


# -- Results ---------------------------------------------------------------------------------------


def spread(found: Iterable[dict[str, Any]], key: str = "accuracy") -> str:
    """Mean and standard deviation; of those that diverged it is the accuracy they had last."""
    found = list(found)
    values = [one[key] for one in found if one[key] is not None]
    scale, digits = (100, 2) if key == "accuracy" else (1, 3)
    text = f"{scale * statistics.fmean(values):.{digits}f}" if values else ""
    if len(values) > 1:
        text += f" ± {scale * statistics.stdev(values):.{digits}f}"
    lost = sum(one["diverged"] for one in found)
    return text + (f", {lost} diverged" if lost else "")


def difference(one: Found, other: Found, key: str = "accuracy") -> str:
    """A paired t interval over the seeds that both have."""
    both = sorted(set(one) & set(other))
    scale, digits = (100, 2) if key == "accuracy" else (1, 3)
    pairs = [(one[seed][key], other[seed][key]) for seed in both]
    if len(pairs) < 2 or any(value is None for pair in pairs for value in pair):
        return ""
    differences = [scale * (a - b) for a, b in pairs]
    half = t.ppf(0.975, len(pairs) - 1) * statistics.stdev(differences) / math.sqrt(len(pairs))
    return f"{statistics.fmean(differences):+.{digits}f} ± {half:.{digits}f}"


def a_step(found: Found, unit: Found) -> str:
    """Time of a step in SGD's, the median over seeds, of what shared its device with as many."""
    ratios = [
        found[seed]["seconds"] / found[seed]["looks"][-1]["step"]
        / (unit[seed]["seconds"] / unit[seed]["looks"][-1]["step"])
        for seed in found
        if seed in unit and place(found[seed]) == place(unit[seed])
    ]  # fmt: skip
    return f"{statistics.median(ratios):.2f}" if ratios else ""


def results(found: dict[str, Found]) -> Iterator[str]:
    """Test accuracy and loss at the best rate."""
    where = places(one for seeds in found.values() for one in seeds.values())
    yield f"On the test set, after training on all of the training set at that rate, on {where}:"
    columns = ["", "seeds", "accuracy", "loss"]
    columns += [f"accuracy minus {name}'s" for name in BESIDE]
    columns += [f"loss minus {name}'s" for name in BESIDE] + ["a step, in SGD's"]

    def row(name: str) -> Iterator[str]:
        seeds = found[name]
        yield from (name, str(len(seeds)), spread(seeds.values()), spread(seeds.values(), "loss"))
        for key in ("accuracy", "loss"):
            for other in BESIDE:
                yield "" if other == name else difference(seeds, found.get(other, {}), key)
        yield a_step(seeds, found.get("SGD", {}))

    yield from table(columns, map(row, found))


def race(found: dict[str, Found]) -> Iterator[str]:
    """How soon each comes to the accuracy that the last of them ends with on average."""
    ends = {
        name: statistics.fmean(one["accuracy"] for one in seeds.values())
        for name, seeds in found.items()
    }
    common, on_a_device = min(ends.values()), is_on_a_device(found)
    yield (
        f"First look, of two an epoch, at {common:.2%} or above, which is where "
        f"{min(ends, key=ends.__getitem__)} ends: the mean over the seeds that come there."
    )

    def row(name: str) -> Iterator[str]:
        arrivals = [
            (one, look)
            for one in found[name].values()
            if (look := next((x for x in one["looks"] if x["accuracy"] >= common), None))
        ]
        yield name
        yield f"{len(arrivals)} of {len(found[name])}"
        epochs = [look["step"] / one["steps"] * one["epochs"] for one, look in arrivals]
        seconds = [look["seconds"] for one, look in arrivals if ("device" in one) == on_a_device]
        for values in epochs, seconds:
            yield f"{statistics.fmean(values):.1f}" if values else ""

    yield from table(["", "seeds", "epochs", unit_of(found)], map(row, found))


def unit_of(found: dict[str, Found]) -> str:
    """Of the time that trainings took; of those on a device, where there are any."""
    return "seconds of a shared device" if is_on_a_device(found) else "CPU seconds"


def is_on_a_device(found: dict[str, Found]) -> bool:
    """Whether any of them were."""
    return any("device" in one for seeds in found.values() for one in seeds.values())


def variants(plain: Found, found: dict[str, Found]) -> Iterator[str]:
    """AdaHessian with one thing changed, at its own rate."""

    def row(name: str) -> Iterator[str]:
        yield name.removeprefix("AdaHessian, ").replace("|", r"\|")
        seeds = found[name]
        yield from (str(len(seeds)), spread(seeds.values()), difference(seeds, plain))
        yield a_step(seeds, plain)

    if done := [name for name in found if found[name]]:
        yield "AdaHessian with one thing changed, at the same rate:"
        columns = ["", "seeds", "accuracy", "minus AdaHessian's", "a step, in AdaHessian's"]
        yield from table(columns, map(row, done))


if __name__ == "__main__":
    main()
