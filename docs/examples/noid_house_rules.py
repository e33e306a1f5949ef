"""A plugin: limits on VMs, a kernel argument, a word in the log, a command, and tokens that live in a file."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import trio

from noid.core.backends import AgentContext, AuthBackend, BackendSpec, Event
from noid.core.model.times import now
from noid.core.model.users import DEFAULT_TOKEN, TOKEN_SCOPES, Credentials, Grant, Scope, TokenInfo, User
from noid.core.model.vms import NetLease, VmSpec
from noid.errors import Conflict, Damaged, InvalidRequest, NotFound, Unauthenticated
from noid.hookspecs import hookimpl
from noid.hostfs import os_errors

CPUS_MAX = 4
Kept = dict[str, dict[str, Any]]
logger = logging.getLogger(__name__)


@hookimpl
def validate_vm(spec: VmSpec, owner: User) -> None:
    """Keep VMs small. Pure and fast: it is asked before anything is made."""
    if spec.cpus > CPUS_MAX:
        raise InvalidRequest(f"{owner.name} asked for {spec.cpus} CPUs; a VM may have {CPUS_MAX} here.")


@hookimpl
def boot_args(spec: VmSpec, lease: NetLease | None) -> list[str]:
    """Make small guests boot in silence. Part of the template's fingerprint, so a change makes new templates."""
    return ["quiet"] if spec.mem_mib <= 256 else []


@hookimpl
def on_event(event: Event) -> None:
    """Hear of what has happened. It must not block: what takes time belongs in a thread of the plugin's own."""
    if event.kind.startswith("vm."):
        logger.info("%s of %s", event.kind, event.vm)


@hookimpl
def register_server_commands(cli: click.Group) -> None:
    """Add ``noid-server house-rules``."""

    @cli.command("house-rules")
    def house_rules() -> None:
        """Show the limits of this house."""
        click.echo(f"CPUs of a VM: at most {CPUS_MAX}")


# --- a backend: a name, a record of settings, a context manager ------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FileAuthConfig:
    """``[plugins.auth_file]``. *file* is where tokens are; default: in the data directory."""

    file: Path | None = None


class FileAuth:
    """Fulfils `noid.core.backends.AuthBackend` with a JSON file of token hashes, read anew each time.

    ``noid-server token`` is another process than the agent: what it writes must count at once.
    """

    name = "file"

    def __init__(self, file: Path) -> None:
        self._file = file

    def authenticate(self, credentials: Credentials) -> Grant | None:
        """Return what this token grants. Looked up by its hash, so the time it takes tells nothing about any token."""
        kept = self.kept().get(_hash(credentials.token or ""))
        if kept is None or _has_expired(kept):
            return None
        info = _info(kept)
        return Grant(user_id=kept["user"], token_name=info.name, scopes=info.scopes, expires_at=info.expires_at)

    async def create_token(
        self,
        user: User,
        *,
        name: str = DEFAULT_TOKEN,
        scopes: frozenset[Scope] = TOKEN_SCOPES,
        expires_at: datetime | None = None,
        shown: str | None = None,
        most: int | None = None,
    ) -> str:
        """Return a new token, the only copy there will ever be; to who has *shown* one, only while that is valid."""
        token = secrets.token_hex(32)
        end = None if expires_at is None else expires_at.isoformat()
        new = {"user": user.id, "name": name, "scopes": sorted(scopes), "made": now().isoformat(), "end": end}

        def add(kept: Kept) -> Kept:
            parent = None if shown is None else kept.get(_hash(shown))
            if shown is not None and (parent is None or not _is(parent, user) or _has_expired(parent)):
                raise Unauthenticated("invalid token")
            others = {h: t for h, t in kept.items() if not (_is(t, user, name) and _has_expired(t))}
            if any(_is(other, user, name) for other in others.values()):
                raise Conflict(f"user {user.name!r} has a token {name!r} already.")
            if most is not None and sum(_is(other, user) for other in others.values()) >= most:
                raise Conflict(f"user {user.name!r} has {most} tokens, which is the most. Revoke one first.")
            return others | {_hash(token): new}

        await trio.to_thread.run_sync(self._change, add)
        return token

    async def tokens(self, user: User) -> list[TokenInfo]:
        """Return *user*'s tokens, oldest first."""
        return sorted((_info(t) for t in self.kept().values() if _is(t, user)), key=lambda info: info.created_at)

    async def revoke_token(self, user: User, name: str) -> None:
        """Forget one token."""
        if not any(_is(t, user, name) for t in self.kept().values()):
            raise NotFound(f"token {name!r} not found")
        await trio.to_thread.run_sync(self._change, lambda kept: _without(kept, user, name))

    async def revoke_tokens(self, user: User) -> None:
        """Forget every token of *user*."""
        await trio.to_thread.run_sync(self._change, lambda kept: _without(kept, user))

    async def save_uses(self) -> None:
        """Do nothing: when a token was used last is not kept here, and `TokenInfo.last_used_at` may be None."""

    def kept(self) -> Kept:
        """Return what is kept of each token, by its hash.

        Raises:
            Damaged: the file cannot be read.
        """
        try:
            kept: Kept = json.loads(self._file.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise Damaged(
                f"the tokens in {self._file} cannot be read: {error}. Until it is mended nobody can come in."
            ) from error
        return kept

    def _change(self, change: Callable[[Kept], Kept]) -> None:
        with os_errors("writing the tokens"), self._file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            new = self._file.with_suffix(".new")
            new.touch(mode=0o600)
            new.write_text(json.dumps(change(self.kept())))
            new.replace(self._file)


def _info(kept: dict[str, Any]) -> TokenInfo:
    return TokenInfo(
        name=kept["name"],
        scopes=frozenset(map(Scope, kept["scopes"])),
        created_at=datetime.fromisoformat(kept["made"]),
        expires_at=None if kept["end"] is None else datetime.fromisoformat(kept["end"]),
    )


def _is(kept: dict[str, Any], user: User, name: str | None = None) -> bool:
    return kept["user"] == user.id and name in (None, kept["name"])


def _has_expired(kept: dict[str, Any]) -> bool:
    end = _info(kept).expires_at
    return end is not None and end <= now()


def _without(kept: Kept, user: User, name: str | None = None) -> Kept:
    return {token: facts for token, facts in kept.items() if not _is(facts, user, name)}


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


@contextlib.asynccontextmanager
async def open_auth(config: FileAuthConfig, context: AgentContext) -> AsyncIterator[AuthBackend]:
    """Live as long as the agent. What is opened before the ``yield`` is closed after it, whatever happens."""
    auth = FileAuth(config.file or context.data_dir / "tokens.json")
    await trio.to_thread.run_sync(auth.kept)  # a file that cannot be read is said at the start
    yield auth


@hookimpl
def auth_backend() -> BackendSpec[AuthBackend]:
    """Offer ``file``: ``[backends] auth = "file"`` selects it."""
    return BackendSpec(name="file", config=FileAuthConfig, open=open_auth)
