"""Follows what happens at an agent: server-sent events (HTML standard), taken up again where a connection was lost."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from noid.client import http
from noid.client.calls.call import with_query
from noid.client.errors import ConnectionFailed, ServerError
from noid.client.link import Link

LINE_BYTES_MAX = 1 << 20
SILENCE_SECS = 60.0
"""The agent says something every 15 s."""
RETRY_SECS, RETRY_SECS_MIN, RETRY_SECS_MAX = 1.0, 0.01, 30.0
GAP = "gap"
_BROKEN = 500
_TOO_MANY = 429


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened. *id* is what another stream goes on behind.

    *kind* is `GAP`, without the rest, where nobody knows what happened before the next one.
    """

    id: str
    kind: str
    vm: str | None = None
    at: str | None = None
    facts: dict[str, Any]


class Decoder:
    """Turns bytes, however they are cut, into events. Knows no socket."""

    def __init__(self) -> None:
        self.last_id: str | None = None
        """That of the last event, also of one that is an id and nothing else: where the stream began."""
        self.retry_secs = RETRY_SECS
        """After how long the server wants to see again who has lost it."""
        self._unread = bytearray()
        self._kind = ""
        self._data: list[str] = []

    def feed(self, data: bytes) -> list[Event]:
        """Return the events that *data* completes.

        Raises:
            ValueError: it is no stream of events that noid-server sends.
        """
        self._unread += data
        *lines, rest = self._unread.split(b"\n")
        if len(rest) > LINE_BYTES_MAX:
            raise ValueError("an endless line")
        self._unread = bytearray(rest)
        return [event for line in lines if (event := self._line(line.rstrip(b"\r").decode("utf-8", "replace")))]

    def cut(self) -> None:
        """Forget what is incomplete: the connection has ended."""
        self._unread.clear()
        self._kind, self._data = "", []

    def _line(self, line: str) -> Event | None:
        if not line:
            return self._complete()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            self._kind = value
        elif name == "data":
            self._data.append(value)
        elif name == "id" and value.isascii() and value.isprintable():  # it is sent back in a header
            self.last_id = value
        elif name == "retry" and value.isascii() and value.isdecimal() and len(value) <= 6:
            self.retry_secs = min(int(value) / 1000, RETRY_SECS_MAX)
        return None

    def _complete(self) -> Event | None:
        kind, data = self._kind, "\n".join(self._data)
        self._kind, self._data = "", []
        if not data:
            return None
        match json.loads(data):
            case {"vm": (str() | None) as vm, "at": str(at), "facts": dict(facts)}:
                return Event(id=self.last_id or "", kind=kind, vm=vm, at=at, facts=facts)
            case dict() if kind == GAP:
                return Event(id=self.last_id or "", kind=kind, facts={})
            case _:
                raise ValueError("an event of another shape")


class EventStream:
    """What happens to the caller's VMs: from now on, or behind the event *after*; to *vm* only, and only of *kinds*.

    With *follow* it never ends: a connection that is lost is made again, and *on_lost* hears why, once for each loss.
    Without, it ends behind what has happened.
    """

    def __init__(
        self,
        link: Link,
        *,
        vm: str | None = None,
        kinds: tuple[str, ...] = (),
        after: str | None = None,
        follow: bool = True,
        on_lost: Callable[[ConnectionFailed | ServerError], None] = lambda _: None,
    ) -> None:
        self._link = link
        self._path = with_query("/v1/events", vm=vm, kind=kinds, timeout_secs=None if follow else 0)
        self._follow = follow
        self._on_lost = on_lost
        self._decoder = Decoder()
        self._decoder.last_id = after
        self._answer: http.Exchange | None = None
        self._found: deque[Event] = deque()

    async def open(self) -> None:
        """Begin. What happens after this has returned is in the stream.

        Raises:
            ConnectionFailed, ServerError: there is no such stream.
        """
        headers = {"Accept": "text/event-stream"}
        if self._decoder.last_id is not None:
            headers["Last-Event-ID"] = self._decoder.last_id
        link = self._link
        answer = await link.ask(
            lambda: http.exchange(link.endpoint, link.waiting, "GET", self._path, headers, silence_secs=SILENCE_SECS)
        )
        try:
            if answer.status != 200:
                raise await link.refused("GET", self._path, await answer.reply())
            if "text/event-stream" not in answer.headers.get("content-type", ""):
                raise link.nonsense()
        except BaseException:
            answer.close()
            raise
        self._answer = answer

    async def next(self) -> Event | None:
        """Return the next event; None at the end of a stream that is not followed.

        Raises:
            ConnectionFailed: it ended early, and is not followed; or what came is none.
            ServerError: it cannot be taken up again: the token has ended.
        """
        while not self._found:
            if self._answer is None:
                await self.open()
                continue
            try:
                data = await self._answer.piece()
                self._found += self._decoder.feed(data)
                if data:
                    continue
                if not self._follow:
                    return None
                lost = ConnectionFailed(f"{self._link.endpoint.address} ended the stream.")
            except ConnectionFailed as error:
                if not self._follow:
                    raise
                lost = error
            except ValueError as error:
                raise self._link.nonsense() from error
            self.close()
            self._decoder.cut()
            self._on_lost(lost)
            await self._open_again()
        return self._found.popleft()

    async def _open_again(self) -> None:
        pause = max(self._decoder.retry_secs, RETRY_SECS_MIN)
        while self._answer is None:
            await self._link.waiting.sleep(pause)
            pause = min(2 * pause, RETRY_SECS_MAX)
            try:
                await self.open()
            except ConnectionFailed:
                continue  # it is not up yet
            except ServerError as error:
                if error.status < _BROKEN and error.status != _TOO_MANY:
                    raise

    def close(self) -> None:
        """Hang up."""
        if self._answer is not None:
            self._answer.close()
            self._answer = None
