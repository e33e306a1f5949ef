"""Server-sent events (HTML standard, 9.2) without a socket: bytes in, events out, however they are cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

EVENT_BYTES_MAX = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSentEvent:
    """One event. *id* is that of the last one that had one. One without data only tells an id."""

    id: str | None
    kind: str
    data: str | None


class EventParser:
    """Takes a stream apart."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._id: str | None = None
        self._kind = ""
        self._data: list[str] = []
        self._has_id = False

    def feed(self, piece: bytes) -> Iterator[ServerSentEvent]:
        """Yield the events that *piece* completes.

        Raises:
            ValueError: an event is too long to be one.
        """
        self._rest += piece
        *lines, rest = self._rest.split(b"\n")
        self._rest = rest
        if len(rest) > EVENT_BYTES_MAX:
            raise ValueError("an endless event")
        for line in lines:
            text = line.removesuffix(b"\r").decode("utf-8", "replace")
            if text:
                self._take(text)
            elif self._data or self._has_id:
                yield ServerSentEvent(
                    id=self._id, kind=self._kind or "message", data="\n".join(self._data) if self._data else None
                )
                self._kind, self._data, self._has_id = "", [], False

    def _take(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
            if sum(map(len, self._data)) > EVENT_BYTES_MAX:
                raise ValueError("an endless event")
        elif name == "event":
            self._kind = value
        elif name == "id" and "\0" not in value:
            self._id, self._has_id = value, True
