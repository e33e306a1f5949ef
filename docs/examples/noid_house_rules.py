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
from pathlib import Path

import click
import trio

from noid.core.backends import AgentContext, AuthBackend, BackendSpec, Event
from noid.core.model import Credentials, NetLease, User, VmSpec
from noid.errors import Damaged, InvalidRequest
from noid.hookspecs import hookimpl
from noid.hostfs import os_errors

CPUS_MAX = 4
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

    ``noid-server add-user`` is another process than the agent: what it writes must count at once.
    """

    name = "file"

    def __init__(self, file: Path) -> None:
        self._file = file

    def authenticate(self, credentials: Credentials) -> str | None:
        """Return whose token this is. Looked up by its hash, so the time it takes tells nothing about any token."""
        return self.users().get(_hash(credentials.token or ""))

    async def create_token(self, user: User) -> str:
        """Return a new token, the only copy there will ever be."""
        token = secrets.token_hex(32)
        await trio.to_thread.run_sync(self._change, lambda users: users | {_hash(token): user.id})
        return token

    async def revoke_tokens(self, user: User) -> None:
        """Forget every token of *user*."""
        await trio.to_thread.run_sync(
            self._change, lambda users: {token: owner for token, owner in users.items() if owner != user.id}
        )

    def users(self) -> dict[str, str]:
        """Return user ids by the hashes of their tokens.

        Raises:
            Damaged: the file cannot be read.
        """
        try:
            users: dict[str, str] = json.loads(self._file.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise Damaged(
                f"the tokens in {self._file} cannot be read: {error}. Until it is mended nobody can come in."
            ) from error
        return users

    def _change(self, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
        with os_errors("writing the tokens"), self._file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            new = self._file.with_suffix(".new")
            new.touch(mode=0o600)
            new.write_text(json.dumps(change(self.users())))
            new.replace(self._file)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


@contextlib.asynccontextmanager
async def open_auth(config: FileAuthConfig, context: AgentContext) -> AsyncIterator[AuthBackend]:
    """Live as long as the agent. What is opened before the ``yield`` is closed after it, whatever happens."""
    auth = FileAuth(config.file or context.data_dir / "tokens.json")
    await trio.to_thread.run_sync(auth.users)  # a file that cannot be read is said at the start
    yield auth


@hookimpl
def auth_backend() -> BackendSpec[AuthBackend]:
    """Offer ``file``: ``[backends] auth = "file"`` selects it."""
    return BackendSpec(name="file", config=FileAuthConfig, open=open_auth)
