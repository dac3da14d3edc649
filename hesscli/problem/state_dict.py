"""The weights' way into a model: names that fit, or nearly do, shapes, and ties."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hesscli.errors import InputError, UnsoundError, first_line, shorten
from hesscli.problem.checkpoint import Checkpoint, plain_names
from hesscli.problem.torch_files import AVERAGED

_MOST_NAMED = 5
_LONGEST_NAME = 120

# Buffers in floating point that libraries stored once and compute now, or left behind.
_KNOWN_BUFFERS = frozenset(
    {"total_ops", "total_params", "masked_bias", "inv_freq", "attn_mask", "relative_coords_table"}
)


@dataclass(frozen=True)
class Loaded:
    """Weights that are in a model now.

    Attributes:
        notes: what was left out of names or of tensors and the spec did not ask for.
        names: of the model's tensors that the file has, what they are called there.
    """

    notes: tuple[str, ...]
    names: Mapping[str, str]


def load_state(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    strip: str | None = None,
    ignore: Sequence[str] = (),
) -> Loaded:
    """Copy the weights into a model, in the model's precision; every name must fit.

    A name may be missing only where the model ties it to one that is there. A prefix that all
    the names have is found where none was given; buffers that the model does not have are left
    aside.

    Args:
        model: what the spec's factory built.
        checkpoint: the weights.
        strip: a prefix to take off the names.
        ignore: globs of names to leave aside.

    Raises:
        InputError: names or shapes do not fit.
        UnsoundError: weights that are not finite.
    """
    state = {
        name: value
        for name, value in checkpoint.state.items()
        if not any(fnmatchcase(name, pattern) for pattern in ignore)
    }
    if strip is not None:
        state = _stripped(state, strip, checkpoint.path)
    fit, notes = _copy(model, state), []
    if fit.missing and strip is None and (prefix := _common_prefix(fit)):
        again = _copy(model, _stripped(state, prefix, checkpoint.path))
        if not again.is_whole:
            raise _mismatch(checkpoint, fit, again, prefix)
        fit = again
        notes.append(f"the checkpoint's names begin with {prefix!r}, which was left out")
    if not fit.is_whole:
        raise _mismatch(checkpoint, fit)
    if fit.unexpected:
        notes.append(f"buffers that the model does not have, left aside: {_first(fit.unexpected)}")
    _require_equal_twins(fit.state, _twins(model), checkpoint)
    _require_finite(model, checkpoint)
    called = {id(value): name for name, value in checkpoint.state.items()}
    return Loaded(tuple(notes), {name: called[id(value)] for name, value in fit.state.items()})


@dataclass(frozen=True)
class _Fit:
    """How names of a file and of a model go together; ``own`` are the model's tensors."""

    state: Mapping[str, Tensor]
    own: Mapping[str, Tensor]
    missing: list[str]
    unexpected: list[str]
    misfits: Mapping[str, str]

    @property
    def strangers(self) -> list[str]:
        """Unexpected names of what may well be weights."""
        return [name for name in self.unexpected if not _is_buffer(name, self.state[name])]

    @property
    def is_whole(self) -> bool:
        """Whether the model has all of its weights, and all of the file's."""
        return not (self.missing or self.misfits or self.strangers)


def _copy(model: nn.Module, state: Mapping[str, Tensor]) -> _Fit:
    """Copy what fits, by the model's own rules, and say what does not."""
    own = {name: value for name, value in _tensors(model).items() if not is_lazy(value)}
    actual = {plain: name for name, plain in plain_names(model.state_dict()).items()}
    state = {actual.get(name, name): value for name, value in state.items()}
    misfits = {
        name: f"{_brief(name)} {_describe(value)}, expected {_describe(own[name])}"
        for name, value in state.items()
        if name in own and not _fits(value, own[name])
    }
    fitting = {
        # Made dense only now: a sparse tensor's shape may be of any size.
        name: value if value.layout == torch.strided else value.to_dense()
        for name, value in state.items()
        if name in own and name not in misfits
    }
    others = {name: state[name] for name in state if name not in own}
    try:
        result = model.load_state_dict(fitting | others, strict=False)
    except Exception as error:
        hint = "check the factory"
        raise InputError("the model refuses the checkpoint", first_line(error), hint) from error
    twins = _twins(model)
    missing = [
        name
        for name in result.missing_keys
        if name not in misfits and not state.keys() & twins.get(name, set())
    ]
    return _Fit(state, own, missing, list(result.unexpected_keys), misfits)


def _stripped(state: Mapping[str, Tensor], prefix: str, path: Path) -> dict[str, Tensor]:
    """The tensors without a prefix in their names, which at least one must have."""
    if not any(name.startswith(prefix) for name in state):
        what = f"no name in the checkpoint begins with {prefix!r}"
        got = f"{path}: {_first(list(state)) or 'no tensors'}"
        raise InputError(what, got, "correct strip under [checkpoint_keys] in the spec")
    shorter = {name.removeprefix(prefix): value for name, value in state.items()}
    if len(shorter) < len(state):
        twins = [name for name in state if prefix + name in state]
        what = f"without {prefix!r}, two tensors of the checkpoint have one name"
        hint = "name one of the two in ignore under [checkpoint_keys] in the spec"
        raise InputError(what, f"{path}: {_first(twins)}", hint)
    return shorter


def _common_prefix(fit: _Fit) -> str | None:
    """The one prefix with which all that is missing is there."""
    rest = set(fit.missing)
    first = max(rest, key=len)
    prefixes = [name[: -len(first)] for name in fit.unexpected if name.endswith(f".{first}")]
    names = set(fit.unexpected)
    # Not quite all where a module makes up for a missing name itself, as batch norm does.
    whole = [p for p in prefixes if all(p + name in names for name in rest)]
    plain = [p for p in whole if not AVERAGED.search(p)] or whole
    return min(plain, key=len, default=None)


def _is_buffer(name: str, value: Tensor) -> bool:
    """Whether a tensor cannot be a weight: whole numbers have no gradient."""
    known = name.rpartition(".")[2] in _KNOWN_BUFFERS
    return known or not (value.is_floating_point() or value.is_complex())


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named = model.state_dict(keep_vars=True)
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def _fits(value: Tensor, target: Tensor) -> bool:
    same_kind = value.is_floating_point() == target.is_floating_point()
    return same_kind and value.is_complex() == target.is_complex() and value.shape == target.shape


def _describe(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _twins(model: nn.Module) -> dict[str, set[str]]:
    """For each tied name, all names of the same tensor; files may keep only one of them."""
    names: dict[int, set[str]] = defaultdict(set)
    for name, value in _tensors(model).items():
        names[id(value)].add(name)
    return {name: tied for tied in names.values() if len(tied) > 1 for name in tied}


# -- what to say where they do not fit -------------------------------------------------------------

# Names that tell what the file is; what it is; how to have one that fits.
_KINDS = (
    (
        re.compile(r"(^|\.)_?flat_param(_\d+)?$"),
        "it holds FSDP's flat parameters, one for many weights",
        "save what get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) of "
        "torch.distributed.checkpoint.state_dict gives while FSDP runs",
    ),
    (
        re.compile(r"_packed_params|(^|\.)(zero_point|qweight|qzeros|SCB|quant_map|absmax)$"),
        "its weights are quantised",
        "save the weights in floating point that they were made from: quantised ones have no "
        "derivatives",
    ),
    (
        re.compile(r"_mask$"),
        "its weights are pruned and stored with their masks",
        "make the pruning permanent before saving: torch.nn.utils.prune.remove(module, 'weight')",
    ),
    (
        re.compile(r"weight_[gv]$|parametrizations\."),
        "its weights are parametrised, as by weight norm",
        "apply the same parametrization in [model] factory, or remove it before saving: "
        "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')",
    ),
)


def _mismatch(
    checkpoint: Checkpoint, fit: _Fit, again: _Fit | None = None, prefix: str | None = None
) -> InputError:
    """The refusal; ``again`` is how it fits once ``prefix`` is left out."""
    told = again or fit
    parts = (
        ("missing", [_with_shape(name, told.own.get(name)) for name in told.missing]),
        ("unexpected", [_with_shape(name, told.state[name]) for name in told.strangers]),
        ("misshapen", list(told.misfits.values())),
    )
    listed = "; ".join(f"{len(names)} {kind}: {_first(names)}" for kind, names in parts if names)
    got = f"{checkpoint.path}: {listed}"
    what = "the checkpoint does not fit the model"
    if prefix:
        got = f"{checkpoint.path}: names begin with {prefix!r}; beside these, {listed}"
    if told.missing:
        for pattern, cause, hint in _KINDS:
            if any(pattern.search(name) for name in told.unexpected):
                return InputError(f"{what}: {cause}", got, hint)
    return InputError(what, got, _advise(told, prefix))


def _advise(fit: _Fit, prefix: str | None) -> str:
    check = "check [model] factory and kwargs in the spec against the training code"
    if not fit.missing and not fit.misfits:
        globs = list(dict.fromkeys(_glob(name, fit.own) for name in fit.strangers))
        keys = {"strip": prefix, "ignore": globs[:_MOST_NAMED]}
        table = ", ".join(f"{key} = {json.dumps(value)}" for key, value in keys.items() if value)
        line = f"checkpoint_keys = {{ {table} }}"
        return f"if these are no part of the model, at the top of the spec: {line}; else {check}"
    # The model may be a wrapper of what was saved.
    parts = fit.missing[0].split(".") if fit.missing else []
    for longer in (".".join(parts[:depth]) + "." for depth in range(1, len(parts))):
        rest = {name.removeprefix(longer) for name in fit.missing if name.startswith(longer)}
        if len(rest) == len(fit.missing) and rest <= set(fit.unexpected):
            return (
                f"only the model's names begin with {longer!r}: let [model] factory return the "
                "module that was saved"
            )
    return check


def _glob(name: str, own: Iterable[str]) -> str:
    """A short glob for all that lies under the same module, unless some of it is the model's."""
    top, dot, _ = name.partition(".")
    if cut := len(top) > _LONGEST_NAME // 2:
        top = top[: _LONGEST_NAME // 2]
    pattern = _literal(top) + ("*" if cut else ".*" if dot else "")
    return _literal(name) if any(fnmatchcase(known, pattern) for known in own) else pattern


def _literal(text: str) -> str:
    """A glob that nothing but the text matches."""
    return re.sub(r"[*?[]", lambda special: f"[{special[0]}]", text)


def _with_shape(name: str, value: Tensor | None) -> str:
    return _brief(name) if value is None else f"{_brief(name)} {list(value.shape)}"


def _brief(name: str) -> str:
    return shorten(name, _LONGEST_NAME)


def _first(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(map(_brief, names[:_MOST_NAMED])) + (f" and {more} more" if more > 0 else "")


def _require_equal_twins(
    state: Mapping[str, Tensor], twins: Mapping[str, set[str]], checkpoint: Checkpoint
) -> None:
    for name, tied in twins.items():
        for other in sorted(tied & state.keys()):
            if name in state and not torch.equal(state[name], state[other]):
                raise InputError(
                    "the model ties weights that differ in the checkpoint",
                    f"{checkpoint.path}: {name} and {other}",
                    "check whether the trained model tied them",
                )


def _require_finite(model: nn.Module, checkpoint: Checkpoint) -> None:
    """A mask among the buffers may hold infinities; weights may not, and nothing may be NaN."""
    broken = {name: ~value.isfinite() for name, value in model.named_parameters()}
    broken |= {name: value.isnan() for name, value in model.named_buffers()}
    counts = {name: int(where.sum()) for name, where in broken.items()}
    listed = [
        f"{name} ({count} of {broken[name].numel()})" for name, count in counts.items() if count
    ]
    if listed:
        raise UnsoundError(
            "the checkpoint has weights that are not finite",
            f"{checkpoint.path}: {_first(listed)}",
            "use a checkpoint from before the training diverged",
        )
