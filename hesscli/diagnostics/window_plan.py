"""What ``hesscli ihvp`` will take: its window, what is made of it, and time at most."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from hesscli.diagnostics.clock import beyond
from hesscli.diagnostics.collecting import WindowOptions, block_sizes
from hesscli.diagnostics.opening import PROOF_GRADIENTS
from hesscli.diagnostics.perturbations import changes_of
from hesscli.diagnostics.ranking import GROUPS
from hesscli.diagnostics.surroundings import peak_bytes
from hesscli.diagnostics.sweep import RELATIVE
from hesscli.memory import available_bytes
from hesscli.operators.base import Operator
from hesscli.parameters import Parameter
from hesscli.results import PlannedCommand

_ROW_GRADIENTS = 4 / 3
_GEMM = 1024
"""Order of the product that is timed."""


def plan_ihvp(
    operator: Operator,
    options: WindowOptions,
    gradient_seconds: float,
    product_seconds: float,
    budget: float | None,
) -> PlannedCommand:
    """Work, time and memory of a sensitivity study in which every batch is seen.

    Args:
        operator: the matrix that predicts losses.
        options: of the window.
        gradient_seconds: of a full-data gradient.
        product_seconds: of a full-data product.
        budget: seconds that the command will be given.
    """
    problem = operator.problem
    size, rows = problem.parameters.size, options.count(problem)
    largest = max(block_sizes(problem.parameters, options.blocks, rows) or (size,))
    gradients = PROOF_GRADIENTS + _ROW_GRADIENTS * rows / problem.data.count
    products = 1 + len(RELATIVE)
    changes = sum(map(_changes, map(problem.parameters.in_layer, problem.layer_names)))
    graph, each = operator.cost
    gradients += 2 * graph + products * each
    gradients += len(problem.layer_names) * graph + changes * each
    sweeps = 2 + GROUPS + len(RELATIVE)
    inverting = sweeps * 2.0 * rows * min(rows, largest) * size / _rate(problem.device)
    seconds = (
        _ROW_GRADIENTS * rows / problem.data.count * gradient_seconds
        + (products + changes) * product_seconds
        + inverting
    )
    window = rows * size * options.torch_dtype.itemsize
    factors = 8 * size * largest if largest <= rows else 4 * size * rows
    notes = [
        f"{rows} rows take {_mebibytes(window)}, what inverts them {_mebibytes(factors)}; a copy "
        f"for queries of single elements of the whole matrix {_mebibytes(4 * size * rows)} more",
        f"{changes} changes of {len(problem.layer_names)} layers, at most: batches are seen until "
        "all predictions are known to 20%",
    ]
    if options.file is None and window > available_bytes(problem.device):
        notes.append(
            "more than the memory that is free: a smaller --window, --window-dtype "
            "bfloat16 or --window-file FILE"
        )
    notes.extend(beyond(seconds, budget))
    return PlannedCommand(
        command="ihvp",
        products=float(products + changes),
        gradients=gradients,
        seconds=seconds,
        peak_bytes=peak_bytes(problem.device) + factors + (0 if options.file else window),
        note="; ".join(notes),
    )


def _changes(layer: Sequence[Parameter]) -> int:
    """How many changes of a layer are predicted."""
    return len(changes_of(layer, torch.zeros(sum(p.numel for p in layer))))


def _rate(device: torch.device) -> float:
    """Float64 operations in a second, of a matrix product."""
    a = torch.ones(_GEMM, _GEMM, dtype=torch.float64, device=device)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - began)
    return 2.0 * _GEMM**3 / sorted(times)[1]


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:.3g} MiB"
