"""The line in the log for every request, and the id by which client and log speak of it."""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Any

from noid.core import tracing
from noid.core.redaction import hidden
from noid.server import visit
from noid.server.hardening import App, Exchange
from noid.server.origins import UNIX
from noid.server.visit import Visit

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "X-Request-Id"

#: How much of a path is logged: as long as it may be, it would be a way to fill the disk with the log.
_PATH_LENGTH_MAX = 500

_ACCEPTABLE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def log_requests(app: App) -> None:
    """Log every request of *app* when it has ended, and say its id in the reply."""
    app.around = _logged


@contextlib.contextmanager
def _logged(scope: Mapping[str, Any], exchange: Exchange) -> Iterator[None]:
    client = scope.get("client")
    here = Visit(
        id=_request_id(scope),
        began=time.monotonic(),
        address=str(client[0]) if client else UNIX,
        reply_headers=exchange.headers,
    )
    here.reply_headers[REQUEST_ID_HEADER] = here.id
    token = visit.current.set(here)
    try:
        with tracing.working_for(here.id):
            try:
                yield
            finally:
                _log(scope, exchange, here)
    finally:
        visit.current.reset(token)


def _request_id(scope: Mapping[str, Any]) -> str:
    """Return the id a proxy or client has given the request, if it is fit for a log; else a new one."""
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    text = given[-1].decode("latin-1") if given else ""
    return text if _ACCEPTABLE_ID.fullmatch(text) else secrets.token_hex(4)


def _log(scope: Mapping[str, Any], exchange: Exchange, here: Visit) -> None:
    method = scope.get("method", "WS")
    took_ms = round((time.monotonic() - here.began) * 1000, 1)
    user = here.user.name if here.user else "-"
    path = hidden(scope["path"])
    if len(path) > _PATH_LENGTH_MAX:
        path = f"{path[:_PATH_LENGTH_MAX]}..."
    logger.info(
        "%s %s %s -> %s (%.1f ms) remote=%s",
        user,
        method,
        path,
        _outcome(exchange),
        took_ms,
        here.address,
        extra={
            "user": user,
            "method": method,
            "path": path,
            "status": exchange.status,
            "close_code": exchange.close_code,
            "ended": exchange.ended,
            "bytes": exchange.sent_bytes,
            "ms": took_ms,
            "remote": here.address,
        },
    )


def _outcome(exchange: Exchange) -> str:
    if exchange.status is None:
        return "nobody: the client has left"
    text = str(exchange.status)
    if exchange.close_code is not None:
        return f"{text}, closed{' by the client' if exchange.closed_by_client else ''} with {exchange.close_code}"
    return text if exchange.ended else f"{text}, broken off"
