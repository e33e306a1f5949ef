"""The routes of operations: what is and was done, waiting for one, cancelling one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio
from quart import Response, request

from noid.core.agent import Agent
from noid.core.model.names import checked_name
from noid.core.model.users import Scope
from noid.core.operations.outcomes import Operation, OperationState
from noid.errors import InvalidRequest, NoidError
from noid.server.answers import Answers, json_reply
from noid.server.interim import still_working
from noid.server.lists import Page
from noid.server.queries import seconds
from noid.server.rest import outcome_answer
from noid.server.schemas.lists import LIMIT_MAX, PAGE, listed
from noid.server.schemas.operations import OPERATION
from noid.server.schemas.paths import NAME
from noid.server.schemas.vocabulary import choice, number
from noid.server.table import Route
from noid.server.visit import current_user

WAIT_SECS_MAX = 300.0


class OperationRoutes:
    """``/v1/operations``."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def routes(self) -> list[Route]:
        """Return the lines of the table."""
        one = "/v1/operations/<operation>"
        return [
            Route(
                method="GET", path="/v1/operations", handler=self.all,
                query={"vm?": NAME, "state?": choice(*OperationState), **PAGE}, answers={200: listed(OPERATION)},
            ),
            Route(
                method="GET", path=one, handler=self.one,
                query={"wait?": number(0, WAIT_SECS_MAX, default=0, about="Seconds.")}, answers={200: OPERATION},
            ),
            Route(
                method="POST", path=f"{one}/cancel", handler=self.cancel, scope=Scope.MANAGE,
                answers={202: OPERATION}, errors=frozenset({409}),
            ),
        ]  # fmt: skip

    async def all(self) -> Response:
        """List the caller's operations of the last 24 hours, newest first, at most 1000 at a time."""
        page, vm, state = Page.asked(default=LIMIT_MAX), request.args.get("vm"), request.args.get("state")
        if state is not None and state not in set(OperationState):
            raise InvalidRequest(f"state is {state[:40]!r}; it must be one of {', '.join(OperationState)}.")
        found = self._agent.operations.all(
            current_user(),
            vm=None if vm is None else checked_name(vm),
            state=None if state is None else OperationState(state),
            before=None if page.after is None else page.after[1],
            limit=-1 if page.limit is None else page.limit + 1,
        )
        return page.reply(found, self._fields, lambda each: (each.started_at.isoformat(), each.id))

    async def one(self, operation: str) -> Response:
        """Show an operation; with ``?wait=`` when it has ended, or after so many seconds as it is then."""
        user, wait_secs = current_user(), seconds("wait", request.args.get("wait"), 0.0, WAIT_SECS_MAX)
        found = self._agent.operations.get(user, operation)
        async with still_working():
            with trio.move_on_after(wait_secs):
                await self._agent.operations.ended(user, operation)
        found = self._agent.operations.get(user, operation)
        return json_reply(self._fields(found))

    async def cancel(self, operation: str) -> Response:
        """Cancel an operation: 202. What it has begun is undone; ask again to see what became of it."""
        found = self._agent.operations.cancel(current_user(), operation)
        return json_reply(self._fields(found), 202)

    def _fields(self, operation: Operation) -> dict[str, Any]:
        return operation_fields(operation, Answers(self._agent).public_text)


def operation_fields(operation: Operation, public_text: Callable[[NoidError], str]) -> dict[str, Any]:
    """Return *operation* as its JSON object. *status* and *result* are what waiting for it would have been answered."""
    status, result, error = None, None, None
    if operation.outcome is not None:
        status, result = outcome_answer(operation.outcome)
    if operation.error is not None:
        status = operation.error.status
        error = {"error": public_text(operation.error), "code": operation.error.code}
    return {
        "id": operation.id,
        "kind": operation.kind,
        "vm": operation.vm,
        "state": operation.state.value,
        "step": operation.step,
        "started_at": operation.started_at.isoformat(timespec="milliseconds"),
        "ended_at": None if operation.ended_at is None else operation.ended_at.isoformat(timespec="milliseconds"),
        "timings": dict(operation.timings),
        "error": error,
        "status": status,
        "result": result,
    }
