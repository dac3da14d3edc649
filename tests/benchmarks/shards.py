"""A window that ranks share by its columns: memory of each, messages, and a solve's time.

``python tests/benchmarks/shards.py [RANKS ROWS COLUMNS]``, by default 4 ranks and 256 rows of 4
million columns: what each rank takes at most beside what it took before there was a window, in
times its share of the rows of one rank's.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch

from hesscli import world
from hesscli.engines.mfac import ShardedWindow, StaticFisher


def memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name))) * 1024


def solve(rows: int, columns: int) -> None:
    """Fill a window with gradients of each rank's own, and solve with it."""
    torch.set_num_threads(1)
    torch.ones(64, 64) @ torch.ones(64, 64)
    with world.joined():
        ShardedWindow(1, 64).exchange(torch.ones(1, 64))
        begun, began = memory("VmRSS:"), time.process_time()
        window = ShardedWindow(rows, columns)
        made = torch.empty(1, columns)
        torch.manual_seed(world.place())
        for _ in range(world.place(), rows, world.size()):
            window.exchange(made.normal_())
        del made
        filled, before = time.process_time() - began, world.sums()
        fisher = StaticFisher(window, 1e-3 * window.mean_square() / columns)
        solution = fisher.ihvp(torch.ones(window.size, dtype=torch.float64))
        seconds = time.process_time() - began - filled
        sent = [after - then for after, then in zip(world.sums(), before, strict=True)]
        taken = memory("VmHWM:") - begun
        share = rows * columns * 4 / world.size()
        print(
            f"rank {world.place()}: {taken / share:.3f} of its share of {share / 2**20:.0f} MiB, "
            f"{window.count} rows in {filled:.1f} s, inverse and solve in {seconds:.1f} s with "
            f"{sent[1]} numbers in {sent[0]} messages, off by {solution.error:.1e} at most"
        )


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        solve(int(sys.argv[2]), int(sys.argv[3]))
        return
    ranks, rows, columns = sys.argv[1:] or ["4", "256", "4000000"]
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    line += [f"--nproc-per-node={ranks}", __file__, "--rank", rows, columns]
    subprocess.run(line, check=True)


if __name__ == "__main__":
    main()
