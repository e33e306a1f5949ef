"""The table of routes: what a server answers, to whom, and what it says of itself. Everything else is read off it.

The guard asks it what a caller needs, the OpenAPI document and the tests of tenants and of transcripts are generated
from it: a route that is not here does not exist, and one that is here is checked.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from noid.core.model import Scope
from noid.server.hardening import App

WS = "WS"
"""The method of a WebSocket's route."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One line of the table.

    Attributes:
        method: An HTTP method, or `WS`.
        path: As the router has it: ``/v1/vms/<name>``.
        handler: Is given the names in the path; what it raises the guard answers. Its docstring's first line is the
            route's summary.
        scope: What a caller's token must allow. None: anybody may ask, without a token.
        also: Other paths of the same route: older spellings.
        head: Whether HEAD is answered too.
    """

    method: str
    path: str
    handler: Callable[..., Awaitable[Any]]
    scope: Scope | None = Scope.READ
    also: tuple[str, ...] = field(default=())
    head: bool = False

    @property
    def endpoint(self) -> str:
        """Its name in the application: method and path."""
        return f"{self.method} {self.path}"


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
        for path in (route.path, *route.also):
            if route.method == WS:
                app.add_websocket(path, route.endpoint, route.handler)
            else:
                methods = [route.method, "HEAD"] if route.head else [route.method]
                app.add_url_rule(path, route.endpoint, route.handler, methods=methods)
    return table
