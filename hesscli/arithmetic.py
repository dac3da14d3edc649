"""In which arithmetic a CUDA device works: the one that bounds of rounding are made for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from threading import Lock
from typing import Any

import torch

_Settings = dict[tuple[Any, str], Any]


class _Told:
    """Settings of the whole process while anyone asks for them, and as before when nobody does.

    Threads may ask at once, and who asks first need not be who stops last.

    Args:
        settings: what they are to be.
    """

    def __init__(self, settings: Callable[[], _Settings]) -> None:
        self._settings, self._before = settings, _Settings()
        self._asking, self._lock = 0, Lock()

    @contextmanager
    def asked(self) -> Iterator[None]:
        with self._lock:
            settings = self._settings()
            if not self._asking:
                self._before = {place: getattr(*place) for place in settings}
            self._asking += 1
        try:
            _tell(settings)
            yield
        finally:
            with self._lock:
                self._asking -= 1
                if not self._asking:
                    _tell(self._before)


def _tell(settings: _Settings) -> None:
    for place, value in settings.items():
        setattr(*place, value)


def _full_precision() -> _Settings:
    library: Any = torch.backends.cudnn  # whose parts are not declared
    settings = _Settings()
    if _is_set_by_its_older_name():
        settings[library, "allow_tf32"] = False
    for part in (library.conv, library.rnn, torch.backends.cuda.matmul):
        settings[part, "fp32_precision"] = "ieee"
    return settings | {(library, "deterministic"): True, (library, "benchmark"): False}


_IN_FULL = _Told(_full_precision)
_WITHOUT_CUDNN = _Told(lambda: {(torch.backends.cudnn, "enabled"): False})


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
    with _IN_FULL.asked(), nullcontext() if cudnn else _WITHOUT_CUDNN.asked():
        yield


def _is_set_by_its_older_name() -> bool:
    try:
        return isinstance(torch.backends.cudnn.allow_tf32, bool)
    except RuntimeError:
        return False
