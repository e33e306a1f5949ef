"""What a client hears: JSON bodies, and of every error its status, its code and the words that are its business."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

from quart import Response
from werkzeug.exceptions import HTTPException

from noid.core.agent import Agent
from noid.errors import NoidError, TooManyRequests, Unauthenticated, Unreachable
from noid.server.visit import visit

logger = logging.getLogger(__name__)

UPGRADE_CODE = "upgrade_required"
_JSON = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)


def json_reply(body: Any, status: int = 200) -> Response:
    """Return *body* as compact JSON. Lone surrogates, which UTF-8 cannot carry, become the JSON escapes they are."""
    return text_reply(json_text(body), status)


def json_text(body: Any) -> str:
    """Return *body* as compact JSON, which may have lone surrogates in it."""
    return _JSON.encode(body)


def text_reply(text: str, status: int = 200) -> Response:
    """Return the reply to whose body, JSON, `json_text` has made *text*."""
    return Response(text.encode("utf-8", "backslashreplace"), status, content_type="application/json")


def empty_reply() -> Response:
    """Return the answer that has nothing to say: 204, without a body or a type of one."""
    reply = Response(b"", 204)
    del reply.headers["Content-Type"]
    return reply


def upgrade_required(text: str) -> Response:
    """Return the answer to a plain GET where a WebSocket is: 426."""
    reply = json_reply({"error": text, "code": UPGRADE_CODE}, 426)
    reply.headers["Upgrade"] = "websocket"
    return reply


class Answers:
    """Turns errors into replies. Host directories are only the local user's business."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def answer(self, error: Exception) -> Response:
        """Return what the client hears of *error*. The one place where errors become statuses."""
        if isinstance(error, HTTPException):
            return self._http_answer(error)
        if not isinstance(error, NoidError):
            logger.error("request failed", exc_info=error)
            text = f"internal error; the server's log says more under {visit().id}"
            return json_reply({"error": text, "code": NoidError.code}, NoidError.status)
        if error.status >= 500 and not isinstance(
            error, Unreachable
        ):  # what a guest has no server for is no fault here
            logger.warning("%s: %s", error.code, error, exc_info=error.__cause__)
        reply = json_reply({"error": self.public_text(error), "code": error.code}, error.status)
        if isinstance(error, Unauthenticated):
            reply.headers["WWW-Authenticate"] = "Bearer"
        if isinstance(error, TooManyRequests):
            reply.headers["Retry-After"] = str(math.ceil(error.retry_after_secs))
        return reply

    def public_text(self, error: NoidError) -> str:
        """Return the message of *error* for whoever asked: host directories are only the local user's business."""
        text = str(error)
        if not visit().is_local:
            config = self._agent.config
            for directory, stand_in in ((config.run_dir, "RUN_DIR"), (config.data_dir, "DATA_DIR")):
                text = text.replace(str(directory), stand_in)
        return text

    def _http_answer(self, error: HTTPException) -> Response:
        """Translate the framework's own errors. A wrong method is 404, as it always was in this protocol."""
        status, code, text = {
            404: (404, "not_found", "not found"),
            405: (404, "not_found", "not found"),
            408: (408, "deadline", "the request's body did not arrive in time"),
            413: (413, "too_large", f"the request's body is over {self._agent.config.limits.max_body_bytes} bytes"),
        }.get(error.code or 500, (error.code or 500, "invalid", error.name.lower()))
        return json_reply({"error": text, "code": code}, status)
