"""The raw floor: QEMU restored by a plain script that knows nothing of noid but its files and the agent's ping.

It runs exactly the command line noid runs, read from a live VM's ``/proc/<pid>/cmdline`` with the paths exchanged.
Blocking; ten at once are ten threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from noid_exec_vsock.frames import Frame, FrameDecoder, Message, encode

CALL_SECS = 60.0
_SOCKET = re.compile(r"socket,id=(\w+),fd=\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """A live VM to imitate: its command line, its directory, and what it was restored from."""

    argv: tuple[str, ...]
    directory: Path
    state: Path
    disk: Path

    @classmethod
    def of(cls, pid: int, directory: Path, state: Path, disk: Path) -> Pattern:
        """Read the command line of the VM that runs as *pid* in *directory*."""
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        return cls(argv=tuple(map(os.fsdecode, argv)), directory=directory, state=state, disk=disk)


class BareMachine:
    """One QEMU process, restored and pinged. `prepare` what is not to be timed, then call `start`."""

    def __init__(self, pattern: Pattern, directory: Path) -> None:
        self._pattern = pattern
        self.directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    def prepare(self) -> None:
        """Make the directory; the caller puts a disk into it. The memory image is linked, as noid does."""
        self.directory.mkdir(parents=True)
        (self.directory / "memory").hardlink_to(self._pattern.directory / "memory")

    def start(self) -> float:
        """Restore and wait for the agent's answer to a ping. Return the seconds it took."""
        started = time.perf_counter()
        with self._pattern.state.open("rb") as state:
            with contextlib.ExitStack() as stack:  # QEMU has its own; with ours open nobody would notice that it ended
                listeners = {name: stack.enter_context(_listener(self.directory / name)) for name in self._sockets()}
                argv = [self._rewritten(word, listeners) for word in self._pattern.argv]
                log = stack.enter_context((self.directory / "vmm.log").open("wb"))
                self._process = subprocess.Popen(  # the command noid runs
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(*(listener.fileno() for listener in listeners.values()), state.fileno()),
                    start_new_session=True,
                )
            with _connected(self.directory / "qmp") as control:
                stream = control.makefile("rwb")
                stream.readline()
                for command, arguments in (
                    ("qmp_capabilities", {}),
                    ("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]}),
                    ("migrate-incoming", {"uri": f"fd:{state.fileno()}"}),
                ):
                    stream.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
                    stream.flush()
                while json.loads(stream.readline()).get("event") != "RESUME":
                    pass
        with _connected(self.channel) as channel:
            ping(channel)
        return time.perf_counter() - started

    @property
    def channel(self) -> Path:
        """The socket of the guest agent's channel, free for one connection once started."""
        return self.directory / "agent"

    def command(self, name: str, arguments: dict[str, str], *, until: str | None = None) -> None:
        """Say something to QEMU and wait for its answer, then for the event *until*.

        Raises:
            RuntimeError: it refused.
        """
        with _connected(self.directory / "qmp") as control:
            stream = control.makefile("rwb")
            stream.readline()
            for question, body in (("qmp_capabilities", {}), (name, arguments)):
                stream.write(json.dumps({"execute": question, "arguments": body}).encode() + b"\n")
                stream.flush()
            answers, happened = 0, set()
            while answers < 2 or (until and until not in happened):
                said = json.loads(stream.readline())
                if "error" in said:
                    raise RuntimeError(f"{name}: {said['error']}")
                answers += "return" in said
                happened.add(said.get("event"))

    def end(self) -> None:
        """Kill it and remove its directory."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _sockets(self) -> list[str]:
        """Return the names of the sockets QEMU inherits, listening."""
        return [found[1] for word in self._pattern.argv if (found := _SOCKET.match(word))]

    def _rewritten(self, word: str, listeners: Mapping[str, socket.socket]) -> str:
        word = word.replace(str(self._pattern.directory), str(self.directory))
        return _SOCKET.sub(lambda found: f"socket,id={found[1]},fd={listeners[found[1]].fileno()}", word)


def ping(channel: socket.socket) -> None:
    """Begin a conversation with the agent on *channel* and wait for one pong."""
    epoch = secrets.randbits(32)
    decoder = FrameDecoder(epoch)
    for number, (question, answer) in enumerate(((Message.SYNC, Message.HELLO), (Message.PING, Message.PONG))):
        channel.sendall(encode(Frame(type=question, epoch=epoch, id=number)))
        while not any(frame.type == answer for frame in decoder.feed(_received(channel))):
            pass


def _received(channel: socket.socket) -> bytes:
    data = channel.recv(65536)
    if not data:
        raise RuntimeError("the guest's channel ended")
    return data


def _listener(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)
    return listener


def _connected(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(CALL_SECS)
    connection.connect(str(path))
    return connection
