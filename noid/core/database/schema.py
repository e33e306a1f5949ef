"""The database's tables, as the migrations that make them: only ever added to, for the databases there are."""

from __future__ import annotations

from sqlite_utils import Database, Migrations

migrations = Migrations("noid")


@migrations()
def first_schema(db: Database) -> None:
    """Users, VMs, checkpoints, operations, journal."""
    for statement in (
        """CREATE TABLE users (
            id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, created_at TEXT NOT NULL) STRICT""",
        """CREATE TABLE vms (
            id TEXT PRIMARY KEY, owner TEXT NOT NULL REFERENCES users(id), name TEXT NOT NULL, state TEXT NOT NULL,
            generation INTEGER NOT NULL, cpus INTEGER NOT NULL, mem_mib INTEGER NOT NULL, image TEXT NOT NULL,
            instance TEXT NOT NULL UNIQUE, network TEXT NOT NULL, lease TEXT, process TEXT, origin TEXT, receipt TEXT,
            created_at TEXT NOT NULL, UNIQUE (owner, name)) STRICT""",
        """CREATE TABLE checkpoints (
            id TEXT NOT NULL, owner TEXT NOT NULL REFERENCES users(id), vm_id TEXT NOT NULL, vm_name TEXT NOT NULL,
            label TEXT, cpus INTEGER NOT NULL, mem_mib INTEGER NOT NULL, image TEXT NOT NULL, parent TEXT,
            created_at TEXT NOT NULL, PRIMARY KEY (owner, id)) STRICT""",
        """CREATE TABLE operations (
            id TEXT PRIMARY KEY, kind TEXT NOT NULL, owner TEXT NOT NULL, vm_name TEXT NOT NULL, facts TEXT NOT NULL,
            outcome TEXT, error TEXT, started_at TEXT NOT NULL, ended_at TEXT) STRICT""",
        "CREATE INDEX operations_open ON operations(id) WHERE outcome IS NULL",
        """CREATE TABLE journal (
            seq INTEGER PRIMARY KEY AUTOINCREMENT, operation TEXT NOT NULL REFERENCES operations(id),
            step TEXT NOT NULL, event TEXT NOT NULL, at TEXT NOT NULL) STRICT""",
        "CREATE INDEX journal_operation ON journal(operation, seq)",
    ):
        db.execute(statement)


@migrations()
def how_machines_ended(db: Database) -> None:
    """Why a VM is stopped or dead."""
    db.execute("ALTER TABLE vms ADD COLUMN ended TEXT")


@migrations()
def audit_and_quotas(db: Database) -> None:
    """Who did what, which nobody can rewrite; what single users may have."""
    for statement in (
        """CREATE TABLE audit (
            seq INTEGER PRIMARY KEY AUTOINCREMENT, at TEXT NOT NULL, user TEXT, user_id TEXT, token TEXT,
            address TEXT NOT NULL, request TEXT, action TEXT NOT NULL, target TEXT NOT NULL, status INTEGER,
            count INTEGER NOT NULL) STRICT""",
        """CREATE TRIGGER audit_stays BEFORE DELETE ON audit
            BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END""",
        """CREATE TRIGGER audit_is_fixed BEFORE UPDATE ON audit
            BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END""",
        """CREATE TABLE quotas (
            owner TEXT NOT NULL REFERENCES users(id) ON DELETE CASCADE, resource TEXT NOT NULL, most INTEGER,
            PRIMARY KEY (owner, resource)) STRICT, WITHOUT ROWID""",
    ):
        db.execute(statement)


@migrations()
def operations_as_objects(db: Database) -> None:
    """What an operation came to, for whoever asks later."""
    for statement in (
        "ALTER TABLE operations ADD COLUMN timings TEXT",
        "ALTER TABLE operations ADD COLUMN result TEXT",
        "ALTER TABLE operations ADD COLUMN code TEXT",
        "ALTER TABLE operations ADD COLUMN status INTEGER",
        "CREATE INDEX operations_of_owner ON operations(owner, id)",
    ):
        db.execute(statement)


@migrations()
def idempotency_keys(db: Database) -> None:
    """The keys that calls are repeated with, and what these came to."""
    db.execute(
        """CREATE TABLE idempotency (
            owner TEXT NOT NULL REFERENCES users(id) ON DELETE CASCADE, key TEXT NOT NULL, request TEXT NOT NULL,
            operation TEXT, status INTEGER, body BLOB, at TEXT NOT NULL,
            PRIMARY KEY (owner, key)) STRICT, WITHOUT ROWID"""
    )
    db.execute("CREATE INDEX idempotency_at ON idempotency(at)")


@migrations()
def labels(db: Database) -> None:
    """What owners tell their VMs and checkpoints apart by."""
    for table in ("vms", "checkpoints"):
        db.execute(f"ALTER TABLE {table} ADD COLUMN labels TEXT NOT NULL DEFAULT '{{}}'")
