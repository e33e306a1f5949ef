"""Users and their tokens: for the agent, and for admin commands, which work whether or not an agent runs."""

from __future__ import annotations

import os
import pwd
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from noid.core.backends import AgentContext, AuthBackend
from noid.core.config import Config
from noid.core.ids import new_id
from noid.core.model import User, checked_name
from noid.core.plugins import Plugins
from noid.core.store import Store, open_store


class Users:
    """Who may use the agent of one data directory. Tokens exist in clear text only in what these methods return."""

    def __init__(self, store: Store, auth: AuthBackend) -> None:
        self._store = store
        self._auth = auth

    async def add(self, name: str) -> tuple[User, str]:
        """Add a user and return it with its token.

        Raises:
            InvalidRequest: not a legal name.
            Conflict: the name is taken.
        """
        checked_name(name, "user name")
        user = await self._store.write(lambda tx: tx.insert_user(name, new_id()))
        return user, await self._auth.create_token(user)

    async def rotate_token(self, name: str) -> str:
        """Make every token of *name* invalid, at once, and return a new one.

        Raises:
            NotFound: no such user.
        """
        user = self._store.user_named(name)
        await self._auth.revoke_tokens(user)
        return await self._auth.create_token(user)

    def list(self) -> list[User]:
        """Return everybody, oldest first."""
        return self._store.users()


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
