"""How much memory there is to take, how much was taken, and what is done where it runs out."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from hesscli import world
from hesscli.errors import UsageError
from hesscli.heap import kept_bytes
from hesscli.units import human_bytes

_SPARE = 0.9
"""Of the free memory, what may be taken: there is more to do than to hold it."""
_RESIDENT_GRAIN = 1 << 26
"""Resident memory is rounded up to this: its last digits differ from run to run."""
_OWN_PAGES = Path("/proc/self/statm")
_STATUS = Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")
_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_CACHES = ("inactive_file", "active_file")


def available_bytes(device: torch.device | str | None = None) -> int:
    """Memory that can be taken now without pushing anything else out.

    On the CPU the least of what the machine has and what the limits of the process's control
    groups, as containers set them, leave. Cached files count as free: they give way. Ranks on one
    machine have equal parts of it, and all ranks go by what the poorest has. What is kept of what
    was freed counts as free, too: on a CUDA device by torch, else by the C library.

    Args:
        device: the CPU unless it says otherwise.
    """
    place = torch.device(device or "cpu")
    if place.type == "cuda":
        return world.least(free_bytes(place))
    return world.least(min(_of_machine(), *_of_groups()) // world.neighbours())


def free_bytes(device: torch.device) -> int:
    """Of a CUDA device: for this process, what torch keeps of what it has freed included."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def room_for_more(device: torch.device | None = None) -> int:
    """What may be taken of it."""
    return int(_SPARE * available_bytes(device))


def taken_bytes(device: torch.device) -> int:
    """What is taken of it now, by this process alone; on a CPU 0 where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if not _OWN_PAGES.exists():
        return 0
    _, resident, shared, *_ = map(int, _OWN_PAGES.read_text(encoding="ascii").split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(device: torch.device) -> int:
    """The device's peak allocation, or the process's peak resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return -(-_peak_resident() // _RESIDENT_GRAIN) * _RESIDENT_GRAIN


def _peak_resident() -> int:
    """Of this program: what getrusage says begins at the size of the process that started it."""
    if _STATUS.exists():
        return _entries(_STATUS)["VmHWM:"] * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_out_of_memory(error: Exception) -> bool:
    """Whether it is no fault of the model; on a CPU torch raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


class Together:
    """How many rows of a block go through a model at once.

    Memory may run out once: from then on half as many do, in blocks as large as ever. A row's
    result is its own, so that no more than its last digits depend on those beside it.

    Attributes:
        most: rows; None for as many as there are.
        halved: whether memory has run out.
        warnings: what a reader is told of it.
    """

    def __init__(self) -> None:
        self.most: int | None = None
        self.halved = False
        self.warnings: list[str] = []

    def __call__(self, function: Callable[[Tensor], Tensor], block: Tensor) -> Tensor:
        """A function of each row ``(k, …)``, of so many at a time."""
        together = len(block) if self.most is None else min(self.most, len(block))
        if self.halved:
            return _by_parts(function, block, together)
        try:
            return _by_parts(function, block, together)
        except Exception as error:
            if together == 1 or not is_out_of_memory(error):
                raise
        # Only here no frame of the error's holds a tensor any more.
        self.most, self.halved = together // 2, True
        rows = "one vector" if self.most == 1 else f"{self.most} vectors"
        self.ran_out(f"no more than {rows} went through the model at once")
        return self(function, block)

    def ran_out(self, since: str) -> None:
        """Give back what is free, and take note of how it went on."""
        torch.cuda.empty_cache()
        self.warnings.append(f"memory ran out once: since then {since}")


def _by_parts(function: Callable[[Tensor], Tensor], block: Tensor, size: int) -> Tensor:
    if size >= len(block):
        return function(block)
    return torch.cat([function(rows) for rows in torch.split(block, size)])


def require_room(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
    ranks: int = 1,
) -> None:
    """See that a window fits into memory, before any of it is taken.

    Args:
        rows: of the window.
        columns: of all ranks.
        dtype: that rows are kept in.
        device: where.
        ranks: that have equal parts of it.

    Raises:
        UsageError: it does not; the hint names windows that do, and how many ranks would.
    """
    each, needed = room_for_more(device), rows * columns * dtype.itemsize
    room = ranks * each
    if needed <= room:
        return
    ways = []
    if fitting := room // (columns * dtype.itemsize):
        ways.append(f"--window {fitting}")
    if 2 * rows * columns <= room:
        ways.append("--window-dtype bfloat16")
    ways.append("--window-file FILE")
    there = f"there is room for {human_bytes(room)}"
    if ranks > 1:
        there = f"{ranks} ranks have room for {human_bytes(each)} each"
    raise UsageError(
        "the window is larger than the memory that is free",
        f"{rows} rows take {human_bytes(needed)}, and {there}",
        f"{', '.join(ways)} or {-(-needed // max(1, each))} ranks with as much memory each",
    )


def _of_machine() -> int:
    if _MEMINFO.exists():
        return _entries(_MEMINFO)["MemAvailable:"] * 1024 + kept_bytes()
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_groups() -> Iterator[int]:
    """What each limited group that the process is in has left; at least one huge number."""
    yield 2**62
    for group, most, taken in _groups():
        try:
            limit = int((group / most).read_text(encoding="ascii"))
            used = int((group / taken).read_text(encoding="ascii"))
            stat = _entries(group / "memory.stat")
        except (OSError, ValueError):  # no such files, or "max": no limit
            continue
        # In the older hierarchy only the totals count what groups below have, as its usage does.
        cached = sum(stat.get(f"total_{kind}", stat.get(kind, 0)) for kind in _CACHES)
        yield max(0, limit - used + cached + kept_bytes())


def _groups() -> Iterator[tuple[Path, str, str]]:
    """The process's own group and those around it, and what the files of their limits are called.

    In the unified hierarchy of Linux, and in the older one that memory has of its own.
    """
    if not _OWN_GROUPS.exists():
        return
    for line in _OWN_GROUPS.read_text(encoding="utf-8").splitlines():
        number, controllers, name = line.split(":", 2)
        if number == "0":
            root, files = _GROUPS, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, files = _GROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        own = root / name.lstrip("/")
        for group in (own, *(g for g in own.parents if g.is_relative_to(root))):
            yield group, *files


def _entries(file: Path) -> dict[str, int]:
    """Lines of a name and a number, as the kernel writes them."""
    lines = (line.split() for line in file.read_text(encoding="utf-8").splitlines())
    return {words[0]: int(words[1]) for words in lines if words[1:] and words[1].isdigit()}
