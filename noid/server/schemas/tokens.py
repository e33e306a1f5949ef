"""Tokens: what is shown of one, and what is sent to make one."""

from __future__ import annotations

from noid.core.model.users import TOKEN_SCOPES, Scope
from noid.server.schemas.paths import NAME
from noid.server.schemas.vocabulary import array, choice, extended, nullable, number, record, text

EXPIRES_SECS_MAX = 100 * 366 * 86400

_MOMENT = text(about="UTC, RFC 3339.")
_SCOPE = choice(*(scope.value for scope in Scope if scope in TOKEN_SCOPES))

SCOPES = array(choice(*(scope.value for scope in Scope)), about="What the caller may do.")

CREATE = record(
    "CreateToken",
    "A token to be made.",
    {
        "name": NAME,
        "scopes?": {**nullable(array(_SCOPE), about="What it allows. All that the caller's allows."), "minItems": 1},
        "expires_in_secs?": nullable({**number(most=EXPIRES_SECS_MAX), "exclusiveMinimum": 0}, about="Never."),
    },
)

TOKEN = record(
    "Token",
    "What is kept of a token. The token itself is not.",
    {
        "name": text(),
        "scopes": array(_SCOPE),
        "created_at": _MOMENT,
        "expires_at": nullable(_MOMENT),
        "last_used_at": nullable(_MOMENT),
    },
)

TOKEN_MADE = extended(
    "TokenMade", "A token, this once with what to show.", TOKEN, {"token": text(pattern="^noid_tok_[0-9a-f]{64}$")}
)
