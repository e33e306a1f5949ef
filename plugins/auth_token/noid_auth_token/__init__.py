"""Bearer tokens for callers who come over TCP. Only SHA-256 hashes are kept."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import trio

from noid.core.backends import AgentContext, AuthBackend, BackendSpec
from noid.hookspecs import hookimpl
from noid_auth_token.tokens import NAME, TokenAuth, open_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenConfig:
    """``[plugins.auth_token]``: nothing to set."""


@contextlib.asynccontextmanager
async def open_auth(config: TokenConfig, context: AgentContext) -> AsyncIterator[AuthBackend]:
    """Open the keeper of tokens on the agent's database, bringing its table up to date.

    Raises:
        Damaged: the database cannot be used.
    """
    connections = await trio.to_thread.run_sync(open_tokens, context.database)
    try:
        yield TokenAuth(connections)
    finally:
        connections.close()  # microseconds: no write is under way once the backend's users are gone


@hookimpl
def auth_backend() -> BackendSpec[AuthBackend]:
    """Offer ``token``."""
    return BackendSpec(name=NAME, config=TokenConfig, open=open_auth)
