"""One WebSocket: its messages, how large they may be, and how it ends."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from hypercorn.protocol.events import StreamClosed
from hypercorn.protocol.ws_stream import WSStream
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, ASGISendEvent
from quart import websocket
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIWebsocketConnection
from wsproto.connection import ConnectionState
from wsproto.events import CloseConnection
from wsproto.events import Event as WsEvent

from noid.errors import DependencyDown, NoidError
from noid.server.hardening.connection import Transport
from noid.server.hardening.exchange import Exchange, surrounded

logger = logging.getLogger(__name__)

CLOSE_NORMAL = 1000
CLOSE_INTERNAL_ERROR = 1011
CLOSE_RESTARTING = 1012


class WebsocketConnection(TrioASGIWebsocketConnection):
    """F: an empty message is a message. J: one message waits here, not ten."""

    def __init__(self, app: QuartTrio, scope: Any) -> None:
        super().__init__(app, scope)
        self.send_channel, self.receive_channel = trio.open_memory_channel[str | bytes](0)

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Serve one WebSocket, or the request that did not become one."""
        exchange = Exchange()

        async def send_noted(message: ASGISendEvent) -> None:
            if message["type"] == "websocket.accept":
                exchange.status = 101
                message["headers"] = [*message["headers"], *exchange.raw_headers()]
            elif message["type"] == "websocket.http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*message["headers"], *exchange.raw_headers()]
            await send(message)
            if message["type"] == "websocket.close":
                exchange.ended, exchange.close_code = True, message["code"]
            elif message["type"] == "websocket.http.response.body":
                exchange.sent_bytes += len(message["body"])
                exchange.ended = not message["more_body"]

        with surrounded(self.app, self.scope, exchange):
            await super().__call__(receive, send_noted)

    async def handle_messages(  # type: ignore[override]  # quart-trio changes the signature of quart's method as well
        self, nursery: trio.Nursery, receive: ASGIReceiveCallable
    ) -> None:
        """Hand messages to the handler until the client is gone; then cancel it."""
        while (event := await receive())["type"] != "websocket.disconnect":
            if event["type"] == "websocket.receive":
                data, text = event.get("bytes"), event.get("text")
                await self.send_channel.send(data if data is not None else text or "")
        nursery.cancel_scope.cancel()


class WebsocketStream(WSStream):
    """G, H, S: oversized messages end the connection, extensions are never negotiated, every send yields."""

    async def app_send(self, message: ASGISendEvent | None) -> None:
        """Send what the application says; without effect, but not without yielding, once the connection is closed."""
        await trio.lowlevel.checkpoint_if_cancelled()  # B: writing is not interrupted
        transport = Transport.of(self.scope)
        writes = transport.writes
        await super().app_send(message)
        if transport.writes == writes:
            await trio.lowlevel.checkpoint()

    async def _send_wsproto_event(self, event: WsEvent) -> None:
        if isinstance(event, CloseConnection) and self.connection.state is ConnectionState.REMOTE_CLOSING:
            Transport.of(self.scope).said_goodbye = True
        await super()._send_wsproto_event(event)

    async def _accept(self, message: Any) -> None:
        self.handshake.extensions = None
        await super()._accept(message)

    async def _handle_events(self) -> None:
        await super()._handle_events()
        if self.buffer.length > self.buffer.max_length:
            await self.send(StreamClosed(stream_id=self.stream_id))


async def hold_websocket(
    stopping: trio.Event, session: Callable[[], Awaitable[None]], last_words: Callable[[NoidError], str]
) -> None:
    """Run *session* on the current WebSocket, then close it, saying why: D and E.

    A `NoidError` is answered with ``last_words(error)`` and code 1000; any other error is logged and answered as
    internal with 1011; when *stopping* is set the session is cancelled and answered with 1012. When the client is gone
    the session is cancelled and nobody is answered.
    """
    code = CLOSE_NORMAL
    error: NoidError | None = None

    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            nonlocal code, error
            await stopping.wait()
            code = CLOSE_RESTARTING
            error = DependencyDown("the server is going down for a restart, so this session was ended. Try again.")
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        try:
            await session()
        except NoidError as noid_error:
            error = noid_error
        except Exception:
            logger.exception("WebSocket session failed")
            code, error = CLOSE_INTERNAL_ERROR, NoidError("internal error. The server's log says more.")
        nursery.cancel_scope.cancel()

    if error is not None:
        await websocket.send(last_words(error))
    await websocket.close(code, {CLOSE_RESTARTING: "restarting", CLOSE_INTERNAL_ERROR: "internal error"}.get(code, ""))
