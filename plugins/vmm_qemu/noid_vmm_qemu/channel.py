"""The byte stream to a guest agent, which must stand still while its machine does.

QEMU takes bytes from the agent's socket, and notices that it was opened or closed, even while the guest is paused: it
writes them into the guest's memory. Between saving the devices and reading the memory that would make a checkpoint
whose two halves contradict each other, and which QEMU then refuses to continue. So nothing is sent, opened or closed
while the gate is shut, and `Gate.settled` tells when what was sent before has arrived.
"""

from __future__ import annotations

import array
import fcntl
import termios

import trio

from noid.errors import DependencyDown

_CHUNK_BYTES = 32768


class Gate:
    """Open while the guest may be talked to. Closings that come while it is shut happen when it opens."""

    def __init__(self) -> None:
        self._open = trio.Event()
        self._open.set()
        self._closings: list[GatedStream] = []
        self.stream: GatedStream | None = None

    @property
    def is_taken(self) -> bool:
        """Whether there is a connection that nobody has closed."""
        return self.stream is not None and not self.stream.is_closed

    def shut(self) -> None:
        """Let nothing pass from now on."""
        if self._open.is_set():
            self._open = trio.Event()

    def open(self) -> None:
        """Let everything pass that waited."""
        self._open.set()
        for stream in self._closings:
            stream.hang_up()
        self._closings.clear()

    async def passed(self) -> None:
        """Wait until the gate is open."""
        while not self._open.is_set():
            await self._open.wait()

    def settled(self) -> bool:
        """Whether the VMM has taken everything that was sent."""
        return self.stream is None or not self.stream.in_flight()

    def close(self, stream: GatedStream) -> None:
        """Hang *stream* up now, or when the gate opens."""
        if self._open.is_set():
            stream.hang_up()
        else:
            self._closings.append(stream)


class GatedStream(trio.abc.Stream):
    """A connection to the agent's socket that respects a `Gate`. Receiving is always possible."""

    def __init__(self, stream: trio.SocketStream, gate: Gate) -> None:
        self._stream = stream
        self._gate = gate
        self._sending = False
        self.is_closed = False
        gate.stream = self

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send *data*; waits while the machine is paused."""
        with memoryview(data) as view:
            await self._gate.passed()
            for start in range(0, len(view), _CHUNK_BYTES):
                await self._gate.passed()
                if self.is_closed:
                    raise trio.ClosedResourceError
                self._sending = True
                try:
                    await self._stream.send_all(view[start : start + _CHUNK_BYTES])
                finally:
                    self._sending = False

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the machine runs and the socket has room."""
        await self._gate.passed()
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Return what the guest sent; nothing when the machine is gone."""
        if self.is_closed:
            raise trio.ClosedResourceError
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        """Free the place for the next connection."""
        if not self.is_closed:
            self.is_closed = True
            self._gate.close(self)
        await trio.lowlevel.checkpoint()

    def hang_up(self) -> None:
        """Close the socket now."""
        self._stream.socket.close()

    def in_flight(self) -> bool:
        """Whether something that was sent has not been read at the other end."""
        if self._stream.socket.fileno() < 0:
            return False
        unread = array.array("i", [0])
        fcntl.ioctl(self._stream.socket.fileno(), termios.TIOCOUTQ, unread)  # SIOCOUTQ has the same number
        return self._sending or unread[0] > 0


async def connected(path: str) -> trio.SocketStream:
    """Connect to the unix socket at *path*, where a VMM listens or is about to.

    Raises:
        DependencyDown: nobody listens there: the process is gone.
    """
    socket = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    try:
        await socket.connect(path)
    except OSError as error:
        socket.close()
        raise DependencyDown(f"the VM does not answer on {path}: {error.strerror}. Its process has ended.") from error
    except BaseException:
        socket.close()
        raise
    return trio.SocketStream(socket)
