"""Checkpoints on storage with layers: a machine must end up on one known top whatever interrupts them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from noid.errors import BackendError
from noid.testing.faults import fail
from noid.testing.simulated_agent import simulated_config

Rig = Any  # see conftest.py
ON_DISK = "/home/on-disk"


def layered(rig: Rig) -> Any:
    backends = simulated_config(Path("/x"), storage="overlay").backends
    return rig.agent(plugin={"qcow2": True}, backends=backends)


def layers(rig: Rig, noid: Any) -> int:
    directory = rig.layout.vm(noid.agent.vm(noid.user, "web").instance)
    return len(list(directory.glob("disk-*")))


async def test_vms_on_layers_are_frozen_cloned_and_adopted(rig: Rig, no_leaks: None) -> None:
    async with layered(rig) as noid:
        await noid.create()
        await noid.write(ON_DISK, "1")
        checkpoint = await noid.checkpoint()
        await noid.write(ON_DISK, "2")
    async with layered(rig) as noid:
        await noid.restore(checkpoint, new_name="copy")
        assert await noid.sh("cat", ON_DISK, name="copy") == "1"
        assert await noid.sh("cat", ON_DISK) == "2"
        await noid.restore(checkpoint)
        assert await noid.sh("cat", ON_DISK) == "1"
        await noid.destroy()
        await noid.destroy("copy")


@pytest.mark.parametrize("call", ["capture", "pivot_disk", "capture.finish"])
async def test_after_a_failed_checkpoint_the_next_one_works(rig: Rig, call: str) -> None:
    async with layered(rig) as noid:
        await noid.create()
        rig.faults.arm(call, fail(BackendError("no")))
        with pytest.raises(BackendError, match="no"):
            await noid.checkpoint()
        await noid.write(ON_DISK, "1")
        checkpoint = await noid.checkpoint()
        await noid.write(ON_DISK, "2")
        await noid.restore(checkpoint)
        assert await noid.sh("cat", ON_DISK) == "1"


@pytest.mark.parametrize("moved", [False, True], ids=["before the pivot", "after the pivot"])
async def test_an_agent_that_dies_in_a_checkpoint_leaves_a_layer_only_if_the_machine_uses_it(
    rig: Rig, moved: bool
) -> None:
    """Undo without the plan: what was prepared is known from the volume and from the machine alone."""

    class Killed(BaseException):
        """Not an `Exception`: nothing is undone, as after kill -9."""

    async with layered(rig) as noid:
        await noid.create()
        before = layers(rig, noid)

    async def killed_in_a_checkpoint() -> None:
        async with layered(rig) as noid:
            rig.faults.arm("pivot_disk", fail(Killed()), after=moved)
            await noid.checkpoint()

    with pytest.raises(BaseExceptionGroup) as ended:
        await killed_in_a_checkpoint()
    assert ended.value.subgroup(Killed) is not None
    async with layered(rig) as noid:
        assert layers(rig, noid) == before + moved
        assert noid.agent.services.store.open_operations() == []
        await noid.write(ON_DISK, "1")
        checkpoint = await noid.checkpoint()
        await noid.write(ON_DISK, "2")
        await noid.restore(checkpoint)
        assert await noid.sh("cat", ON_DISK) == "1"


async def test_a_checkpoint_brought_back_from_a_backup_can_be_restored(rig: Rig, no_leaks: None) -> None:
    """A copy has other inodes than its seal remembers, so every file is judged by its digest, the base layer too."""
    async with layered(rig) as noid:
        await noid.create()
        await noid.write(ON_DISK, "1")
        checkpoint = await noid.checkpoint()
        directory = rig.layout.checkpoint(noid.user.id, checkpoint)
    shutil.copytree(directory, rig.data_dir / "backup")
    shutil.rmtree(directory)
    shutil.move(rig.data_dir / "backup", directory)
    async with layered(rig) as noid:
        await noid.restore(checkpoint, new_name="copy")
        assert await noid.sh("cat", ON_DISK, name="copy") == "1"
        await noid.destroy("copy")
        await noid.destroy()
