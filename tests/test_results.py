"""What all results share: which of their fields a document has, and a choice of layers."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from example_ihvp import ihvp_result
from example_results import diag_result, trace_result

from hesscli.results import Answer, documented

ANSWERS = (trace_result(), diag_result(), ihvp_result())


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.command)
def test_a_choice_of_layers_leaves_all_else_as_it_is(answer: Answer) -> None:
    first, *others = (layer.name for layer in answer.layers)
    assert others
    chosen = answer.only([first])
    assert [layer.name for layer in chosen.layers] == [first]
    assert chosen.num_hidden == len(others)
    assert replace(chosen, layers=answer.layers, num_hidden=None) == answer


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.command)
def test_no_choice_is_all_layers_and_an_empty_one_is_none(answer: Answer) -> None:
    assert answer.only(None) is answer
    none = answer.only(())
    assert (none.layers, none.num_hidden) == ((), len(answer.layers))


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.command)
def test_documents_open_and_close_alike(answer: Answer) -> None:
    names = documented(type(answer))
    assert names[:4] == ["schema_version", "command", "hesscli_version", "status"]
    assert names[-5:] == ["layers", "environment", "files", "sha256", "warnings"]
    assert set(names) < {field.name for field in fields(answer)}
