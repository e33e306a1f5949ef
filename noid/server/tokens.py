"""The caller's own tokens: what there are, a new one, one less. No token makes one that may do more or lives longer."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from quart import Response

from noid.core.agent import Agent
from noid.core.database.listing import Position
from noid.core.model.times import now
from noid.core.model.users import TOKEN_SCOPES, Scope, TokenInfo
from noid.core.people.users import ordered, token_fields
from noid.errors import Forbidden, InvalidRequest
from noid.server.answers import empty_reply, json_reply
from noid.server.lists import Page
from noid.server.rest import Body, read_body
from noid.server.schemas.lists import PAGE, listed
from noid.server.schemas.tokens import CREATE, EXPIRES_SECS_MAX, TOKEN, TOKEN_MADE
from noid.server.table import Route
from noid.server.visit import current_caller, current_user, visit

#: A name may be taken; the database may be held by another process, or its disk be full.
_KEEPING = frozenset({409, 503, 507})


class TokenRoutes:
    """``/v1/tokens``. A token is shown once, in the answer that says it was made."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def routes(self) -> list[Route]:
        """Return the lines of the table."""
        return [
            Route(method="GET", path="/v1/tokens", handler=self.tokens, query=PAGE, answers={200: listed(TOKEN)}),
            Route(
                method="POST", path="/v1/tokens", handler=self.create, scope=Scope.MANAGE,
                body=CREATE, answers={201: TOKEN_MADE}, errors=_KEEPING,
            ),
            Route(
                method="DELETE", path="/v1/tokens/<token>", handler=self.revoke, scope=Scope.MANAGE,
                answers={204: None}, errors=_KEEPING,
            ),
        ]  # fmt: skip

    async def tokens(self) -> Response:
        """List the caller's tokens, oldest first, without what they are."""
        page, found = Page.asked(), await self._agent.users.tokens(current_user())
        return page.reply(page.cut(found, _position), token_fields, _position)

    async def create(self) -> Response:
        """Make a token: 201, with the only copy of it."""
        body = await read_body()
        name, caller = body.text("name"), current_caller()
        visit().target = name
        scopes = _scopes(body)
        for scope in Scope:
            if scope in scopes - caller.scopes:
                raise Forbidden(scope, caller.token)
        expires_at = _expiry(body)
        if caller.expires_at is not None:
            expires_at = min(expires_at or caller.expires_at, caller.expires_at)
        shown = visit().shown
        token, info = await self._agent.users.create_token(
            caller.user, name, scopes, expires_at, shown=None if shown is None else shown.token
        )
        reply = json_reply(token_fields(info) | {"token": token}, 201)
        reply.headers["Cache-Control"] = "no-store"
        return reply

    async def revoke(self, token: str) -> Response:
        """Make the caller's token of that name invalid, from the next request on: 204."""
        await self._agent.users.revoke_token(current_user(), token)
        return empty_reply()


def _scopes(body: Body) -> frozenset[Scope]:
    """Return which scopes are asked for; nothing: all the caller has.

    Raises:
        InvalidRequest: none, or one that no token can have.
    """
    wanted = body.fields.get("scopes")
    if wanted is None:
        return current_caller().scopes & TOKEN_SCOPES
    if not isinstance(wanted, list) or not wanted or not all(word in ordered(TOKEN_SCOPES) for word in wanted):
        raise InvalidRequest(
            f"invalid request body: 'scopes' must be one or more of {', '.join(ordered(TOKEN_SCOPES))}, in a list."
        )
    return frozenset(Scope(word) for word in wanted)


def _expiry(body: Body) -> datetime | None:
    """Return when the token shall end, or None for never.

    Raises:
        InvalidRequest: out of range, or no number.
    """
    if body.fields.get("expires_in_secs") is None:
        return None
    secs = body.number("expires_in_secs", 0.0)
    if not 0 < secs <= EXPIRES_SECS_MAX:
        raise InvalidRequest(f"expires_in_secs is {secs:g}; it must be above 0 and at most {EXPIRES_SECS_MAX}.")
    return now() + timedelta(seconds=secs)


def _position(info: TokenInfo) -> Position:
    """Return where a token is among its user's, oldest first."""
    return info.created_at.astimezone(UTC).isoformat(timespec="microseconds"), info.name
