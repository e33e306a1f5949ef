"""The raw floor: QEMU restored by a plain script that knows nothing of noid but its files and the agent's ping.

It runs exactly the command line noid runs, read from a live VM's ``/proc/<pid>/cmdline`` with the paths exchanged.
Blocking; ten at once are ten threads.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from noid_exec_vsock.frames import Frame, FrameDecoder, Message, encode

CALL_SECS = 60.0


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
        qmp_path, agent_path = self.directory / "q", self.directory / "a"
        with _listener(qmp_path) as qmp, _listener(agent_path) as agent, self._pattern.state.open("rb") as state:
            argv = [self._rewritten(word, qmp.fileno(), agent.fileno()) for word in self._pattern.argv]
            with (self.directory / "vmm.log").open("wb") as log:
                self._process = subprocess.Popen(  # the command noid runs
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(qmp.fileno(), agent.fileno(), state.fileno()),
                    start_new_session=True,
                )
            with _connected(qmp_path) as control:
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
        with _connected(agent_path) as channel:
            _ping(channel)
        return time.perf_counter() - started

    def end(self) -> None:
        """Kill it and remove its directory."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _rewritten(self, word: str, qmp_fd: int, agent_fd: int) -> str:
        word = word.replace(str(self._pattern.directory), str(self.directory))
        word = re.sub(r"(socket,id=qmp,fd=)\d+", rf"\g<1>{qmp_fd}", word)
        return re.sub(r"(socket,id=agent,fd=)\d+", rf"\g<1>{agent_fd}", word)


def _ping(channel: socket.socket) -> None:
    """Begin a conversation with the agent and wait for one pong."""
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
