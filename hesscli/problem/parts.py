"""What a problem is made of, wherever its parts were described: a spec, or a model's own folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hesscli.problem.batches import Batch
from hesscli.problem.losses import Loss
from hesscli.results import CheckpointReport, DataReport, Reduction


@dataclass(frozen=True)
class Origin:
    """Where a problem came from.

    Attributes:
        facts: by which a run is told from one of another problem.
        data: the file of a folder's model; a spec says for itself where its data is.
        tokenizer_sha256: of what makes its text tokens.
        file: that its weights were read from, or the index of several.
        names: what the model's tensors are called there; None where a library of its own has found
            them.
        key: which set of weights of its file was taken, where that was said.
        strip: what was taken off the names in the file.
        ignore: globs of names that were left aside.
        trust: whether code in the file was let run.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    data: DataReport | None = None
    tokenizer_sha256: str | None = None
    file: Path | None = None
    names: Mapping[str, str] | None = None
    key: str | None = None
    strip: str | None = None
    ignore: tuple[str, ...] = ()
    trust: bool = False


def _nothing() -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Parts:
    """What :class:`hesscli.Problem` takes, but for what is said on a command line.

    Attributes:
        where: what to name where the data raise.
        notes: what the reader should be told.
        seen: what more, once examples were fetched.
    """

    model: nn.Module
    loss: Loss
    data: Any
    dtype: torch.dtype
    checkpoint: CheckpointReport
    where: str
    output: str | int | None = None
    weight_decay: float = 0.0
    reduction: Reduction | None = None
    collate: Callable[[list[Any]], Batch] | None = None
    batch_size: int | None = None
    unseen: bool = False
    notes: tuple[str, ...] = ()
    seen: Callable[[], tuple[str, ...]] = _nothing
    origin: Origin = Origin()
