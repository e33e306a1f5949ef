"""The words schemas are written in: JSON Schema 2020-12 as plain dictionaries, and names for those used twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

JSON = "application/json"
BYTES = "application/octet-stream"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A schema with a name of its own in the document. Records stand in other schemas wherever a schema may."""

    name: str
    schema: Mapping[str, Any]


Schema: TypeAlias = Mapping[str, Any] | Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """A body by media type, where it is not simply JSON that must be there.

    Attributes:
        media: Schemas by media type; an empty schema for bytes. None at all: there is no body.
        headers: What the answer carries beside those every answer has; a name that ends in ``?`` may be missing.
        required: Whether a request must have it.
        text: What it is, if its route's summary does not say.
    """

    media: Mapping[str, Schema] = field(default_factory=dict)
    headers: Mapping[str, Schema] = field(default_factory=dict)
    required: bool = True
    text: str = ""


Answer: TypeAlias = Schema | Content | None
"""What a status comes with: JSON, something else, or nothing."""


def text(*, least: int = 0, most: int | None = None, pattern: str | None = None, about: str = "") -> dict[str, Any]:
    """Return a string of *least* to *most* characters."""
    limits = {"minLength": least or None, "maxLength": most, "pattern": pattern}
    return _said({"type": "string"} | {key: value for key, value in limits.items() if value is not None}, about)


def integer(
    least: int | None = None, most: int | None = None, *, default: int | None = None, about: str = ""
) -> dict[str, Any]:
    """Return a whole number from *least* to *most*."""
    return _number("integer", least, most, default, about)


def number(
    least: float | None = None, most: float | None = None, *, default: float | None = None, about: str = ""
) -> dict[str, Any]:
    """Return a number from *least* to *most*."""
    return _number("number", least, most, default, about)


def boolean(*, default: bool | None = None, about: str = "") -> dict[str, Any]:
    """Return true or false."""
    return _said({"type": "boolean"} | ({} if default is None else {"default": default}), about)


def flag(*, about: str = "") -> dict[str, Any]:
    """Return a word of a query that is on when it is there, whatever it says but 0, no and false."""
    return text(about=about)


def choice(*values: str | int, about: str = "") -> dict[str, Any]:
    """Return one of *values*."""
    return _said({"enum": list(values)}, about)


def array(items: Schema, *, most: int | None = None, about: str = "") -> dict[str, Any]:
    """Return an array of *items*."""
    return _said({"type": "array", "items": items} | ({} if most is None else {"maxItems": most}), about)


def mapping(values: Schema, *, keys: Schema | None = None, most: int | None = None, about: str = "") -> dict[str, Any]:
    """Return an object whose fields, of any name that fits *keys*, are *values*."""
    limits = {"propertyNames": keys, "maxProperties": most}
    schema = {"type": "object", "additionalProperties": values}
    return _said(schema | {key: value for key, value in limits.items() if value is not None}, about)


def nullable(schema: Schema, *, about: str = "") -> dict[str, Any]:
    """Return *schema* or null."""
    if isinstance(schema, Record) or not isinstance(schema.get("type"), str):
        return _said({"anyOf": [schema, {"type": "null"}]}, about)
    return _said({**schema, "type": [schema["type"], "null"]}, about)


def shape(fields: Mapping[str, Schema], *, about: str = "") -> dict[str, Any]:
    """Return an object with *fields*, without a name of its own. A field whose name ends in ``?`` may be missing."""
    schema = {
        "type": "object",
        "properties": {name.removesuffix("?"): field for name, field in fields.items()},
        "required": [name for name in fields if not name.endswith("?")],
    }
    return _said(schema, about)


def record(name: str, about: str, fields: Mapping[str, Schema]) -> Record:
    """Return an object with *fields*, which the document calls *name*. As `shape`."""
    return Record(name=name, schema=shape(fields, about=about))


def extended(name: str, about: str, base: Record, fields: Mapping[str, Schema]) -> Record:
    """Return *base* with more *fields*."""
    more = shape(fields)
    merged = {
        "type": "object",
        "properties": {**base.schema["properties"], **more["properties"]},
        "required": [*base.schema["required"], *more["required"]],
    }
    return Record(name=name, schema=_said(merged, about))


def optional_json(schema: Schema) -> Content:
    """Return a JSON body that may be missing altogether."""
    return Content(media={JSON: schema}, required=False)


def _number(kind: str, least: float | None, most: float | None, default: float | None, about: str) -> dict[str, Any]:
    limits = {"minimum": least, "maximum": most, "default": default}
    return _said({"type": kind} | {key: value for key, value in limits.items() if value is not None}, about)


def _said(schema: dict[str, Any], about: str) -> dict[str, Any]:
    return {**schema, "description": about} if about else schema
