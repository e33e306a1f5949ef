"""Who may come in: stands before every route, asks the table what it needs and the agent whose token that is."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping
from typing import Any, Protocol

from quart import g, request, websocket

from noid.core.config import Config
from noid.core.model import Credentials, User
from noid.errors import Unauthenticated
from noid.server.hardening import App, Transport
from noid.server.limiter import FailureLimiter
from noid.server.table import Route
from noid.server.visit import Visit


class Authenticator(Protocol):
    """What of the agent knows users."""

    def authenticate(self, credentials: Credentials) -> User:
        """Return whose *credentials* these are, or raise `Unauthenticated`."""
        ...

    def local_user(self) -> User:
        """Return the user who owns what is made through the local socket."""
        ...


class Guard:
    """Stands before every route of an app: authentication first, then routing."""

    def __init__(self, authenticator: Authenticator, config: Config) -> None:
        self._authenticator = authenticator
        self._config = config
        self._limiter = FailureLimiter()
        self._routes: Mapping[str, Route] = {}

    def protect(self, app: App, routes: Mapping[str, Route]) -> None:
        """Put the guard before *app*, whose *routes* say by their endpoints what each needs."""
        self._routes = routes
        app.before_request(self._admit_request)
        app.before_websocket(self._admit_websocket)

    async def _admit_request(self) -> None:
        self._admit(request)

    async def _admit_websocket(self) -> None:
        self._admit(websocket)

    def _admit(self, call: Any) -> None:
        transport = Transport.of(call.scope)
        g.visit = here = Visit(id=secrets.token_hex(4), began=time.monotonic(), address=self._address(call))
        route = self._routes[call.url_rule.endpoint] if call.url_rule is not None else None
        if route is not None and route.scope is None:
            return
        if transport.peer_uid is not None and transport.peer_uid in (os.geteuid(), 0):
            here.user, here.is_local = self._authenticator.local_user(), True
            return
        headers = call.headers.getlist("Authorization")
        scheme, _, token = headers[-1].partition(" ") if headers else ("", "", "")
        if scheme != "Bearer" or not token:
            raise Unauthenticated("missing or invalid Authorization header")
        self._limiter.check(here.address, token)
        try:
            here.user = self._authenticator.authenticate(
                Credentials(token=token, peer_uid=transport.peer_uid, address=here.address)
            )
        except Unauthenticated as error:
            self._limiter.failed(here.address, token)
            raise Unauthenticated("invalid token") from error

    def _address(self, call: Any) -> str:
        """Return where *call* comes from; with ``trust_forwarded_for`` what the proxy in front says."""
        client = call.scope.get("client")
        if self._config.trust_forwarded_for:
            forwarded = call.headers.get("X-Forwarded-For", "").rpartition(",")[2].strip()
            if forwarded:
                return str(forwarded)
        return str(client[0]) if client else "local"
