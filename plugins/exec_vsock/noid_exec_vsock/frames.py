"""The guest channel's bytes: frames, and the messages in them. No I/O, no clock. PROTOCOL.md is the text of this.

The guest is hostile: what is read here is bounded before it is believed, and anything malformed raises `ProtocolError`
with the field that broke. Frames that are damaged, cut or of another conversation are no error: a checkpoint can land
in the middle of a frame, so the decoder skips them and goes on with the next.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from noid.core.model.guest_processes import GuestProcessInfo, ProcessExit, Usage
from noid.core.model.processes import LABEL_BYTES_MAX, ExecRequest, TerminalSize
from noid.core.model.vms import Identity, Receipt, ReceiptItem

PROTOCOL_VERSION = 2
BODY_BYTES_MAX = 65536
START_BYTES_MAX = 1 << 20
CHUNK_BYTES_MAX = 32 * 1024

_FLAG = b"\x7e"
_HEADER = struct.Struct("<BII")
_RAW_BYTES_MIN = _HEADER.size + 4
_RAW_BYTES_MAX = _HEADER.size + BODY_BYTES_MAX + 4
_STUFFED_BYTES_MAX = 2 * _RAW_BYTES_MAX
_CREDIT = struct.Struct("<BI")
_GRACE_MS_MAX = 60_000
_WITH_STDIN, _WITH_TTY, _BUILTIN = 1, 2, 4
_IS_RUNNING = 1
_HAS_TTY = 2
_HAS_STDIN = 4
_OUTPUT = 1
_SIZE_MAX = 0xFFFF
_RECEIPT_ITEMS_MAX = 32
_BUILTINS_BEFORE = frozenset({"copy-out", "copy-in"})
_RECEIPT_STATUS = ("done", "failed", "not_possible")


class Message(enum.IntEnum):
    """What a frame is. Below 0x80 the host says it, except CREDIT, which both do."""

    SYNC = 0x01
    PING = 0x02
    START = 0x03
    START_PART = 0x04
    STDIN = 0x05
    STDIN_EOF = 0x06
    CREDIT = 0x07
    SIGNAL = 0x08
    RELEASE = 0x09
    WAKE = 0x0A
    POWER = 0x0B
    END = 0x0C
    LIST = 0x0D
    ATTACH = 0x0E
    RESIZE = 0x0F
    DETACH = 0x10
    HELLO = 0x81
    PONG = 0x82
    STARTED = 0x83
    FAILED = 0x84
    STDOUT = 0x85
    STDERR = 0x86
    EXIT = 0x87
    STDIN_CLOSED = 0x88
    RELEASED = 0x89
    RECEIPT = 0x8A
    POWERING = 0x8B
    PROCESS = 0x8C
    LISTED = 0x8D
    ATTACHED = 0x8E
    ERROR = 0x8F
    DETACHED = 0x90


class FailedReason(enum.IntEnum):
    """Why a process was not started or attached to."""

    INVALID = 1
    RESOURCES = 2
    NO_ROOT = 3
    NO_PROCESS = 4


class ProtocolError(Exception):
    """The other side said something that cannot be meant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One message of one conversation. *id* ties answers to questions; for processes it names the process."""

    type: int
    epoch: int
    id: int
    body: bytes = field(default=b"", repr=False)


def encode(frame: Frame) -> bytes:
    """Return *frame* as it goes over the wire.

    Raises:
        ValueError: the body is over `BODY_BYTES_MAX`: a bug of the caller.
    """
    if len(frame.body) > BODY_BYTES_MAX:
        raise ValueError(f"a body of {len(frame.body)} bytes; at most {BODY_BYTES_MAX} fit")
    raw = _HEADER.pack(frame.type, frame.epoch, frame.id) + frame.body
    raw += struct.pack("<I", zlib.adler32(raw))
    return _FLAG + raw.replace(b"\x7d", b"\x7d\x5d").replace(b"\x7e", b"\x7d\x5e") + _FLAG


class FrameDecoder:
    """Turns channel bytes into frames, wherever they are cut. Garbage yields nothing and costs O(len).

    *epoch* selects the conversation: frames of others are dropped here, so that output produced before a restore can
    never reach a reader that attached after it. None lets every frame through.

    `wasted_bytes` counts what came since the last frame that was let through: whoever feeds it decides how much of
    that is a flood.
    """

    def __init__(self, epoch: int | None = None) -> None:
        self._epoch = epoch
        self._pending = bytearray()
        self._overlong = False
        self.wasted_bytes = 0

    def feed(self, data: bytes | bytearray) -> Iterator[Frame]:
        """Take *data* and yield the frames it completes. Consume the iterator before feeding more."""
        self.wasted_bytes += len(data)
        pieces = data.split(_FLAG)
        last = pieces.pop()
        for piece in pieces:
            if len(piece) < _RAW_BYTES_MIN and not self._pending and not self._overlong:
                continue  # between two frames; a flood of such must cost next to nothing
            stuffed = bytes(self._pending + piece) if self._pending else bytes(piece)
            whole = not self._overlong and len(stuffed) <= _STUFFED_BYTES_MAX
            self._pending.clear()
            self._overlong = False
            frame = _unpack(stuffed) if whole else None
            if frame is not None and self._epoch in (None, frame.epoch):
                self.wasted_bytes = 0
                yield frame
        if self._overlong or len(self._pending) + len(last) > _STUFFED_BYTES_MAX:
            self._pending.clear()
            self._overlong = True
        else:
            self._pending += last


def _unpack(raw: bytes) -> Frame | None:
    if b"\x7d" in raw:  # looking for one byte takes a hundredth of looking for two
        raw = raw.replace(b"\x7d\x5e", b"\x7e").replace(b"\x7d\x5d", b"\x7d")
    whole = _RAW_BYTES_MIN <= len(raw) <= _RAW_BYTES_MAX
    if not whole or zlib.adler32(raw[:-4]) != int.from_bytes(raw[-4:], "little"):
        return None
    kind, epoch, number = _HEADER.unpack_from(raw)
    return Frame(type=kind, epoch=epoch, id=number, body=raw[_HEADER.size : -4])


# --- bodies -------------------------------------------------------------------------------------------------------


class _Reader:
    """Reads a body from front to back, complaining by name about what is missing."""

    def __init__(self, what: str, body: bytes) -> None:
        self._what = what
        self._body = body
        self._at = 0

    def take(self, length: int, name: str) -> bytes:
        if length > len(self._body) - self._at:
            raise ProtocolError(f"{self._what} ends inside its field {name!r}")
        self._at += length
        return self._body[self._at - length : self._at]

    def number(self, size: int, name: str) -> int:
        return int.from_bytes(self.take(size, name), "little")

    def text(self, name: str, *, limit: int = 4096) -> str:
        length = self.number(4, name)
        if length > limit:
            raise ProtocolError(f"{self._what} has {length} bytes in its field {name!r}; at most {limit} are allowed")
        # What a guest says ends up in messages and terminals: nothing in it may act there.
        text = self.take(length, name).decode("utf-8", "replace")
        return "".join(c if c.isprintable() else "\ufffd" for c in text)

    @property
    def has_more(self) -> bool:
        return self._at < len(self._body)

    def end(self) -> None:
        if self._at != len(self._body):
            raise ProtocolError(f"{self._what} has {len(self._body) - self._at} bytes too many")


def _text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
    return struct.pack("<I", len(raw)) + raw


def start_body(request: ExecRequest, *, credit: int, builtin: bool = False) -> bytes:
    """Return the body of START. It may be longer than a frame; see `start_frames`.

    *builtin*: the first argument names a function of the agent, not a program.
    """
    flags = _WITH_STDIN * request.stdin | _WITH_TTY * (request.tty is not None) | _BUILTIN * builtin
    parts = [
        struct.pack("<III", flags, credit, request.log_bytes),
        size_body(request.tty or TerminalSize(columns=0, rows=0)),
    ]
    parts += [_text(request.label)]
    parts += [_text(request.user or ""), _text(request.cwd or "")]
    parts += [struct.pack("<I", len(request.argv)), *map(_text, request.argv)]
    parts += [struct.pack("<I", len(request.env))]
    parts += [_text(f"{name}={value}") for name, value in request.env.items()]
    return b"".join(parts)


def start_frames(epoch: int, number: int, body: bytes) -> list[Frame]:
    """Split *body* over as many START_PARTs as it needs, ended by one START."""
    pieces = [body[at : at + BODY_BYTES_MAX] for at in range(0, len(body), BODY_BYTES_MAX)]
    frames = [Frame(type=Message.START_PART, epoch=epoch, id=number, body=piece) for piece in pieces[:-1]]
    return [*frames, Frame(type=Message.START, epoch=epoch, id=number, body=pieces[-1])]


def size_body(size: TerminalSize) -> bytes:
    """Return the body of RESIZE. What no terminal can be is brought into what can."""
    return struct.pack("<HH", *(min(max(side, 0), _SIZE_MAX) for side in (size.columns, size.rows)))


def grace_body(grace_secs: float) -> bytes:
    """Return the body of END and RELEASE; a grace is at most a minute."""
    return struct.pack("<I", min(max(round(grace_secs * 1000), 0), _GRACE_MS_MAX))


def attach_body(offset: int, credit: int) -> bytes:
    """Return the body of ATTACH."""
    return struct.pack("<QI", offset, credit)


def credit_body(credit_bytes: int) -> bytes:
    """Return the body of CREDIT: so many bytes of output more may be sent."""
    return _CREDIT.pack(_OUTPUT, credit_bytes)


def read_credit(body: bytes) -> tuple[int, int]:
    """Return stream and bytes of a CREDIT."""
    reader = _Reader("CREDIT", body)
    stream, credit_bytes = reader.number(1, "stream"), reader.number(4, "bytes")
    reader.end()
    return stream, credit_bytes


def read_output(body: bytes) -> tuple[int, bytes]:
    """Return offset and data of STDOUT or STDERR."""
    return _Reader("output", body).number(8, "offset"), body[8:]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Who answered. *problem* is why there is no root file system, or empty.

    *agent_starts* is how often the agent was started since the guest booted: when it grows, the processes of before are
    out of reach. *builtins* are the functions of the agent that can be started; agents from before it told them have
    those that copy files.
    """

    version: int
    problem: str
    minimal_init: bool
    pid: int
    uptime_secs: float
    processes_max: int
    processes_alive: int
    agent_starts: int
    boot_id: str
    kernel_release: str
    builtins: frozenset[str]


def read_hello(body: bytes) -> Hello:
    """Return what HELLO says."""
    reader = _Reader("HELLO", body)
    version, state, minimal = reader.number(2, "version"), reader.number(1, "state"), reader.number(1, "init")
    if version != PROTOCOL_VERSION:
        raise ProtocolError(f"the guest agent speaks version {version} of the protocol, this host {PROTOCOL_VERSION}")
    pid, uptime_ns = reader.number(4, "pid"), reader.number(8, "uptime")
    processes_max, processes_alive = reader.number(4, "processes_max"), reader.number(4, "processes_alive")
    agent_starts = reader.number(4, "agent_starts")
    boot_id, release, problem = reader.text("boot_id"), reader.text("kernel_release"), reader.text("problem")
    builtins = frozenset(reader.text("builtins").split()) if reader.has_more else _BUILTINS_BEFORE
    reader.end()
    return Hello(
        version=version,
        problem=(problem or "unknown") if state else "",
        minimal_init=bool(minimal),
        pid=pid,
        uptime_secs=uptime_ns / 1e9,
        processes_max=processes_max,
        processes_alive=processes_alive,
        agent_starts=agent_starts,
        boot_id=boot_id,
        kernel_release=release,
        builtins=builtins,
    )


def read_failed(body: bytes) -> tuple[int, str]:
    """Return the reason and the words of FAILED."""
    reader = _Reader("FAILED", body)
    reason = reader.number(1, "reason")
    reader.number(4, "errno")
    words = reader.text("words")
    reader.end()
    return reason, words


def read_error(body: bytes) -> str:
    """Return the words of ERROR."""
    reader = _Reader("ERROR", body)
    words = reader.text("words")
    reader.end()
    return words


def _read_end(reader: _Reader) -> ProcessExit:
    by_signal, value = reader.number(1, "how"), reader.number(1, "value")
    if by_signal not in (0, 1):
        raise ProtocolError(f"the guest says {by_signal} of how a process ended")
    usage = Usage(
        user_secs=reader.number(8, "user") / 1e6,
        system_secs=reader.number(8, "system") / 1e6,
        rss_max_kib=reader.number(8, "rss"),
    )
    return ProcessExit(code=None if by_signal else value, signal=value if by_signal else None, usage=usage)


def read_exit(body: bytes) -> ProcessExit:
    """Return how a process ended."""
    reader = _Reader("EXIT", body)
    ended = _read_end(reader)
    reader.end()
    return ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Attached:
    """The answer to ATTACH: output follows from *start* on, *end* of it is there already.

    *stdin_taken* is how many bytes of input the process' stdin has had in its life, *stdin* whether it takes more.
    """

    start: int
    end: int
    stdin_taken: int
    pid: int
    tty: bool
    stdin: bool


def read_attached(body: bytes) -> Attached:
    """Return what ATTACHED says."""
    reader = _Reader("ATTACHED", body)
    start, end, stdin_taken = (reader.number(8, name) for name in ("start", "end", "stdin_taken"))
    pid, flags = reader.number(4, "pid"), reader.number(1, "flags")
    reader.end()
    if start > end:
        raise ProtocolError(f"ATTACHED says that a log begins at {start} and ends at {end}")
    tty, stdin = bool(flags & _HAS_TTY), bool(flags & _HAS_STDIN)
    return Attached(start=start, end=end, stdin_taken=stdin_taken, pid=pid, tty=tty, stdin=stdin)


def read_process(body: bytes) -> GuestProcessInfo:
    """Return what PROCESS says."""
    reader = _Reader("PROCESS", body)
    number, pid, flags = reader.number(4, "id"), reader.number(4, "pid"), reader.number(1, "flags")
    log_start, log_end = reader.number(8, "log_start"), reader.number(8, "log_end")
    ended, started_at = _read_end(reader), reader.number(8, "started_at")
    label = reader.take(reader.number(4, "label"), "label")
    reader.end()
    if log_start > log_end or len(label) > LABEL_BYTES_MAX:
        raise ProtocolError(f"PROCESS tells of a log from {log_start} to {log_end}, a label of {len(label)} bytes")
    running = bool(flags & _IS_RUNNING)
    return GuestProcessInfo(
        id=number,
        pid=pid,
        running=running,
        tty=bool(flags & _HAS_TTY),
        stdin=bool(flags & _HAS_STDIN),
        log_start=log_start,
        log_end=log_end,
        exit=None if running else ended,
        started_at_unix_ns=started_at,
        label=label.decode("utf-8", "replace"),  # ours, if it is true: whoever reads it parses it
    )


def read_listed(body: bytes) -> int:
    """Return how many PROCESS messages LISTED says came before it."""
    reader = _Reader("LISTED", body)
    count = reader.number(4, "count")
    reader.end()
    return count


def wake_body(identity: Identity) -> bytes:
    """Return the body of WAKE. A ``user`` lease without addresses gets QEMU's user-mode defaults."""
    lease = identity.lease
    wanted = lease is not None and lease.kind != "none"
    mac = address = gateway = dns = ""
    if lease is not None and wanted:
        mac, address, gateway = lease.mac or "", lease.guest_address or "", lease.gateway or ""
        if lease.kind == "user":
            address, gateway, dns = address or "10.0.2.15/24", gateway or "10.0.2.2", "10.0.2.3"
        wanted = bool(address)
        if wanted and "/" not in address:
            address += "/24"
    return b"".join(
        [
            struct.pack("<QQ", identity.unix_ns, identity.generation),
            *(_text(value) for value in (identity.hostname, identity.machine_id, identity.entropy)),
            struct.pack("<B", wanted),
            *map(_text, (mac, address, gateway, dns, identity.reason.value)),
            struct.pack("<II", round(identity.hook_timeout_secs * 1000), int(identity.vm_generation_id)),
        ]
    )


def read_receipt(body: bytes) -> Receipt:
    """Return the receipt a WAKE was answered with."""
    reader = _Reader("RECEIPT", body)
    count = reader.number(2, "count")
    if count > _RECEIPT_ITEMS_MAX:
        raise ProtocolError(f"RECEIPT has {count} items; at most {_RECEIPT_ITEMS_MAX} are allowed")
    items = []
    for _ in range(count):
        name, status = reader.text("name", limit=64), reader.number(1, "status")
        if status >= len(_RECEIPT_STATUS):
            raise ProtocolError(f"RECEIPT has status {status} for {name!r}")
        before, after, detail = (reader.text(field_name, limit=512) for field_name in ("before", "after", "detail"))
        items.append(ReceiptItem(name=name, status=_RECEIPT_STATUS[status], before=before, after=after, detail=detail))
    reader.end()
    return Receipt(items=tuple(items))
