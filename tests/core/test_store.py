"""The store: schema, damage, full disks, several writers, and who sees what."""

from __future__ import annotations

import contextlib
import multiprocessing
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from noid.core.database.listing import Wanted
from noid.core.database.reserve import Reserve
from noid.core.database.store import Store, Tx, open_store
from noid.core.ids import new_id, new_instance
from noid.core.model.storage import Checkpoint
from noid.core.model.times import now
from noid.core.model.vms import NetLease, ProcessRef, Receipt, ReceiptItem, Vm, VmState
from noid.errors import BackendError, Conflict, Damaged, DependencyDown, NotFound


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "noid.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with open_store(path) as store:
        for name in ("me", "you"):
            store.write_now(lambda tx, name=name: tx.insert_user(name, name))
        yield store


def a_vm(owner: str = "me", name: str = "web", **fields: object) -> Vm:
    values: dict[str, object] = {
        "id": new_id(),
        "owner": owner,
        "name": name,
        "state": VmState.CREATING,
        "generation": 1,
        "cpus": 1,
        "mem_mib": 256,
        "image": "default",
        "instance": new_instance(),
        "created_at": now(),
    }
    return Vm(**values | fields)  # type: ignore[arg-type]  # values are as the record wants them


def a_checkpoint(owner: str = "me", vm_name: str = "web", checkpoint_id: str = "0123456789abcdef") -> Checkpoint:
    return Checkpoint(
        id=checkpoint_id, owner=owner, vm_id="v", vm_name=vm_name, label=None, cpus=1, mem_mib=256, image="default",
        parent=None, created_at=now(),
    )  # fmt: skip


# --- schema ----------------------------------------------------------------------------------------------------------


def test_opening_again_changes_nothing(path: Path) -> None:
    with open_store(path) as store:
        user = store.write_now(lambda tx: tx.insert_user("me", "id"))
        schema = store._read("SELECT sql FROM sqlite_master ORDER BY name")
    with open_store(path) as store:
        assert store.users() == [user]
        assert [tuple(row) for row in store._read("SELECT sql FROM sqlite_master ORDER BY name")] == [
            tuple(row) for row in schema
        ]


def test_the_file_is_the_owners_alone_and_in_wal_mode(path: Path, store: Store) -> None:
    assert path.stat().st_mode & 0o777 == 0o600
    assert store._read("PRAGMA journal_mode")[0][0] == "wal"


def test_every_table_is_strict(store: Store) -> None:
    with pytest.raises(sqlite3.IntegrityError, match="cannot store TEXT value in INTEGER column"):
        store.write_now(lambda tx: tx.execute("UPDATE vms SET cpus = 'two'") if tx.insert_vm(a_vm()) is None else None)


def test_a_schema_of_a_newer_noid_is_refused_and_left_alone(path: Path) -> None:
    with open_store(path) as store:
        store.write_now(
            lambda tx: tx.execute(
                "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('noid', 'flux', 'tomorrow')"
            )
        )
    before = path.read_bytes()
    with pytest.raises(Damaged, match=r"written by a newer noid \(it has flux\)\. Upgrade noid"), open_store(path):
        pass
    assert path.read_bytes() == before


def open_in_a_process(path: Path, barrier: threading.Barrier) -> None:
    barrier.wait()
    with open_store(path):
        pass


def test_four_processes_that_make_the_database_at_once_do_not_disturb_each_other(path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    barrier = context.Barrier(4)
    workers = [context.Process(target=open_in_a_process, args=(path, barrier)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]


# --- damage ----------------------------------------------------------------------------------------------------------


def damaged_text(path: Path) -> None:
    path.write_text("These are not the bytes you are looking for.\n" * 200)


def damaged_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4096])


def damaged_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3] ^= 0xFF
    path.write_bytes(content)


def damaged_page(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:] = bytes(byte ^ 0x55 for byte in content[4096:])
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [damaged_text, damaged_truncated, damaged_header, damaged_page])
def test_a_damaged_file_is_refused_with_advice_and_not_overwritten(path: Path, damage: object) -> None:
    with open_store(path) as store:
        store.write_now(lambda tx: tx.insert_user("me", "id"))
    damage(path)  # type: ignore[operator]  # one of the functions above
    before = path.read_bytes()
    with pytest.raises(Damaged) as refused, open_store(path):
        pass
    assert str(path) in str(refused.value)
    assert "move the file away" in str(refused.value)
    assert path.read_bytes() == before


def test_damage_that_shows_while_the_agent_runs_is_told_as_such(path: Path, store: Store) -> None:
    store._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    damaged_page(path)
    with open_read_only(path) as reader, pytest.raises(Damaged, match="the noid database is damaged"):
        Store(reader, reader, Reserve(path)).users()


def test_a_directory_that_cannot_be_written_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match="opening the database"), open_store(tmp_path / "file" / "noid.db"):
        pass


# --- full disks ------------------------------------------------------------------------------------------------------


ON_A_FULL_DISK = """
import sys
from pathlib import Path
from noid.core.database.store import open_store
from noid.errors import NoSpace

place = Path(sys.argv[1])
print("mounted", flush=True)
with open_store(place / "noid.db") as store:
    store.write_now(lambda tx: tx.insert_user("me", "me"))
    ballast = (place / "ballast").open("wb", buffering=0)
    try:
        while True:
            ballast.write(bytes(4096))
    except OSError:
        pass
    for _ in range(2):  # the second time it could be: a transaction within a transaction
        try:
            store.write_now(lambda tx: [tx.insert_user(f"user{n}" + 400 * "x", f"user{n}") for n in range(1000)])
        except NoSpace as error:
            assert "nothing was changed" in str(error), error
        else:
            raise AssertionError("the disk was not full")
        assert [user.name for user in store.users()] == ["me"]
with open_store(place / "noid.db") as store:  # an agent can start on a full disk
    assert [user.name for user in store.users()] == ["me"]
    ballast.close()
    (place / "ballast").unlink()
    store.write_now(lambda tx: tx.insert_user("you", "you"))
    assert [user.name for user in store.users()] == ["me", "you"]
print("well")
"""


def test_on_a_full_disk_a_write_changes_nothing_and_the_next_one_with_space_works(tmp_path: Path) -> None:
    in_namespace = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
    script = 'mount -t tmpfs -o size=1m tmpfs "$1" && exec "$2" -c "$3" "$1"'
    done = subprocess.run(
        [*in_namespace, script, "sh", str(tmp_path), sys.executable, ON_A_FULL_DISK],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    if "mounted" not in done.stdout:
        pytest.skip(f"mounting a tmpfs needs root and a mount namespace: {done.stderr.strip()}")
    assert done.stdout.split() == ["mounted", "well"], done.stderr


def test_a_commit_that_fails_leaves_no_transaction_open(store: Store) -> None:
    """SQLite may run out of space as late as the commit; here a deferred constraint fails there."""

    def violate(tx: Tx) -> None:
        tx.execute("PRAGMA defer_foreign_keys=ON")
        tx.insert_checkpoint(a_checkpoint(owner="nobody"))

    with pytest.raises(sqlite3.IntegrityError):
        store.write_now(violate)
    store.write_now(lambda tx: tx.insert_checkpoint(a_checkpoint()))
    assert [c.owner for c in store.checkpoints("me")] == ["me"]


# --- several writers -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_read_only(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        yield connection


def add_users(path: Path, prefix: str, count: int) -> None:
    with open_store(path) as store:
        for number in range(count):
            store.write_now(lambda tx, number=number: tx.insert_user(f"{prefix}{number}", f"{prefix}{number}"))


def test_two_processes_that_write_at_once_lose_nothing(path: Path) -> None:
    with open_store(path):
        pass
    context = multiprocessing.get_context("forkserver")
    workers = [context.Process(target=add_users, args=(path, prefix, 100)) for prefix in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0]
    with open_store(path) as store:
        assert len(store.users()) == 200


async def test_reading_does_not_wait_while_another_process_holds_the_write_lock(path: Path, store: Store) -> None:
    other = sqlite3.connect(path, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        other.execute("INSERT INTO users VALUES ('other', 'other', '2026-01-01T00:00:00+00:00')")
        ticks = 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.write, lambda tx: tx.insert_user("late", "late"))
            for _ in range(20):  # the loop goes on although the write waits in its thread
                await trio.sleep(0.001)
                assert {user.id for user in store.users()} == {"me", "you"}
                ticks += 1
            other.execute("COMMIT")
        assert ticks == 20
        assert {user.id for user in store.users()} == {"me", "you", "other", "late"}
    finally:
        other.close()


async def test_a_lock_held_too_long_is_told_and_nothing_was_changed(
    path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store._writer.execute("PRAGMA busy_timeout=50")
    other = sqlite3.connect(path, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(DependencyDown, match="held by another process"):
            await store.write(lambda tx: tx.insert_user("late", "late"))
        other.execute("ROLLBACK")
    finally:
        other.close()
    assert {user.id for user in store.users()} == {"me", "you"}


# --- rows ------------------------------------------------------------------------------------------------------------


def test_a_vm_comes_back_as_it_was_written(store: Store) -> None:
    vm = a_vm(
        lease=NetLease(kind="user", mac="02:00:00:00:00:01"),
        process=ProcessRef(pid=7, start_ticks=8, boot_id="b"),
        receipt=Receipt(items=(ReceiptItem(name="clock", status="done", after="now"),)),
        origin="golden/x",
    )
    store.write_now(lambda tx: tx.insert_vm(vm))
    assert store.vm("me", "web") == vm


def test_of_two_that_change_one_row_the_second_is_refused(store: Store) -> None:
    store.write_now(lambda tx: tx.insert_vm(a_vm(state=VmState.RUNNING)))
    read = store.vm("me", "web")
    store.write_now(lambda tx: tx.update_vm(read, state=VmState.DEAD, process=None))
    with pytest.raises(Conflict, match="changed at the same time"):
        store.write_now(lambda tx: tx.update_vm(read, state=VmState.STOPPED))
    assert store.vm("me", "web").state is VmState.DEAD
    assert store.vm("me", "web").generation == read.generation + 1


def test_a_state_that_may_not_follow_is_refused(store: Store) -> None:
    store.write_now(lambda tx: tx.insert_vm(a_vm(state=VmState.DEAD)))
    with pytest.raises(Conflict, match="cannot become paused: it is dead"):
        store.write_now(lambda tx: tx.update_vm(store.vm("me", "web"), state=VmState.PAUSED))


def test_a_name_is_unique_for_its_owner_only(store: Store) -> None:
    store.write_now(lambda tx: tx.insert_vm(a_vm()))
    store.write_now(lambda tx: tx.insert_vm(a_vm(owner="you")))
    with pytest.raises(Conflict, match="VM 'web' already exists"):
        store.write_now(lambda tx: tx.insert_vm(a_vm()))
    with pytest.raises(Conflict, match="user 'me' already exists"):
        store.write_now(lambda tx: tx.insert_user("me", "another-id"))


def test_nobody_sees_what_belongs_to_another(store: Store) -> None:
    store.write_now(lambda tx: tx.insert_vm(a_vm(owner="you")))
    store.write_now(lambda tx: tx.insert_checkpoint(a_checkpoint(owner="you")))
    assert store.vms("me") == []
    assert store.checkpoints("me") == []
    assert store.checkpoints("me", Wanted(vm_name="web")) == []
    with pytest.raises(NotFound, match="VM 'web' not found"):
        store.vm("me", "web")
    with pytest.raises(NotFound, match="not found"):
        store.checkpoint("me", a_checkpoint().id)


def test_a_checkpoint_of_one_id_may_belong_to_two_owners(store: Store) -> None:
    for owner in ("me", "you"):
        store.write_now(lambda tx, owner=owner: tx.insert_checkpoint(a_checkpoint(owner=owner)))
    store.write_now(lambda tx: tx.delete_checkpoint("me", a_checkpoint().id))
    assert store.checkpoints("me") == []
    assert len(store.checkpoints("you")) == 1


def test_checkpoints_outlive_the_row_of_their_vm(store: Store) -> None:
    vm = a_vm()
    store.write_now(lambda tx: tx.insert_vm(vm))
    store.write_now(lambda tx: tx.insert_checkpoint(a_checkpoint()))
    store.write_now(lambda tx: tx.delete_vm(vm.id))
    assert [c.id for c in store.checkpoints("me", Wanted(vm_name="web"))] == [a_checkpoint().id]


def test_a_write_that_raises_is_as_if_it_never_was(store: Store) -> None:
    def half(tx: Tx) -> None:
        tx.insert_vm(a_vm())
        raise BackendError("no")

    with pytest.raises(BackendError):
        store.write_now(half)
    assert store.vms("me") == []


def test_the_audit_log_is_pruned_as_the_manual_says_and_refuses_as_before(tmp_path: Path) -> None:
    manual = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    (script,) = re.findall(r'sqlite3 noid\.db "(.*?)"', manual, re.DOTALL)
    database = tmp_path / "noid.db"
    with open_store(database):
        pass
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as db:
        for at in ("2025-12-31T23:59:59+00:00", "2026-01-01T00:00:00+00:00"):
            sql = "INSERT INTO audit (at, address, action, target, count) VALUES (?, 'local', 'x', '', 1)"
            db.execute(sql, (at,))
        before = {tuple(row[0].split()) for row in db.execute("SELECT sql FROM sqlite_schema WHERE type = 'trigger'")}
        db.executescript(script)
        assert [row[0][:10] for row in db.execute("SELECT at FROM audit")] == ["2026-01-01"]
        after = {tuple(row[0].split()) for row in db.execute("SELECT sql FROM sqlite_schema WHERE type = 'trigger'")}
        assert after == before
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            db.execute("DELETE FROM audit")
