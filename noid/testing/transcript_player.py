"""Replaying transcripts over streams: a client that sends exactly what is written, and hears exactly what comes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from typing import Protocol

import trio
from wsproto.frame_protocol import CloseReason, FrameProtocol, Opcode

from noid.testing.transcript import End, Frame, Given, Request, Response, Step, filled, pattern, remembered

PATIENCE_SECS = 20.0

_OPCODES = {"text": Opcode.TEXT, "binary": Opcode.BINARY, "ping": Opcode.PING, "pong": Opcode.PONG}
_KINDS = {opcode: kind for kind, opcode in _OPCODES.items()} | {Opcode.CLOSE: "close"}


class Stage(Protocol):
    """The server that a transcript is played to."""

    async def connect(self, *, local: bool) -> trio.abc.HalfCloseableStream:
        """Return a new connection to it; a *local* one is of somebody who needs no token."""
        ...

    async def given(self, words: str) -> Mapping[str, str]:
        """Make what *words* say and return what a client knows of it, by name.

        Raises:
            ValueError: nobody knows what they mean.
        """
        ...


class Player:
    """Plays one transcript."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._known: dict[str, str] = {}
        self._connections: dict[str, Connection] = {}
        self._current = "1"
        self._local: set[str] = set()
        self._rounds = 1

    async def play(self, steps: Iterable[Step]) -> None:
        """Play *steps*.

        Raises:
            AssertionError: the server said something else; names the line.
            ValueError: a step that makes no sense.
        """
        again: list[Step] = []
        try:
            for step in steps:
                if isinstance(step, Given):
                    await self._given(step)
                    continue
                if isinstance(step, Request):
                    again = []
                again.append(step)
                await self._step(step)
                if isinstance(step, Response):
                    for _ in range(self._rounds - 1):
                        for repeated in again:
                            await self._step(repeated)
                    self._rounds = 1
        finally:
            for connection in self._connections.values():
                with trio.move_on_after(1, shield=True):
                    await trio.aclose_forcefully(connection.stream)

    async def _given(self, step: Given) -> None:
        if found := re.fullmatch(r"connection (\S+)( on the unix socket)?", step.words):
            self._current = found[1]
            if found[2]:
                self._local.add(found[1])
        elif found := re.fullmatch(r"(\d+) times:", step.words):
            self._rounds = int(found[1])
        else:
            self._known |= await self._stage.given(filled(step.words, self._known))

    async def _step(self, step: Step) -> None:
        try:
            with trio.fail_after(PATIENCE_SECS):
                self._known |= await self._act(step)
        except trio.TooSlowError:
            heard = self._connections[self._current].unheard() if self._current in self._connections else ""
            raise AssertionError(f"line {step.line}: waited in vain; what came instead: {heard}") from None
        except (AssertionError, ValueError) as error:
            raise AssertionError(f"line {step.line}: {error}") from error

    async def _act(self, step: Step) -> Mapping[str, str]:
        connection = self._connections.get(self._current)
        if connection is None or (connection.ended and isinstance(step, Request)):
            if connection is not None:
                await connection.hang_up()
            connection = self._connections[self._current] = Connection(
                await self._stage.connect(local=self._current in self._local)
            )
        match step:
            case Request():
                await connection.request(step, self._known)
            case Response():
                return await connection.hear_response(step, self._known)
            case Frame(mine=True):
                await connection.send(step, self._known)
            case Frame():
                return await connection.hear_frame(step, self._known)
            case End(mine=True):
                await connection.hang_up()
            case End():
                await connection.hear_end()
        return {}


class Connection:
    """One connection to the server."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self.stream = stream
        self.ended = False
        self._received = bytearray()
        self._method = "GET"
        self._frames: FrameProtocol | None = None
        self._waiting: list[tuple[str, bytes]] = []
        self._message = bytearray()

    def unheard(self) -> str:
        """Return what has come and nobody has asked for."""
        return repr([*self._waiting, bytes(self._received)])

    async def request(self, step: Request, known: Mapping[str, str]) -> None:
        """Send a request."""
        body = filled(step.body, known).encode()
        head = filled("\r\n".join(step.head), {**known, "length": str(len(body))})
        self._method = step.method
        with contextlib.suppress(trio.BrokenResourceError):  # what it said before it hung up is worth hearing
            await self.stream.send_all(f"{head}\r\n\r\n".encode() + body)

    async def hear_response(self, step: Response, known: Mapping[str, str]) -> Mapping[str, str]:
        """Compare the next response."""
        status, reason, headers = await self._head()
        while status == 100 != step.status:
            status, reason, headers = await self._head()
        body = (await self._body(status, headers)).decode()
        assert (status, reason) == (step.status, step.reason), f"heard {status} {reason}: {body}"
        found: dict[str, str] = {}
        for name, value in step.headers:
            values = [heard for other, heard in headers if other == name]
            assert len(values) == 1, f"header {name} came {len(values)} times: {values}"
            found |= _matched(value, values[0], {**known, **found}, f"header {name}")
        for name in step.absent:
            assert all(other != name for other, _ in headers), f"there is a header {name}"
        found |= _matched(step.body, body, {**known, **found}, "body")
        if status == 101:
            self._frames = FrameProtocol(client=True, extensions=[])
        if ("connection", "close") in [(name, value.lower()) for name, value in headers]:
            await self.hear_end()
        return found

    async def send(self, step: Frame, known: Mapping[str, str]) -> None:
        """Send a frame."""
        assert self._frames is not None, "this is no WebSocket"
        payload = filled(step.payload, known)
        if step.kind == "close":
            code, _, reason = payload.partition(" ")
            data = self._frames.close(CloseReason(int(code)) if code else None, reason or None)
        elif step.kind in ("ping", "pong"):
            data = getattr(self._frames, step.kind)(payload.encode())
        elif step.kind == "text":
            data = self._frames.send_data(payload)
        else:
            first = b"" if step.channel is None else bytes([step.channel])
            data = self._frames.send_data(first + payload.encode("latin-1"))
        await self.stream.send_all(data)

    async def hear_frame(self, step: Frame, known: Mapping[str, str]) -> Mapping[str, str]:
        """Compare the next frame; the data of a channel may come in several."""
        kind, payload = await self._next_frame()
        assert kind == step.kind, f"heard {kind} {payload!r}"
        if kind != "binary":
            return _matched(step.payload, payload.decode(), known, kind)
        assert payload[:1] == (b"" if step.channel is None else bytes([step.channel])), f"heard {payload!r}"
        wanted = pattern(step.payload, known)
        heard = payload[1:].decode("latin-1")
        while (found := wanted.fullmatch(heard)) is None:
            kind, more = await self._next_frame()
            assert (kind, more[:1]) == ("binary", payload[:1]), f"heard {heard!r}, then {kind} {more!r}"
            heard += more[1:].decode("latin-1")
        return remembered(found)

    async def hang_up(self) -> None:
        """Close the connection."""
        self.ended = True
        await trio.aclose_forcefully(self.stream)

    async def hear_end(self) -> None:
        """Wait until the server has closed the connection and has said nothing else."""
        while await self._more():
            pass
        assert not self._received, f"before the end came {self.unheard()}"
        self.ended = True

    async def _next_frame(self) -> tuple[str, bytes]:
        frames = self._frames
        assert frames is not None, "this is no WebSocket"
        while not self._waiting:
            if self._received:
                frames.receive_bytes(bytes(self._received))
                self._received.clear()
            for frame in frames.received_frames():
                self._take(frame.opcode, frame.payload, whole=frame.message_finished)
            if not self._waiting and not await self._more():
                raise AssertionError("the connection has ended")
        return self._waiting.pop(0)

    def _take(self, opcode: Opcode, payload: object, *, whole: bool) -> None:
        if opcode is Opcode.CLOSE:
            assert isinstance(payload, tuple)
            code, reason = payload
            text = "" if code == CloseReason.NO_STATUS_RCVD else f"{int(code)} {reason or ''}".strip()
            self._waiting.append(("close", text.encode()))
            return
        data = payload.encode() if isinstance(payload, str) else bytes(payload)  # type: ignore[call-overload]  # bytes
        if opcode in (Opcode.PING, Opcode.PONG):
            self._waiting.append((_KINDS[opcode], data))
            return
        self._message += data
        if whole:
            self._waiting.append((_KINDS[opcode], bytes(self._message)))
            self._message.clear()

    async def _head(self) -> tuple[int, str, list[tuple[str, str]]]:
        lines = (await self._until(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        version, status, reason = f"{lines[0]} ".split(" ", 2)
        assert version == "HTTP/1.1", lines[0]
        pairs = (line.partition(":") for line in lines[1:])
        return int(status), reason.strip(), [(name.lower(), value.strip()) for name, _, value in pairs]

    async def _body(self, status: int, headers: list[tuple[str, str]]) -> bytes:
        fields = dict(headers)
        if status < 200 or status in (204, 304) or self._method == "HEAD":
            return b""
        if fields.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(await self._until(b"\r\n"), 16):
                body += await self._exactly(size)
                await self._exactly(2)
            await self._exactly(2)
            return body
        if "content-length" in fields:
            return await self._exactly(int(fields["content-length"]))
        while await self._more():
            pass
        return await self._exactly(len(self._received))

    async def _until(self, mark: bytes) -> bytes:
        while mark not in self._received:
            assert await self._more(), f"the connection has ended after {bytes(self._received)!r}"
        found = bytes(self._received[: self._received.index(mark)])
        del self._received[: len(found) + len(mark)]
        return found

    async def _exactly(self, size: int) -> bytes:
        while len(self._received) < size:
            assert await self._more(), f"the connection has ended after {bytes(self._received)!r}"
        found = bytes(self._received[:size])
        del self._received[:size]
        return found

    async def _more(self) -> bool:
        try:
            data = await self.stream.receive_some(65536)
        except trio.BrokenResourceError:
            data = b""
        self._received += data
        return bool(data)


def _matched(expected: str, heard: str, known: Mapping[str, str], what: str) -> Mapping[str, str]:
    found = pattern(expected, known).fullmatch(heard)
    assert found is not None, f"{what} is\n  {heard}\nand not\n  {expected}"
    return remembered(found)
