"""The table of routes: what a server answers, to whom, and what it says of itself. Everything else is read off it.

The guard asks it what a caller needs, the OpenAPI document and the tests of tenants and of transcripts are generated
from it: a route that is not here does not exist, and one that is here is checked. How what a route takes and answers is
written down: `noid.server.schemas`.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from noid.core.model.users import Scope
from noid.server.hardening import App
from noid.server.schemas import failures
from noid.server.schemas.operations import ACCEPTED, ASYNCHRONOUS, KEYED
from noid.server.schemas.vocabulary import Answer, Content, Schema

_PREFIX = "/v1"
_WITHOUT_PREFIX = f"{_PREFIX}/vms"

WS = "WS"
"""The method of a WebSocket's route."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One line of the table.

    Attributes:
        method: An HTTP method, or `WS`.
        path: As the router has it: ``/v1/vms/<name>``.
        handler: Is given the names in the path; what it raises the guard answers. Its docstring is the route's summary
            (the first line) and description.
        answers: What each status that is no failure comes with.
        scope: What a caller's token must allow. None: anybody may ask, without a token.
        body: What the request carries: JSON of that schema, or something else. None: nothing is read.
        query: What may follow the question mark. A name that ends in ``?`` may be missing.
        headers: Request headers that mean something here. Names as in *query*.
        errors: Statuses of failures, beyond those that follow from the above: see `failures`.
        also: Other paths of the same route: older spellings.
        head: Whether HEAD is answered too.
        audited: Whether it is in the audit log. None: if it is no GET.
        operation: Whether it is an operation: the reply names it, and it can be answered before that has ended.
    """

    method: str
    path: str
    handler: Callable[..., Awaitable[Any]]
    answers: Mapping[int, Answer]
    scope: Scope | None = Scope.READ
    body: Schema | Content | None = None
    query: Mapping[str, Schema] = field(default_factory=dict)
    headers: Mapping[str, Schema] = field(default_factory=dict)
    errors: frozenset[int] = frozenset()
    also: tuple[str, ...] = field(default=())
    head: bool = False
    audited: bool | None = None
    operation: bool = False

    @property
    def endpoint(self) -> str:
        """Its name in the application: method and path."""
        return f"{self.method} {self.path}"

    @property
    def names(self) -> tuple[str, ...]:
        """The names in its path, without the brackets."""
        return tuple(re.findall("<([a-z_]+)>", self.path))

    @property
    def keyed(self) -> bool:
        """Whether an ``Idempotency-Key`` means something: it changes something, and somebody in particular asks.

        Not for a PUT, which can be repeated as it is, and whose body may be of any length.
        """
        return self.method in ("POST", "PATCH", "DELETE") and self.scope is not None

    @property
    def every_answer(self) -> Mapping[int, Answer]:
        """What each status that is no failure comes with, also those that follow from its being an operation."""
        return {**self.answers, 202: ACCEPTED} if self.operation else self.answers

    @property
    def every_header(self) -> Mapping[str, Schema]:
        """Request headers that mean something here, also those that follow from its being an operation or `keyed`."""
        return {**self.headers, **(ASYNCHRONOUS if self.operation else {}), **(KEYED if self.keyed else {})}

    @property
    def failures(self) -> frozenset[int]:
        """Every status that an error of it may have."""
        derived = failures.OF_EVERY_ROUTE
        for applies, statuses in (
            (self.scope is not None, failures.OF_A_SCOPE),
            (self.names, failures.OF_A_NAME_IN_THE_PATH),
            (self.query, failures.OF_A_QUERY),
            (self.body is not None, failures.OF_A_BODY),
            (self.method == WS, failures.OF_A_WEBSOCKET),
            (self.operation, failures.OPERATION),
            (self.keyed, failures.OF_A_KEY),
        ):
            if applies:
                derived |= statuses
        return derived | self.errors

    @property
    def paths(self) -> tuple[str, ...]:
        """Every path it is answered at, its own first; what is below ``/v1/vms`` also without the prefix."""
        if not f"{self.path}/".startswith(f"{_WITHOUT_PREFIX}/"):
            return self.path, *self.also
        return self.path, self.path.removeprefix(_PREFIX), *self.also


def add_routes(app: App, routes: Iterable[Route]) -> Mapping[str, Route]:
    """Make *app* answer *routes* and return them by endpoint.

    Raises:
        ValueError: two routes have one method and path.
    """
    table: dict[str, Route] = {}
    for route in routes:
        if route.endpoint in table:
            raise ValueError(f"two routes for {route.endpoint}")
        table[route.endpoint] = route
        for path in route.paths:
            if route.method == WS:
                app.add_websocket(path, route.endpoint, route.handler)
            else:
                methods = [route.method, "HEAD"] if route.head else [route.method]
                app.add_url_rule(path, route.endpoint, route.handler, methods=methods)
    return table
