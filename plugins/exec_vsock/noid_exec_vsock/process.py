"""One process in a guest, as its reader sees it: bounded queues in front of the channel's one reader task.

The host grants credit and gives it back as output is received, so a reader that stalls holds at most
`OUTPUT_WINDOW_BYTES` here, stops its own process, and nobody else. Every message a guest can send about a process uses
something up, be it credit or that it may be said once: what costs nothing could be said for ever.
"""

from __future__ import annotations

from typing import Protocol

import trio

from noid.core.model.guest_processes import OutputChunk, ProcessExit, Usage
from noid.core.model.processes import Gap, TerminalSize
from noid.errors import Conflict, InvalidRequest, NoidError
from noid_exec_vsock.backlog import Backlog
from noid_exec_vsock.frames import (
    CHUNK_BYTES_MAX,
    Attached,
    Message,
    ProtocolError,
    credit_body,
    grace_body,
    size_body,
)

OUTPUT_WINDOW_BYTES = 512 * 1024  # with more, answers of others come later beside a flood
_RETURN_CREDIT_AT = OUTPUT_WINDOW_BYTES // 2  # each credit interrupts the guest
_STDIN_CREDIT_MAX = 1 << 20
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
    """Fulfils `noid.core.backends.Process`. Made by `Guest.start` and `Guest.attach`.

    Attributes:
        id: Names the process for the life of its guest, in checkpoints and clones too.
        pid: Its process id in the guest, once started.
        stdin_taken: How many bytes its stdin had had when it was attached to, and has been sent since.
        released: The guest was asked to forget it.
    """

    def __init__(self, number: int, sender: Sender, *, stdin: bool, offset: int = 0) -> None:
        self.id = number
        self.pid = 0
        self.stdin_taken = 0
        self.released = False
        self._sender = sender
        self._has_stdin = stdin
        self._stdin_open = stdin
        self._stdin_broken = False
        self._stdin_credit = 0
        self._backlog = Backlog(offset)
        self._granted = OUTPUT_WINDOW_BYTES
        self._owed = 0
        self._exit: ProcessExit | None = None
        self._failure: NoidError | None = None
        self._forgotten = False
        self._changed = trio.lowlevel.ParkingLot()

    # --- what callers do ------------------------------------------------------------------------------------------

    async def receive(self) -> OutputChunk | Gap | ProcessExit:
        """Return the next output, or how the process ended; after the end, `ProcessExit` again and again.

        Cancelled, it has taken nothing.

        Raises:
            DependencyDown: the guest or its VM went away; the process' fate is unknown.
            BackendError: the guest broke the protocol.
            Conflict: the process was released, or somebody else has attached to it.
        """
        await trio.lowlevel.checkpoint()
        while not self._backlog:
            if self._exit is not None:
                return self._exit
            self._check()
            await self._changed.park()
        taken = self._backlog.take()
        if isinstance(taken, OutputChunk):
            self._return_credit(len(taken.data))
        return taken

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
            self.stdin_taken += len(piece)
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
        await self._post_while_it_runs(Message.SIGNAL, bytes([signo]))

    async def resize(self, size: TerminalSize) -> None:
        """Change the size of the process' terminal. Does nothing to a process without one, or an ended one."""
        await self._post_while_it_runs(Message.RESIZE, size_body(size))

    async def end(self, grace_secs: float) -> None:
        """Ask the process' group to end: TERM now, KILL after the grace (a minute at most). Returns at once.

        Output goes on, and `receive` tells the end as ever.
        """
        await self._post_while_it_runs(Message.END, grace_body(grace_secs))

    async def _post_while_it_runs(self, kind: Message, body: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if self._exit is None:
            self._check()
            self._sender.post(kind, self.id, body)

    def _check(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(*self._failure.args) from self._failure  # its own traceback for each
        if self._forgotten:
            raise Conflict(
                f"Process {self.id:08x} was released or attached to by somebody else; no more is heard of it."
            )

    def _return_credit(self, size: int) -> None:
        self._owed += size
        if self._owed >= _RETURN_CREDIT_AT and self._exit is None and not self._forgotten:
            self._granted += self._owed
            self._sender.post(Message.CREDIT, self.id, credit_body(self._owed))
            self._owed = 0

    # --- what the connection's reader does: never waits -----------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether its end is known."""
        return self._exit is not None

    @property
    def usage(self) -> Usage | None:
        """What it used, once it has ended."""
        return self._exit.usage if self._exit is not None else None

    def on_attached(self, attached: Attached) -> None:
        """Note where output begins, which is at or after the offset that was asked for."""
        if attached.start < self._backlog.end:
            raise ProtocolError(f"ATTACHED at {attached.start} where {self._backlog.end} was asked for")
        self._backlog.skip_to(attached.start)
        self.pid = attached.pid
        self.stdin_taken = attached.stdin_taken
        self._has_stdin = self._stdin_open = attached.stdin

    def on_output(self, stream: int, offset: int, data: bytes) -> None:
        """Queue *data*, which the guest must have had credit for and nothing missing before."""
        if offset != self._backlog.end:
            raise ProtocolError(f"output at offset {offset} where {self._backlog.end} was due")
        if len(data) > self._granted:
            raise ProtocolError(f"{len(data)} bytes of output where {self._granted} were allowed")
        if not data:
            raise ProtocolError("output of no bytes")
        self._granted -= len(data)
        self._backlog.put(stream, data)
        if self._forgotten:
            self._backlog.clear()
        self._changed.unpark_all()

    def on_credit(self, stream: int, credit_bytes: int) -> None:
        """Note that the guest takes more stdin."""
        if stream != 0 or not 0 < credit_bytes <= _STDIN_CREDIT_MAX - self._stdin_credit:
            raise ProtocolError(f"credit of {credit_bytes} bytes for stream {stream}")
        self._stdin_credit += credit_bytes
        self._changed.unpark_all()

    def on_stdin_closed(self) -> None:
        """Note that nobody reads stdin any more."""
        if self._stdin_broken:
            raise ProtocolError("STDIN_CLOSED twice")
        self._stdin_broken = True
        self._stdin_open = False
        self._changed.unpark_all()

    def on_exit(self, ended: ProcessExit) -> None:
        """Note the end. Nothing comes after it."""
        self._exit = ended
        self._changed.unpark_all()

    def on_refusal(self, failure: NoidError) -> None:
        """Note that the guest could make no sense of a message about the process."""
        if self._failure is not None:
            raise ProtocolError("ERROR about a process that was given up after the one before")
        self.fail(failure)

    def fail(self, failure: NoidError) -> None:
        """Let everybody who waits, now or later, have *failure* once the output is used up."""
        self._failure = self._failure or failure
        self._changed.unpark_all()

    def forget(self) -> None:
        """Drop the output; nobody wants it."""
        self._forgotten = True
        self._backlog.clear()
        self._changed.unpark_all()
