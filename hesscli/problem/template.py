"""A first spec for `hesscli init`, guessed from a checkpoint and the files beside it.

Python files are parsed, never imported, and of data files only the headers are read.
"""

from __future__ import annotations

import ast
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hesscli.errors import shorten
from hesscli.problem.checkpoint import read_checkpoint
from hesscli.problem.torch_files import SeveralSetsError, key_line

_PLACEHOLDER = "REPLACE:REPLACE"
_TARGET = re.compile(r"(^|_)(targets?|labels?|y|next|classes)(_|$)", re.IGNORECASE)
_NOT_TRAINED_ON = re.compile(r"held|test|val", re.IGNORECASE)
_HEAD = re.compile(r"(^|[._])(head|lm_head|classifier|fc|out|output|logits)\d*[._]", re.IGNORECASE)
_EMBEDDING = re.compile(r"emb|wte|symbols|vocab", re.IGNORECASE)


@dataclass(frozen=True)
class _Model:
    """A class deriving from nn.Module, as its source shows it."""

    reference: str
    attributes: frozenset[str]
    signature: str
    required: bool


@dataclass(frozen=True)
class _Data:
    """The tensors of a data file that could be inputs and targets, row by row."""

    file: str
    inputs: tuple[str, ...]
    targets: str
    whole_targets: bool
    alike: bool


def write_template(checkpoint: Path, *, trust: bool = False) -> str:
    """The text of a commented spec; every guess is marked as one.

    Args:
        checkpoint: the file or folder that the spec is for; the spec belongs beside or in it.
        trust: whether code in the checkpoint may run.
    """
    sets: tuple[str, ...] = ()
    try:
        read = read_checkpoint(checkpoint, trust=trust)
    except SeveralSetsError as several:
        sets = several.names[::-1]
        read = read_checkpoint(checkpoint, trust=trust, key=sets[0])
    folder = (checkpoint if checkpoint.is_dir() else checkpoint.parent).absolute()
    data = _find_data(folder, exclude=read.path)
    blocks = [
        _describe(read.path.name, read.state, sets),
        "" if read.module else _model_block(folder, read.state),
        _data_block(folder, data),
        _loss_block(read.state, data),
    ]
    return "\n".join(block for block in blocks if block)


def _describe(name: str, state: Mapping[str, Tensor], sets: Sequence[str]) -> str:
    """What the file holds, its name, and which of its sets of weights is meant."""
    matrices = [(key, tuple(value.shape)) for key, value in state.items() if value.dim() > 1]
    ends = [matrices[0], matrices[-1]] if matrices else []
    shapes = " ... ".join(f"{json.dumps(shorten(name, 120))} {shape}" for name, shape in ends)
    chosen = f"{key_line(sets[0])}  # a guess{_or(list(map(_quote, sets[1:])))}\n" if sets else ""
    count = sum(value.numel() for value in state.values() if value.is_floating_point())
    return (
        f"# {len(state)} tensors, {count:,} numbers: {shapes}\n"
        f"# Paths are relative to this file. Try it with: hesscli check {shlex.quote(name)}\n"
        f"checkpoint = {_quote(name)}\n{chosen}"
    )


def _model_block(folder: Path, state: Mapping[str, Tensor]) -> str:
    models = sorted(_find_models(folder), key=lambda model: model.reference)
    if not models:
        return (
            "[model]\n"
            f'factory = "{_PLACEHOLDER}"  # module:callable that builds the network\n'
            "# kwargs = { width = 16 }\n"
        )
    tops = {name.split(".")[0] for name in state}
    best = max(models, key=lambda model: len(tops & model.attributes))
    others = [model.reference for model in models if model != best]
    kwargs = f"kwargs = {{ }}  # as trained with: {best.signature}"
    return (
        "[model]\n"
        f"factory = {_quote(best.reference)}  # a guess: its attributes fit best{_or(others)}\n"
        f"{'' if best.required else '# '}{kwargs}\n"
    )


def _data_block(folder: Path, data: _Data | None) -> str:
    options = (
        "# batch_size = 128\n# unseen = true        # where these examples were not trained on\n"
    )
    if data:
        names = [_quote(name) for name in data.inputs]
        inputs = names[0] if len(names) == 1 else f"[{', '.join(names)}]"
        return (
            "[data]\n"
            f"file = {_quote(data.file)}  # a guess: a data file beside the checkpoint\n"
            f"inputs = {inputs}  # a guess\n"
            f"targets = {_quote(data.targets)}  # a guess\n{options}"
        )
    found = sorted(_find_loaders(folder))
    if not found:
        comment = "module:callable that returns a dataset or batches"
        return f'[data]\nfactory = "{_PLACEHOLDER}"  # {comment}\n{options}'
    comment = f"a guess: by its name{_or(found[1:])}"
    return f"[data]\nfactory = {_quote(found[0])}  # {comment}\n{options}"


def _or(others: Sequence[str]) -> str:
    return f"; or {', '.join(others[:3])}" if others else ""


def _loss_block(state: Mapping[str, Tensor], data: _Data | None) -> str:
    name, why = _guess_loss(state, data)
    return (
        "[loss]\n"
        f'name = "{name}"  # a guess: {why}\n'
        "# others: cross_entropy, mse, bce_with_logits, bce, nll, language_model, huggingface;\n"
        '# or your own: factory = "losses:fn" of (outputs, targets), or step = "losses:step" of\n'
        "# (model, batch), which returns its mean loss, or (mean loss, what it was divided by)\n"
        "# weight_decay = 0.0    # as trained with, where the curvature should include it\n"
    )


def _guess_loss(state: Mapping[str, Tensor], data: _Data | None) -> tuple[str, str]:
    matrices = {name: value for name, value in state.items() if value.dim() > 1}
    if data and data.alike and data.whole_targets:
        return "language_model", f"{_quote(data.targets)} are whole numbers, shaped like the inputs"
    if data and not data.whole_targets:
        return "mse", f"{_quote(data.targets)} are not whole numbers"
    if not matrices:
        return "mse", "there is no matrix to tell from"
    last = next((name for name in reversed(matrices) if _HEAD.search(name)), list(matrices)[-1])
    outputs = matrices[last].shape[0]
    tables = {name for name in matrices if _EMBEDDING.search(name)}
    if any(matrices[name].shape[0] == outputs for name in tables):
        return "language_model", f"an embedding has as many rows as there are outputs, {outputs}"
    if outputs == 1:
        return "mse", f"{_quote(last)} has 1 output"
    return "cross_entropy", f"{_quote(last)} has {outputs} outputs"


def _find_models(folder: Path) -> Iterator[_Model]:
    for path, tree in _sources(folder):
        known: set[str] = {"Module", "LightningModule", "PreTrainedModel"}
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and _derives(node, known):
                known.add(node.name)
                yield _describe_class(node, path.stem)


def _describe_class(node: ast.ClassDef, module: str) -> _Model:
    attributes = {
        inner.attr
        for inner in ast.walk(node)
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store)
    }
    starts = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
    arguments = starts[0].args if starts else None
    signature = ast.unparse(arguments).removeprefix("self").lstrip(", ") if arguments else ""
    return _Model(
        f"{module}:{node.name}",
        frozenset(attributes),
        f"{node.name}({' '.join(signature.split())})",
        arguments is not None and _needs_arguments(arguments, given=1),
    )


def _find_loaders(folder: Path) -> Iterator[str]:
    """Functions without required arguments, and datasets, that are named like data."""
    for path, tree in _sources(folder):
        for node in tree.body:
            match node:
                case ast.FunctionDef() if not _needs_arguments(node.args, given=0):
                    name = node.name
                case ast.ClassDef() if _derives(node, {"Dataset"}):
                    name = node.name
                case _:
                    continue
            if "data" in name.lower() or "loader" in name.lower():
                yield f"{path.stem}:{name}"


def _sources(folder: Path) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(folder.glob("*.py")):
        if path.stem.isidentifier():
            try:
                yield path, ast.parse(path.read_bytes())
            except (SyntaxError, ValueError, OSError):
                continue


def _derives(node: ast.ClassDef, bases: set[str]) -> bool:
    return any(ast.unparse(base).split(".")[-1] in bases for base in node.bases)


def _needs_arguments(arguments: ast.arguments, *, given: int) -> bool:
    positional = len(arguments.posonlyargs) + len(arguments.args) - given
    return positional > len(arguments.defaults) or None in arguments.kw_defaults


def _find_data(folder: Path, *, exclude: Path) -> _Data | None:
    """The first .safetensors file whose tensors have one length, as inputs and targets have."""
    for path in sorted(folder.glob("*.safetensors")):
        if path.resolve() == exclude.resolve() or _NOT_TRAINED_ON.search(path.stem):
            continue
        try:
            found = _look_into(path)
        except (SafetensorError, OSError):
            continue
        if found:
            return found
    return None


def _look_into(path: Path) -> _Data | None:
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        kinds = {name: str(part.get_dtype()) for name, part in slices.items()}
    if len(shapes) < 2 or () in shapes.values() or len({shape[0] for shape in shapes.values()}) > 1:
        return None
    # Targets are named so, or are the fewer numbers a row.
    targets = min(shapes, key=lambda name: (not _TARGET.search(name), math.prod(shapes[name])))
    inputs = tuple(name for name in shapes if name != targets)
    alike = len(shapes[targets]) > 1 and shapes[inputs[0]] == shapes[targets]
    return _Data(path.name, inputs, targets, kinds[targets].startswith(("I", "U")), alike)


def _quote(text: str) -> str:
    """A TOML string; JSON's escapes are a part of TOML's."""
    return json.dumps(text, ensure_ascii=False)
