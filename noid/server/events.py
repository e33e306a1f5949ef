"""The stream of what happens: server-sent events, as the HTML standard says, numbered and filtered by owner."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable

import trio
from quart import Response, request

from noid.core.agent import Agent
from noid.core.backends import Event
from noid.core.events import EventReader, Missed, Told
from noid.core.model import Scope, checked_name
from noid.core.waiting import plain_nursery
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
        pieces = _pieces(reader, wanted, deadline, self._websockets.stopping)
        return Response(pieces, 200, {"Cache-Control": "no-store"}, content_type="text/event-stream")


async def _pieces(  # noqa: ASYNC900  # holds nothing that an end would have to free
    reader: EventReader, wanted: Callable[[Event], bool], deadline: float, stopping: trio.Event
) -> AsyncGenerator[bytes, None]:
    # An id alone is no event, but who is cut off before the first one comes back to where it began.
    yield f"retry: {RECONNECT_MILLISECONDS}\nid: {reader.position}\n\n".encode()
    while True:
        found = reader.next_now()
        if found is None:
            if trio.current_time() >= deadline or stopping.is_set():
                return
            found = await _next(reader, deadline, stopping)
        if found is None:
            yield b": nothing new\n\n"
        elif isinstance(found, Missed):
            yield f"event: gap\nid: {found.position}\ndata: {{}}\n\n".encode()
        elif wanted(found.event):
            yield _written(found)


async def _next(reader: EventReader, deadline: float, stopping: trio.Event) -> Told | Missed | None:
    """Return the next event, or None after `SILENCE_SECS`, at the *deadline*, or when the server is *stopping*."""
    found: Told | Missed | None = None
    with trio.move_on_at(min(deadline, trio.current_time() + SILENCE_SECS)):
        async with plain_nursery() as nursery:

            async def stop() -> None:
                await stopping.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(stop)
            found = await reader.next()
            nursery.cancel_scope.cancel()
    return found


def _written(told: Told) -> bytes:
    event = told.event
    fields = {"kind": event.kind, "vm": event.vm, "at": told.at.isoformat(timespec="milliseconds")}
    data = json.dumps(fields | {"facts": dict(event.facts)}, separators=(",", ":"))
    return f"event: {event.kind}\nid: {told.position}\ndata: {data}\n\n".encode()
