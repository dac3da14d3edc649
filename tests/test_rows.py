"""Rows as transformers' users have them, against one forward pass an example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pretrained
import pytest
import torch
import transformers
from torch.nn import functional
from torch.utils.data import DataLoader

import hesscli
from hesscli.errors import InputError
from hesscli.problem.problem import Problem

LINES = pretrained.LINES * 4
WORDS = pretrained.tokenizer()
IDS = [WORDS(line)["input_ids"] for line in LINES]
CLASSES = [{"input_ids": ids, "labels": i % 3} for i, ids in enumerate(IDS)]
TEXTS = [{"input_ids": ids, "labels": ids} for ids in IDS]


@pytest.fixture(scope="module", params=["bert classes", "llama"])
def case(request: pytest.FixtureRequest) -> tuple[Any, list[dict[str, Any]], float, int]:
    """A model, rows of different lengths, their mean loss one by one, and their labels."""
    model = pretrained.build(request.param, len(WORDS))
    rows = {"bert classes": CLASSES, "llama": TEXTS}[request.param]
    total, count = 0.0, 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits.detach()
        logits, labels = logits.reshape(-1, logits.shape[-1]), torch.tensor(row["labels"])
        labels = labels.reshape(-1)
        if request.param == "llama":
            logits, labels = logits[:-1], labels[1:]
        total += float(functional.cross_entropy(logits, labels, reduction="sum"))
        count += len(labels)
    return model, rows, total / count, count


def _tensors(make: Callable[[Any], Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: make(value) for name, value in row.items()} for row in rows]


def _padding(rows: list[dict[str, Any]]) -> Any:
    several = isinstance(rows[0]["labels"], list)
    kind = "DataCollatorForSeq2Seq" if several else "DataCollatorWithPadding"
    return getattr(transformers, kind)(WORDS)


FORMS: dict[str, Callable[[list[dict[str, Any]]], dict[str, Any]]] = {
    "lists": lambda rows: {"data": rows},
    "called label": lambda rows: {
        "data": [{"input_ids": row["input_ids"], "label": row["labels"]} for row in rows]
    },
    "tensors": lambda rows: {"data": _tensors(torch.tensor, rows)},
    "arrays": lambda rows: {"data": _tensors(np.array, rows)},
    "encodings": lambda rows: {"data": [transformers.BatchEncoding(dict(row)) for row in rows]},
    "columns of no use": lambda rows: {"data": [row | {"text": "a cat", "idx": 3} for row in rows]},
    "the tokenizer": lambda rows: {"data": rows, "collate": WORDS},
    "its collator": lambda rows: {
        "data": [row | {"text": "a cat"} for row in rows],
        "collate": _padding(rows),
    },
    "a loader": lambda rows: {
        "data": DataLoader(rows, 5, shuffle=True, collate_fn=_padding(rows))  # type: ignore[arg-type]
    },
    "a loader of lists": lambda rows: {"data": DataLoader(rows, 5, shuffle=True)},  # type: ignore[arg-type]
    "a batch": lambda rows: {"data": _padding(rows)(rows)},
    "batches": lambda rows: {"data": [_padding(rows)(rows[i : i + 6]) for i in range(0, 24, 6)]},
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_in_any_form_are_the_same_examples(
    form: str, case: tuple[Any, list[dict[str, Any]], float, int]
) -> None:
    model, rows, loss, count = case
    problem = Problem(model, "huggingface", **FORMS[form](rows))
    assert problem.independence.proven
    assert problem.warnings == ()
    assert problem.total_weight == count
    # Means of some hundred numbers of order one, in single precision.
    assert problem.prove().loss == pytest.approx(loss, rel=1e2 * torch.finfo(torch.float32).eps)
    assert problem.hidden_outputs is None


def test_a_collator_that_masks_at_random_is_one_draw() -> None:
    """Its batches are compared with their own parts: made anew, those are masked otherwise."""
    model = pretrained.build("bert", len(WORDS))
    collate = transformers.DataCollatorForLanguageModeling(WORDS, mlm_probability=0.3)
    rows = [{"input_ids": ids} for ids in IDS]
    problem = Problem(model, "huggingface", DataLoader(rows, 4, collate_fn=collate))  # type: ignore[arg-type]
    assert problem.independence.proven
    assert len(problem.warnings) == 1
    assert "are one draw of them" in problem.warnings[0]
    hidden = sum(int((batch["labels"] >= 0).sum()) for batch in problem.data.batches)
    assert problem.total_weight == hidden
    low, high = hesscli.trace(problem, probes=4, confidence=0.999).trace.interval
    expected = pretrained.hessian(pretrained.in_float64(model), problem.data.batches)
    assert low <= float(expected.trace()) <= high


def test_rows_that_make_no_batch_are_refused() -> None:
    model = pretrained.build("bert classes", len(WORDS))
    ragged = [{"input_ids": [1, 2], "labels": 0}, {"input_ids": [1, 2]}]
    with pytest.raises(InputError, match="rows differ in their columns"):
        Problem(model, "huggingface", ragged)
    odd = [{"input_ids": [1, 2], "labels": 0, "attention_mask": [1, "?"]}] * 2
    with pytest.raises(InputError, match="a column holds what is no tensor"):
        Problem(model, "huggingface", odd)
