"""HTTP/1.1 with one agent over TCP, TLS or a unix socket: one request per connection, nothing else.

Written by hand because a command that lists VMs shall start and end faster than one blinks: ``http.client`` alone costs
more to import than all of this takes to run, and the agent and its predecessor need no more of HTTP than this.

Deadlines: those of `noid.client.connecting` to reach the agent; `ANSWER_SECS` of silence while reading the answer to a
quick question, none for work, which may take minutes. There TCP keep-alive tells a network that is gone from an agent
that is busy.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from noid import __version__
from noid.client.calls.call import Call, Reply
from noid.client.connecting import Connection, connect
from noid.client.errors import ConnectionFailed, ConnectionLost
from noid.client.settings import Endpoint
from noid.client.waiting import Waiting
from noid.errors import NoidError

API_VERSION = 1
VERSION_HEADER = "x-noid-api-version"
ANSWER_SECS = 30.0
HEAD_BYTES_MAX = 65536
BODY_BYTES_MAX = 64 * 1024 * 1024
PIECES_BYTES_MAX = 1 << 40
_BEGINNING = b"HTTP/1."
_TLS_ALERT = b"\x15\x03"


async def request(endpoint: Endpoint, waiting: Waiting, call: Call[Any]) -> Reply:
    """Send the request of *call* and return the answer, whatever its status.

    Raises:
        ConnectionFailed: there is no agent. `ConnectionLost`: the connection ended before the whole answer was there.
        NoidError: the other side speaks another version of the API.
    """
    content = b"" if call.body is None else json.dumps(call.body, separators=(",", ":")).encode("ascii")
    extra = {"Connection": "close", **call.headers}
    if content or call.method == "POST":
        extra |= {"Content-Type": "application/json", "Content-Length": str(len(content))}
    connection = await connect(endpoint, waiting)
    try:
        try:
            await connection.send(_head(endpoint, call.method, call.path, extra) + content)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it may have answered before it had read everything; without an answer, reading says so
        except OSError as error:
            raise _gone(endpoint, error) from error
        incoming = Incoming(connection.receive, endpoint, ANSWER_SECS if call.quick else None)
        status, headers = await incoming.head()
        return Reply(status=status, headers=headers, body=await incoming.body(call.method, status, headers))
    finally:
        connection.close()


class Exchange:
    """A request whose answer has begun: *status*, *headers* in lower case, and the body piece by piece. Close it."""

    def __init__(
        self, connection: Connection, incoming: Incoming, method: str, status: int, headers: Mapping[str, str]
    ) -> None:
        self.status, self.headers = status, headers
        self._connection = connection
        self._incoming = incoming
        self._method = method

    async def reply(self) -> Reply:
        """Return the whole answer: for those that are small."""
        body = await self._incoming.body(self._method, self.status, self.headers)
        return Reply(status=self.status, headers=self.headers, body=body)

    async def piece(self) -> bytes:
        """Return the next piece of the body, of whatever length that is altogether; nothing at its end.

        Raises:
            ConnectionFailed: it ended before all of it was there.
        """
        return await self._incoming.piece(self.headers)

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


async def exchange(
    endpoint: Endpoint,
    waiting: Waiting,
    method: str,
    path: str,
    headers: Mapping[str, str],
    content: Iterable[bytes] = (),
    silence_secs: float | None = None,
) -> Exchange:
    """Send a request with a body that is produced as it is sent, and return its answer when that begins.

    A length is announced if *headers* has a ``Content-Length``; else a body is sent in chunks if *headers* says so.
    An answer that comes before all of *content* was sent ends the sending. Silence of *silence_secs* is a lost
    connection; without it a slow guest is no dead one, and TCP keep-alive tells a network that is gone.

    Raises:
        ConnectionFailed: there is no agent, or the connection ended before an answer.
        NoidError: the other side speaks another version of the API.
    """
    chunked = "Transfer-Encoding" in headers
    connection = await connect(endpoint, waiting)
    try:
        early = b""
        try:
            await connection.send(_head(endpoint, method, path, {"Connection": "close", **headers}))
            for piece in content:
                if not piece:
                    continue  # as a chunk it would say that the body ends here
                early = await _sent_unless_answered(
                    connection, b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece
                )
                if early:
                    break
            else:
                if chunked:
                    await connection.send(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            pass  # it may have answered before it had read everything; without an answer, reading says so
        incoming = Incoming(connection.receive, endpoint, silence_secs, early)
        status, found = await incoming.head()
        return Exchange(connection, incoming, method, status, found)
    except BaseException:
        connection.close()
        raise


async def _sent_unless_answered(connection: Connection, data: bytes) -> bytes:
    """Send *data*. Return the beginning of an answer that came before all of it was sent."""
    unsent = memoryview(data)
    while unsent := unsent[connection.send_now(unsent) :]:
        readable, _ = await connection.waiting.until_ready((connection.socket,), (connection.socket,), None)
        if readable and (early := connection.receive_now()) is not None:
            return early  # what only TLS has to say is none
    return connection.receive_now() or b""


async def upgrade(endpoint: Endpoint, waiting: Waiting, path: str) -> tuple[Connection, bytes, bool] | Reply:
    """Ask for a WebSocket. Return the connection, what the server sent already and whether it told its version.

    Where it refuses, return its answer.

    Raises:
        ConnectionFailed: there is no agent, or it is not one that follows RFC 6455.
        NoidError: the other side speaks another version of the API.
    """
    import os
    from binascii import b2a_base64

    key = b2a_base64(os.urandom(16), newline=False).decode()
    extra = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": key,
    }
    connection = await connect(endpoint, waiting)
    try:
        try:
            await connection.send(_head(endpoint, "GET", path, extra))
        except OSError as error:
            raise _gone(endpoint, error) from error
        from hashlib import sha1  # OpenSSL, 3 ms, is loaded while the agent makes its answer

        accepted = sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode(), usedforsecurity=False)
        incoming = Incoming(connection.receive, endpoint, ANSWER_SECS)
        status, headers = await incoming.head()
        if status != 101:
            reply = Reply(status=status, headers=headers, body=await incoming.body("GET", status, headers))
            connection.close()
            return reply
        if headers.get("sec-websocket-accept") != b2a_base64(accepted.digest(), newline=False).decode():
            raise ConnectionFailed(f"{endpoint.address} answered like a WebSocket server that is none.")
        return connection, incoming.rest(), VERSION_HEADER in headers
    except BaseException:
        connection.close()
        raise


def _head(endpoint: Endpoint, method: str, path: str, extra: Mapping[str, str]) -> bytes:
    host, prefix = "localhost", ""
    if endpoint.url is not None:
        from urllib.parse import urlsplit  # 2 ms that the local agent does not cost

        _, host, prefix, *_ = urlsplit(endpoint.url)
    headers = {"Host": host, "User-Agent": f"noid/{__version__}", "Accept": "application/json", **extra}
    if endpoint.token is not None:
        headers["Authorization"] = f"Bearer {endpoint.token}"
    lines = [f"{method} {prefix}{path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")


def _gone(endpoint: Endpoint, error: OSError, why: str = "") -> ConnectionLost:
    return ConnectionLost(f"{endpoint.address} went away: {error.strerror or error}{why}.")


class Incoming:
    """An answer, as it arrives. Every way it can fail is a `ConnectionFailed`.

    *receive* returns what comes next, nothing at the end, however it is cut; it is given how long a silence may be.
    """

    def __init__(
        self,
        receive: Callable[[float | None], Awaitable[bytes]],
        endpoint: Endpoint,
        silence_secs: float | None,
        early: bytes = b"",
    ) -> None:
        self._receive_some = receive
        self._endpoint = endpoint
        self._silence_secs = silence_secs
        self._buffer = bytearray(early)
        self._is_chunked = False
        self._left: int | None = None  # of this chunk, or of the body; None before it begins
        self._ended = False

    async def head(self) -> tuple[int, dict[str, str]]:
        """Return status and headers of the next answer that is final."""
        await self._recognise()
        while True:
            first, *lines = (await self._until(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            version, _, rest = first.partition(" ")
            if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
                raise self._no_http()
            headers = {
                name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
            }
            _check_version(headers, self._endpoint)
            status = int(rest[:3])
            if status == 101 or status >= 200:
                return status, headers

    async def _recognise(self) -> None:
        """Look at what comes first: who greets in another protocol than HTTP may never end a line of ours."""
        while (begun := bytes(self._buffer[: len(_BEGINNING)])) != _BEGINNING:
            if not _BEGINNING.startswith(begun):
                raise self._no_http()
            if not await self._receive():
                return  # whoever reads on finds the end

    def _no_http(self) -> ConnectionFailed:
        if self._buffer.startswith(_TLS_ALERT):
            return ConnectionFailed(f"{self._endpoint.address} speaks TLS. Give noid its URL with https://.")
        return ConnectionFailed(f"{self._endpoint.address} does not speak HTTP. Is the port right?")

    async def body(self, method: str, status: int, headers: Mapping[str, str]) -> bytes:
        """Return the body that belongs to that head."""
        if method == "HEAD" or status in (204, 304):
            return b""
        if "chunked" in headers.get("transfer-encoding", "").lower():
            return await self._chunks()
        length = headers.get("content-length")
        if length is None:
            while await self._receive():
                pass
            return self.rest()
        if not length.isdigit() or int(length) > BODY_BYTES_MAX:
            raise self._broken("an answer of unreasonable length")
        return await self._exactly(int(length))

    async def piece(self, headers: Mapping[str, str]) -> bytes:
        """Return what has arrived of the body that belongs to that head, of whatever length; nothing at its end."""
        if self._left is None:
            self._is_chunked = "chunked" in headers.get("transfer-encoding", "").lower()
            length = headers.get("content-length", "")
            if not self._is_chunked and not length.isdigit():
                raise self._broken("an answer of unknown length")
            self._left = await self._chunk_size(PIECES_BYTES_MAX) if self._is_chunked else int(length)
            self._ended = not self._left
        elif self._is_chunked and not self._left and not self._ended:
            await self._exactly(2)
            self._left = await self._chunk_size(PIECES_BYTES_MAX)
            self._ended = not self._left
        if not self._left:
            return b""
        if not self._buffer and not await self._receive():
            raise self._closed("half an answer")
        piece = bytes(self._buffer[: self._left])
        del self._buffer[: self._left]
        self._left -= len(piece)
        return piece

    def rest(self) -> bytes:
        """Return what has arrived beyond what was asked for."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest

    async def _chunks(self) -> bytes:
        body = bytearray()
        while True:
            size = await self._chunk_size(BODY_BYTES_MAX - len(body))
            if size == 0:
                return bytes(body)  # trailers may follow; nobody wants them, and the connection ends here
            body += await self._exactly(size)
            await self._exactly(2)

    async def _chunk_size(self, most: int) -> int:
        size_text = (await self._until(b"\r\n")).partition(b";")[0].strip()
        try:
            size = int(size_text, 16)
        except ValueError:
            raise self._broken("a malformed answer") from None
        if not 0 <= size <= most:
            raise self._broken("an answer of unreasonable length")
        return size

    async def _until(self, mark: bytes) -> bytes:
        while (end := self._buffer.find(mark)) < 0:
            if len(self._buffer) > HEAD_BYTES_MAX:
                raise self._broken("an answer with endless headers")
            if not await self._receive():
                raise self._closed("nothing more") if self._buffer else self._closed("no answer", self._maybe_tls())
        found = bytes(self._buffer[:end])
        del self._buffer[: end + len(mark)]
        return found

    async def _exactly(self, count: int) -> bytes:
        while len(self._buffer) < count:
            if not await self._receive():
                raise self._closed("half an answer")
        found = bytes(self._buffer[:count])
        del self._buffer[:count]
        return found

    async def _receive(self) -> bool:
        try:
            data = await self._receive_some(self._silence_secs)
        except TimeoutError as error:
            raise self._broken(
                f"no answer for {self._silence_secs or 0:.0f} s. Is the server overloaded or a proxy stuck?"
            ) from error
        except OSError as error:
            raise _gone(self._endpoint, error, "" if self._buffer else self._maybe_tls()) from error
        if len(self._buffer) > BODY_BYTES_MAX:
            raise self._broken("an answer of unreasonable length")
        self._buffer += data
        return bool(data)

    def _maybe_tls(self) -> str:
        plain = (self._endpoint.url or "").startswith("http://")
        return ", as servers do that are reached by https://" if plain else ""

    def _closed(self, what: str, why: str = "") -> ConnectionLost:
        return ConnectionLost(f"{self._endpoint.address} sent {what}: it closed the connection{why}.")

    def _broken(self, what: str) -> ConnectionFailed:
        return ConnectionFailed(f"{self._endpoint.address} sent {what}" + ("" if what.endswith("?") else "."))


def _check_version(headers: Mapping[str, str], endpoint: Endpoint) -> None:
    version = headers.get(VERSION_HEADER)
    if version is None or version == str(API_VERSION):
        return
    raise NoidError(
        f"{endpoint.address} speaks version {version!r} of the API, and this noid {__version__} version {API_VERSION}."
        " Install a noid that fits the server."
    )
