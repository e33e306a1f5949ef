"""Clients no server wants, in a process of their own. Each costs as little as can be: there may be hundreds.

Usage: ``python -m noid_bench.bad_clients HOST:PORT COUNT``. A third of them ask for much and never read, a third never
finish their headers, a third send a byte a second. One that is dropped comes again. Says ``ready`` when all are
connected, and stays until its standard input ends. Each comes from a loopback address of its own.
"""

from __future__ import annotations

import contextlib
import select
import selectors
import socket
import sys
import time

BACK_AFTER_SECS = 1.0
DEAF, UNFINISHED, SLOW = range(3)
#: What has so long an answer, and is asked so often, that no socket's buffers take it all.
MUCH = b"GET /openapi.json HTTP/1.1\r\nHost: noid\r\n\r\n" * 64
BEGINNING = b"GET /healthz HTTP/1.1\r\nHost: noid\r\nX-Never: ends"


class BadClient:
    """One of them."""

    def __init__(self, number: int, address: tuple[str, int]) -> None:
        self._address = address
        self._own = f"127.0.{1 + number // 250}.{1 + number % 250}"
        self._kind = number % 3
        self.sock: socket.socket | None = None
        self.due = 0.0

    def connect(self) -> None:
        """Connect and do the first bad thing."""
        self.sock = socket.socket()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.sock.bind((self._own, 0))
        self.sock.connect(self._address)
        self.sock.setblocking(False)
        self.due = time.monotonic() + 1.0
        with contextlib.suppress(BlockingIOError):
            self.sock.sendall((MUCH, BEGINNING, b"G")[self._kind])

    def misbehave(self) -> None:
        """Do the next bad thing."""
        assert self.sock is not None  # noqa: S101  # connected before
        self.due = time.monotonic() + 1.0
        with contextlib.suppress(BlockingIOError):
            if self._kind == SLOW:
                self.sock.sendall(b"G")
            elif self._kind == DEAF and _is_gone(self.sock):
                self.drop()

    def hears(self) -> bool:
        """Whether this one reads, if only to hear that it was dropped."""
        return self._kind != DEAF

    def drop(self) -> None:
        """Begin again in a moment."""
        if self.sock is not None:
            self.sock.close()
        self.sock, self.due = None, time.monotonic() + BACK_AFTER_SECS


def _is_gone(sock: socket.socket) -> bool:
    poller = select.poll()
    poller.register(sock, select.POLLRDHUP)
    return bool(poller.poll(0))


def main() -> None:
    """Be bad until stdin ends."""
    host, _, port = sys.argv[1].rpartition(":")
    clients = [BadClient(number, (host, int(port))) for number in range(int(sys.argv[2]))]
    for client in clients:
        client.connect()
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        with selectors.DefaultSelector() as selector:
            for client in clients:
                if client.sock is not None and client.hears():
                    selector.register(client.sock, selectors.EVENT_READ, client)
            for key, _ in selector.select(0.1):
                with contextlib.suppress(BlockingIOError):
                    try:
                        ended = not key.data.sock.recv(65536)
                    except ConnectionError:
                        ended = True
                    if ended:
                        key.data.drop()
        for client in clients:
            if time.monotonic() >= client.due:
                try:
                    client.connect() if client.sock is None else client.misbehave()
                except OSError:  # dropped, or refused while the server is full or going down
                    client.drop()


if __name__ == "__main__":
    main()
