"""The OpenAPI document as a page for people: plain HTML without scripts, which works offline and can do no harm."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

STYLE = (resources.files("noid.server") / "docs.css").read_text()
POLICY = f"default-src 'none'; style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'"
"""The page's Content-Security-Policy: its own style and nothing else."""

_LIMITS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {}",
    "maxItems": "at most {}",
    "maxProperties": "at most {}",
    "pattern": "matches `{}`",
    "default": "default `{}`",
}


def page(document: Mapping[str, Any]) -> str:
    """Return *document* as HTML."""
    return "".join(_page(document))


def _page(document: Mapping[str, Any]) -> Iterator[str]:
    info = document["info"]
    title = f"{_text(info['title'])} {_text(info['version'])}"
    yield f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    yield '<meta name="viewport" content="width=device-width"><style>'
    yield f"{STYLE}</style></head><body><h1>{title}</h1><p>{_prose(info['description'])}</p>"
    yield '<p>For programs: <a href="/openapi.json">/openapi.json</a></p><nav><ul>'
    operations = [
        (path, method.upper(), operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    for path, method, operation in operations:
        yield f'<li><a href="#{operation["operationId"]}">{method} {_text(path)}</a></li>'
    yield "</ul></nav>"
    for tag in document["tags"]:
        yield f"<h2>{_text(tag['name'])}</h2><p>{_prose(tag['description'])}</p>"
        for path, method, operation in operations:
            if tag["name"] in operation["tags"]:
                yield from _operation(document, path, method, operation)
    yield "<h2>Objects</h2>"
    for name, schema in document["components"]["schemas"].items():
        yield f'<section class="operation" id="schema-{name}"><h3>{name}</h3>'
        yield f"<p>{_prose(schema.get('description', ''))}</p>{_fields(schema)}</section>"
    yield "</body></html>\n"


def _operation(document: Mapping[str, Any], path: str, method: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f'<section class="operation" id="{operation["operationId"]}">'
    scope = operation.get("x-noid-scope")
    needs = "no token needed" if scope is None else f"scope {scope}"
    yield f'<h3><span class="method">{method}</span> <code>{_text(path)}</code> <span class="scope">{needs}</span></h3>'
    yield f"<p>{_prose(operation['summary'])}</p>"
    yield "".join(f"<p>{_prose(part)}</p>" for part in operation.get("description", "").split("\n\n") if part)
    if parameters := operation.get("parameters"):
        yield "<table><tr><th>parameter</th><th>in</th><th>what</th></tr>"
        for parameter in parameters:
            name = f"<code>{_text(parameter['name'])}</code>{'' if parameter['required'] else ' (optional)'}"
            about = " ".join(filter(None, (_prose(parameter.get("description", "")), _schema(parameter["schema"]))))
            yield f"<tr><td>{name}</td><td>{parameter['in']}</td><td>{about}</td></tr>"
        yield "</table>"
    if body := operation.get("requestBody"):
        may = "" if body["required"] else " (may be missing)"
        yield f"<p>Body{may}: {_media(body['content'])}</p>"
    yield "<table><tr><th>status</th><th>what</th><th>body</th></tr>"
    for status, answer in operation["responses"].items():
        if "$ref" in answer:
            answer = document["components"]["responses"][answer["$ref"].rpartition("/")[2]]
        about = _prose(re.sub("^- ", "", answer["description"], flags=re.MULTILINE)).replace("\n", "<br>")
        yield f"<tr><td>{status}</td><td>{about}</td><td>{_media(answer.get('content', {}))}</td></tr>"
    yield "</table></section>"


def _media(content: Mapping[str, Any]) -> str:
    parts = []
    for media, found in content.items():
        schema = _schema(found["schema"])
        parts.append(schema if media == "application/json" and schema else f"<code>{_text(media)}</code> {schema}")
    return ", or ".join(parts)


def _fields(schema: Mapping[str, Any]) -> str:
    rows = []
    for name, field in schema.get("properties", {}).items():
        may = "" if name in schema.get("required", ()) else " (optional)"
        about = _prose(field.get("description", ""))
        rows.append(f"<tr><td><code>{_text(name)}</code>{may}</td><td>{_schema(field)}</td><td>{about}</td></tr>")
    return f"<table><tr><th>field</th><th>type</th><th>what</th></tr>{''.join(rows)}</table>" if rows else ""


def _schema(schema: Mapping[str, Any]) -> str:
    """Return what *schema* allows, in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f'<a href="#schema-{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(map(_schema, schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"<code>{_text(value)}</code>" for value in schema["enum"])
    kinds = schema.get("type", ())
    words = " or ".join([kinds] if isinstance(kinds, str) else kinds)
    if isinstance(schema.get("items"), Mapping):
        words += f" of {_schema(schema['items'])}"
    if isinstance(schema.get("additionalProperties"), Mapping):
        words += f" of {_schema(schema['additionalProperties'])}"
    if schema.get("properties"):
        words += " with " + ", ".join(f"<code>{_text(name)}</code>" for name in schema["properties"])
    limits = [_prose(say.format(_plain(schema[key]))) for key, say in _LIMITS.items() if key in schema]
    return words + "".join(f", {limit}" for limit in limits)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _prose(text: str) -> str:
    """Return *text* escaped, with what is between backquotes as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", _text(text))


def _text(value: object) -> str:
    return html.escape(str(value))
