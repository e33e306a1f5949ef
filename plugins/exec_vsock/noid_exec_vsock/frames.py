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

from noid.core.model import ExecRequest, Identity, ProcessExit, Receipt, ReceiptItem, Usage

PROTOCOL_VERSION = 2
BODY_BYTES_MAX = 65536
START_BYTES_MAX = 1 << 20
CHUNK_BYTES_MAX = 32 * 1024

_FLAG = b"\x7e"
_HEADER = struct.Struct("<BII")
_RAW_BYTES_MAX = _HEADER.size + BODY_BYTES_MAX + 4
_STUFFED_BYTES_MAX = 2 * _RAW_BYTES_MAX
_CREDIT = struct.Struct("<BI")
_WITH_STDIN = 1
_BUILTIN = 4
_RECEIPT_ITEMS_MAX = 32
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
    ERROR = 0x8F


class FailedReason(enum.IntEnum):
    """Why a process was not started."""

    INVALID = 1
    RESOURCES = 2
    NO_ROOT = 3


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
    raw += struct.pack("<I", zlib.crc32(raw))
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


def _unpack(stuffed: bytes) -> Frame | None:
    if len(stuffed) < _HEADER.size + 4:
        return None
    raw = stuffed.replace(b"\x7d\x5e", b"\x7e").replace(b"\x7d\x5d", b"\x7d")
    if not _HEADER.size + 4 <= len(raw) <= _RAW_BYTES_MAX:
        return None
    if zlib.crc32(raw[:-4]) != int.from_bytes(raw[-4:], "little"):
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

    def end(self) -> None:
        if self._at != len(self._body):
            raise ProtocolError(f"{self._what} has {len(self._body) - self._at} bytes too many")


def _text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
    return struct.pack("<I", len(raw)) + raw


def start_body(request: ExecRequest, *, stdout_credit: int, stderr_credit: int, builtin: bool = False) -> bytes:
    """Return the body of START. It may be longer than a frame; see `start_frames`."""
    flags = _WITH_STDIN * request.stdin | _BUILTIN * builtin
    parts = [struct.pack("<III", flags, stdout_credit, stderr_credit)]
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


def credit_body(stream: int, credit_bytes: int) -> bytes:
    """Return the body of CREDIT: *stream* may be sent *credit_bytes* more."""
    return _CREDIT.pack(stream, credit_bytes)


def read_credit(body: bytes) -> tuple[int, int]:
    """Return stream and bytes of a CREDIT."""
    reader = _Reader("CREDIT", body)
    stream, credit_bytes = reader.number(1, "stream"), reader.number(4, "bytes")
    reader.end()
    return stream, credit_bytes


def read_output(body: bytes) -> tuple[int, bytes]:
    """Return offset and data of STDOUT or STDERR."""
    reader = _Reader("output", body)
    return reader.number(8, "offset"), body[8:]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Who answered. *problem* is why there is no root file system, or empty."""

    version: int
    problem: str
    minimal_init: bool
    pid: int
    uptime_secs: float
    processes_max: int
    processes_alive: int
    boot_id: str
    kernel_release: str


def read_hello(body: bytes) -> Hello:
    """Return what HELLO says."""
    reader = _Reader("HELLO", body)
    version, state, minimal = reader.number(2, "version"), reader.number(1, "state"), reader.number(1, "init")
    if version != PROTOCOL_VERSION:
        raise ProtocolError(f"the guest agent speaks version {version} of the protocol, this host {PROTOCOL_VERSION}")
    pid, uptime_ns = reader.number(4, "pid"), reader.number(8, "uptime")
    processes_max, processes_alive = reader.number(4, "processes_max"), reader.number(4, "processes_alive")
    boot_id, release, problem = reader.text("boot_id"), reader.text("kernel_release"), reader.text("problem")
    reader.end()
    return Hello(
        version=version,
        problem=(problem or "unknown") if state else "",
        minimal_init=bool(minimal),
        pid=pid,
        uptime_secs=uptime_ns / 1e9,
        processes_max=processes_max,
        processes_alive=processes_alive,
        boot_id=boot_id,
        kernel_release=release,
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


def read_exit(body: bytes) -> tuple[ProcessExit, Usage]:
    """Return how a process ended and what it used."""
    reader = _Reader("EXIT", body)
    by_signal, value = reader.number(1, "how"), reader.number(1, "value")
    if by_signal not in (0, 1):
        raise ProtocolError(f"EXIT says {by_signal} in its field 'how'")
    usage = Usage(
        user_secs=reader.number(8, "user") / 1e6,
        system_secs=reader.number(8, "system") / 1e6,
        rss_max_kib=reader.number(8, "rss"),
    )
    reader.end()
    return ProcessExit(code=None if by_signal else value, signal=value if by_signal else None), usage


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
