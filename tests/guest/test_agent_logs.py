"""Processes outlive who started them: logs, offsets, gaps, terminals, against the real agent."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from noid_exec_vsock.guest import AgentGuest, connect
from noid_exec_vsock.process import OUTPUT_WINDOW_BYTES, GuestProcess

from noid.core.model.guest_processes import OutputChunk, ProcessExit
from noid.core.model.processes import ExecRequest, Gap, TerminalSize
from noid.errors import Conflict, InvalidRequest, NotFound
from noid.testing.vmm_rig import run

from .conftest import NativeAgent, to, until


def shell(script: str, **fields: object) -> ExecRequest:
    return ExecRequest(argv=("sh", "-c", script), **fields)  # type: ignore[arg-type]  # the fields' own types


async def rest(process: GuestProcess, at: int = 0) -> tuple[bytes, list[Gap], ProcessExit]:
    """Return everything up to the end, having checked that offsets and gaps join."""
    said, gaps = bytearray(), []
    while not isinstance(received := await process.receive(), ProcessExit):
        if isinstance(received, Gap):
            assert received.start == at
            gaps.append(received)
        else:
            assert received.offset == at
            said += received.data
        at = received.end
    return bytes(said), gaps, received


async def said(process: GuestProcess, pattern: bytes) -> bytes:
    """Return what it says up to *pattern*."""
    heard = bytearray()
    while not re.search(pattern, heard):
        received = await process.receive()
        assert isinstance(received, OutputChunk), f"{received} after {bytes(heard)!r}"
        heard += received.data
    return bytes(heard)


async def test_a_process_goes_on_without_its_host_and_the_next_one_resumes_where_the_first_was(
    agent: NativeAgent, tmp_path: Path
) -> None:
    script = f"echo one; while [ ! -e {tmp_path}/go ]; do sleep 0.01; done; echo two; echo err >&2; exit 5"
    async with connect(to(agent)) as guest:
        first = await guest.start(shell(script, label="mine"))
        assert await first.receive() == OutputChunk(stream=1, data=b"one\n", offset=0)
    (tmp_path / "go").touch()
    async with connect(to(agent)) as guest:
        assert guest.hello.agent_starts == 1
        (told,) = await guest.processes()
        assert (told.id, told.pid, told.label, told.tty, told.stdin) == (first.id, first.pid, "mine", False, False)
        again = await guest.attach(first.id, 4)
        assert (again.id, again.pid) == (first.id, first.pid)
        assert (await rest(again, 4))[0] == b"two\nerr\n"
        from_the_start = await guest.attach(first.id, 0)
        assert await rest(from_the_start) == (b"one\ntwo\nerr\n", [], ProcessExit(code=5))
        (told,) = await guest.processes()
        assert (told.running, told.exit, told.log_start, told.log_end) == (False, ProcessExit(code=5), 0, 12)
        assert told.exit is not None
        assert told.exit.usage is not None
        await guest.release(first.id)
        assert await guest.processes() == []
        with pytest.raises(NotFound):
            await guest.attach(first.id, 0)


async def test_what_the_ring_has_lost_is_told_as_a_gap_of_exactly_those_bytes(
    agent: NativeAgent, tmp_path: Path
) -> None:
    everything = b"".join(b"%d\n" % number for number in range(1, 100001))
    async with connect(to(agent)) as guest:
        script = f"while [ ! -e {tmp_path}/go ]; do sleep 0.01; done; exec seq 100000"
        process = await guest.start(shell(script, log_bytes=8192))
    (tmp_path / "go").touch()
    async with connect(to(agent)) as guest:

        async def ended() -> bool:
            return not (await guest.processes())[0].running

        with trio.fail_after(30):
            while not await ended():  # noqa: ASYNC110  # the guest tells nobody who is not attached
                await trio.sleep(0.01)
        output, gaps, end = await rest(await guest.attach(process.id, 10), 10)
        assert end == ProcessExit(code=0)
        assert gaps == [Gap(start=10, end=len(everything) - 8192)]
        assert output == everything[-8192:]
        with pytest.raises(InvalidRequest, match="not written that much"):
            await guest.attach(process.id, len(everything) + 1)


async def test_a_host_that_reads_slowly_loses_nothing_however_small_the_ring(guest: AgentGuest) -> None:
    process = await guest.start(shell("exec seq 200000", log_bytes=4096))
    await until(lambda: process._backlog.size == OUTPUT_WINDOW_BYTES)
    output, gaps, _ = await rest(process)
    assert (len(output), gaps) == (len("".join(f"{number}\n" for number in range(1, 200001))), [])


async def test_whoever_attaches_anew_takes_the_place_of_who_was_attached(guest: AgentGuest) -> None:
    first = await guest.start(shell("cat", stdin=True))
    await first.send_stdin(b"a")
    await said(first, b"a")
    second = await guest.attach(first.id, 0)
    with pytest.raises(Conflict):
        await first.receive()
    assert second.stdin_taken == 1
    await second.send_stdin(b"b")
    await second.close_stdin()
    assert (await rest(second))[0] == b"ab"


async def test_an_attach_that_is_cancelled_leaves_the_process_to_itself(guest: AgentGuest) -> None:
    process = await guest.start(shell("echo x; exec sleep 1000"))
    for _ in range(5):
        with trio.move_on_after(0.0001):
            await guest.attach(process.id, 0)
    again = await guest.attach(process.id, 0)
    assert await again.receive() == OutputChunk(stream=1, data=b"x\n")
    await guest.release(again)


async def test_of_those_that_ended_unheard_the_latest_sixty_four_stay(agent: NativeAgent) -> None:
    async with connect(to(agent)) as guest:
        ids = [(await guest.start(shell(f"echo {number}"))).id for number in range(70)]
        assert len(await guest.processes()) == 70
    async with connect(to(agent)) as guest:
        await until(lambda: not agent.children())
        listed = {process.id for process in await guest.processes()}
        assert len(listed) == 64
        assert listed < set(ids)


async def test_end_gives_a_grace_and_what_was_said_until_then_is_kept(guest: AgentGuest) -> None:
    polite = await guest.start(shell("trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.01; done"))
    await said(polite, b"up")
    await polite.end(30.0)
    output, _, end = await rest(polite, 3)
    assert output.endswith(b"bye\n")
    assert end == ProcessExit(code=3)
    stubborn = await guest.start(shell("trap '' TERM; echo up; while :; do sleep 0.01; done"))
    await said(stubborn, b"up")
    await stubborn.end(0.2)
    assert (await rest(stubborn, 3))[2] == ProcessExit(code=None, signal=signal.SIGKILL)


async def test_a_terminal_has_a_size_that_changes_with_a_signal(guest: AgentGuest) -> None:
    script = "stty size; trap 'stty size; exit' WINCH; echo up; while :; do sleep 0.01; done"
    process = await guest.start(shell(script, tty=TerminalSize(columns=91, rows=33)))
    assert b"33 91\r\n" in await said(process, b"up")
    await process.resize(TerminalSize(columns=120, rows=50))
    assert b"50 120\r\n" in await said(process, b"120\r\n")
    assert isinstance((await rest(process, process._backlog.start))[2], ProcessExit)


async def test_a_terminal_takes_keys_interrupt_and_the_end_of_input(guest: AgentGuest) -> None:
    size = TerminalSize(columns=80, rows=24)
    process = await guest.start(shell("tty; echo $TERM; exec cat", tty=size, stdin=True))
    assert re.match(rb"/dev/pts/\d+\r\nxterm\r\n", await said(process, b"xterm\r\n"))
    await process.send_stdin(b"typed\n")
    assert await said(process, b"typed\r\ntyped\r\n")
    await process.send_stdin(b"no newline")
    await process.close_stdin()
    assert (await rest(process, process._backlog.start))[2] == ProcessExit(code=0)
    process = await guest.start(shell("echo up; exec sleep 1000", tty=size, stdin=True))
    await said(process, b"up")
    await process.send_stdin(b"\x03")
    assert (await rest(process, process._backlog.start))[2] == ProcessExit(code=None, signal=signal.SIGINT)


async def test_everything_written_to_a_terminal_before_the_end_arrives(guest: AgentGuest) -> None:
    done = await guest.start(shell("seq 20000", tty=TerminalSize(columns=80, rows=24)))
    assert (await rest(done))[0] == b"".join(b"%d\r\n" % number for number in range(1, 20001))


async def test_memory_comes_back_with_the_process(guest: AgentGuest, agent: NativeAgent) -> None:
    await run(guest, "seq", "1000")
    before_kib = agent.rss_kib()
    for _ in range(8):
        process = await guest.start(shell("exec seq 400000"))
        await rest(process)
        await guest.release(process)
    await guest.ping()
    assert agent.rss_kib() <= before_kib + 400
    assert await guest.processes() == []


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=15, deadline=None
)
@given(
    writes=st.lists(st.tuples(st.sampled_from([1, 2]), st.integers(1, 9000)), min_size=1, max_size=8),
    stays=st.lists(st.integers(0, 12000), max_size=3),
    ring=st.sampled_from([4096, 8192, 65536]),
)
async def test_any_coming_and_going_hears_each_byte_once_or_of_the_gap(
    agent: NativeAgent, writes: list[tuple[int, int]], stays: list[int], ring: int
) -> None:
    script = "; ".join(f"printf '%0{size}d' {number} >&{stream}" for number, (stream, size) in enumerate(writes))
    expected = b"".join(b"%0*d" % (size, number) for number, (_, size) in enumerate(writes))
    number, at = 0, 0
    heard: dict[int, bytes] = {}
    for stay in [*stays, None]:
        async with connect(to(agent)) as guest:
            if not number:
                process = await guest.start(shell(script, log_bytes=ring))
                number = process.id
            else:
                process = await guest.attach(number, at)
            target = at + stay if stay is not None else None
            while target is None or at < target:
                received = await process.receive()
                if isinstance(received, ProcessExit):
                    break
                start = received.start if isinstance(received, Gap) else received.offset
                assert start == at
                if isinstance(received, OutputChunk):
                    heard[at] = received.data
                else:
                    assert received.end <= len(expected)
                at = received.end
            if stay is None:
                await guest.release(process)
    assert at == len(expected)
    if all(stream == 1 for stream, _ in writes):  # two streams are read in some order
        for offset, data in heard.items():
            assert expected[offset : offset + len(data)] == data
