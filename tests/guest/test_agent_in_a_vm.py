"""The agent where it belongs: as the first program of a real machine, and beside the image's init."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from noid_exec_vsock import VsockExec, guest_binary
from noid_storage_copy import storage_backend
from noid_vmm_qemu.backend import QemuConfig, open_backend

from noid.core.backends import AgentContext, BackendSpec, VmmBackend
from noid.core.images import Images
from noid.core.model.guest_processes import ProcessExit
from noid.core.model.images import Image
from noid.core.model.processes import ExecRequest
from noid.core.model.vms import Identity, NetLease
from noid.errors import BackendError, DependencyDown
from noid.testing.guests import tiny_image
from noid.testing.vmm_rig import VmmRig, run

pytestmark = pytest.mark.vm
BOOT_SECS = 90.0


def _shell(script: str) -> ExecRequest:
    return ExecRequest(argv=("sh", "-c", script))


@pytest.fixture(scope="session")
def image(data_dir_root: Path, agent_program: Path) -> Image:
    try:
        return tiny_image(Images(data_dir_root / "agent-images", {"init": guest_binary("x86_64")}))
    except DependencyDown as error:
        pytest.skip(f"no guest to boot: {error}")


@pytest.fixture
async def rig(data_dir: Path, image: Image, no_leaks: None) -> AsyncIterator[VmmRig]:
    del no_leaks
    (run_dir := data_dir / "run").mkdir()
    (shared := data_dir / "shared").mkdir()
    context = AgentContext(data_dir=data_dir, run_dir=run_dir, database=data_dir / "noid.db")
    vmm_spec: BackendSpec[VmmBackend] = BackendSpec("qemu", QemuConfig, open_backend)
    disks_spec = storage_backend()
    try:
        async with (
            vmm_spec.open(QemuConfig(), context) as vmm,
            disks_spec.open(disks_spec.config(), context) as disks,
        ):
            rig = VmmRig(
                vmm=vmm, exec_backend=VsockExec(), storage=disks, image=image, data_dir=data_dir, shared=shared
            )
            yield rig
            await rig.close()
    except DependencyDown as error:
        pytest.skip(str(error))


async def test_a_machine_boots_into_the_agent_takes_an_identity_and_powers_off(rig: VmmRig) -> None:
    plan = await rig.launch_plan()
    running = await rig.launch(replace(plan, lease=NetLease(kind="user")))
    with trio.fail_after(BOOT_SECS):
        async with rig.guest(running) as guest:
            assert (await run(guest, "cat", "/proc/1/cmdline")).stdout == b"/init\0"
            assert (await run(guest, "id", "-un", user="noid")).stdout == b"noid\n"
            assert (await run(guest, "cat", "/proc/self/cgroup")).stdout == b"0::/noid\n"

            identity = Identity(
                hostname="its-own", machine_id="5e" * 16, unix_ns=time.time_ns() - 86_400 * 10**9,
                entropy=os.urandom(64), generation=3, lease=NetLease(kind="user"),
            )  # fmt: skip
            receipt = await guest.wake(identity)

            assert receipt.complete, receipt
            assert {item.status for item in receipt.items} == {"done"}
            facts = await run(
                guest, "sh", "-c",
                "hostname; cat /etc/hostname /etc/machine-id /run/noid/generation; "
                "grep -c 127.0.1.1.its-own /etc/hosts; "
                "ip -4 -o addr show dev eth0 | grep -o 10.0.2.15/24; ip route | grep -c default",
            )  # fmt: skip
            assert facts.stdout.decode().split() == [
                "its-own", "its-own", "5e" * 16, "3", "1", "10.0.2.15/24", "1",
            ]  # fmt: skip
            clock = int((await run(guest, "date", "+%s")).stdout)
            assert 0 <= clock - identity.unix_ns // 10**9 < BOOT_SECS
            boot_ids = {item.name: (item.before, item.after) for item in receipt.items}["boot-id"]
            assert boot_ids[0] != boot_ids[1]
            assert (await run(guest, "cat", "/proc/sys/kernel/random/boot_id")).stdout.decode().strip() == boot_ids[1]
            again = await guest.wake(replace(identity, hostname="another", generation=4))
            assert again.complete, again
            assert {item.name: item.before for item in again.items}["boot-id"] == boot_ids[1]

            stubborn = "trap '' TERM; echo $$; while :; do sleep 1; done"
            await (await guest.start(_shell(stubborn))).receive()
            await guest.power_off()
        assert (await running.machine.wait()).reason == "shutdown"


async def test_where_processes_cannot_begin_in_a_cgroup_they_run_beside_the_agent(rig: VmmRig) -> None:
    running = await rig.launch(await rig.launch_plan())
    with trio.fail_after(BOOT_SECS):
        async with rig.guest(running) as guest:
            for hide in ("mount -t tmpfs none /sys/fs/cgroup", "mkdir /sys/fs/cgroup/noid"):  # no cgroup2, no cgroup
                assert (await run(guest, "sh", "-c", hide)).status == 0
                seen = await run(guest, "sh", "-c", "cat /proc/self/cgroup; cat /proc/self/oom_score_adj")
                assert seen.stdout == b"0::/\n0\n"


async def test_a_root_that_cannot_be_mounted_is_said_to_the_host_and_on_the_console(rig: VmmRig) -> None:
    plan = await rig.launch_plan()
    running = await rig.launch(replace(plan, cmdline=plan.cmdline + " rootfstype=no-such-fs"))
    with trio.fail_after(BOOT_SECS), pytest.raises(BackendError, match="cannot mount /dev/vda as no-such-fs"):
        async with rig.guest(running):
            pytest.fail("it was let in")
    console = await trio.to_thread.run_sync((plan.directory / "serial.log").read_text)
    assert "noid: no root file system: cannot mount /dev/vda as no-such-fs" in console


async def test_a_checkpoint_in_the_middle_of_frames_in_both_directions_wakes_and_answers(rig: VmmRig) -> None:
    running = await rig.launch()
    with trio.fail_after(BOOT_SECS):
        async with rig.guest(running) as guest:
            talker = await guest.start(_shell("yes"))
            listener = await guest.start(replace(_shell("cat >/dev/null"), stdin=True))
            async with trio.open_nursery() as nursery:

                async def talk() -> None:
                    while True:
                        await listener.send_stdin(bytes(65536))

                async def listen() -> None:
                    while True:
                        await talker.receive()

                nursery.start_soon(talk)
                nursery.start_soon(listen)
                await guest.ping()
                taken = await rig.checkpoint(running)
                nursery.cancel_scope.cancel()
        clone = await rig.clone(taken)
        async with rig.guest(clone) as guest:
            assert (await run(guest, "echo", "awake")).end == ProcessExit(code=0)
