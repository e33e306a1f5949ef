"""The host against a guest that lies: only its own connection ends, with an error that says so, in bounded memory."""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from noid_exec_vsock.frames import Message
from noid_exec_vsock.guest import AgentGuest, connect
from noid_exec_vsock.process import OUTPUT_WINDOW_BYTES, GuestProcess

from noid.core.model.guest_processes import OutputChunk
from noid.core.model.processes import ExecRequest
from noid.core.model.vms import Identity
from noid.errors import BackendError, DependencyDown

from .liar import ENDED, HELLO, Liar, attached, conversation, returning, told


async def started(guest: AgentGuest, liar: Liar, *, stdin: bool = False) -> GuestProcess:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(liar.start)
        return await guest.start(ExecRequest(argv=("x",), stdin=stdin))


def said(offset: int, data: bytes) -> bytes:
    return struct.pack("<Q", offset) + data


Lie = Callable[[Liar, int], Awaitable[None]]


def lies(kind: int, body: bytes = b"", *, about: int | None = None) -> Lie:
    async def tell(liar: Liar, number: int) -> None:
        await liar.say(kind, number if about is None else about, body)

    return tell


def again(kind: int, body: bytes = b"") -> Lie:
    async def tell(liar: Liar, number: int) -> None:
        for _ in range(2):
            await liar.say(kind, number, body)

    return tell


async def more_than_granted(liar: Liar, number: int) -> None:
    for offset in range(0, OUTPUT_WINDOW_BYTES + 1, 32768):
        await liar.say(Message.STDOUT, number, said(offset, bytes(32768)))


async def a_flood_of_nothing(liar: Liar, number: int) -> None:
    del number
    for _ in range(300):
        await liar.stream.send_all(bytes(65536))


@pytest.mark.parametrize(
    "lie",
    [
        pytest.param(more_than_granted, id="more output than was granted"),
        pytest.param(a_flood_of_nothing, id="a flood of nothing"),
        pytest.param(lies(Message.STDOUT, said(5, b"x")), id="output with a gap before it"),
        pytest.param(lies(Message.STDOUT, b"x"), id="output without an offset"),
        pytest.param(lies(Message.STDOUT, said(0, b"x"), about=4000), id="output of nobody"),
        pytest.param(lies(Message.EXIT, bytes(3)), id="half an exit"),
        pytest.param(lies(Message.CREDIT, struct.pack("<BI", 0, 1 << 30)), id="credit without measure"),
        pytest.param(lies(Message.CREDIT, struct.pack("<BI", 1, 1)), id="credit for output"),
        pytest.param(lies(Message.STARTED, bytes(4)), id="started twice"),
        pytest.param(lies(Message.RELEASED), id="released unasked"),
        pytest.param(lies(Message.HELLO, HELLO), id="a second hello"),
        pytest.param(lies(Message.PONG, about=4000), id="an answer to nothing"),
        pytest.param(lies(Message.ERROR, bytes(4), about=4000), id="an error about nothing"),
        pytest.param(lies(Message.ERROR, struct.pack("<I", 1 << 31)), id="an endless text"),
        pytest.param(lies(0x42), id="an unknown message"),
        pytest.param(lies(Message.STDOUT, said(0, b"")), id="output of nothing"),
        pytest.param(lies(Message.STDOUT, said(1 << 63, b"x")), id="output from far ahead"),
        pytest.param(lies(Message.CREDIT, struct.pack("<BI", 0, 0)), id="credit of nothing"),
        pytest.param(again(Message.STDOUT, said(0, b"x")), id="output twice"),
        pytest.param(again(Message.STDIN_CLOSED), id="stdin closed twice"),
        pytest.param(lies(Message.EXIT, b"\x02" + ENDED[1:]), id="an end of an unknown kind"),
        pytest.param(lies(Message.ATTACHED, attached(0, 0)), id="attached unasked"),
        pytest.param(lies(Message.DETACHED), id="detached unasked"),
        pytest.param(lies(Message.PROCESS, told(1 << 31), about=4000), id="a process nobody asked for"),
        pytest.param(lies(Message.LISTED, bytes(4), about=4000), id="a list nobody asked for"),
        pytest.param(lies(Message.RECEIPT, bytes(2), about=4000), id="a receipt nobody asked for"),
        pytest.param(lies(Message.POWERING, about=4000), id="a power switch nobody touched"),
    ],
)
async def test_a_lie_ends_the_connection_and_says_so(lie: Lie) -> None:
    async with conversation() as (guest, liar):
        process = await started(guest, liar)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lie, liar, process.id)
            with pytest.raises(BackendError, match="broke the protocol"):
                await guest.ping()  # whoever waits hears of it, whatever for
        while process._backlog:
            await process.receive()
        with pytest.raises(BackendError, match="broke the protocol"):
            await process.receive()
        await guest.release(process)


@pytest.mark.parametrize("receipt", [struct.pack("<H", 40), struct.pack("<HI", 1, 100), bytes(1)])
async def test_a_receipt_that_makes_no_sense_is_an_error(receipt: bytes) -> None:
    async with conversation() as (guest, liar), trio.open_nursery() as nursery:

        async def answer() -> None:
            await liar.say(Message.RECEIPT, (await liar.hear(Message.WAKE)).id, receipt)

        nursery.start_soon(answer)
        with pytest.raises(BackendError, match="RECEIPT"):
            await guest.wake(Identity(hostname="a", machine_id="0" * 32, unix_ns=1, entropy=bytes(32)))


async def test_an_agent_of_another_version_or_without_a_root_is_refused_by_name() -> None:
    for hello, words in (
        (struct.pack("<H", 9) + HELLO[2:], "version 9"),
        (HELLO[:2] + b"\x01" + HELLO[3:-4] + struct.pack("<I", 7) + b"no disk", "no disk"),
    ):
        ours, theirs = trio.testing.memory_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Liar(theirs).greet, hello)
            with pytest.raises(BackendError, match=words):
                async with connect(returning(ours)):
                    pytest.fail("it was let in")


async def test_output_of_an_earlier_conversation_reaches_nobody() -> None:
    async with conversation() as (guest, liar):
        process = await started(guest, liar)
        await liar.say(Message.STDOUT, process.id, said(0, b"old"), epoch=liar.epoch ^ 1)
        await liar.stream.send_all(b"\x7e\x85half a frame")
        await liar.say(Message.STDOUT, process.id, said(0, b"new"))
        assert await process.receive() == OutputChunk(stream=1, data=b"new")


async def test_output_in_tiny_alternating_pieces_costs_no_more_than_its_bytes() -> None:
    async with conversation() as (guest, liar):
        process = await started(guest, liar)
        for offset in range(2000):
            await liar.say(Message.STDOUT, process.id, said(2 * offset, b"o"))
            await liar.say(Message.STDERR, process.id, said(2 * offset + 1, b"e"))
        await liar.say(Message.PONG, (await _asked_ping(guest, liar)))
        assert len(process._backlog._runs) * process._backlog._runs.itemsize <= 8 * 4000
        heard = []
        while process._backlog:
            chunk = await process.receive()
            assert isinstance(chunk, OutputChunk)
            heard.append((chunk.offset, chunk.stream, chunk.data))
        assert heard == [(offset, offset % 2 + 1, b"oe"[offset % 2 : offset % 2 + 1]) for offset in range(4000)]


async def _asked_ping(guest: AgentGuest, liar: Liar) -> int:
    with trio.move_on_after(0.05):
        await guest.ping()
    return (await liar.hear(Message.PING)).id


async def test_credit_is_returned_as_output_is_received_and_not_before() -> None:
    async with conversation() as (guest, liar):
        process = await started(guest, liar)
        for offset in range(0, OUTPUT_WINDOW_BYTES, 32768):
            await liar.say(Message.STDOUT, process.id, said(offset, bytes(32768)))
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(0.05) as early:
            await liar.hear(Message.CREDIT)
        assert early.cancelled_caught
        received = 0
        while received < OUTPUT_WINDOW_BYTES:
            chunk = await process.receive()
            assert isinstance(chunk, OutputChunk)
            received += len(chunk.data)
        credit = await liar.hear(Message.CREDIT)
        assert struct.unpack("<BI", credit.body) == (1, OUTPUT_WINDOW_BYTES)


async def test_a_silent_guest_is_bounded_by_its_callers_only() -> None:
    async with conversation() as (guest, liar):
        del liar
        for wait in (guest.ping, guest.power_off):
            with pytest.raises(trio.TooSlowError), trio.fail_after(0.05):
                await wait()


async def test_the_end_of_the_stream_is_told_after_the_output_before_it() -> None:
    async with conversation() as (guest, liar):
        process = await started(guest, liar, stdin=True)
        await liar.say(Message.STDOUT, process.id, said(0, b"last words"))
        await liar.stream.aclose()
        assert await process.receive() == OutputChunk(stream=1, data=b"last words")
        for wait in (process.receive, guest.ping, lambda: process.send_stdin(b"x"), lambda: process.signal(9)):
            with pytest.raises(DependencyDown, match="connection ended"):
                await wait()


async def test_what_goes_wrong_inside_arrives_as_it_is() -> None:
    with pytest.raises(KeyError, match="plain"):
        await _raise_inside()


async def _raise_inside() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    liar = Liar(theirs)
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(liar.greet)
        try:
            async with connect(returning(ours)):
                raise KeyError("plain")
        except KeyError as error:
            failure = error
    assert failure is not None
    raise failure
