"""What happens to the caller's VMs, told as it does."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from noid.client import http
from noid.client.calls.call import refusal, with_query
from noid.client.errors import ConnectionFailed, ConnectionLost
from noid.client.eventstream import EventParser
from noid.client.link import BACK_SECS, RETRY_SECS, Link
from noid.sdk.stream import Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that has happened.

    Attributes:
        id: What `Client.events` goes on behind, given as *after*.
        kind: ``vm.create``, ``operation.end`` and so on; ``gap``: what came before the next one is not known.
        vm: The VM it happened to.
        at: When, as the server's clock has it.
        facts: What else is known of it.
    """

    id: str | None
    kind: str
    vm: str | None = None
    at: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


class Events(Stream[Event]):
    """A stream of events, to be entered. What happens from then on is in it; who looks after that misses nothing.

    A connection that is lost is made again, behind the last event: nothing is told twice.
    """

    def __init__(self, link: Link, vms: Sequence[str], kinds: Sequence[str], after: str | None) -> None:
        super().__init__(link.waiting.turns())
        self.last_id = after
        self._link = link
        self._path = with_query("/v1/events", vm=tuple(vms), kind=tuple(kinds))
        self._parser = EventParser()
        self._answer: http.Exchange | None = None

    async def _open(self) -> None:
        headers = {"Accept": "text/event-stream"}
        if self.last_id is not None:
            headers["Last-Event-ID"] = self.last_id
        self._parser = EventParser()
        self._answer = await http.exchange(self._link.endpoint, self._link.waiting, "GET", self._path, headers)
        if self._answer.status != 200:
            raise refusal(self._link.endpoint.address, await self._answer.reply())
        while self.last_id is None and not self._arrived:  # it begins with the id of this moment
            self._understand(await self._answer.piece())

    async def _step(self) -> None:
        if self._answer is None:
            raise RuntimeError("events are to be entered first: async with client.events() as events.")
        try:
            piece = await self._answer.piece()
        except ConnectionLost as lost:
            await self._reopen(lost)
            return
        if not piece:  # the server has ended it, which it does when it ends, and when a token does
            await self._reopen(ConnectionLost(f"{self._link.endpoint.address} ended the stream of events."))
            return
        self._understand(piece)

    def _understand(self, piece: bytes) -> None:
        try:
            for event in self._parser.feed(piece):
                self.last_id = event.id if event.id is not None else self.last_id
                if event.data is None:
                    continue
                match json.loads(event.data):
                    case {**fields}:
                        vm, at, facts = fields.get("vm"), fields.get("at"), fields.get("facts")
                        self._arrived.append(
                            Event(
                                id=event.id,
                                kind=event.kind,
                                vm=vm if isinstance(vm, str) else None,
                                at=at if isinstance(at, str) else None,
                                facts=facts if isinstance(facts, dict) else {},
                            )
                        )
        except (ValueError, RecursionError) as error:
            raise self._link.nonsense() from error

    async def _reopen(self, lost: ConnectionLost) -> None:
        until = time.monotonic() + BACK_SECS
        while True:
            self._close()
            try:
                await self._open()
            except ConnectionFailed as error:
                if time.monotonic() >= until:
                    raise lost from error
            else:
                return
            await self._link.waiting.sleep(RETRY_SECS)

    def _is_over(self) -> bool:
        return False

    def _close(self) -> None:
        if self._answer is not None:
            self._answer.close()
            self._answer = None
