"""From a model's folder and its data to the parts of a Problem; no spec is needed."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

import torch

from hesscli.errors import InputError
from hesscli.problem.criteria import NAMED
from hesscli.problem.parts import Origin, Parts
from hesscli.problem.pretrained.examples import (
    Wanted,
    load_tokenizer,
    longest,
    text_examples,
    tokenizer_sha256,
    tokens_together,
)
from hesscli.problem.pretrained.folder import located
from hesscli.problem.pretrained.model import Pretrained, load_model
from hesscli.problem.pretrained.tables import read_table
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
    pretrained = load_model(located(checkpoint), dtype, trust=trust)
    table = read_table(data)
    tokenizer = load_tokenizer(pretrained, trust=trust)
    examples, seen = text_examples(pretrained, tokenizer, table, wanted)
    digest = tokenizer_sha256(tokenizer)
    return Parts(
        model=pretrained.model,
        loss=NAMED["huggingface"](),
        data=examples,
        dtype=next(pretrained.model.parameters()).dtype,
        checkpoint=CheckpointReport(path=str(checkpoint), sha256=_sha256(pretrained)),
        where=f"--data {data}",
        batch_size=tokens_together(longest(pretrained, tokenizer, wanted)),
        notes=pretrained.notes,
        seen=seen,
        origin=Origin(
            facts={
                "transformers": version("transformers"),
                "config": pretrained.config_sha256,
                "tokenizer": digest,
                "data": table.sha256,
                "--text": wanted.text,
                "--labels": wanted.labels,
                "--sequence": wanted.sequence,
            },
            data=DataReport(path=table.place, sha256=table.sha256),
            tokenizer_sha256=digest,
        ),
    )


def _sha256(pretrained: Pretrained) -> str:
    """Of weights and of how they are put together."""
    said = f"{pretrained.checkpoint.sha256}{pretrained.config_sha256}"
    return hashlib.sha256(said.encode()).hexdigest()
