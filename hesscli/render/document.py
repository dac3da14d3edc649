"""A result as one JSON document, and the schema that such documents keep."""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from hesscli.results import (
    CheckResult,
    DiagResult,
    IhvpResult,
    SpectrumResult,
    TraceResult,
    documented,
)

Result = TraceResult | DiagResult | IhvpResult | SpectrumResult | CheckResult

_UNKNOWN = (-math.inf, math.inf)
"""An interval of which nothing is known."""
_COMMANDS = (CheckResult, TraceResult, DiagResult, IhvpResult, SpectrumResult)


def to_json(result: Result) -> str:
    """Write a result as one JSON document.

    Keys are the field names, in their order; numbers keep all their digits; a number that is
    not finite, such as an unknown error, becomes null, and so does an interval without ends.

    Args:
        result: what a command returned.

    Returns:
        The document, in ASCII, ending with a newline.
    """
    document = {name: _plain(getattr(result, name)) for name in documented(type(result))}
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def schema() -> dict[str, Any]:
    """Describe the documents of all commands.

    Returns:
        A JSON Schema (draft 2020-12). Keys that it does not name are allowed, since new ones
        may come without a new ``schema_version``.
    """
    references, definitions = TypeAdapter.json_schemas(
        [(command.__name__, "serialization", TypeAdapter(command)) for command in _COMMANDS],
        schema_generator=_DocumentSchema,
    )
    for command in _COMMANDS:
        definition = definitions["$defs"][command.__name__]
        definition["required"] = documented(command)
        definition["properties"] = {
            name: definition["properties"][name] for name in documented(command)
        }
    for definition in definitions["$defs"].values():
        for name, described in definition.get("properties", {}).items():
            if name.endswith("stderr") and described == {"type": "number"}:
                described["type"] = ["number", "null"]  # null where it is not known
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        "title": "hesscli",
        "description": "What hesscli prints with --out json: one document a command.",
        "oneOf": [references[command.__name__, "serialization"] for command in _COMMANDS],
        **definitions,
    }


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        plain = [_plain(item) for item in value]
        return None if value == _UNKNOWN else plain
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class _DocumentSchema(GenerateJsonSchema):
    """The schema of what is written, which is stricter than that of what could be read."""

    def field_is_required(
        self,
        field: core_schema.ModelField | core_schema.DataclassField | core_schema.TypedDictField,
        total: bool,
    ) -> bool:
        return True

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def tuple_schema(self, schema: core_schema.TupleSchema) -> JsonSchemaValue:
        """Let intervals be null, or one of their ends: nothing is known, or not on that side."""
        described = super().tuple_schema(schema)
        ends = described.get("prefixItems", [])
        if [end.get("type") for end in ends] == ["number", "number"]:
            described["prefixItems"] = [{"type": ["number", "null"]}] * 2
            described["description"] = "From, to; null where unbounded."
            return {"anyOf": [described, {"type": "null"}]}
        return described
