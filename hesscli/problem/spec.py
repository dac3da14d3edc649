"""The spec: a short TOML file that says what a checkpoint is of, and on which data and loss."""

from __future__ import annotations

import hashlib
import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from hesscli.errors import InputError, missing_file, nearest
from hesscli.results import Reduction

FILL_IN = "REPLACE"
"""What stands in a new spec where only its reader knows what belongs there."""
_LARGEST = 1 << 20
_MOST_DOTS = 32

LossName = Literal[
    "cross_entropy", "mse", "bce_with_logits", "bce", "nll", "language_model", "huggingface"
]

# Which options of [loss] each named loss knows.
_LOSS_OPTIONS: dict[str, frozenset[str]] = {
    "cross_entropy": frozenset({"class_weights", "ignore_index", "label_smoothing"}),
    "nll": frozenset({"class_weights", "ignore_index"}),
    "language_model": frozenset({"label_smoothing"}),
    "bce_with_logits": frozenset({"pos_weight"}),
}
_ALL_LOSS_OPTIONS = frozenset().union(*_LOSS_OPTIONS.values())

_EXAMPLE = """\
checkpoint = "model.pt"
[model]
factory = "net:Net"               # module:callable, looked up beside this file first
[data]
factory = "data:dataset"          # returns a dataset, or batches (inputs, targets)
[loss]
name = "cross_entropy"            # mse, bce_with_logits, bce, nll, ...
"""


def describe_example() -> str:
    """The shortest useful spec, for errors to show and people to copy."""
    return _EXAMPLE


def _beside_spec(value: object, info: ValidationInfo) -> object:
    """Resolve a path of the spec against the spec's own folder."""
    if not isinstance(value, str):
        return value
    folder = (info.context or {}).get("folder", Path())
    try:
        return Path(folder, Path(value).expanduser())
    except RuntimeError:
        raise _rule("is in the home folder of a user who is not known here", repr(value)) from None


SpecPath = Annotated[Path, BeforeValidator(_beside_spec)]
Weights = Annotated[list[Annotated[float, Field(ge=0, allow_inf_nan=False)]], Field(min_length=1)]


def _rule(what: str, got: str) -> PydanticCustomError:
    """A broken rule that needs more than one key to see; told by `explain`."""
    return PydanticCustomError("rule", "{what}", {"what": what, "got": got})


def _exactly_one(table: BaseModel, *keys: str) -> None:
    given = [key for key in keys if getattr(table, key) is not None]
    if len(given) != 1:
        choices = f"{', '.join(keys[:-1])} or {keys[-1]}"
        raise _rule(f"needs exactly one of {choices}", " and ".join(given) or "none of them")


class _Table(BaseModel):
    """Unknown keys are refused, and nothing is converted in silence."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class KeysSpec(_Table):
    """``[checkpoint_keys]``: which of a file's tensors are the model's, and by which names."""

    key: str | None = None
    strip: str | None = None
    ignore: list[str] = []


class ModelSpec(_Table):
    """``[model]``: what builds the network that the weights are loaded into."""

    factory: str
    kwargs: dict[str, Any] = {}
    output: str | int | None = None
    training: bool = False

    @property
    def code(self) -> tuple[str, ...]:
        """What of the user's code it names."""
        return (self.factory,)


class DataSpec(_Table):
    """``[data]`` or ``[held_out]``: a factory of examples, or a file of tensors."""

    factory: str | None = None
    kwargs: dict[str, Any] = {}
    file: SpecPath | None = None
    inputs: str | list[str] | None = None
    targets: str | None = None
    collate: str | None = None
    batch_size: int | None = Field(default=None, ge=1)
    unseen: bool = False

    @property
    def code(self) -> tuple[str, ...]:
        """What of the user's code it names."""
        return tuple(filter(None, (self.factory,)))

    @field_validator("inputs", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        names = value if isinstance(value, list) else [value]
        if not names or not all(isinstance(name, str) for name in names):
            raise _rule("must be a tensor's name or a list of names", repr(value))
        return value

    @model_validator(mode="after")
    def _source(self) -> Self:
        _exactly_one(self, "factory", "file")
        if self.file and self.inputs is None:
            raise _rule("needs inputs, the name of a tensor in the file", f"file = {self.file}")
        foreign = {"kwargs", "collate"} if self.file else {"inputs", "targets"}
        if unused := sorted(foreign & self.model_fields_set):
            source, other = ("file", "factory") if self.file else ("factory", "file")
            raise _rule(f"has {' and '.join(unused)}, which only {other} uses", f"{source} is set")
        return self


class LossSpec(_Table):
    """``[loss]``: a named loss, ``factory(outputs, targets)``, or ``step(model, batch)``."""

    name: LossName | None = None
    factory: str | None = None
    step: str | None = None
    kwargs: dict[str, Any] = {}
    reduction: Reduction | None = None
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    label_smoothing: float = Field(default=0.0, ge=0, le=1)
    ignore_index: int = -100
    class_weights: Weights | None = None
    pos_weight: Weights | None = None

    @property
    def code(self) -> tuple[str, ...]:
        """What of the user's code it names."""
        return tuple(filter(None, (self.factory, self.step)))

    @model_validator(mode="after")
    def _source(self) -> Self:
        _exactly_one(self, "name", "factory", "step")
        known = _LOSS_OPTIONS.get(self.name or "", frozenset())
        if unused := sorted((_ALL_LOSS_OPTIONS - known) & self.model_fields_set):
            subject = self.name or "a factory or step loss"
            raise _rule(f"has {' and '.join(unused)}, which {subject} does not take", subject)
        if self.name and "kwargs" in self.model_fields_set:
            raise _rule("has kwargs, which only factory and step use", f"name = {self.name!r}")
        return self


class _Document(_Table):
    """The keys and tables of the file."""

    checkpoint: SpecPath | None = None
    checkpoint_keys: KeysSpec = KeysSpec()
    model: ModelSpec | None = None
    data: DataSpec
    held_out: DataSpec | None = None
    loss: LossSpec


class Spec(_Document):
    """A spec that was read; its paths are resolved against the folder of ``path``.

    ``model`` is None only where the checkpoint is its own program (.pt2).
    """

    path: Path
    sha256: str
    """Of what it says, wherever it lies and however it is written."""


_TABLES: Tables = {
    (): _Document,
    ("checkpoint_keys",): KeysSpec,
    ("model",): ModelSpec,
    ("data",): DataSpec,
    ("held_out",): DataSpec,
    ("loss",): LossSpec,
}


def read_spec(path: Path) -> Spec:
    """Read and check a spec.

    Raises:
        InputError: it is not there, cannot be read, is no TOML, or does not say what is needed.
    """
    document = parsed(path)
    if left := list(_left_open(document, ())):
        got = f"{path}: {', '.join(left)}"
        hint = f"what the comments beside {FILL_IN} say"
        raise InputError("the spec has places that are not filled in yet", got, hint)
    try:
        content = _Document.model_validate(document, context={"folder": path.parent})
    except ValidationError as error:
        raise explain(error, path, _TABLES, describe_example()) from None
    except RecursionError:
        raise _too_deep(path) from None
    said = json.dumps(document, sort_keys=True, default=str).encode()
    return Spec(path=path, sha256=hashlib.sha256(said).hexdigest(), **dict(content))


def parsed(path: Path) -> dict[str, Any]:
    """What the file holds, whatever that is.

    Raises:
        InputError: it is not there, cannot be read, or is no TOML of a spec's size.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            got = f"{path}: more than {_LARGEST:,} bytes"
            raise InputError("too large for a spec", got, "name the spec with --spec")
        text = content.decode("utf-8")
        if _dots(text) > _MOST_DOTS:  # of which the parser takes memory as their square
            raise _too_deep(path)
        document = tomllib.loads(text)
        if number := _too_large(document):
            got = f"{path}: {number}"
            raise InputError("the spec holds a number that is too large", got, "at most 2^63 - 1")
        return document
    except FileNotFoundError:
        raise missing_file("spec", path, suffixes=(".toml",)) from None
    except OSError as error:
        reason = f"{path}: {(error.strerror or 'unreadable').lower()}"
        raise InputError("the spec cannot be read", reason, "check the path") from None
    except UnicodeDecodeError:
        raise InputError("the spec is not text", str(path), "save it as UTF-8 TOML") from None
    except RecursionError:
        raise _too_deep(path) from None
    except ValueError as error:  # TOMLDecodeError, or a number of thousands of digits
        hint = "text goes in quotes, tables in [brackets], one key = value a line"
        raise InputError("the spec is not valid TOML", f"{path}: {error}", hint) from None


def _left_open(value: object, place: tuple[str, ...]) -> Iterator[str]:
    """Where a spec still has what `hesscli init` left for its reader."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _left_open(inner, (*place, str(key)))
    elif value in (FILL_IN, f"{FILL_IN}:{FILL_IN}"):
        yield _place(place)


def _dots(text: str) -> int:
    """The most dots in one key, or in what may be one."""
    bare = re.sub(r""""(?:[^"\\\n]|\\.)*"?|'[^'\n]*'?""", "s", text)
    bare = re.sub(r"#[^\n]*|[ \t]+", "", bare)
    return max((token.count(".") for token in re.findall(r"[\w.-]+", bare)), default=0)


def _too_deep(path: Path) -> InputError:
    hint = "a spec has keys, tables, and small lists and tables in kwargs"
    return InputError("the spec is nested too deeply", str(path), hint)


def _too_large(document: dict[str, Any]) -> str | None:
    """Where a whole number has no 64 bits to fit in, which TOML rules out and Python does not."""
    pending: list[tuple[str, Any]] = list(document.items())
    while pending:
        place, value = pending.pop()
        if isinstance(value, dict):
            pending += [(f"{place}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, list):
            pending += [(place, inner) for inner in value]
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            return f"{place} = {value}"
    return None


# -- What is wrong with a spec, in the words of the spec -------------------------------------------


Tables = Mapping[tuple[int | str, ...], type[BaseModel]]
_TABLE_NAMES = ("checkpoint_keys", "model", "data", "held_out", "loss")


def explain(error: ValidationError, path: Path, tables: Tables, example: str) -> InputError:
    """All problems of a spec as one error; mistyped keys first, for they cause the others."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    (what, got), *others = [_tell(problem) for problem in problems]
    got = f"{got} in {path}"
    if others:
        got += f"; {len(others)} more: " + "; ".join(what for what, _ in others)
    return InputError(what, got, _advise(problems[0], tables, example))


# pydantic's name of a problem -> plain words; {...} is filled from its context.
_WORDS = {
    "missing": "is missing",
    "extra_forbidden": "is not a key that hesscli knows",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text in quotes",
    "path_type": "must be a path in quotes",
    "is_instance_of": "must be a path in quotes",
    "bool_type": "must be true or false",
    "dict_type": "must be a table, such as {{ width = 16 }}",
    "model_type": "must be a table",
    "list_type": "must be a list",
    "too_short": "must not be empty",
    "literal_error": "must be {expected}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than_equal": "must be at most {le:g}",
    "rule": "{what}",
}


def _tell(problem: ErrorDetails) -> tuple[str, str]:
    """What is wrong and what was got, in plain words."""
    context = problem.get("ctx", {})
    known = _WORDS.get(problem["type"])
    words = known.format(**context) if known else problem["msg"].lower()
    match problem["type"]:
        case "missing":
            got = "no such key" if len(problem["loc"]) > 1 else "no such table"
        case "rule":
            got = context["got"]
        case "extra_forbidden":
            got = f"{problem['loc'][-1]!r}"
        case _:
            got = _as_toml(problem["input"])
    return f"{_place(problem['loc'])} {words}", got


def _as_toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _place(loc: tuple[int | str, ...]) -> str:
    """``[data] batch_size`` or ``[loss] class_weights[1]``; a table alone is ``[data]``."""
    table, *keys = loc
    head = f"[{table}]" if keys or table in _TABLE_NAMES else str(table)
    tail = "".join(f"[{key}]" if isinstance(key, int) else f" {key}" for key in keys)
    return head + tail


def _advise(problem: ErrorDetails, tables: Tables, example: str) -> str:
    """What to try for the first problem."""
    *table, key = problem["loc"]
    if problem["type"] == "extra_forbidden":
        known = list(tables[tuple(table)].model_fields)
        close = nearest(str(key), known)
        listed = f"the keys here are {', '.join(known)}"
        return f"did you mean {close!r}? {listed}" if close else listed
    if problem["type"] == "missing":
        lines = example.splitlines()
        table_name = str(table[0] if table else key)
        start = lines.index(f"[{table_name}]")
        return (
            f"add to the spec, for example: [{table_name}] {lines[start + 1].split('#')[0].strip()}"
        )
    return "correct it in the spec; `hesscli init` writes a commented one"
