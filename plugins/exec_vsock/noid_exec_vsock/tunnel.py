"""A TCP connection made in the guest: the host's end of the agent's builtin `connect`.

What comes out is its stdout; lines on its stderr say what became of the connection. What goes in is framed, so that its
end is a mark and not the mere end of a pipe, which everything that breaks looks like. Nothing the guest says is
believed: an end that is told before all of its bytes are there, or after more, is none.
"""

from __future__ import annotations

import errno
import re
import struct
from typing import Protocol

import trio

from noid.core.backends import Process
from noid.core.model.connections import ConnectRequest
from noid.core.model.guest_processes import OutputChunk, ProcessExit
from noid.core.model.processes import ExecRequest, Gap
from noid.errors import BackendError, DependencyDown, InvalidRequest, NoidError, Unreachable

BUILTIN = "connect"
_LOG_BYTES = 256 << 10  # of the guest's memory at most, for what nobody here has taken yet
_SAID_BYTES_MAX = 1024
_EARLY_BYTES_MAX = 256 << 10
_CLOSE_SECS = 15.0
_RECORD_BYTES_MAX = 1 << 20
_END = struct.pack("<I", 0)

_CONNECTED = "connected"
_ENDED = re.compile(r"end (\d{1,19})")
_FAILED = re.compile(r"error (\d{1,5}) (.*)")
_UNPRINTABLE = re.compile(r"[^\x20-\x7e]")


class _Starter(Protocol):
    """What makes processes: see `noid_exec_vsock.guest.AgentGuest`."""

    async def start_builtin(self, request: ExecRequest) -> Process: ...

    async def release(self, process: Process | int) -> None: ...


async def connect(guest: _Starter, request: ConnectRequest) -> Tunnel:
    """Make the connection. Cancelled, there is none.

    Raises:
        Unreachable: nothing takes connections there, or there is no way.
        BackendError: the guest does not do its part.
    """
    argv = (BUILTIN, request.host, str(request.port))
    process = await guest.start_builtin(ExecRequest(argv=argv, user=request.user, stdin=True, log_bytes=_LOG_BYTES))
    made = Tunnel(guest, process, request.target)
    try:
        await made.connected()
    except BaseException:
        with trio.move_on_after(_CLOSE_SECS, shield=True):
            await made.aclose()
        raise
    return made


class Tunnel:
    """Fulfils `noid.core.backends.GuestConnection`. Made by `connect`."""

    def __init__(self, guest: _Starter, process: Process, target: str) -> None:
        self._guest = guest
        self._process = process
        self._target = target
        self._said = bytearray()
        self._is_connected = False
        self._received = 0
        self._end: int | None = None
        self._early = b""
        self._failure: NoidError | None = None
        self._exit: ProcessExit | None = None
        self._sent_all = False

    async def connected(self) -> None:
        """Wait until the connection stands.

        Raises:
            Unreachable: it never will.
        """
        while not self._is_connected:
            if data := await self._next():  # the guest's agent may read this first, though it was written later
                self._early += data
                if len(self._early) > _EARLY_BYTES_MAX:
                    raise self._broken("it sends without saying that it is connected")
            elif self._exit is not None:
                raise self._ended_badly()

    async def send_all(self, data: bytes) -> None:
        """Send *data*; waits while it is not taken. What nobody takes any more is dropped."""
        for at in range(0, len(data), _RECORD_BYTES_MAX):
            piece = data[at : at + _RECORD_BYTES_MAX]
            await self._process.send_stdin(struct.pack("<I", len(piece)) + piece)

    async def send_eof(self) -> None:
        """Tell the other end that no more comes. Twice does nothing."""
        if not self._sent_all:
            self._sent_all = True
            await self._process.send_stdin(_END)

    async def receive_some(self) -> bytes:
        """Return what comes next, or nothing at the end."""
        while self._end is None or self._received < self._end:
            if data := self._early or await self._next():
                self._early = b""
                self._received += len(data)
                if self._end is not None and self._received > self._end:
                    raise self._broken("it sends more than it says")
                return data
            if self._exit is not None:
                raise self._ended_badly()
        return b""

    async def wait_closed(self) -> None:
        """Return once both directions have ended in order."""
        while self._exit is None:
            if await self._next():
                raise self._broken("it sends more than it says")
        if self._failure is not None or self._exit.code != 0:
            raise self._ended_badly()

    async def aclose(self) -> None:
        """Let go of it; it is reset unless it is over."""
        await self._guest.release(self._process)

    # --- what the guest says ------------------------------------------------------------------------------------------

    async def _next(self) -> bytes:
        """Return the next bytes that came through; nothing when the guest has said something or has ended."""
        match await self._process.receive():
            case OutputChunk(stream=1, data=data):
                return data
            case OutputChunk(data=data):
                self._hear(data)
            case Gap():
                raise self._broken("it has lost a part of what came")
            case ProcessExit() as ended:
                self._exit = ended
        return b""

    def _hear(self, data: bytes) -> None:
        self._said += data
        *lines, rest = bytes(self._said).split(b"\n")
        self._said[:] = rest
        if len(rest) > _SAID_BYTES_MAX:
            raise self._broken("it says too much")
        for line in lines:
            said = line.decode("latin-1")
            if said == _CONNECTED and not self._is_connected:
                self._is_connected = True
            elif (found := _ENDED.fullmatch(said)) and self._is_connected and self._end is None:
                self._end = int(found[1])
                if self._end < self._received:
                    raise self._broken("it has sent more than it says")
            elif (found := _FAILED.fullmatch(said)) and self._failure is None:
                self._failure = self._understood(int(found[1]), _UNPRINTABLE.sub("?", found[2])[:200])
            else:
                raise self._broken(f"it says {_UNPRINTABLE.sub('?', said)[:80]!r}")

    def _understood(self, number: int, words: str) -> NoidError:
        if self._is_connected:
            return Unreachable(
                f"the connection to {self._target} in the guest broke: {words}. Whether what was sent last was taken "
                "nobody knows."
            )
        if number == errno.ECONNREFUSED:
            return Unreachable(
                f"nothing listens at {self._target} in the guest (connection refused). Start what shall, or look with "
                "`noid exec VM -- ss -ltn` which ports there are."
            )
        if number == errno.EINVAL:
            return InvalidRequest(f"the guest cannot connect to {self._target}: {words}.")
        return Unreachable(f"the guest cannot connect to {self._target}: {words}. The VM is well.")

    def _ended_badly(self) -> NoidError:
        if self._failure is not None:
            return type(self._failure)(*self._failure.args)  # its own traceback for each
        how = "" if self._exit is None else f" (status {self._exit.status})"
        return DependencyDown(
            f"the guest's end of the connection to {self._target} was ended{how}, by the guest's kernel perhaps for "
            "want of memory. Try again."
        )

    def _broken(self, what: str) -> BackendError:
        return BackendError(f"the guest does not do its part of the connection to {self._target}: {what}.")
