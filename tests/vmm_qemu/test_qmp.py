"""The QMP client against scripted transcripts: what QEMU says, cut and disturbed in every way that happens."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
import trio.testing
from noid_vmm_qemu.qmp import LINE_BYTES_MAX, Qmp, QmpError, QmpEvent

from noid.errors import DependencyDown

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": "x"}, "capabilities": []}}
SHUTDOWN = {"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-shutdown"}, "timestamp": {"seconds": 1}}


class Script:
    """The other end of the connection."""

    def __init__(self) -> None:
        self.ours, self.theirs = trio.testing.memory_stream_pair()
        self.events: list[QmpEvent] = []
        self.qmp = Qmp(self.theirs, self.events.append)
        self._buffer = b""

    async def say(self, *messages: Any) -> None:
        for message in messages:
            await self.ours.send_all(json.dumps(message).encode() + b"\r\n")

    async def hear(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._buffer += await self.ours.receive_some()
        line, _, self._buffer = self._buffer.partition(b"\n")
        return dict(json.loads(line))

    async def answer(self, value: Any) -> dict[str, Any]:
        command = await self.hear()
        await self.say({"return": value, "id": command["id"]})
        return command


@pytest.fixture
def script() -> Script:
    return Script()


async def test_negotiation_returns_the_version(script: Script, nursery: trio.Nursery) -> None:
    await script.say(GREETING)
    nursery.start_soon(script.answer, {})

    assert await script.qmp.negotiate() == "7.2.22"


async def test_a_command_gets_its_own_answer_and_events_on_the_way_are_delivered(
    script: Script, nursery: trio.Nursery
) -> None:
    async def qemu() -> None:
        command = await script.hear()
        assert command == {"execute": "blockdev-del", "arguments": {"node-name": "n"}, "id": 1}
        await script.say(SHUTDOWN, {"return": "of a command long ago", "id": 77}, {"return": {"ok": 1}, "id": 1})

    nursery.start_soon(qemu)

    assert await script.qmp.execute("blockdev-del", {"node-name": "n"}) == {"ok": 1}
    assert [event.name for event in script.events] == ["SHUTDOWN"]


async def test_bytes_may_be_cut_anywhere(script: Script, nursery: trio.Nursery) -> None:
    async def qemu() -> None:
        await script.hear()
        text = b"".join(json.dumps(part).encode() + b"\n" for part in (SHUTDOWN, {"return": {"ü": "\n"}, "id": 1}))
        for index in range(len(text)):
            await script.ours.send_all(text[index : index + 1])
            await trio.testing.wait_all_tasks_blocked()

    nursery.start_soon(qemu)

    assert await script.qmp.execute("x") == {"ü": "\n"}
    assert len(script.events) == 1


async def test_a_refusal_carries_qemus_words(script: Script, nursery: trio.Nursery) -> None:
    async def qemu() -> None:
        await script.hear()
        await script.say({"error": {"class": "GenericError", "desc": "Node 'n' is busy"}, "id": 1})

    nursery.start_soon(qemu)

    with pytest.raises(QmpError, match="QEMU refused x: Node 'n' is busy"):
        await script.qmp.execute("x")


async def test_a_cancelled_commands_answer_is_not_taken_for_the_next_ones(
    script: Script, nursery: trio.Nursery
) -> None:
    with trio.CancelScope() as scope:
        nursery.start_soon(script.hear)

        async def cancel() -> None:
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()

        nursery.start_soon(cancel)
        await script.qmp.execute("slow")
    assert scope.cancelled_caught
    await script.say({"return": "slow", "id": 1})
    nursery.start_soon(script.answer, "quick")

    assert await script.qmp.execute("quick") == "quick"


async def test_commands_of_many_tasks_take_turns(script: Script, nursery: trio.Nursery) -> None:
    got: list[Any] = []

    async def ask(number: int) -> None:
        got.append((number, await script.qmp.execute("echo", {"n": number})))

    async with trio.open_nursery() as askers:
        for number in range(5):
            askers.start_soon(ask, number)
        for _ in range(5):
            command = await script.hear()
            await script.say({"return": command["arguments"]["n"], "id": command["id"]})

    assert sorted(got) == [(number, number) for number in range(5)]


async def test_the_end_is_told_to_everybody_and_events_before_it_are_not_lost(
    script: Script, nursery: trio.Nursery
) -> None:
    ends: list[str] = []

    async def drained() -> None:
        await script.qmp.drained()
        ends.append("drained")

    async def refused() -> None:
        with pytest.raises(DependencyDown, match="process ended"):
            await script.qmp.execute("x")
        ends.append("refused")

    async with trio.open_nursery() as waiters:
        for waiter in (drained, drained, refused):
            waiters.start_soon(waiter)
        await script.hear()
        await script.say(SHUTDOWN)
        await script.ours.aclose()

    assert sorted(ends) == ["drained", "drained", "refused"]
    assert [event.data["reason"] for event in script.events] == ["guest-shutdown"]
    with pytest.raises(DependencyDown):
        await script.qmp.execute("y")


async def test_a_waiter_that_is_cancelled_while_reading_leaves_the_reading_to_another(
    script: Script, nursery: trio.Nursery
) -> None:
    scope = trio.CancelScope()

    async def first() -> None:
        with scope:
            await script.qmp.drained()

    nursery.start_soon(first)
    await trio.testing.wait_all_tasks_blocked()
    nursery.start_soon(script.answer, "here")

    async def leave() -> None:
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()

    nursery.start_soon(leave)
    assert await script.qmp.execute("x") == "here"


async def test_closing_tells_whoever_waits(script: Script, nursery: trio.Nursery) -> None:
    async def ask() -> None:
        with pytest.raises(DependencyDown, match="let go"):
            await script.qmp.execute("x")

    async with trio.open_nursery() as askers:
        askers.start_soon(ask)
        await script.hear()
        await script.qmp.aclose()


@pytest.mark.parametrize("nonsense", [b"HTTP/1.1 400 Bad Request\n", b"[1, 2]\n", b"\xff\xfe\n"])
async def test_somebody_else_on_the_socket_is_named(script: Script, nonsense: bytes) -> None:
    await script.ours.send_all(nonsense)

    with pytest.raises(DependencyDown, match="what answers is not QEMU"):
        await script.qmp.negotiate()


async def test_a_line_without_end_is_given_up(script: Script, nursery: trio.Nursery) -> None:
    nursery.start_soon(script.ours.send_all, b"x" * (LINE_BYTES_MAX + 1))

    with pytest.raises(DependencyDown, match="over"):
        await script.qmp.negotiate()
