"""How much sooner ranks are done than one process: whole traces, from loaded to result.

``python tests/benchmarks/ranks.py [RANKS ...]``, by default 2 and 4: the text sample's trace by 16
fresh probes, each rank on one thread, in 5 rounds that take turns; medians of seconds, of which
neither start-up nor loading is part, and of their ratios within a round. Each rank wants a core
of its own.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

from lines import ROOT

ROUNDS, PROBES = 5, 16
TRACE = ["-m", "hesscli", "trace", str(ROOT / "samples/text/model.safetensors"), "--trust"]
TRACE += ["--method", "hutchinson", "--probes", str(PROBES), "--budget", "none"]
TRACE += ["--device", "cpu", "--dir", "-", "--out", "json"]


def seconds(ranks: int) -> float:
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        start + TRACE, env=environment, capture_output=True, text=True, check=True, cwd=ROOT
    )
    taken: float = json.loads(done.stdout)["cost"]["seconds"]
    return taken


def main() -> None:
    worlds = [1, *map(int, sys.argv[1:] or ("2", "4"))]
    rounds = [[seconds(ranks) for ranks in worlds] for _ in range(ROUNDS)]
    for number, ranks in enumerate(worlds):
        middle = statistics.median(each[number] for each in rounds)
        ratio = statistics.median(each[0] / each[number] for each in rounds)
        print(f"{ranks} ranks: {middle:.2f} s, {ratio:.2f} times sooner than one")


if __name__ == "__main__":
    main()
