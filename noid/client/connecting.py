"""Reaching an agent over TCP, TLS or a unix socket: within `CONNECT_SECS` there is a connection, or a reason."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from functools import partial

from noid.client.errors import ConnectionFailed
from noid.client.settings import Endpoint
from noid.client.sockets import CONNECT_SECS, connect_unix
from noid.client.waiting import Waiting
from noid.core import paths

CONNECT_FALLBACK_SECS = 2.0
_NOT_TLS = (
    "WRONG_VERSION_NUMBER",
    "UNKNOWN_PROTOCOL",
    "HTTP_REQUEST",
    "PACKET_LENGTH_TOO_LONG",
    "RECORD_LAYER_FAILURE",
)
# By name: plain sockets do without importing ssl.
_TLS_WAITS = ("SSLWantReadError", "SSLWantWriteError")
_TLS_HAS_ENDED = ("SSLEOFError", "SSLZeroReturnError")
RECEIVE_BYTES = 1 << 17  # more than a TLS record holds: nothing that cannot be waited for stays inside the TLS layer


class Connection:
    """A non-blocking socket, and what waits for it. Close it, whatever happens."""

    def __init__(self, sock: socket.socket, waiting: Waiting) -> None:
        self.socket = sock
        self.waiting = waiting

    def receive_now(self) -> bytes | None:
        """Return what has arrived, nothing at its end, None if there is nothing yet.

        Raises:
            OSError: it is broken.
        """
        try:
            return self.socket.recv(RECEIVE_BYTES)
        except OSError as error:
            if would_block(error):
                return None
            raise

    def send_now(self, data: bytes | bytearray | memoryview) -> int:
        """Send the beginning of *data*, and return how much that was.

        Raises:
            BrokenPipeError: the other side has hung up; what it said before that can still be received.
            OSError: it is broken.
        """
        try:
            return self.socket.send(data)
        except OSError as error:
            if would_block(error):
                return 0
            if type(error).__name__ in _TLS_HAS_ENDED:
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) from error
            raise

    async def receive(self, secs: float | None = None) -> bytes:
        """Return what has arrived, when something has, or nothing at its end.

        Raises:
            OSError: it is broken; `TimeoutError` after *secs* of silence.
        """
        while True:
            # First waiting is as good as first reading: what arrived is told by the kernel.
            readable, _ = await self.waiting.until_ready((self.socket,), (), secs)
            if not readable:
                raise TimeoutError
            data = self.receive_now()
            if data is not None:
                return data

    async def send(self, data: bytes) -> None:
        """Send all of *data*.

        Raises:
            OSError: it is broken.
        """
        unsent = memoryview(data)
        while unsent := unsent[self.send_now(unsent) :]:
            await self.waiting.until_ready((), (self.socket,), None)

    def close(self) -> None:
        """Hang up."""
        self.waiting.let_go(self.socket)
        self.socket.close()


def would_block(error: OSError) -> bool:
    """Return whether *error* only says that there is nothing to do now."""
    if isinstance(error, (BlockingIOError, InterruptedError)):
        return True
    return type(error).__name__ in _TLS_WAITS


async def connect(endpoint: Endpoint, waiting: Waiting) -> Connection:
    """Return a connection, starting this user's own agent if that is what *endpoint* means and it does not run.

    Raises:
        ConnectionFailed: names the address and the reason.
        ConfigError: the local agent cannot be started.
    """
    if endpoint.data_dir is not None:
        sock = await _connect_local(endpoint.data_dir, waiting)
    elif endpoint.socket_path is not None:
        try:
            path = str(endpoint.socket_path)
            at_once = _connect_unix_now(path)
            sock = await waiting.in_thread(partial(connect_unix, path)) if at_once is None else at_once
        except OSError as error:
            raise ConnectionFailed(f"cannot connect to {endpoint.address}: {error.strerror or error}.") from error
    else:
        sock = await _connect_tcp(endpoint, waiting)
    sock.setblocking(False)
    return Connection(sock, waiting)


async def _connect_local(data_dir: str, waiting: Waiting) -> socket.socket:
    path = paths.socket_path_text(data_dir)
    with contextlib.suppress(OSError):  # whatever it is, the agent's starter finds it too, and says so
        paths.check_private(os.path.dirname(path))  # noqa: PTH120  # without pathlib, which costs more than asking
        at_once = _connect_unix_now(path)
        if at_once is not None:
            return at_once
    from pathlib import Path

    from noid.client import local

    return await waiting.in_thread(partial(local.connect, Path(data_dir)))


def _connect_unix_now(path: str) -> socket.socket | None:
    """Return a socket, or None if the agent's queue is full.

    Raises:
        OSError: as connect(2) says.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.connect(path)
    except BlockingIOError:
        sock.close()
        return None
    except BaseException:
        sock.close()
        raise
    return sock


async def _connect_tcp(endpoint: Endpoint, waiting: Waiting) -> socket.socket:
    """Try each address, IPv4 first, through the TLS handshake, within `CONNECT_SECS` altogether."""
    from urllib.parse import urlsplit

    parts = urlsplit(endpoint.url or "")
    host, secure = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    deadline = time.monotonic() + CONNECT_SECS
    try:
        found = await waiting.in_thread(partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM))
    except (OSError, UnicodeError) as error:
        raise ConnectionFailed(f"cannot find {host!r}: {getattr(error, 'strerror', None) or error}.") from error
    addresses = sorted(found, key=lambda entry: entry[0] != socket.AF_INET)
    failures: list[str] = []
    hint = "Is noid-server running there, on that port?"
    for number, (family, kind, protocol, _, address) in enumerate(addresses, 1):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            until = time.monotonic() + (left if number == len(addresses) else min(left, CONNECT_FALLBACK_SECS))
            await _connect_to(sock, address, waiting, until)
            _keep_alive(sock)
            if secure:
                sock = await _secured(sock, host, waiting, deadline)
        except OSError as error:  # TimeoutError and ssl.SSLError are among them
            sock.close()
            failures.append(f"{address[0]} port {port}: {_reason(error)}")
            hint = _tls_hint(error) or hint
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    detail = "; ".join(failures) or "no address answered in time"
    raise ConnectionFailed(f"cannot connect to {endpoint.address} ({detail}). {hint}")


async def _connect_to(sock: socket.socket, address: object, waiting: Waiting, until: float) -> None:
    code = sock.connect_ex(address)  # type: ignore[arg-type]  # as getaddrinfo gave it
    if code == errno.EINPROGRESS:
        _, writable = await waiting.until_ready((), (sock,), until - time.monotonic())
        if not writable:
            raise TimeoutError
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    said = getattr(error, "verify_message", None) or getattr(error, "reason", None)  # of TLS
    if isinstance(said, str) and said:
        return said.rstrip(".") if " " in said else said.replace("_", " ").lower()
    return error.strerror or str(error)


def _tls_hint(error: OSError) -> str:
    """Return what to try after *error* of a TLS handshake; nothing for others."""
    match getattr(error, "verify_code", None):
        case None:
            if getattr(error, "reason", None) in _NOT_TLS:
                return "What listens there does not speak TLS. Is the port right, or is its URL one with http://?"
            return ""
        case 9 | 10:  # not valid yet, expired
            return "Whoever runs the server has to renew its certificate, unless the clock of this machine is wrong."
        case 62 | 64:  # another name, another address
            return "Use the name that its certificate is for; or somebody else answers there."
    return "If that is its certificate, name a PEM file with it, or with who signed it, in SSL_CERT_FILE."


def _keep_alive(sock: socket.socket) -> None:
    """Notice within a minute that the other side is gone, both while waiting and while sending."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 60000)):
        if hasattr(socket, option):  # the client also runs where Linux's names are not known
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


async def _secured(sock: socket.socket, host: str, waiting: Waiting, until: float) -> socket.socket:
    """Return *sock* inside TLS. It owns *sock*, also when this fails."""
    import ssl  # 20 ms that only https pays

    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    secured = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
    try:
        while True:
            try:
                secured.do_handshake()
            except ssl.SSLWantReadError:
                readable, writable = await waiting.until_ready((secured,), (), until - time.monotonic())
            except ssl.SSLWantWriteError:
                readable, writable = await waiting.until_ready((), (secured,), until - time.monotonic())
            else:
                return secured
            if not readable and not writable:
                raise TimeoutError
    except BaseException:
        secured.close()
        raise
