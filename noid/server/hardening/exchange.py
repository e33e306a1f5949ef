"""One request as it is seen from outside its handler: what surrounds it, and what became of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from quart import Quart
from quart_trio import QuartTrio


@dataclass(slots=True, kw_only=True)
class Exchange:
    """What became of a request.

    Attributes:
        headers: Are added to the response, whoever makes it; also to the 101 of a WebSocket.
        status: The response's; None while there is none, and for ever when the client leaves before.
        sent_bytes: How much of a body the handler has sent; of WebSockets nothing is counted.
        ended: Whether the response is whole, or the WebSocket was closed in order.
        close_code: Of a WebSocket: the code it was closed with.
        closed_by_client: Whether it was the client that closed the WebSocket.
    """

    headers: dict[str, str] = field(default_factory=dict)
    status: int | None = None
    sent_bytes: int = 0
    ended: bool = False
    close_code: int | None = None
    closed_by_client: bool = False

    def raw_headers(self) -> list[tuple[bytes, bytes]]:
        """Return `headers` as ASGI has them."""
        return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in self.headers.items()]


Around = Callable[[Mapping[str, Any], Exchange], contextlib.AbstractContextManager[None]]
"""Is given a request's ASGI scope; entered before anything else happens to it and left when everything has."""


class WatchedApp(QuartTrio):
    """An application whose requests are all surrounded by `around`."""

    around: Around | None = None


def surrounded(app: Quart, scope: Mapping[str, Any], exchange: Exchange) -> contextlib.AbstractContextManager[None]:
    """Return what surrounds a request of *app*."""
    around = app.around if isinstance(app, WatchedApp) else None
    return contextlib.nullcontext() if around is None else around(scope, exchange)
