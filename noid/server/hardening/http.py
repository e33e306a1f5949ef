"""One request over HTTP/1: its body, its response, and the protocol under both."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import h11
import trio
from hypercorn.events import Closed
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, ASGISendEvent
from quart import Request, request
from quart_trio.asgi import TrioASGIHTTPConnection

from noid.errors import DeadlineExceeded
from noid.server.hardening.connection import STATE_KEY

LET_GO_SECS = 5.0

_UPLOAD_KEY = "noid.upload"


class BrokenOff(Exception):
    """A response whose beginning was sent cannot be completed. The client sees its connection end in the middle."""


class Upload:
    """The body of a PUT, piece by piece. What is not asked for stays in the socket."""

    def __init__(self) -> None:
        self._put, self._pieces = trio.open_memory_channel[bytes](0)

    async def put(self, data: bytes, *, more: bool) -> None:
        """Hand on a piece; waits until it is taken. Once nobody wants it, it is dropped."""
        if data:
            with contextlib.suppress(trio.BrokenResourceError):
                await self._put.send(data)
        if not more:
            self._put.close()

    def abandon(self) -> None:
        """Drop what still comes."""
        self._pieces.close()

    async def pieces(self, silence_secs: float) -> AsyncGenerator[bytes, None]:  # noqa: ASYNC900  # holds nothing that an end would have to free
        """Yield the pieces as they come.

        Raises:
            DeadlineExceeded: none came for *silence_secs*.
        """
        while True:
            try:
                with trio.fail_after(silence_secs):
                    piece = await self._pieces.receive()
            except trio.EndOfChannel:
                return
            except trio.TooSlowError as error:
                raise DeadlineExceeded(f"nothing more of the body came for {silence_secs:g} s.") from error
            yield piece


def upload() -> Upload:
    """Return the body of the current request, a PUT."""
    stream = request.scope["state"][_UPLOAD_KEY]
    assert isinstance(stream, Upload)  # noqa: S101  # HttpConnection put it there
    return stream


class HttpConnection(TrioASGIHTTPConnection):
    """A: the end of a response completes even though the request it belongs to is already over. U and V."""

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Serve one request."""
        stream = Upload() if self.scope["method"] == "PUT" else None

        async def send_whole(message: ASGISendEvent) -> None:
            if stream is not None and message["type"] == "http.response.start":
                stream.abandon()
            last = message["type"] == "http.response.body" and not message.get("more_body")
            with trio.CancelScope(shield=last):
                await trio.lowlevel.checkpoint()  # S
                await send(message)

        self.scope["state"][_UPLOAD_KEY] = stream
        try:
            await super().__call__(receive, send_whole)
        except* BrokenOff:
            pass  # nothing more is sent: hypercorn closes the connection, and the client sees that the end is missing
        finally:
            if stream is not None:
                await self._let_go(receive, send)  # noqa: ASYNC102  # shields itself

    @staticmethod
    async def _let_go(receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """End the request although parts of its body wait to be received: hypercorn waits until somebody takes them."""

        async def drop() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        with trio.move_on_after(LET_GO_SECS, shield=True):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(drop)
                await send(None)  # type: ignore[arg-type]  # hypercorn's own end mark; a second one does nothing
                nursery.cancel_scope.cancel()

    async def handle_messages(  # type: ignore[override]  # quart-trio changes the signature of quart's method as well
        self, nursery: trio.Nursery, request: Request, receive: ASGIReceiveCallable
    ) -> None:
        """Hand the body on until the client is gone; then cancel the handler."""
        stream = self.scope["state"][_UPLOAD_KEY]
        if stream is None:
            await super().handle_messages(nursery, request, receive)
            return
        while (message := await receive())["type"] != "http.disconnect":
            if message["type"] == "http.request":
                await stream.put(message.get("body", b""), more=message.get("more_body", False))
        nursery.cancel_scope.cancel()


class Http1Protocol(H11Protocol):
    """N and T: HTTP/1.0 and 1.1 and nothing else, and only for something that has a path."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        transport = self.connection_state.get(STATE_KEY)
        if transport is not None:
            transport.say_interim = self.send_interim

    async def send_interim(self) -> None:
        """Send ``100 Continue`` if an HTTP/1.1 request waits for its response."""
        connection = self.connection
        if (
            isinstance(connection, h11.Connection)
            and connection.our_state is h11.SEND_RESPONSE
            and connection.their_http_version == b"1.1"
        ):
            headers = self.config.response_headers("h11")
            await self._send_h11_event(h11.InformationalResponse(status_code=100, headers=headers))

    async def _check_protocol(self, event: h11.Request) -> None:
        """Never switch to HTTP/2."""

    async def _create_stream(self, request: h11.Request) -> None:
        supported = request.http_version in (b"1.0", b"1.1")
        if not supported or request.target.startswith(b"?"):
            await self._send_error_response(400 if supported else 505)
            await self.send(Closed())
            return
        await super()._create_stream(request)
