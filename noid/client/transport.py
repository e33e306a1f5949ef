"""HTTP/1.1 with one agent over TCP, TLS or a unix socket: blocking, one request per connection, nothing else.

Written by hand because a command that lists VMs shall start and end faster than one blinks: ``http.client`` alone costs
more to import than all of this takes to run, and the agent and its predecessor need no more of HTTP than this.

Deadlines: `CONNECT_SECS` to reach the agent; `ANSWER_SECS` of silence while reading the answer to a quick question,
none for work, which may take minutes. There TCP keep-alive tells a network that is gone from an agent that is busy.
"""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from noid import __version__
from noid.client.calls.call import Call, Reply
from noid.client.errors import ConnectionFailed
from noid.client.settings import Endpoint
from noid.client.sockets import CONNECT_SECS, connect_unix
from noid.errors import NoidError

API_VERSION = 1
CONNECT_FALLBACK_SECS = 2.0
ANSWER_SECS = 30.0
HEAD_BYTES_MAX = 65536
BODY_BYTES_MAX = 64 * 1024 * 1024
PIECES_BYTES_MAX = 1 << 40


def request(endpoint: Endpoint, call: Call[Any]) -> Reply:
    """Send the request of *call* and return the answer, whatever its status.

    Raises:
        ConnectionFailed: there is no agent, or the connection ended before the whole answer was there.
        NoidError: the other side speaks another version of the API.
    """
    content = b"" if call.body is None else json.dumps(call.body, separators=(",", ":")).encode("ascii")
    extra = {"Connection": "close", **call.headers}
    if content or call.method == "POST":
        extra |= {"Content-Type": "application/json", "Content-Length": str(len(content))}
    with connect(endpoint) as sock:
        sock.settimeout(ANSWER_SECS if call.quick else None)
        stream = Incoming(sock, endpoint)
        try:
            sock.sendall(_head(endpoint, call.method, call.path, extra) + content)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it may have answered before it had read everything; without an answer, reading says so
        except OSError as error:
            raise ConnectionFailed(f"{endpoint.address} went away: {error.strerror or error}.") from error
        status, headers = stream.head()
        return Reply(status=status, headers=headers, body=stream.body(call.method, status, headers))


class Exchange:
    """A request whose answer has begun: *status*, *headers* in lower case, and the body in `pieces`."""

    def __init__(self, stream: Incoming, method: str) -> None:
        self.status, self.headers = stream.head()
        self._stream = stream
        self._method = method

    def reply(self) -> Reply:
        """Return the whole answer: for those that are small."""
        body = self._stream.body(self._method, self.status, self.headers)
        return Reply(status=self.status, headers=self.headers, body=body)

    def pieces(self) -> Iterator[bytes]:
        """Yield the body as it comes, of whatever length.

        Raises:
            ConnectionFailed: it ended before all of it was there.
        """
        return self._stream.pieces(self.headers)


@contextmanager
def exchange(
    endpoint: Endpoint, method: str, path: str, headers: Mapping[str, str], content: Iterable[bytes] = ()
) -> Iterator[Exchange]:
    """Send a request with a body that is produced as it is sent, and yield its answer when that begins.

    A length is announced if *headers* has a ``Content-Length``; else a body is sent in chunks if *headers* says so.
    An answer that comes before all of *content* was sent ends the sending.

    Raises:
        ConnectionFailed: there is no agent, or the connection ended before an answer.
        NoidError: the other side speaks another version of the API.
    """
    chunked = "Transfer-Encoding" in headers
    with connect(endpoint) as sock:
        sock.settimeout(None)  # a slow guest is no dead one; TCP keep-alive tells a network that is gone
        stream = Incoming(sock, endpoint)
        try:
            sock.sendall(_head(endpoint, method, path, {"Connection": "close", **headers}))
            for piece in content:
                if select.select([sock], [], [], 0)[0]:
                    break
                if not piece:
                    continue  # as a chunk it would say that the body ends here
                sock.sendall(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            else:
                if chunked:
                    sock.sendall(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            pass  # it may have answered before it had read everything; without an answer, reading says so
        yield Exchange(stream, method)


def upgrade(endpoint: Endpoint, path: str) -> tuple[socket.socket, bytes] | Reply:
    """Ask for a WebSocket. Return the socket and what the server sent already, or the answer that refuses it.

    Raises:
        ConnectionFailed: there is no agent, or it is not one that follows RFC 6455.
        NoidError: the other side speaks another version of the API.
    """
    import os
    from base64 import b64encode
    from hashlib import sha1

    key = b64encode(os.urandom(16)).decode()
    wanted = b64encode(
        sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode(), usedforsecurity=False).digest()
    ).decode()
    extra = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": key,
    }
    sock = connect(endpoint)
    try:
        sock.settimeout(ANSWER_SECS)
        stream = Incoming(sock, endpoint)
        try:
            sock.sendall(_head(endpoint, "GET", path, extra))
        except OSError as error:
            raise ConnectionFailed(f"{endpoint.address} went away: {error.strerror or error}.") from error
        status, headers = stream.head()
        if status != 101:
            reply = Reply(status=status, headers=headers, body=stream.body("GET", status, headers))
            sock.close()
            return reply
        if headers.get("sec-websocket-accept") != wanted:
            raise ConnectionFailed(f"{endpoint.address} answered like a WebSocket server that is none.")
        return sock, stream.rest()
    except BaseException:
        sock.close()
        raise


def _head(endpoint: Endpoint, method: str, path: str, extra: Mapping[str, str]) -> bytes:
    parts = urlsplit(endpoint.url or "http://localhost")
    headers = {"Host": parts.netloc, "User-Agent": f"noid/{__version__}", "Accept": "application/json", **extra}
    if endpoint.token is not None:
        headers["Authorization"] = f"Bearer {endpoint.token}"
    lines = [f"{method} {parts.path}{path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")


class Incoming:
    """What arrives on a socket, in pieces of the size one asks for. Every way it can fail is a `ConnectionFailed`."""

    def __init__(self, sock: socket.socket, endpoint: Endpoint) -> None:
        self._sock = sock
        self._endpoint = endpoint
        self._buffer = bytearray()

    def head(self) -> tuple[int, dict[str, str]]:
        """Return status and headers of the next answer that is final."""
        while True:
            first, *lines = self._until(b"\r\n\r\n").decode("latin-1").split("\r\n")
            version, _, rest = first.partition(" ")
            if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
                raise ConnectionFailed(f"{self._endpoint.address} does not speak HTTP. Is the port right?")
            headers = {
                name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
            }
            _check_version(headers, self._endpoint)
            status = int(rest[:3])
            if status == 101 or status >= 200:
                return status, headers

    def body(self, method: str, status: int, headers: Mapping[str, str]) -> bytes:
        """Return the body that belongs to that head."""
        if method == "HEAD" or status in (204, 304):
            return b""
        if "chunked" in headers.get("transfer-encoding", "").lower():
            return self._chunks()
        length = headers.get("content-length")
        if length is None:
            while self._receive():
                pass
            return self.rest()
        if not length.isdigit() or int(length) > BODY_BYTES_MAX:
            raise self._broken("an answer of unreasonable length")
        return self._exactly(int(length))

    def pieces(self, headers: Mapping[str, str]) -> Iterator[bytes]:
        """Yield the body that belongs to that head, of whatever length, as it arrives."""
        if "chunked" in headers.get("transfer-encoding", "").lower():
            while size := self._chunk_size(PIECES_BYTES_MAX):
                yield from self._up_to(size)
                self._exactly(2)
            return
        length = headers.get("content-length", "")
        if not length.isdigit():
            raise self._broken("an answer of unknown length")
        yield from self._up_to(int(length))

    def _up_to(self, count: int) -> Iterator[bytes]:
        while count:
            if not self._buffer and not self._receive():
                raise self._broken("half an answer: it closed the connection")
            piece = bytes(self._buffer[:count])
            del self._buffer[:count]
            count -= len(piece)
            yield piece

    def rest(self) -> bytes:
        """Return what has arrived beyond what was asked for."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest

    def _chunks(self) -> bytes:
        body = bytearray()
        while True:
            size = self._chunk_size(BODY_BYTES_MAX - len(body))
            if size == 0:
                return bytes(body)  # trailers may follow; nobody wants them, and the connection ends here
            body += self._exactly(size)
            self._exactly(2)

    def _chunk_size(self, most: int) -> int:
        size_text = self._until(b"\r\n").partition(b";")[0].strip()
        try:
            size = int(size_text, 16)
        except ValueError:
            raise self._broken("a malformed answer") from None
        if not 0 <= size <= most:
            raise self._broken("an answer of unreasonable length")
        return size

    def _until(self, mark: bytes) -> bytes:
        while (end := self._buffer.find(mark)) < 0:
            if len(self._buffer) > HEAD_BYTES_MAX:
                raise self._broken("an answer with endless headers")
            if not self._receive():
                raise self._broken(
                    "nothing more" if self._buffer else f"no answer: it closed the connection{self._maybe_tls()}"
                )
        found = bytes(self._buffer[:end])
        del self._buffer[: end + len(mark)]
        return found

    def _exactly(self, count: int) -> bytes:
        while len(self._buffer) < count:
            if not self._receive():
                raise self._broken("half an answer: it closed the connection")
        found = bytes(self._buffer[:count])
        del self._buffer[:count]
        return found

    def _receive(self) -> bool:
        try:
            data = self._sock.recv(65536)
        except TimeoutError as error:
            raise self._broken(
                f"no answer for {ANSWER_SECS:.0f} s. Is the server overloaded or a proxy stuck?"
            ) from error
        except OSError as error:
            raise ConnectionFailed(f"{self._endpoint.address} went away: {error.strerror or error}.") from error
        if len(self._buffer) > BODY_BYTES_MAX:
            raise self._broken("an answer of unreasonable length")
        self._buffer += data
        return bool(data)

    def _maybe_tls(self) -> str:
        plain = (self._endpoint.url or "").startswith("http://")
        return ", as servers do that are reached by https://" if plain else ""

    def _broken(self, what: str) -> ConnectionFailed:
        return ConnectionFailed(f"{self._endpoint.address} sent {what}.")


def _check_version(headers: Mapping[str, str], endpoint: Endpoint) -> None:
    version = headers.get("x-noid-api-version")
    if version is None or version == str(API_VERSION):
        return
    raise NoidError(
        f"{endpoint.address} speaks version {version!r} of the API, and this noid {__version__} version {API_VERSION}."
        " Install a noid that fits the server."
    )


# --- connecting -----------------------------------------------------------------------------------------------------


def connect(endpoint: Endpoint) -> socket.socket:
    """Return a connected socket, starting this user's own agent if that is what *endpoint* means and it does not run.

    Raises:
        ConnectionFailed: names the address and the reason.
        ConfigError: the local agent cannot be started.
    """
    if endpoint.data_dir is not None:
        from noid.client import local

        return local.connect(endpoint.data_dir)
    if endpoint.socket_path is not None:
        try:
            return connect_unix(endpoint.socket_path)
        except OSError as error:
            raise ConnectionFailed(f"cannot connect to {endpoint.address}: {error.strerror or error}.") from error
    return _connect_tcp(endpoint)


def _connect_tcp(endpoint: Endpoint) -> socket.socket:
    """Try each address, IPv4 first, through the TLS handshake, within `CONNECT_SECS` altogether."""
    parts = urlsplit(endpoint.url or "")
    host, secure = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    deadline = time.monotonic() + CONNECT_SECS
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
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
            sock.settimeout(left if number == len(addresses) else min(left, CONNECT_FALLBACK_SECS))
            sock.connect(address)
            sock.settimeout(max(deadline - time.monotonic(), 0.1))
            _keep_alive(sock)
            return _secured(sock, host) if secure else sock
        except OSError as error:  # TimeoutError and ssl.SSLError are among them
            sock.close()
            failures.append(f"{address[0]} port {port}: {_reason(error)}")
            if getattr(error, "verify_message", None):
                hint = "If that is its certificate, name a PEM file with it, or with who signed it, in SSL_CERT_FILE."
        except BaseException:
            sock.close()
            raise
    detail = "; ".join(failures) or "no address answered in time"
    raise ConnectionFailed(f"cannot connect to {endpoint.address} ({detail}). {hint}")


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return getattr(error, "verify_message", None) or error.strerror or str(error)


def _keep_alive(sock: socket.socket) -> None:
    """Notice within a minute that the other side is gone, both while waiting and while sending."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 60000)):
        if hasattr(socket, option):  # the client also runs where Linux's names are not known
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _secured(sock: socket.socket, host: str) -> socket.socket:
    import ssl  # 20 ms that only https pays

    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context.wrap_socket(sock, server_hostname=host)
