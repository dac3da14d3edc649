"""The tests of numbers, as other processors would run them: ``make portable``.

Each library that computes has a switch of its own for the instructions that it uses, and the order
in which sums are added up follows from them, as it does from the number of threads.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

NUMBERS = """
    block_variance blocks conjugate_gradients dense diagonal entries exact_diagonal exactness
    factors kernels lanczos losses mfac_rows mfac_static mfac_window mfac_windowed modes operators
    perturbations preflight quadrature residual root_mean_square shrinkage spectrum streams
"""
"""The test files in which it matters how sums are rounded."""

Environment = dict[str, str]


def machines() -> Iterator[tuple[str, Environment]]:
    """What this machine can pretend to be, oldest first."""
    if platform.machine() not in ("x86_64", "AMD64"):
        yield "no vector instructions in torch", {"ATEN_CPU_CAPABILITY": "default"}
    else:
        extensions = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
        yield "SSE", pretend("default", "SSE41", "COMPATIBLE", "Prescott", extensions)
        if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
            newer = [name for name in extensions if name.startswith(("AVX512", "X86_V4"))]
            yield "AVX2", pretend("avx2", "AVX2", "AVX2", "Haswell", newer)
    yield "this machine", {}


def pretend(
    torchs: str, convolutions: str, mkl: str, openblas: str, without: list[str]
) -> Environment:
    """The switches of torch, oneDNN and MKL inside it, numpy's and scipy's OpenBLAS, and numpy."""
    switches = {
        "ATEN_CPU_CAPABILITY": torchs,
        "ONEDNN_MAX_CPU_ISA": convolutions,
        "OPENBLAS_CORETYPE": openblas,
        "NPY_DISABLE_CPU_FEATURES": " ".join(without),
    }
    return switches | ({"MKL_CBWR": mkl} if torch.backends.mkl.is_available() else {})


def passes(name: str, threads: int, switches: Environment) -> bool:
    """Whether the tests pass, in two processes of one thread or in one of two."""
    print(
        f"\n== {name}, {threads} threads", *(f"{k}={v!r}" for k, v in switches.items()), flush=True
    )
    files = [Path(__file__).with_name(f"test_{file}.py") for file in NUMBERS.split()]
    line = [sys.executable, "-m", "pytest", "-q", "-n", str(2 // threads), *files, *sys.argv[1:]]
    waiting = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    return subprocess.run(line, env={**os.environ, **waiting, **switches}).returncode == 0


def main() -> int:
    """Every machine on one thread and on two, but for what ``make test`` runs itself."""
    runs = [(name, n, given) for n in (1, 2) for name, given in machines() if n > 1 or given]
    failed = [f"{name}, {n} threads" for name, n, given in runs if not passes(name, n, given)]
    print(f"\n{len(runs)} runs, failed:", "; ".join(failed) or "none")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
