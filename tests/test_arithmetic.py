"""Of float32 on a CUDA device: whatever was asked for before is there again afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from hesscli.arithmetic import in_full_precision

CUDNN, PRODUCTS = torch.backends.cudnn, torch.backends.cuda.matmul


def settings() -> list[object]:
    found: list[object] = [part.fp32_precision for part in (CUDNN.conv, CUDNN.rnn, PRODUCTS)]
    return [*found, CUDNN.enabled, CUDNN.deterministic, CUDNN.benchmark]


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    CUDNN.allow_tf32, CUDNN.deterministic, CUDNN.benchmark = True, False, False


def by_older_names() -> None:
    torch.set_float32_matmul_precision("medium")
    CUDNN.benchmark = True


def by_newer_names() -> None:
    CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision = "tf32", "ieee"
    PRODUCTS.fp32_precision = "tf32"


def as_a_whole() -> None:
    torch.backends.fp32_precision = "tf32"


@pytest.mark.parametrize("ask", [lambda: None, by_older_names, by_newer_names, as_a_whole])
def test_tf32_is_off_meanwhile(ask: Callable[[], None]) -> None:
    """However it was asked for, and within another such stretch."""
    ask()
    before = settings()
    with in_full_precision(cudnn=False):
        meanwhile = settings()
        with in_full_precision():
            assert settings() == meanwhile
        assert settings() == meanwhile
    assert meanwhile == ["ieee", "ieee", "ieee", False, True, False]
    assert settings() == before


def test_a_model_may_switch_cudnn_off_on_its_way() -> None:
    """torch reads the older names for that, and refuses where newer ones say something else."""
    with in_full_precision(), CUDNN.flags(enabled=False):
        assert not CUDNN.enabled
    assert CUDNN.allow_tf32


def test_who_asks_first_may_stop_first() -> None:
    """As of two threads whose steps overlap, or of a generator that is left where it is."""
    before = settings()
    first, second = in_full_precision(cudnn=False), in_full_precision()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert settings() == ["ieee", "ieee", "ieee", True, True, False]
    second.__exit__(None, None, None)
    assert settings() == before
