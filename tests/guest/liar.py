"""A guest that says whatever a test wants: the other end of the real host's connection."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio
import trio.testing
from noid_exec_vsock.frames import PROTOCOL_VERSION, Frame, FrameDecoder, Message, encode
from noid_exec_vsock.guest import AgentGuest, connect

HELLO = struct.pack("<HBBIQIII", PROTOCOL_VERSION, 0, 1, 77, 10**9, 512, 0, 1) + bytes(12)
ENDED = bytes(26)


class Liar:
    """The guest's end: hears the host, says whatever a test wants."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.decoder = FrameDecoder()
        self.heard: list[Frame] = []
        self.epoch = 0

    async def hear(self, kind: Message) -> Frame:
        while True:
            while self.heard:
                frame = self.heard.pop(0)
                if frame.type == kind:
                    return frame
            self.heard += self.decoder.feed(await self.stream.receive_some(65536))

    async def say(self, kind: int, number: int, body: bytes = b"", *, epoch: int | None = None) -> None:
        epoch = self.epoch if epoch is None else epoch
        await self.stream.send_all(encode(Frame(type=kind, epoch=epoch, id=number, body=body)))

    async def greet(self, body: bytes = HELLO) -> None:
        sync = await self.hear(Message.SYNC)
        self.epoch = sync.epoch
        await self.say(Message.HELLO, sync.id, body)

    async def start(self) -> int:
        number = (await self.hear(Message.START)).id
        await self.say(Message.STARTED, number, struct.pack("<I", 1234))
        return number


@asynccontextmanager
async def conversation(hello: bytes = HELLO) -> AsyncIterator[tuple[AgentGuest, Liar]]:
    ours, theirs = trio.testing.memory_stream_pair()
    liar = Liar(theirs)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(liar.greet, hello)
        async with connect(returning(ours)) as guest:
            yield guest, liar
        nursery.cancel_scope.cancel()


def returning(stream: trio.abc.Stream) -> Callable[[], Awaitable[trio.abc.Stream]]:
    async def open_stream() -> trio.abc.Stream:
        return stream

    return open_stream


def told(number: int, *, pid: int = 1, flags: int = 1, log: tuple[int, int] = (0, 0), label: bytes = b"{}") -> bytes:
    """Return the body of a PROCESS."""
    return struct.pack("<IIBQQ", number, pid, flags, *log) + ENDED + struct.pack("<QI", 1, len(label)) + label


def attached(start: int, end: int, *, flags: int = 1) -> bytes:
    """Return the body of an ATTACHED."""
    return struct.pack("<QQQIB", start, end, 0, 1, flags)
