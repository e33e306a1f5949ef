"""The VM generation id: a guest's kernel that sees by itself that it was cloned, where the machine has the device."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from noid_exec_vsock import VsockExec
from noid_storage_copy import storage_backend
from noid_vmm_qemu.backend import QemuConfig, open_backend

from noid.core.backends import AgentContext
from noid.core.model.images import Image
from noid.core.model.vms import Identity
from noid.errors import DependencyDown
from noid.testing.vmm_rig import VmmRig, run

from .test_agent_in_a_vm import BOOT_SECS, image

__all__ = ["image"]  # a fixture

pytestmark = pytest.mark.vm


@pytest.fixture
async def q35(data_dir: Path, image: Image, no_leaks: None) -> AsyncIterator[VmmRig]:
    del no_leaks
    (run_dir := data_dir / "run").mkdir()
    (shared := data_dir / "shared").mkdir()
    context = AgentContext(data_dir=data_dir, run_dir=run_dir, database=data_dir / "noid.db")
    disks_spec = storage_backend()
    try:
        async with (
            open_backend(QemuConfig(machine="q35"), context) as vmm,
            disks_spec.open(disks_spec.config(), context) as disks,
        ):
            rig = VmmRig(
                vmm=vmm, exec_backend=VsockExec(), storage=disks, image=image, data_dir=data_dir, shared=shared
            )
            yield rig
            await rig.close()
    except DependencyDown as error:
        pytest.skip(str(error))


async def test_a_kernel_with_the_device_reseeds_before_anybody_has_told_it(q35: VmmRig) -> None:
    assert q35.vmm.features.vm_generation_id
    running = await q35.launch()
    reseeded = "dmesg | grep -c 'crng reseeded due to virtual machine fork' || true"
    with trio.fail_after(BOOT_SECS):
        async with q35.guest(running) as guest:
            assert (await run(guest, "sh", "-c", reseeded)).stdout == b"0\n"
            receipt = await guest.wake(
                Identity(
                    hostname="web", machine_id="5e" * 16, unix_ns=time.time_ns(), entropy=os.urandom(64),
                    vm_generation_id=True,
                )
            )  # fmt: skip
        assert {item.name: item.status for item in receipt.items}["vm-generation-id"] == "done"
        taken = await q35.checkpoint(running)
        clone = await q35.clone(taken)
        async with q35.guest(clone) as guest:
            assert (await run(guest, "sh", "-c", reseeded)).stdout == b"1\n"
