"""Real shells on real terminals: what the serial backend meets in a guest, without a guest."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import termios
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio

from noid.core.backends import ConsoleListener

ENVIRONMENT = {"PATH": os.environ["PATH"], "TERM": "xterm", "HOME": "/root", "PS1": r"\[\e[1;32m\]\u@\h\[\e[0m\]:\w\$ "}


class Listener:
    """One who hears what a terminal prints."""

    def __init__(self, channel: trio.MemoryReceiveChannel[bytes]) -> None:
        self._channel = channel

    async def receive_some(self) -> bytes:
        try:
            return await self._channel.receive()
        except trio.EndOfChannel:
            return b""


class Terminal:
    """A pseudo terminal with a program on it; fulfils ``ConsolePort``. *heard* is all it ever printed."""

    def __init__(self, master: int, process: subprocess.Popen[bytes]) -> None:
        self.heard = bytearray()
        self.typed = bytearray()
        self.process = process
        self.noise: Callable[[bytes], list[bytes]] = lambda data: [data]
        self._stream = trio.lowlevel.FdStream(master)
        self._listeners: set[trio.MemorySendChannel[bytes]] = set()

    async def write(self, data: bytes) -> None:
        self.typed += data
        await self._stream.send_all(data)

    @contextlib.asynccontextmanager
    async def listen(self) -> AsyncIterator[ConsoleListener]:
        send, receive = trio.open_memory_channel[bytes](1 << 20)
        self._listeners.add(send)
        try:
            yield Listener(receive)
        finally:
            self._listeners.discard(send)

    async def drain(self) -> None:
        """Take what is printed, for ever, as a console does."""
        with contextlib.suppress(OSError, trio.ClosedResourceError, trio.BrokenResourceError):
            while data := await self._stream.receive_some(65536):
                self.heard += data
                for piece in self.noise(data):
                    for listener in self._listeners:
                        listener.send_nowait(piece)
        for listener in self._listeners:
            listener.close()


@contextlib.asynccontextmanager
async def open_terminal(*argv: str | Path, **env: str) -> AsyncIterator[Terminal]:
    """Run *argv* as the leader of a session on a terminal of its own; everything of it is gone afterwards."""
    master, slave = pty.openpty()
    os.set_blocking(master, False)

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    with contextlib.ExitStack() as opened:
        process = subprocess.Popen(  # noqa: ASYNC220  # returns at once
            [str(word) for word in argv],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=ENVIRONMENT | env,
            preexec_fn=take_terminal,
        )
        os.close(slave)
        opened.callback(process.wait)
        opened.callback(end_session, process.pid)
        terminal = Terminal(master, process)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(terminal.drain)
            try:
                yield terminal
            finally:
                nursery.cancel_scope.cancel()
        await terminal._stream.aclose()


def end_session(leader: int) -> None:
    """Kill every process on the terminal of *leader*."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            session = int((entry / "stat").read_text().rpartition(")")[2].split()[3])
            if session == leader:
                os.kill(int(entry.name), signal.SIGKILL)


@pytest.fixture
def on_a_terminal() -> Callable[..., contextlib.AbstractAsyncContextManager[Terminal]]:
    """Run a program on a terminal of its own."""
    return open_terminal
