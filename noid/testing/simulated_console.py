"""The serial console of a simulated machine: a shell on a line that echoes, fed by a pipe, and a log of all it says.

Like a VMM's it holds both ends of the pipe, so that who types may come and go, and appends to the log whoever reads it.
The shell lives in the guest's memory, so a clone goes on in the middle of a line. Standard library only.
"""

from __future__ import annotations

import base64
import fcntl
import os
import selectors
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from noid.testing import simulated_ring as ring
from noid.testing.simulated_guest import CONSOLE_ID, Refused, SimulatedGuest

PROMPT = b"# "
_UNREAD_BYTES = 4096
_READ_BYTES = 4096
_PRINT_BYTES = 65536
_LINE_BYTES_MAX = 1024
_INTERRUPT, _END, _BACKSPACE, _KILL_LINE = 0x03, 0x04, 0x7F, 0x15


class SimulatedConsole:
    """Runs what is typed into the pipe *line*, made anew, in *guest*, and appends what is printed to *log*."""

    def __init__(self, line: Path, log: Path, selector: selectors.BaseSelector) -> None:
        line.unlink(missing_ok=True)
        os.mkfifo(line, 0o600)
        self._line = os.open(line, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.fcntl(self._line, fcntl.F_SETPIPE_SZ, _UNREAD_BYTES)
        self._log: BinaryIO | FileIO = log.open("ab", buffering=0)
        self._selector = selector
        self._guest: SimulatedGuest | None = None

    @classmethod
    def on_standard_streams(cls, selector: selectors.BaseSelector) -> SimulatedConsole:
        """Return one whose line are this process' standard input and output."""
        console = cls.__new__(cls)
        console._line, console._log = 0, FileIO(1, "w", closefd=False)
        os.set_blocking(0, False)
        console._selector, console._guest = selector, None
        return console

    def start(self, guest: SimulatedGuest) -> None:
        """Begin with *guest*: one that has just booted is greeted, another goes on where it was."""
        self._guest = guest
        if "console" not in guest.memory:
            guest.memory["console"] = {"line": "", "pid": None, "printed": 0}
            self._say(b"simulated guest\r\n" + PROMPT)

    def set_running(self, running: bool) -> None:
        """Read input, or not while the machine is paused."""
        reads = self._line in self._selector.get_map()
        if running and not reads:
            self._selector.register(self._line, selectors.EVENT_READ, self._on_input)
        elif reads and not running:
            self._selector.unregister(self._line)

    def update(self) -> None:
        """Print what the program in the foreground has written since the last time, and a prompt at its end."""
        guest, pid = self._guest, self._shell()["pid"]
        if guest is None or pid is None:
            return
        for _, offset, data in ring.pieces(guest.log(pid), self._shell()["printed"], _PRINT_BYTES):
            self._set_shell(printed=offset + len(data))
            self._say(data)
        if guest.exit(pid) is not None and self._shell()["printed"] == guest.log(pid)["end"]:
            self._set_shell(pid=None)
            guest.release(pid, 0)
            self._say(PROMPT)

    # --- the shell -------------------------------------------------------------------------------------------------

    def _shell(self) -> dict[str, Any]:
        assert self._guest is not None  # `start` comes first
        shell: dict[str, Any] = self._guest.memory["console"]
        return shell

    def _set_shell(self, **fields: Any) -> None:
        assert self._guest is not None  # as above
        self._guest.memory["console"] = {**self._shell(), **fields}  # a new object: captures hold the old one

    def _type(self, byte: int) -> None:
        assert self._guest is not None  # as above
        shell = self._shell()
        line, pid = base64.b64decode(shell["line"]), shell["pid"]
        if byte in b"\r\n":
            self._say(b"\r\n")
            line = line + b"\n" if pid is not None else line
            self._set_shell(line="")
            self._enter(line)
            return
        if byte == _INTERRUPT:
            self._say(b"^C\r\n")
            if pid is None:
                self._say(PROMPT)
            else:
                self._guest.signal(pid, 2)
            line = b""
        elif byte == _END and pid is not None:
            self._guest.feed(pid, None)
        elif byte == _BACKSPACE:
            self._say(b"\b \b" if line else b"")
            line = line[:-1]
        elif byte == _KILL_LINE:
            self._say(b"\b \b" * len(line))
            line = b""
        elif len(line) < _LINE_BYTES_MAX:
            self._say(bytes([byte]))
            line += bytes([byte])
        self._set_shell(line=base64.b64encode(line).decode())

    def _enter(self, line: bytes) -> None:
        assert self._guest is not None  # as above
        if (pid := self._shell()["pid"]) is not None:
            self._guest.feed(pid, line)
            return
        if not line.strip():
            self._say(PROMPT)
            return
        try:
            script = line.decode("utf-8", "surrogateescape")
            pid = self._guest.start(CONSOLE_ID, ["sh", "-c", script], {}, None, "root", stdin=True, tty=[80, 24])
            self._set_shell(pid=pid, printed=0)
            self._guest.begin(pid)
        except (Refused, ValueError) as error:
            self._say(f"sh: {error}\r\n".encode() + PROMPT)

    def say(self, data: bytes) -> None:
        """Print what the kernel says."""
        self._say(data)

    def _say(self, data: bytes) -> None:
        self._log.write(data)

    def _on_input(self, _: Any) -> None:
        for byte in os.read(self._line, _READ_BYTES):
            self._type(byte)
