"""The serial console of a simulated machine: a shell on a line that echoes, one client, and a log that has everything.

Like a VMM's it serves one client at a time, writes the log whoever is connected, and lets the guest stop printing when
a connected client does not read. The shell lives in the guest's memory, so a clone goes on in the middle of a line.
Standard library only.
"""

from __future__ import annotations

import base64
import selectors
import socket
from pathlib import Path
from typing import Any

from noid.testing import simulated_ring as ring
from noid.testing.simulated_guest import CONSOLE_ID, Refused, SimulatedGuest

PROMPT = b"# "
UNREAD_BYTES = 4096
_READ_BYTES = 4096
_PRINT_BYTES = 65536
_LINE_BYTES_MAX = 1024
_INTERRUPT, _END, _BACKSPACE, _KILL_LINE = 0x03, 0x04, 0x7F, 0x15


class SimulatedConsole:
    """Runs what is typed at *listener* in *guest*, and appends what is printed to *log*."""

    def __init__(self, listener: socket.socket, log: Path, selector: selectors.BaseSelector) -> None:
        self._listener = listener
        self._log = log.open("ab", buffering=0)
        self._selector = selector
        self._client: socket.socket | None = None
        self._unsent = bytearray()
        self._guest: SimulatedGuest | None = None
        self._running = False

    @property
    def is_stalled(self) -> bool:
        """Whether a client is connected that does not read."""
        return len(self._unsent) >= UNREAD_BYTES

    def start(self, guest: SimulatedGuest) -> None:
        """Begin with *guest*: one that has just booted is greeted, another goes on where it was."""
        self._guest = guest
        if "console" not in guest.memory:
            guest.memory["console"] = {"line": "", "pid": None, "printed": 0}
            self._say(b"simulated guest\r\n" + PROMPT)

    def set_running(self, running: bool) -> None:
        """Read input, or not while the machine is paused."""
        self._running = running
        self._watch()

    def update(self) -> None:
        """Print what the program in the foreground has written since the last time, and a prompt at its end."""
        guest, pid = self._guest, self._shell()["pid"]
        if guest is None or pid is None or self.is_stalled:
            return
        for _, offset, data in ring.pieces(guest.log(pid), self._shell()["printed"], _PRINT_BYTES):
            self._set_shell(printed=offset + len(data))
            self._say(data)
        if self.is_stalled:
            guest.unsent[pid] = self._shell()["printed"]
            return
        guest.unsent.pop(pid, None)
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

    def _say(self, data: bytes) -> None:
        self._log.write(data)
        if self._client is not None and data:
            self._unsent += data
            self._flush()

    # --- the line --------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        wanted: dict[socket.socket, int] = {}
        if self._client is None:
            wanted[self._listener] = selectors.EVENT_READ
        else:
            reads = selectors.EVENT_READ if self._running and not self.is_stalled else 0
            wanted[self._client] = reads | (selectors.EVENT_WRITE if self._unsent else 0)
        for target in (self._listener, self._client):
            if target is None:
                continue
            known = self._selector.get_map().get(target)
            events = wanted.get(target, 0)
            if known is not None and known.events != events:
                self._selector.unregister(target)
                known = None
            if known is None and events:
                self._selector.register(target, events, self._accept if target is self._listener else self._on_client)

    def _accept(self, _: Any) -> None:
        self._client = self._listener.accept()[0]
        self._client.setblocking(False)
        self._watch()

    def _on_client(self, _: Any) -> None:
        self._flush()
        if self._client is None or not self._running or self.is_stalled:
            self._watch()
            return
        try:
            data = self._client.recv(_READ_BYTES)
        except BlockingIOError:
            self._watch()
            return
        except OSError:
            data = b""
        if not data:
            self._hang_up()
        for byte in data:
            self._type(byte)
        self._watch()

    def _flush(self) -> None:
        if self._client is None:
            return
        try:
            while self._unsent:
                del self._unsent[: self._client.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self._hang_up()
        self._watch()

    def _hang_up(self) -> None:
        if self._client is not None:
            if self._client in self._selector.get_map():
                self._selector.unregister(self._client)
            self._client.close()
        self._client = None
        self._unsent.clear()
