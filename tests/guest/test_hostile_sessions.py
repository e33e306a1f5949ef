"""The core's sessions over two guests at once: what a lying one does to its own processes never reaches the other's."""

from __future__ import annotations

import json
import struct
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing
from noid_exec_vsock.frames import Message
from noid_exec_vsock.guest import AgentGuest, connect
from noid_exec_vsock.process import OUTPUT_WINDOW_BYTES

from noid.core.backends import ConsolePort, Machine
from noid.core.guests.processlog import SEGMENT_BYTES, SEGMENTS_MAX
from noid.core.guests.vmsessions import VmSessions
from noid.core.model.guest_processes import OutputChunk, ProcessExit
from noid.core.model.processes import ExecRequest
from noid.core.vms.supervisor import GuestLink, Live
from noid.errors import BackendError

from .conftest import NativeAgent, to
from .liar import ENDED, Liar, attached, told

PATIENCE_SECS = 30.0
PROCESS_ID = 0x80000001
LABEL = json.dumps(
    {"argv": ["\x1b]0;gotcha\x07" * 9999, *[""] * 99], "vm_id": "web", "instance": "one", "detached": True}
).encode()[:8192]


class Exec:
    """The way into a guest whose stream *open_stream* opens."""

    name = "vsock"

    def __init__(self, open_stream: Callable[[], Awaitable[trio.abc.Stream]]) -> None:
        self._open_stream = open_stream

    def connect(self, machine: Machine, console: ConsolePort) -> AbstractAsyncContextManager[AgentGuest]:
        del machine, console
        return connect(self._open_stream)


def link(open_stream: Callable[[], Awaitable[trio.abc.Stream]], nursery: trio.Nursery) -> GuestLink:
    machine: Any = SimpleNamespace(ref=SimpleNamespace(pid=1))  # its name in messages is all that is asked of it
    return GuestLink(machine, machine, [Exec(open_stream)], nursery)


def sessions(link: GuestLink, directory: Path, nursery: trio.Nursery) -> VmSessions:
    machine: Any = None  # sessions do not look at it
    live = Live(vm_id="web", instance="one", machine=machine, link=link)
    return VmSessions("web", "one", directory, live, nursery, 10.0)


class Hostile:
    """A guest whose agent answers every connection with *tell*."""

    def __init__(self, nursery: trio.Nursery, tell: Callable[[Liar], Awaitable[None]]) -> None:
        self._nursery = nursery
        self._tell = tell
        self.connections = 0

    async def open(self) -> trio.abc.Stream:
        ours, theirs = trio.testing.memory_stream_pair()
        self.connections += 1
        self._nursery.start_soon(self._live, Liar(theirs))
        await trio.lowlevel.checkpoint()
        return ours

    async def _live(self, liar: Liar) -> None:
        try:
            await liar.greet()
            await self._tell(liar)
            while True:
                await liar.stream.receive_some(65536)
        except (trio.BrokenResourceError, trio.ClosedResourceError, struct.error):
            return


Attach = Callable[[Liar, int, int], Awaitable[None]]


def guest_with_one_process(attach: Attach) -> Callable[[Liar], Awaitable[None]]:
    """Return what lists one process and does *attach*, with its id and offset, whenever somebody wants its output."""

    async def tell(liar: Liar) -> None:
        while True:
            while not liar.heard:
                data = await liar.stream.receive_some(65536)
                if not data:
                    return
                liar.heard += liar.decoder.feed(data)
            frame = liar.heard.pop(0)
            if frame.type == Message.LIST:
                await liar.say(Message.PROCESS, frame.id, told(PROCESS_ID, log=(0, 1), label=LABEL))
                await liar.say(Message.LISTED, frame.id, struct.pack("<I", 1))
            elif frame.type == Message.PING:
                await liar.say(Message.PONG, frame.id, frame.body)
            elif frame.type == Message.ATTACH:
                await attach(liar, frame.id, struct.unpack("<QI", frame.body)[0])

    return tell


async def far_ahead(liar: Liar, number: int, offset: int) -> None:
    del offset
    await liar.say(Message.ATTACHED, number, attached((1 << 64) - 1, (1 << 64) - 1))


async def without_its_output(liar: Liar, number: int, offset: int) -> None:
    await liar.say(Message.ATTACHED, number, attached(offset, offset))
    await liar.say(Message.STDOUT, number, struct.pack("<Q", offset + 1) + b"x")


async def with_an_end_of_an_unknown_kind(liar: Liar, number: int, offset: int) -> None:
    await liar.say(Message.ATTACHED, number, attached(offset, offset))
    await liar.say(Message.EXIT, number, b"\x07" + ENDED[1:])


@pytest.mark.parametrize(
    ("attach", "words"),
    [
        (far_ahead, "18446744073709551615 bytes, which nobody can"),
        (without_its_output, "output at offset"),
        (with_an_end_of_an_unknown_kind, "says 7 of how a process ended"),
    ],
)
async def test_a_process_of_a_liar_is_lost_with_words_and_the_other_guest_goes_on(
    attach: Attach, words: str, agent: NativeAgent, tmp_path: Path
) -> None:
    async with trio.open_nursery() as nursery:
        hostile = Hostile(nursery, guest_with_one_process(attach))
        liars = sessions(link(hostile.open, nursery), tmp_path / "liar", nursery)
        honest_link = link(to(agent), nursery)
        honest = sessions(honest_link, tmp_path / "honest", nursery)
        with trio.fail_after(PATIENCE_SECS):
            await honest.discover()
            async with honest_link.guest() as guest:
                cat_request = ExecRequest(argv=("cat",), stdin=True)
                cat = await honest.start(guest, cat_request, detached=False, admit=lambda: None)
                await liars.discover()
                (lost,) = await liars.all()
                with pytest.raises(BackendError, match=words):
                    await lost.ended()
                assert lost.state == "lost"
                assert "\x1b" not in json.dumps(lost.argv)
                assert sum(map(len, lost.argv)) < 2048
                await cat.send_stdin(b"still here")
                await cat.close_stdin()
                assert (await cat.ended()).code == 0
                with cat.view(0) as viewer:
                    (chunk,) = events if isinstance(events := await viewer.next(), list) else ()
                assert isinstance(chunk, OutputChunk)
                assert chunk.data == b"still here"
        assert hostile.connections < 20
        nursery.cancel_scope.cancel()


async def without_end(liar: Liar, number: int, offset: int) -> None:
    await liar.say(Message.ATTACHED, number, attached(offset, offset))
    granted = OUTPUT_WINDOW_BYTES
    for at in range(offset, ENDLESS_BYTES, 16384):
        while granted < 16384:
            granted += struct.unpack("<BI", (await liar.hear(Message.CREDIT)).body)[1]
        granted -= 16384
        await liar.say(Message.STDOUT + at // 16384 % 2, number, struct.pack("<Q", at) + bytes(16384))
    await liar.say(Message.EXIT, number, ENDED)


ENDLESS_BYTES = 8 << 20


async def test_what_a_guest_says_without_end_takes_only_so_much_disk(tmp_path: Path) -> None:
    (tmp_path / "liar").mkdir()
    async with trio.open_nursery() as nursery:
        hostile = Hostile(nursery, guest_with_one_process(without_end))
        liars = sessions(link(hostile.open, nursery), tmp_path / "liar", nursery)
        with trio.fail_after(PATIENCE_SECS):
            await liars.discover()
            (session,) = await liars.all()
            assert isinstance(await session.ended(), ProcessExit)
            assert session.log.end == ENDLESS_BYTES
        nursery.cancel_scope.cancel()
    kept = sum(path.stat().st_size for path in (tmp_path / "liar").rglob("*") if path.is_file())
    assert SEGMENT_BYTES <= kept <= SEGMENTS_MAX * SEGMENT_BYTES + (1 << 18)
