"""The line in the log for every request, and the id by which client and log speak of it."""

from __future__ import annotations

import logging
import time

from quart import request
from quart.typing import ResponseTypes

from noid.server.hardening import App
from noid.server.visit import visit

logger = logging.getLogger(__name__)


def log_requests(app: App) -> None:
    """Log every request of *app*, and say its id in the reply."""
    app.after_request(_finish)
    app.after_websocket(_finish_rejection)


async def _finish(response: ResponseTypes) -> ResponseTypes:
    here = visit()
    response.headers["X-Request-Id"] = here.id
    response.headers.update(here.reply_headers)
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


async def _finish_rejection(response: ResponseTypes | None) -> ResponseTypes | None:
    if response is not None:  # None: it was a WebSocket after all
        response.headers["X-Request-Id"] = visit().id
    return response
