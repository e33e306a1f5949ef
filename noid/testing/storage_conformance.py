"""What a storage backend must do, as tests: subclass, give it a backend, run. The names are the specification.

::

    class TestMyStorage(StorageConformance):
        @pytest.fixture
        async def storage(self, place):
            async with open_storage(MyConfig(), AgentContext(data_dir=place, ...)) as storage:
                yield storage

The machine is a real QEMU without a machine: only its block layer, so that pivots, locks and unflushed writes are
those of a running VM, in 0.1 s and without a guest. Disks in layers, which a guest puts together, are put together by
blocks here: what is a hole in the top is the base's. So their top has to begin as nothing but a hole.
"""

# ruff: noqa: D102  the tests' names are their documentation

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from noid.core.backends import FreezePlan, Machine, StorageBackend
from noid.core.model.storage import FrozenDisk, Volume
from noid.errors import BackendError, Damaged
from noid.hostfs import next_data

MIB = 1 << 20
DISK_MIB = 64
BLOCK_BYTES = 65536
WAIT_SECS = 30

# What the image holds: a block of each value at this offset, and holes around them.
OLD, OLD_AT = 0x11, 0
FAR, FAR_AT = 0x22, 40 * MIB
NEW, NEW_AT = 0x33, 8 * MIB
LATER = 0x44


class DiskMachine:
    """The disk of a running VM: QEMU's block layer, driven over QMP. Fulfils the part of `Machine` storage may use."""

    def __init__(self, process: subprocess.Popen[bytes], volume: Volume) -> None:
        if process.stdin is None or process.stdout is None:
            raise ValueError("the process needs pipes")
        self._stdin, self._stdout = process.stdin, process.stdout
        self._path = volume.path
        self._base_path = volume.base_path
        self._node = "d0"

    async def pivot_disk(self, new_top: Path, format: str) -> None:
        """Make *new_top* the layer that is written; on error nothing has changed."""
        node = f"d{int(self._node[1:]) + 1}"
        await self.command(
            "blockdev-add",
            {
                "node-name": node,
                "driver": format,
                "backing": None,
                "file": {"driver": "file", "filename": str(new_top)},
            },
        )
        await self.command("blockdev-snapshot", {"node": self._node, "overlay": node})
        self._node, self._path = node, new_top

    async def disk_path(self) -> Path:
        """Return the file that is written."""
        await trio.lowlevel.checkpoint()
        return self._path

    async def write(self, offset: int, value: int) -> None:
        """Fill the block at *offset* with *value*, without flushing it."""
        words = await self._qemu_io(f"write -P {value} {offset} {BLOCK_BYTES}")
        if f"wrote {BLOCK_BYTES}/" not in words:
            raise BackendError(f"the write failed: {words}")

    async def holds(self, offset: int, value: int) -> bool:
        """Return whether the block at *offset* is filled with *value*."""
        node = None if self._base_path is None or _is_written(self._path, offset) else "base"
        words = await self._qemu_io(f"read -P {value} {offset} {BLOCK_BYTES}", node)
        if f"read {BLOCK_BYTES}/" not in words:
            raise BackendError(f"the read failed: {words}")
        return "Pattern verification failed" not in words

    async def command(self, name: str, arguments: dict[str, Any] | None = None) -> str:
        """Run a QMP command and return what it printed.

        Raises:
            BackendError: QEMU's own words.
        """
        request = json.dumps({"execute": name, "arguments": arguments or {}}).encode() + b"\n"

        def converse() -> str:
            printed = b""
            self._stdin.write(request)
            self._stdin.flush()
            while line := self._stdout.readline():
                if not line.startswith(b"{"):  # qemu-io prints to stdout, where the monitor also is
                    printed += line
                    continue
                answer: dict[str, Any] = json.loads(line)
                if "error" in answer:
                    raise BackendError(f"{name}: {answer['error']['desc']}")
                if "return" in answer:
                    return printed.decode()
            raise BackendError("QEMU is gone.")

        with trio.fail_after(WAIT_SECS):
            return await trio.to_thread.run_sync(converse, abandon_on_cancel=True)

    async def _qemu_io(self, command: str, node: str | None = None) -> str:
        line = f'qemu-io {node or self._node} "{command}"'
        return await self.command("human-monitor-command", {"command-line": line})


@contextlib.asynccontextmanager
async def disk_machine(volume: Volume) -> AsyncIterator[DiskMachine]:
    """Run a `DiskMachine` on *volume*; it is gone afterwards, also when the test process dies."""
    process = _start_qemu(volume)
    with process:
        try:
            machine = DiskMachine(process, volume)
            await machine.command("qmp_capabilities")
            yield machine
        finally:
            process.kill()


def _start_qemu(volume: Volume) -> subprocess.Popen[bytes]:
    """Start it from this, the main, thread: pdeathsig is about the thread that forked, and trio's end when idle."""
    program = f"qemu-system-{platform.machine()}"
    for needed in (program, "setpriv", "stdbuf"):
        if shutil.which(needed) is None:
            pytest.skip(f"the program {needed} is not installed")
    base = volume.base_path
    form = volume.format if base is None else "raw"
    disks: list[dict[str, Any]] = [
        {"node-name": "d0", "driver": form, "file": {"driver": "file", "filename": str(volume.path)}}
    ]
    if base is not None:
        file = {"driver": "file", "filename": str(base)}
        disks.append({"node-name": "base", "driver": "raw", "read-only": True, "file": file})
    return subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "stdbuf", "-oL", program, "-machine", "none", "-nodefaults",
         "-display", "none", "-S", "-qmp", "stdio",
         *(part for disk in disks for part in ("-blockdev", json.dumps(disk)))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )  # fmt: skip


def disk_holds(disk: Volume | FrozenDisk, offset: int, value: int) -> bool:
    """Return whether the block at *offset* of a disk no machine writes to is filled with *value*."""
    base = disk.base_path
    path = disk.path if base is None or _is_written(disk.path, offset) else base
    form = disk.format if base is None else "raw"
    done = subprocess.run(
        ["qemu-io", "-r", "-f", form, "-c", f"read -P {value} {offset} {BLOCK_BYTES}", str(path)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if f"read {BLOCK_BYTES}/" not in done.stdout:
        raise BackendError(f"reading {path} failed: {done.stdout}{done.stderr}")
    return "Pattern verification failed" not in done.stdout


def _is_written(top: Path, offset: int) -> bool:
    """Return whether the block at *offset* of a disk in layers is the top's: here the guest is a rule as simple."""
    with top.open("rb") as file:
        found = next_data(file.fileno(), offset, file.seek(0, os.SEEK_END))
    return found is not None and found[0] < offset + BLOCK_BYTES


def make_image(directory: Path) -> FrozenDisk:
    """Make a raw disk of `DISK_MIB`, mostly holes, with `OLD` and `FAR` in it."""
    directory.mkdir()
    with (directory / "rootfs.raw").open("xb") as file:
        for value, offset in ((OLD, OLD_AT), (FAR, FAR_AT)):
            file.seek(offset)
            file.write(bytes([value]) * BLOCK_BYTES)
        file.truncate(DISK_MIB * MIB)
    return FrozenDisk(directory=directory, format="raw", top="rootfs.raw", files=("rootfs.raw",))


async def freeze_now(storage: StorageBackend, volume: Volume, into: Path, machine: DiskMachine | None) -> FrozenDisk:
    """Prepare and freeze, as a checkpoint does."""
    plan = await storage.prepare_freeze(volume, _made(into))
    return await storage.freeze(plan, as_machine(machine))


def as_machine(machine: DiskMachine | None) -> Machine | None:
    """Return *machine* as what storage backends are given."""
    return cast("Machine | None", machine)  # storage may call pivot_disk and disk_path, and nothing else


class StorageConformance:
    """Subclass it as ``Test...`` and override `storage`, and `place` to choose the filesystem."""

    @pytest.fixture
    async def storage(self, place: Path) -> AsyncIterator[StorageBackend]:
        """The backend under test, opened."""
        raise NotImplementedError("override the fixture `storage`")
        yield  # noqa: PT022  this makes it what an override is: a generator

    @pytest.fixture
    def place(self, tmp_path: Path) -> Path:
        """An empty directory on the filesystem under test."""
        return tmp_path

    @pytest.fixture
    def image(self, place: Path) -> FrozenDisk:
        """An image's root filesystem."""
        if shutil.which("qemu-io") is None:
            pytest.skip("the program qemu-io is not installed (package qemu-utils)")
        return make_image(place / "image")

    @pytest.fixture
    async def volume(self, storage: StorageBackend, image: FrozenDisk, place: Path) -> Volume:
        """A VM's disk, cloned from the image."""
        return await storage.clone(image, _made(place / "vm"))

    async def test_a_clone_begins_as_its_source(
        self, storage: StorageBackend, volume: Volume, image: FrozenDisk
    ) -> None:
        assert volume.format == storage.features.format
        assert disk_holds(volume, OLD_AT, OLD)
        assert disk_holds(volume, FAR_AT, FAR)
        assert disk_holds(volume, NEW_AT, 0)

    async def test_a_source_may_be_deleted_once_it_was_cloned(
        self, storage: StorageBackend, volume: Volume, image: FrozenDisk
    ) -> None:
        shutil.rmtree(image.directory)
        async with disk_machine(volume) as machine:
            assert await machine.holds(FAR_AT, FAR)

    async def test_writing_to_a_clone_changes_neither_its_source_nor_a_sibling(
        self, storage: StorageBackend, volume: Volume, image: FrozenDisk, place: Path
    ) -> None:
        sibling = await storage.clone(image, _made(place / "sibling"))
        async with disk_machine(volume) as machine, disk_machine(sibling) as other:
            await machine.write(OLD_AT, NEW)
            assert await machine.holds(OLD_AT, NEW)
            assert await other.holds(OLD_AT, OLD)
        assert disk_holds(image, OLD_AT, OLD)

    async def test_a_freeze_is_the_disk_at_that_instant_with_all_that_was_not_flushed(
        self, storage: StorageBackend, volume: Volume, place: Path
    ) -> None:
        async with disk_machine(volume) as machine:
            await machine.write(NEW_AT, NEW)
            frozen = await freeze_now(storage, volume, place / "checkpoint", machine)
            await machine.write(NEW_AT, LATER)
            await machine.write(OLD_AT, LATER)
            clone = await storage.clone(frozen, _made(place / "clone"))
            async with disk_machine(clone) as woken:
                assert await woken.holds(NEW_AT, NEW)
                assert await woken.holds(OLD_AT, OLD)
                assert await woken.holds(FAR_AT, FAR)
            assert await machine.holds(NEW_AT, LATER)
            assert await machine.holds(OLD_AT, LATER)
            assert await machine.holds(FAR_AT, FAR)

    async def test_a_freeze_that_claims_to_be_constant_occupies_nothing_of_its_own(
        self, storage: StorageBackend, volume: Volume, place: Path
    ) -> None:
        async with disk_machine(volume) as machine:
            for block in range(64):
                await machine.write(NEW_AT + block * BLOCK_BYTES, NEW)
            frozen = await freeze_now(storage, volume, place / "checkpoint", machine)
            usage = await storage.usage(frozen)
        if storage.features.freeze_is_constant:
            assert usage.unique_bytes == 0
            assert usage.shared_bytes >= 64 * BLOCK_BYTES
        else:
            assert usage.unique_bytes >= 64 * BLOCK_BYTES

    async def test_children_of_children_see_what_each_generation_wrote(
        self, storage: StorageBackend, volume: Volume, place: Path
    ) -> None:
        for generation in range(1, 5):
            async with disk_machine(volume) as machine:
                await machine.write(NEW_AT + generation * BLOCK_BYTES, generation)
                frozen = await freeze_now(storage, volume, place / f"checkpoint{generation}", machine)
            await storage.delete(storage.volume(volume.directory))
            volume = await storage.clone(frozen, _made(place / f"child{generation}"))
            await storage.delete(frozen)
        async with disk_machine(volume) as machine:
            for generation in range(1, 5):
                assert await machine.holds(NEW_AT + generation * BLOCK_BYTES, generation)
            assert await machine.holds(FAR_AT, FAR)

    async def test_a_machine_can_be_frozen_again_and_again(
        self, storage: StorageBackend, volume: Volume, place: Path
    ) -> None:
        frozen = []
        async with disk_machine(volume) as machine:
            for value in range(1, 5):
                await machine.write(NEW_AT, value)
                volume = storage.volume(volume.directory)
                frozen.append(await freeze_now(storage, volume, place / f"checkpoint{value}", machine))
        for value, disk in enumerate(frozen, 1):
            assert disk_holds(disk, NEW_AT, value)

    async def test_a_disk_nobody_runs_can_be_frozen(self, storage: StorageBackend, volume: Volume, place: Path) -> None:
        async with disk_machine(volume) as machine:
            await machine.write(NEW_AT, NEW)
            await machine.command("quit")
        frozen = await freeze_now(storage, volume, place / "checkpoint", None)
        async with disk_machine(storage.volume(volume.directory)) as machine:
            assert await machine.holds(NEW_AT, NEW)
            await machine.write(NEW_AT, LATER)
        assert disk_holds(frozen, NEW_AT, NEW)

    async def test_a_machine_goes_on_after_its_freeze_was_abandoned(
        self, storage: StorageBackend, volume: Volume, place: Path
    ) -> None:
        async with disk_machine(volume) as machine:
            plan = await storage.prepare_freeze(volume, _made(place / "checkpoint"))
            await machine.write(NEW_AT, NEW)
            await storage.abandon_freeze(plan, as_machine(machine))
            await storage.abandon_freeze(plan, as_machine(machine))
            shutil.rmtree(plan.into)
            again = await freeze_now(storage, storage.volume(volume.directory), place / "again", machine)
            assert await machine.holds(NEW_AT, NEW)
        assert disk_holds(again, NEW_AT, NEW)

    async def test_abandoning_a_freeze_that_has_happened_loses_nothing(
        self, storage: StorageBackend, volume: Volume, place: Path
    ) -> None:
        async with disk_machine(volume) as machine:
            plan, frozen = await _frozen_by_plan(storage, volume, place, machine)
            await machine.write(NEW_AT, NEW)
            await storage.abandon_freeze(plan, as_machine(machine))
            assert await machine.holds(NEW_AT, NEW)
            await machine.command("quit")
        assert disk_holds(storage.volume(volume.directory), NEW_AT, NEW)
        assert disk_holds(frozen, OLD_AT, OLD)

    async def test_abandoning_without_knowing_the_machine_loses_nothing(
        self, storage: StorageBackend, volume: Volume, place: Path
    ) -> None:
        async with disk_machine(volume) as machine:
            plan, _ = await _frozen_by_plan(storage, volume, place, machine)
            await machine.write(NEW_AT, NEW)
            await storage.abandon_freeze(plan, None)
            assert await machine.holds(NEW_AT, NEW)
            await machine.command("quit")
        assert disk_holds(storage.volume(volume.directory), NEW_AT, NEW)

    async def test_a_freeze_forgotten_by_a_crash_does_not_stop_the_next(
        self, storage: StorageBackend, volume: Volume, place: Path
    ) -> None:
        async with disk_machine(volume) as machine:
            forgotten = await storage.prepare_freeze(volume, _made(place / "forgotten"))
            await machine.write(NEW_AT, NEW)
            await storage.abandon_freeze(forgotten, None)
            frozen = await freeze_now(storage, storage.volume(volume.directory), place / "checkpoint", machine)
            await machine.write(NEW_AT, LATER)
            await machine.command("quit")
        assert disk_holds(frozen, NEW_AT, NEW)
        assert disk_holds(storage.volume(volume.directory), NEW_AT, LATER)

    async def test_deleting_twice_does_nothing_and_relatives_stay_whole(
        self, storage: StorageBackend, volume: Volume, place: Path
    ) -> None:
        async with disk_machine(volume) as machine:
            await machine.write(NEW_AT, NEW)
            frozen = await freeze_now(storage, volume, place / "checkpoint", machine)
        clone = await storage.clone(frozen, _made(place / "clone"))
        for thing in (storage.volume(volume.directory), frozen):
            await storage.delete(thing)
            await storage.delete(thing)
            assert list(thing.directory.iterdir()) == []
        assert disk_holds(clone, NEW_AT, NEW)
        assert disk_holds(clone, FAR_AT, FAR)

    async def test_the_only_owner_of_data_would_free_it(
        self, storage: StorageBackend, volume: Volume, image: FrozenDisk
    ) -> None:
        shutil.rmtree(image.directory)
        async with disk_machine(volume) as machine:
            await machine.write(NEW_AT, NEW)
            await machine.command("quit")
        usage = await storage.usage(volume)
        assert usage.unique_bytes >= 3 * BLOCK_BYTES
        assert usage.shared_bytes == 0

    async def test_a_directory_without_a_disk_is_damaged_and_the_message_names_it(
        self, storage: StorageBackend, place: Path
    ) -> None:
        with pytest.raises(Damaged, match="nothing-here"):
            storage.volume(_made(place / "nothing-here"))

    async def test_what_a_cancelled_clone_left_can_be_deleted(
        self, storage: StorageBackend, image: FrozenDisk, place: Path
    ) -> None:
        into = _made(place / "vm")
        with trio.move_on_after(0):
            await storage.clone(image, into)
        shutil.rmtree(into)
        assert disk_holds(image, OLD_AT, OLD)


async def _frozen_by_plan(
    storage: StorageBackend, volume: Volume, place: Path, machine: DiskMachine
) -> tuple[FreezePlan, FrozenDisk]:
    plan = await storage.prepare_freeze(volume, _made(place / "checkpoint"))
    return plan, await storage.freeze(plan, as_machine(machine))


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory
