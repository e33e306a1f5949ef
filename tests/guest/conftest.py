"""The real agent, run natively: the same program a guest boots, listening on a unix socket and owning no machine."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest
import trio
from noid_exec_vsock.frames import Frame, FrameDecoder, Message, encode
from noid_exec_vsock.guest import AgentGuest, connect

from noid.errors import BackendError

ROOT = Path(__file__).resolve().parents[2]
ANSWER_SECS = 30.0
EPOCH = 0x7E7D_0001  # both its upper bytes must be stuffed


@pytest.fixture(scope="session")
def hatch_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "scripts" / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def compiler() -> None:
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("ziglang is not installed: pip install ziglang==0.17.0")


@pytest.fixture(scope="session")
def agent_program(hatch_build: ModuleType, compiler: None) -> Path:
    """The agent of these very sources."""
    return next(path for path in hatch_build.build_all(ROOT) if path.name.endswith("x86_64"))


@dataclass(slots=True)
class NativeAgent:
    """An agent process and the way to it."""

    process: subprocess.Popen[bytes]
    path: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def rss_kib(self) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])

    def cpu_ticks(self) -> int:
        return self.cpu_ticks_of(self.pid)

    @staticmethod
    def cpu_ticks_of(pid: int) -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def open_files(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def kill_what_it_started(self) -> None:
        for child in self.children():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)

    def children(self) -> list[int]:
        try:
            return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            return []


def wait_until_it_listens(process: subprocess.Popen[bytes], path: Path) -> None:
    deadline = time.monotonic() + ANSWER_SECS
    while True:
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
            return
        assert process.poll() is None, "the agent ended at once"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def to(agent: NativeAgent) -> Callable[[], Awaitable[trio.abc.Stream]]:
    async def open_stream() -> trio.abc.Stream:
        return await trio.open_unix_socket(agent.path)

    return open_stream


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(ANSWER_SECS):
        while not condition():  # noqa: ASYNC110  # what is waited for happens in other processes
            await trio.sleep(0.005)


@pytest.fixture
def agent(agent_program: Path) -> Iterator[NativeAgent]:
    with tempfile.TemporaryDirectory(prefix="noid-agent-") as directory:
        path = Path(directory) / "socket"
        process = subprocess.Popen([agent_program, "--socket", path], stdin=subprocess.DEVNULL)
        try:
            wait_until_it_listens(process, path)
            native = NativeAgent(process, path)
            yield native
            assert process.poll() in (None, 0), f"the agent died with {process.returncode}"
            native.kill_what_it_started()
        finally:
            process.kill()
            process.wait()


@pytest.fixture
async def guest(agent: NativeAgent) -> AsyncIterator[AgentGuest]:
    async with connect(to(agent)) as guest:
        yield guest


@dataclass(slots=True)
class Wire:
    """A hand on the wire: sends any bytes, hears every frame, grants nothing by itself."""

    path: Path
    epoch: int = EPOCH
    socket: socket.socket = field(init=False)
    decoder: FrameDecoder = field(init=False)
    heard: list[Frame] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.decoder = FrameDecoder()
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(ANSWER_SECS)
        self.socket.connect(str(self.path))

    def send(self, kind: int, number: int = 0, body: bytes = b"", *, epoch: int | None = None) -> None:
        self.socket.sendall(
            encode(Frame(type=kind, epoch=self.epoch if epoch is None else epoch, id=number, body=body))
        )

    def hear(self) -> Frame:
        while not self.heard:
            data = self.socket.recv(65536)
            if not data:
                raise BackendError("the agent hung up")
            self.heard += self.decoder.feed(data)
        return self.heard.pop(0)

    def expect(self, kind: Message, number: int) -> Frame:
        frame = self.hear()
        assert (Message(frame.type), frame.id) == (kind, number)
        assert frame.epoch == self.epoch
        return frame

    def sync(self) -> Frame:
        self.send(Message.SYNC, 1)
        return self.expect(Message.HELLO, 1)

    def ping(self, number: int = 99) -> Frame:
        self.send(Message.PING, number, b"still there?")
        return self.expect(Message.PONG, number)


@pytest.fixture
def wire(agent: NativeAgent) -> Iterator[Wire]:
    wire = Wire(agent.path)
    yield wire
    wire.socket.close()


@pytest.fixture
def another_wire(agent: NativeAgent) -> Iterator[Callable[[], Wire]]:
    wires: list[Wire] = []

    def make() -> Wire:
        wires.append(Wire(agent.path, epoch=len(wires) + 2))
        return wires[-1]

    yield make
    for wire in wires:
        wire.socket.close()
