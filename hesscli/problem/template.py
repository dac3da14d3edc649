"""A first spec for `hesscli init`, guessed from a checkpoint and the files beside it.

Python files are parsed, never imported, and of data files only the headers are read.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hesscli.errors import shorten
from hesscli.problem.builders import (
    Named,
    builder_of,
    listed,
    of_timm,
    outputs_of,
    quote,
)
from hesscli.problem.checkpoint import read_checkpoint
from hesscli.problem.code_beside import find_data_modules, find_loaders
from hesscli.problem.spec import FILL_IN
from hesscli.problem.torch_files import SeveralSetsError, key_line

_PLACEHOLDER = f"{FILL_IN}:{FILL_IN}"
_TARGET = re.compile(r"(^|_)(targets?|labels?|y|next|classes)(_|$)", re.IGNORECASE)
_NOT_TRAINED_ON = re.compile(r"held|test|val", re.IGNORECASE)
_EMBEDDING = re.compile(r"emb|wte|tok|symbols|vocab", re.IGNORECASE)


@dataclass(frozen=True)
class _Data:
    """The tensors of a data file that could be inputs and targets, row by row."""

    file: str
    inputs: tuple[str, ...]
    targets: str
    whole_targets: bool
    alike: bool


@dataclass(frozen=True)
class Template:
    """A spec that may have lines to fill in.

    Attributes:
        text: of the file.
        needs: how to install what it needs and is not there.
    """

    text: str
    needs: tuple[str, ...] = ()

    @property
    def to_fill_in(self) -> tuple[str, ...]:
        """The lines that a person must complete, with their numbers."""
        lines = enumerate(self.text.splitlines(), 1)
        left = [(n, line) for n, line in lines if FILL_IN in line and not line.startswith("#")]
        return tuple(f"line {n} ({line.partition(' =')[0]})" for n, line in left)


def write_template(
    checkpoint: Path, *, model: Named | None = None, trust: bool = False
) -> Template:
    """A commented spec; every guess is marked as one.

    Args:
        checkpoint: the file or folder that the spec is for; the spec belongs beside or in it.
        model: the network of a library that it is of, where the user says so.
        trust: whether code in the checkpoint may run.
    """
    sets: tuple[str, ...] = ()
    try:
        read = read_checkpoint(checkpoint, trust=trust)
    except SeveralSetsError as several:
        sets = several.names[::-1]
        read = read_checkpoint(checkpoint, trust=trust, key=sets[0])
    folder = (checkpoint if checkpoint.is_dir() else checkpoint.parent).absolute()
    builder = builder_of(folder, read.state, read.said, model or of_timm(folder))
    data = _find_data(folder, exclude=read.path, weights=read.state)
    blocks = [
        _describe(read.path.name, read.state, sets),
        "" if read.module else "\n".join(("[model]", *builder.lines, "")),
        _data_block(folder, data),
        _loss_block(*_guess_loss(read.state, data, builder.loss)),
    ]
    needs = () if read.module else builder.needs
    return Template("\n".join(block for block in blocks if block), needs)


def template_of(model: Named, checkpoint: Path) -> Template:
    """A spec for a network that a library knows, and for weights that are not there yet.

    Args:
        model: the network.
        checkpoint: where its weights will be.
    """
    file, folder = checkpoint.name, checkpoint.parent.absolute()
    builder = builder_of(folder, {}, {}, model)
    own = f"# Weights of {model.library}'s own, once: {model.save(file)}"
    blocks = [
        f"# Paths are relative to this file.\n{own}\ncheckpoint = {quote(file)}  # or of yours\n",
        "\n".join(("[model]", *builder.lines, "")),
        _data_block(folder, _find_data(folder, exclude=Path(file))),
        _loss_block("cross_entropy", f"{model.library}'s classifiers are trained so"),
    ]
    return Template("\n".join(blocks), builder.needs)


def _describe(name: str, state: Mapping[str, Tensor], sets: Sequence[str]) -> str:
    """What the file holds, its name, and which of its sets of weights is meant."""
    matrices = [(key, tuple(value.shape)) for key, value in state.items() if value.dim() > 1]
    ends = [matrices[0], matrices[-1]] if matrices else []
    shapes = " ... ".join(f"{json.dumps(shorten(name, 120))} {shape}" for name, shape in ends)
    chosen = f"{key_line(sets[0])}  # a guess{listed(list(map(quote, sets[1:])))}\n" if sets else ""
    count = sum(value.numel() for value in state.values() if value.is_floating_point())
    return (
        f"# {len(state)} tensors, {count:,} numbers: {shapes}\n"
        f"# Paths are relative to this file. Try it with: hesscli check {shlex.quote(name)}\n"
        f"checkpoint = {quote(name)}\n{chosen}"
    )


def _data_block(folder: Path, data: _Data | None) -> str:
    options = (
        "# batch_size = 128\n# unseen = true        # where these examples were not trained on\n"
    )
    if data:
        names = [quote(name) for name in data.inputs]
        inputs = names[0] if len(names) == 1 else f"[{', '.join(names)}]"
        return (
            "[data]\n"
            f"file = {quote(data.file)}  # a guess: a data file beside the checkpoint\n"
            f"inputs = {inputs}  # a guess\n"
            f"targets = {quote(data.targets)}  # a guess\n{options}"
        )
    found = sorted(find_loaders(folder))
    if not found:
        comment = "module:callable that returns a dataset or batches"
        if modules := list(find_data_modules(folder)):
            comment += (
                f", such as def data(): {modules[0]}; "
                f"m = {modules[0].split()[-1]}(); m.setup('fit'); return m.train_dataloader()"
            )
        return f'[data]\nfactory = "{_PLACEHOLDER}"  # {comment}\n{options}'
    comment = f"a guess: by its name{listed(found[1:])}"
    return f"[data]\nfactory = {quote(found[0])}  # {comment}\n{options}"


def _loss_block(name: str, why: str) -> str:
    return (
        "[loss]\n"
        f'name = "{name}"  # a guess: {why}\n'
        "# others: cross_entropy, mse, bce_with_logits, bce, nll, language_model, huggingface;\n"
        '# or your own: factory = "losses:fn" of (outputs, targets), or step = "losses:step" of\n'
        "# (model, batch), which returns its mean loss, or (mean loss, what it was divided by)\n"
        "# weight_decay = 0.0    # as trained with, where the curvature should include it\n"
    )


def _guess_loss(
    state: Mapping[str, Tensor], data: _Data | None, spoken_of: tuple[str, str] | None
) -> tuple[str, str]:
    head = outputs_of(state)
    if data and data.alike and data.whole_targets:
        return "language_model", f"{quote(data.targets)} are whole numbers, shaped like the inputs"
    if data and not data.whole_targets:
        return "mse", f"{quote(data.targets)} are not whole numbers"
    if head is None:
        return spoken_of or ("mse", "there is no matrix to tell from")
    last, outputs = head
    tables = [value for name, value in state.items() if _EMBEDDING.search(name)]
    if any(value.dim() > 1 and value.shape[0] == outputs for value in tables):
        return "language_model", f"an embedding has as many rows as there are outputs, {outputs}"
    if spoken_of is not None:
        return spoken_of
    if outputs == 1:
        return "mse", f"{quote(last)} has 1 output"
    return "cross_entropy", f"{quote(last)} has {outputs} outputs"


def _find_data(folder: Path, *, exclude: Path, weights: Collection[str] = ()) -> _Data | None:
    """The first .safetensors file whose tensors have one length, as inputs and targets have.

    One with the names of weights is another checkpoint, or a log of updates.
    """
    for path in sorted(folder.glob("*.safetensors")):
        if path.resolve() == exclude.resolve() or _NOT_TRAINED_ON.search(path.stem):
            continue
        try:
            found = _look_into(path)
        except (SafetensorError, OSError):
            continue
        if found and not any(name in weights for name in found.inputs):
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
