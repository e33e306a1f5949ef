"""What an error looks like, and which statuses a route answers because of what it has to do with."""

from __future__ import annotations

from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from noid import errors
from noid.errors import NoidError
from noid.server.schemas.vocabulary import JSON, Content, choice, record, shape, text

OPERATION = frozenset({409, 501, 503, 504, 507})
"""Of a route that changes a VM or a checkpoint: others may hold it, backends and the guest may fail."""

GUEST = frozenset({409, 501, 503, 504})
"""Of a route that needs a running guest."""

OF_EVERY_ROUTE = frozenset({500})
OF_A_SCOPE = frozenset({401, 403, 429})
OF_A_NAME_IN_THE_PATH = frozenset({400, 404})
OF_A_QUERY = frozenset({400})
OF_A_BODY = frozenset({400, 408, 413})
OF_A_KEY = frozenset({400, 408, 409, 413, 422})  # what the key stands for includes the body
OF_A_WEBSOCKET = frozenset({503})  # there may be too many already

UPGRADE_REQUIRED = Content(
    media={
        JSON: record(
            "UpgradeRequired",
            "What a GET hears where a WebSocket is.",
            {"error": text(), "code": choice("upgrade_required")},
        )
    },
    headers={"Upgrade": choice("websocket")},
    text="This needs a WebSocket upgrade.",
)

_BESIDE_CLASSES = {408: ("deadline",), 416: ("invalid",)}
"""Statuses that errors of the protocol have, which no class of `noid.errors` stands for, with their codes."""


def error_statuses() -> dict[int, dict[str, str]]:
    """Return every status an error has: its codes, each with what it means."""
    statuses: dict[int, dict[str, str]] = {}
    for kind in _all_errors(NoidError):
        meaning = (kind.__doc__ or "").partition("\n")[0].replace("``", "`")
        statuses.setdefault(kind.status, {})[kind.code] = "A bug." if kind is NoidError else meaning
    for status, codes in _BESIDE_CLASSES.items():
        statuses.setdefault(status, {}).update(dict.fromkeys(codes, HTTPStatus(status).phrase + "."))
    return dict(sorted(statuses.items()))


def error_content(status: int) -> Content:
    """Return the answer that is an error of *status*."""
    codes = error_statuses()[status]
    schema = shape({"error": text(about="For people; may change."), "code": choice(*codes)})
    headers: dict[str, dict[str, Any]] = {
        401: {"WWW-Authenticate": choice("Bearer")},
        429: {"Retry-After": text(pattern="^[0-9]+$", about="Seconds.")},
        416: {"Content-Range": text()},
    }.get(status, {})
    return Content(media={JSON: schema}, headers=headers, text="\n".join(f"- `{c}`: {m}" for c, m in codes.items()))


def _all_errors(base: type[NoidError]) -> Iterator[type[NoidError]]:
    yield base
    for below in base.__subclasses__():
        if below.__module__ == errors.__name__:
            yield from _all_errors(below)
