"""Users and their tokens: for the agent, and for admin commands, which work whether or not an agent runs."""

from __future__ import annotations

import logging
import os
import pwd
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import trio

from noid.core.backends import AgentContext, AuthBackend
from noid.core.config.settings import Config
from noid.core.database.store import Store, open_store
from noid.core.ids import new_id
from noid.core.model.names import checked_name
from noid.core.model.times import now
from noid.core.model.users import DEFAULT_TOKEN, TOKEN_SCOPES, Caller, Credentials, Scope, TokenInfo, User
from noid.core.people.audit import AuditEntry, AuditLog
from noid.core.plugins import Plugins
from noid.errors import InvalidRequest, NoidError, NotFound, Unauthenticated

logger = logging.getLogger(__name__)

TOKENS_MAX = 100
SAVE_USES_SECS = 60.0


class Users:
    """Who may use the agent of one data directory. Tokens exist in clear text only in what these methods return."""

    def __init__(self, store: Store, auth: AuthBackend) -> None:
        self._store = store
        self._auth = auth
        self._local: Caller | None = None

    @property
    def store(self) -> Store:
        """The database they are in."""
        return self._store

    def authenticate(self, credentials: Credentials) -> Caller:
        """Return whose token that is, and what it allows.

        Raises:
            Unauthenticated: nobody's, or it has expired.
        """
        grant = self._auth.authenticate(credentials)
        if grant is None:
            raise Unauthenticated("invalid token")
        try:
            user = self._store.user(grant.user_id)
        except NotFound as error:
            raise Unauthenticated("invalid token") from error
        return Caller(
            user=user, scopes=grant.scopes & TOKEN_SCOPES, token=grant.token_name, expires_at=grant.expires_at
        )

    def local(self) -> Caller:
        """Return who comes through the local socket: the user this agent runs as, who may do everything."""
        if self._local is None:
            self._local = Caller(user=self._store.user_named(local_user_name()), scopes=TOKEN_SCOPES | {Scope.ADMIN})
        return self._local

    def named(self, name: str) -> User:
        """Return the user *name*, or raise `NotFound`."""
        return self._store.user_named(name)

    def list(self) -> list[User]:
        """Return everybody, oldest first."""
        return self._store.users()

    async def add(self, name: str) -> tuple[User, str]:
        """Add a user and return it with its token.

        Raises:
            InvalidRequest: not a legal name.
            Conflict: the name is taken.
        """
        checked_name(name, "user name")
        user = await self._store.write(lambda tx: tx.insert_user(name, new_id()), needs_room=True)
        return user, await self._auth.create_token(user)

    async def rotate_token(self, name: str) -> str:
        """Make every token of *name* invalid, at once, and return a new one that is called ``default``.

        Raises:
            NotFound: no such user.
        """
        user = self._store.user_named(name)
        await self._auth.revoke_tokens(user)
        return await self._auth.create_token(user)

    async def tokens(self, user: User) -> Sequence[TokenInfo]:
        """Return *user*'s tokens, oldest first, expired ones too."""
        return await self._auth.tokens(user)

    async def create_token(
        self,
        user: User,
        name: str = DEFAULT_TOKEN,
        scopes: frozenset[Scope] = TOKEN_SCOPES,
        expires_at: datetime | None = None,
        *,
        shown: str | None = None,
    ) -> tuple[str, TokenInfo]:
        """Return a new token of *user*, the only copy there will ever be, and what is remembered of it.

        *shown* is the token of whoever asks for it; None: whoever runs the server.

        Raises:
            Unauthenticated: *shown* was revoked or has expired meanwhile.
            InvalidRequest: not a legal name, or scopes no token can have.
            Conflict: there is a token of that name, or there are too many.
        """
        checked_name(name, "token name")
        if not scopes or not scopes <= TOKEN_SCOPES:
            raise InvalidRequest(f"a token has one or more of the scopes {', '.join(ordered(TOKEN_SCOPES))}.")
        token = await self._auth.create_token(
            user, name=name, scopes=scopes, expires_at=expires_at, shown=shown, most=TOKENS_MAX
        )
        return token, TokenInfo(name=name, scopes=scopes, created_at=now(), expires_at=expires_at)

    async def revoke_token(self, user: User, name: str) -> None:
        """Make *user*'s token *name* invalid, from the next request on.

        Raises:
            NotFound: there is none.
        """
        await self._auth.revoke_token(user, checked_name(name, "token name"))

    async def revoke_tokens(self, user: User) -> None:
        """Make every token of *user* invalid, from the next request on."""
        await self._auth.revoke_tokens(user)

    async def note(self, command: str, target: str) -> None:
        """Write into the audit log that somebody on this host has carried out an admin *command*."""
        entry = AuditEntry(at=now(), user=local_user_name(), action=f"noid-server {command}", target=target, status=0)
        log = AuditLog(self._store)
        await log.record(entry)
        await log.close()

    async def keep_saving_uses(self) -> None:
        """Write down, from time to time, when tokens were used last. Runs until it is cancelled.

        On a full disk that waits: once a minute, for days, it would use up what is reserved for the database.
        """
        while True:
            await trio.sleep(SAVE_USES_SECS)
            await self.save_uses(needs_room=True)

    async def save_uses(self, *, needs_room: bool = False) -> None:
        """Write down when tokens were used last. What fails is logged: nobody's request depends on it."""
        try:
            if not needs_room or await self._store.has_room():
                await self._auth.save_uses()
        except NoidError as error:
            logger.warning("when tokens were used last is not written down: %s", error)


@asynccontextmanager
async def open_users(config: Config, plugins: Plugins) -> AsyncIterator[Users]:
    """Open users and tokens of ``config.data_dir``, making the database if there is none.

    Raises:
        ConfigError: the auth backend cannot be used.
        Damaged: the database cannot be used.
    """
    spec, settings = plugins.auth(config)
    context = AgentContext(data_dir=config.data_dir, run_dir=config.run_dir, database=config.database)
    with open_store(config.database) as store:
        async with spec.open(settings, context) as auth:
            yield Users(store, auth)


def ordered(scopes: frozenset[Scope]) -> list[str]:
    """Return the names of *scopes* as people and clients are shown them: from looking to changing."""
    return [scope.value for scope in Scope if scope in scopes]


def token_fields(info: TokenInfo) -> dict[str, Any]:
    """Return *info* as a token's object. The token itself is not in it."""
    return {
        "name": info.name,
        "scopes": ordered(info.scopes),
        "created_at": info.created_at.isoformat(),
        "expires_at": None if info.expires_at is None else info.expires_at.isoformat(),
        "last_used_at": None if info.last_used_at is None else info.last_used_at.isoformat(),
    }


def local_user_name() -> str:
    """Return the name of the user who needs no token: whom this process runs as. No user that is added can have it."""
    try:
        own = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        own = str(os.geteuid())
    return f"local:{own}"


async def ensure_local_user(store: Store) -> None:
    """Add the local user if there is none yet."""
    name = local_user_name()
    if all(user.name != name for user in store.users()):
        await store.write(lambda tx: tx.insert_user(name, new_id()))
