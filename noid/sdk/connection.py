"""A TCP connection to a port of a VM, made from inside its guest: no network of the VM's is needed."""

from __future__ import annotations

from noid.client.errors import ServerError
from noid.client.link import Link
from noid.client.port_stream import HELD_BYTES_MAX, PortStream
from noid.core import wire
from noid.sdk.stream import Stream


class Connection(Stream[bytes]):
    """A TCP connection. Iterate over it for what comes, until the other side has said that no more does.

    Both sides end by themselves: see `send_eof`. Left before both have, it is reset in the guest, so that nobody there
    takes a part for the whole. What nobody asks for holds the other side back, beyond some 100 KiB.
    """

    def __init__(self, link: Link, vm: str, port: int, host: str) -> None:
        super().__init__(link.waiting.turns())
        self._link, self._vm = link, vm
        self._port, self._host = port, host
        self._stream: PortStream | None = None
        self._ends = False

    async def send(self, data: bytes | str) -> None:
        """Send *data*; return when that is on its way. A side that does not take it is waited for.

        Raises:
            ServerError: the connection broke, in the guest or behind it.
        """
        stream = self._opened()
        unsent = memoryview(data.encode() if isinstance(data, str) else data)
        while unsent:
            await self._until(lambda: stream.has_room)
            self._check(stream)
            stream.send(bytes(unsent[: wire.CHUNK_BYTES]))
            unsent = unsent[wire.CHUNK_BYTES :]
            await self._flush(stream)

    async def send_eof(self) -> None:
        """Say that no more is sent. What the other side still sends can be read; once it has ended too, this is over.

        Raises:
            ServerError: the connection broke.
        """
        stream = self._opened()
        if not self._ends:
            self._ends = True
            stream.send_eof()
            await self._flush(stream)
        await self._until_confirmed(stream)

    async def __anext__(self) -> bytes:
        """Return what comes next.

        Raises:
            ServerError: the connection broke, after all that came before.
        """
        stream = self._opened()
        await self._until(lambda: bool(stream.received) or stream.has_ended)
        if stream.received:
            data = bytes(stream.received)
            stream.received.clear()
            if len(data) >= HELD_BYTES_MAX:
                self._turns.interrupt()  # who only sends now would not see that there is room again
            return data
        self._check(stream)
        await self._until_confirmed(stream)
        raise StopAsyncIteration

    async def _until_confirmed(self, stream: PortStream) -> None:
        """Wait until the agent knows that both sides have ended: hanging up before would be a break."""
        if self._ends and stream.has_ended and not stream.received:
            await self._until(lambda: stream.is_over)
            self._check(stream)

    async def _flush(self, stream: PortStream) -> None:
        stream.flush()
        if stream.has_unsent:
            self._turns.interrupt()
            await self._until(lambda: not stream.has_unsent)
            self._check(stream)

    async def _open(self) -> None:
        self._stream = await PortStream.open(self._link, self._vm, self._port, self._host, turns=self._turns)

    async def _step(self) -> None:
        stream = self._opened()
        await stream.step(listening=len(stream.received) < HELD_BYTES_MAX)

    def _is_over(self) -> bool:
        stream = self._opened()
        return stream.is_over or stream.failure is not None

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _opened(self) -> PortStream:
        if self._stream is None:
            raise RuntimeError("a connection is to be entered first: async with vm.connect(80) as connection.")
        return self._stream

    @staticmethod
    def _check(stream: PortStream) -> None:
        if (failure := stream.failure) is not None:
            raise ServerError(str(failure), status=0, code=failure.code) from failure  # its own traceback for each
