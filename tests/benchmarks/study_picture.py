"""Draw study.png: the share of right answers on the test set, by epochs and by time.

python tests/benchmarks/study_picture.py [TASK]
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from lines import Lines
from matplotlib.axes import Axes
from study import OPTIMIZERS, TASKS, Run, tuned
from study_tables import TITLES, Found, by_seed, unit_of

from hesscli.render.figures.canvas import ACCENT, AMBER, GREY, NEGATIVE, QUIET, page, place, styled

COLOURS = dict(zip(OPTIMIZERS, (GREY, AMBER, "#8a5a00", ACCENT, NEGATIVE), strict=True))
FLOOR = {"cnn": 0.75, "text": 0.3, "resnet8": 0.75, "resnet20": 0.75}


@styled
def draw(task: str, path: Path) -> None:
    """Means over seeds, and all seeds within a band."""
    lines = Lines("study.jsonl", Run)
    found = {
        name: by_seed(task, name, lr, lines)
        for name in OPTIMIZERS
        if (lr := tuned(task, name, lines)) is not None
    }
    seeds = {len(one) for one in found.values()} - {0}
    told = f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    title = f"{TITLES[task]}: accuracy on the test set while it is trained"
    notes = (f"{TASKS[task].epochs} epochs", f"means of {told} seeds, which the bands span")
    figure = page(5.0, title, [*notes, "each at the learning rate that was best for it"])
    for i, unit in enumerate(("epochs", f"{unit_of(found)}, without looking")):
        axes = figure.add_axes((0.1, 0.1, 0.8, 0.8))
        place(figure, axes, 0.95 + 5.1 * i, 0.75, 4.55, 3.2)
        for name, one in found.items():
            if one:
                curve(axes, task, name, one, in_seconds=bool(i))
        axes.set_ylim(FLOOR[task], None)
        axes.set_xlim(0, None)
        axes.grid(axis="y")
        axes.set_xlabel(unit)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
        if not i:
            axes.legend(frameon=False, loc="lower right", labelcolor=QUIET)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def curve(axes: Axes, task: str, name: str, found: Found, *, in_seconds: bool) -> None:
    """One optimizer's, over the looks that all seeds had."""
    looks = list(zip(*(one["looks"] for one in found.values()), strict=False))
    epochs = TASKS[task].epochs / next(iter(found.values()))["steps"]
    seconds = [statistics.fmean(look["seconds"] for look in each) for each in looks]
    x = seconds if in_seconds else [each[0]["step"] * epochs for each in looks]
    right = [[look["accuracy"] for look in each] for each in looks]
    axes.plot(x, list(map(statistics.fmean, right)), color=COLOURS[name], lw=1.8, label=name)
    axes.fill_between(
        x, list(map(min, right)), list(map(max, right)), color=COLOURS[name], alpha=0.15, lw=0
    )


if __name__ == "__main__":
    draw(*(sys.argv[1:] or ["cnn"]), Path(__file__).with_name("study.png"))
