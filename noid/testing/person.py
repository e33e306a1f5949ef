"""Somebody at a terminal: what is seen there, what is typed, how large it is, and whether it is theirs again.

A pseudo-terminal of the kernel, with the command as the leader of its session: keys like Ctrl+C, a changed size and a
terminal that goes away are told to it as to a command in a real one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol

PATIENCE_SECS = 60.0
COLUMNS, ROWS = 100, 30


class Typist(Protocol):
    """Who types commands: where, and with which environment."""

    cwd: Path

    @property
    def environment(self) -> Mapping[str, str]:
        """What the shell has exported."""
        ...

    def argv(self, *args: str) -> list[str | bytes]:
        """Return the words of a ``noid`` command."""
        ...


class Person:
    """Somebody at a terminal of `COLUMNS` by `ROWS` in which *command* runs. Leave it with ``with``.

    Attributes:
        terminal: The person's end of it.
        running: The command.
        seen: What was seen and not yet waited for.
    """

    def __init__(self, command: list[str | bytes], cwd: Path, environment: Mapping[str, str]) -> None:
        self.terminal, self._theirs = pty.openpty()
        self.resize(COLUMNS, ROWS)
        self.before = termios.tcgetattr(self._theirs)
        fd = self._theirs
        # Not start_new_session: the terminal has to become the session's, and setsid(1) does both.
        self.running = subprocess.Popen(
            ["setsid", "--ctty", *command], cwd=cwd, env=environment, stdin=fd, stdout=fd, stderr=fd
        )
        self.seen = b""

    @classmethod
    def typing(cls, typist: Typist, *arguments: str) -> Person:
        """Return one who types ``noid`` with *arguments*."""
        return cls(typist.argv(*arguments), typist.cwd, typist.environment)

    def __enter__(self) -> Person:
        """Use it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the command, and the terminal."""
        self.running.kill()
        self.running.wait(PATIENCE_SECS)
        os.close(self._theirs)
        os.close(self.terminal)

    def sees(self, wanted: bytes) -> bytes:
        """Wait for *wanted* and return everything up to it."""
        deadline = time.monotonic() + PATIENCE_SECS
        while wanted not in self.seen:
            assert select.select([self.terminal], [], [], max(deadline - time.monotonic(), 0))[0], self.seen
            self.seen += os.read(self.terminal, 65536)
        found, _, self.seen = self.seen.partition(wanted)
        return found

    def types(self, keys: bytes) -> None:
        """Type *keys*, however many: as a terminal does, no faster than they are read, and reading what is shown."""
        os.set_blocking(self.terminal, False)
        deadline = time.monotonic() + PATIENCE_SECS
        try:
            while keys:
                left = max(deadline - time.monotonic(), 0)
                readable, writable, _ = select.select([self.terminal], [self.terminal], [], left)
                assert readable or writable, f"{len(keys)} bytes are not read"
                if readable:
                    self.seen += os.read(self.terminal, 65536)
                if writable:
                    with contextlib.suppress(BlockingIOError):
                        keys = keys[os.write(self.terminal, keys[:4096]) :]
        finally:
            os.set_blocking(self.terminal, True)

    def resize(self, columns: int, rows: int) -> None:
        """Change the size of the terminal; the command hears of it."""
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def has_the_terminal_back(self) -> bool:
        """Return whether the terminal is set as it was before the command."""
        return bool(termios.tcgetattr(self._theirs) == self.before)
