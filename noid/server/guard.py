"""Who may come in: stands before every route, asks the table what it needs, whose token that is, what it allows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from quart import request, websocket

from noid.core.agent import Agent
from noid.core.model.users import Caller, Credentials
from noid.core.people.audit import AUTHENTICATE, AuditEntry
from noid.core.people.networks import place
from noid.errors import Forbidden, TooManyRequests, Unauthenticated
from noid.server.hardening import App, Transport
from noid.server.limiter import FailureLimiter, RequestLimiter
from noid.server.metrics import Metrics
from noid.server.origins import origins
from noid.server.table import Route
from noid.server.visit import visit


class Guard:
    """Stands before every route of an app: authentication first, then routing."""

    def __init__(self, agent: Agent, metrics: Metrics) -> None:
        self._agent = agent
        self._metrics = metrics
        self._failures = FailureLimiter()
        self._requests = RequestLimiter()
        self._routes: Mapping[str, Route] = {}

    def protect(self, app: App, routes: Mapping[str, Route]) -> None:
        """Put the guard before *app*, whose *routes* say by their endpoints what each needs."""
        self._routes = routes
        app.before_request(self._admit_request)
        app.before_websocket(self._admit_websocket)

    async def _admit_request(self) -> None:
        await self._admit_or_record(request)

    async def _admit_websocket(self) -> None:
        await self._admit_or_record(websocket)

    async def _admit_or_record(self, call: Any) -> None:
        try:
            self._admit(call)
        except (Unauthenticated, TooManyRequests, Forbidden) as error:
            self._metrics.refused(error)
            here, action, target = visit(), AUTHENTICATE, ""
            if isinstance(error, TooManyRequests) and here.caller is not None:
                raise  # a client that is too fast: known, and nothing for the audit log
            if isinstance(error, Forbidden):
                action, target = call.url_rule.endpoint, "/".join((call.view_args or {}).values())
            await self._agent.audit.record(
                AuditEntry.of(here.caller, action, target, error.status, address=here.address, request=here.id)
            )
            raise

    def _admit(self, call: Any) -> None:
        transport = Transport.of(call.scope)
        here = visit()
        here.address = self._address(call, transport)
        route = self._routes[call.url_rule.endpoint] if call.url_rule is not None else None
        if route is not None and route.scope is None:
            return
        here.caller = caller = self._caller(call, transport, here.address)
        if caller.token is not None:
            limits = self._agent.config.limits
            self._requests.pass_one(caller.user.id, per_second=limits.requests_per_second, burst=limits.requests_burst)
        if route is not None and route.scope is not None and route.scope not in caller.scopes:
            raise Forbidden(route.scope, caller.token)

    def _caller(self, call: Any, transport: Transport, address: str) -> Caller:
        if transport.peer_uid is not None and transport.peer_uid in (os.geteuid(), 0):
            return self._agent.users.local()
        headers = call.headers.getlist("Authorization")
        scheme, _, token = headers[-1].partition(" ") if headers else ("", "", "")
        if scheme != "Bearer" or not token:
            raise Unauthenticated("missing or invalid Authorization header")
        where = place(address)
        self._failures.check(where, token)
        shown = Credentials(token=token, peer_uid=transport.peer_uid, address=address)
        try:
            caller = self._agent.users.authenticate(shown)
        except Unauthenticated as error:
            self._failures.failed(where, token)
            raise Unauthenticated("invalid token") from error
        visit().shown = shown
        return caller

    def _address(self, call: Any, transport: Transport) -> str:
        """Return where *call* comes from; behind proxies that ``trust_forwarded_for`` names, what they say."""
        peer = None if transport.peer_uid is not None else str(call.scope["client"][0])
        return origins(self._agent.config.trust_forwarded_for).of(peer, call.headers.getlist("X-Forwarded-For"))
