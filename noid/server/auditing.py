"""The audit log's eye: every route that changes something, wrapped so that who called it is kept, and its end."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from noid.core.agent import Agent
from noid.core.people.audit import AuditEntry
from noid.errors import NoidError
from noid.server.table import Route
from noid.server.visit import visit

_SWITCHING_PROTOCOLS = 101


def audited(agent: Agent, routes: Iterable[Route]) -> list[Route]:
    """Return *routes*, of which those that change something are kept in the audit log of *agent*."""
    return [
        dataclasses.replace(route, handler=_recorded(agent, route)) if _changes(route) else route for route in routes
    ]


def _changes(route: Route) -> bool:
    return route.method != "GET" if route.audited is None else route.audited


def _recorded(agent: Agent, route: Route) -> Callable[..., Awaitable[Any]]:
    """Return the handler of *route*, which writes a row before its answer is sent; of a WebSocket when it opens."""

    @functools.wraps(route.handler)
    async def handler(**names: str) -> Any:
        here = visit()
        here.target = "/".join(names.values())
        status: int | None = None  # cancelled: the client has gone, and what it has asked for may go on
        opened = False

        async def record() -> None:
            entry = AuditEntry.of(
                here.caller, route.endpoint, here.target, status, address=here.address, request=here.id
            )
            await agent.audit.record(entry)

        async def upgraded() -> None:
            nonlocal status, opened
            status, opened = _SWITCHING_PROTOCOLS, True
            await record()

        here.upgraded = upgraded
        try:
            reply = await route.handler(**names)
        except NoidError as error:
            status = error.status
            raise
        except Exception:
            status = NoidError.status
            raise
        else:
            status = getattr(reply, "status_code", None)
            return reply
        finally:
            if not opened:
                await record()  # noqa: ASYNC102  # shielded and bounded there

    return handler
