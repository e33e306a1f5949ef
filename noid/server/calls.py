"""Calls that change something: made once however often they are repeated, answered early, named and timed.

``Idempotency-Key`` (draft-ietf-httpapi-idempotency-key-header) and ``Prefer: respond-async`` (RFC 7240) are wrapped
around the handlers of the table, so that a handler only does what its route is for.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping

import trio
from quart import Response, request

from noid.core.agent import Agent
from noid.core.operations import calls
from noid.core.operations.calls import Call
from noid.core.operations.keys import Answer, Held, checked_key, fingerprint
from noid.core.operations.outcomes import Operation
from noid.core.waiting import plain_nursery
from noid.errors import Conflict, InvalidRequest, NoidError, NotFound
from noid.server.answers import Answers, json_reply
from noid.server.interim import still_working
from noid.server.operations import operation_fields
from noid.server.rest import outcome_reply
from noid.server.schemas.operations import KEY_HEADER, OPERATION_HEADER, REPLAYED_HEADER
from noid.server.schemas.vocabulary import JSON
from noid.server.table import Route
from noid.server.visit import current_user, visit

WAIT_SECS_MAX = 300.0

Handler = Callable[[], Awaitable[Response]]


class Calls:
    """What surrounds the handlers of routes that change something."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def around(self, routes: Iterable[Route]) -> list[Route]:
        """Return *routes*, those that change something with what this module is for."""
        return [dataclasses.replace(route, handler=self._wrapped(route)) if route.keyed else route for route in routes]

    def _wrapped(self, route: Route) -> Callable[..., Awaitable[Response]]:
        @functools.wraps(route.handler)
        async def handle(**names: str) -> Response:
            handler = functools.partial(route.handler, **names)
            keys = request.headers.getlist(KEY_HEADER)
            if not keys:
                return await (self._operate(handler, Call()) if route.operation else handler())
            if len(keys) > 1:
                raise InvalidRequest(f"there is more than one {KEY_HEADER}.")
            return await self._once(checked_key(keys[0]), handler, operates=route.operation)

        return handle

    # --- once --------------------------------------------------------------------------------------------------------

    async def _once(self, key: str, handler: Handler, *, operates: bool) -> Response:
        """Do what *handler* does, unless that was done with this *key*: then answer as it was answered then."""
        target = request.full_path if request.query_string else request.path
        body = await request.get_data()
        assert isinstance(body, bytes)  # noqa: S101  # as_text is off
        what = fingerprint(request.method.encode(), target.encode(), body)
        earlier: Held | Operation | Answer | None = None
        call = Call()
        try:
            async with still_working():
                earlier = await self._agent.keys.take(current_user(), key, what)
            if isinstance(earlier, Held):
                call = Call(earlier.written_with, functools.partial(self._agent.keys.release, earlier))
                return await (
                    self._operate_once(earlier, call, handler) if operates else self._act_once(earlier, handler)
                )
        finally:
            # Also for a client that leaves just when the key is taken: nobody would get it any more. An operation that
            # goes on without its client keeps the key until it is in the journal: nobody may begin another one.
            if isinstance(earlier, Held) and not call.is_carried_out:
                self._agent.keys.release(earlier)
        visit().reply_headers[REPLAYED_HEADER] = "true"
        if isinstance(earlier, Operation):
            return await self._repeated(earlier)
        assert isinstance(earlier, Answer)  # noqa: S101  # what else there is was dealt with above
        if earlier.body is None:
            raise Conflict(
                f"the call with this Idempotency-Key was carried out and answered with {earlier.status}; the answer "
                "was not kept, because it is a secret or too long. Look at what there is."
            )
        return Response(earlier.body, earlier.status, content_type=JSON if earlier.body else None)

    async def _operate_once(self, held: Held, call: Call, handler: Handler) -> Response:
        """Carry out an operation whose page in the journal has the key."""
        reply = await self._operate(handler, call)
        if call.operation is None:  # there was nothing to do
            await self._agent.keys.answered(held, await _answer_of(reply))
        return reply

    async def _act_once(self, held: Held, handler: Handler) -> Response:
        """Do what is no operation. If this is cut off, nobody knows what became of it, and the key says so."""
        await self._agent.keys.begin(held)
        try:
            reply = await handler()
        except NoidError as error:
            if error.status < 500 and not visit().acted:  # refused: nothing has begun
                await self._agent.keys.forget(held)  # noqa: ASYNC102  # shielded and bounded there
            else:
                answer = await _answer_of(await Answers(self._agent).answer(error))  # noqa: ASYNC102  # waits for nothing
                await self._agent.keys.answered(held, answer)  # noqa: ASYNC102  # shielded and bounded there
            raise
        await self._agent.keys.answered(held, await _answer_of(reply))
        return reply

    async def _repeated(self, operation: Operation) -> Response:
        """Answer as whoever began *operation* was answered, or is going to be."""
        user, wanted = current_user(), preferences(request.headers.getlist("Prefer"))
        wait_secs = (_wait_secs(wanted) or 0.0) if "respond-async" in wanted else math.inf
        async with still_working():
            with trio.move_on_after(wait_secs):
                await self._agent.operations.ended(user, operation.id)
        self._tell(operation.id)
        operation = self._agent.operations.get(user, operation.id)
        if operation.error is not None:
            raise operation.error
        if operation.outcome is not None:
            return outcome_reply(operation.outcome)
        return self._accepted(operation, _wait_secs(wanted))

    # --- operations --------------------------------------------------------------------------------------------------

    async def _operate(self, handler: Handler, call: Call) -> Response:
        """Carry out an operation; let the reply name it, and come early if the client prefers that."""
        token = calls.CURRENT.set(call)
        try:
            wanted = preferences(request.headers.getlist("Prefer"))
            if "respond-async" in wanted:
                return await self._soon(call, handler, _wait_secs(wanted))
            return await handler()
        finally:
            calls.CURRENT.reset(token)
            if call.operation is not None:
                self._tell(call.operation)

    async def _soon(self, call: Call, handler: Handler, wait_secs: float | None) -> Response:
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
        return self._accepted(self._agent.operations.get(current_user(), call.operation), wait_secs)

    def _accepted(self, operation: Operation, wait_secs: float | None) -> Response:
        reply = json_reply(operation_fields(operation, Answers(self._agent).public_text), 202)
        reply.headers["Location"] = f"/v1/operations/{operation.id}"
        applied = "respond-async" if wait_secs is None else f"respond-async, wait={wait_secs:g}"
        reply.headers["Preference-Applied"] = applied
        return reply

    def _tell(self, operation: str) -> None:
        """Let the reply, whatever it is, name the operation and how long its phases took."""
        headers = visit().reply_headers
        headers[OPERATION_HEADER] = operation
        try:
            timings = self._agent.operations.get(current_user(), operation).timings
        except NotFound:
            return
        if timings:
            headers["Server-Timing"] = server_timing(timings)


async def _answer_of(reply: Response) -> Answer:
    """Return what of *reply* is kept: not its body, if nobody is to store it."""
    body = await reply.get_data(as_text=False)
    return Answer(status=reply.status_code, body=None if reply.cache_control.no_store else body)


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
