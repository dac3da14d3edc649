"""Where a run happens, and the most memory that it took."""

from __future__ import annotations

import platform
import resource
import sys

import torch

from hesscli.results import Environment

_RESIDENT_GRAIN = 1 << 26
"""Resident memory is rounded up to this: its last digits differ from run to run."""


def environment(device: torch.device) -> Environment:
    """Versions, device and threads."""
    cuda = device.type == "cuda"
    return Environment(
        python=platform.python_version(),
        torch=torch.__version__,
        device_name=torch.cuda.get_device_name(device) if cuda else platform.machine(),
        threads=torch.get_num_threads(),
        tf32=cuda and torch.backends.cuda.matmul.allow_tf32,
    )


def peak_bytes(device: torch.device) -> int:
    """The device's peak allocation, or the process's peak resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return -(-resident // _RESIDENT_GRAIN) * _RESIDENT_GRAIN
