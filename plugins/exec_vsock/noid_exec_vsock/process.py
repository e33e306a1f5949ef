"""One process in a guest, as its reader sees it: bounded queues in front of the channel's one reader task.

The host grants credit per stream and gives it back as output is received, so a reader that stalls holds at most
`OUTPUT_WINDOW_BYTES` of each stream here, stops its own process, and nobody else.
"""

from __future__ import annotations

import signal
from collections import deque
from typing import Protocol

import trio

from noid.core.model import OutputChunk, ProcessExit, TerminalSize, Usage
from noid.errors import Conflict, InvalidRequest, NoidError
from noid_exec_vsock.frames import CHUNK_BYTES_MAX, Message, ProtocolError, credit_body

OUTPUT_WINDOW_BYTES = 256 * 1024
_RETURN_CREDIT_AT = OUTPUT_WINDOW_BYTES // 4
_STDIN_CREDIT_MAX = 1 << 20
_QUEUED_CHUNKS_MAX = 256
_SIGNAL_MAX = 64


class Sender(Protocol):
    """What a process needs of its connection."""

    def post(self, kind: Message, number: int, body: bytes = b"") -> None:
        """Queue a control message. Never waits; does nothing once the connection has failed."""
        ...

    def post_bulk(self, kind: Message, number: int, body: bytes = b"") -> None:
        """Queue data, behind all control messages. Never waits; call `room` first."""
        ...

    async def room(self) -> None:
        """Wait until little enough is queued."""
        ...


class GuestProcess:
    """Fulfils `noid.core.backends.Process`. Made by `Guest.start`.

    Attributes:
        id: Names the process on this connection.
        pid: Its process id in the guest, once started.
        usage: What it used, once ended.
    """

    def __init__(self, number: int, sender: Sender, *, stdin: bool) -> None:
        self.id = number
        self.pid = 0
        self.usage: Usage | None = None
        self._sender = sender
        self._has_stdin = stdin
        self._stdin_open = stdin
        self._stdin_credit = 0
        self._chunks: deque[tuple[int, bytearray]] = deque()
        self._offset = {1: 0, 2: 0}
        self._granted = {1: OUTPUT_WINDOW_BYTES, 2: OUTPUT_WINDOW_BYTES}
        self._owed = {1: 0, 2: 0}
        self._exit: ProcessExit | None = None
        self._failure: NoidError | None = None
        self._released = False
        self._changed = trio.lowlevel.ParkingLot()

    # --- what callers do ------------------------------------------------------------------------------------------

    async def receive(self) -> OutputChunk | ProcessExit:
        """Return the next output, or how the process ended; after the end, `ProcessExit` again and again.

        Cancelled, it has taken nothing.

        Raises:
            DependencyDown: the guest or its VM went away; the process' fate is unknown.
            BackendError: the guest broke the protocol.
            Conflict: the process was released.
        """
        await trio.lowlevel.checkpoint()
        while not self._chunks:
            if self._exit is not None:
                return self._exit
            self._check()
            await self._changed.park()
        stream, data = self._chunks.popleft()
        self._return_credit(stream, len(data))
        return OutputChunk(stream=stream, data=bytes(data))

    async def send_stdin(self, data: bytes) -> None:
        """Write to the process' stdin; waits while the process does not read. Ignored once it has closed stdin.

        Cancelled, an unknown part of *data* was written.

        Raises:
            InvalidRequest: the process was started without stdin.
            DependencyDown: the guest or its VM went away.
        """
        if not self._has_stdin:
            raise InvalidRequest("The process was started without stdin. Start it with stdin=True to write to it.")
        await trio.lowlevel.checkpoint()
        at = 0
        while at < len(data):
            await self._sender.room()
            if not self._stdin_open or self._exit is not None:
                return
            self._check()
            if self._stdin_credit == 0:
                await self._changed.park()
                continue
            piece = data[at : at + min(self._stdin_credit, CHUNK_BYTES_MAX)]
            self._stdin_credit -= len(piece)
            at += len(piece)
            self._sender.post_bulk(Message.STDIN, self.id, piece)

    async def close_stdin(self) -> None:
        """Let the process see the end of its input, after what was sent before. Closing twice does nothing."""
        await trio.lowlevel.checkpoint()
        if self._stdin_open and self._exit is None:
            self._stdin_open = False
            self._sender.post_bulk(Message.STDIN_EOF, self.id)
            self._changed.unpark_all()

    async def signal(self, signo: int) -> None:
        """Send *signo* to the process' group. Signalling an ended process does nothing.

        Raises:
            InvalidRequest: there is no such signal.
        """
        if not 1 <= signo <= _SIGNAL_MAX:
            raise InvalidRequest(f"There is no signal {signo}. Use 1 to {_SIGNAL_MAX}.")
        await trio.lowlevel.checkpoint()
        if self._exit is None:
            self._check()
            self._sender.post(Message.SIGNAL, self.id, bytes([signo]))

    async def resize(self, size: TerminalSize) -> None:
        """Do nothing: no process of this agent has a terminal."""
        del size
        await trio.lowlevel.checkpoint()

    async def end(self, grace_secs: float) -> None:
        """Send TERM, or KILL where there is no grace. What ignores TERM goes with `Guest.release`."""
        await self.signal(signal.SIGTERM if grace_secs > 0 else signal.SIGKILL)

    def _check(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(*self._failure.args) from self._failure  # its own traceback for each
        if self._released:
            raise Conflict(f"Process {self.id} was released; nothing more will be heard of it.")

    def _return_credit(self, stream: int, size: int) -> None:
        self._owed[stream] += size
        if self._owed[stream] >= _RETURN_CREDIT_AT and self._exit is None and not self._released:
            self._granted[stream] += self._owed[stream]
            self._sender.post(Message.CREDIT, self.id, credit_body(stream, self._owed[stream]))
            self._owed[stream] = 0

    # --- what the connection's reader does: never waits -----------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether its end is known."""
        return self._exit is not None

    def on_output(self, stream: int, offset: int, data: bytes) -> None:
        """Queue *data*, which the guest must have had credit for and nothing missing before."""
        if offset != self._offset[stream]:
            raise ProtocolError(f"output at offset {offset} where {self._offset[stream]} was due")
        if len(data) > self._granted[stream]:
            raise ProtocolError(f"{len(data)} bytes of output where {self._granted[stream]} were allowed")
        self._offset[stream] += len(data)
        self._granted[stream] -= len(data)
        if self._released or not data:
            return
        if self._chunks and self._chunks[-1][0] == stream:
            self._chunks[-1][1].extend(data)
        elif len(self._chunks) < _QUEUED_CHUNKS_MAX:
            self._chunks.append((stream, bytearray(data)))
        else:
            # The streams take turns in tiny pieces. What a piece costs beyond its bytes must stay bounded, so from
            # here on they are joined: each stream keeps its order, their mutual order gets coarser.
            next(queued for name, queued in reversed(self._chunks) if name == stream).extend(data)
        self._changed.unpark_all()

    def on_credit(self, stream: int, credit_bytes: int) -> None:
        """Note that the guest takes more stdin."""
        if stream != 0 or self._stdin_credit + credit_bytes > _STDIN_CREDIT_MAX:
            raise ProtocolError(f"credit of {credit_bytes} bytes for stream {stream}")
        self._stdin_credit += credit_bytes
        self._changed.unpark_all()

    def on_stdin_closed(self) -> None:
        """Note that nobody reads stdin any more."""
        self._stdin_open = False
        self._changed.unpark_all()

    def on_exit(self, ended: ProcessExit, usage: Usage) -> None:
        """Note the end. Nothing comes after it."""
        self._exit = ended
        self.usage = usage
        self._changed.unpark_all()

    def fail(self, failure: NoidError) -> None:
        """Let everybody who waits, now or later, have *failure* once the output is used up."""
        self._failure = self._failure or failure
        self._changed.unpark_all()

    def forget(self) -> None:
        """Drop the output; nobody wants it."""
        self._released = True
        self._chunks.clear()
        self._changed.unpark_all()
