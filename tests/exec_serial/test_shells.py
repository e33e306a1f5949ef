"""Commands through real shells on real terminals: whatever the shell does to its terminal, the answer is right."""

from __future__ import annotations

import contextlib
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from noid_exec_serial import guest as guests
from noid_exec_serial.guest import SerialGuest, connect
from noid_exec_serial.line import find_shell

from noid.core.model.guest_processes import OutputChunk, ProcessExit
from noid.core.model.processes import ExecRequest, Gap, TerminalSize
from noid.errors import BackendError, Conflict, DependencyDown, InvalidRequest, Unsupported

Terminals = Any  # see conftest.py
PATIENCE_SECS = 30
FANCY = {
    "PS1": r"\[\e]0;title\a\e[1;32m\]\u@\h\[\e[0m\]:\w\n\$ ",
    "PROMPT_COMMAND": "printf '@%s x 0 0 %s@\\n' prompt prompt; printf no-line-feed",
}
SHELLS = {"bash": ("bash", "--norc", "-i"), "sh": ("sh", "-i"), "busybox": ("busybox", "ash", "-i")}


@pytest.fixture(params=list(SHELLS))
async def shell(request: pytest.FixtureRequest, on_a_terminal: Terminals) -> AsyncIterator[tuple[SerialGuest, Any]]:
    words = SHELLS[request.param]
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is missing")
    async with on_a_terminal(*words, **FANCY) as terminal:
        with trio.fail_after(PATIENCE_SECS):
            async with connect(terminal) as guest:
                yield guest, terminal


async def run(
    guest: SerialGuest, *argv: str, stdin: bytes | None = None, **request: Any
) -> tuple[int | None, bytes, bytes]:
    process = await guest.start(ExecRequest(argv=argv, stdin=stdin is not None, **request))
    return await finish(process, stdin)


async def finish(process: Any, stdin: bytes | None = None) -> tuple[int | None, bytes, bytes]:
    if stdin is not None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(feed, process, stdin)
            return await output_of(process)
    return await output_of(process)


async def feed(process: Any, stdin: bytes) -> None:
    await process.send_stdin(stdin)
    await process.close_stdin()


async def output_of(process: Any, offset: int = 0) -> tuple[int | None, bytes, bytes]:
    output = {1: b"", 2: b""}
    while not isinstance(item := await process.receive(), ProcessExit):
        assert isinstance(item, OutputChunk), item
        assert item.offset == offset
        offset = item.end
        output[item.stream] += item.data
    return item.code, output[1], output[2]


async def test_output_input_environment_and_exit_code_are_exact(shell: tuple[SerialGuest, Any]) -> None:
    guest, terminal = shell
    every_byte = bytes(range(256)) * 8
    words = ["", "'", "\n", "x\n\n", "-n", "!!", "$(id)", "\x03\x04\x11\x13\x15\x1b[A", "\t\t", "é\udcff", "a=b"]

    assert await run(guest, "printf", "no line feed") == (0, b"no line feed", b"")
    assert await run(guest, "sh", "-c", "echo out; echo err >&2; exit 7") == (7, b"out\n", b"err\n")
    assert await run(guest, "cat", stdin=every_byte) == (0, every_byte, b"")
    expected = "".join(f"{word}." for word in words).encode("utf-8", "surrogateescape")
    assert await run(guest, "printf", "%s.", *words) == (0, expected, b"")
    secret = "s3cr\x03et\n'word"
    assert await run(guest, "sh", "-c", 'printf %s "$A"; pwd', env={"A": secret}, cwd="/") == (
        0,
        f"{secret}/\n".encode(),
        b"",
    )
    assert (await run(guest, "no-such-program"))[0] == 127
    assert (await run(guest, "sh", "-c", "kill -9 $$"))[0] == 137
    assert await run(guest, "sh", "-c", "sleep 5 & echo started") == (0, b"started\n", b"")
    assert b"s3cr" not in terminal.heard
    size = 100_000
    assert len((await run(guest, "head", "-c", str(size), "/dev/zero"))[1]) == size
    assert await guest.ping() < PATIENCE_SECS


async def test_what_cannot_be_is_refused_and_the_shell_lives_on(shell: tuple[SerialGuest, Any]) -> None:
    guest, _ = shell
    with pytest.raises(InvalidRequest, match="no user 'nosuch'"):
        await run(guest, "true", user="nosuch")
    with pytest.raises(InvalidRequest, match="cannot enter the directory '/nosuch'"):
        await run(guest, "true", cwd="/nosuch")
    with pytest.raises(InvalidRequest, match="at most"):
        await run(guest, "x" * (1 << 20) + "x")
    with pytest.raises(Unsupported):
        await run(guest, "true", tty=TerminalSize(columns=80, rows=24))
    with pytest.raises(Unsupported):
        await guest.processes()
    assert await run(guest, "echo", "alive") == (0, b"alive\n", b"")


async def test_commands_take_turns_and_can_be_ended(shell: tuple[SerialGuest, Any]) -> None:
    guest, _ = shell
    first = await guest.start(
        ExecRequest(argv=("sh", "-c", "trap 'echo term; exit 3' TERM; echo up; while :; do sleep 0.05; done"))
    )
    assert await first.receive() == OutputChunk(stream=1, data=b"up\n", offset=0)
    second = await guest.start(ExecRequest(argv=("echo", "second")))
    third = await guest.start(ExecRequest(argv=("echo", "third")))
    assert await guest.ping() < PATIENCE_SECS  # also while a command runs
    await second.end(0)
    with pytest.raises(Conflict, match="never ran"):
        await finish(second)
    await first.end(grace_secs=PATIENCE_SECS)
    code, out, _ = await output_of(first, 3)
    assert (code, out) == (3, b"term\n")
    assert await finish(third) == (0, b"third\n", b"")
    stubborn = await guest.start(ExecRequest(argv=("sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.05; done")))
    await stubborn.receive()
    await stubborn.end(grace_secs=0.1)
    assert (await output_of(stubborn, 3))[0] == 137
    interrupted = await guest.start(ExecRequest(argv=("sleep", "1000")))
    await interrupted.signal(signal.SIGINT)
    assert (await finish(interrupted))[0] == 130


async def test_a_reader_who_does_not_read_stops_the_command_and_nothing_else(on_a_terminal: Terminals) -> None:
    async with on_a_terminal("sh", "-i") as terminal, connect(terminal) as guest:
        with trio.fail_after(PATIENCE_SECS):
            process = await guest.start(ExecRequest(argv=("head", "-c", "3000000", "/dev/zero")))
            while b"\x13" not in terminal.typed:  # noqa: ASYNC110  # nothing else tells
                await trio.sleep(0.02)
            heard = -1
            while heard != len(terminal.heard):  # until the last of what was under way has come
                heard = len(terminal.heard)
                await trio.sleep(0.2)
            assert heard < 2_000_000
            assert (await finish(process))[1] == bytes(3_000_000)


async def test_kernel_messages_and_strangers_output_are_not_the_commands(on_a_terminal: Terminals) -> None:
    pieces = 0

    def noisy(data: bytes) -> list[bytes]:
        nonlocal pieces
        pieces += 1
        half = len(data) // 2
        message = f"[ {pieces:4}.123456] eth0: link is up\r\n".encode()
        return [data[:half], message, data[half:]] if half > 100 else [data]

    async with on_a_terminal("sh", "-i") as terminal, connect(terminal) as guest:
        terminal.noise = noisy
        with trio.fail_after(PATIENCE_SECS):
            code, out, _ = await run(guest, "seq", "1", "20000")
    assert (code, out) == (0, b"".join(b"%d\n" % number for number in range(1, 20001)))


async def test_damaged_output_is_reported_as_a_gap_and_the_exit_code_stays_right(on_a_terminal: Terminals) -> None:
    def lossy(data: bytes) -> list[bytes]:
        return [data.replace(b" d 1 0 0 ", b" d 1 0 9 ")]

    async with on_a_terminal("sh", "-i") as terminal, connect(terminal) as guest:
        terminal.noise = lossy
        with trio.fail_after(PATIENCE_SECS):
            process = await guest.start(
                ExecRequest(argv=("sh", "-c", "head -c 900 /dev/zero; sleep 0.3; echo end; exit 5"))
            )
            gap = await process.receive()
            assert isinstance(gap, Gap)
            code, out, _ = await output_of(process, gap.end)
    assert (code, out) == (5, b"end\n")


async def test_what_an_earlier_connection_left_behind_is_ended(on_a_terminal: Terminals) -> None:
    async with on_a_terminal("sh", "-i") as terminal:
        with trio.fail_after(PATIENCE_SECS):
            # An agent that is killed says nothing more: its connection is never closed, it only falls silent.
            async with trio.open_nursery() as nursery:
                silent = SilentAfter(terminal)
                guest = SerialGuest(silent, nursery)
                await find_shell(silent)
                process = await guest.start(ExecRequest(argv=("sleep", "1000")))
                silent.silent = True
                nursery.cancel_scope.cancel()
            async with connect(terminal) as successor:
                assert await run(successor, "echo", "mine") == (0, b"mine\n", b"")
                assert not Path(f"/proc/{process.pid}").exists()


class SilentAfter:
    """A console that types nothing any more once *silent*."""

    def __init__(self, terminal: Any) -> None:
        self.silent = False
        self._terminal = terminal

    async def write(self, data: bytes) -> None:
        if not self.silent:
            await self._terminal.write(data)

    def listen(self) -> contextlib.AbstractAsyncContextManager[Any]:
        listening: contextlib.AbstractAsyncContextManager[Any] = self._terminal.listen()
        return listening


async def test_a_login_prompt_is_called_one(on_a_terminal: Terminals) -> None:
    async with on_a_terminal("sh", "-c", "while printf 'debian login: '; do read name; done") as terminal:
        with pytest.raises(BackendError, match="asks for a login"), trio.fail_after(PATIENCE_SECS):
            async with connect(terminal):
                pass


async def test_a_shell_that_is_busy_with_something_else_is_not_disturbed(
    on_a_terminal: Terminals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guests, "_FIND_SECS", 1.0)
    monkeypatch.setattr("noid_exec_serial.line.ANSWER_SECS", 1.0)
    async with on_a_terminal("sh", "-i") as terminal:
        with trio.fail_after(PATIENCE_SECS):
            async with connect(terminal) as guest:
                await terminal.write(b"cat >/dev/null\n")
                for _ in range(2):
                    with pytest.raises(DependencyDown, match="no shell answers"):
                        await run(guest, "echo", "s3cret")
                assert b"s3cret" not in terminal.typed
                await terminal.write(b"\x04")
                assert await run(guest, "echo", "back") == (0, b"back\n", b"")


async def test_a_root_without_stty_is_refused_before_anything_is_typed(
    on_a_terminal: Terminals, tmp_path: Path
) -> None:
    for name in ("sh", "dd"):
        (tmp_path / name).symlink_to(shutil.which(name) or "/nonexistent")
    async with on_a_terminal("sh", "-i", PATH=str(tmp_path)) as terminal:
        with trio.fail_after(PATIENCE_SECS):
            async with connect(terminal) as guest:
                with pytest.raises(BackendError, match="no working stty"):
                    await run(guest, "echo", "s3cret")
    assert b"s3cret" not in terminal.typed
