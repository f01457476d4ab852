"""The published JSON Schema of ``report.json``, and a check against it without dependencies."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from importlib.resources import files
from typing import Any

SCHEMA = 2
SCHEMA_ID = "urn:reticent:report:2"
SCHEMA_FILE = "report-schema-2.json"

_NOTES = {"$schema", "$id", "$defs", "title", "description"}
_KNOWN = _NOTES | {
    "$ref", "type", "const", "enum", "anyOf", "properties", "required", "additionalProperties",
    "items", "minItems", "maxItems", "minimum", "exclusiveMinimum", "maximum", "pattern",
    "minLength",
}  # fmt: skip


def schema_text() -> str:
    """Return the JSON Schema (draft 2020-12) of the reports that this version writes."""
    return files(__package__ or __name__).joinpath(SCHEMA_FILE).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def load_schema() -> dict[str, Any]:
    """Return the schema as data; do not write to it."""
    return json.loads(schema_text())


def problems(data: Any, section: str | None = None) -> list[str]:
    """Return where ``data`` differs from the schema, as ``path: what is wrong``; empty if nowhere.

    With ``section`` given, ``data`` is that section of a report.

    The subset of JSON Schema that the published schema uses is checked, and no more is accepted in
    the schema: an unknown keyword is a fault here, never silently ignored.
    """
    whole = load_schema()
    if section is None:
        return list(_problems(data, whole, "report"))
    return list(_problems(data, whole["properties"][section], section))


def _problems(value: Any, schema: dict[str, Any], path: str) -> Iterator[str]:
    unknown = set(schema) - _KNOWN
    if unknown:
        raise ValueError(f"{SCHEMA_FILE}: {path}: keyword {sorted(unknown)} is not known")
    if "$ref" in schema:
        yield from _problems(value, load_schema()["$defs"][schema["$ref"].split("/")[-1]], path)
    if "anyOf" in schema and all(any(_problems(value, s, path)) for s in schema["anyOf"]):
        yield f"{path}: {_shown(value)} fits none of what is allowed"
    if "type" in schema and not _is_type(value, schema["type"]):
        yield f"{path}: {_shown(value)} must be {schema['type']}"
        return
    yield from _value_problems(value, schema, path)
    if isinstance(value, dict):
        yield from _object_problems(value, schema, path)
    if isinstance(value, list):
        yield from _list_problems(value, schema, path)


def _value_problems(value: Any, schema: dict[str, Any], path: str) -> Iterator[str]:
    allowed = [schema["const"]] if "const" in schema else schema.get("enum")
    if allowed is not None and not any(type(value) is type(a) and value == a for a in allowed):
        yield f"{path}: {_shown(value)} must be {' or '.join(map(_shown, allowed))}"
    if isinstance(value, str):
        if len(value) < schema.get("minLength", 0):
            yield f"{path}: must not be empty"
        if not re.search(schema.get("pattern", ""), value):
            yield f"{path}: {_shown(value)} must match {schema['pattern']}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, above = schema.get("minimum", value), schema.get("exclusiveMinimum")
        if value < low or value > schema.get("maximum", value):
            yield f"{path}: {value} is out of range"
        if above is not None and value <= above:
            yield f"{path}: {value} must be > {above}"


def _object_problems(value: dict[str, Any], schema: dict[str, Any], path: str) -> Iterator[str]:
    known: dict[str, Any] = schema.get("properties", {})
    others = schema.get("additionalProperties", True)
    for name in schema.get("required", []):
        if name not in value:
            yield f"{path}: has no {name}"
    for name, item in value.items():
        if name in known:
            yield from _problems(item, known[name], f"{path}.{name}")
        elif others is False:
            yield f"{path}: {name} is not known"
        elif isinstance(others, dict):
            yield from _problems(item, others, f"{path}.{name}")


def _list_problems(value: list[Any], schema: dict[str, Any], path: str) -> Iterator[str]:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        yield f"{path}: has {len(value)} items"
    for index, item in enumerate(value):
        yield from _problems(item, schema.get("items", {}), f"{path}[{index}]")


def _is_type(value: Any, kind: str | list[str]) -> bool:
    if isinstance(kind, list):
        return any(_is_type(value, k) for k in kind)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # JSON has no infinity and no NaN, Python's parser has; and integers that no float holds.
    number = number and abs(value) <= sys.float_info.max
    return {
        "object": isinstance(value, dict),
        "array": isinstance(value, list),
        "string": isinstance(value, str),
        "boolean": isinstance(value, bool),
        "null": value is None,
        "number": number,
        "integer": number and value == int(value),
    }[kind]


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:80]
