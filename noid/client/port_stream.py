"""A TCP connection to a port of a guest, over a WebSocket of its own: bytes both ways, each way with its own end.

Whoever is at either end must not take a break for an end, so both are told apart here too: see `noid.server.ports`.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from collections.abc import Sequence
from typing import Protocol

from noid.client.calls.call import with_query
from noid.client.channels import Closed, Message
from noid.client.connecting import would_block
from noid.client.errors import ServerError
from noid.client.link import Link
from noid.client.waiting import Source, Turns
from noid.client.websocket import WebSocket
from noid.core import wire
from noid.core.model.connections import LOCALHOST

HELD_BYTES_MAX = 256 << 10
_READ_BYTES = 60 << 10  # a little less than two frames of the guest's channel, with what that adds: never a tiny third
_RESET = struct.pack("ii", 1, 0)
_KEPT = struct.pack("ii", 0, 0)


class PortStream:
    """An open one. Close it, whatever happens: before both directions have ended, that resets it in the guest.

    Attributes:
        received: What has come and nobody has taken yet; who takes it takes it away.
        has_ended: Whether the guest's side has said that no more comes, after `received`.
        failure: Why it broke, after `received`.
        is_over: Whether both directions have ended, which the agent has confirmed.
    """

    def __init__(self, ws: WebSocket) -> None:
        self.received = bytearray()
        self.has_ended = False
        self.failure: ServerError | None = None
        self.is_over = False
        self._ws = ws
        self._sends = True

    @classmethod
    async def open(
        cls, link: Link, name: str, port: int, host: str = LOCALHOST, *, turns: Turns | None = None
    ) -> PortStream:
        """Connect to *port* of the VM *name*, from inside its guest; *host* is an IP address that the guest reaches.

        Where several tasks share it, each takes one of *turns* for a `step`.

        Raises:
            ConnectionFailed: there is no agent.
            ServerError: nothing listens there (502), or there is no such VM, or it does not run.
        """
        path = with_query(f"/v1/vms/{name}/ports/{port}", host=None if host == LOCALHOST else host)
        fate = "The connection to the guest's port is lost with it; the VM is not affected."
        return cls(await WebSocket.open(link, path, fate=fate, turns=turns, plain=True))

    @property
    def has_room(self) -> bool:
        """Whether more should be sent now."""
        return self._ws.channels.has_room

    def send(self, data: bytes) -> None:
        """Send *data*, which goes as the next steps are made."""
        if data:
            self._ws.channels.send(0, data)

    def send_eof(self) -> None:
        """Say that no more is sent. Twice does nothing."""
        if self._sends:
            self._sends = False
            self._ws.channels.send(0, b"")

    @property
    def has_unsent(self) -> bool:
        """Whether something is not on its way yet."""
        return bool(self._ws.channels.unsent)

    def flush(self) -> None:
        """Send what can be sent at once."""
        self._ws.flush()

    async def step(
        self, readers: Sequence[Source] = (), *, writers: Sequence[Source] = (), listening: bool = True
    ) -> Sequence[Source]:
        """Send and receive what can be, as `WebSocket.step`, and return those of *readers* that have something.

        Raises:
            ConnectionLost: the agent is gone.
        """
        messages, ready = await self._ws.step(readers, writers=writers, listening=listening)
        for message in messages:
            self._hear(message)
        return ready

    def close(self) -> None:
        """Hang up."""
        self._ws.close()

    def _hear(self, message: Message) -> None:
        match message:
            case Closed():
                self.is_over = self.has_ended and not self._sends
                if not self.is_over and self.failure is None:
                    raise self._ws.lost("it ended the connection without saying why")
            case str():
                reply = wire.reply_from_json(message)
                if isinstance(reply, wire.ErrorResponse):
                    self.failure = ServerError(reply.error, status=0, code=reply.code)
            case (_, b""):
                self.has_ended = True
            case (_, data):
                self.received += data


# --- this machine's end ----------------------------------------------------------------------------------------------


class LocalGone(OSError):
    """Whoever is at this end has broken the connection off."""


class LocalEnd(Protocol):
    """This machine's end of a connection, to be relayed. Nothing here waits.

    *input* is where to wait for what `receive` returns, *output* until `send` takes something.
    """

    input: Source
    output: Source

    def receive(self) -> bytes | None:
        """Return what has come, nothing at its end, None if there is nothing yet.

        Raises:
            LocalGone: it is broken.
        """
        ...

    def send(self, data: memoryview) -> int:
        """Take as much of *data* as there is room for, and return how much that is.

        Raises:
            LocalGone: nobody is there any more.
        """
        ...

    def end(self) -> None:
        """Say that no more comes."""
        ...


class SocketEnd:
    """A connection that was accepted here. Closed before `finish`, it is reset."""

    def __init__(self, sock: socket.socket) -> None:
        self.input: Source = sock
        self.output: Source = sock
        self._socket = sock
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)

    def receive(self) -> bytes | None:
        """Return what has come, nothing at its end, None if there is nothing yet."""
        try:
            return self._socket.recv(_READ_BYTES)
        except OSError as error:
            if would_block(error):
                return None
            raise LocalGone(*error.args) from error

    def send(self, data: memoryview) -> int:
        """Take as much of *data* as there is room for."""
        try:
            return self._socket.send(data)
        except OSError as error:
            if would_block(error):
                return 0
            raise LocalGone(*error.args) from error

    def end(self) -> None:
        """Say that no more comes."""
        with contextlib.suppress(OSError):  # it is gone, which reading finds out
            self._socket.shutdown(socket.SHUT_WR)

    def finish(self) -> None:
        """Both directions have ended in order: closing it shall not reset it."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _KEPT)


class PipeEnd:
    """Two descriptors, standard input and output for example, as they were given: blocking or not."""

    def __init__(self, input_fd: int, output_fd: int) -> None:
        self.input: Source = input_fd
        self.output: Source = output_fd
        self._input_fd, self._output_fd = input_fd, output_fd
        self._room = select.poll()
        self._room.register(output_fd, select.POLLOUT)

    def receive(self) -> bytes | None:
        """Return what has come, nothing at its end, None if there is nothing yet. Called once there is something."""
        try:
            return os.read(self._input_fd, _READ_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            raise LocalGone(*error.args) from error

    def send(self, data: memoryview) -> int:
        """Take a piece of *data* that a pipe with room for anything has room for."""
        if not self._room.poll(0):
            return 0
        try:
            return os.write(self._output_fd, data[: select.PIPE_BUF])
        except BlockingIOError:
            return 0
        except OSError as error:
            raise LocalGone(*error.args) from error

    def end(self) -> None:
        """Say that no more comes: close the output, whose number stays taken."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._output_fd)
        os.close(nowhere)


async def relay(link: Link, stream: PortStream, local: LocalEnd) -> None:
    """Carry bytes between the guest and *local* until both directions have ended in order.

    A direction that ends leaves the other open. A side that does not take what comes holds the other back.

    Raises:
        ServerError: the connection broke in the guest, or has to end; says why.
        ConnectionLost: the agent is gone.
        LocalGone: this end broke.
    """
    sends, told = True, False
    while not (stream.is_over and told):
        readers = [local.input] if sends and stream.has_room else []
        writers = [local.output] if stream.received else []
        if stream.is_over:
            await link.waiting.until_ready((), writers, None)
        else:
            listening = len(stream.received) < HELD_BYTES_MAX and stream.failure is None
            ready = await stream.step(readers, writers=writers, listening=listening)
            if ready and (data := local.receive()) is not None:
                sends = bool(data)
                stream.send(data) if data else stream.send_eof()
        _deliver(stream, local)
        if stream.received:
            continue
        if stream.failure is not None:
            raise stream.failure
        if stream.has_ended and not told:
            told = True
            local.end()


def _deliver(stream: PortStream, local: LocalEnd) -> None:
    while stream.received:
        with memoryview(stream.received) as whole, whole[:_READ_BYTES] as beginning:  # a view left over forbids `del`
            size = local.send(beginning)
        if not size:
            return
        del stream.received[:size]
