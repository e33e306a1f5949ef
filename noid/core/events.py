"""What happened: told once, to whoever listens or follows. Each user's events are numbered, the latest are kept.

They are of this agent and in memory. A reader has its own position and takes what it can; one that is slower than what
happens is told of a gap, and so is one that comes back after the agent it was reading has ended.
"""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

import trio

from noid.core.backends import Event
from noid.core.model.times import now
from noid.core.plugins import Plugins

logger = logging.getLogger(__name__)

KEPT_EVENTS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """An event with its place: *position* is what a reader that has seen it goes on from."""

    position: str
    at: datetime
    event: Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Missed:
    """Nobody knows any more what happened up to here: what follows begins after *position*."""

    position: str


class _Ring:
    """One user's latest events. The first was number 1."""

    def __init__(self) -> None:
        self.kept: deque[tuple[datetime, Event]] = deque(maxlen=KEPT_EVENTS)
        self.last = 0
        self.told = trio.Event()

    @property
    def first(self) -> int:
        """The number of the oldest that is kept."""
        return self.last - len(self.kept) + 1


class Events:
    """What happens in one agent."""

    def __init__(self, plugins: Plugins) -> None:
        self._agent = secrets.token_hex(4)
        self._rings: dict[str, _Ring] = {}
        self._listeners: list[Callable[[Event], object]] = [lambda event: plugins.hook.on_event(event=event)]

    def listen(self, listener: Callable[[Event], object]) -> None:
        """Have *listener* called with everything that happens from now on, to anybody's; it must not block."""
        self._listeners.append(listener)

    def tell(self, event: Event) -> None:
        """Let everybody know of *event*, which has happened. Does not wait for anybody."""
        for listener in self._listeners:
            try:
                listener(event)
            except Exception:  # a listener's fault is nobody else's
                logger.exception("a listener failed to hear of %s", event.kind)
        ring = self._ring(event.owner)
        ring.kept.append((now(), event))
        ring.last += 1
        ring.told.set()
        ring.told = trio.Event()

    def reader(self, owner: str, after: str | None = None) -> EventReader:
        """Return a reader of what happens to *owner*'s from now on, or of what came *after* that position."""
        ring = self._ring(owner)
        if after is None:
            return EventReader(ring, self._agent, ring.last)
        agent, _, number = after.partition("-")
        is_known = agent == self._agent and number.isascii() and number.isdigit() and len(number) <= 18
        if is_known and ring.first - 1 <= int(number) <= ring.last:
            return EventReader(ring, self._agent, int(number))
        return EventReader(ring, self._agent, None)

    def forget(self, owner: str) -> None:
        """Drop what happened to *owner*'s, who is no more."""
        self._rings.pop(owner, None)

    def _ring(self, owner: str) -> _Ring:
        return self._rings.setdefault(owner, _Ring())


class EventReader:
    """Reads one user's events in their order."""

    def __init__(self, ring: _Ring, agent: str, last: int | None) -> None:
        self._ring = ring
        self._agent = agent
        self._last = last  # the number of the last one seen; None: nobody knows

    @property
    def position(self) -> str:
        """Where this reader is."""
        return f"{self._agent}-{self._last or 0}"

    async def next(self) -> Told | Missed:
        """Wait for the next event."""
        while (found := self.next_now()) is None:
            await self._ring.told.wait()
        return found

    def next_now(self) -> Told | Missed | None:
        """Return the next event if it has happened."""
        ring = self._ring
        if self._last is None or self._last < ring.first - 1:
            self._last = ring.first - 1
            return Missed(position=self.position)
        if self._last == ring.last:
            return None
        at, event = ring.kept[self._last + 1 - ring.first]
        self._last += 1
        return Told(position=self.position, at=at, event=event)
