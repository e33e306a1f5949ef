"""One WebSocket: its messages, how large they may be, and how it ends."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from hypercorn.protocol.events import Body, Data, Event, StreamClosed
from hypercorn.protocol.ws_stream import WSStream
from hypercorn.typing import ASGISendEvent
from quart import websocket
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIWebsocketConnection
from wsproto.connection import ConnectionState
from wsproto.events import CloseConnection
from wsproto.events import Event as WsEvent
from wsproto.utilities import LocalProtocolError

from noid.errors import DependencyDown, NoidError
from noid.server.hardening.connection import Transport
from noid.server.hardening.exchange import Exchange, surrounded
from noid.server.hardening.staying import End, Stay

logger = logging.getLogger(__name__)

Send = Callable[[ASGISendEvent | None], Awaitable[None]]

CLOSE_NORMAL = 1000
CLOSE_TOO_SLOW = 1008
CLOSE_INTERNAL_ERROR = 1011
CLOSE_RESTARTING = 1012

RESTARTING = End(
    error=DependencyDown("the server is going down for a restart, so this session was ended. Try again."),
    code=CLOSE_RESTARTING,
    reason="restarting",
)


class WebsocketConnection(TrioASGIWebsocketConnection):
    """F: an empty message is a message. J: none waits here, where ten did."""

    def __init__(self, app: QuartTrio, scope: Any) -> None:
        super().__init__(app, scope)
        self.exchange = Exchange()
        self.send_channel, self.receive_channel = trio.open_memory_channel[str | bytes](0)

    async def put(self, event: Any) -> None:
        """Hand a message to the handler; waits until it is taken. Once nobody wants it, it is dropped."""
        data, text = event.get("bytes"), event.get("text")
        with contextlib.suppress(trio.BrokenResourceError):
            await self.send_channel.send(data if data is not None else text or "")

    async def serve(self, life: trio.CancelScope, send: Send) -> None:
        """Call the handler, in this task, for as long as *life* is not cancelled."""
        exchange = self.exchange

        async def send_noted(message: Any) -> None:
            if message["type"] == "websocket.accept":
                exchange.status = 101
                message["headers"] = [*message["headers"], *exchange.raw_headers()]
            elif message["type"] == "websocket.http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*message["headers"], *exchange.raw_headers()]
            await send(message)
            if message["type"] == "websocket.close" and not exchange.closed_by_client:
                exchange.ended, exchange.close_code = True, message["code"]
            elif message["type"] == "websocket.http.response.body":
                exchange.sent_bytes += len(message["body"])
                exchange.ended = not message["more_body"]

        with surrounded(self.app, self.scope, exchange):
            try:
                with life:
                    await super(TrioASGIWebsocketConnection, self).handle_websocket(
                        self._create_websocket_from_scope(send_noted), send_noted
                    )
            finally:
                self.receive_channel.close()


class WebsocketStream(WSStream):
    """G, H, S: oversized messages end the connection, no extensions are negotiated, every send yields. W: one task."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        tasks: Any = self.task_group
        self._spawn = tasks.spawn
        self.task_group: Any = self  # of which only the next method is used
        self._life = trio.CancelScope()
        self._exchange: Exchange | None = None
        self._answers = False  # whether the handler has said anything

    async def handle(self, event: Event) -> None:
        """Take what the protocol has read. Who sends before it is accepted hears 400, or what the handler says."""
        if not isinstance(event, Body | Data) or self.closed or self.handshake.accepted:
            await super().handle(event)
        elif not self._answers:
            self.closed = True  # first: two answers to one request would be the end of the connection's state
            self._life.cancel()
            await self._send_error_response(400)
            await self.send(StreamClosed(stream_id=self.stream_id))

    async def spawn_app(self, app: Any, config: Any, scope: Any, send: Any) -> Callable[[Any], Awaitable[None]]:
        """Start the handler and return what takes the client's messages. Hypercorn would put a queue between them."""
        connection = WebsocketConnection(app.app, scope)
        self._exchange = connection.exchange
        Transport.of(scope).stays_busy()
        self._spawn(self._serve, connection, send)

        async def take(event: Any) -> None:
            if event["type"] == "websocket.receive":
                await connection.put(event)
            elif event["type"] == "websocket.disconnect":
                self._life.cancel()

        return take

    async def _serve(self, connection: WebsocketConnection, send: Send) -> None:
        try:
            await connection.serve(self._life, send)
        except* Exception as errors:
            logger.error("a WebSocket failed", exc_info=errors)  # noqa: TRY400  # the same, said of the whole group
        finally:
            await send(None)  # noqa: ASYNC102  # its writes have deadlines of their own

    async def app_send(self, message: ASGISendEvent | None) -> None:
        """Send what the application says; without effect, but not without yielding, once the connection is closed."""
        await trio.lowlevel.checkpoint_if_cancelled()  # B: writing is not interrupted
        self._answers = self._answers or message is not None
        transport = Transport.of(self.scope)
        writes = transport.writes
        await super().app_send(message)
        if transport.writes == writes:
            await trio.lowlevel.checkpoint()

    async def _send_wsproto_event(self, event: WsEvent) -> None:
        if isinstance(event, CloseConnection) and self.connection.state is ConnectionState.REMOTE_CLOSING:
            Transport.of(self.scope).said_goodbye = True
            if self._exchange is not None:
                self._exchange.ended = self._exchange.closed_by_client = True
                self._exchange.close_code = event.code
        await super()._send_wsproto_event(event)

    async def _accept(self, message: Any) -> None:
        self.handshake.extensions = None
        await super()._accept(message)
        Transport.of(self.scope).farewell = self._farewell

    def _farewell(self) -> bytes:
        try:
            return self.connection.send(CloseConnection(code=CLOSE_TOO_SLOW, reason="reading too slowly"))
        except LocalProtocolError:  # it is being closed already
            return b""

    async def _handle_events(self) -> None:
        await super()._handle_events()
        if self.buffer.length > self.buffer.max_length:
            await self.send(StreamClosed(stream_id=self.stream_id))


async def hold_websocket(
    stay: Stay, session: Callable[[], Awaitable[None]], last_words: Callable[[NoidError], str]
) -> None:
    """Run *session* on the current WebSocket, then close it, saying why: D and E.

    A `NoidError` is answered with ``last_words(error)`` and code 1000; any other error is logged and answered as
    internal with 1011; when *stay* is over the session is cancelled and answered with its reason. When the client is
    gone the session is cancelled and nobody is answered.
    """
    code, reason = CLOSE_NORMAL, ""
    error: NoidError | None = None
    is_whole = False
    with stay.interruptible():
        try:
            await session()
            is_whole = True
        except NoidError as noid_error:
            error = noid_error
        except Exception:
            logger.exception("WebSocket session failed")
            code, reason = CLOSE_INTERNAL_ERROR, "internal error"
            error = NoidError("internal error. The server's log says more.")
    if not is_whole and (end := stay.over) is not None:
        code, reason, error = end.code, end.reason, end.error

    if error is not None:
        await websocket.send(last_words(error))
    await websocket.close(code, reason)
