"""The host against a guest that answers its questions with lies: whoever asked hears so, at once, in bounded memory."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Awaitable, Callable, Sequence

import pytest
import trio
import trio.testing
from noid_exec_vsock.frames import Frame, Message, encode
from noid_exec_vsock.guest import AgentGuest

from noid.core.model.processes import LABEL_BYTES_MAX, ExecRequest
from noid.core.model.vms import Identity
from noid.errors import BackendError, Conflict, NoidError

from .liar import ENDED, Liar, attached, conversation, told

AT_ONCE_SECS = 20.0
PROCESS_ID = 0x80000001
MIB = 1 << 20

Ask = Callable[[AgentGuest], Awaitable[object]]


async def start(guest: AgentGuest) -> object:
    return await guest.start(ExecRequest(argv=("x",)))


async def attach(guest: AgentGuest) -> object:
    return await guest.attach(PROCESS_ID, 100)


async def wake(guest: AgentGuest) -> object:
    return await guest.wake(Identity(hostname="a", machine_id="0" * 32, unix_ns=1, entropy=bytes(32)))


QUESTIONS: dict[str, tuple[Ask, Message]] = {
    "start": (start, Message.START),
    "attach": (attach, Message.ATTACH),
    "list": (AgentGuest.processes, Message.LIST),
    "ping": (AgentGuest.ping, Message.PING),
    "wake": (wake, Message.WAKE),
    "power": (AgentGuest.power_off, Message.POWER),
}

Said = tuple[int, bytes]


def listed(count: int) -> Said:
    return Message.LISTED, struct.pack("<I", count)


def a_process(number: int = PROCESS_ID, **more: object) -> Said:
    return Message.PROCESS, told(number, **more)  # type: ignore[arg-type]  # what `told` takes


def receipt(count: int, item: bytes) -> Said:
    return Message.RECEIPT, struct.pack("<H", count) + item * count


AN_ITEM = struct.pack("<I", 1) + b"a" + b"\0" + bytes(12)
ENDLESS = struct.pack("<I", 1 << 30)

STARTED = (Message.STARTED, bytes(4))

LIES: dict[str, tuple[str, list[Said], str]] = {
    "half a start": ("start", [(Message.STARTED, bytes(3))], "STARTED of 3 bytes"),
    "a start that fails without words": ("start", [(Message.FAILED, b"\2")], "FAILED ends inside"),
    "a failure of a gigabyte": ("start", [(Message.FAILED, b"\2" + bytes(4) + ENDLESS)], "1073741824 bytes"),
    "a start that is a wake": ("start", [(Message.RECEIPT, bytes(2))], "answers nothing"),
    "output before the start": ("start", [(Message.STDOUT, bytes(9))], "not started yet"),
    "an end before the start": ("start", [(Message.EXIT, bytes(26))], "not started yet"),
    "an end twice": ("start", [STARTED, *[(Message.EXIT, ENDED)] * 2], "which there is not"),
    "refusals without end": ("start", [STARTED, *[(Message.ERROR, bytes(4))] * 2], "after the one before"),
    "attached before what was asked for": ("attach", [(Message.ATTACHED, attached(99, 100))], "where 100 was asked"),
    "attached behind the end": ("attach", [(Message.ATTACHED, attached(200, 150))], "begins at 200 and ends at 150"),
    "attached by half": ("attach", [(Message.ATTACHED, attached(100, 100)[:-1])], "ends inside its field 'flags'"),
    "attached twice": ("attach", [(Message.ATTACHED, attached(100, 100))] * 2, "answers nothing"),
    "output before attached": ("attach", [(Message.STDOUT, struct.pack("<Q", 100) + b"x")], "which there is not"),
    "a list that counts one too many": ("list", [a_process(), listed(2)], "LISTED counts other"),
    "a list that counts two too few": ("list", [a_process(), a_process(PROCESS_ID + 1), listed(0)], "LISTED counts"),
    "a list of four billion": ("list", [listed(0xFFFFFFFF)], "LISTED counts other"),
    "the same process twice": ("list", [a_process(), a_process()], "twice in one list"),
    "a process with a question's id": ("list", [a_process(7)], "an id that no process is given"),
    "a process whose log ends before it begins": ("list", [a_process(log=(9, 8))], "a log from 9 to 8"),
    "a process with a label of a gigabyte": (
        "list",
        [(Message.PROCESS, told(PROCESS_ID)[:-6] + ENDLESS + b"{}")],
        "ends inside its field 'label'",
    ),
    "a label that is too long": ("list", [a_process(label=bytes(LABEL_BYTES_MAX + 1))], "a label of 8193 bytes"),
    "half a process": ("list", [(Message.PROCESS, told(PROCESS_ID)[:20])], "PROCESS ends inside"),
    "a list without end": (
        "list",
        [a_process(PROCESS_ID + n) for n in range(513)],
        "more than 512 processes",
    ),
    "thousands of changes": ("wake", [receipt(3000, AN_ITEM)], "RECEIPT has 3000 items"),
    "a receipt with more than it says": ("wake", [receipt(1, AN_ITEM * 2)], "bytes too many"),
    "a receipt with a text of a gigabyte": ("wake", [receipt(1, ENDLESS)], "1073741824 bytes"),
    "a ping answered by a power switch": ("ping", [(Message.POWERING, b"")], "answers nothing"),
    "a power switch answered by a ping": ("power", [(Message.PONG, b"")], "answers nothing"),
}


async def answer(liar: Liar, question: Message, lie: Sequence[Said]) -> None:
    number = (await liar.hear(question)).id
    for kind, body in lie:
        await liar.say(kind, number, body)


async def ask_twice(ask: Ask, guest: AgentGuest) -> None:
    await ask(guest)
    await guest.ping()  # some lies come after a first answer that is none


@pytest.mark.parametrize("name", LIES)
async def test_whoever_asked_hears_that_the_answer_is_a_lie(name: str) -> None:
    what, lie, words = LIES[name]
    ask, question = QUESTIONS[what]
    async with conversation() as (guest, liar), trio.open_nursery() as nursery:
        nursery.start_soon(answer, liar, question, lie)
        with trio.fail_after(AT_ONCE_SECS), pytest.raises(BackendError, match=words):
            await ask_twice(ask, guest)


@pytest.mark.parametrize("what", QUESTIONS)
async def test_a_lie_ends_every_question_not_only_the_one_it_answers(what: str) -> None:
    heard: list[str] = []

    async def hear(guest: AgentGuest, name: str) -> None:
        with pytest.raises(BackendError, match="broke the protocol"):
            await QUESTIONS[name][0](guest)
        heard.append(name)

    async with conversation() as (guest, liar):
        with trio.fail_after(AT_ONCE_SECS):
            async with trio.open_nursery() as nursery:
                for name in [*QUESTIONS, "list"]:  # the second list waits for its turn
                    nursery.start_soon(hear, guest, name)
                await trio.testing.wait_all_tasks_blocked()
                await answer(liar, QUESTIONS[what][1], [(Message.HELLO, b"")])
    assert sorted(heard) == sorted([*QUESTIONS, "list"])


async def test_whoever_waits_for_a_detachment_hears_of_a_lie() -> None:
    async with conversation() as (guest, liar):
        with trio.move_on_after(0.01):
            await attach(guest)
        with trio.fail_after(AT_ONCE_SECS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(liar.say, Message.PONG, 4000)
                with pytest.raises(BackendError, match="broke the protocol"):
                    await attach(guest)


async def test_a_refused_list_does_not_stop_the_next_one() -> None:
    async with conversation() as (guest, liar), trio.open_nursery() as nursery:
        nursery.start_soon(answer, liar, Message.LIST, [(Message.ERROR, struct.pack("<I", 4) + b"busy")])
        with pytest.raises(BackendError, match="refused a message: busy"):
            await guest.processes()
        nursery.start_soon(answer, liar, Message.LIST, [listed(0)])
        with trio.fail_after(AT_ONCE_SECS):
            assert await guest.processes() == []


async def test_a_list_as_large_as_it_may_be_costs_a_few_mebibytes() -> None:
    worst = "\U0001f4a3".encode() * (LABEL_BYTES_MAX // 4 - 1) + b"\xff" * 4  # four bytes for every one that is wrong
    tracemalloc.start()
    try:
        async with conversation() as (guest, liar), trio.open_nursery() as nursery:
            told_of = [a_process(PROCESS_ID + n, label=worst) for n in range(512)]
            nursery.start_soon(answer, liar, Message.LIST, [*told_of, listed(512)])
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            found = await guest.processes()
            assert len(found) == 512
            assert tracemalloc.get_traced_memory()[1] - before < 24 * MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "noise",
    [
        pytest.param(b"\x7e" * 65536, id="flags"),
        pytest.param(b"\x7ea" * 32768, id="pieces too short for a frame"),
        pytest.param(b"\x7d" * 65536, id="a frame without end"),
        pytest.param(encode(Frame(type=Message.PONG, epoch=1, id=1))[1:] * 4000, id="frames of another epoch"),
        pytest.param(encode(Frame(type=Message.PONG, epoch=1, id=1))[:-3], id="half frames"),
    ],
)
async def test_noise_without_end_ends_the_connection_and_is_no_sign_of_life(noise: bytes) -> None:
    async with conversation() as (guest, liar):
        heard_at = guest.heard_at
        async with trio.open_nursery() as nursery:
            nursery.start_soon(make_noise, guest, liar, noise)
            with trio.fail_after(AT_ONCE_SECS), pytest.raises(BackendError, match="bytes without a message"):
                await guest.ping()
        assert guest.heard_at == heard_at


async def make_noise(guest: AgentGuest, liar: Liar, noise: bytes) -> None:
    noise *= max(1, 65536 // len(noise))
    while guest._connection.failure is None:
        await liar.stream.send_all(noise)
        await trio.testing.wait_all_tasks_blocked()  # the stream of this test holds what was not read


async def test_a_frame_without_end_is_not_kept() -> None:
    tracemalloc.start()
    try:
        async with conversation() as (guest, liar), trio.open_nursery() as nursery:
            nursery.start_soon(make_noise, guest, liar, b"\x7d" * 65536)
            before = tracemalloc.get_traced_memory()[0]
            with trio.fail_after(AT_ONCE_SECS), pytest.raises(BackendError, match="bytes without a message"):
                await guest.ping()
            assert tracemalloc.get_traced_memory()[1] - before < MIB
    finally:
        tracemalloc.stop()


async def test_a_guest_that_never_answers_is_owed_only_so_many_questions() -> None:
    async with conversation() as (guest, liar):
        refused: list[NoidError] = []

        async def give_up(ask: Ask) -> None:
            with trio.move_on_after(0):
                try:
                    await ask(guest)
                except (Conflict, NoidError) as error:
                    refused.append(error)

        async def swallow() -> None:
            while True:
                liar.heard += liar.decoder.feed(await liar.stream.receive_some(65536))
                liar.heard.clear()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(swallow)
            for _ in range(5000):
                await give_up(start)
                if refused:
                    break
            nursery.cancel_scope.cancel()
        assert "owes 4096 answers" in str(refused[0])
