"""What builds a checkpoint's network: code beside it, or a library that knows it by a name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from hesscli.errors import InputError
from hesscli.problem.code_beside import ModelClass, absent_imports, find_models
from hesscli.problem.factory import how_to_install
from hesscli.problem.pretrained.folder import CONFIG, read_json
from hesscli.problem.spec import FILL_IN

_NAMED = re.compile(r"(timm|torchvision):([\w.-]+)")
_HEAD = re.compile(r"(^|[._])(head|lm_head|classifier|fc|out|output|logits)\d*[._]", re.IGNORECASE)
_LONGEST = 300
_COLOURS = 3
_LARGEST = 1 << 63

# Where files keep the arguments that their model was built with; Lightning's own come first.
_ARGUMENTS = ("hyper_parameters", "hparams", "module_arguments", "model_args", "model_kwargs")
_LOSSES = {
    "cross_entropy": ("cross_entropy", "CrossEntropyLoss"),
    "mse": ("mse_loss", "MSELoss"),
    "bce_with_logits": ("binary_cross_entropy_with_logits", "BCEWithLogitsLoss"),
    "bce": ("binary_cross_entropy", "BCELoss"),
    "nll": ("nll_loss", "NLLLoss"),
}


@dataclass(frozen=True)
class Library:
    """A library that builds networks by their names.

    Attributes:
        factory: what builds one, as a spec has it.
        name: the argument that its name goes by.
        save: Python that saves the weights that the library itself has of it.
    """

    factory: str
    name: str
    save: str


LIBRARIES = {
    "timm": Library("timm:create_model", "model_name", 'timm.create_model("{0}", pretrained=True)'),
    "torchvision": Library(
        "torchvision.models:get_model",
        "name",
        'torchvision.models.get_model("{0}", weights="DEFAULT")',
    ),
}


@dataclass(frozen=True)
class Named:
    """A network of a library's.

    Attributes:
        library: which one.
        name: what it calls the network.
        options: what else it is told.
    """

    library: str
    name: str
    options: Mapping[str, Any]

    def save(self, file: str) -> str:
        """A command that writes the library's own weights of it to a file."""
        made = LIBRARIES[self.library].save.format(self.name)
        return (
            f"python -c 'import torch, {self.library}; torch.save({made}.state_dict(), \"{file}\")'"
        )


def named(text: str) -> Named | None:
    """What ``timm:NAME`` or ``torchvision:NAME`` says; None of anything else."""
    found = _NAMED.fullmatch(text)
    return Named(found[1], found[2], {}) if found else None


def of_timm(folder: Path) -> Named | None:
    """The network of a folder that timm saved, whose config.json is not transformers'."""
    if not (folder / CONFIG).is_file():
        return None
    try:
        said = read_json(folder / CONFIG)
    except InputError:
        return None
    name, arguments = said.get("architecture"), said.get("model_args")
    if "model_type" in said or not isinstance(name, str):
        return None
    more = {"num_classes": said["num_classes"]} if "num_classes" in said else {}
    return Named("timm", name, more | (arguments if isinstance(arguments, dict) else {}))


@dataclass(frozen=True)
class Builder:
    """The [model] table of a spec.

    Attributes:
        lines: of the table.
        needs: how to install what it needs and is not there.
        loss: the one that its code speaks of, and where.
    """

    lines: tuple[str, ...]
    needs: tuple[str, ...] = ()
    loss: tuple[str, str] | None = None


def builder_of(
    folder: Path, state: Mapping[str, Tensor], said: Mapping[str, Any], asked: Named | None
) -> Builder:
    """What builds the network that some weights are of.

    Args:
        folder: where its code may lie.
        state: the weights.
        said: what else their file says, in plain values.
        asked: the library's network that the user has named.
    """
    if asked is not None:
        return _of_library(asked, state, "")
    models = sorted(find_models(folder), key=lambda model: model.reference)
    fits = {model.reference: _fit(model, state) for model in models}
    best = max(models, key=lambda model: fits[model.reference], default=None)
    arch = _said_name(said)
    if arch is not None and (best is None or not fits[best.reference][0]):
        others = [model.reference for model in models]
        why = f"  # a guess: the file says arch = {quote(arch.name)}{listed(others)}"
        return _of_library(arch, state, why)
    key, saved = _saved(said)
    if best is None:
        return _unknown(key, saved)
    others = [model.reference for model in models if model is not best]
    why = f"# a guess: its attributes fit best{listed(others)}"
    lines = [f"factory = {quote(best.reference)}  {why}", *_arguments(best, key, saved, said)]
    needs = [how_to_install(name) for name in absent_imports(best.file)]
    return Builder(tuple(lines), tuple(needs), _loss_in(best))


def _fit(model: ModelClass, state: Mapping[str, Tensor]) -> tuple[bool, int, int]:
    """How well a class's attributes explain names: all, how many, how many within a part."""
    inside: dict[str, set[str]] = {}
    for name in state:
        top, _, rest = name.partition(".")
        inside.setdefault(top, set()).add(rest.partition(".")[0])
    own = inside.keys() & model.attributes
    within = max((len(below & model.attributes) for below in inside.values()), default=0)
    return len(own) == len(inside) > 0, len(own), within


# -- A library's network ---------------------------------------------------------------------------


def _said_name(said: Mapping[str, Any]) -> Named | None:
    """The network that a training script noted: timm's, or one like torchvision's examples."""
    arch = said.get("arch")
    if not isinstance(arch, str):
        return None
    return named(f"{'timm' if 'version' in said else 'torchvision'}:{arch}")


def _of_library(network: Named, state: Mapping[str, Tensor], why: str) -> Builder:
    library = LIBRARIES[network.library]
    options = {library.name: network.name, **network.options}
    told = []
    if "num_classes" not in options and (head := outputs_of(state)) is not None:
        options["num_classes"] = head[1]
        told.append(f"{quote(head[0])} has {head[1]} outputs")
    pictures = [value.shape[1] for value in state.values() if value.dim() == 4]
    known = network.library != "timm" or "in_chans" in options
    if pictures and pictures[0] != _COLOURS and not known:
        options["in_chans"] = pictures[0]
        told.append(f"its first convolution sees {pictures[0]} channels")
    guess = f"  # a guess: {'; '.join(told)}" if told else ""
    lines = (f"factory = {quote(library.factory)}{why}", f"kwargs = {as_toml(options)}{guess}")
    absent = find_spec(network.library) is None
    return Builder(lines, (how_to_install(network.library),) if absent else ())


def outputs_of(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """The matrix that probably makes the outputs, and how many those are."""
    matrices = {name: value for name, value in state.items() if value.dim() > 1}
    if not matrices:
        return None
    last = next((name for name in reversed(matrices) if _HEAD.search(name)), list(matrices)[-1])
    return last, matrices[last].shape[0]


# -- A class, and the arguments that it was built with ---------------------------------------------


def _saved(said: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The arguments that a file keeps, and what it calls them."""
    for key in _ARGUMENTS:
        if isinstance(held := said.get(key), dict) and held:
            return key, held
    return "", {}


def _arguments(
    model: ModelClass, key: str, saved: Mapping[str, Any], said: Mapping[str, Any]
) -> list[str]:
    """Lines that say what a class is called with: what is known, and what is to be filled in."""
    whole = said.get("hparams_name")
    if whole in model.arguments:  # Lightning keeps the one argument that held them all
        saved = {str(whole): dict(saved)}
    elif not model.takes_any:
        saved = {name: value for name, value in saved.items() if name in model.arguments}
    told = f"of {model.signature}"
    if saved:
        unknown = {name: FILL_IN for name in model.required if name not in saved}
        head = f"[model.kwargs]  # as the checkpoint's {key} say, {told}"
        return ["", head, *_table({**saved, **unknown})]
    if model.required:
        return [
            f"kwargs = {as_toml(dict.fromkeys(model.required, FILL_IN))}  # as in training, {told}"
        ]
    return [f"# kwargs = {{ }}  # what was not as by default in training, {told}"]


def _unknown(key: str, saved: Mapping[str, Any]) -> Builder:
    lines = [f'factory = "{FILL_IN}:{FILL_IN}"  # module:callable that builds the network']
    if saved:
        lines += ["", f"[model.kwargs]  # as the checkpoint's {key} say", *_table(saved)]
    else:
        lines.append("# kwargs = { width = 16 }")
    return Builder(tuple(lines))


def _table(values: Mapping[str, Any]) -> list[str]:
    """A line for each; what TOML cannot say is to be filled in, or left to its default."""
    lines = []
    for name, value in values.items():
        text = as_toml(value)
        if value is None:
            lines.append(f"# {quote(name)} was None")
        elif text is None or len(text) > _LONGEST:
            lines.append(f'{_key(name)} = "{FILL_IN}"  # the file has what is not copied here')
        else:
            lines.append(f"{_key(name)} = {text}")
    return lines


def _loss_in(model: ModelClass) -> tuple[str, str] | None:
    """The one loss that a Lightning module speaks of."""
    if not model.is_lightning:
        return None
    found = [loss for loss, names in _LOSSES.items() if not model.names.isdisjoint(names)]
    return (found[0], f"{model.node.name} speaks of it") if len(found) == 1 else None


# -- TOML ------------------------------------------------------------------------------------------


def quote(text: str) -> str:
    """A TOML string; JSON's escapes are a part of TOML's."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def listed(others: Sequence[str]) -> str:
    """What else it could be, in a comment."""
    return f"; or {', '.join(others[:3])}" if others else ""


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else quote(name)


def as_toml(value: Any) -> str | None:
    """A plain value in one line; None where TOML has no such value."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            return quote(value)
        case int():
            return str(value) if -_LARGEST <= value < _LARGEST else None
        case float():
            return repr(value) if math.isfinite(value) else str(value)
        case list() | tuple():
            return _joined("[{}]", map(as_toml, value))
        case dict():
            pairs = (
                (_key(str(name)), as_toml(inner))
                for name, inner in value.items()
                if inner is not None
            )
            return _joined("{{ {} }}", (text and f"{key} = {text}" for key, text in pairs))
    return None


def _joined(around: str, parts: Iterable[str | None]) -> str | None:
    texts = list(parts)
    return None if None in texts else around.format(", ".join(map(str, texts)))
