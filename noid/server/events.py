"""The stream of what happens: server-sent events, as the HTML standard says, numbered and filtered by owner."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable

import trio
from quart import Response, request
from quart.wrappers.response import ResponseBody

from noid.core.agent import Agent
from noid.core.backends import Event
from noid.core.events import EventReader, Missed, Told
from noid.core.model.names import checked_name
from noid.core.model.users import Scope
from noid.server.hardening import Stay
from noid.server.open_streams import OpenStreams
from noid.server.queries import seconds
from noid.server.schemas.operations import EVENTS
from noid.server.schemas.paths import NAME
from noid.server.schemas.vocabulary import number, text
from noid.server.table import Route
from noid.server.visit import current_user
from noid.server.websockets import WebSockets

SILENCE_SECS = 15.0
STREAM_SECS_MAX = 86400.0
RECONNECT_MILLISECONDS = 1000


class EventRoutes:
    """``/v1/events``."""

    def __init__(self, agent: Agent, websockets: WebSockets) -> None:
        self._agent = agent
        self._websockets = websockets

    def routes(self) -> list[Route]:
        """Return the lines of the table."""
        return [
            Route(
                method="GET", path="/v1/events", handler=self.stream, scope=Scope.READ, answers={200: EVENTS},
                query={
                    "vm?": NAME,
                    "kind?": text(about="Such as `vm.create`; may be repeated."),
                    "timeout_secs?": number(0, STREAM_SECS_MAX, about="The stream ends after so many seconds."),
                },
                headers={"Last-Event-ID?": text(about="The `id` of the last event that was seen.")},
            )
        ]  # fmt: skip

    async def stream(self) -> Response:
        """Follow what happens to the caller's VMs and operations, as server-sent events.

        From now on, or after the event that ``Last-Event-ID`` names. The event ``gap`` says that nobody knows what
        happened before the next one: look at what there is.
        """
        vm, kinds = request.args.get("vm"), frozenset(request.args.getlist("kind"))
        if vm is not None:
            checked_name(vm)
        limit_secs = seconds("timeout_secs", request.args.get("timeout_secs"), STREAM_SECS_MAX, STREAM_SECS_MAX)
        reader = self._agent.services.events.reader(current_user().id, request.headers.get("Last-Event-ID"))

        def wanted(event: Event) -> bool:
            return vm in (None, event.vm) and (not kinds or event.kind in kinds)

        deadline = trio.current_time() + limit_secs
        reply = Response(b"", 200, {"Cache-Control": "no-store"}, content_type="text/event-stream")
        reply.response = _Body(reader, wanted, deadline, self._websockets.streams)
        del reply.headers["Content-Length"]
        return reply


class _Body(ResponseBody):
    """The events that are *wanted* until *deadline*, or until the stream has to end."""

    def __init__(
        self, reader: EventReader, wanted: Callable[[Event], bool], deadline: float, streams: OpenStreams
    ) -> None:
        self._reader = reader
        self._wanted = wanted
        self._deadline = deadline
        self._streams = streams
        self._held = contextlib.ExitStack()

    async def __aenter__(self) -> _Body:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._held.close()

    async def __aiter__(self) -> AsyncIterator[bytes]:  # noqa: ASYNC900  # what it holds, __aexit__ frees
        reader, stay = self._reader, self._held.enter_context(self._streams.stay())
        # An id alone is no event, but who is cut off before the first one comes back to where it began.
        yield f"retry: {RECONNECT_MILLISECONDS}\nid: {reader.position}\n\n".encode()
        while stay.over is None:
            found = reader.next_now()
            if found is None:
                if trio.current_time() >= self._deadline:
                    return
                found = await _next(reader, self._deadline, stay)
            if found is None:
                yield b": nothing new\n\n"
            elif isinstance(found, Missed):
                yield f"event: gap\nid: {found.position}\ndata: {{}}\n\n".encode()
            elif self._wanted(found.event):
                yield _written(found)


async def _next(reader: EventReader, deadline: float, stay: Stay) -> Told | Missed | None:
    """Return the next event, or None after `SILENCE_SECS`, at the *deadline*, or when the stream has to end."""
    with trio.move_on_at(min(deadline, trio.current_time() + SILENCE_SECS)), stay.interruptible():
        return await reader.next()
    return None


def _written(told: Told) -> bytes:
    event = told.event
    fields = {"kind": event.kind, "vm": event.vm, "at": told.at.isoformat(timespec="milliseconds")}
    data = json.dumps(fields | {"facts": dict(event.facts)}, separators=(",", ":"))
    return f"event: {event.kind}\nid: {told.position}\ndata: {data}\n\n".encode()
