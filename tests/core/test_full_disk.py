"""A disk that is full to its last block: what failed leaves nothing, what frees room works, nobody has to restart.

On an ext4 of its own, because what is to be seen is how SQLite and a real file system behave together. Its guests are
simulated.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from noid import hostfs
from noid.core.database.reserve import LOG_BYTES, ROOM_BYTES, allocate
from noid.core.database.store import Tx, open_store
from noid.core.model.times import now
from noid.core.operations import performing
from noid.core.operations.outcomes import OperationState
from noid.core.people import audit
from noid.core.people.audit import AuditEntry
from noid.core.people.users import Users
from noid.errors import BackendError, Busy, NoSpace
from noid.testing.faults import fail
from noid.testing.simulated_agent import give_default_image

from .conftest import Driven, Rig

BLOCK = 4096
SOON_SECS = 30.0


@pytest.fixture
def small_disk(data_dir: Path) -> Path:
    """A small ext4. Its mount, like everything below `data_dir`, goes whatever happens."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small filesystem needs root")
    image, place = data_dir / "ext4.img", data_dir / "d"
    place.mkdir()
    with image.open("xb") as file:
        file.truncate(128 << 20)
    for words in (
        ["mkfs.ext4", "-q", "-m", "0", "-b", str(BLOCK), str(image)],
        ["mount", "-o", "loop", str(image), str(place)],
    ):
        done = subprocess.run(words, capture_output=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"no small filesystem can be made: {done.stderr.decode()}")
    return place


@pytest.fixture
def small_rig(small_disk: Path) -> Rig:
    give_default_image(small_disk)
    return Rig(small_disk)


def fill(place: Path, free_blocks: int = 0) -> Path:
    """Leave *free_blocks* blocks of the disk free; return the file that has the others."""
    filling = place / "filling"
    filling.touch()
    size = 64 << 20
    while size >= BLOCK:
        try:
            allocate(filling, filling.stat().st_size + size)
        except OSError:
            size //= 2
    os.truncate(filling, filling.stat().st_size - free_blocks * BLOCK)
    os.sync()
    assert hostfs.writable_bytes(place) <= free_blocks * BLOCK
    return filling


@contextlib.contextmanager
def full(place: Path, free_blocks: int = 0) -> Iterator[None]:
    filling = fill(place, free_blocks)
    try:
        yield
    finally:
        filling.unlink()


def outcomes(noid: Driven) -> list[tuple[str, OperationState]]:
    return [(operation.kind, operation.state) for operation in noid.agent.operations.all(noid.user)]


# --- create -----------------------------------------------------------------------------------------------------------


async def test_a_create_for_which_there_is_too_little_room_is_refused_before_it_begins(small_rig: Rig) -> None:
    async with small_rig.agent() as noid:
        await noid.create()
        before = outcomes(noid)
        for free_blocks in (0, 1, 5, 20, ROOM_BYTES // BLOCK - 1):
            with full(small_rig.data_dir, free_blocks), pytest.raises(NoSpace, match="nothing was changed"):
                await noid.create("new")
            assert noid.states() == {"web": "running"}, free_blocks
        assert outcomes(noid) == before


@pytest.mark.parametrize("free_blocks", [0, 3, 9, 30])
@pytest.mark.parametrize("call", ["template", "restore", "wake"])
async def test_a_create_whose_disk_fills_up_meanwhile_leaves_nothing(
    small_rig: Rig, call: str, free_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything was made, its undo frees nothing either that the journal could use."""

    async def fill_up(_: object) -> None:
        await trio.to_thread.run_sync(fill, small_rig.data_dir, free_blocks)
        raise NoSpace("the disk is full")

    async with small_rig.agent() as noid:
        await noid.create()
        instance = noid.agent.vm(noid.user, "web").instance
        with monkeypatch.context() as patched:
            if call == "template":
                patched.setattr(noid.agent.operations._templates, "get", fill_up)
            else:
                small_rig.faults.arm(call, fill_up)
            with pytest.raises(NoSpace):
                await noid.create("new")
        assert noid.states() == {"web": "running"}
        assert small_rig.stray(instance) == []
        assert outcomes(noid)[0] == ("vm.create", OperationState.FAILED)
        assert noid.agent.services.store.open_operations() == []
        (small_rig.data_dir / "filling").unlink()
        await noid.create("new")


# --- what frees room --------------------------------------------------------------------------------------------------


async def test_on_a_full_disk_vms_stop_and_checkpoints_and_vms_go_away(small_rig: Rig) -> None:
    async with small_rig.agent() as noid:
        await noid.create()
        await noid.create("db")
        checkpoint = await noid.checkpoint()
        fill(small_rig.data_dir)
        with pytest.raises(NoSpace):
            await noid.checkpoint()
        await noid.agent.power.stop(noid.user, "web", 0.0)
        assert noid.states() == {"web": "stopped", "db": "running"}
        fill(small_rig.data_dir)
        await noid.agent.checkpoints.delete(noid.user, noid.agent.checkpoints.one(noid.user, "web", checkpoint))
        assert noid.agent.checkpoints.all(noid.user) == []
        fill(small_rig.data_dir)
        for name in ("web", "db"):
            await noid.destroy(name)
            fill(small_rig.data_dir)
        assert noid.states() == {}
        assert small_rig.stray() == []
        assert small_rig.machines() == 0


# --- an undo that fails -----------------------------------------------------------------------------------------------


async def test_an_undo_that_fails_is_repeated_until_it_works_and_its_vm_is_held_meanwhile(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing can be reserved, say; whatever has kept it from working."""
    monkeypatch.setattr(performing, "UNDO_AGAIN_SECS", 0.01)
    delete_vm, blocked = Tx.delete_vm, True

    def delete_if_there_is_room(tx: Tx, vm_id: str) -> None:
        if blocked:
            raise NoSpace("the disk is full")
        delete_vm(tx, vm_id)

    monkeypatch.setattr(Tx, "delete_vm", delete_if_there_is_room)
    async with rig.agent() as noid:
        rig.faults.arm("wake", fail(BackendError("no")))
        with pytest.raises(BackendError):
            await noid.create()
        assert noid.states() == {"web": "creating"}
        assert noid.agent.vm(noid.user, "web").busy == "create"
        with pytest.raises(Busy):
            await noid.destroy()
        assert outcomes(noid) == [("vm.create", OperationState.RUNNING)]
        blocked = False
        with trio.fail_after(SOON_SECS):
            await noid.agent.settled(noid.user, "web")
        assert noid.states() == {}
        assert outcomes(noid) == [("vm.create", OperationState.FAILED)]
        await noid.create()
        assert rig.stray(noid.agent.vm(noid.user, "web").instance) == []


async def test_an_undo_that_does_not_work_holds_up_no_end_of_an_agent_and_the_next_one_does_it(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def delete_nothing(tx: Tx, vm_id: str) -> None:
        raise NoSpace("the disk is full")

    with trio.fail_after(15), monkeypatch.context() as patched:  # the agent waits 20 s for operations
        patched.setattr(Tx, "delete_vm", delete_nothing)
        async with rig.agent() as noid:
            rig.faults.arm("wake", fail(BackendError("no")))
            with pytest.raises(BackendError):
                await noid.create()
    async with rig.agent() as noid:
        assert noid.states() == {}
        assert outcomes(noid) == [("vm.create", OperationState.FAILED)]


# --- the reserve ------------------------------------------------------------------------------------------------------


async def test_what_needs_no_room_has_the_reserve_and_the_rest_is_refused(small_disk: Path) -> None:
    with open_store(small_disk / "noid.db") as store:
        store.write_now(lambda tx: tx.insert_user("me", "me"))
        with full(small_disk):
            for n in range(500):
                store.write_now(lambda tx, n=n: tx.insert_user(f"user {n}", f"id {n}"))  # type: ignore[misc]  # bound now
            with pytest.raises(NoSpace):
                await store.write(lambda tx: tx.insert_user("you", "you"), needs_room=True)
        assert len(store.users()) == 501
        await store.write(lambda tx: tx.insert_user("you", "you"), needs_room=True)


def test_a_database_that_cannot_be_opened_on_a_full_disk_is_told_as_such(small_disk: Path) -> None:
    with open_store(small_disk / "noid.db") as store:
        store.write_now(lambda tx: tx.insert_user("me", "me"))
    with full(small_disk), pytest.raises(NoSpace), open_store(small_disk / "noid.db"):
        pass
    with open_store(small_disk / "noid.db") as store:
        assert [user.name for user in store.users()] == ["me"]


async def test_a_disk_without_room_for_the_reserve_gets_it_when_there_is(small_disk: Path) -> None:
    database, log = small_disk / "noid.db", small_disk / "noid.db-wal"
    filling = fill(small_disk, (LOG_BYTES + ROOM_BYTES) // BLOCK)
    with open_store(database) as store:
        assert log.stat().st_blocks * 512 < LOG_BYTES
        filling.unlink()
        await store.write(lambda tx: tx.insert_user("me", "me"), needs_room=True)
        assert log.stat().st_blocks * 512 >= LOG_BYTES


async def test_when_tokens_were_used_is_written_down_when_there_is_room(small_disk: Path) -> None:
    saved: list[bool] = []

    class Auth:
        async def save_uses(self) -> None:
            saved.append(True)

    with open_store(small_disk / "noid.db") as store:
        users = Users(store, Auth())  # type: ignore[arg-type]  # all that is asked of it here
        with full(small_disk):
            await users.save_uses(needs_room=True)
            assert saved == []
        await users.save_uses(needs_room=True)
        assert saved == [True]


# --- the audit log ----------------------------------------------------------------------------------------------------


async def test_audit_rows_wait_for_room_and_what_waits_at_the_end_is_written(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(audit, "DEFERRED_MAX", 3)

    def entry(action: str) -> AuditEntry:
        return AuditEntry(at=now(), action=action, status=0)

    def written() -> list[str]:
        return [entry.action for entry in audit.entries(store)]

    with open_store(small_disk / "noid.db") as store:
        log = audit.AuditLog(store)
        with full(small_disk):
            await log.record(entry("a"))
            await log.record(entry("b"))
            assert written() == []
        await log.record(entry("c"))
        assert written() == ["a", "b", "c"]
        fill(small_disk)
        for action in "defg":
            await log.record(entry(action))
        assert "the audit log lacks a row" in caplog.text
        assert "action='g'" in caplog.text
        await log.close()
        assert written() == ["a", "b", "c", "d", "e", "f"]
