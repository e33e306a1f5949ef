"""What is special about QEMU's machines: memory byte for byte, layers of a live disk, locks, ends, strangers."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
from pathlib import Path

import pytest
import trio
import trio.testing
from noid_vmm_qemu.backend import QemuBackend
from noid_vmm_qemu.command_line import CMPXCHG16B_SINCE
from noid_vmm_qemu.pagemap import private_mappings, read_memory

from noid.core.model.processes import ExecRequest
from noid.core.model.storage import FrozenDisk, Volume
from noid.errors import BackendError, Conflict, DependencyDown, Incompatible, NoidError, NoSpace
from noid.testing.vmm_rig import ANSWER_SECS, Running, Taken, VmmRig, run

pytestmark = pytest.mark.vm


def memory_of(running: Running) -> bytes:
    """Return all of the guest's memory, as its process sees it."""
    parts = []
    for mapping in private_mappings(running.machine.ref.pid, running.memory.stat().st_ino):
        buffer = bytearray(mapping.end - mapping.start)
        read_memory(running.machine.ref.pid, [(mapping.start, len(buffer))], memoryview(buffer))
        parts.append((mapping.offset, bytes(buffer)))
    return b"".join(part for _, part in sorted(parts))


def layers(directory: Path, image: Path) -> Volume:
    """Make a volume of one qcow2 layer over a copy of *image*, with relative names."""
    directory.mkdir()
    (directory / "base.raw").write_bytes(image.read_bytes())
    layer(directory, "l1", "base.raw", "raw")
    return Volume(directory=directory, format="qcow2", top="l1.qcow2", files=("base.raw", "l1.qcow2"))


def layer(directory: Path, name: str, below: str, below_format: str = "qcow2") -> Path:
    top = directory / f"{name}.qcow2"
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", below_format, top]
    subprocess.run(argv, check=True, capture_output=True)
    return top


async def test_the_image_of_each_generation_is_the_paused_guests_memory_byte_for_byte(rig: VmmRig) -> None:
    running = await rig.fresh()
    for generation in range(3):
        await rig.write(running, f"/dev/shm/{generation}", "x" * 500_000)
        into = rig.data_dir / f"generation{generation}"
        (into / "disk").mkdir(parents=True)
        prepared = await rig.storage.prepare_freeze(rig.volume(running), into / "disk")

        await running.machine.pause()
        capture = await running.machine.capture(into)
        disk = await rig.storage.freeze(prepared, running.machine)
        seen = memory_of(running)
        await running.machine.resume()
        await capture.finish()

        assert (into / "memory").read_bytes() == seen  # tests may block
        assert 500_000 < capture.changed_bytes < len(seen) // 2
        await running.machine.kill()
        running = await rig.clone(Taken(directory=into, disk=disk))
    assert await rig.read(running, "/dev/shm/0", "/dev/shm/1", "/dev/shm/2") == "x" * 1_500_000


async def test_what_is_sent_to_a_paused_guest_stays_out_of_its_memory_until_it_goes_on(rig: VmmRig) -> None:
    """Otherwise the devices of a checkpoint and its memory, read a moment later, would contradict each other."""
    running = await rig.fresh()
    stream = await running.machine.channel()
    await running.machine.pause()
    before = memory_of(running)

    await stream.send_all(b"~" * 40_000)
    for _ in range(20):  # each answer is a turn of QEMU's loop
        await running.machine.disk_path()
    assert memory_of(running) == before
    await stream.aclose()
    for _ in range(20):
        await running.machine.disk_path()
    assert memory_of(running) == before

    await running.machine.resume()

    assert (await rig.run(running, "true")).status == 0


async def test_a_checkpoint_while_stdin_pours_in_can_be_continued(rig: VmmRig) -> None:
    running = await rig.fresh()
    taken: list[Taken] = []
    async with rig.guest(running) as guest:
        process = await guest.start(ExecRequest(argv=("sh", "-c", "cat >/dev/null"), stdin=True))
        async with trio.open_nursery() as nursery:

            async def pour() -> None:
                while True:
                    await process.send_stdin(os.urandom(100_000))

            nursery.start_soon(pour)
            taken = [await rig.checkpoint(running) for _ in range(4)]
            nursery.cancel_scope.cancel()
        await guest.release(process)

    for checkpoint in taken:
        clone = await rig.clone(checkpoint)
        assert (await rig.run(clone, "true")).status == 0
        await clone.machine.kill()


async def test_checkpoints_under_write_load_have_disks_without_errors(rig: VmmRig) -> None:
    running = await rig.fresh()
    script = 'i=0; while :; do i=$((i+1)); echo "line $i" >>/root/log; sync; echo $i >/dev/shm/n; done'
    async with rig.guest(running) as guest:
        await guest.start(ExecRequest(argv=("sh", "-c", script)))
    for _ in range(2):
        await rig.count_beyond(running, "/dev/shm/n", await rig.count(running, "/dev/shm/n") + 3)
        clone = await rig.clone(await rig.checkpoint(running))

        synced = await rig.count(clone, "/dev/shm/n")
        lines = (await rig.read(clone, "/root/log")).splitlines()

        assert lines[:synced] == [f"line {number}" for number in range(1, synced + 1)]
        await rig.count_beyond(clone, "/dev/shm/n", synced)
        await clone.machine.kill()


async def test_a_live_disk_moves_from_layer_to_layer_and_each_layer_stays_a_whole_disk(rig: VmmRig) -> None:
    plan = dataclasses.replace(await rig.launch_plan(), volume=layers(rig.data_dir / "layers", rig.image.rootfs))
    directory = plan.volume.directory
    running = await rig.launch(plan)
    frozen: list[Taken] = []
    for number in (2, 3, 4):
        await rig.write(running, f"/root/{number}", str(number))
        top = layer(directory, f"l{number}", f"l{number - 1}.qcow2")
        (into := rig.data_dir / f"c{number}").mkdir()

        await running.machine.pause()
        capture = await running.machine.capture(into)
        await running.machine.pivot_disk(top, "qcow2")
        await running.machine.resume()
        await capture.finish()

        assert await running.machine.disk_path() == top
        disk = FrozenDisk(directory=directory, format="qcow2", top=f"l{number - 1}.qcow2", files=())
        frozen.append(Taken(directory=into, disk=disk))
    assert await rig.read(running, "/root/2", "/root/3", "/root/4") == "234"
    adopted = await rig.adopt(dataclasses.replace(running, plan=plan))
    assert await adopted.machine.disk_path() == directory / "l4.qcow2"

    header = subprocess.run(  # noqa: ASYNC221  # tests may block
        ["qemu-img", "info", "-U", directory / "l4.qcow2"], check=True, capture_output=True, text=True
    ).stdout
    assert "backing file: l3.qcow2 (" in header
    restore = await rig.restore_plan(dataclasses.replace(frozen[1], disk=_raw_root(rig)))
    own = layer(directory, "own", "l2.qcow2")
    volume = dataclasses.replace(plan.volume, top=own.name)
    machine = await rig.vmm.restore(dataclasses.replace(restore, volume=volume))
    try:
        clone = Running(machine=machine, plan=restore)
        assert await rig.read(clone, "/root/2", "/root/3") == "23"
        assert (await rig.run(clone, "cat", "/root/4")).status != 0
    finally:
        await machine.kill()
        await machine.aclose()


async def test_a_pivot_that_fails_leaves_the_disk_where_it_was(rig: VmmRig) -> None:
    running = await rig.fresh()
    before = await running.machine.disk_path()
    await running.machine.pause()

    with pytest.raises(BackendError, match="No such file"):
        await running.machine.pivot_disk(rig.data_dir / "missing.qcow2", "qcow2")

    await running.machine.resume()
    assert await running.machine.disk_path() == before
    await rig.write(running, "/root/after", "written")


async def test_a_clone_whose_disk_is_in_use_fails_at_once_with_qemus_words(rig: VmmRig) -> None:
    running = await rig.fresh()
    taken = await rig.checkpoint(running)
    plan = dataclasses.replace(await rig.restore_plan(taken), volume=running.plan.volume)

    with trio.fail_after(ANSWER_SECS), pytest.raises(BackendError, match='Failed to get "write" lock'):
        await rig.vmm.restore(plan)

    assert set(rig.processes()) == {running.machine.ref.pid}


async def test_a_clone_that_cannot_start_on_a_full_disk_is_told_as_that(
    rig: VmmRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await rig.fresh()
    taken = await rig.checkpoint(running)
    plan = dataclasses.replace(await rig.restore_plan(taken), volume=running.plan.volume)  # QEMU will not start
    monkeypatch.setattr("noid_vmm_qemu.backend.free_bytes", lambda path: 0)

    with trio.fail_after(ANSWER_SECS), pytest.raises(NoSpace, match=r"is full\. Free space there"):
        await rig.vmm.restore(plan)

    assert set(rig.processes()) == {running.machine.ref.pid}


async def test_a_process_killed_in_the_middle_of_a_capture_fails_it_and_nothing_hangs(rig: VmmRig) -> None:
    running = await rig.fresh()
    (into := rig.data_dir / "c").mkdir()
    await running.machine.pause()
    os.kill(running.machine.ref.pid, signal.SIGSTOP)

    with trio.fail_after(ANSWER_SECS):
        async with trio.open_nursery() as nursery:

            async def capture() -> None:
                with pytest.raises(NoidError):
                    await running.machine.capture(into)

            nursery.start_soon(capture)
            await trio.testing.wait_all_tasks_blocked()
            os.kill(running.machine.ref.pid, signal.SIGKILL)
        assert (await running.machine.wait()).reason == "killed"
        with pytest.raises(DependencyDown):
            await running.machine.resume()


async def test_a_running_machine_is_not_captured(rig: VmmRig) -> None:
    running = await rig.fresh()
    (into := rig.data_dir / "c").mkdir()

    with pytest.raises(BackendError, match="not paused"):
        await running.machine.capture(into)


async def test_a_guests_kernel_does_without_the_instruction_whose_flags_its_qemu_gets_wrong(rig: VmmRig) -> None:
    host = rig.vmm.host if isinstance(rig.vmm, QemuBackend) else None
    if host is None or host.accelerator == "kvm" or host.version[:2] >= CMPXCHG16B_SINCE:
        pytest.skip("needs a QEMU before 8.0 that emulates")
    assert "cx16" not in (await rig.read(await rig.fresh(), "/proc/cpuinfo")).split()


async def test_a_guest_that_reboots_ends_as_reset(rig: VmmRig) -> None:
    running = await rig.fresh()
    async with rig.guest(running) as guest:
        await guest.start(ExecRequest(argv=("sh", "-c", "echo b >/proc/sysrq-trigger")))
        with trio.fail_after(ANSWER_SECS):
            end = await running.machine.wait()

    assert end.reason == "reset"


async def test_a_second_connection_to_the_channel_is_refused_until_the_first_is_closed(rig: VmmRig) -> None:
    running = await rig.fresh()
    first = await running.machine.channel()

    with pytest.raises(Conflict):
        await running.machine.channel()

    await first.aclose()
    assert (await rig.run(running, "true")).status == 0


async def test_a_machine_of_another_qemu_lives_on_but_makes_no_checkpoints(rig: VmmRig) -> None:
    """As after an upgrade: its checkpoint would carry the new version's fingerprint and be a lie."""
    running = await rig.fresh()
    assert isinstance(rig.vmm, QemuBackend)
    newer = QemuBackend(dataclasses.replace(rig.vmm.host, version=(7, 2, 999)))
    await running.machine.aclose()
    machine = await newer.adopt(running.machine.ref, running.plan, running.memory)
    try:
        assert (await rig.run(Running(machine=machine, plan=running.plan), "true")).status == 0
        await machine.pause()
        with pytest.raises(Incompatible, match="version"):
            await machine.capture(rig.data_dir)
        await machine.resume()

        with pytest.raises(BackendError, match="Restart noid-server"):
            await newer.launch(await rig.launch_plan())
        assert set(rig.processes()) == {machine.ref.pid}
    finally:
        await machine.kill()
        await machine.aclose()


async def test_the_guests_console_is_kept_and_qemu_has_nothing_to_complain_about(rig: VmmRig) -> None:
    running = await rig.launch()
    async with rig.guest(running) as guest:
        assert (await run(guest, "sh", "-c", "echo seen on the console >/dev/ttyS0")).status == 0

    assert "seen on the console" in (running.plan.directory / "serial.log").read_text()
    assert (running.plan.directory / "vmm.log").read_text() == ""


def _raw_root(rig: VmmRig) -> FrozenDisk:
    root = rig.image.rootfs
    return FrozenDisk(directory=root.parent, format="raw", top=root.name, files=(root.name,))
