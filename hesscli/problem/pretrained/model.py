"""The model of a folder: its class as transformers resolves it, its weights, and what it does."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from hesscli.errors import HesscliError, InputError, first_line
from hesscli.memory import is_out_of_memory
from hesscli.problem.checkpoint import Checkpoint, read_checkpoint
from hesscli.problem.forward import cast
from hesscli.problem.precision import as_wide
from hesscli.problem.pretrained.folder import CONFIG, quiet, read_json, require, weights_of

Task = Literal["causal", "seq2seq", "masked", "sequence classes", "token classes", "image classes"]
"""What a model is asked, and so what its examples are."""

# The auto class of each task; a class that stands under two is of the first.
AUTO_CLASSES: dict[Task, str] = {
    "seq2seq": "AutoModelForSeq2SeqLM",
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "sequence classes": "AutoModelForSequenceClassification",
    "token classes": "AutoModelForTokenClassification",
    "image classes": "AutoModelForImageClassification",
}
_MOST_NAMED = 5
_ALIGNMENT = 64
"""Bytes; torch's allocator gives no other places on a CPU."""


@dataclass(frozen=True)
class Pretrained:
    """A model with its weights.

    Attributes:
        model: in evaluation mode, with plain attention and no cache.
        task: what it does.
        folder: where its configuration lies, and its tokenizer's.
        checkpoint: its weights as they were read.
        config_sha256: of how it is built.
        notes: what its reader should be told.
    """

    model: nn.Module
    task: Task
    folder: Path
    checkpoint: Checkpoint
    config_sha256: str
    notes: tuple[str, ...] = ()

    @property
    def config(self) -> Any:
        """The model's own account of itself."""
        return self.model.config


@dataclass(frozen=True)
class Other:
    """What an adapter makes of its base: a model for a task, whose head it brings.

    Attributes:
        task: of the adapter.
        heads: names of modules that the base may lack.
        num_labels: classes of the head; None where there is none.
    """

    task: Task
    heads: tuple[str, ...]
    num_labels: int | None


def load_model(
    folder: Path,
    dtype: torch.dtype | None = None,
    *,
    trust: bool = False,
    other: Other | None = None,
) -> Pretrained:
    """Build the class that ``architectures`` names, and give it the folder's weights.

    Args:
        folder: as ``save_pretrained`` writes it.
        dtype: to compute in; default the weights', where that is float64, else float32.
        trust: whether code in the folder may run.
        other: what it is to be instead, where an adapter makes something else of it.

    Raises:
        InputError: transformers does not know the class, or the weights are not all of it.
    """
    require("transformers", "a Hugging Face folder")
    config = read_config(folder, trust=trust)
    kept: tuple[str, ...] = ()
    kind, task = _class_of(config, folder, trust=trust, other=other)
    if other is not None and other.num_labels is not None:
        config.num_labels, kept = other.num_labels, other.heads
    checkpoint = read_checkpoint(weights_of(folder), trust=trust)
    chosen = as_wide(checkpoint.state.values()) if dtype is None else dtype
    model, notes = with_weights(kind, config, checkpoint, chosen, kept)
    said = hashlib.sha256(json.dumps(read_json(folder / CONFIG), sort_keys=True).encode())
    return Pretrained(model, task, folder, checkpoint, said.hexdigest(), checkpoint.notes + notes)


def read_config(folder: Path, *, trust: bool) -> Any:
    """The folder's configuration, as transformers reads it.

    Raises:
        InputError: it asks for code that is not trusted, for a library that is newer, or for
            weights that have no derivatives.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    said = read_json(folder / CONFIG)
    kind = said.get("model_type")
    if kind not in CONFIG_MAPPING and not ("auto_map" in said and trust):
        if "auto_map" in said:
            got = f"{folder / CONFIG}: auto_map names {', '.join(_code(said['auto_map']))}"
            raise InputError("the model is code that lies in its folder", got, "--trust runs it")
        got = f"{folder / CONFIG}: model_type {kind!r}"
        hint = "a newer transformers, or a spec with a [model] factory of your own"
        if "architecture" in said:
            got = f"{folder / CONFIG}: a network of timm's, {said['architecture']!r}"
            hint = f"`hesscli init {shlex.quote(str(folder))}`, which writes a spec for it"
        raise InputError("transformers does not know this kind of model", got, hint)
    if "quantization_config" in said:
        hint = "the folder in floating point that it was made from: quantised weights have none"
        raise InputError("its weights are quantised", f"{folder / CONFIG}", hint)
    with blamed_on_transformers(f"the configuration in {folder} cannot be read"):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)


def _code(auto_map: Any) -> list[str]:
    found = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    return [str(name) for name in found][:_MOST_NAMED]


def _class_of(
    config: Any, folder: Path, *, trust: bool, other: Other | None = None
) -> tuple[Any, Task]:
    """The class that the configuration or an adapter names, and the task that it is for."""
    import transformers

    names = list(config.architectures or ())
    name = str(names[0]) if names else ""
    if other is not None and name not in classes_for(other.task):
        fitting = list(_flat([_mapping(other.task).get(config.model_type, ())]))
        if fitting:
            return getattr(transformers, fitting[0]), other.task
    if trust and (found := _class_in_folder(config, name, folder)) is not None:
        return found
    task = next((task for task in AUTO_CLASSES if name in classes_for(task)), None)
    if task is None:
        got = f"{folder / CONFIG}: architectures {names}"
        hint = "a spec with [model] factory and [loss] step; no spec is needed for " + ", ".join(
            auto.removeprefix("AutoModelFor") for auto in AUTO_CLASSES.values()
        )
        raise InputError("the class of the model does not say what it is trained for", got, hint)
    return getattr(transformers, name), task


def classes_for(task: Task) -> Collection[str]:
    """Names of the classes that transformers has for a task."""
    return set(_flat(_mapping(task).values()))


def _mapping(task: Task) -> Mapping[str, Any]:
    """The names of classes by kind of model."""
    from transformers.models.auto import modeling_auto

    found: Mapping[str, Any] = getattr(modeling_auto, _MAPPINGS[task])
    return found


_MAPPINGS: dict[Task, str] = {
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "sequence classes": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token classes": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "image classes": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}


def _flat(names: Iterable[Any]) -> Iterator[str]:
    for name in names:
        yield from [name] if isinstance(name, str) else name


def _class_in_folder(config: Any, name: str, folder: Path) -> tuple[Any, Task] | None:
    """The class in a trusted folder's own code, where its configuration names one."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    auto_map = getattr(config, "auto_map", None) or {}
    for task, auto in AUTO_CLASSES.items():
        reference = auto_map.get(auto)
        if reference is not None and reference.rpartition(".")[2] == name:
            with blamed_on_transformers(f"the code in {folder} failed"):
                return get_class_from_dynamic_module(reference, folder, local_files_only=True), task
    return None


def with_weights(
    kind: Any, config: Any, checkpoint: Checkpoint, dtype: torch.dtype, kept: Collection[str] = ()
) -> tuple[nn.Module, tuple[str, ...]]:
    """A class's model with all of its weights from a checkpoint, and what was left aside.

    Attention is plain and experts are taken one by one, for other kernels have no second
    derivatives; nothing is cached from one forward pass to the next.

    Args:
        kind: the class.
        config: what it is built from.
        checkpoint: the weights.
        dtype: of the model.
        kept: beginnings of names that may be missing, since others bring them.

    Raises:
        InputError: weights are missing, which transformers would draw at random, or do not fit.
    """
    config.use_cache = False
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    with quiet(), blamed_on_transformers("transformers cannot build the model"):
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(checkpoint.state),
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **options,
        )
        # What transformers says once of the loss, it says here.
        getattr(model, "loss_function", None)
    missing = [n for n in sorted(info["missing_keys"]) if not n.startswith(tuple(kept))]
    if missing:
        raise InputError(
            "the folder lacks weights of its model, which transformers would draw at random",
            f"{checkpoint.path}: {len(missing)} missing for {kind.__name__}: {listed(missing)}",
            "the folder that was saved after training, or in config.json the architectures whose "
            "weights these are",
        )
    if misfits := sorted(info["mismatched_keys"]):
        shapes = [f"{name} {list(found)}, expected {list(own)}" for name, found, own in misfits]
        raise InputError(
            "the folder's weights are not of the shapes that its config.json says",
            f"{checkpoint.path}: {listed(shapes)}",
            "the config.json that was saved with these weights",
        )
    aside = sorted(info["unexpected_keys"])
    told = f"weights that {kind.__name__} does not have, left aside: {listed(aside)}"
    return _aligned(cast(model, None, dtype)), (told,) if aside else ()


def _aligned(model: nn.Module) -> nn.Module:
    """The same model, its tensors where torch would have put them.

    They may lie at any place of what was read from a file, where kernels are slower and round
    otherwise than those of the same weights elsewhere.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()
    return model


@contextmanager
def blamed_on_transformers(what: str) -> Iterator[None]:
    """Turn whatever transformers raises on a folder or a file into an `InputError`."""
    try:
        yield
    except (HesscliError, KeyboardInterrupt):
        raise
    except Exception as error:  # of any kind: they come from all over the library
        if is_out_of_memory(error):
            raise
        got = first_line(error) or type(error).__name__
        raise InputError(what, got, "the folder as save_pretrained wrote it, whole") from error


def listed(names: list[str]) -> str:
    """The first of many names, and how many more there are."""
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
