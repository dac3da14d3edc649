"""A window and a Lanczos basis that ranks share by their columns: memory, messages, and time.

``python tests/benchmarks/shards.py [RANKS ROWS COLUMNS]``, by default 4 ranks and 256 rows of 4
million columns, of a basis a quarter of the rows: what each rank takes at most beside what it took
before there were any, in times its share of the rows of one rank's.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch

from hesscli import world
from hesscli.engines.lanczos import Lanczos
from hesscli.engines.mfac import ShardedWindow, StaticFisher


def memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name))) * 1024


def taken_since(begun: int, rows: int, columns: int) -> str:
    """This rank's peak beside what it had taken before, in times its share of so many rows."""
    share = rows * columns * 4 / world.size()
    times = (memory("VmHWM:") - begun) / share
    return f"rank {world.place()}: {times:.3f} of its share of {share / 2**20:.0f} MiB"


def sent_since(before: tuple[int, int]) -> list[int]:
    """Messages, and numbers in them."""
    return [after - then for after, then in zip(world.sums(), before, strict=True)]


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
        messages, numbers = sent_since(before)
        print(
            f"{taken_since(begun, rows, columns)}, "
            f"{window.count} rows in {filled:.1f} s, inverse and solve in {seconds:.1f} s with "
            f"{numbers} numbers in {messages} messages, off by {solution.error:.1e} at most"
        )


def iterate(rows: int, columns: int) -> None:
    """Make a basis for a diagonal matrix, whose products each rank makes by itself."""
    torch.set_num_threads(1)
    torch.ones(64, 64) @ torch.ones(64, 64)
    with world.joined():
        Lanczos(lambda v: v.double(), 64, seed=0, shared=True).step()
        values, image = torch.rand(2, columns, dtype=torch.float64)
        begun, began, before = memory("VmRSS:"), time.process_time(), world.sums()
        lanczos = Lanczos(
            lambda v: image.copy_(v).mul_(values),
            columns,
            seed=0,
            dtype=torch.float32,
            reserve=rows,
            shared=True,
        )
        for _ in range(rows):
            lanczos.step()
        seconds = time.process_time() - began
        messages, numbers = sent_since(before)
        print(
            f"{taken_since(begun, rows, columns)}, "
            f"{lanczos.count} steps in {seconds:.1f} s, with {numbers / rows / columns:.4f} d "
            f"numbers in {messages / rows:.1f} messages a step beside products"
        )


PARTS = {"window": solve, "basis": iterate}


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        PARTS[sys.argv[2]](int(sys.argv[3]), int(sys.argv[4]))
        return
    ranks, rows, columns = sys.argv[1:] or ["4", "256", "4000000"]
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    line += [f"--nproc-per-node={ranks}", __file__, "--rank"]
    for part, count in (("window", rows), ("basis", str(int(rows) // 4))):
        print(f"a {part} of {count} rows")
        subprocess.run([*line, part, count, columns], check=True)


if __name__ == "__main__":
    main()
