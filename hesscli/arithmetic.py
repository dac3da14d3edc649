"""In which arithmetic a CUDA device works: the one that bounds of rounding are made for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def in_full_precision(*, cudnn: bool = True) -> Iterator[None]:
    """Meanwhile float32 is float32 on a CUDA device, and equal calls give equal numbers.

    There torch makes convolutions in TF32 unless it is told otherwise, with 11 of float32's 24
    bits, and may take a kernel that adds up in another order each time. How it was told before is
    how it is told again, by its older names or by its newer ones: it refuses to read the older
    where both were used, as a model may that switches cuDNN off on its way.

    Args:
        cudnn: whether its kernels may be used at all.
    """
    library: Any = torch.backends.cudnn  # whose parts are not declared
    products = torch.backends.cuda.matmul
    settings: dict[tuple[Any, str], Any] = {}
    if _is_set_by_its_older_name():
        settings[library, "allow_tf32"] = False
    for part in (library.conv, library.rnn, products):
        settings[part, "fp32_precision"] = "ieee"
    settings |= {(library, "deterministic"): True, (library, "benchmark"): False}
    if not cudnn:
        settings[library, "enabled"] = False
    before = {place: getattr(*place) for place in settings}
    try:
        for place, value in settings.items():
            setattr(*place, value)
        yield
    finally:
        for place, value in before.items():
            setattr(*place, value)


def _is_set_by_its_older_name() -> bool:
    try:
        return isinstance(torch.backends.cudnn.allow_tf32, bool)
    except RuntimeError:
        return False
