"""From a model's folder and its data to the parts of a Problem; no spec is needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from hesscli.errors import InputError, UsageError
from hesscli.problem.criteria import NAMED
from hesscli.problem.parts import Origin, Parts
from hesscli.problem.pretrained.adapter import load_adapted
from hesscli.problem.pretrained.examples import (
    Wanted,
    load_tokenizer,
    longest,
    text_examples,
    tokenizer_sha256,
    tokens_together,
)
from hesscli.problem.pretrained.folder import ADAPTER, located
from hesscli.problem.pretrained.images import BATCH, Images, load_processor
from hesscli.problem.pretrained.model import Pretrained, load_model
from hesscli.problem.pretrained.tables import read_table
from hesscli.problem.sources import Examples
from hesscli.results import CheckpointReport, DataReport


def from_folder(
    checkpoint: Path | None,
    data: str,
    wanted: Wanted,
    dtype: torch.dtype | None = None,
    *,
    trust: bool = False,
) -> Parts:
    """The model that a folder says how to build, and examples for its own loss.

    Args:
        checkpoint: the folder, or a name that is in the cache.
        data: what its examples are made of.
        wanted: how.
        dtype: to compute in; default the weights', float64 or else float32.
        trust: whether code in the folder may run.

    Raises:
        InputError: model, tokenizer or data are missing, or do not go together.
        UsageError: an option that the model has no use for.
    """
    if checkpoint is None:
        hint = "the folder, as in `hesscli trace path/to/folder --data corpus.txt`"
        raise InputError("--data goes with a model's folder", "no folder", hint)
    folder = located(checkpoint)
    load = load_adapted if (folder / ADAPTER).is_file() else load_model
    pretrained = load(folder, dtype, trust=trust)
    read = _images if pretrained.task == "image classes" else _texts
    shown = read(pretrained, data, wanted, trust)
    return Parts(
        model=pretrained.model,
        loss=NAMED["huggingface"](),
        data=shown.examples,
        dtype=next(pretrained.model.parameters()).dtype,
        checkpoint=CheckpointReport(path=str(checkpoint), sha256=_sha256(pretrained)),
        where=f"--data {data}",
        batch_size=shown.batch_size,
        notes=pretrained.notes,
        seen=shown.seen,
        origin=Origin(
            facts={
                "transformers": version("transformers"),
                "config": pretrained.config_sha256,
                "data": shown.sha256,
                "tokenizer": shown.reader_sha256,
                **wanted.options,
            },
            data=DataReport(path=data, sha256=shown.sha256),
            tokenizer_sha256=None if read is _images else shown.reader_sha256,
            file=pretrained.checkpoint.path,
            trust=trust,
        ),
    )


@dataclass(frozen=True)
class _Shown:
    """What a model is shown.

    Attributes:
        examples: as they are fetched.
        sha256: of the data.
        reader_sha256: of the tokenizer or the processor of images.
        batch_size: where the user does not say.
        seen: what is to be said once they are fetched.
    """

    examples: Examples
    sha256: str
    reader_sha256: str
    batch_size: int
    seen: Callable[[], tuple[str, ...]]


def _texts(pretrained: Pretrained, data: str, wanted: Wanted, trust: bool) -> _Shown:
    """Text as the folder's tokenizer reads it."""
    table = read_table(data)
    tokenizer = load_tokenizer(pretrained, trust=trust)
    examples, seen = text_examples(pretrained, tokenizer, table, wanted)
    batch_size = tokens_together(longest(pretrained, tokenizer, wanted))
    return _Shown(examples, table.sha256, tokenizer_sha256(tokenizer), batch_size, seen)


def _images(pretrained: Pretrained, data: str, wanted: Wanted, trust: bool) -> _Shown:
    """Images as the folder's processor reads them."""
    for option, value in wanted.options.items():
        if value is not None:
            got = f"{option} {value} for {type(pretrained.model).__name__}"
            raise UsageError(
                "images have no text, and their folders are their labels", got, f"no {option}"
            )
    processor = load_processor(pretrained, trust=trust)
    images = Images(pretrained, processor, Path(data))
    said = hashlib.sha256(processor.to_json_string().encode()).hexdigest()
    return _Shown(Examples(images), images.sha256, said, BATCH, lambda: images.notes)


def _sha256(pretrained: Pretrained) -> str:
    """Of weights and of how they are put together."""
    said = f"{pretrained.checkpoint.sha256}{pretrained.config_sha256}"
    return hashlib.sha256(said.encode()).hexdigest()
