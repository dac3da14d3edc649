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
    adahessian block_variance blocks conjugate_gradients dense diagonal entries exactness factors
    independence invariances kernels lanczos losses mfac_optimizer mfac_rows mfac_static
    mfac_window mfac_windowed modes named_losses operators optimizers per_example perturbations
    precision preflight quadrature randomness residual root_mean_square shrinkage spectrum
    spectrum_rounding symmetry widening wrong_derivatives
"""
"""The test files in which it matters how sums are rounded."""

Environment = dict[str, str]


def older_machines() -> Iterator[tuple[str, Environment]]:
    """What this machine can pretend to be."""
    if platform.machine() not in ("x86_64", "AMD64"):
        yield "no vector instructions in torch", {"ATEN_CPU_CAPABILITY": "default"}
    else:
        extensions = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
        yield "SSE", pretend("default", "SSE41", "COMPATIBLE", "Prescott", extensions)
        if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
            newer = [name for name in extensions if name.startswith(("AVX512", "X86_V4"))]
            yield "AVX2", pretend("avx2", "AVX2", "AVX2", "Haswell", newer)


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
    print(f"\n== {name}, threads: {threads}", *map("=".join, switches.items()), flush=True)
    files = [Path(__file__).with_name(f"test_{file}.py") for file in NUMBERS.split()]
    line = [sys.executable, "-m", "pytest", "-q", "-n", str(2 // threads), *files, *sys.argv[1:]]
    waiting = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    return subprocess.run(line, env={**os.environ, **waiting, **switches}).returncode == 0


def main() -> int:
    """Older machines on one thread, and this one on two: on one, it is what ``make test`` runs."""
    runs = [*((name, 1, given) for name, given in older_machines()), ("this machine", 2, {})]
    failed = [name for name, threads, given in runs if not passes(name, threads, given)]
    print(f"\n{len(runs)} runs, failed:", "; ".join(failed) or "none")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
