"""Talks to the living agent like a host that is out of its mind: every message, valid or nearly, in any order.

What a fuzzer says follows from its seed alone; how the agent's answers fall between them does not. The agent is held to
what the host relies on: every answer can be read, and no byte of a log is missing or comes twice.
"""

from __future__ import annotations

import contextlib
import io
import random
import select
import socket
import struct
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from noid_exec_vsock import frames
from noid_exec_vsock.frames import Frame, FrameDecoder, Message, encode

from noid.core.model.processes import LABEL_BYTES_MAX, ExecRequest, TerminalSize
from noid.core.model.vms import Identity, NetLease

from .conftest import ANSWER_SECS, Wire

T = TypeVar("T")

PROGRAMS: tuple[tuple[str, ...], ...] = (
    ("true",),
    ("cat",),
    ("cat",),
    ("sleep", "1000"),
    ("seq", "20000"),
    ("no such program",),
    ("sh", "-c", "echo out; echo err >&2; exit 3"),
    ("sh", "-c", "kill -9 $$"),
    ("sh", "-c", "trap '' TERM HUP; echo deaf; sleep 1000"),
    ("sh", "-c", "exec <&-; sleep 0.05"),
    ("sh", "-c", "(sleep 0.05; echo left behind) & head -c 100000 /dev/zero"),
    ("sh", "-c", "while echo o && echo e >&2; do :; done"),
)
IDS = tuple(range(0x80000001, 0x80000007))
STRANGE_IDS = (0, 5, 0xFFFFFFFF)
DAMAGED_WITH_CARE = (Message.START, Message.SIGNAL, Message.RELEASE, Message.POWER)  # where they are made
ALL_ANSWERS = frozenset(Message(number) for number in range(0x81, 0x91)) | {Message.CREDIT}


@dataclass(slots=True)
class AgentFuzzer:
    """One host. *scratch* is a directory that copies may go into and come out of.

    Attributes:
        said: How often each message was said, also the damaged ones.
        heard: How often each answer came.
    """

    wire: Wire
    seed: int
    scratch: Path
    said: Counter[str] = field(default_factory=Counter)
    heard: Counter[str] = field(default_factory=Counter)
    _chance: random.Random = field(init=False)
    _decoder: FrameDecoder = field(init=False)
    _due: dict[int, int] = field(init=False, default_factory=dict)  # by process: the offset its next output must have
    _pong: int = field(init=False, default=1)
    _listener: socket.socket = field(init=False)
    _served: list[socket.socket] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)  # noqa: S311  # repeatable, not secret
        self.wire.socket.setblocking(False)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        (self.scratch / "out").mkdir(exist_ok=True)
        (self.scratch / "out" / "file").write_bytes(b"content" * 1000)
        self._sync()

    def run(self, messages: int) -> None:
        """Say so many messages and hear the answers."""
        for number in range(messages):
            self._one()
            if number % 16 == 15:
                self.settle()
                if select.select([self.wire.socket], [], [], self._pick(0, 0.003))[0]:  # what runs gets on
                    self._receive()
        self.settle()

    def settle(self) -> None:
        """Wait until everything that was said has been acted on. The agent still understands, whatever came before."""
        self._pong += 1
        self._say(Message.PING, 0x70000000 + self._pong, b"settle")
        self._hear_until(lambda frame: frame.type == Message.PONG and frame.id == 0x70000000 + self._pong)
        self._serve()

    def _serve(self) -> None:
        """Be what the agent's connections lead to: say something, end, or break off, after a while."""
        with contextlib.suppress(BlockingIOError):
            self._served.append(self._listener.accept()[0])
        for at, served in enumerate(list(self._served)):
            served.setblocking(False)
            with contextlib.suppress(OSError):
                served.send(bytes(100 * at))
                served.recv(50)
                if at % 3 == 1:
                    served.shutdown(socket.SHUT_WR)
        if len(self._served) > 4:
            self._served.pop(0).close()  # what is unread makes it a reset

    def release_all(self) -> None:
        """End and forget every process."""
        for served in (self._listener, *self._served):
            served.close()
        self._new_conversation()
        for number in (*IDS, *STRANGE_IDS):
            self._say(Message.RELEASE, number, bytes(4))
            self._hear_until(lambda frame, number=number: frame.type == Message.RELEASED and frame.id == number)

    def power_off(self) -> None:
        """Have the agent, which owns no machine, end itself."""
        self._say(Message.POWER, 3, b"\0")
        self._hear_until(lambda frame: frame.type == Message.POWERING)

    # --- what is said ---------------------------------------------------------------------------------------------

    def _one(self) -> None:
        chance = self._chance.random()
        if chance < 0.01:
            self._new_conversation()
            return
        says: list[tuple[int, Callable[[], bytes]]] = [
            *[(Message.START, self._start)] * 5,
            (Message.START_PART, lambda: self._bytes(4000)),
            *[(Message.STDIN, self._stdin)] * 4,
            (Message.STDIN_EOF, bytes),
            *[(Message.CREDIT, self._credit)] * 4,
            *[(Message.SIGNAL, self._signal)] * 2,
            *[(Message.RELEASE, self._short_grace)] * 5,
            *[(Message.END, self._grace)] * 2,
            (Message.LIST, bytes),
            *[(Message.ATTACH, self._attach)] * 3,
            (Message.DETACH, bytes),
            *[(Message.RESIZE, lambda: struct.pack("<HH", self._pick(0, 80, 65535), self._pick(0, 24)))] * 2,
            (Message.WAKE, self._wake),
            (Message.PING, lambda: self._bytes(100)),
            (Message.POWER, lambda: self._pick(b"", b"\x02", b"\xff", b"\x00\x00")),  # none that switches anything
            (self._pick(0, 0x11, 0x7F, 0x81, 0xFF), lambda: self._bytes(40)),
        ]
        kind, make = self._chance.choice(says)
        number = self._pick(*IDS, *IDS, *IDS, *STRANGE_IDS)
        body = make()
        intact = self._chance.random() < 0.75
        if not intact:
            body = body if kind in DAMAGED_WITH_CARE else self._damaged(body)
        raw = encode(Frame(type=kind, epoch=self.wire.epoch, id=number, body=body))
        if not intact and self._chance.random() < 0.2:
            raw = self._damaged(raw)
            if self._chance.random() < 0.5:
                raw = raw[: self._chance.randrange(len(raw) + 1)]
        self.said[Message(kind).name if kind in list(Message) else "UNKNOWN"] += 1
        self._send(raw)

    def _start(self) -> bytes:
        copying = self._chance.random() < 0.15
        argv = self._chance.choice(PROGRAMS)
        if copying:
            size = str(self._pick(0, 7, 4000, 1 << 62))
            argv = self._pick(
                ("copy-in", "tar", str(self.scratch / "in"), "-"),
                ("copy-in", "tar", str(self.scratch / "in"), "owners"),
                ("copy-out", "tar", str(self.scratch / "out"), "0", size),
                ("copy-in", "file", str(self.scratch / "in-file"), "0", size, "644", "-", "-"),
                ("copy-out", "file", str(self.scratch / "out" / "file"), "3", size),
                ("copy-in",),
                *[("connect", "localhost", str(self._listener.getsockname()[1]))] * 3,
                ("connect", "127.0.0.1", "1"),
                ("connect", self._pick("::1", "", "x" * 3000), self._pick("99999", "-1", "")),
                ("connect",),
                ("no-such-builtin", "x"),
            )
        number = self._chance.random()
        request = ExecRequest(
            argv=argv,
            stdin=self._chance.random() < 0.6,
            tty=TerminalSize(columns=80, rows=24) if self._chance.random() < 0.3 else None,
            user=self._pick(*[None] * 12, "root", "nobody", "0", "no such user", "u" * 64),
            cwd=self._pick(*[None] * 12, "/", "/nowhere", "/" * 5000),
            env={"A": "b", "NAME": "v" * self._pick(1, 4000)} if number < 0.3 else {},
            label="l" * self._pick(*[20] * 6, 0, LABEL_BYTES_MAX, LABEL_BYTES_MAX + 1),
            log_bytes=self._pick(0, 1, 4096, 4096, 5000, 1 << 16, 1 << 24, 0xFFFFFFFF),
        )
        body = bytearray(frames.start_body(request, credit=self._pick(0, 1, 1000, 1 << 16, 1 << 31), builtin=copying))
        if number > 0.9:  # what comes before the texts may be anything; what would run may not
            body[self._chance.randrange(16)] = self._pick(0, 0xFF)
        elif number > 0.85:
            del body[self._chance.randrange(len(body)) :]
        return bytes(body)

    def _stdin(self) -> bytes:
        if self._chance.random() < 0.5:
            return self._bytes(6000)
        if self._chance.random() < 0.5:  # records of a connection
            sizes = [self._pick(1, 3, 2000, 70000, 0) for _ in range(3)]
            return b"".join(struct.pack("<I", size) + bytes(min(size, 2000)) for size in sizes)
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w", format=self._pick(tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)) as tar:
            for name in ("a", "dir/b", "n" * self._pick(10, 200), "../out", f"{self.scratch}/abs"):
                member = tarfile.TarInfo(name)
                member.type = self._pick(tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, b"x")
                member.linkname = self._pick("", "a", "../..", str(self.scratch))
                tar.addfile(member)
        return self._damaged(made.getvalue()[: self._pick(512, 4000, 10240)])

    def _credit(self) -> bytes:
        return struct.pack("<BI", self._pick(1, 1, 1, 1, 0, 7), self._pick(0, 1, 1000, 1 << 16, 1 << 31, 0xFFFFFFFF))

    def _grace(self) -> bytes:
        return struct.pack("<I", self._pick(0, 0, 1, 20, 0xFFFFFFFF))

    def _signal(self) -> bytes:
        """None that a sanitizer in a builtin would take for a fault of its own."""
        return self._pick(b"", b"\x09\x09", *(bytes([signo]) for signo in (0, 1, 2, 9, 15, 18, 19, 20, 64, 65, 255)))

    def _short_grace(self) -> bytes:
        """What was released is forgotten: nobody could end it before a long grace is over."""
        return self._pick(b"", bytes(3), *(struct.pack("<I", grace_ms) for grace_ms in (0, 0, 0, 1, 1, 20)))

    def _attach(self) -> bytes:
        return struct.pack("<QI", self._pick(0, 0, 0, 1, 4000, 1 << 20, (1 << 64) - 1), self._pick(0, 100, 1 << 20))

    def _wake(self) -> bytes:
        lease = self._pick(None, NetLease(kind="user"), NetLease(kind="tap", mac="x" * 40, guest_address="1.2.3.4/99"))
        identity = Identity(
            hostname=self._pick("web", "", "h" * 70, "\x1b[31m"),
            machine_id="0" * self._pick(32, 3),
            unix_ns=self._pick(0, 10**18, (1 << 64) - 1),
            entropy=bytes(self._pick(0, 32, 256, 257)),
            lease=lease,
            hook_timeout_secs=self._pick(0.0, 0.02, 4e6),
        )
        return frames.wake_body(identity)

    def _pick(self, *choices: T) -> T:
        return self._chance.choice(choices)

    def _bytes(self, limit: int) -> bytes:
        return self._chance.randbytes(self._chance.randrange(limit))

    def _damaged(self, data: bytes) -> bytes:
        damaged = bytearray(data)
        for _ in range(self._chance.randrange(1, 4)):
            where = self._chance.randrange(len(damaged) + 1)
            how = self._chance.random()
            if how < 0.5 and where < len(damaged):
                damaged[where] = self._pick(0, 0xFF, 0x7D, 0x7E, self._chance.randrange(256))
            elif how < 0.7:
                del damaged[where:]
            elif how < 0.85:
                damaged[where:where] = self._bytes(20)
            else:
                damaged[where : where + 4] = self._pick(bytes(4), b"\xff" * 4)
        return bytes(damaged[:60000])

    # --- the wire -------------------------------------------------------------------------------------------------

    def _say(self, kind: Message, number: int, body: bytes = b"") -> None:
        self.said[kind.name] += 1
        self._send(encode(Frame(type=kind, epoch=self.wire.epoch, id=number, body=body)))

    def _sync(self) -> None:
        self._due.clear()
        self._decoder = FrameDecoder(self.wire.epoch)
        self._say(Message.SYNC, 1)
        self._hear_until(lambda frame: frame.type == Message.HELLO)

    def _new_conversation(self) -> None:
        self._send(b"\x7e")  # ends what may be half
        self.wire.epoch = self._chance.randrange(1, 1 << 32)
        self._sync()

    def _send(self, raw: bytes) -> None:
        left = memoryview(raw)
        deadline = time.monotonic() + ANSWER_SECS
        while left:
            readable, writable, _ = select.select([self.wire.socket], [self.wire.socket], [], ANSWER_SECS)
            if readable:
                self._receive()
            if writable:
                left = left[self.wire.socket.send(left) :]
            assert time.monotonic() < deadline, f"the agent takes nothing more (seed {self.seed})"

    def _receive(self) -> list[Frame]:
        data = self.wire.socket.recv(65536)
        assert data, f"the agent hung up (seed {self.seed})"
        heard = list(self._decoder.feed(data))
        for frame in heard:
            self._check(frame)
        return heard

    def _hear_until(self, wanted: Callable[[Frame], bool]) -> None:
        deadline = time.monotonic() + ANSWER_SECS
        while True:
            assert select.select([self.wire.socket], [], [], ANSWER_SECS)[0], f"no answer (seed {self.seed})"
            if any([wanted(frame) for frame in self._receive()]):  # noqa: C419  # all of them are heard
                return
            assert time.monotonic() < deadline, f"no answer (seed {self.seed})"

    # --- what is heard --------------------------------------------------------------------------------------------

    def _check(self, frame: Frame) -> None:
        self.heard[Message(frame.type).name] += 1
        reader = READERS.get(frame.type)
        if reader is not None:
            reader(frame.body)  # or raises ProtocolError
        if frame.type in (Message.STDOUT, Message.STDERR):
            offset, data = frames.read_output(frame.body)
            due = self._due.setdefault(frame.id, offset)
            assert data
            assert offset == due, f"output at {offset} where {due} was due (seed {self.seed})"
            self._due[frame.id] += len(data)
        elif frame.type == Message.STARTED:
            self._due[frame.id] = 0
        elif frame.type == Message.ATTACHED:
            self._due[frame.id] = frames.read_attached(frame.body).start


READERS: dict[int, Callable[[bytes], object]] = {
    Message.HELLO: frames.read_hello,
    Message.FAILED: frames.read_failed,
    Message.STDOUT: frames.read_output,
    Message.STDERR: frames.read_output,
    Message.EXIT: frames.read_exit,
    Message.CREDIT: frames.read_credit,
    Message.RECEIPT: frames.read_receipt,
    Message.PROCESS: frames.read_process,
    Message.LISTED: frames.read_listed,
    Message.ATTACHED: frames.read_attached,
    Message.ERROR: frames.read_error,
}
