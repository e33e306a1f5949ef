"""Something between a client and its server: it can lose answers, fall silent, and speak TLS."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

PATIENCE_SECS = 20.0


class Between:
    """Passes on what comes to a port of its own.

    Attributes:
        requests: The first line of each request that came.
        answer: What is to be done with a request in place of asking the server: None, or what is answered; nothing at
            all closes the connection.
        loses: How many answers of the server are thrown away, when they have begun, with their connections.
        hung_up: How many connections it has closed after an answer of its own.
        ended: How many connections their clients have closed while they were open.
    """

    def __init__(self, target: Path, tls: ssl.SSLContext | None) -> None:
        self.requests: list[str] = []
        self.answer: Callable[[str], bytes | None] = lambda _: None
        self.loses = 0
        self.hung_up = 0
        self.ended = 0
        self._changed = threading.Condition()
        self._target, self._tls = target, tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"{'https' if self._tls else 'http'}://localhost:{self._listener.getsockname()[1]}"

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return when *condition* holds; it is asked whenever something came or ended."""
        with self._changed:
            assert self._changed.wait_for(condition, PATIENCE_SECS)

    def close(self) -> None:
        """End all of it."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(PATIENCE_SECS)
            assert not thread.is_alive()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._carry, args=(sock,)))
            self._threads[-1].start()

    def _carry(self, plain: socket.socket) -> None:
        with plain, contextlib.suppress(ConnectionError, ssl.SSLError):
            client = self._tls.wrap_socket(plain, server_side=True) if self._tls else plain
            client.settimeout(PATIENCE_SECS)
            with client, socket.socket(socket.AF_UNIX) as server:
                head = b""
                while b"\r\n\r\n" not in head:
                    if not (data := client.recv(65536)):
                        return
                    head += data
                request = head.partition(b" HTTP/1.1\r\n")[0].decode()
                with self._changed:
                    self.requests.append(request)
                    self._changed.notify_all()
                own = self.answer(request)
                if own is not None:
                    client.sendall(own)
                    client.close()
                    with self._changed:
                        self.hung_up += 1
                        self._changed.notify_all()
                    return
                server.settimeout(PATIENCE_SECS)
                server.connect(str(self._target))
                server.sendall(head)
                upstream = threading.Thread(target=self._pump, args=(client, server))
                upstream.start()
                with contextlib.suppress(OSError):
                    while data := server.recv(65536):
                        if self.loses and b"100 Continue" not in data:
                            self.loses -= 1
                            break
                        client.sendall(data)
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)
                upstream.join(PATIENCE_SECS)

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)
            with self._changed:
                self.ended += 1
                self._changed.notify_all()
            server.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def between(target: Path, tls: ssl.SSLContext | None = None) -> Iterator[Between]:
    """Stand between clients and the server at *target*."""
    it = Between(target, tls)
    try:
        yield it
    finally:
        it.close()
