"""One connection, TCP or unix: bounded writes, a close that loses nothing, and who is at the other end."""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio
from hypercorn.events import Closed, Event, RawData
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import EventWrapper, TrioSingleTask
from hypercorn.typing import TaskGroup

from noid.server.hardening.settings import Settings

logger = logging.getLogger(__name__)

WRITE_PIECE_BYTES = 1 << 16
RECEIVE_BYTES = 1 << 16
LAST_WORDS_SECS = 1.0

STATE_KEY = "noid.transport"
_PEER_CREDENTIALS = struct.Struct("3i")


def no_farewell() -> bytes:
    """Return nothing: what is not a WebSocket just ends."""
    return b""


class Transport:
    """The connection under a request: whose it is, whether it still exists, and a way to keep it from going silent."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._socket = sock
        self.say_interim: Callable[[], Awaitable[None]] | None = None
        self.stays_busy: Callable[[], None] = lambda: None
        """Says that nothing but this will ever be asked on the connection: nobody needs to watch whether it idles."""
        self.farewell: Callable[[], bytes] = no_farewell
        """Makes the frame that closes a WebSocket whose client reads too slowly."""
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
        transport = scope["state"][STATE_KEY]
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
        if self.say_interim is not None:
            await self.say_interim()


class IdleWatch:
    """W: tells when a connection has been idle for *limit_secs*, or is idle when *terminated* is set.

    In place of hypercorn's `TrioSingleTask`, with the same methods. Between two requests nothing is started or ended,
    and a connection that stays busy, as a WebSocket does, is not watched at all.
    """

    def __init__(self, limit_secs: float, terminated: EventWrapper) -> None:
        self._limit_secs = limit_secs
        self._terminated = terminated
        self._idle_since: float | None = None
        self._life: trio.CancelScope | None = None

    async def restart(self, task_group: TaskGroup, action: Callable[[], Awaitable[None]]) -> None:
        """Say that the connection is idle from now on. Starts *action*, which awaits `over`, unless it runs."""
        self._idle_since = trio.current_time()
        if self._life is None:
            self._life = trio.CancelScope()
            task_group.spawn(self._run, self._life, action)

    async def stop(self) -> None:
        """Say that the connection is busy."""
        self._idle_since = None

    def end(self) -> None:
        """End *action*: the connection ends by itself."""
        if self._life is not None:
            self._life.cancel()

    async def over(self) -> bool:
        """Return whether the connection is to be closed, once that is known; it is not while it is busy."""
        while self._idle_since is not None:
            with trio.move_on_at(self._idle_since + self._limit_secs):
                await self._terminated.wait()
            if self._idle_since is not None and (
                self._terminated.is_set() or trio.current_time() >= self._idle_since + self._limit_secs
            ):
                return True
        return False

    async def _run(self, life: trio.CancelScope, action: Callable[[], Awaitable[None]]) -> None:
        try:
            with life:
                await action()
        finally:
            self._life = None


class TcpServer(TCPServer):
    """One connection. B and Z: bounded writes. I: keepalive. R: lingering. W: an idle watch. X: number. Y: TLS."""

    config: Settings

    def __init__(self, app: Any, config: Settings, context: Any, state: Any, stream: Any) -> None:
        sock = stream.socket
        self._plain: trio.SocketStream = stream
        context_of_tls = None if sock.family == socket.AF_UNIX else config.tls
        self._is_secure = context_of_tls is not None
        if context_of_tls is not None:
            stream = trio.SSLStream(stream, context_of_tls, server_side=True)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
        self._transport = Transport(sock)
        super().__init__(app, config, context, type(state)({**state, STATE_KEY: self._transport}), stream)
        self._linger_task = TrioSingleTask()
        self._idle = IdleWatch(config.keep_alive_timeout, context.terminated)
        self._transport.stays_busy = self._idle.end
        self.idle_task = self._idle  # type: ignore[assignment]  # the same methods
        self._lingering = False
        self._final_deadline: float | None = None
        self._rest: trio.socket.SocketType | None = None
        self._reader: trio.lowlevel.Task | None = None
        self._all_read = trio.Event()

    async def run(self) -> None:
        """Serve the connection, unless it is one too many. What goes wrong with one does not end the others."""
        try:
            await self._admit()
        except Exception:  # nobody above expects any: it would end the server
            logger.exception("a connection failed")

    async def _admit(self) -> None:
        sock, connections = self._plain.socket, self.config.connections
        if sock.family == socket.AF_UNIX:
            await super().run()
            return
        try:
            address = str(sock.getpeername()[0])
        except OSError:  # it has gone already
            return
        if not connections.take(address):
            if not self._is_secure:  # to say it through TLS would cost a handshake
                await connections.refuse(self._plain, self.config.linger_secs)
            return
        try:
            await super().run()
            if self._rest is not None:
                await self._discard(self._rest)
        finally:
            connections.give_back(address)
            if self._rest is not None:
                self._rest.close()

    async def protocol_send(self, event: Event) -> None:
        """Do what the protocol asks of the connection."""
        if isinstance(event, RawData):
            await self._write(event.data)
        elif isinstance(event, Closed) and not self.context.terminated.is_set():
            await self._begin_to_close()
        else:
            await super().protocol_send(event)

    async def _write(self, data: bytes) -> None:
        """Send *data* whole or end the connection. Not interruptible, because half a frame garbles all that follow.

        A WebSocket's client that was too slow and then takes the rest is told so: a close frame cannot come earlier
        than the end of the frame before it.
        """
        rest = memoryview(data)
        late: float | None = None  # it was too slow: until when it may take the rest
        is_gone = False
        if self.send_lock.locked():
            await self.send_lock.acquire()
        else:
            self.send_lock.acquire_nowait()  # without yielding, which the sending does
        try:
            while rest:
                due = self._write_deadline()
                last = late or due + self._farewell_secs()
                with trio.move_on_at(last, shield=True) as scope:
                    await self.stream.send_all(rest[:WRITE_PIECE_BYTES])
                if scope.cancelled_caught:
                    self._note_slowness()
                    await trio.aclose_forcefully(self.stream)
                    break
                self._transport.writes += 1
                rest = rest[WRITE_PIECE_BYTES:]
                if late is None and trio.current_time() > due:
                    late = last
            else:
                if late is None:
                    return
                self._note_slowness()
                with trio.move_on_at(late, shield=True):
                    await self.stream.send_all(self._transport.farewell())
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            late = None  # the peer has gone; the protocol hears it below, as when reading had found out
            is_gone = True
        finally:
            self.send_lock.release()
        if is_gone and trio.lowlevel.current_task() is not self._reader:
            # It may have said its last and left in one go: what it has sent counts, so reading shall find out first.
            with trio.move_on_after(LAST_WORDS_SECS, shield=True):
                await self._all_read.wait()
        if late is None or rest:
            await self.protocol.handle(Closed())
        else:
            await self._begin_to_close()

    def _farewell_secs(self) -> float:
        if self._transport.farewell is no_farewell or self.context.terminated.is_set():
            return 0.0
        return self.config.farewell_secs

    def _note_slowness(self) -> None:
        logger.info("dropped a client that did not read for %g s", self.config.write_timeout_secs)

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
            if self._is_secure:
                await self._end_tls(self.stream)
            else:
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await self._plain.send_eof()
        await self.protocol.handle(Closed())
        if self._rest is None:
            await self._linger_task.restart(self._task_group, self._linger)

    async def _linger(self) -> None:
        with trio.move_on_after(self.config.linger_secs):
            await self.context.terminated.wait()
        await trio.aclose_forcefully(self.stream)

    async def _end_tls(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        """Say that nothing follows, and end TLS; the connection itself stays as long as there is another name for it.

        What the peer still sends cannot be read through TLS then, and need not be: `run` discards it.
        """
        with contextlib.suppress(OSError):  # it has gone
            self._rest = self._plain.socket.dup()
        with trio.move_on_after(self.config.linger_secs, shield=True):
            await stream.aclose()

    async def _discard(self, rest: trio.socket.SocketType) -> None:
        with contextlib.suppress(OSError), trio.move_on_after(self.config.linger_secs):
            rest.shutdown(socket.SHUT_WR)
            while await rest.recv(1 << 16):
                pass

    async def _close(self) -> None:
        with trio.move_on_after(self.config.linger_secs, shield=True):  # Y: a TLS stream says goodbye first
            await super()._close()

    async def _initiate_server_close(self) -> None:
        with trio.move_on_after(self.config.linger_secs, shield=True):  # the same
            await super()._initiate_server_close()

    async def _idle_timeout(self) -> None:
        if await self._idle.over():
            await self._initiate_server_close()

    async def _read_data(self) -> None:
        """Hand the protocol what comes, until nothing does. No deadline: `IdleWatch` ends what is silent for long."""
        data: bytes | bytearray | None = None
        self._reader = trio.lowlevel.current_task()
        try:
            while data != b"":
                try:
                    data = await self.stream.receive_some(RECEIVE_BYTES)
                except (trio.ClosedResourceError, trio.BrokenResourceError):
                    break
                await self.protocol.handle(RawData(bytes(data)))
            await self.protocol.handle(Closed())
        finally:
            self._all_read.set()
        await self._linger_task.stop()
        self._idle.end()
