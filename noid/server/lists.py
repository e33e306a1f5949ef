"""Lists and pages of them: what a request wants of a list, and the answer with a link to what follows.

A cursor says where the last thing of a page is, not how many were before it: nothing comes twice and nothing is left
out, whatever is made or removed between two pages.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlencode

from quart import Response, request

from noid.core.database.listing import Position, Wanted
from noid.core.model.names import LABELS_MAX
from noid.core.model.vms import VmState
from noid.errors import InvalidRequest
from noid.server.answers import json_text, text_reply
from noid.server.schemas.lists import LIMIT_MAX

T = TypeVar("T")

_CURSOR_LENGTH_MAX = 1000


@dataclass(frozen=True, slots=True)
class Page:
    """The part of a list that the current request asks for: what comes *after* a position, at most *limit* things."""

    limit: int | None
    after: Position | None

    @classmethod
    def asked(cls, *, default: int | None = None) -> Page:
        """Return what ``?limit=`` and ``?cursor=`` say; without a limit, *default*, or None for everything.

        Raises:
            InvalidRequest: they make no sense.
        """
        limit, cursor = request.args.get("limit"), request.args.get("cursor")
        return cls(default if limit is None else _limit(limit), None if cursor is None else _position(cursor))

    def of(self, wanted: Wanted) -> Wanted:
        """Return *wanted*, no more of it than the page needs: its things, and one to know whether there are more."""
        return dataclasses.replace(wanted, after=self.after, limit=None if self.limit is None else self.limit + 1)

    def cut(self, things: Iterable[T], position: Callable[[T], Position]) -> list[T]:
        """Return from *things*, which are sorted by *position*, what `of` would have asked a database for."""
        found = [thing for thing in things if self.after is None or position(thing) > self.after]
        return found if self.limit is None else found[: self.limit + 1]

    def reply(
        self, things: Sequence[T], fields: Callable[[T], dict[str, Any]], position: Callable[[T], Position]
    ) -> Response:
        """Return *things*, which `of` or `cut` left, as JSON with *fields*; with a ``Link`` where there are more."""
        return self.reply_in_text(things, lambda thing: json_text(fields(thing)), position)

    def reply_in_text(
        self, things: Sequence[T], text: Callable[[T], str], position: Callable[[T], Position]
    ) -> Response:
        """Return *things*, each the JSON that *text* makes of it; otherwise as `reply`."""
        shown = things if self.limit is None else things[: self.limit]
        reply = text_reply(f"[{','.join(map(text, shown))}]")
        if len(shown) < len(things):
            query = [(name, text) for name, text in request.args.items(multi=True) if name != "cursor"]
            query.append(("cursor", _cursor(position(shown[-1]))))
            reply.headers["Link"] = f'<{request.path}?{urlencode(query)}>; rel="next"'
        return reply


def wanted_labels() -> tuple[tuple[str, str | None], ...]:
    """Return what the current request's ``?label=`` say: keys, each with the value it must have, or None for any.

    Raises:
        InvalidRequest: more than anything can have.
    """
    texts = request.args.getlist("label")
    if len(texts) > LABELS_MAX:
        raise InvalidRequest(f"there are {len(texts)} label= in the query; at most {LABELS_MAX} are allowed.")
    labels = (text.partition("=") for text in texts)
    return tuple((key, value if equals else None) for key, equals, value in labels)


def wanted_states() -> frozenset[VmState]:
    """Return what the current request's ``?state=`` say.

    Raises:
        InvalidRequest: there is no such state.
    """
    names = request.args.getlist("state")
    unknown = next((name for name in names if name not in {state.value for state in VmState}), None)
    if unknown is not None:
        raise InvalidRequest(f"state is {unknown[:40]!r}; it must be one of {', '.join(VmState)}.")
    return frozenset(map(VmState, names))


def _limit(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and 1 <= int(text) <= LIMIT_MAX):
        raise InvalidRequest(f"limit is {text[:40]!r}; it must be a whole number from 1 to {LIMIT_MAX}.")
    return int(text)


def _cursor(position: Position) -> str:
    return base64.urlsafe_b64encode(json.dumps(position).encode()).decode().rstrip("=")


def _position(cursor: str) -> Position:
    try:
        if len(cursor) > _CURSOR_LENGTH_MAX:
            raise ValueError(f"{len(cursor)} characters")
        decoded = json.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True))
        json.dumps(decoded, ensure_ascii=False).encode()  # half a surrogate pair is nothing a database knows
    except (ValueError, RecursionError, binascii.Error) as error:
        raise InvalidRequest(_NO_CURSOR) from error
    match decoded:
        case [str(made), str(name)]:
            return made, name
        case _:
            raise InvalidRequest(_NO_CURSOR)


_NO_CURSOR = "cursor is none that a Link of this list has given. Begin without one."
