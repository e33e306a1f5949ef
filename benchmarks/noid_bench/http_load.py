"""Asks a server the same again and again, with as little of a client as there can be, and measures both of them."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from noid.errors import BackendError

PATIENCE_SECS = 30.0
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server: where it listens, which process it is."""

    name: str
    address: tuple[str, int]
    pid: int

    def connect(self) -> socket.socket:
        """Connect to it."""
        sock = socket.create_connection(self.address, PATIENCE_SECS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def cpu_secs(self) -> float:
        """Return how much CPU time its process has taken, all threads, by the scheduler's own books."""
        tasks = Path(f"/proc/{self.pid}/task")
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()) / 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a number of requests came to."""

    latencies_secs: Sequence[float]
    cpu_secs_per_request: float
    requests_per_sec: float

    def quantile(self, share: float) -> float:
        """Return the latency, in seconds, that *share* of the requests stay below (nearest rank)."""
        ranked = sorted(self.latencies_secs)
        return ranked[min(len(ranked) - 1, max(0, round(share * len(ranked) + 0.5) - 1))]


def request_bytes(method: str, path: str, token: str, body: bytes = b"") -> bytes:
    """Return a request as it goes over the wire."""
    lines = [f"{method} {path} HTTP/1.1", "Host: noid", f"Authorization: Bearer {token}"]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def exchange(sock: socket.socket, request: bytes) -> tuple[bytes, bytes]:
    """Send *request* and return the head and the body of the answer.

    Raises:
        BackendError: the server hung up.
    """
    sock.sendall(request)
    return receive(sock)


def receive(sock: socket.socket) -> tuple[bytes, bytes]:
    """Return the head and the body of the next answer.

    Raises:
        BackendError: the server hung up, or does not say how long its answer is.
    """
    received = b""
    while (end := received.find(b"\r\n\r\n") + 4) < 4:
        received += _some(sock)
    length = _LENGTH.search(received, 0, end)
    if length is None:
        raise BackendError(f"an answer without a length: {received[:end]!r}")
    while len(received) < end + int(length[1]):
        received += _some(sock)
    return received[:end], received[end:]


class Asking:
    """Clients of *target* that stay connected, *together* of them, and what they have measured so far."""

    def __init__(self, target: Target, request: bytes, together: int = 1) -> None:
        self._target = target
        self._request = request
        self._latencies: list[float] = []
        self._cpu_secs = self._secs = 0.0
        self._socks = [target.connect() for _ in range(together)]

    def __enter__(self) -> Asking:
        """Ask once each, which does not count."""
        for sock in self._socks:
            exchange(sock, self._request)
        return self

    def __exit__(self, *error: object) -> None:
        """Hang up."""
        for sock in self._socks:
            sock.close()

    def ask(self, count: int) -> None:
        """Ask *count* times, all at once, each waiting for its answer before it asks again.

        Raises:
            BackendError: an answer was not 2xx.
        """
        cpu, began = self._target.cpu_secs(), time.perf_counter()
        for _ in range(count // len(self._socks)):
            asked = time.perf_counter()
            for sock in self._socks:
                sock.sendall(self._request)
            for sock in self._socks:
                head, _ = receive(sock)
                self._latencies.append(time.perf_counter() - asked)
                if not head.startswith(b"HTTP/1.1 2"):
                    raise BackendError(f"{self._target.name} answered {head!r}")
        self._secs += time.perf_counter() - began
        self._cpu_secs += self._target.cpu_secs() - cpu

    def load(self) -> Load:
        """Return what it came to."""
        count = len(self._latencies)
        return Load(
            latencies_secs=tuple(self._latencies),
            cpu_secs_per_request=self._cpu_secs / count,
            requests_per_sec=count / self._secs,
        )


def load(target: Target, request: bytes, count: int, *, together: int = 1) -> Load:
    """Ask *target* *count* times over *together* connections.

    Raises:
        BackendError: an answer was not 2xx.
    """
    with Asking(target, request, together) as asking:
        asking.ask(count)
        return asking.load()


def _some(sock: socket.socket) -> bytes:
    data = sock.recv(1 << 18)
    if not data:
        raise BackendError("the server hung up in the middle of an answer")
    return data
