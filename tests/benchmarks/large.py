"""What memory a large network takes, in times the bytes of its weights in float32.

``python tests/benchmarks/large.py [BILLIONS]``: a GPT of so many parameters (default 1), random and
in a file of bfloat16, on one example. ``hesscli check`` plans it, and then quadratic forms (a trace
by two probes) and a product Hv are made, each in a process of its own whose peak is told by phase.
Memory for about five times the weights must be free.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import hesscli
from hesscli import memory
from hesscli.problem import proof
from hesscli.results import Snapshot

LENGTH = 16
THREADS = os.environ.get("OMP_NUM_THREADS", "1")
SPEC = """
[model]
factory = "large:GPT"
kwargs = {{ vocabulary = {0}, width = {1}, depth = {2} }}
[data]
factory = "large:data"
kwargs = {{ vocabulary = {0} }}
[loss]
name = "language_model"
"""


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 64)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        found: torch.Tensor = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return found


class GPT(nn.Module):
    def __init__(self, vocabulary: int, width: int, depth: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.zeros(LENGTH, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.norm(self.blocks(self.tokens(tokens) + self.places)))
        return logits


def data(vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    tokens = torch.randint(vocabulary, (1, LENGTH + 1))
    return tokens[:, :-1], tokens[:, 1:]


def write(folder: Path, vocabulary: int, width: int, depth: int) -> Path:
    """Random weights and their spec; the path of the weights."""
    torch.manual_seed(0)
    path, state = folder / "gpt.safetensors", GPT(vocabulary, width, depth).bfloat16().state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    path.with_suffix(".toml").write_text(SPEC.format(vocabulary, width, depth))
    (folder / "large.py").write_text(Path(__file__).read_text())
    return path


# -- Peaks of a process, phase by phase ------------------------------------------------------------


class Peaks:
    """Of resident memory beyond what there was at the start, by phase."""

    def __init__(self) -> None:
        self._start, self._phase, self._began = self._now("VmRSS:"), "loading", time.process_time()
        self.bytes: dict[str, int] = {}
        self._begin_anew()

    def __call__(self, snapshot: Snapshot) -> bool:
        self.end(snapshot.phase)
        return False

    def end(self, following: str = "") -> None:
        """The phase that was, unless it goes on."""
        if following == self._phase:
            return
        self.bytes[self._phase] = self._now("VmHWM:") - self._start
        now = time.process_time()
        print(f"{self._phase}: {self.bytes[self._phase]} bytes, {now - self._began:.1f} s")
        sys.stdout.flush()
        self._begin_anew()
        self._phase, self._began = following, now

    def _begin_anew(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def _now(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(name))) * 1024


def loaded(path: Path) -> hesscli.Problem:
    return hesscli.load(path, spec=path.with_suffix(".toml"))


def warm_up() -> None:
    """What is imported on the way, or taken once and for all, is no memory of the network's."""
    with tempfile.TemporaryDirectory() as folder:
        small = loaded(write(Path(folder), 1024, 256, 1))
        hesscli.trace(small, method="hutchinson", probes=2)


def run(path: Path, what: str) -> Peaks:
    """Forms, or a product."""
    torch.set_num_threads(int(THREADS))
    warm_up()
    if room := os.environ.get("ROOM"):
        memory._of_machine = lambda: int(room)
        proof._KEPT = 0
    peaks = Peaks()
    problem = loaded(path)
    print(f"weights: {4 * problem.parameters.size} bytes")
    if what == "forms":
        found = hesscli.trace(problem, method="hutchinson", probes=2, budget=None, observe=peaks)
        print(found, *found.warnings, sep="\n")
    else:
        matrix = hesscli.Hessian(problem)
        matrix.check()
        peaks.end("product")
        print(f"|Hv| = {float((matrix @ torch.ones(problem.parameters.size)).norm()):.3g}")
    peaks.end()
    return peaks


def apart(path: Path, what: str, room: int | None = None) -> dict[str, float]:
    """What each phase took at most, in times the weights in float32; run in its own process.

    Args:
        path: the weights.
        what: ``forms`` or ``product``.
        room: bytes of memory that it is told are free; default what there is.
    """
    line = [sys.executable, __file__, "--run", str(path), what]
    # Freed memory goes back at once, whatever size its pieces have.
    environment = os.environ | {"OMP_NUM_THREADS": THREADS, "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment |= {"ROOM": str(room)} if room else {}
    done = subprocess.run(line, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout, end="")
    told = dict(part.split(": ") for part in done.stdout.splitlines() if " bytes" in part)
    sizes = {phase: float(size.split()[0]) for phase, size in told.items()}
    weights = sizes.pop("weights")
    return {phase: size / weights for phase, size in sizes.items()}


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        run(Path(sys.argv[2]), sys.argv[3])
        return
    billions = float(sys.argv[1]) if sys.argv[1:] else 1.0
    width, vocabulary = 2048, 32768
    depth = max(1, round((1e9 * billions - 2 * vocabulary * width) / (12 * width**2)))
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), vocabulary, width, depth)
        check = [sys.executable, "-m", "hesscli", "check", path.name, "--dir", "-"]
        subprocess.run(check, cwd=folder, check=True)
        for what in ("forms", "product"):
            times = apart(path, what)
            print(what, *(f"{phase} {each:.2f}" for phase, each in times.items()), sep="\n  ")


if __name__ == "__main__":
    main()
