"""What a VMM promises about captures and clones.

Part of `noid.testing.vmm_conformance`.
"""

# ruff: noqa: D102, S108  # the names are the documentation; paths are the guest's
from __future__ import annotations

import hashlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from noid.errors import BackendError, NoSpace
from noid.testing.pace import slowness
from noid.testing.vmm_rig import Running, Taken, VmmRig, identity, run, ticks_within

AGE_SECS = 2.0 * slowness()
YEAR_SECS = 365 * 86400


def sha256(path: Path) -> str:
    """Return the digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fill(directory: Path) -> None:
    """Leave no byte of room."""
    with (directory / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            return


class CheckpointSpecification:
    """Captures and clones."""

    @pytest.fixture
    def full_disk(self, data_dir: Path) -> Iterator[Path]:
        """A directory with 64 KiB of room, of which a test fills as much as it likes with `fill`."""
        if os.geteuid() != 0:
            pytest.skip("mounting a small file system needs root")
        (directory := data_dir / "full").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "noid-test", directory], check=True)
        try:
            yield directory
        finally:
            subprocess.run(["umount", "-l", directory], check=True)

    async def test_a_capture_changes_nothing_for_its_source(self, rig: VmmRig) -> None:
        source = await rig.fresh()
        await rig.start_counter(source, "/dev/shm/n")
        await rig.write(source, "/dev/shm/memory", "in memory")
        await rig.write(source, "/root/disk", "on disk")
        before = await rig.count(source, "/dev/shm/n")

        for _ in range(2):
            await rig.checkpoint(source)

        assert await rig.read(source, "/dev/shm/memory", "/root/disk") == "in memoryon disk"
        await rig.count_beyond(source, "/dev/shm/n", before)
        assert await source.machine.disk_path() == rig.volume(source).path

    async def test_a_clone_wakes_where_its_checkpoint_was_taken(self, rig: VmmRig) -> None:
        source = await rig.fresh()
        await rig.start_counter(source, "/dev/shm/n")
        await rig.write(source, "/dev/shm/memory", "then")
        await rig.write(source, "/root/disk", "then")
        before = await rig.count(source, "/dev/shm/n")
        taken = await rig.checkpoint(source)
        after = await rig.count(source, "/dev/shm/n")
        await rig.write(source, "/dev/shm/memory", "later")
        await rig.write(source, "/root/disk", "later")
        await rig.count_beyond(source, "/dev/shm/n", after + 20)

        began = time.monotonic()
        clone = await rig.clone(taken)
        number = await rig.count(clone, "/dev/shm/n")

        assert before <= number <= after + ticks_within(time.monotonic() - began)
        assert await rig.read(clone, "/dev/shm/memory", "/root/disk") == "thenthen"
        await rig.count_beyond(clone, "/dev/shm/n", number)

    async def test_a_clones_timers_go_on_where_its_checkpoint_left_them(self, rig: VmmRig) -> None:
        source = await rig.fresh()
        taken = await rig.checkpoint(source)
        after = float((await rig.read(source, "/proc/uptime")).split()[0])
        await trio.sleep(AGE_SECS)  # what is measured, not waited for: a clone must miss this time

        began = time.monotonic()
        clone = await rig.clone(taken)
        uptime = float((await rig.read(clone, "/proc/uptime")).split()[0])

        assert uptime < after + time.monotonic() - began + AGE_SECS / 2

    async def test_a_clone_that_is_restored_paused_stands_at_its_checkpoint_until_it_is_resumed(
        self, rig: VmmRig
    ) -> None:
        source = await rig.fresh()
        await rig.start_counter(source, "/dev/shm/n")
        await rig.count_beyond(source, "/dev/shm/n", 0)
        taken = await rig.checkpoint(source)
        after = await rig.count(source, "/dev/shm/n")

        uptime = float((await rig.read(source, "/proc/uptime")).split()[0])
        clone = await rig.clone(taken, paused=True)
        await trio.sleep(AGE_SECS)  # what is measured, not waited for: a guest that ran would count
        began = time.monotonic()
        await clone.machine.resume()

        number = await rig.count(clone, "/dev/shm/n")
        assert number <= after + ticks_within(time.monotonic() - began)
        await rig.count_beyond(clone, "/dev/shm/n", number)
        seen = float((await rig.read(clone, "/proc/uptime")).split()[0])
        assert seen < uptime + time.monotonic() - began + AGE_SECS / 2

    async def test_clones_and_their_source_do_not_see_each_other(self, rig: VmmRig) -> None:
        source = await rig.fresh()
        taken = await rig.checkpoint(source)
        clones = []

        async def start() -> None:
            clones.append(await rig.clone(taken))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(start)
            nursery.start_soon(start)
        machines = [source, *clones]
        for number, machine in enumerate(machines):
            await rig.write(machine, "/dev/shm/own", f"memory {number}")
            await rig.write(machine, "/root/own", f"disk {number}")

        found = [await rig.read(machine, "/dev/shm/own", "/root/own") for machine in machines]
        assert found == ["memory 0disk 0", "memory 1disk 1", "memory 2disk 2"]

    async def test_nothing_that_happens_to_clones_touches_the_checkpoint(self, rig: VmmRig) -> None:
        source = await rig.fresh()
        taken = await rig.checkpoint(source)
        files = [taken.directory / "memory", taken.directory / "state", taken.disk.path]
        before = [sha256(file) for file in files]

        clone = await rig.clone(taken)
        await rig.write(clone, "/dev/shm/own", "x" * 1000)
        await rig.write(clone, "/root/own", "x" * 1000)
        await rig.run(clone, "sync")
        await rig.checkpoint(clone)
        await clone.machine.kill()
        await source.machine.kill()

        assert [sha256(file) for file in files] == before

    async def test_children_of_children_know_all_that_went_before(self, rig: VmmRig) -> None:
        machine = await rig.fresh()
        await rig.start_counter(machine, "/dev/shm/n")
        for generation in range(3):
            await rig.write(machine, f"/dev/shm/memory{generation}", f"m{generation}")
            await rig.write(machine, f"/root/disk{generation}", f"d{generation}")
            number = await rig.count(machine, "/dev/shm/n")
            taken = await rig.checkpoint(machine)
            await machine.machine.kill()
            machine = await rig.clone(taken)
            await rig.count_beyond(machine, "/dev/shm/n", number)

        paths = [path for g in range(3) for path in (f"/dev/shm/memory{g}", f"/root/disk{g}")]
        assert await rig.read(machine, *paths) == "m0d0m1d1m2d2"

    async def test_a_checkpoint_can_be_deleted_while_its_clones_run(self, rig: VmmRig) -> None:
        source = await rig.fresh()
        await rig.write(source, "/dev/shm/memory", "kept")
        taken = await rig.checkpoint(source)
        clone = await rig.clone(taken)

        for name in ("memory", "state"):
            (taken.directory / name).unlink()

        assert await rig.read(clone, "/dev/shm/memory") == "kept"
        again = await rig.clone(await rig.checkpoint(clone))
        assert await rig.read(again, "/dev/shm/memory") == "kept"

    async def test_waking_makes_each_clone_its_own_before_its_first_process(self, rig: VmmRig) -> None:
        taken = await rig.checkpoint(await rig.fresh())
        in_a_year_secs = int(time.time()) + YEAR_SECS
        uuids = set()
        for name in ("first", "second"):
            clone = await rig.clone(taken)
            who = identity(name, in_a_year_secs * 10**9)
            async with rig.guest(clone) as guest:
                woken = time.monotonic()
                receipt = await guest.wake(who)
                uuids.add((await run(guest, "cat", "/proc/sys/kernel/random/uuid")).stdout)
                now_secs = int((await run(guest, "date", "+%s")).stdout)
                names = (await run(guest, "cat", "/proc/sys/kernel/hostname", "/etc/machine-id")).stdout.decode()
            assert receipt.items
            assert receipt.complete, receipt
            assert 0 <= now_secs - in_a_year_secs <= time.monotonic() - woken + 1
            assert names.split() == [name, who.machine_id]
        assert len(uuids) == 2

    async def test_a_pause_can_be_prepared_and_never_come(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        for name in ("first", "second"):
            (into := rig.data_dir / name).mkdir()
            plan = await rig.storage.prepare_freeze(rig.volume(running), into)
            await running.machine.prepare_pause(plan.prepared)
            await rig.storage.abandon_freeze(plan, running.machine)

        await rig.write(running, "/root/disk", "still written")
        clone = await rig.clone(await rig.checkpoint(running))

        assert await rig.read(clone, "/root/disk") == "still written"

    async def test_a_capture_is_finished_once(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        (into := rig.data_dir / "once").mkdir()
        await running.machine.pause()
        capture = await running.machine.capture(into)
        await running.machine.resume()
        await capture.finish()

        with pytest.raises(BackendError):
            await capture.finish()
        capture.discard()

        assert (into / "memory").exists()
        assert (into / "state").exists()

    async def test_a_capture_can_be_finished_after_its_machine_has_ended(self, rig: VmmRig) -> None:
        source = await rig.fresh()
        await rig.write(source, "/dev/shm/memory", "last words")
        (into := rig.data_dir / "last").mkdir()
        (into / "disk").mkdir()
        prepared = await rig.storage.prepare_freeze(rig.volume(source), into / "disk")
        await source.machine.pause()
        capture = await source.machine.capture(into)
        disk = await rig.storage.freeze(prepared, source.machine)
        await source.machine.kill()
        await capture.finish()

        clone = await rig.clone(Taken(directory=into, disk=disk))
        assert await rig.read(clone, "/dev/shm/memory") == "last words"

    async def test_a_discarded_capture_leaves_the_machine_as_it_was(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        (into := rig.data_dir / "discarded").mkdir()
        await running.machine.pause()
        capture = await running.machine.capture(into)
        await running.machine.resume()

        capture.discard()
        capture.discard()

        assert not (into / "memory").exists()
        assert (await rig.run(running, "true")).status == 0
        await rig.checkpoint(running)

    async def test_a_capture_that_fails_leaves_a_machine_that_resumes_and_can_be_captured(self, rig: VmmRig) -> None:
        running = await rig.fresh()
        await running.machine.pause()

        with pytest.raises(BackendError):
            await captured(running, rig.data_dir / "missing")

        await running.machine.resume()
        assert (await rig.run(running, "true")).status == 0
        clone = await rig.clone(await rig.checkpoint(running))
        assert (await rig.run(clone, "true")).status == 0

    async def test_a_full_disk_fails_the_checkpoint_and_nothing_else(self, rig: VmmRig, full_disk: Path) -> None:
        running = await rig.fresh()
        fill(full_disk)
        await running.machine.pause()

        with pytest.raises(NoSpace):
            await captured(running, full_disk)

        await running.machine.resume()
        assert (await rig.run(running, "true")).status == 0
        await rig.checkpoint(running)

    async def test_a_disk_that_fills_up_fails_the_finish_and_nothing_else(self, rig: VmmRig, full_disk: Path) -> None:
        running = await rig.fresh()
        await running.machine.pause()
        capture = await running.machine.capture(full_disk)
        await running.machine.resume()
        fill(full_disk)

        with pytest.raises(NoSpace):
            await capture.finish()

        capture.discard()
        assert (await rig.run(running, "true")).status == 0
        await rig.checkpoint(running)


async def captured(running: Running, into: Path) -> None:
    """Capture a paused machine and finish that: a VMM may need *into* only then."""
    capture = await running.machine.capture(into)
    try:
        await capture.finish()
    finally:
        capture.discard()
