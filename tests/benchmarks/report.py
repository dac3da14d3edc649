"""The record as Markdown, and what a record says of its machine."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

TITLES = {
    "trace": "Trace",
    "layers": "Traces of the layers (median over layers)",
    "diagonal": "Diagonal (relative L2)",
}
NAMES = {
    "pyhessian": "PyHessian",
    "curvlinops-for-pytorch": "curvlinops",
    "hessian-eigenthings": "hessian-eigenthings",
}
MARKS = {
    "extrapolated": "~",
    "all unit vectors": "≡",
    "measured": "",
    "exact": "",
}
LEGEND = """\
What an estimate within 10, 3 and 1% of the truth takes, in gradients of the same loss over all
data: first by counted operations (forward 1/3, backward 2/3), then by CPU time on one thread, and
in brackets what multiple of ours the latter is, with quartiles. Where to stop is told by an oracle:
at the smallest number of products whose median error over runs is small enough.

`~` extrapolated from the variance of one product, or beyond 512 products from the slope of the last
doubling; `≡` as many products with unit vectors as there are parameters are cheaper, and exact; †
the library makes the products, the estimate is its user's own. PyHessian "batch by batch" is its
single-batch class in a loop of one's own, with signs of its own for each batch.
"""


def markdown(record: dict[str, Any]) -> str:
    """All tables."""
    return "\n".join(["# What an estimate costs", "", LEGEND, *sections(record), *notes(record)])


def sections(record: dict[str, Any]) -> Iterator[str]:
    """A table for each quantity and sample."""
    for quantity, title in TITLES.items():
        yield f"## {title}\n"
        for sample, found in record.items():
            yield (
                f"{sample}: {found['parameters']} parameters in {found['layers']} layers; "
                f"a gradient takes {found['gradient_seconds']:.2g} s\n"
            )
            yield "| | products | counted | 10% | 3% | 1% |"
            yield "|---|---|---|---|---|---|"
            yield our_line(found["ours"][quantity].values())
            yield from (peer_line(p) for p in found["peers"] if p["quantity"] == quantity)
            yield ""


def our_line(costs: Iterable[dict[str, Any]]) -> str:
    """Ours: what it makes are not only products."""
    marked = [(MARKS[cost["how"]], cost) for cost in costs]
    counted = " / ".join(mark + short(cost["counted"]) for mark, cost in marked)
    timed = " | ".join(f"**{mark}{short(cost['timed'])}**" for mark, cost in marked)
    return f"| **hesscli** | | {counted} | {timed} |"


def peer_line(peer: dict[str, Any]) -> str:
    """A way to the estimate at a peer."""
    title = f"{NAMES[peer['library']]} {peer['name']}{' †' if peer['by_hand'] else ''}"
    outlays = [(MARKS[outlay["reach"]["how"]], outlay) for outlay in peer["within"].values()]
    products = " / ".join(mark + short(outlay["reach"]["products"]) for mark, outlay in outlays)
    counted = " / ".join(mark + short(outlay["counted"]) for mark, outlay in outlays)
    timed = " | ".join(cell(mark, outlay) for mark, outlay in outlays)
    return f"| {title} | {products} | {counted} | {timed} |"


def cell(mark: str, outlay: dict[str, Any]) -> str:
    """Gradients by time, and the multiple of ours."""
    middle, low, high = map(short, outlay["ratio"])
    return f"{mark}{short(outlay['timed'][0])} ({middle} ×, {low}–{high})"


def short(value: float) -> str:
    """Two digits, and thousands by letter."""
    for size, letter in ((1e6, "M"), (1e3, "k"), (1, "")):
        if value >= 0.995 * size:
            scaled = value / size
            return (f"{scaled:.2g}" if scaled < 99.5 else f"{scaled:.0f}") + letter
    return f"{value:.2g}"


def notes(record: dict[str, Any]) -> Iterator[str]:
    """How the truth was found, and where."""
    for sample, found in record.items():
        truth, machine = found["truth"], found["machine"]
        stderr = truth["standard_errors"][-1]
        yield (
            f"Truth on {sample}: {truth['how']}; trace {truth['trace']:.6g}"
            + (f" with standard error {stderr:.2g}" if stderr else "")
            + f". {machine['processor']}, {machine['date']}, torch {machine['torch']}.\n"
        )


def facts() -> dict[str, str]:
    """Processor, system and versions."""
    packages = ("hesscli", "torch", "pyhessian", "curvlinops-for-pytorch", "hessian-eigenthings")
    return {
        "date": date.today().isoformat(),
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def processor() -> str:
    """Its name where Linux tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
