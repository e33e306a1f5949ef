"""Hypercorn and Quart-Trio, made fit to stand in the open. The only module that knows their private seams.

Each item carries a letter, and so does its test in ``tests/server/test_hardening.py``. The pins in pyproject are exact
because of this file: after changing them, these tests decide.

====  ==============================================================  ================================================
      what the libraries do                                           what happens here
====  ==============================================================  ================================================
A     a response cancels its own connection's bookkeeping: keep-alive  the last message of a response is shielded
      never times out, ``Connection: close`` never closes
B     a client that does not read blocks a write, and shutdown, for    each piece of a write has a deadline, and all of
      ever                                                             them together have one once the server stops
C     a client that leaves cancels its handler                         intended: handlers only wait, operations live in
                                                                       the agent
D     at shutdown WebSockets are dropped without a close frame         `hold_websocket` says 1012
E     a handler's exception closes with 1000, "normal"                 `hold_websocket` says 1011
F     an empty binary message arrives as None                          it arrives as ``b""``
G     a message over the limit leaves connection and handler running   the connection is closed after 1009
H     permessage-deflate cannot be switched off; 58 KB unpack to GB    never negotiated
I     pings are sent, pongs never checked                              off; TCP keepalive finds dead peers
J     queues of 10 + 10 messages per WebSocket; while they are full    2 + 0 messages; `Transport.is_gone` asks the
      nothing notices that the client is gone                          socket itself
K     responses are cut after 60 s without an error                    no such limit; B bounds slow readers
L     a unix socket is taken from whoever serves it; peers unknown     `noid.server.listening` binds; peers' uids are in
                                                                       the request's scope
M     listening sockets are inherited by every child                   never: `noid.server.listening`
N     HTTP/2 in plain text cannot be switched off                      ignored; other versions than HTTP/1 get 505
R     closing with unread input resets the connection, and the answer  the connection lingers: EOF first, then input is
      (a 413, an exit code) may be lost                                discarded for a moment
S     sending on a closed connection never yields: a handler that     a send that wrote nothing yields, and every send
      only sends starves the whole server                             can be cancelled
U     a request's body is kept until somebody reads it, however    a PUT's body is a stream: `upload` reads it, and what
      large                                                           nobody reads is not taken from the socket
V     a response that fails in its middle is logged as a bug          `BrokenOff` ends the connection, with no end mark
T     a target without a path, `GET ?x`, is an IndexError in the log  400
====  ==============================================================  ================================================
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

import h11
import hypercorn.protocol
import hypercorn.protocol.h11
import hypercorn.trio.run
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol.events import StreamClosed
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.ws_stream import WSStream
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import TrioSingleTask
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, ASGISendEvent
from quart import Request, request, websocket
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection, TrioASGIWebsocketConnection
from wsproto.connection import ConnectionState
from wsproto.events import CloseConnection
from wsproto.events import Event as WsEvent

from noid.core.wire import API_VERSION, API_VERSION_HEADER
from noid.errors import DeadlineExceeded, DependencyDown, NoidError

logger = logging.getLogger(__name__)

MESSAGE_BYTES_MAX = 1 << 20
WRITE_PIECE_BYTES = 1 << 16
LET_GO_SECS = 5.0
CLOSE_NORMAL = 1000
CLOSE_INTERNAL_ERROR = 1011
CLOSE_RESTARTING = 1012

_STATE_KEY = "noid.transport"
_UPLOAD_KEY = "noid.upload"
_PEER_CREDENTIALS = struct.Struct("3i")


class Settings(Config):
    """Hypercorn's configuration as noid runs it; every value here is a limit or switches something off."""

    write_timeout_secs: float = 10.0  # for WRITE_PIECE_BYTES: slower readers than 6.5 kB/s are dropped
    linger_secs: float = 2.0

    accesslog = None
    errorlog = logging.getLogger("noid.server.hypercorn")
    alpn_protocols = ["http/1.1"]  # noqa: RUF012  # hypercorn's own declaration is this class attribute
    backlog = 1024
    graceful_timeout = 10.0
    h11_max_incomplete_size = 32 * 1024
    include_server_header = False
    keep_alive_max_requests = 1_000_000
    keep_alive_timeout = 5.0
    max_app_queue_size = 2
    websocket_max_message_size = MESSAGE_BYTES_MAX
    websocket_ping_interval = None

    def response_headers(self, protocol: str) -> list[tuple[bytes, bytes]]:
        """Return what every response carries, also those hypercorn makes on its own."""
        version = (API_VERSION_HEADER.lower().encode(), str(API_VERSION).encode())
        return [*super().response_headers(protocol), version]


class Transport:
    """The connection under a request: whose it is, whether it still exists, and a way to keep it from going silent."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._socket = sock
        self.protocol: Http1Protocol | None = None
        self.said_goodbye = False
        """Whether the client of a WebSocket has sent a close frame: it left on purpose, and was not lost."""
        self.peer_uid: int | None = None
        """The uid at the other end of a unix socket when it connected; None for TCP."""
        self.writes = 0
        """How many pieces the socket has taken; giving it one yields."""
        if sock.family == socket.AF_UNIX:
            raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
            _, self.peer_uid, _ = _PEER_CREDENTIALS.unpack(raw)

    @classmethod
    def of(cls, scope: Mapping[str, Any]) -> Transport:
        """Return the transport of an ASGI *scope*."""
        transport = scope["state"][_STATE_KEY]
        assert isinstance(transport, cls)  # noqa: S101  # TcpServer put it there
        return transport

    def is_gone(self) -> bool:
        """Whether the peer has closed its side. True also while input is unread, which reading would not find out."""
        fd = self._socket.fileno()
        if fd < 0:
            return True
        poller = select.poll()
        poller.register(fd, select.POLLRDHUP)
        return bool(poller.poll(0))

    async def say_still_working(self) -> None:
        """Send ``100 Continue``, which every HTTP/1.1 client must skip, so that its read timeout starts anew."""
        if self.protocol is not None:
            await self.protocol.send_interim()


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


class WebsocketConnection(TrioASGIWebsocketConnection):
    """F: an empty message is a message. J: one message waits here, not ten."""

    def __init__(self, app: QuartTrio, scope: Any) -> None:
        super().__init__(app, scope)
        self.send_channel, self.receive_channel = trio.open_memory_channel[str | bytes](0)

    async def handle_messages(  # type: ignore[override]  # quart-trio changes the signature of quart's method as well
        self, nursery: trio.Nursery, receive: ASGIReceiveCallable
    ) -> None:
        """Hand messages to the handler until the client is gone; then cancel it."""
        while (event := await receive())["type"] != "websocket.disconnect":
            if event["type"] == "websocket.receive":
                data, text = event.get("bytes"), event.get("text")
                await self.send_channel.send(data if data is not None else text or "")
        nursery.cancel_scope.cancel()


class App(QuartTrio):
    """A Quart application with the connections above."""

    asgi_http_class = HttpConnection
    asgi_websocket_class = WebsocketConnection


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


class Http1Protocol(H11Protocol):
    """N and T: HTTP/1.0 and 1.1 and nothing else, and only for something that has a path."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        transport = self.connection_state.get(_STATE_KEY)
        if transport is not None:
            transport.protocol = self

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


class TcpServer(TCPServer):
    """One connection. B: bounded writes. I: keepalive. L: peer credentials. R: lingering close."""

    config: Settings

    def __init__(self, app: Any, config: Settings, context: Any, state: Any, stream: Any) -> None:
        sock = getattr(stream, "transport_stream", stream).socket
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
        self._transport = Transport(sock)
        super().__init__(app, config, context, type(state)({**state, _STATE_KEY: self._transport}), stream)
        self._linger_task = TrioSingleTask()
        self._lingering = False
        self._final_deadline: float | None = None

    async def protocol_send(self, event: Event) -> None:
        """Do what the protocol asks of the connection."""
        if isinstance(event, RawData):
            await self._write(event.data)
        elif isinstance(event, Closed) and not self.context.terminated.is_set():
            await self._begin_to_close()
        else:
            await super().protocol_send(event)

    async def _write(self, data: bytes) -> None:
        """Send *data* whole or end the connection. Not interruptible, because half a frame garbles all that follow."""
        rest = memoryview(data)
        if self.send_lock.locked():
            await self.send_lock.acquire()
        else:
            self.send_lock.acquire_nowait()  # without yielding, which the sending does
        try:
            while rest:
                with trio.move_on_at(self._write_deadline(), shield=True) as scope:
                    await self.stream.send_all(rest[:WRITE_PIECE_BYTES])
                if scope.cancelled_caught:
                    logger.info("dropped a client that did not read for %g s", self.config.write_timeout_secs)
                    await trio.aclose_forcefully(self.stream)
                    break
                self._transport.writes += 1
                rest = rest[WRITE_PIECE_BYTES:]
            else:
                return
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the peer has gone; the protocol hears it below, as when reading had found out
        finally:
            self.send_lock.release()
        await self.protocol.handle(Closed())

    def _write_deadline(self) -> float:
        deadline = trio.current_time() + self.config.write_timeout_secs
        if self.context.terminated.is_set():
            self._final_deadline = self._final_deadline or deadline
            return min(deadline, self._final_deadline)
        return deadline

    async def _begin_to_close(self) -> None:
        """Tell the peer that nothing follows, and discard what it still sends until it closes or the time is up."""
        if self._lingering:
            return
        self._lingering = True
        async with self.send_lock:
            with contextlib.suppress(AttributeError, trio.BrokenResourceError, trio.ClosedResourceError):
                await self.stream.send_eof()  # a TLS stream has none
        await self.protocol.handle(Closed())
        await self._linger_task.restart(self._task_group, self._linger)

    async def _linger(self) -> None:
        with trio.move_on_after(self.config.linger_secs):
            await self.context.terminated.wait()
        await trio.aclose_forcefully(self.stream)

    async def _read_data(self) -> None:
        await super()._read_data()
        await self._linger_task.stop()


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


# worker_serve, ProtocolWrapper and H11Protocol look these names up in their modules when a connection arrives.
for _module, _name, _ours in (
    (hypercorn.trio.run, "TCPServer", TcpServer),
    (hypercorn.protocol, "H11Protocol", Http1Protocol),
    (hypercorn.protocol.h11, "WSStream", WebsocketStream),
):
    assert issubclass(_ours, getattr(_module, _name))  # noqa: S101  # the seam is where it was in the pinned release
    setattr(_module, _name, _ours)
