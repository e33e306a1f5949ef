"""The OpenAPI 3.1 document of a server, made of the table of routes, and the routes that send it."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from http import HTTPStatus
from typing import Any

from quart import Response

from noid import __version__
from noid.core.wire import API_VERSION, API_VERSION_HEADER
from noid.server import docs_page
from noid.server.schemas.failures import error_content, error_statuses
from noid.server.schemas.paths import PATH_PARAMETERS
from noid.server.schemas.vocabulary import JSON, Answer, Content, Record, Schema, choice, text
from noid.server.table import WS, Route

_IN_EVERY_ANSWER: Mapping[str, Schema] = {
    API_VERSION_HEADER: choice(str(API_VERSION)),
    "X-Request-Id": text(about="The server's log says more under it."),
}
_POLICY = "Content-Security-Policy"
_PAGE = Content(media={"text/html": text()}, headers={_POLICY: text()})
_ABOUT = (
    "Virtual machines that can be frozen, forked and woken in milliseconds. What needs a scope needs a token that has "
    "it: `Authorization: Bearer noid_tok_...`. WebSockets are described as GET with the answer 101; what travels over "
    "them is in noid's documentation, HTTP. Requests may have fields and words in the query beyond those named here; "
    "they are ignored."
)


class DocumentRoutes:
    """``/openapi.json`` and ``/docs``, about all *routes* there are, these among them; made when the first one asks."""

    def __init__(self, routes: Callable[[], Sequence[Route]]) -> None:
        self._all_routes = routes

    def routes(self) -> list[Route]:
        """Return the lines of the table."""
        return [
            Route(
                method="GET", path="/openapi.json", handler=self.document, scope=None, answers={200: {"type": "object"}}
            ),
            Route(method="GET", path="/docs", handler=self.page, scope=None, answers={200: _PAGE}),
        ]

    async def document(self) -> Response:
        """Describe every route: this document."""
        return Response(self._document, content_type=JSON)

    async def page(self) -> Response:
        """Describe every route: the same as a page for people."""
        return Response(self._page, content_type="text/html; charset=utf-8", headers={_POLICY: docs_page.POLICY})

    @cached_property
    def _document(self) -> bytes:
        return json.dumps(document(self._all_routes()), ensure_ascii=False, separators=(",", ":")).encode()

    @cached_property
    def _page(self) -> str:
        return docs_page.page(document(self._all_routes()))


def document(routes: Iterable[Route]) -> dict[str, Any]:
    """Return the OpenAPI document of *routes*."""
    writer = _Writer()
    found: dict[tuple[str, str], list[Route]] = {}
    for route in routes:  # a WebSocket's route is its GET's upgrade
        found.setdefault((route.path, "GET" if route.method == WS else route.method), []).append(route)
    paths: dict[str, dict[str, Any]] = {}
    tags: dict[str, str] = {}
    for (path, method), both in found.items():
        tag, about = _tag(both[0])
        tags.setdefault(tag, about)
        operation = {"tags": [tag], **writer.operation(method, both)}
        paths.setdefault(re.sub("<([a-z_]+)>", r"{\1}", path), {})[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "noid", "version": __version__, "description": _ABOUT},
        "tags": [{"name": name, "description": about} for name, about in tags.items()],
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "responses": {_phrase(s): writer.response(s, error_content(s)) for s in error_statuses()},
            "schemas": dict(sorted(writer.schemas.items())),
        },
    }


def said(route: Route) -> tuple[str, str]:
    """Return summary and description of *route*: the docstring of its handler, in Markdown."""
    summary, _, rest = (inspect.getdoc(route.handler) or "").replace("``", "`").partition("\n\n")
    return " ".join(summary.split()), rest.strip()


class _Writer:
    """Writes operations and collects the records they name."""

    def __init__(self) -> None:
        self.schemas: dict[str, Any] = {}
        self._records: dict[str, Record] = {}

    def operation(self, method: str, routes: Sequence[Route]) -> dict[str, Any]:
        """Return the operation that *routes*, of one method and path, are together."""
        summary, description = said(routes[0])
        for upgrade in routes[1:]:
            description = "\n\n".join(filter(None, (description, f"Over a WebSocket: {' '.join(said(upgrade))}")))
        answers = {status: answer for route in routes for status, answer in route.every_answer.items()}
        failures = frozenset().union(*(route.failures for route in routes))
        bodies = [route.body for route in routes if route.body is not None]
        written = {
            "operationId": _operation_id(method, routes[0].path),
            "summary": summary,
            "description": description or None,
            "security": [] if routes[0].scope is None else None,
            "x-noid-scope": routes[0].scope,
            "parameters": [parameter for name, where, schema in _parameters(routes)
                           for parameter in [self._parameter(name, where, schema)]] or None,
            "requestBody": self._body(bodies[0]) if bodies else None,
            "responses": {
                **{str(status): self.response(status, answers[status]) for status in sorted(answers)},
                **{str(status): {"$ref": f"#/components/responses/{_phrase(status)}"} for status in sorted(failures)},
            },
        }  # fmt: skip
        return {key: value for key, value in written.items() if value is not None}

    def response(self, status: int, answer: Answer) -> dict[str, Any]:
        """Return what *status* comes with."""
        content = answer if isinstance(answer, Content) else Content(media={} if answer is None else {JSON: answer})
        headers = {**_IN_EVERY_ANSWER, **content.headers} if status != 101 else content.headers
        written: dict[str, Any] = {"description": content.text or HTTPStatus(status).phrase}
        if headers:
            written["headers"] = {
                name.removesuffix("?"): {"required": not name.endswith("?"), "schema": self.schema(schema)}
                for name, schema in headers.items()
            }
        if content.media:
            written["content"] = {media: {"schema": self.schema(schema)} for media, schema in content.media.items()}
        return written

    def schema(self, schema: Any) -> Any:
        """Return *schema* with references in the places of records.

        Raises:
            ValueError: two different records have one name.
        """
        if isinstance(schema, Record):
            if self._records.setdefault(schema.name, schema) != schema:
                raise ValueError(f"two schemas are called {schema.name}")
            if schema.name not in self.schemas:
                self.schemas[schema.name] = {}  # for one that contains itself
                self.schemas[schema.name] = self.schema(schema.schema)
            return {"$ref": f"#/components/schemas/{schema.name}"}
        if isinstance(schema, Mapping):
            return {key: self.schema(value) for key, value in schema.items()}
        if isinstance(schema, list):
            return [self.schema(item) for item in schema]
        return schema

    def _parameter(self, name: str, where: str, schema: Schema) -> dict[str, Any]:
        resolved = self.schema(schema)
        about = resolved.pop("description", None)
        parameter = {"name": name.removesuffix("?"), "in": where, "required": not name.endswith("?")}
        return {**parameter, **({"description": about} if about else {}), "schema": resolved}

    def _body(self, body: Schema | Content) -> dict[str, Any]:
        content = body if isinstance(body, Content) else Content(media={JSON: body})
        written = {
            "required": content.required,
            "content": {media: {"schema": self.schema(schema)} for media, schema in content.media.items()},
        }
        return {"description": content.text, **written} if content.text else written


def _parameters(routes: Sequence[Route]) -> Iterable[tuple[str, str, Schema]]:
    """Yield name, place and schema of every parameter.

    Raises:
        ValueError: nobody has said what a name in the path is.
    """
    for name in routes[0].names:
        if name not in PATH_PARAMETERS:
            raise ValueError(f"{routes[0].path}: say in noid.server.schemas.paths what <{name}> is")
        yield name, "path", PATH_PARAMETERS[name]
    for where in ("query", "header"):
        merged: dict[str, Schema] = {}
        for route in routes:
            merged |= route.query if where == "query" else route.every_header
        yield from ((name, where, schema) for name, schema in merged.items())


def _operation_id(method: str, path: str) -> str:
    return "_".join([method.lower(), *(word.strip("<>").replace(".", "_") for word in path.split("/") if word)])


def _tag(route: Route) -> tuple[str, str]:
    """Return the name and a line on the class of *route*'s handler: which routes belong together."""
    owner = type(getattr(route.handler, "__self__", None))
    about = (inspect.getdoc(owner) or "").partition("\n")[0].replace("``", "`")
    return owner.__name__.removesuffix("Routes").lower(), about


def _phrase(status: int) -> str:
    return re.sub("[^A-Za-z]", "", HTTPStatus(status).phrase.title())
