"""Chains of layers: what a clone copies (nothing), how deep they get, and what a missing or forgotten layer does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import noid_storage_overlay
import pytest
from noid_storage_overlay import backend, layers
from noid_storage_overlay.backend import OverlayStorage

from noid.core.backends import AgentContext, StorageBackend
from noid.core.model.storage import FrozenDisk, Volume
from noid.errors import BackendError, Conflict, Damaged, DependencyDown
from noid.hostfs import sparse_copy
from noid.rawdisk import link_or_copy
from noid.testing.storage_conformance import (
    FAR,
    FAR_AT,
    LATER,
    NEW,
    NEW_AT,
    OLD,
    OLD_AT,
    DiskMachine,
    as_machine,
    disk_holds,
    disk_machine,
    freeze_now,
    make_image,
)

MIB = 1 << 20
BLOCK_BYTES = 65536
EMPTY_LAYER_BYTES_MAX = 16384


@pytest.fixture
def place(filesystem: Callable[[str], Path]) -> Path:
    return filesystem("ext4")


@pytest.fixture
async def storage(place: Path) -> AsyncIterator[StorageBackend]:
    context = AgentContext(data_dir=place, run_dir=place, database=place / "noid.db")
    async with noid_storage_overlay.open_storage(noid_storage_overlay.OverlayConfig(), context) as storage:
        yield storage


@pytest.fixture
def image(place: Path) -> FrozenDisk:
    return make_image(place / "image")


def made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def own_bytes(directory: Path) -> int:
    """What no other directory has a name for."""
    return sum(f.stat().st_blocks * 512 for f in directory.iterdir() if f.stat().st_nlink == 1)


def checked(disk: Volume | FrozenDisk) -> None:
    """Let QEMU check every layer and the way through all of them."""
    for name in disk.files:
        if name.endswith(".qcow2"):
            subprocess.run(["qemu-img", "check", "-q", str(disk.directory / name)], check=True)
    done = subprocess.run(
        ["qemu-img", "info", "--backing-chain", "--output=json", str(disk.path)], check=True, capture_output=True
    )
    chain = json.loads(done.stdout)
    assert [Path(layer["filename"]).name for layer in chain] == list(reversed(disk.files))
    assert [layer.get("backing-filename") for layer in chain] == [*reversed(disk.files[:-1]), None]


async def grown(storage: StorageBackend, volume: Volume, place: Path, count: int) -> FrozenDisk:
    """Freeze *volume* *count* times, each time after the block of that number was written; return the last."""
    for number in range(1, count + 1):
        async with disk_machine(volume) as machine:
            await machine.write(NEW_AT + number * BLOCK_BYTES, number)
            frozen = await freeze_now(storage, volume, place / f"checkpoint{number}", machine)
        volume = storage.volume(volume.directory)
    return frozen


@pytest.mark.parametrize("size_bytes", [512, 1000, MIB, (512 * MIB) - 512, 512 * MIB, 512 * MIB + 512, 5 << 40])
def test_an_empty_layer_is_what_qemu_img_would_have_made(tmp_path: Path, size_bytes: int) -> None:
    base = layers.Layer(depth=0, name="disk-0000-00000000.raw")
    with (tmp_path / base.name).open("xb") as file:
        file.truncate(size_bytes)
    ours = tmp_path / layers.new_name(1)
    layers.write_empty_layer(ours, base, size_bytes)
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base.name, "-F", "raw", str(tmp_path / "theirs")], check=True
    )
    subprocess.run(["qemu-img", "check", "-q", str(ours)], check=True)
    told = [
        json.loads(
            subprocess.run(["qemu-img", "info", "--output=json", str(path)], check=True, capture_output=True).stdout
        )
        for path in (ours, tmp_path / "theirs")
    ]
    for key in ("virtual-size", "cluster-size", "backing-filename", "backing-filename-format", "format", "dirty-flag"):
        assert told[0][key] == told[1][key]
    assert layers.virtual_bytes(ours) == told[1]["virtual-size"]
    assert ours.stat().st_blocks * 512 <= EMPTY_LAYER_BYTES_MAX


async def test_clones_on_ext4_copy_no_byte_of_the_disk(storage: StorageBackend, image: FrozenDisk, place: Path) -> None:
    volume = await storage.clone(image, made(place / "vm"))
    frozen = await grown(storage, volume, place, 3)
    for number in range(3):
        clone = await storage.clone(frozen, made(place / f"clone{number}"))
        assert own_bytes(clone.directory) <= EMPTY_LAYER_BYTES_MAX
        checked(clone)
    assert own_bytes(volume.directory) <= EMPTY_LAYER_BYTES_MAX
    assert (volume.directory / volume.files[0]).samefile(image.path)
    assert (clone.directory / volume.files[0]).samefile(image.path)


async def test_a_checkpoint_may_be_moved_to_another_place_whole(
    storage: StorageBackend, image: FrozenDisk, place: Path, tmp_path: Path
) -> None:
    frozen = await grown(storage, await storage.clone(image, made(place / "vm")), place, 2)
    moved = made(tmp_path / "elsewhere")
    for name in frozen.files:
        sparse_copy(frozen.path.with_name(name), moved / name)
    shutil.rmtree(place / "vm")
    elsewhere = FrozenDisk(directory=moved, format=frozen.format, top=frozen.top, files=frozen.files)
    clone = await storage.clone(elsewhere, made(place / "clone"))  # from another filesystem: copied, not linked
    checked(clone)
    assert disk_holds(clone, NEW_AT + BLOCK_BYTES, 1)
    assert disk_holds(clone, FAR_AT, FAR)


async def test_a_clone_of_a_deep_chain_is_flat_and_holds_what_every_layer_held(
    storage: StorageBackend, image: FrozenDisk, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "CLONE_DEPTH_MAX", 4)
    frozen = await grown(storage, await storage.clone(image, made(place / "vm")), place, 5)
    assert len(frozen.files) == 6
    clone = await storage.clone(frozen, made(place / "clone"))
    assert len(clone.files) == 2
    checked(clone)
    for number in range(1, 6):
        assert disk_holds(clone, NEW_AT + number * BLOCK_BYTES, number)
    assert disk_holds(clone, OLD_AT, OLD)
    assert disk_holds(clone, FAR_AT, FAR)
    assert own_bytes(clone.directory) <= 5 * BLOCK_BYTES + 8 * BLOCK_BYTES  # what was written, and qcow2's own tables
    again = await grown(storage, clone, made(place / "of-clone"), 1)
    assert disk_holds(again, NEW_AT + 5 * BLOCK_BYTES, 5)


async def test_a_deep_chain_without_qemu_img_says_which_package_to_install(
    storage: StorageBackend, image: FrozenDisk, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "CLONE_DEPTH_MAX", 1)
    frozen = await grown(storage, await storage.clone(image, made(place / "vm")), place, 1)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(DependencyDown, match="qemu-utils"):
        await storage.clone(frozen, made(place / "clone"))


async def test_a_vm_that_was_frozen_too_often_is_told_to_restore_and_goes_on(
    storage: StorageBackend, image: FrozenDisk, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "DEPTH_MAX", 2)
    volume = await storage.clone(image, made(place / "vm"))
    await grown(storage, volume, place, 1)
    async with disk_machine(storage.volume(volume.directory)) as machine:
        with pytest.raises(Conflict, match="Restore it in place"):
            await storage.prepare_freeze(volume, made(place / "one-more"))
        await machine.write(NEW_AT, NEW)
        assert await machine.holds(NEW_AT, NEW)
    assert list((place / "one-more").iterdir()) == []


def first_block(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(BLOCK_BYTES)


class StrictMachine(DiskMachine):
    """A machine that moves only onto a layer that says it lies on the present one."""

    async def pivot_disk(self, new_top: Path, format: str) -> None:
        if (await self.disk_path()).name.encode() not in first_block(new_top):
            raise BackendError(f"{new_top} does not lie on the present top")
        await super().pivot_disk(new_top, format)


async def test_a_layer_forgotten_by_a_crash_is_dropped_when_the_machine_minds_it(
    storage: StorageBackend, image: FrozenDisk, place: Path
) -> None:
    volume = await storage.clone(image, made(place / "vm"))
    async with disk_machine(volume) as machine:
        machine.__class__ = StrictMachine
        await storage.prepare_freeze(volume, made(place / "forgotten"))
        await machine.write(NEW_AT, NEW)
        frozen = await freeze_now(storage, storage.volume(volume.directory), place / "checkpoint", machine)
        assert frozen.files == volume.files
        await machine.write(NEW_AT, LATER)
        await machine.command("quit")
    checked(frozen)
    checked(storage.volume(volume.directory))
    assert sorted(path.name for path in frozen.directory.iterdir()) == sorted(frozen.files)
    assert disk_holds(frozen, NEW_AT, NEW)
    assert disk_holds(storage.volume(volume.directory), NEW_AT, LATER)


async def test_a_machine_that_cannot_move_goes_on_and_its_freeze_fails_in_its_words(
    storage: StorageBackend, image: FrozenDisk, place: Path
) -> None:
    volume = await storage.clone(image, made(place / "vm"))
    async with disk_machine(volume) as machine:
        plan = await storage.prepare_freeze(volume, made(place / "checkpoint"))
        assert plan.prepared is not None
        plan.prepared.write_bytes(b"no qcow2")
        with pytest.raises(BackendError, match="qcow2"):
            await storage.freeze(plan, as_machine(machine))
        await storage.abandon_freeze(plan, as_machine(machine))
        await machine.write(NEW_AT, NEW)
        assert storage.volume(volume.directory) == volume
        await machine.command("quit")
    assert disk_holds(volume, NEW_AT, NEW)


async def test_a_chain_with_a_gap_names_the_layer_it_lacks(
    storage: StorageBackend, image: FrozenDisk, place: Path
) -> None:
    volume = await storage.clone(image, made(place / "vm"))
    frozen = await grown(storage, volume, place, 2)
    (frozen.directory / frozen.files[1]).unlink()
    with pytest.raises(Damaged, match=r"lacks its layer 1, which disk-0002"):
        storage.volume(frozen.directory)


async def test_two_layers_of_one_depth_are_damage_and_not_a_choice(
    storage: StorageBackend, image: FrozenDisk, place: Path
) -> None:
    volume = await storage.clone(image, made(place / "vm"))
    (volume.directory / "disk-0001-ffffffff.qcow2").write_bytes(b"")
    with pytest.raises(Damaged, match="two layers 1"):
        storage.volume(volume.directory)


def link_often(path: Path, directory: Path) -> None:
    for number in range(70000):
        os.link(path, directory / str(number))


async def test_a_file_with_all_the_names_ext4_allows_is_copied(place: Path) -> None:
    image = make_image(place / "image")
    many = made(place / "many")
    with pytest.raises(OSError, match="Too many links"):
        link_often(image.path, many)
    storage = OverlayStorage()
    volume = await storage.clone(image, made(place / "vm"))
    assert own_bytes(volume.directory) >= 2 * BLOCK_BYTES
    assert disk_holds(volume, FAR_AT, FAR)
    shutil.rmtree(many)


def test_a_link_is_the_same_file(place: Path) -> None:
    (place / "one").write_text("content")
    assert link_or_copy(place / "one", place / "two") == 0
    assert (place / "two").samefile(place / "one")
