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
from dataclasses import dataclass, field
from urllib.parse import urlencode

from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Event, Ping, TextMessage
from wsproto.utilities import ProtocolError

from noid.client import transport
from noid.client.calls.call import Reply, refusal
from noid.client.errors import ConnectionFailed, ConnectionLost, ServerError
from noid.client.kept_input import KeptInput
from noid.client.settings import Endpoint
from noid.client.terminal import DetachKeys, Terminal
from noid.core import wire
from noid.core.model import ExecRequest, Gap
from noid.errors import DeadlineExceeded, DependencyDown, LineageEnded

RESULT_GRACE_SECS = 10.0
"""How much later than the request's own limit the result may come, before we stop believing in a server-side limit."""
REATTACH_SECS = 10.0
RETRY_SECS = 0.2
DETACH_SECS = 10.0
"""How long the agent may take to say that a process runs on without us."""
UNSENT_BYTES_MAX = 4 * wire.CHUNK_BYTES
TEXT_CHARACTERS_MAX = 1 << 20


@dataclass(slots=True, kw_only=True)
class Conversation:
    """What is known of one process across connections to it.

    Attributes:
        on_output: Called with channel (1 stdout, 2 stderr) and bytes as they arrive.
        on_gap: Called with how many bytes of output are missing where it is called.
        process: Which one it is, once the agent has said so.
        offset: That of the next byte of output.
        detached: Whether the user has left it on purpose.
        detach_keys: What of them has been typed, whichever connection there was.
    """

    on_output: Callable[[int, bytes], None]
    on_gap: Callable[[int], None] = lambda _: None
    stdin_fd: int | None = None
    terminal: Terminal | None = None
    process: wire.Started | None = None
    offset: int = 0
    input: KeptInput = field(default_factory=KeptInput)
    detached: bool = False
    detach_keys: DetachKeys = field(init=False)

    def __post_init__(self) -> None:
        self.detach_keys = DetachKeys(self.terminal.keys if self.terminal else b"")

    @property
    def can_resume(self) -> bool:
        """Whether another connection can go on where one was lost: not if input may have been lost with it.

        Keys that were lost are seen to be, and typed again.
        """
        return self.process is not None and (self.input.is_complete or self.terminal is not None)


def run(endpoint: Endpoint, name: str, request: ExecRequest, conversation: Conversation) -> wire.ExecResult | None:
    """Run *request* on the VM *name*. None when the user has detached from it.

    ``conversation.stdin_fd`` is forwarded until its end if the request says ``stdin``. A connection that is lost is
    made again for `REATTACH_SECS`, and nothing of input and output is lost or comes twice. Whatever else ends this
    early, an exception from *on_output* or KeyboardInterrupt included, closes the connection, and the agent then ends
    the process.

    Raises:
        ConnectionFailed: nothing was run.
        ServerError: the agent refused, or could not run it.
        ConnectionLost: the connection to the agent, or the agent's to the guest, ended before the result.
    """
    first = wire.request_to_json(request, resume=True)
    if not request.stdin and request.tty is None:
        conversation.stdin_fd = None
    limit = request.timeout_secs
    deadline = None if limit is None else time.monotonic() + limit + RESULT_GRACE_SECS
    try:
        return _converse(endpoint, f"/v1/vms/{name}/exec", conversation, first, deadline)
    except ConnectionLost as lost:
        return _resume(endpoint, name, conversation, deadline, lost)


def attach(
    endpoint: Endpoint, name: str, process: str, conversation: Conversation, *, from_start: bool
) -> wire.ExecResult | None:
    """Attach to a process of the VM *name*, as one of its readers. None when the user has detached from it.

    Raises:
        ConnectionFailed, ServerError, ConnectionLost: as `run`; the process is not affected.
    """
    wanted = {} if conversation.stdin_fd is not None else {"readonly": "1"}
    if from_start:
        wanted["offset"] = "0"
    query = f"?{urlencode(wanted)}" if wanted else ""
    return _converse(endpoint, f"/v1/vms/{name}/processes/{process}/attach{query}", conversation, None, None)


def _resume(
    endpoint: Endpoint, name: str, conversation: Conversation, deadline: float | None, lost: ConnectionLost
) -> wire.ExecResult | None:
    """Go on after a connection was lost, or raise that it was."""
    until = time.monotonic() + REATTACH_SECS
    while conversation.can_resume and time.monotonic() < until:
        assert conversation.process is not None  # noqa: S101  # what can_resume says
        query = urlencode({"offset": conversation.offset, "lineage": conversation.process.lineage, "resume": "1"})
        path = f"/v1/vms/{name}/processes/{conversation.process.process}/attach?{query}"
        before = conversation.process
        try:
            return _converse(endpoint, path, conversation, None, deadline)
        except ConnectionLost as again:
            lost = again
            if conversation.process is not before:  # it was attached: only what comes after that counts
                until = time.monotonic() + REATTACH_SECS
                if isinstance(again.__cause__, ServerError):
                    break  # the agent itself said that nobody knows
        except ConnectionFailed:
            pass  # the agent is not up yet
        except ServerError as error:
            if error.status not in (503, 504):
                raise ConnectionLost(f"{lost} Attaching to it again failed: {error}.") from error
        time.sleep(RETRY_SECS)
    raise lost


def _converse(
    endpoint: Endpoint, path: str, conversation: Conversation, first: str | None, deadline: float | None
) -> wire.ExecResult | None:
    sock, leftover = _open(endpoint, path)
    try:
        return _Exchange(sock, leftover, endpoint, conversation, first, deadline).run()
    finally:
        sock.close()


def _open(endpoint: Endpoint, path: str) -> tuple[socket.socket, bytes]:
    upgraded = transport.upgrade(endpoint, path)
    if isinstance(upgraded, Reply):
        if 200 <= upgraded.status < 300:
            raise ConnectionFailed(f"{endpoint.address} ignored the wish for a WebSocket. Is there a proxy in between?")
        raise refusal(endpoint.address, upgraded)
    return upgraded


class _Exchange:
    """The state of one connection: what is still to be sent, what has been understood."""

    def __init__(
        self,
        sock: socket.socket,
        leftover: bytes,
        endpoint: Endpoint,
        conversation: Conversation,
        first: str | None,
        deadline: float | None,
    ) -> None:
        self._sock = sock
        self._endpoint = endpoint
        self._conversation = conversation
        self._stdin_fd = conversation.stdin_fd
        # Where this goes on, the agent first says what of the input has arrived. A request is followed by it at once.
        self._may_type = first is not None or conversation.process is None
        self._end_sent = False
        self._ws = Connection(ConnectionType.CLIENT, trailing_data=leftover)
        self._unsent = bytearray(self._ws.send(TextMessage(data=first)) if first is not None else b"")
        self._channel = 0  # of the binary message that is being received
        self._inside_message = False
        self._text: list[str] = []
        self._result: wire.ExecResult | None = None
        self._deadline = deadline
        self._leave_by: float | None = None  # since the user wants to leave
        self._tell_size()

    def run(self) -> wire.ExecResult | None:
        self._sock.setblocking(False)
        try:
            self._understand()  # what came with the handshake's answer
            while self._result is None and not self._conversation.detached:
                self._step()
        finally:
            self._say_goodbye()
        return self._result

    def _step(self) -> None:
        reading: list[socket.socket | int] = [self._sock]
        self._send_input()
        kept = self._conversation.input
        if self._stdin_fd is not None and self._may_type and len(self._unsent) < UNSENT_BYTES_MAX and kept.has_room:
            reading.append(self._stdin_fd)
        terminal = self._conversation.terminal
        wakeup_fd = None if terminal is None else terminal.wakeup_fd
        if wakeup_fd is not None:
            reading.append(wakeup_fd)
        writing = [self._sock] if self._unsent else []
        left = None if self._deadline is None else self._deadline - time.monotonic()
        if left is not None and left <= 0:
            self._result = wire.ExecResult(exit_code=None, timed_out=True)
            return
        left = self._time_to_leave(left)
        # select, not poll or epoll: it takes regular files and terminals everywhere, and there are two descriptors.
        readable, writable, _ = select.select(reading, writing, [], left)
        if writable:
            self._send()
        if self._sock in readable:
            self._receive()
        if wakeup_fd is not None and wakeup_fd in readable:
            os.read(wakeup_fd, 4096)
            self._tell_size()
        if self._stdin_fd in readable and self._result is None:
            self._forward_input()

    def _time_to_leave(self, left: float | None) -> float | None:
        """Return for how long to wait at most, if that is *left* for another reason."""
        if self._leave_by is None:
            return left
        until = self._leave_by - time.monotonic()
        if until <= 0:
            raise ServerError(
                f"the agent did not say within {DETACH_SECS:g} s that the process runs on; what was typed before may "
                "not be read. Whether it does, `noid ps` says.",
                status=0,
                code=DeadlineExceeded.code,
            )
        return until if left is None else min(left, until)

    def _send(self) -> None:
        try:
            sent = self._sock.send(memoryview(self._unsent)[: 2 * wire.CHUNK_BYTES])
        except OSError as error:
            if not _would_block(error):
                # The agent may have ended the exec before it read all input: what it said last is still to be read.
                self._unsent.clear()
                self._stdin_fd = None
                self._may_type = False
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
                    self._conversation.offset += len(chunk)
                    self._conversation.on_output(self._channel, chunk)
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
            case wire.Started() as started:
                if self._may_type:
                    self._conversation.input.begin(told=started.stdin is not None)
                elif not self._conversation.input.resume(started.stdin) and self._conversation.terminal is None:
                    raise self._refused_input()
                self._conversation.process, self._conversation.offset = started, started.offset
                self._may_type = True
            case wire.InputArrived(end=end):
                self._conversation.input.arrived(end)
            case wire.Detached():
                self._conversation.detached = True
            case Gap(start=start, end=end):
                self._conversation.offset = end
                self._conversation.on_gap(end - start)
            case wire.ErrorResponse(error=error, code=DependencyDown.code | LineageEnded.code as code):
                # The agent stops, or it lost the guest, or the VM was put back: nobody knows how the command fares.
                raise ConnectionLost(error) from ServerError(error, status=0, code=code)
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
        if not data:
            self._conversation.input.add(b"")
            self._stdin_fd = self._conversation.stdin_fd = None
            return
        typed, leaving = self._conversation.detach_keys.feed(data)
        if typed:
            self._conversation.input.add(typed)
        if leaving:
            self._send_input()  # what was typed before comes before
            self._stdin_fd, self._leave_by = None, time.monotonic() + DETACH_SECS
            self._unsent += self._ws.send(TextMessage(data=wire.DETACH))

    def _send_input(self) -> None:
        """Send of the input what this connection has not been given, as far as there is room."""
        kept = self._conversation.input
        while self._may_type and len(self._unsent) < UNSENT_BYTES_MAX and (data := kept.take(wire.CHUNK_BYTES)):
            self._unsent += self._ws.send(BytesMessage(data=wire.frame(wire.STDIN, data)))
        if self._may_type and kept.ended and not self._end_sent and kept.sent == kept.end:
            self._end_sent = True
            self._unsent += self._ws.send(BytesMessage(data=wire.frame(wire.STDIN, b"")))

    def _refused_input(self) -> ConnectionLost:
        return self._lost("it is attached again, but input between the connections is lost, or others gave some too")

    def _tell_size(self) -> None:
        if self._conversation.terminal is not None:
            self._unsent += self._ws.send(BytesMessage(data=wire.resize_frame(*self._conversation.terminal.size())))

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
