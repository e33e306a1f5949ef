"""Runs one command in a guest over a WebSocket: output as it comes, input as it is typed, one result.

One thread, one ``select``, no event loop: a command that runs for a millisecond shall not wait 100 ms for a concurrency
framework to be imported (trio and trio-websocket: 110 ms; wsproto, which is all that is needed of them: 17 ms). Both
directions make progress independently, so a guest that writes without reading its input cannot lock up against us.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable

from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Event, Ping, TextMessage
from wsproto.utilities import ProtocolError

from noid.client import transport
from noid.client.api import refusal
from noid.client.errors import ConnectionFailed, ConnectionLost, ServerError
from noid.client.settings import Endpoint
from noid.core import wire
from noid.core.model import ExecRequest
from noid.errors import DependencyDown

RESULT_GRACE_SECS = 10.0
"""How much later than the request's own limit the result may come, before we stop believing in a server-side limit."""
UNSENT_BYTES_MAX = 4 * wire.CHUNK_BYTES
TEXT_CHARACTERS_MAX = 1 << 20


def run(
    endpoint: Endpoint,
    name: str,
    request: ExecRequest,
    *,
    on_output: Callable[[int, bytes], None],
    stdin_fd: int | None = None,
) -> wire.ExecResult:
    """Run *request* on the VM *name*, calling *on_output* with channel (1 stdout, 2 stderr) and bytes as they arrive.

    *stdin_fd* is forwarded until its end if the request says ``stdin``. Whatever ends this early, an exception from
    *on_output* or KeyboardInterrupt included, closes the connection, and the agent then ends the process.

    Raises:
        ConnectionFailed: nothing was run.
        ServerError: the agent refused, or could not run it.
        ConnectionLost: the connection to the agent, or the agent's to the guest, ended before the result.
    """
    sock, leftover = _open(endpoint, name)
    try:
        return _Exchange(sock, leftover, endpoint, request, on_output, stdin_fd).run()
    finally:
        sock.close()


def _open(endpoint: Endpoint, name: str) -> tuple[socket.socket, bytes]:
    upgraded = transport.upgrade(endpoint, f"/v1/vms/{name}/exec")
    if isinstance(upgraded, transport.Reply):
        if 200 <= upgraded.status < 300:
            raise ConnectionFailed(f"{endpoint.address} ignored the wish for a WebSocket. Is there a proxy in between?")
        raise refusal(endpoint, upgraded)
    return upgraded


class _Exchange:
    """The state of one exec: what is still to be sent, what has been understood."""

    def __init__(
        self,
        sock: socket.socket,
        leftover: bytes,
        endpoint: Endpoint,
        request: ExecRequest,
        on_output: Callable[[int, bytes], None],
        stdin_fd: int | None,
    ) -> None:
        self._sock = sock
        self._endpoint = endpoint
        self._on_output = on_output
        self._stdin_fd = stdin_fd if request.stdin else None
        self._ws = Connection(ConnectionType.CLIENT, trailing_data=leftover)
        self._unsent = bytearray(self._ws.send(TextMessage(data=wire.request_to_json(request))))
        self._channel = 0  # of the binary message that is being received
        self._inside_message = False
        self._text: list[str] = []
        self._result: wire.ExecResult | None = None
        limit = request.timeout_secs
        self._deadline = None if limit is None else time.monotonic() + limit + RESULT_GRACE_SECS

    def run(self) -> wire.ExecResult:
        self._sock.setblocking(False)
        try:
            self._understand()  # what came with the handshake's answer
            while self._result is None:
                self._step()
        finally:
            self._say_goodbye()
        return self._result

    def _step(self) -> None:
        reading: list[socket.socket | int] = [self._sock]
        if self._stdin_fd is not None and len(self._unsent) < UNSENT_BYTES_MAX:
            reading.append(self._stdin_fd)
        writing = [self._sock] if self._unsent else []
        left = None if self._deadline is None else self._deadline - time.monotonic()
        if left is not None and left <= 0:
            self._result = wire.ExecResult(exit_code=None, timed_out=True)
            return
        # select, not poll or epoll: it takes regular files and terminals everywhere, and there are two descriptors.
        readable, writable, _ = select.select(reading, writing, [], left)
        if writable:
            self._send()
        if self._sock in readable:
            self._receive()
        if self._stdin_fd in readable and self._result is None:
            self._forward_input()

    def _send(self) -> None:
        try:
            sent = self._sock.send(memoryview(self._unsent)[: 2 * wire.CHUNK_BYTES])
        except OSError as error:
            if not _would_block(error):
                # The agent may have ended the exec before it read all input: what it said last is still to be read.
                self._unsent.clear()
                self._stdin_fd = None
            return
        del self._unsent[:sent]

    def _receive(self) -> None:
        try:
            # More than a TLS record holds: nothing that select cannot see stays behind inside the TLS layer.
            data = self._sock.recv(2 * wire.CHUNK_BYTES)
        except OSError as error:
            if _would_block(error):
                return
            raise self._lost(error.strerror or str(error)) from error
        if not data:
            raise self._lost("it closed the connection without a result")
        self._ws.receive_data(data)
        self._understand()

    def _understand(self) -> None:
        try:
            for event in self._ws.events():
                self._handle(event)
                if self._result is not None:
                    return
        except ProtocolError as error:
            raise self._lost(f"what it sent is no WebSocket: {error}") from error

    def _handle(self, event: Event) -> None:
        match event:
            case BytesMessage(data=data, message_finished=finished):
                chunk = bytes(data)
                if chunk and not self._inside_message:  # a large message comes in pieces, one channel byte before all
                    self._channel, chunk = wire.split_frame(chunk)
                    self._inside_message = True
                if chunk and self._channel in (wire.STDOUT, wire.STDERR):
                    self._on_output(self._channel, chunk)
                if finished:
                    self._inside_message = False
            case TextMessage(data=text, message_finished=finished):
                self._text.append(text)
                if sum(map(len, self._text)) > TEXT_CHARACTERS_MAX:
                    raise self._lost("it sent an endless message")
                if finished:
                    self._handle_text("".join(self._text))
                    self._text.clear()
            case Ping():
                self._unsent += self._ws.send(event.response())
            case CloseConnection(code=code, reason=reason):
                why = {1000: "", 1005: "", 1011: ": internal error", 1012: ": the agent is restarting"}.get(
                    code, f" ({code})"
                )
                raise self._lost(f"it ended the exec without a result{': ' + reason if reason else why}")

    def _handle_text(self, text: str) -> None:
        match wire.reply_from_json(text):
            case wire.ExecResult() as result:
                self._result = result
            case wire.ErrorResponse(error=error, code=DependencyDown.code):
                raise ConnectionLost(error)  # the agent stops, or it lost the guest: nobody knows how the command fares
            case wire.ErrorResponse(error=error, code=code):
                raise ServerError(error, status=0, code=code)

    def _forward_input(self) -> None:
        assert self._stdin_fd is not None  # noqa: S101  # the caller saw it in its set
        try:
            data = os.read(self._stdin_fd, wire.CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""  # a terminal that went away: the same to the guest as the end of the input
        self._unsent += self._ws.send(BytesMessage(data=wire.frame(wire.STDIN, data)))
        if not data:
            self._stdin_fd = None

    def _say_goodbye(self) -> None:
        """Close politely if that costs nothing. Closing the socket, which follows, says the same."""
        if self._unsent:
            return  # the middle of a frame is no place to say anything
        try:
            self._sock.send(self._ws.send(CloseConnection(code=1000)))
        except (OSError, ProtocolError):
            return  # it is gone already, which was the aim

    def _lost(self, detail: str) -> ConnectionLost:
        return ConnectionLost(
            f"{self._endpoint.address}: {detail}. The command may have ended or not; the VM is not affected."
        )


def _would_block(error: OSError) -> bool:
    if isinstance(error, (BlockingIOError, InterruptedError)):
        return True
    return type(error).__name__ in ("SSLWantReadError", "SSLWantWriteError")  # without importing ssl for plain sockets
