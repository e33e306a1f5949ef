"""Calls that change something: their operation's id and timings in the reply, and ``Prefer: respond-async`` (RFC 7240).

Wrapped around the handlers of the table, so that a handler only does what its route is for.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import trio
from quart import Response, request

from noid.core import calls
from noid.core.agent import Agent
from noid.core.calls import Call
from noid.core.waiting import plain_nursery
from noid.errors import NotFound
from noid.server.answers import Answers, json_reply
from noid.server.operations import operation_fields
from noid.server.schemas.operations import OPERATION_HEADER
from noid.server.table import Route
from noid.server.visit import current_user, visit

WAIT_SECS_MAX = 300.0

Handler = Callable[..., Awaitable[Any]]


class Calls:
    """What surrounds the handlers of routes that are operations."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def around(self, routes: Iterable[Route]) -> list[Route]:
        """Return *routes*, those that are operations with what this module is for."""
        return [
            dataclasses.replace(route, handler=self._operation(route.handler)) if route.operation else route
            for route in routes
        ]

    def _operation(self, handler: Handler) -> Handler:
        @functools.wraps(handler)
        async def handle(**names: str) -> Response:
            call = Call()
            token = calls.CURRENT.set(call)
            try:
                wanted = preferences(request.headers.getlist("Prefer"))
                if "respond-async" in wanted:
                    return await self._soon(call, functools.partial(handler, **names), _wait_secs(wanted))
                reply: Response = await handler(**names)
                return reply
            finally:
                calls.CURRENT.reset(token)
                self._tell(call)

        return handle

    async def _soon(self, call: Call, handler: Callable[[], Awaitable[Response]], wait_secs: float | None) -> Response:
        """Answer as *handler* does if that is done within *wait_secs*, or else with its operation: 202."""
        reply: Response | None = None
        async with plain_nursery() as nursery:

            async def run() -> None:
                nonlocal reply
                reply = await handler()
                nursery.cancel_scope.cancel()

            nursery.start_soon(run)
            await call.begun.wait()
            with trio.move_on_after(wait_secs or 0.0):
                await trio.sleep_forever()
            nursery.cancel_scope.cancel()  # it only waits
        if reply is not None:
            return reply
        assert call.operation is not None  # noqa: S101  # it has begun
        operation = self._agent.operations.get(current_user(), call.operation)
        reply = json_reply(operation_fields(operation, Answers(self._agent.config).public_text), 202)
        reply.headers["Location"] = f"/v1/operations/{operation.id}"
        applied = "respond-async" if wait_secs is None else f"respond-async, wait={wait_secs:g}"
        reply.headers["Preference-Applied"] = applied
        return reply

    def _tell(self, call: Call) -> None:
        """Let the reply, whatever it is, name the operation and how long its phases took."""
        if call.operation is None:
            return
        headers = visit().reply_headers
        headers[OPERATION_HEADER] = call.operation
        try:
            timings = self._agent.operations.get(current_user(), call.operation).timings
        except NotFound:
            return
        if timings:
            headers["Server-Timing"] = server_timing(timings)


def server_timing(timings: Mapping[str, float]) -> str:
    """Return *timings* as the header that is made for them: in milliseconds."""
    return ", ".join(f"{phase};dur={secs * 1000:.1f}" for phase, secs in timings.items())


def preferences(headers: Iterable[str]) -> dict[str, str]:
    """Return what ``Prefer`` *headers* ask for: by name in lowercase, of two with one name the first (RFC 7240, 2)."""
    found: dict[str, str] = {}
    for preference in ",".join(headers).split(","):
        name, _, value = preference.partition(";")[0].partition("=")
        if name.strip():
            found.setdefault(name.strip().lower(), value.strip().strip('"'))
    return found


def _wait_secs(wanted: Mapping[str, str]) -> float | None:
    """Return how long the caller is ready to wait. What makes no sense is as if it were not there."""
    try:
        secs = float(wanted.get("wait", ""))
    except ValueError:
        return None
    return min(secs, WAIT_SECS_MAX) if secs >= 0 and not math.isnan(secs) else None
