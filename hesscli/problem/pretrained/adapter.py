"""Adapters as PEFT saves them: laid onto their base, and they alone are trainable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hesscli.errors import InputError
from hesscli.problem.checkpoint import read_checkpoint
from hesscli.problem.forward import cast
from hesscli.problem.pretrained.folder import (
    ADAPTER,
    TOKENIZER,
    located,
    quiet,
    read_json,
    require,
    weights_of,
)
from hesscli.problem.pretrained.model import (
    Other,
    Pretrained,
    Task,
    blamed_on_transformers,
    listed,
    load_model,
)

_TASKS: dict[str, Task] = {
    "CAUSAL_LM": "causal",
    "SEQ_2_SEQ_LM": "seq2seq",
    "SEQ_CLS": "sequence classes",
    "TOKEN_CLS": "token classes",
}


def load_adapted(
    folder: Path, dtype: torch.dtype | None = None, *, trust: bool = False
) -> Pretrained:
    """The base that an adapter names, frozen, with the adapter on it.

    Args:
        folder: as PEFT's ``save_pretrained`` writes it.
        dtype: to compute in; default the base's, where that is float64, else float32.
        trust: whether code in the base's folder may run.

    Raises:
        InputError: the base is not there, or the adapter's weights are not all there.
    """
    require("transformers", "a Hugging Face folder")
    require("peft", "an adapter")
    import peft

    said = read_json(folder / ADAPTER)
    with blamed_on_transformers(f"the adapter in {folder} cannot be read"):
        config = peft.PeftConfig.from_pretrained(folder)
    checkpoint = read_checkpoint(weights_of(folder), trust=trust)
    base = load_model(
        _base_of(said, folder), dtype, trust=trust, other=_other(said, checkpoint.state)
    )
    config.inference_mode = False
    base.model.name_or_path = said["base_model_name_or_path"]
    with quiet(), blamed_on_transformers("PEFT cannot lay the adapter onto its base"):
        with torch.random.fork_rng(devices=[]):  # it draws what is then overwritten
            model = peft.get_peft_model(base.model, config)
        loaded = peft.set_peft_model_state_dict(model, checkpoint.state)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if missing := sorted(trained.intersection(loaded.missing_keys)):
        got = f"{checkpoint.path}: {len(missing)} missing: {listed(missing)}"
        raise InputError("the folder lacks weights of its adapter", got, "copy it again, whole")
    if strangers := sorted(loaded.unexpected_keys):
        got = f"{checkpoint.path}: {len(strangers)} unexpected: {listed(strangers)}"
        hint = f"the base that it was trained on, as base_model_name_or_path in {ADAPTER}"
        raise InputError("the adapter does not fit its base", got, hint)
    dtype = next(base.model.parameters()).dtype
    return replace(
        base,
        model=cast(model, None, dtype).eval(),
        folder=folder if (folder / TOKENIZER).is_file() else base.folder,
        checkpoint=replace(checkpoint, sha256=_hash(base.checkpoint.sha256, checkpoint.sha256)),
        config_sha256=_hash(base.config_sha256, json.dumps(said, sort_keys=True)),
        notes=base.notes + checkpoint.notes,
    )


def _base_of(said: Mapping[str, Any], folder: Path) -> Path:
    """The folder of the base, which the adapter names by its path or its name."""
    name = str(said.get("base_model_name_or_path") or "")
    if not name:
        got = f"{folder / ADAPTER}: no base_model_name_or_path"
        raise InputError("the adapter does not name its base", got, "name the base's folder there")
    try:
        return located(Path(name))
    except InputError as error:
        got = f"{folder / ADAPTER}: {error.got}"
        raise InputError(f"the adapter's base: {error.what}", got, error.hint) from None


def _other(said: Mapping[str, Any], state: Mapping[str, Tensor]) -> Other | None:
    """The class that an adapter's task wants, whose head comes with the adapter."""
    task = _TASKS.get(str(said.get("task_type")))
    if task is None:
        return None
    heads = tuple(said.get("modules_to_save") or ())
    sizes = [
        len(tensor)
        for name, tensor in state.items()
        if tensor.dim() == 2 and any(f".{head}." in name for head in heads)
    ]
    return Other(task, heads, sizes[-1] if sizes else None)


def _hash(*parts: str) -> str:
    return hashlib.sha256("".join(parts).encode()).hexdigest()
