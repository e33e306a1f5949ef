"""An HTTP client that does exactly what a test tells it to, however rude, over any trio stream."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import h11
import trio
from trio_websocket import WebSocketConnection, wrap_client_stream

from noid.core.waiting import plain_nursery


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A response. Header names are lowercase. *interim* counts the 1xx responses before it."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    interim: int = 0

    def json(self) -> Any:
        """Return the body, parsed."""
        return json.loads(self.body)


class RawClient:
    """One connection."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self.stream = stream
        self._connection = h11.Connection(h11.CLIENT)

    async def send(
        self, method: str, path: str, body: bytes | str | object = None, headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a request. A *body* that is neither bytes, text nor None is sent as JSON."""
        if body is not None and not isinstance(body, bytes | str):
            body = json.dumps(body)
        content = body.encode() if isinstance(body, str) else body or b""
        fields = {"host": "noid", "content-length": str(len(content)), **(headers or {})}
        await self.stream.send_all(_head(method, path, fields) + content)

    async def receive(self, method: str = "GET") -> Answer:
        """Return the next final response."""
        if self._connection.our_state is h11.DONE:
            self._connection.start_next_cycle()
        self._connection.send(h11.Request(method=method, target="/", headers=[("host", "noid")]))
        self._connection.send(h11.EndOfMessage())
        interim, body = 0, bytearray()
        head: h11.Response | None = None
        while True:
            event = self._connection.next_event()
            if event is h11.NEED_DATA:
                self._connection.receive_data(bytes(await self.stream.receive_some(65536)))
            elif isinstance(event, h11.InformationalResponse):
                interim += 1
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                assert head is not None
                headers = {name.decode(): value.decode() for name, value in head.headers}
                return Answer(status=head.status_code, headers=headers, body=bytes(body), interim=interim)
            else:
                raise AssertionError(f"the server sent {event!r}")

    async def ask(
        self, method: str, path: str, body: bytes | str | object = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Send a request and return the response."""
        await self.send(method, path, body, headers)
        return await self.receive(method)

    async def until_closed(self) -> bytes:
        """Return everything the server sends until it closes."""
        received = bytearray()
        while data := await self.stream.receive_some(65536):
            received += data
        return bytes(received)


@contextlib.asynccontextmanager
async def open_ws(
    stream: trio.SocketStream, path: str, headers: Mapping[str, str] | None = None
) -> AsyncIterator[WebSocketConnection]:
    """Open a WebSocket over *stream*, and close both afterwards, which trio-websocket's own does not always do.

    Raises:
        trio_websocket.ConnectionRejected: the server answered something else than 101.
    """
    fields = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    async with stream, plain_nursery() as nursery:
        connection = await wrap_client_stream(nursery, stream, "noid", path, extra_headers=fields)
        yield connection
        with trio.move_on_after(1):
            await connection.aclose()
        nursery.cancel_scope.cancel()


def _head(method: str, path: str, headers: Mapping[str, str]) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
