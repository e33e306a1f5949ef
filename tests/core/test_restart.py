"""What the next agent finds: running VMs, half-done operations, lost and old databases."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from noid.core import recovery
from noid.core.model.vms import Vm
from noid.core.opening import open_agent
from noid.errors import ConfigError, Conflict, Damaged, DependencyDown
from noid.testing.faults import fail, hang
from noid.testing.processes import process_ref
from noid.testing.simulated_agent import simulated_config, simulated_plugins

Rig = Any  # see conftest.py
MEMORY = "/dev/shm/in-memory"


def lose_database(rig: Rig) -> None:
    for path in rig.data_dir.glob("noid.db*"):
        path.unlink()


def open_descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208  # names are wanted


async def test_machines_outlive_the_agent_and_are_adopted(rig: Rig, no_leaks: None) -> None:
    async with rig.agent() as noid:
        await noid.create()
        await noid.write(MEMORY, "kept")
        process = noid.agent.vm(noid.user, "web").process
    assert rig.machines() == 1
    async with rig.agent() as noid:
        assert noid.agent.vm(noid.user, "web").process == process
        assert await noid.sh("cat", MEMORY) == "kept"
        await noid.restore(await noid.checkpoint(), new_name="copy")
        await noid.destroy()
        await noid.destroy("copy")


async def test_a_machine_left_paused_goes_on(rig: Rig) -> None:
    async with rig.agent() as noid:
        await noid.create()
        await noid.agent.services.supervisor.get(noid.agent.vm(noid.user, "web")).machine.pause()
    async with rig.agent() as noid:
        with trio.fail_after(5):
            assert await noid.sh("hostname") == "web"


async def test_a_machine_that_ended_meanwhile_is_dead_and_can_be_restored(rig: Rig) -> None:
    async with rig.agent() as noid:
        await noid.create()
        checkpoint = await noid.checkpoint()
        process = noid.agent.vm(noid.user, "web").process
    os.kill(process.pid, signal.SIGKILL)
    os.waitpid(process.pid, 0)  # noqa: ASYNC222  # it was killed
    async with rig.agent() as noid:
        assert noid.states() == {"web": "dead"}
        await noid.restore(checkpoint)
        assert await noid.sh("hostname") == "web"


async def test_a_machine_that_does_not_answer_is_ended(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "ADOPT_SECS", 0.5)
    async with rig.agent() as noid:
        await noid.create()
    rig.faults.arm("resume", hang)
    async with rig.agent() as noid:
        assert noid.states() == {"web": "dead"}
        assert rig.machines() == 0


async def test_there_is_one_agent_for_a_data_directory(rig: Rig) -> None:
    async with rig.agent():
        with pytest.raises(Conflict, match="another noid agent already runs on"):
            async with rig.agent():
                pass
    async with rig.agent():
        pass


async def test_twenty_openings_leave_no_descriptor_open(rig: Rig) -> None:
    async with rig.agent() as noid:
        await noid.create()
        await noid.sh("true")

    async def open_and_use() -> None:
        async with rig.agent() as noid:
            await noid.sh("true")
            await noid.restore(await noid.checkpoint())

    await open_and_use()
    before = open_descriptors()
    for _ in range(20):
        await open_and_use()
    assert open_descriptors() == before


async def test_an_agent_that_stops_in_the_middle_of_a_create_undoes_it(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("noid.core.opening.DRAIN_SECS", 0.1)
    told: list[str] = []

    async def create(noid: Any) -> None:
        try:
            await noid.create("second")
        except DependencyDown as error:
            told.append(str(error))

    async with trio.open_nursery() as callers, rig.agent() as noid:
        await noid.create("first")
        rig.faults.arm("wake", hang)  # inside a nursery of `until_it_ends`: the cancellation comes as a group
        callers.start_soon(create, noid)
        await rig.faults.reached("wake")
    assert len(told) == 1
    assert "create was interrupted" in told[0]
    assert rig.machines() == 1
    async with rig.agent() as noid:
        assert noid.states() == {"first": "running"}
        assert rig.stray(noid.agent.vm(noid.user, "first").instance) == []


async def test_a_create_whose_undo_failed_is_undone_by_the_next_agent(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig.agent() as noid:
        await noid.create("first")
        rig.faults.arm("wake", fail(DependencyDown("no")))
        rig.faults.arm("kill", fail(DependencyDown("cannot kill")))
        with pytest.raises(DependencyDown, match="no"):
            await noid.create("second")
        assert [operation["kind"] for operation in noid.agent.services.store.open_operations()] == ["vm.create"]
    async with rig.agent() as noid:
        assert noid.states() == {"first": "running"}
        assert rig.machines() == 1
        assert noid.agent.services.store.open_operations() == []


async def test_a_destroy_that_was_interrupted_is_carried_on(rig: Rig) -> None:
    async with rig.agent() as noid:
        await noid.create()
        rig.faults.arm("kill", fail(DependencyDown("cannot kill")))
        with pytest.raises(DependencyDown, match="cannot kill"):
            await noid.destroy()
        assert noid.states() == {"web": "destroying"}
    async with rig.agent() as noid:
        assert noid.states() == {}
        assert rig.machines() == 0
        assert rig.stray() == []


async def test_an_operation_this_noid_does_not_know_stops_nothing(rig: Rig) -> None:
    async with rig.agent() as noid:
        await noid.create()
        change = """INSERT INTO operations (id, kind, owner, vm_name, facts, started_at)
            VALUES ('x', 'vm.teleport', 'me', 'web', 'no json', '')"""
        await noid.agent.services.store.write(lambda tx: tx.execute(change))
    async with rig.agent() as noid:
        assert noid.states() == {"web": "running"}


# --- settings that changed -------------------------------------------------------------------------------------------


async def test_a_machine_of_another_storage_backend_is_left_running_until_the_setting_is_back(rig: Rig) -> None:
    """A line in server.toml must not kill VMs."""
    async with rig.agent() as noid:
        await noid.create()
        await noid.write(MEMORY, "kept")
    async with rig.agent(plugin={"qcow2": True}, **storage("overlay")) as noid:
        assert noid.states() == {"web": "running"}
        assert rig.machines() == 1
        with pytest.raises(DependencyDown, match="no running machine"):
            await noid.sh("true")
    async with rig.agent() as noid:
        assert await noid.sh("cat", MEMORY) == "kept"


def storage(name: str) -> dict[str, Any]:
    return {"backends": simulated_config(Path("/x"), storage=name).backends}


async def test_a_storage_the_vmm_cannot_use_is_refused_at_the_start(rig: Rig) -> None:
    with pytest.raises(ConfigError, match="storage 'overlay' makes qcow2 disks, and VMM 'simulated' takes raw"):
        async with rig.agent(**storage("overlay")):
            pass


async def test_settings_of_no_plugin_are_refused_at_the_start(rig: Rig) -> None:
    with pytest.raises(ConfigError, match=r"\[plugins\.storage_cpy\] is of no plugin"):
        async with rig.agent(plugins={"storage_cpy": {}}):
            pass


# --- lost, damaged and old databases ---------------------------------------------------------------------------------


async def test_a_lost_database_loses_no_vm_and_no_checkpoint(rig: Rig) -> None:
    async with rig.agent() as noid:
        await noid.create()
        checkpoint = await noid.checkpoint()
        await noid.restore(checkpoint)
        await noid.write(MEMORY, "kept")
        local, before = noid.user, noid.agent.vm(noid.user, "web")
        noid.user, _ = await noid.agent.users.add("other")
        await noid.create("theirs")
        other = noid.user
    lose_database(rig)
    async with rig.agent() as noid:
        assert noid.user == local
        assert replace(noid.agent.vm(noid.user, "web"), responding=True) == before
        assert await noid.sh("cat", MEMORY) == "kept"
        assert [c.id for c in noid.agent.checkpoints.of(local, "web")] == [checkpoint]
        await noid.restore(checkpoint)
        noid.user = next(user for user in noid.agent.users.list() if user.name == "other")
        assert noid.user == other
        assert await noid.sh("hostname", name="theirs") == "theirs"
        assert await noid.agent.users.rotate_token("other")


async def test_a_checkpoint_whose_vm_is_gone_survives_a_lost_database_too(rig: Rig) -> None:
    async with rig.agent() as noid:
        await noid.create()
        checkpoint = await noid.checkpoint()
        await noid.destroy()
    lose_database(rig)
    async with rig.agent() as noid:
        await noid.restore(checkpoint)
        assert await noid.sh("hostname") == "web"


async def test_after_a_lost_database_the_machine_an_interrupted_restore_replaced_goes_away(rig: Rig) -> None:
    async with rig.agent() as noid:
        await noid.create()
        old = rig.layout.vm(noid.agent.vm(noid.user, "web").instance)
        shutil.copytree(old, rig.data_dir / "copy")
        await noid.restore(await noid.checkpoint())
        new = noid.agent.vm(noid.user, "web")
    shutil.move(rig.data_dir / "copy", old)  # as if the agent had been killed before it ended the old one
    lose_database(rig)
    async with rig.agent() as noid:
        assert replace(noid.agent.vm(noid.user, "web"), responding=True) == new
        assert not old.exists()


async def test_an_old_copy_of_the_database_brings_back_no_ghosts_and_loses_nothing_newer(rig: Rig) -> None:
    async with rig.agent() as noid:
        await noid.create("kept")
        await noid.create("destroyed-later")
        await noid.create("restored-later")
        checkpoint = await noid.checkpoint("restored-later")
    shutil.copy(rig.data_dir / "noid.db", rig.data_dir / "backup")
    async with rig.agent() as noid:
        await noid.destroy("destroyed-later")
        await noid.restore(checkpoint, name="restored-later")
        restored: Vm = noid.agent.vm(noid.user, "restored-later")
        await noid.create("created-later")
    lose_database(rig)
    (rig.data_dir / "backup").rename(rig.data_dir / "noid.db")
    async with rig.agent() as noid:
        running = {name for name, state in noid.states().items() if state == "running"}
        assert running == {"kept", "restored-later", "created-later"}
        assert noid.agent.vm(noid.user, "restored-later").instance == restored.instance
        for name in running:
            assert await noid.sh("hostname", name=name) == name
        assert noid.states()["destroyed-later"] == "dead"


async def test_a_damaged_database_stops_the_start_and_no_vm(rig: Rig) -> None:
    async with rig.agent() as noid:
        await noid.create()
        process = noid.agent.vm(noid.user, "web").process
    (rig.data_dir / "noid.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(Damaged, match="move the file away"):
        async with open_agent(simulated_config(rig.data_dir), simulated_plugins()):
            pass
    assert process_ref(process.pid) == process
    lose_database(rig)
    async with rig.agent() as noid:
        assert await noid.sh("hostname") == "web"


async def test_what_no_row_and_no_deed_owns_is_swept(rig: Rig) -> None:
    async with rig.agent() as noid:
        await noid.create()
        checkpoints = rig.layout.checkpoint(noid.user.id, "x").parent
        instance = noid.agent.vm(noid.user, "web").instance
    for stray in (
        rig.layout.vms / "0123456789ab" / "deep",
        rig.layout.scratch / "0123456789ab",
        rig.layout.run("0123456789ab"),
        rig.layout.golden / "x.partial",
        checkpoints / "0123456789abcdef.partial" / "disk",
    ):
        stray.mkdir(parents=True)
    async with rig.agent() as noid:
        assert rig.stray(instance) == []
        assert noid.states() == {"web": "running"}


async def test_operations_of_long_ago_are_forgotten(rig: Rig) -> None:
    async with rig.agent() as noid:
        await noid.create()
        old = "UPDATE operations SET ended_at = '2020-01-01T00:00:00.000000+00:00'"
        await noid.agent.services.store.write(lambda tx: tx.execute(old))
        await noid.destroy()
    async with rig.agent() as noid:
        kinds = [row["kind"] for row in noid.agent.services.store._read("SELECT kind FROM operations")]
        assert kinds == ["vm.destroy"]
