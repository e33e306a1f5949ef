"""What a server must stand: each ordeal with the bound it is judged by. Only ever against a server of our own.

The server is `noid_bench.simulated_server`, in a process of its own; `Victim` looks at that process from outside.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from noid.errors import BackendError
from noid_bench.http_load import Load, Target, exchange, load, receive, request_bytes

SAMPLES = 200
ROUNDS = 5
SETTLE_SECS = 30.0
GROWTH_KIB_MAX = 16 * 1024
CONSOLE_KIB_MAX = 45.0
HEADER_BYTES = 100 << 20
BODY_BYTES_MAX = 256 << 20
STOP_SECS_MAX = 12.0  # ten for requests in flight, two to close
_UPGRADE = (
    "GET {path} HTTP/1.1\r\nHost: noid\r\nAuthorization: Bearer {token}\r\n"
    "Connection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    "Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One thing that was seen, and the most it may be."""

    what: str
    seen: float
    most: float
    unit: str = ""

    @property
    def holds(self) -> bool:
        """Whether it is within its bound."""
        return self.seen <= self.most

    def __str__(self) -> str:
        """Show it in one line."""
        return (
            f"{'holds ' if self.holds else 'BROKEN'}  {self.what}: {self.seen:.4g} {self.unit} (at most {self.most:g})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Victim:
    """The server that is hurt."""

    target: Target
    token: str

    def files(self) -> int:
        """Return how many descriptors it has open."""
        return len(os.listdir(f"/proc/{self.target.pid}/fd"))  # noqa: PTH208  # much quicker for thousands

    def kib(self, field: str = "VmRSS") -> int:
        """Return its memory: ``VmRSS`` now, ``VmHWM`` the most since `forget_peak`."""
        status = Path(f"/proc/{self.target.pid}/status").read_text()
        return int(status.partition(f"{field}:")[2].split()[0])

    def cpu(self, secs: float) -> float:
        """Return how much of a core it takes in the next *secs*, in percent."""
        before = self.target.cpu_secs()
        time.sleep(secs)
        return 100 * (self.target.cpu_secs() - before) / secs

    def forget_peak(self) -> None:
        """Let ``VmHWM`` begin anew at what it has now."""
        Path(f"/proc/{self.target.pid}/clear_refs").write_text("5")

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, bytes]:
        """Ask as its user and return status and body."""
        content = b"" if body is None else json.dumps(body).encode()
        with self.target.connect() as sock:
            head, answer = exchange(sock, request_bytes(method, path, self.token, content))
        return status_of(head), answer

    def load(self, method: str, path: str, body: bytes = b"") -> Load:
        """Return how it answers one client."""
        return load(self.target, request_bytes(method, path, self.token, body), SAMPLES)

    def exec_p50_ms(self) -> float:
        """Return the median of a command's round trip."""
        command = json.dumps({"command": ["true"]}).encode()
        return self.load("POST", "/v1/vms/vm/exec", command).quantile(0.5) * 1e3

    def p99_ms(self) -> float:
        """Return the 99th percentile of a list's round trip."""
        return self.load("GET", "/v1/vms").quantile(0.99) * 1e3

    def open_ws(self, path: str) -> tuple[socket.socket, bytes]:
        """Upgrade, and return the connection with the head of the answer."""
        sock = self.target.connect()
        sock.sendall(_UPGRADE.format(path=path, token=self.token).encode())
        head = b""
        while b"\r\n\r\n" not in head and (data := sock.recv(65536)):
            head += data
        return sock, head

    @contextlib.contextmanager
    def memory(self, what: str, verdicts: list[Verdict]) -> Iterator[None]:
        """Judge by how much the most memory it had during the block is over what it had before."""
        self.forget_peak()
        before = self.kib()
        yield
        grown = self.kib("VmHWM") - before
        verdicts.append(Verdict(what=f"{what}: memory at its most", seen=grown, most=GROWTH_KIB_MAX, unit="KiB"))


def slower(victim: Victim, peer: Victim, figure: Callable[[Victim], float]) -> float:
    """Return how many times as high *figure* is for *victim* as for *peer*, which nobody hurts.

    They are asked in turns, and the best of some rounds counts: the machine's own mood changes by more than what is
    looked for within the seconds an ordeal takes, and what else it does only adds.
    """
    rounds = [(figure(victim), figure(peer)) for _ in range(ROUNDS)]
    return min(hurt for hurt, _ in rounds) / min(unhurt for _, unhurt in rounds)


def prepare(victim: Victim) -> None:
    """Make the VM the ordeals use, and have everything loaded that is loaded once."""
    status, answer = victim.ask("POST", "/v1/vms", {"name": "vm", "cpus": 1, "mem_mib": 128})
    if status != 201:
        raise BackendError(f"the server did not make a VM: {answer!r}")
    victim.exec_p50_ms()
    sock, _ = victim.open_ws("/v1/vms/vm/console")
    sock.close()


# --- the ordeals -----------------------------------------------------------------------------------------------------


def idle_consoles(victim: Victim, peer: Victim, count: int, idle_secs: float) -> list[Verdict]:
    """Attach *count* consoles that say nothing."""
    files, alone, before = victim.files(), victim.cpu(idle_secs), victim.kib()
    with contextlib.ExitStack() as stack:
        for number in range(count):
            sock, head = victim.open_ws("/v1/vms/vm/console?history=0")
            stack.enter_context(sock)
            if status_of(head) != 101:
                raise BackendError(f"console {number} was refused: {head!r}")
        memory = (victim.kib() - before) / count
        cpu = victim.cpu(idle_secs)
        ratio = slower(victim, peer, Victim.exec_p50_ms)
    what = f"{count} idle consoles"
    return [
        Verdict(what=f"{what}: memory of one", seen=memory, most=CONSOLE_KIB_MAX, unit="KiB"),
        Verdict(what=f"{what}: CPU", seen=cpu - alone, most=0.5, unit="% of a core more than without"),
        Verdict(what=f"{what}: exec p50 beside them, of a server without", seen=ratio, most=1.5, unit="times"),
        *_back_to(victim, what, files),
    ]


def bad_clients(victim: Victim, peer: Victim, count: int) -> list[Verdict]:
    """Have *count* clients that never read, never finish their headers or are very slow, then stop the server."""
    address = f"{victim.target.address[0]}:{victim.target.address[1]}"
    argv = [sys.executable, "-m", "noid_bench.bad_clients", address, str(count)]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None  # noqa: S101  # made with pipes
    assert process.stdout is not None  # noqa: S101
    with process:
        try:
            process.stdout.readline()
            time.sleep(1.0)  # so that what they send at first is sent: the bound is on what stays
            ratio = slower(victim, peer, Victim.p99_ms)
            began = time.monotonic()
            os.kill(victim.target.pid, signal.SIGTERM)
            _until(lambda: _has_ended(victim.target.pid))
            stopped = time.monotonic() - began
        finally:
            process.stdin.close()
            process.kill()
    what = f"{count} bad clients"
    return [
        Verdict(what=f"{what}: p99 of others, of a server without", seen=ratio, most=2.0, unit="times"),
        Verdict(what=f"{what}: SIGTERM to the end", seen=stopped, most=STOP_SECS_MAX, unit="s"),
    ]


def bomb(victim: Victim) -> list[Verdict]:
    """Send a WebSocket message of 58 KB that would unpack to gigabytes."""
    what, verdicts, files = "a compressed bomb", list[Verdict](), victim.files()
    payload = _deflated_zeros(58 << 10)
    with victim.memory(what, verdicts):
        sock, head = victim.open_ws("/v1/vms/vm/console")
        with sock:
            offered = b"permessage-deflate" in head
            frame = b"\xc2\xfe" + len(payload).to_bytes(2, "big") + bytes(4) + payload
            ended = _ends(sock, frame)
    return [
        *verdicts,
        Verdict(what=f"{what}: compression negotiated, or still connected", seen=offered + (not ended), most=0),
        *_back_to(victim, what, files),
    ]


def huge_header(victim: Victim, size: int) -> list[Verdict]:
    """Send *size* bytes of header."""
    what, verdicts, files = f"a header of {size >> 20} MiB", list[Verdict](), victim.files()
    with victim.memory(what, verdicts), victim.target.connect() as sock:
        status = _answer_to_endless(sock, b"GET /healthz HTTP/1.1\r\nHost: noid\r\nX-Long: ", b"a" * (1 << 16), size)
    return [*verdicts, _is(f"{what}: its status", status, 431), *_back_to(victim, what, files)]


def endless_body(victim: Victim, size: int) -> list[Verdict]:
    """Send bodies without end, as a user and as nobody."""
    what, verdicts, files = "a body without end", list[Verdict](), victim.files()
    piece = b"10000\r\n" + bytes(1 << 16) + b"\r\n"
    for who, token, expected in (("a user", victim.token, 413), ("nobody", "noid_tok_" + "0" * 64, 401)):
        lines = f"Host: noid\r\nAuthorization: Bearer {token}\r\nTransfer-Encoding: chunked"
        head = f"POST /v1/vms HTTP/1.1\r\n{lines}\r\n\r\n".encode()
        with victim.memory(f"{what}, of {who}", verdicts), victim.target.connect() as sock:
            status = _answer_to_endless(sock, head, piece, size)
        verdicts.append(_is(f"{what}, of {who}: its status", status, expected))
    return [*verdicts, *_back_to(victim, what, files)]


def dropped_connections(victim: Victim, count: int, *, together: int = 200) -> list[Verdict]:
    """Open and drop *count* connections, *together* at a time."""
    what, verdicts, files = f"{count} connections opened and dropped", list[Verdict](), victim.files()
    with victim.memory(what, verdicts):
        for _ in range(count // together):
            with contextlib.ExitStack() as stack:
                for number in range(together):
                    sock = stack.enter_context(victim.target.connect())
                    if number % 2:
                        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: noid\r\n\r\n")
        after = _back_to(victim, what, files)
    status, _ = victim.ask("GET", "/healthz")
    return [*verdicts, *after, _is(f"{what}: the next one's status", status, 200)]


# --- inside ----------------------------------------------------------------------------------------------------------


def status_of(head: bytes) -> int:
    """Return the status in the head of an answer, 0 where there is none."""
    words = head.split(b" ", 2)
    return int(words[1]) if len(words) > 1 and words[1].isdigit() else 0


def _is(what: str, seen: int, expected: int) -> Verdict:
    return Verdict(what=f"{what} is {seen} and must be {expected}; off by", seen=abs(seen - expected), most=0)


def _answer_to_endless(sock: socket.socket, begin: bytes, piece: bytes, size: int) -> int:
    """Send *begin* and *size* bytes of *piece* after *piece*, unless stopped, and return the status of the answer."""
    sent = 0
    with contextlib.suppress(ConnectionError, TimeoutError):
        sock.sendall(begin)
        while sent < size:
            sock.sendall(piece)
            sent += len(piece)
            if sent % (1 << 20) == 0 and _readable(sock):
                break
    try:
        head, _ = receive(sock)
    except (OSError, BackendError):
        return 0
    return status_of(head)


def _readable(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
    finally:
        sock.settimeout(SETTLE_SECS)


def _ends(sock: socket.socket, data: bytes) -> bool:
    """Whether the server ends the connection after it was sent *data*."""
    try:
        sock.sendall(data)
        while sock.recv(65536):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return True


def _deflated_zeros(size: int) -> bytes:
    """Return *size* bytes of a raw deflate stream of zeros: about a thousand times as many."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = bytearray()
    while len(packed) < size:
        packed += packer.compress(bytes(1 << 20))
    return bytes(packed[:size])


def _back_to(victim: Victim, what: str, files: int) -> list[Verdict]:
    """Judge whether everything was closed."""
    with contextlib.suppress(TimeoutError):
        _until(lambda: victim.files() <= files)
    return [Verdict(what=f"{what}: descriptors left open", seen=max(0, victim.files() - files), most=0)]


def _has_ended(pid: int) -> bool:
    """Whether the process is gone, or waits only for its parent to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SETTLE_SECS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.02)
