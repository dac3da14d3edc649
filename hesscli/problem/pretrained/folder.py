"""Where a model lies that transformers or PEFT saved: a folder, or a name that the cache knows."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hesscli.errors import InputError, first_line, missing_file

CONFIG, ADAPTER = "config.json", "adapter_config.json"
TOKENIZER = "tokenizer_config.json"

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# As transformers and PEFT look for them.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_OF_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_INSTALL = "pip install 'hesscli[hf]'"


def is_pretrained(path: Path) -> bool:
    """Whether a folder says itself how its model is built."""
    return any((path / name).is_file() for name in (CONFIG, ADAPTER))


def located(checkpoint: Path) -> Path:
    """The folder itself, or the one that the cache has for a name; nothing is downloaded.

    Raises:
        InputError: there is neither, or it is not of a model.
    """
    if is_pretrained(checkpoint):
        return checkpoint
    if checkpoint.is_dir():
        got = f"{checkpoint}: no {CONFIG} and no {ADAPTER}"
        hint = "a folder that save_pretrained wrote; for weights alone a spec, and no --data"
        raise InputError("the folder does not say how its model is built", got, hint)
    if checkpoint.is_file():
        hint = f"{checkpoint.parent}, the folder" if is_pretrained(checkpoint.parent) else "a spec"
        got = f"{checkpoint} is a file"
        raise InputError("--data goes with a folder that save_pretrained wrote", got, hint)
    if not _NAME.fullmatch(str(checkpoint)):
        raise missing_file("folder", checkpoint)
    return _cached(str(checkpoint))


def _cached(name: str) -> Path:
    require("huggingface_hub", "a model's name")
    from huggingface_hub import constants, try_to_load_from_cache

    for file in (CONFIG, ADAPTER):
        try:
            found = try_to_load_from_cache(name, file)
        except ValueError:  # it can be the name of nothing
            break
        if isinstance(found, str):
            return Path(found).parent
    raise InputError(
        "no such folder, and no model of that name in the cache",
        f"{name}; the cache is {constants.HF_HUB_CACHE}",
        f"`hf download {name}`, which fetches it once: hesscli itself downloads nothing",
    )


def weights_of(folder: Path) -> Path:
    """The file of weights, or the index of its shards, that transformers would read.

    Raises:
        InputError: there is none.
    """
    names = _OF_ADAPTERS if (folder / ADAPTER).is_file() else (*_WEIGHTS, *_PICKLED)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    got = f"{folder}: none of {', '.join(names)}"
    raise InputError("the folder holds no weights", got, "copy or download it whole")


def read_json(path: Path) -> dict[str, Any]:
    """What a configuration says.

    Raises:
        InputError: it is no JSON object.
    """
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(said, dict):
            return said
        reason = f"a {type(said).__name__}"
    except (OSError, ValueError, RecursionError) as error:
        reason = first_line(error)
    raise InputError(f"{path.name} is not a JSON object", f"{path}: {reason}", "copy it again")


def require(module: str, what: str) -> None:
    """Refuse what a library that is not there would have to do.

    Raises:
        InputError: it is not installed.
    """
    if find_spec(module) is None:
        raise InputError(f"{what} needs {module}", "it is not installed", _INSTALL)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars, reports and warnings of transformers; errors come through."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
