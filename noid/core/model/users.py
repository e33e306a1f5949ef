"""Users, their tokens, and who calls with which rights."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import datetime


class Scope(enum.StrEnum):
    """What a token allows. Each includes none of the others; a token has a set of them."""

    READ = "read"
    """Look: VMs, checkpoints, operations, events, and what the server can do."""
    EXEC = "exec"
    """Be in a guest: processes, console, files, logs."""
    MANAGE = "manage"
    """Change what there is: VMs, checkpoints, tokens."""
    ADMIN = "admin"
    """Change who there is. No token has it: only who comes through the local socket."""


TOKEN_SCOPES = frozenset({Scope.READ, Scope.EXEC, Scope.MANAGE})
"""What a token can allow at most, and does unless somebody asked for less."""
DEFAULT_TOKEN = "default"  # noqa: S105  # a name, no secret
"""What a user's first token is called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """Whoever owns things."""

    id: str
    name: str
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What a caller showed: a bearer token, or the uid at the other end of a unix socket."""

    token: str | None = None
    peer_uid: int | None = None
    address: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What a token gives whoever shows it. *expires_at* None means never."""

    user_id: str
    token_name: str
    scopes: frozenset[Scope]
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenInfo:
    """A token, without the token. *last_used_at* may be some minutes old; None: never, as far as anybody knows."""

    name: str
    scopes: frozenset[Scope]
    created_at: datetime
    expires_at: datetime | None = None
    last_used_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks. *token* is the name of the token they showed; None: they came through the local socket."""

    user: User
    scopes: frozenset[Scope]
    token: str | None = None
    expires_at: datetime | None = None
