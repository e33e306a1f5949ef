"""The store: users, VMs, checkpoints, operations and their journal in one SQLite file. The only module with SQL.

Two connections. Reads go straight to a read-only one on the event loop (a row by key takes microseconds); a write is a
plain function that runs as one ``BEGIN IMMEDIATE`` transaction on the other connection, in a thread, one at a time, so
that another process holding the write lock (an admin command) never stalls the loop. WAL, ``synchronous=NORMAL``: a
``kill -9`` loses nothing; a power cut may lose the last commits, which start-up repairs from what is on disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import trio
from sqlite_utils import Database

from noid.core.database.listing import ALL, Wanted
from noid.core.database.rereading import Rereader
from noid.core.database.reserve import Reserve
from noid.core.database.rows import checkpoint_of, encode, text_of, user_of, vm_of, vm_row
from noid.core.database.schema import migrations
from noid.core.model.storage import Checkpoint
from noid.core.model.times import now
from noid.core.model.users import User
from noid.core.model.vms import Vm, VmState
from noid.core.vms.states import may_follow
from noid.errors import BackendError, Conflict, Damaged, DependencyDown, NoidError, NoSpace, NotFound
from noid.hostfs import os_errors

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LOCK_SECS = 5
#: What SQLite says about a file that is not what it wrote; `SQLITE_ERROR` is a table that should be there and is not.
_DAMAGE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT, sqlite3.SQLITE_ERROR})


class Tx:
    """What a write may do. Lives only inside the function given to `Store.write`."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.changed: set[str] = set()
        """The ids of the VMs whose rows this write makes, changes or removes."""

    def execute(self, sql: str, *arguments: object) -> sqlite3.Cursor:
        """Run one statement. For this module and those with tables of their own: `audit`, `keys` and so on."""
        return self._connection.execute(sql, arguments)

    def insert_user(self, name: str, user_id: str, created_at: datetime | None = None) -> User:
        """Add a user.

        Raises:
            Conflict: the name is taken.
        """
        user = User(id=user_id, name=name, created_at=created_at or now())
        try:
            self.execute("INSERT INTO users VALUES (?, ?, ?)", user.id, user.name, text_of(user.created_at))
        except sqlite3.IntegrityError as error:
            raise Conflict(f"user {name!r} already exists") from error
        return user

    def insert_vm(self, vm: Vm) -> None:
        """Add a VM.

        Raises:
            Conflict: its owner has a VM of that name.
        """
        row = vm_row(vm)
        marks = ", ".join("?" * len(row))
        try:
            self.changed.add(vm.id)
            self.execute(f"INSERT INTO vms ({', '.join(row)}) VALUES ({marks})", *row.values())  # noqa: S608  # own names
        except sqlite3.IntegrityError as error:
            raise _taken(error, vm.name) from error

    def update_vm(self, vm: Vm, **changes: Any) -> None:
        """Change columns of *vm*'s row if it still is the row that was read (same generation), and bump that.

        Raises:
            Conflict: the row has changed or gone since, the new state may not follow the old one, or the new name is
                taken.
        """
        self.changed.add(vm.id)
        state = changes.get("state")
        if state is not None and not may_follow(vm.state, state):
            raise Conflict(f"VM {vm.name!r} cannot become {state}: it is {vm.state}.")
        columns = {name: encode(value) for name, value in changes.items()}
        assignments = ", ".join(f"{name} = ?" for name in columns)
        sql = f"UPDATE vms SET {assignments}, generation = generation + 1 WHERE id = ? AND generation = ?"  # noqa: S608  # own names
        try:
            done = self.execute(sql, *columns.values(), vm.id, vm.generation)
        except sqlite3.IntegrityError as error:
            raise _taken(error, changes.get("name")) from error
        if done.rowcount != 1:
            raise Conflict(f"VM {vm.name!r} changed at the same time. Look at it again and repeat.")

    def find(self, vm_id: str) -> Vm | None:
        """Return the VM's row as it is now, or None."""
        cursor = self._connection.cursor()
        cursor.row_factory = sqlite3.Row
        row = cursor.execute("SELECT * FROM vms WHERE id = ?", (vm_id,)).fetchone()
        return None if row is None else vm_of(row)

    def current(self, vm_id: str) -> Vm:
        """Return the VM's row as it is now, for a change that does not depend on what was read before.

        Raises:
            Conflict: the row has gone.
        """
        vm = self.find(vm_id)
        if vm is None:
            raise Conflict("the VM is gone: it was destroyed at the same time.")
        return vm

    def replace_vm(self, vm: Vm) -> None:
        """Make *vm*'s row, or what there is of that id, what *vm* says: for rows found again on disk."""
        self.delete_vm(vm.id)
        self.insert_vm(vm)

    def delete_vm(self, vm_id: str) -> None:
        """Remove a VM's row. Checkpoints stay: they belong to their owner."""
        self.changed.add(vm_id)
        self.execute("DELETE FROM vms WHERE id = ?", vm_id)

    def insert_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Add a checkpoint; adding the same one again does nothing."""
        row = {name: encode(value) for name, value in asdict(checkpoint).items()}
        marks = ", ".join("?" * len(row))
        sql = f"INSERT OR IGNORE INTO checkpoints ({', '.join(row)}) VALUES ({marks})"  # noqa: S608  # own names
        self.execute(sql, *row.values())

    def update_checkpoint(self, owner: str, checkpoint_id: str, **changes: Any) -> Checkpoint:
        """Change columns of a checkpoint's row and return it as it is then, or raise `NotFound`."""
        assignments = ", ".join(f"{name} = ?" for name in changes)
        cursor = self._connection.cursor()
        cursor.row_factory = sqlite3.Row
        row = cursor.execute(
            f"UPDATE checkpoints SET {assignments} WHERE owner = ? AND id = ? RETURNING *",  # noqa: S608  # own names
            (*map(encode, changes.values()), owner, checkpoint_id),
        ).fetchone()
        if row is None:
            raise NotFound(f"checkpoint {checkpoint_id!r} not found")
        return checkpoint_of(row)

    def rename_checkpoints(self, owner: str, vm_id: str, vm_name: str) -> None:
        """Let the checkpoints of a VM follow its new name."""
        self.execute("UPDATE checkpoints SET vm_name = ? WHERE owner = ? AND vm_id = ?", vm_name, owner, vm_id)

    def delete_checkpoint(self, owner: str, checkpoint_id: str) -> None:
        """Remove a checkpoint's row, or raise `NotFound`."""
        if not self.execute("DELETE FROM checkpoints WHERE owner = ? AND id = ?", owner, checkpoint_id).rowcount:
            raise NotFound(f"checkpoint {checkpoint_id!r} not found")

    def operation_from(self, owner: str, checkpoint_id: str) -> str | None:
        """Return the kind of an operation under way that makes a machine from a checkpoint, or None."""
        sql = """SELECT kind FROM operations
            WHERE outcome IS NULL AND owner = ? AND json_extract(facts, '$.origin') = ?"""
        row = self.execute(sql, owner, checkpoint_id).fetchone()
        return None if row is None else str(row[0])

    def open_operation(self, operation: str, kind: str, owner: str, vm_name: str, facts: dict[str, Any]) -> None:
        """Begin an operation's page in the journal."""
        sql = "INSERT INTO operations (id, kind, owner, vm_name, facts, started_at) VALUES (?, ?, ?, ?, ?, ?)"
        self.execute(sql, operation, kind, owner, vm_name, json.dumps(facts), text_of(now()))

    def note(self, operation: str, step: str, event: str) -> None:
        """Append to an operation's page."""
        sql = "INSERT INTO journal (operation, step, event, at) VALUES (?, ?, ?, ?)"
        self.execute(sql, operation, step, event, text_of(now()))

    def set_facts(self, operation: str, facts: dict[str, Any]) -> None:
        """Make *facts* the operation's."""
        self.execute("UPDATE operations SET facts = ? WHERE id = ?", json.dumps(facts), operation)

    def fail_operation(self, operation: str, error: NoidError, timings: Mapping[str, float]) -> None:
        """Say why an operation failed, unless that is known already. Its page stays open until all is undone."""
        sql = "UPDATE operations SET error = ?, code = ?, status = ?, timings = ? WHERE id = ? AND code IS NULL"
        self.execute(sql, str(error), error.code, error.status, json.dumps(timings), operation)

    def finish_operation(self, operation: str, result: Mapping[str, Any] | None, timings: Mapping[str, float]) -> None:
        """End the page of an operation that has happened, with what it came to."""
        sql = "UPDATE operations SET outcome = 'finished', result = ?, timings = ?, ended_at = ? WHERE id = ?"
        kept = None if result is None else json.dumps(result)
        self.execute(sql, kept, json.dumps(timings), text_of(now()), operation)

    def close_unwound(self, operation: str) -> None:
        """End the page of an operation that was undone: ``unwound`` if it failed, else ``interrupted``."""
        sql = """UPDATE operations SET outcome = iif(code IS NULL, 'interrupted', 'unwound'), ended_at = ?
            WHERE id = ?"""
        self.execute(sql, text_of(now()), operation)

    def forget_operations(self, ended_before: datetime) -> None:
        """Remove what ended before that time, with its journal: both are for recovery and for looking back a while."""
        old = "SELECT id FROM operations WHERE ended_at < ?"
        self.execute(f"DELETE FROM journal WHERE operation IN ({old})", text_of(ended_before))  # noqa: S608  # own text
        self.execute("DELETE FROM operations WHERE ended_at < ?", text_of(ended_before))


class Store:
    """The agent's database. Open it with `open_store`."""

    def __init__(self, reader: sqlite3.Connection, writer: sqlite3.Connection, reserve: Reserve) -> None:
        self._reserve = reserve
        self._reader = reader
        self._rereader = Rereader(reader)
        self._writer = writer
        self._one_writer = trio.CapacityLimiter(1)
        self._changes: dict[str, trio.Event] = {}

    async def write(self, change: Callable[[Tx], T], *, needs_room: bool = False) -> T:
        """Run *change* as one transaction and return its result. It is not interrupted by a cancellation.

        With *needs_room* it is refused while the disk has no more than what is reserved for the database: for what
        begins something that takes room. See `noid.core.database.reserve`.

        Raises:
            NoSpace: the disk is full; nothing was changed.
            Damaged: SQLite says so.
        """
        tx = Tx(self._writer)
        result = await trio.to_thread.run_sync(self._write, tx, change, needs_room, limiter=self._one_writer)
        for vm_id in tx.changed & self._changes.keys():
            self._changes.pop(vm_id).set()
        return result

    def write_now(self, change: Callable[[Tx], T]) -> T:
        """Run *change* as `write` does, blocking: for commands without an event loop."""
        return self._write(Tx(self._writer), change)

    async def has_room(self) -> bool:
        """Return whether a write that needs room would pass: for what others write into the database, and can wait."""
        return await trio.to_thread.run_sync(self._reserve.has_room)

    def _write(self, tx: Tx, change: Callable[[Tx], T], needs_room: bool = False) -> T:  # passed on
        if needs_room:
            self._reserve.require_room()
        with _sqlite_errors(), _transaction(self._writer):
            return change(tx)

    async def vm_changed(self, vm_id: str) -> None:
        """Return once the VM's row is changed or removed by a `write`. What is read before, without waiting, is old."""
        await self._changes.setdefault(vm_id, trio.Event()).wait()

    def user(self, user_id: str) -> User:
        """Return a user by id, or raise `NotFound`."""
        return self._one(user_of, "user", "SELECT * FROM users WHERE id = ?", user_id)

    def user_named(self, name: str) -> User:
        """Return a user by name, or raise `NotFound`."""
        return self._one(user_of, f"user {name!r}", "SELECT * FROM users WHERE name = ?", name)

    def users(self) -> list[User]:
        """Return all users, oldest first."""
        return self._records(user_of, "SELECT * FROM users ORDER BY created_at, id")

    def vm(self, owner: str, name: str) -> Vm:
        """Return *owner*'s VM *name*, or raise `NotFound`."""
        return self._one(vm_of, f"VM {name!r}", "SELECT * FROM vms WHERE owner = ? AND name = ?", owner, name)

    def vms(self, owner: str, wanted: Wanted = ALL) -> list[Vm]:
        """Return those of *owner*'s VMs that are *wanted*, oldest first."""
        return self._selected(vm_of, "vms", owner, wanted)

    def all_vms(self) -> list[Vm]:
        """Return everybody's VMs: for start-up and the supervisor."""
        return self._records(vm_of, "SELECT * FROM vms ORDER BY created_at, id")

    def vms_by_state(self) -> dict[VmState, int]:
        """Return how many VMs everybody has in each state there is a VM in."""
        return {
            VmState(row["state"]): row["n"] for row in self._read("SELECT state, count(*) AS n FROM vms GROUP BY 1")
        }

    def checkpoint(self, owner: str, checkpoint_id: str) -> Checkpoint:
        """Return *owner*'s checkpoint, or raise `NotFound`."""
        what = f"checkpoint {checkpoint_id!r}"
        return self._one(
            checkpoint_of, what, "SELECT * FROM checkpoints WHERE owner = ? AND id = ?", owner, checkpoint_id
        )

    def checkpoints(self, owner: str, wanted: Wanted = ALL) -> list[Checkpoint]:
        """Return those of *owner*'s checkpoints that are *wanted*, oldest first."""
        return self._selected(checkpoint_of, "checkpoints", owner, wanted)

    def _selected(self, make: Callable[[sqlite3.Row], T], table: str, owner: str, wanted: Wanted) -> list[T]:
        conditions: list[str] = ["owner = ?"]
        arguments: list[object] = [owner]
        for key, value in wanted.labels:
            with_value = "" if value is None else " AND value = ?"
            conditions.append(f"EXISTS (SELECT 1 FROM json_each(labels) WHERE key = ?{with_value})")  # noqa: S608  # own text
            arguments += [key] if value is None else [key, value]
        if wanted.states:
            conditions.append(f"state IN ({', '.join('?' * len(wanted.states))})")
            arguments += [state.value for state in wanted.states]
        if wanted.vm_name is not None:
            conditions.append("vm_name = ?")
            arguments.append(wanted.vm_name)
        if wanted.after is not None:
            conditions.append("(created_at, id) > (?, ?)")
            arguments += wanted.after
        sql = f"SELECT * FROM {table} WHERE {' AND '.join(conditions)} ORDER BY created_at, id LIMIT ?"  # noqa: S608  # own text
        return self._records(make, sql, *arguments, -1 if wanted.limit is None else wanted.limit)

    def open_operations(self) -> list[dict[str, Any]]:
        """Return the operations that have no outcome, with their journal events, oldest first."""
        operations = []
        for row in self._read("SELECT * FROM operations WHERE outcome IS NULL ORDER BY id"):
            events = self._read("SELECT step, event FROM journal WHERE operation = ? ORDER BY seq", row["id"])
            operations.append({**dict(row), "events": [(e["step"], e["event"]) for e in events]})
        return operations

    def knows_instance(self, instance: str) -> bool:
        """Return whether an operation of this database ever made or replaced the machine *instance*."""
        made = ", ".join(f"json_extract(facts, '$.{fact}')" for fact in ("instance", "old_instance"))
        return bool(self._read(f"SELECT 1 FROM operations WHERE ? IN ({made}) LIMIT 1", instance))  # noqa: S608  # own text

    def close(self) -> None:
        """Close both connections."""
        self._reader.close()
        self._writer.close()

    def rows(self, sql: str, *arguments: object) -> list[Any]:
        """Return what a question comes to, for the modules that may use `Tx.execute`."""
        return self._read(sql, *arguments)

    def _read(self, sql: str, *arguments: object) -> list[sqlite3.Row]:
        with _sqlite_errors():
            return self._reader.execute(sql, arguments).fetchall()

    def _records(self, make: Callable[[sqlite3.Row], T], sql: str, *arguments: object) -> list[T]:
        with _sqlite_errors():
            return list(self._rereader.records(make, sql, arguments))

    def _one(self, make: Callable[[sqlite3.Row], T], what: str, sql: str, *arguments: object) -> T:
        found = self._records(make, sql, *arguments)
        if not found:
            raise NotFound(f"{what} not found")
        return found[0]


@contextlib.contextmanager
def open_store(path: Path) -> Iterator[Store]:
    """Open the database at *path*, bringing its schema up to date.

    Several processes may open it; migrations wait for each other on a lock file beside it.

    Raises:
        Damaged: not a database, a broken one, or one written by a newer noid.
        NoSpace: the disk is full.
    """
    with contextlib.ExitStack() as stack:
        with os_errors(f"opening the database {path}"), _sqlite_errors(path), contextlib.ExitStack() as opening:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = opening.enter_context(path.with_suffix(".lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)  # switching to WAL and migrating do not wait for each other by themselves
            writer = sqlite3.connect(path, check_same_thread=False, timeout=_LOCK_SECS, isolation_level=None)
            stack.callback(writer.close)
            path.chmod(0o600)
            _check(writer)
            for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
                writer.execute(f"PRAGMA {pragma}")
            _migrate(writer, path)
            reader = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=1, isolation_level=None)
            stack.callback(reader.close)
            reader.execute("PRAGMA query_only=1")
            reader.row_factory = sqlite3.Row
            reserve = Reserve(path)
            if not reserve.take():
                logger.warning("no room is reserved for the database %s; see 'the disk is full' in the manual", path)
        stack.pop_all()
        store = Store(reader, writer, reserve)
    try:
        yield store
    finally:
        store.close()


def _check(connection: sqlite3.Connection) -> None:
    """Look at the whole file before anything is written to it.

    Raises:
        sqlite3.DatabaseError: something in it is not as SQLite writes it.
    """
    found = [str(row[0]) for row in connection.execute("PRAGMA quick_check(3)")]
    if found != ["ok"]:
        raise sqlite3.DatabaseError("; ".join(found) or "quick_check says nothing")


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Apply what is missing; refuse a schema from the future."""
    database = Database(connection)
    known = {migration.name for migration in migrations.pending(Database(memory=True))}
    newer = sorted({migration.name for migration in migrations.applied(database)} - known)
    if newer:
        raise Damaged(f"{path} was written by a newer noid (it has {', '.join(newer)}). Upgrade noid.")
    migrations.apply(database)


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # SQLite itself rolls back after some errors, such as a full disk
            connection.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def _sqlite_errors(path: Path | None = None) -> Iterator[None]:
    """Turn SQLite's errors into ours; `IntegrityError` is the caller's to understand."""
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
        raise  # the latter is a bug of ours
    except sqlite3.DatabaseError as error:
        where = f"the database {path}" if path else "the noid database"
        extended = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
        primary = extended & 0xFF
        if primary == sqlite3.SQLITE_FULL or extended == sqlite3.SQLITE_IOERR_SHMSIZE:  # of the log's index
            raise NoSpace(f"the disk of {where} is full; nothing was changed. Free space and try again.") from error
        if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise DependencyDown(
                f"{where} has been held by another process for {_LOCK_SECS} s; nothing was changed. Try again."
            ) from error
        if primary in _DAMAGE:
            raise Damaged(
                f"{where} is damaged ({error}); it was not changed. VMs and checkpoints are still on disk: move the "
                "file away (with its -wal) and restart, and noid takes over what it finds; or bring back a copy."
            ) from error
        raise BackendError(
            f"cannot use {where}: {error}; nothing was changed. Look at the disk and at the file's permissions."
        ) from error


def _taken(error: sqlite3.IntegrityError, name: str | None) -> Exception:
    """Return what *error* means, if that is that a VM of that name exists."""
    return Conflict(f"VM {name!r} already exists") if "vms.owner" in str(error) else error
