"""A machine's serial console, shared: viewers read its log, and whoever types or listens shares one connection.

Viewers always read ``serial.log``, which the VMM writes whoever is connected: history and news are one thing with one
numbering, and a reader costs the guest nothing. The line itself is connected for input, and for listeners, who must
not miss or meet twice a single byte. While it is, it is drained, because a guest whose output nobody takes stops; and
some time after the last input it is closed again.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import struct
import termios
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from noid.core.backends import Machine
from noid.core.filewatch import FileWatches
from noid.core.logs import FileLog
from noid.core.waiting import plain_nursery
from noid.errors import BackendError, DependencyDown

logger = logging.getLogger(__name__)

CONSOLE_LOG = "serial.log"
CONNECT_SECS = 5.0
IDLE_SECS = 5.0
UNHEARD_BYTES_MAX = 1 << 20

_READ_BYTES = 65536


class Console:
    """See `noid.core.backends.ConsolePort`. One for each machine; *nursery* drains the line while it is connected."""

    def __init__(self, machine: Machine, log: Path, watches: FileWatches, nursery: trio.Nursery) -> None:
        self.log = FileLog(log, watches, lambda: not self.ended)
        """What the guest has printed since this machine began."""
        self.ended = False
        self._machine = machine
        self._nursery = nursery
        self._line: trio.abc.Stream | None = None
        self._listeners: set[Listener] = set()
        self._turn = trio.Lock()
        self._typed_at = 0.0

    async def write(self, data: bytes) -> None:
        """See `ConsolePort.write`."""
        async with self._turn:
            line = self._line or await self._connected()
            self._typed_at = trio.current_time()
            try:
                await line.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise self._gone() from error
            finally:
                self._typed_at = trio.current_time()

    @contextlib.asynccontextmanager
    async def listen(self) -> AsyncIterator[Listener]:
        """See `ConsolePort.listen`."""
        listener = Listener()
        self._listeners.add(listener)
        try:
            async with self._turn:
                _ = self._line or await self._connected()
            yield listener
        finally:
            self._listeners.discard(listener)

    def end(self) -> None:
        """Say that the machine has ended or is somebody else's now: readers read to the end, writers fail."""
        self.ended = True
        self.log.note()
        if self._line is not None:
            self._nursery.start_soon(trio.aclose_forcefully, self._line)

    def _gone(self) -> DependencyDown:
        return DependencyDown(
            "the machine of this console has ended, or was replaced by a restore. Look at the VM's state, and attach "
            "again if it runs."
            if self.ended
            else "the connection to the guest's serial console was lost. Try again; if that does not help, look at the "
            "VM's state."
        )

    async def _connected(self) -> trio.abc.Stream:
        if self.ended:
            raise self._gone()
        try:
            with trio.fail_after(CONNECT_SECS):
                line = await self._machine.console()
        except trio.TooSlowError as error:
            raise DependencyDown(
                f"the VMM did not give its serial console within {CONNECT_SECS:g} s; it may be stuck. What the guest "
                "has printed can still be read."
            ) from error
        self._line = line
        self._typed_at = trio.current_time()
        self._nursery.start_soon(self._drain, line, name="console line")
        return line

    async def _drain(self, line: trio.abc.Stream) -> None:
        """Take what arrives and drop it, until nobody has typed for a while or the line breaks."""
        try:
            while not self._is_idle(line):
                with trio.move_on_at(self._typed_at + IDLE_SECS):
                    data = await line.receive_some(_READ_BYTES)
                    if not data:
                        return
                    for listener in self._listeners:
                        listener.take(bytes(data))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return
        finally:
            # Not an await after the last look: whoever types next connects anew.
            if self._line is line:
                self._line = None
                for listener in self._listeners:
                    listener.end()
            await trio.aclose_forcefully(line)

    def _is_idle(self, line: trio.abc.Stream) -> bool:
        if trio.current_time() < self._typed_at + IDLE_SECS:
            return False
        if self._listeners or self._turn.locked() or _untaken_bytes(line) > 0:  # it would be lost
            self._typed_at = trio.current_time()
            return False
        return True


class Listener:
    """See `noid.core.backends.ConsoleListener`. At most `UNHEARD_BYTES_MAX` wait for it.

    It hears the line and not the log, to the byte: a VMM that cannot send a byte at once may log it twice. QEMU does.
    """

    def __init__(self) -> None:
        self._unheard = bytearray()
        self._lost_bytes = 0
        self._ended = False
        self._changed = trio.lowlevel.ParkingLot()

    def take(self, data: bytes) -> None:
        """Keep *data* until it is asked for."""
        if self._lost_bytes or len(self._unheard) + len(data) > UNHEARD_BYTES_MAX:
            self._lost_bytes += len(data)
        else:
            self._unheard += data
        self._changed.unpark_all()

    def end(self) -> None:
        """Say that nothing more comes."""
        self._ended = True
        self._changed.unpark_all()

    async def receive_some(self) -> bytes:
        """See `ConsoleListener.receive_some`."""
        await trio.lowlevel.checkpoint()
        while not self._unheard:
            if self._lost_bytes:
                raise BackendError(
                    f"the guest prints faster than its console is read: {self._lost_bytes} bytes of it are lost. "
                    "Nothing else is; let it print less, or to a file."
                )
            if self._ended:
                return b""
            await self._changed.park()
        data = bytes(self._unheard)
        self._unheard.clear()
        return data


@contextlib.asynccontextmanager
async def open_console(machine: Machine, directory: Path) -> AsyncIterator[Console]:
    """Yield a console of its own for *machine*, whose plan's directory is *directory*."""
    async with plain_nursery() as nursery:
        console = Console(machine, directory / CONSOLE_LOG, FileWatches(nursery), nursery)
        try:
            yield console
        finally:
            console.end()
            nursery.cancel_scope.cancel()


def _untaken_bytes(line: trio.abc.Stream) -> int:
    """Return how much of what was sent the VMM has not read; 0 where the line is not a socket that can be asked."""
    if not isinstance(line, trio.SocketStream) or line.socket.fileno() < 0:
        return 0
    answer = fcntl.ioctl(line.socket.fileno(), termios.TIOCOUTQ, struct.pack("i", 0))
    return int(struct.unpack("i", answer)[0])
