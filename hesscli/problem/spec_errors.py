"""What is wrong with a spec, in the words of the spec."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hesscli.errors import InputError
from hesscli.problem.nearest import nearest

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
