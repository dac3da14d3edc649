"""A result as one JSON document, and the schema that such documents keep."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from hesscli.commands import results
from hesscli.results import Header, documented


def to_json(result: Header) -> str:
    """Write a result as one JSON document.

    Keys are the field names; numbers keep all their digits; a number that is not finite, such as
    an unknown error, becomes null, and so does an interval without ends.

    Args:
        result: what a command returned.

    Returns:
        The document, in ASCII, ending with a newline.
    """
    kind: Any = type(result)
    names = documented(kind)
    plain = _adapter(kind).dump_python(
        result, mode="json", include=set(names), fallback=_number, warnings=False
    )
    text = json.dumps({name: plain[name] for name in names})
    finite = json.loads(text, parse_constant=lambda _: None)
    return json.dumps(finite, indent=2, allow_nan=False) + "\n"


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """What knows a result's types: it writes documents and describes them."""
    return TypeAdapter(kind)


def _number(scalar: Any) -> Any:
    """Python's number for one of numpy's."""
    return scalar.item()


def schema() -> dict[str, Any]:
    """Describe the documents of all commands.

    Returns:
        A JSON Schema (draft 2020-12). Keys that it does not name are allowed, since new ones
        may come without a new ``schema_version``.
    """
    kinds = results()
    references, definitions = TypeAdapter.json_schemas(
        [(command, "serialization", _adapter(kind)) for command, kind in kinds.items()],
        schema_generator=_DocumentSchema,
    )
    for kind in kinds.values():
        definition, names = definitions["$defs"][kind.__name__], documented(kind)
        definition["required"] = names
        definition["properties"] = {name: definition["properties"][name] for name in names}
    for definition in definitions["$defs"].values():
        for name, described in definition.get("properties", {}).items():
            if name.endswith("stderr") and described == {"type": "number"}:
                described["type"] = ["number", "null"]  # null where it is not known
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        "title": "hesscli",
        "description": "What hesscli prints with --out json: one document a command.",
        "oneOf": [references[command, "serialization"] for command in kinds],
        **definitions,
    }


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
        """Let one end of an interval be null: nothing is known on that side."""
        described = super().tuple_schema(schema)
        ends = described.get("prefixItems", [])
        if [end.get("type") for end in ends] == ["number", "number"]:
            described["prefixItems"] = [{"type": ["number", "null"]}] * 2
            described["description"] = "From, to; null where unbounded."
        return described
