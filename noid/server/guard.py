"""Who may come in, what they hear when something fails, and the line in the log: around every request, in one place."""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import trio
from quart import Response, g, request, websocket
from quart.typing import ResponseTypes
from werkzeug.exceptions import HTTPException

from noid.core.config import Config
from noid.core.model import Credentials, User
from noid.errors import NoidError, TooManyRequests, Unauthenticated
from noid.server.hardening import App, Transport
from noid.server.table import Route

logger = logging.getLogger(__name__)

FAILURES_PER_TOKEN = 10
FAILURES_PER_ADDRESS = 100
FAILURE_WINDOW_SECS = 60.0
FAILURE_KEYS_MAX = 10_000

_TOKEN_PREFIX = slice(0, 25)  # "noid_tok_" and 16 digits: tells tokens apart without holding one


class Authenticator(Protocol):
    """What of the agent knows users."""

    def authenticate(self, credentials: Credentials) -> User:
        """Return whose *credentials* these are, or raise `Unauthenticated`."""
        ...

    def local_user(self) -> User:
        """Return the user who owns what is made through the local socket."""
        ...


class FailureLimiter:
    """Counts failed authentications per address and token, and per address, within a window; bounded in memory.

    A token that failed `FAILURES_PER_TOKEN` times from one address is not even looked up. An address that failed
    `FAILURES_PER_ADDRESS` times with whatever tokens hears 429 for further failures; a valid token still passes,
    because behind one address there may be many users. (Guessing is hopeless either way: a token has 256 bits.)
    """

    def __init__(self) -> None:
        self._failures: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()

    def check(self, address: str, token: str) -> None:
        """Raise if *token* failed too often from *address*.

        Raises:
            TooManyRequests: it did.
        """
        if self._count(address, token[_TOKEN_PREFIX]) >= FAILURES_PER_TOKEN:
            raise TooManyRequests("too many authentication failures, try again later")

    def failed(self, address: str, token: str) -> None:
        """Remember that *token* failed from *address*.

        Raises:
            TooManyRequests: *address* has failed too often.
        """
        exceeded = self._count(address, "") >= FAILURES_PER_ADDRESS
        for key in ((address, token[_TOKEN_PREFIX]), (address, "")):
            began, count = self._failures.pop(key, (trio.current_time(), 0))
            if trio.current_time() - began > FAILURE_WINDOW_SECS:
                began, count = trio.current_time(), 0
            self._failures[key] = (began, count + 1)
        while len(self._failures) > FAILURE_KEYS_MAX:
            self._failures.popitem(last=False)
        if exceeded:
            raise TooManyRequests("too many authentication failures, try again later")

    def _count(self, address: str, prefix: str) -> int:
        began, count = self._failures.get((address, prefix), (0.0, 0))
        return count if trio.current_time() - began <= FAILURE_WINDOW_SECS else 0


@dataclass(slots=True, kw_only=True)
class Visit:
    """One request while it is served: its id in log and reply, when it began, and who it turned out to be."""

    id: str
    began: float
    address: str
    user: User | None = None
    is_local: bool = False


def current_user() -> User:
    """Return who the current request comes from. Only behind the guard, which lets nobody else in."""
    user = visit().user
    assert user is not None  # noqa: S101  # see above
    return user


def visit() -> Visit:
    """Return the current request's `Visit`."""
    found = g.visit
    assert isinstance(found, Visit)  # noqa: S101  # `Guard` put it there
    return found


def json_reply(body: Any, status: int = 200) -> Response:
    """Return *body* as compact JSON. Lone surrogates, which UTF-8 cannot carry, become the JSON escapes they are."""
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=False)
    return Response(text.encode("utf-8", "backslashreplace"), status, content_type="application/json")


def upgrade_required(text: str) -> Response:
    """Return the answer to a plain GET where a WebSocket is: 426."""
    reply = json_reply({"error": text}, 426)
    reply.headers["Upgrade"] = "websocket"
    return reply


class Guard:
    """Stands before every route of an app: authentication first, then routing; every failure is answered here."""

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
        app.after_request(self._finish)
        app.after_websocket(self._finish_rejection)
        app.register_error_handler(Exception, self.answer)

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

    async def _finish(self, response: ResponseTypes) -> ResponseTypes:
        here = visit()
        response.headers["X-Request-Id"] = here.id
        logger.info(
            "[%s] %s %s %s -> %d (%d ms) remote=%s",
            here.id,
            here.user.name if here.user else "-",
            request.method,
            request.path,
            response.status_code,
            (time.monotonic() - here.began) * 1000,
            here.address,
        )
        return response

    async def _finish_rejection(self, response: ResponseTypes | None) -> ResponseTypes | None:
        if response is not None:  # None: it was a WebSocket after all
            response.headers["X-Request-Id"] = visit().id
        return response

    async def answer(self, error: Exception) -> Response:
        """Return what the client hears of *error*. The one place where errors become statuses."""
        here = visit()
        if isinstance(error, HTTPException):
            return self._http_answer(error)
        if not isinstance(error, NoidError):
            logger.error("[%s] request failed", here.id, exc_info=error)
            text = f"internal error; the server's log says more under {here.id}"
            return json_reply({"error": text, "code": NoidError.code}, NoidError.status)
        if error.status >= 500:
            logger.warning("[%s] %s: %s", here.id, error.code, error, exc_info=error.__cause__)
        reply = json_reply({"error": self.public_text(error), "code": error.code}, error.status)
        if isinstance(error, Unauthenticated):
            reply.headers["WWW-Authenticate"] = "Bearer"
        if isinstance(error, TooManyRequests):
            reply.headers["Retry-After"] = str(int(FAILURE_WINDOW_SECS))
        return reply

    def public_text(self, error: NoidError) -> str:
        """Return the message of *error* for whoever asked: host directories are only the local user's business."""
        text = str(error)
        if not visit().is_local:
            for directory, stand_in in ((self._config.run_dir, "RUN_DIR"), (self._config.data_dir, "DATA_DIR")):
                text = text.replace(str(directory), stand_in)
        return text

    def _http_answer(self, error: HTTPException) -> Response:
        """Translate the framework's own errors. A wrong method is 404, as it always was in this protocol."""
        status, code, text = {
            404: (404, "not_found", "not found"),
            405: (404, "not_found", "not found"),
            408: (408, "deadline", "the request's body did not arrive in time"),
            413: (413, "too_large", "the request's body is over 1 MiB"),
        }.get(error.code or 500, (error.code or 500, "invalid", error.name.lower()))
        return json_reply({"error": text, "code": code}, status)
