"""What `test_taps.py` runs in a network namespace of its own: real TAP devices, which go with it."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import noid_storage_copy
import noid_vmm_firecracker
import noid_vmm_qemu
import pytest
from noid_exec_vsock import initrd_files

from noid.core.backends import AgentContext
from noid.core.images import Images
from noid.core.model.sandbox import SandboxMode, SandboxSettings
from noid.core.model.vms import NetLease
from noid.errors import BackendError, DependencyDown
from noid.testing.firecracker import SimulatedFirecracker
from noid.testing.guests import tiny_image
from noid.testing.simulated_exec import SimulatedExec
from noid.testing.simulated_image import simulated_image
from noid.testing.vmm_rig import Running, VmmRig


def make_tap(name: str) -> NetLease:
    subprocess.run(["ip", "tuntap", "add", "dev", name, "mode", "tap"], check=True)
    subprocess.run(["ip", "link", "set", "dev", name, "up"], check=True)
    return NetLease(kind="tap", mac="52:54:00:12:34:56", tap_name=name)


def is_connected(lease: NetLease) -> bool:
    told = subprocess.run(["ip", "-o", "link", "show", "dev", str(lease.tap_name)], check=True, capture_output=True)
    return b"LOWER_UP" in told.stdout


def is_there(name: str) -> bool:
    return subprocess.run(["ip", "link", "show", "dev", name], check=False, capture_output=True).returncode == 0


@pytest.fixture(params=["firecracker-off", "qemu-full"])  # the simulated one is a script: no room has its Python
async def rig(request: pytest.FixtureRequest, data_dir: Path, no_leaks: None) -> AsyncIterator[VmmRig]:
    del no_leaks
    vmm, _, mode = request.param.partition("-")
    for name in ("run", "image", "shared"):
        (data_dir / name).mkdir()
    sandbox = SandboxSettings(mode=SandboxMode(mode))
    places = {"data_dir": data_dir, "run_dir": data_dir / "run", "database": data_dir / "noid.db"}
    context = AgentContext(**places, sandbox=sandbox)
    storage = noid_storage_copy.storage_backend()
    async with contextlib.AsyncExitStack() as opened:
        if vmm == "firecracker":
            spec = noid_vmm_firecracker.vmm_backend()
            config = {"binary": str(SimulatedFirecracker(data_dir / "program").program)}
            image = simulated_image(data_dir / "image")
        else:
            spec, config = noid_vmm_qemu.vmm_backend(), {}
            image = tiny_image(Images(data_dir / "images", initrd_files("x86_64")))  # nobody waits until it has booted
        assert spec is not None
        backend = await opened.enter_async_context(spec.open(spec.config(**config), context))
        disks = await opened.enter_async_context(storage.open(storage.config(), context))
        rig = VmmRig(vmm=backend, exec_backend=SimulatedExec(), storage=disks, image=image, data_dir=data_dir,
                     shared=data_dir / "shared")  # fmt: skip
        yield rig
        await rig.close()


async def launched(rig: VmmRig, lease: NetLease) -> Running:
    return await rig.launch(dataclasses.replace(await rig.launch_plan(), lease=lease))


async def test_a_vm_takes_the_tap_of_its_lease_and_its_clone_another(rig: VmmRig) -> None:
    one, two = make_tap("one"), make_tap("two")
    source = await launched(rig, one)
    assert is_connected(one)
    taken = await rig.checkpoint(source)
    plan = dataclasses.replace(await rig.restore_plan(taken), lease=two)
    clone = await rig.vmm.restore(plan)
    try:
        assert is_connected(one)
        assert is_connected(two)
    finally:
        await clone.kill()
        await clone.aclose()
    assert not is_connected(two)
    with pytest.raises(BackendError, match="'one' is connected to another process"):
        await rig.vmm.restore(dataclasses.replace(await rig.restore_plan(taken), lease=one))
    with pytest.raises(BackendError, match="'one' is connected to another process: each VM needs one of its own"):
        await launched(rig, one)
    with pytest.raises(DependencyDown, match="there is no network device 'three'"):
        await launched(rig, NetLease(kind="tap", tap_name="three"))
    assert not is_there("three")
    assert is_connected(one)
    for lease in (one, two):
        subprocess.run(["ip", "link", "del", "dev", str(lease.tap_name)], check=True)  # noqa: ASYNC221  milliseconds
