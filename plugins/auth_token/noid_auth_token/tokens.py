"""The table of token hashes: ``auth_token_tokens`` in the agent's database, on connections of its own.

A token is ``noid_tok_`` and 64 hex digits, 256 random bits: nothing to guess, so a plain SHA-256 of it is enough and no
slow password hash is needed. Another process (``noid-server token``) may add and remove tokens at any time; each
authentication reads the table anew. When a token was used last is kept in memory and written down from time to time:
a request waits for no disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import secrets
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import trio
from sqlite_utils import Database, Migrations

from noid.core.model.times import now
from noid.core.model.users import DEFAULT_TOKEN, TOKEN_SCOPES, Credentials, Grant, Scope, TokenInfo, User
from noid.errors import Conflict, Damaged, DependencyDown, NoSpace, NotFound, Unauthenticated
from noid.hostfs import os_errors

NAME = "token"
PREFIX = "noid_tok_"
SECRET_BYTES = 32
_TOKEN_LENGTH = len(PREFIX) + 2 * SECRET_BYTES

# A read waits this long for another process' schema change or recovery, a write for another process' write.
_READ_WAIT_SECS = 1
_WRITE_WAIT_SECS = 5

migrations = Migrations("auth_token")


@migrations()
def first_schema(db: Database) -> None:
    """Tokens by hash. No foreign key: the table of users is the core's own business."""
    db.execute(
        """CREATE TABLE auth_token_tokens (
            hash TEXT PRIMARY KEY, user_id TEXT NOT NULL, created_at TEXT NOT NULL) STRICT, WITHOUT ROWID"""
    )
    db.execute("CREATE INDEX auth_token_tokens_user ON auth_token_tokens(user_id)")


@migrations()
def named_tokens(db: Database) -> None:
    """Names, scopes and ends. A token of before is called ``default``, or ``default-2`` and so on, and allows all."""
    db.execute("ALTER TABLE auth_token_tokens RENAME TO auth_token_old")
    db.execute("DROP INDEX auth_token_tokens_user")
    db.execute(
        """CREATE TABLE auth_token_tokens (
            hash TEXT PRIMARY KEY, user_id TEXT NOT NULL, name TEXT NOT NULL, scopes TEXT NOT NULL,
            created_at TEXT NOT NULL, expires_at TEXT, last_used_at TEXT,
            UNIQUE (user_id, name)) STRICT, WITHOUT ROWID"""
    )
    db.execute(
        """INSERT INTO auth_token_tokens
            SELECT hash, user_id, 'default' || CASE nth WHEN 1 THEN '' ELSE '-' || nth END, 'read exec manage',
                created_at, NULL, NULL
            FROM (SELECT *, row_number() OVER (PARTITION BY user_id ORDER BY created_at DESC, hash) AS nth
                FROM auth_token_old)"""
    )
    db.execute("DROP TABLE auth_token_old")


@dataclass(frozen=True, slots=True, kw_only=True)
class Connections:
    """*reader* belongs to the event loop, *writer* to one worker thread at a time."""

    reader: sqlite3.Connection
    writer: sqlite3.Connection

    def close(self) -> None:
        """Close both."""
        self.reader.close()
        self.writer.close()


class TokenAuth:
    """Fulfils `noid.core.backends.AuthBackend`."""

    name = NAME

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._writes = trio.CapacityLimiter(1)
        self._used: dict[str, datetime] = {}

    def authenticate(self, credentials: Credentials) -> Grant | None:
        """Return what this token grants, or None. One indexed read.

        What the index compares are hashes, of which an attacker cannot choose a prefix, so the time it takes tells
        nothing about any token.

        Raises:
            DependencyDown: another process holds the database.
            Damaged: the database cannot be read.
        """
        token = credentials.token
        if token is None or len(token) != _TOKEN_LENGTH or not token.startswith(PREFIX):
            return None
        shown = hash_of(token)
        with _sqlite_errors():
            row = self._connections.reader.execute(
                "SELECT hash, user_id, name, scopes, expires_at FROM auth_token_tokens WHERE hash = ?", (shown,)
            ).fetchone()
        if row is None or not hmac.compare_digest(row[0], shown):
            return None
        at, expires_at = now(), _moment(row[4])
        if expires_at is not None and expires_at <= at:
            return None
        self._used[shown] = at
        return Grant(user_id=row[1], token_name=row[2], scopes=_scopes(row[3]), expires_at=expires_at)

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
        """Return a new token of *user*, the only copy there will ever be. Others stay valid.

        Raises:
            Conflict: *user* has a valid token of that name, or *most* tokens.
            Unauthenticated: the token *shown* is no valid one of *user* any more.
        """
        token = PREFIX + secrets.token_hex(SECRET_BYTES)
        allowed = " ".join(scope.value for scope in Scope if scope in scopes)
        created_at = now()
        row = (hash_of(token), user.id, name, allowed, _text(created_at), expires_at and _text(expires_at), None)

        def insert(db: sqlite3.Connection) -> None:
            valid = "SELECT 1 FROM auth_token_tokens WHERE hash = ? AND user_id = ? AND coalesce(expires_at > ?, true)"
            if shown is not None and not db.execute(valid, (hash_of(shown), user.id, _text(created_at))).fetchone():
                raise Unauthenticated("invalid token")
            expired = "DELETE FROM auth_token_tokens WHERE user_id = ? AND name = ? AND expires_at <= ?"
            db.execute(expired, (user.id, name, _text(created_at)))
            (count,) = db.execute("SELECT count(*) FROM auth_token_tokens WHERE user_id = ?", (user.id,)).fetchone()
            if most is not None and count >= most:
                raise Conflict(f"user {user.name!r} has {count} tokens, and {most} is the most. Revoke one first.")
            try:
                db.execute("INSERT INTO auth_token_tokens VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            except sqlite3.IntegrityError as error:
                raise Conflict(
                    f"user {user.name!r} has a token {name!r} already. Revoke that first, or choose another name."
                ) from error

        await self._write(insert)
        return token

    async def tokens(self, user: User) -> list[TokenInfo]:
        """Return *user*'s tokens, oldest first, expired ones too."""
        with _sqlite_errors():
            rows = self._connections.reader.execute(
                "SELECT hash, name, scopes, created_at, expires_at, last_used_at FROM auth_token_tokens "
                "WHERE user_id = ? ORDER BY created_at, name",
                (user.id,),
            ).fetchall()
        return [
            TokenInfo(
                name=row[1],
                scopes=_scopes(row[2]),
                created_at=datetime.fromisoformat(row[3]),
                expires_at=_moment(row[4]),
                last_used_at=self._used.get(row[0]) or _moment(row[5]),
            )
            for row in rows
        ]

    async def revoke_token(self, user: User, name: str) -> None:
        """Make *user*'s token *name* invalid, from the next request on.

        Raises:
            NotFound: there is none.
        """

        def delete(db: sqlite3.Connection) -> None:
            sql = "DELETE FROM auth_token_tokens WHERE user_id = ? AND name = ?"
            if db.execute(sql, (user.id, name)).rowcount == 0:
                raise NotFound(f"token {name!r} not found")

        await self._write(delete)

    async def revoke_tokens(self, user: User) -> None:
        """Make every token of *user* invalid, from the next request on. Repeating it does nothing."""
        await self._write(lambda db: db.execute("DELETE FROM auth_token_tokens WHERE user_id = ?", (user.id,)))

    async def save_uses(self) -> None:
        """Write down when the tokens that were used since the last call were used last."""
        used, self._used = self._used, {}
        rows = [(_text(at), shown) for shown, at in used.items()]
        if not rows:
            return
        sql = "UPDATE auth_token_tokens SET last_used_at = ? WHERE hash = ?"
        try:
            await self._write(lambda db: db.executemany(sql, rows))
        except BaseException:
            self._used = used | self._used  # for the next time
            raise

    async def _write(self, change: Callable[[sqlite3.Connection], object]) -> None:
        """Run *change* as one transaction. It is complete or has not happened, cancelled or not."""

        def transact() -> None:
            writer = self._connections.writer
            with _sqlite_errors():
                writer.execute("BEGIN IMMEDIATE")
                try:
                    change(writer)
                    writer.execute("COMMIT")
                except BaseException:
                    if writer.in_transaction:  # SQLite has rolled back by itself when the disk was full
                        writer.execute("ROLLBACK")
                    raise

        await trio.to_thread.run_sync(transact, limiter=self._writes)


def _scopes(text: str) -> frozenset[Scope]:
    return frozenset(Scope(word) for word in text.split())


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="microseconds")


def _moment(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def hash_of(token: str) -> str:
    """Return what is kept of *token*: the SHA-256 of all of it, in hex."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def open_tokens(database: Path) -> Connections:
    """Connect to *database*, made if absent, and bring the table up to date. Blocks.

    Raises:
        Damaged: it cannot be used, or a newer version of this plugin wrote to it.
        NoSpace: the disk is full.
        BackendError: the file or its directory is not to be used; the system's own words.
    """
    with contextlib.ExitStack() as stack, os_errors(f"opening the token database {database}"), _sqlite_errors():
        writer = sqlite3.connect(database, check_same_thread=False, timeout=_WRITE_WAIT_SECS, isolation_level=None)
        stack.callback(writer.close)
        database.chmod(0o600)
        writer.execute("PRAGMA journal_mode=WAL")
        writer.execute("PRAGMA synchronous=FULL")  # a token that was shown, or revoked, stays so after a power cut
        with database.with_suffix(".lock").open("w") as lock:  # sqlite-utils lists what is pending without a lock
            fcntl.flock(lock, fcntl.LOCK_EX)
            _migrate(writer, database)
        reader = sqlite3.connect(
            f"{database.absolute().as_uri()}?mode=ro",
            uri=True,
            check_same_thread=False,
            timeout=_READ_WAIT_SECS,
            isolation_level=None,
        )
        stack.callback(reader.close)
        reader.execute("PRAGMA query_only=1")
        stack.pop_all()
    return Connections(reader=reader, writer=writer)


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    db = Database(connection)
    known = {migration.name for migration in migrations.pending(Database(memory=True))}
    newer = sorted({migration.name for migration in migrations.applied(db)} - known)
    if newer:
        raise Damaged(f"{path} was written by a newer plugin auth_token (it has {', '.join(newer)}). Upgrade noid.")
    migrations.apply(db)


@contextlib.contextmanager
def _sqlite_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        words = str(error)
        if "full" in words:
            raise NoSpace("the disk of the token database is full; nothing was changed. Free space there.") from error
        if "locked" in words or "busy" in words:
            raise DependencyDown("another process holds the token database; nothing was changed. Try again.") from error
        raise Damaged(f"cannot use the token database: {error}.") from error
    except sqlite3.DatabaseError as error:
        raise Damaged(f"the token database is damaged: {error}. Restore it, or move it away and add users.") from error
