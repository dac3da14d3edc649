"""The spec: a short TOML file that says what a checkpoint is of, and on which data and loss."""

from __future__ import annotations

import tomllib
from pathlib import Path
from textwrap import indent
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
from pydantic_core import PydanticCustomError

from hesscli.errors import InputError
from hesscli.problem.nearest import missing_file
from hesscli.problem.spec_errors import Tables, explain

SPEC_NAME = "hesscli.toml"

LossName = Literal[
    "cross_entropy", "mse", "bce_with_logits", "nll", "language_model", "huggingface"
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
name = "cross_entropy"            # mse, bce_with_logits, nll, language_model, huggingface
"""


def describe_example() -> str:
    """The shortest useful spec, for errors to show and people to copy."""
    return _EXAMPLE


def _beside_spec(value: object, info: ValidationInfo) -> object:
    """Resolve a path of the spec against the spec's own folder."""
    if not isinstance(value, str):
        return value
    folder = (info.context or {}).get("folder", Path())
    return Path(folder, Path(value).expanduser())


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


class ModelSpec(_Table):
    """``[model]``: what builds the network that the weights are loaded into."""

    factory: str
    kwargs: dict[str, Any] = {}
    training: bool = False


class DataSpec(_Table):
    """``[data]`` or ``[held_out]``: a factory of examples, or a file of tensors."""

    factory: str | None = None
    kwargs: dict[str, Any] = {}
    file: SpecPath | None = None
    inputs: str | list[str] | None = None
    targets: str | None = None
    batch_size: int = Field(default=128, ge=1)
    unseen: bool = False

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
        foreign = {"kwargs"} if self.file else {"inputs", "targets"}
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
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    label_smoothing: float = Field(default=0.0, ge=0, le=1)
    ignore_index: int = -100
    class_weights: Weights | None = None
    pos_weight: Weights | None = None

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
    model: ModelSpec | None = None
    data: DataSpec
    held_out: DataSpec | None = None
    loss: LossSpec


class Spec(_Document):
    """A spec that was read; its paths are resolved against the folder of ``path``.

    ``model`` is None only where the checkpoint is its own program (.pt2).
    """

    path: Path


_TABLES: Tables = {
    (): _Document,
    ("model",): ModelSpec,
    ("data",): DataSpec,
    ("held_out",): DataSpec,
    ("loss",): LossSpec,
}


def find_spec(checkpoint: Path | None, spec: Path | None) -> Path:
    """The spec to use: the one that was named, else the first found by convention."""
    if spec is not None:
        if not spec.is_file():
            raise missing_file("spec", spec, suffixes=(".toml",))
        return spec
    if checkpoint is not None and not checkpoint.exists():
        raise missing_file("checkpoint", checkpoint)
    places = _usual_places(checkpoint)
    for place in places:
        if place.is_file():
            return place
    example = indent(describe_example().rstrip(), "    ")
    raise InputError(
        "no spec found: hesscli must know the model, the data and the loss",
        "none of " + ", ".join(map(str, places)),
        f"`hesscli init {checkpoint or 'model.pt'}` writes one; a short one is:\n{example}",
    )


def _usual_places(checkpoint: Path | None) -> list[Path]:
    places = [Path(SPEC_NAME)]
    if checkpoint is not None:
        stem = checkpoint.name.removesuffix(".safetensors.index.json")
        stem = checkpoint.stem if stem == checkpoint.name else stem
        inside = [checkpoint / SPEC_NAME] if checkpoint.is_dir() else []
        beside = [checkpoint.with_name(f"{stem}.toml"), checkpoint.with_name(SPEC_NAME)]
        places = [*inside, *beside, *places]
    return list(dict.fromkeys(places))


def read_spec(path: Path) -> Spec:
    """Read and check a spec."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise missing_file("spec", path, suffixes=(".toml",)) from None
    except OSError as error:
        reason = f"{path}: {(error.strerror or 'unreadable').lower()}"
        raise InputError("the spec cannot be read", reason, "check the path") from None
    except UnicodeDecodeError:
        raise InputError("the spec is not text", str(path), "save it as UTF-8 TOML") from None
    except tomllib.TOMLDecodeError as error:
        hint = "text goes in quotes, tables in [brackets], one key = value a line"
        raise InputError("the spec is not valid TOML", f"{path}: {error}", hint) from None
    try:
        content = _Document.model_validate(document, context={"folder": path.parent})
    except ValidationError as error:
        raise explain(error, path, _TABLES, describe_example()) from None
    return Spec(path=path, **dict(content))
