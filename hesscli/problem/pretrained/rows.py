"""Rows as transformers' users have them: dicts of lists of any length, `datasets`, collators.

A batch is made as the Trainer makes it: columns that the model does not take are left out, labels
may be called ``label``, and what is shorter is padded and masked. That padding changes no example
is not assumed: batches are compared with their parts, which are padded otherwise.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from hesscli.errors import InputError
from hesscli.problem.batches import Batch, tensor_of

Collate = Callable[[list[Any]], Batch]

_LABELS = ("label", "label_ids")
"""What transformers' collators take for ``labels``."""
_IGNORED = -100


def as_rows(model: nn.Module, data: Any, collate: Any) -> tuple[Any, Collate | None]:
    """Data of a model that computes its own loss, and what makes a batch of its rows.

    Args:
        model: whose inputs they are.
        data: rows, `datasets` in any format, a loader, or batches.
        collate: a function, a collator or a tokenizer; default the model's own padding.

    Returns:
        The same, as other data go in.
    """
    named = inputs_of(model)
    if collate is not None and hasattr(collate, "pad"):
        collate = Taking(_collator_of(collate), named)
    elif _is_of("transformers", collate):
        collate = Taking(collate, named)
    padded = collate or Padded(named, _padding_token(model))
    if _is_of("datasets", data) and hasattr(data, "with_format"):
        return _plain(data), padded
    if isinstance(data, DataLoader):
        plain = data.collate_fn is default_collate and _holds_rows(data.dataset)
        own = Taking(data.collate_fn, named) if _is_of("transformers", data.collate_fn) else None
        return data, collate or (padded if plain else own)
    if isinstance(data, Mapping):
        return [data], collate
    return data, padded if _holds_rows(data) else collate


def _is_of(library: str, value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == library


def _plain(data: Any) -> Any:
    """A data set of `datasets` that gives lists; one with a transform of the user's as it is."""
    given = getattr(data, "format", None)
    return data if given and given["type"] == "custom" else data.with_format(None)


def _holds_rows(data: Any) -> bool:
    """Whether items are examples, in dicts, and no batches."""
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or not len(data):
        return False
    first = data[0] if not isinstance(data, Mapping) else None
    if not isinstance(first, Mapping):
        return False
    if "input_ids" in first:
        return _dim(first["input_ids"]) == 1
    return any(_dim(first[name]) == 0 for name in ("labels", *_LABELS) if name in first)


def _dim(value: Any) -> int:
    if isinstance(value, (list, tuple)):
        return 1 + (_dim(value[0]) if value else 0)
    return int(getattr(value, "ndim", 0))


# -- Which columns a model takes, and what fills them up -------------------------------------------


def inputs_of(model: nn.Module) -> frozenset[str] | None:
    """The inputs that a model's signature names; None where it may take any."""
    base = getattr(model, "get_base_model", None)  # an adapter takes what its base does
    if base is not None:
        model = base()
    parameters = inspect.signature(model.forward).parameters.values()
    named = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    own = {base.__module__.partition(".")[0] for base in type(model).__mro__}
    # The keywords of transformers' own models are no columns; those of others may be.
    if len(named) < len(parameters) and not own & {"transformers", "peft"}:
        return None
    return frozenset(named) | {"labels", *_LABELS}


def _padding_token(model: nn.Module) -> int:
    token = getattr(getattr(model, "config", None), "pad_token_id", None)
    return token if isinstance(token, int) and token >= 0 else 0


def _taken(row: Mapping[str, Any], named: frozenset[str] | None) -> dict[str, Any]:
    """The columns of a row that a model takes: none of text, and none that is empty."""
    return {
        name: value
        for name, value in row.items()
        if (named is None or name in named) and not isinstance(value, (str, bytes, type(None)))
    }


class Taking:
    """A collator of transformers', shown what the Trainer would show it."""

    def __init__(self, collate: Collate, named: frozenset[str] | None) -> None:
        self.collate, self.named = collate, named

    def __call__(self, rows: list[Any]) -> Batch:
        """One batch."""
        mapped = all(isinstance(row, Mapping) for row in rows)
        return self.collate([_taken(row, self.named) for row in rows] if mapped else rows)


def _collator_of(tokenizer: Any) -> Collate:
    """The collators of a tokenizer, by whether labels are of tokens or of examples."""
    import transformers

    def collate(rows: list[Any]) -> Batch:
        several = _dim(rows[0].get("labels", rows[0].get("label"))) == 1
        name = "DataCollatorForSeq2Seq" if several else "DataCollatorWithPadding"
        made: Batch = getattr(transformers, name)(tokenizer)(rows)
        return made

    return collate


class Padded:
    """Rows padded at their ends to one length, and masked there, where they differ in it.

    Args:
        named: the columns that the model takes; None for all.
        token: what pads ``input_ids``.
    """

    def __init__(self, named: frozenset[str] | None, token: int) -> None:
        self.named, self.fillers = named, {"input_ids": token, "labels": _IGNORED}

    def __call__(self, rows: list[Any]) -> Batch:
        """One batch, of tensors.

        Raises:
            InputError: rows with other columns, or what cannot be padded.
        """
        taken = [self._renamed(_taken(row, self.named)) for row in rows]
        columns = dict.fromkeys(name for row in taken for name in row)
        if any(row.keys() != columns.keys() for row in taken):
            missing = next(name for row in taken for name in columns if name not in row)
            hint = "rows that all have it, or a collate function of your own"
            raise InputError("rows differ in their columns", f"{missing!r} is in some", hint)
        tensors = {name: [_tensor(name, row[name]) for row in taken] for name in columns}
        tokens = tensors.get("input_ids")
        if tokens and "attention_mask" not in tensors and len({len(t) for t in tokens}) > 1:
            tensors["attention_mask"] = [torch.ones_like(ids) for ids in tokens]
        return {name: self._stacked(name, values) for name, values in tensors.items()}

    def _renamed(self, row: dict[str, Any]) -> dict[str, Any]:
        if "labels" in row:
            return {name: value for name, value in row.items() if name not in _LABELS}
        return {"labels" if name in _LABELS else name: value for name, value in row.items()}

    def _stacked(self, name: str, values: Sequence[Tensor]) -> Tensor:
        if len({value.shape for value in values}) == 1:
            return torch.stack(list(values))
        if any(value.dim() != 1 for value in values):
            got = f"{name} of shapes {tuple(values[0].shape)}, {tuple(values[-1].shape)}, ..."
            hint = "collate = a collator of transformers' or a function of your own"
            raise InputError("the examples cannot be put together into a batch", got, hint)
        filler = self.fillers.get(name, 0)
        return torch.nn.utils.rnn.pad_sequence(list(values), True, filler)


def _tensor(name: str, value: Any) -> Tensor:
    try:
        return tensor_of(value)
    except (TypeError, ValueError, RuntimeError) as error:
        got = f"{name}: {str(error).splitlines()[0][:160]}"
        hint = "numbers in lists of one length, or a collate function of your own"
        raise InputError("a column holds what is no tensor", got, hint) from None
