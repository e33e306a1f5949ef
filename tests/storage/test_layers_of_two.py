"""Disks of two files: what an empty one costs, what a clone copies, and copies of a file that is being written."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from noid_storage_layers import emptydisk
from noid_storage_layers.backend import BASE_NAME, LayersStorage
from noid_storage_layers.emptydisk import make_empty_disk

from noid import rawdisk
from noid.core.model.storage import FrozenDisk
from noid.errors import Damaged, DependencyDown, Incompatible, NoSpace
from noid.hostfs import sparse_copy
from noid.rawdisk import copy_ahead, finish_copy
from noid.testing.storage_conformance import FAR, FAR_AT, NEW_AT, disk_machine, freeze_now, make_image

MIB = 1 << 20
BLOCK = 4096
EMPTY_BYTES_MAX = 512 << 10
WRITTEN_BYTES = 3 * MIB


def made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def occupied(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("size_bytes", [MIB, 64 * MIB, 8 << 30])
def test_an_empty_disk_is_a_whole_ext4_of_its_size_and_takes_next_to_nothing(tmp_path: Path, size_bytes: int) -> None:
    disk = tmp_path / "top"
    make_empty_disk(disk, size_bytes)
    assert disk.stat().st_size == max(size_bytes, emptydisk.SIZE_BYTES_MIN)
    assert occupied(disk) <= EMPTY_BYTES_MAX * (1 + size_bytes // (4 << 30))
    subprocess.run(["e2fsck", "-fn", str(disk)], check=True, capture_output=True)
    told = subprocess.run(["dumpe2fs", "-h", str(disk)], check=True, capture_output=True, text=True).stdout
    (features,) = (line.partition(":")[2].split() for line in told.splitlines() if line.startswith("Filesystem feat"))
    assert not {"orphan_file", "metadata_csum_seed", "casefold", "verity"} & set(features), "too new for old kernels"
    assert "has_journal" in features


def test_an_empty_disk_without_mke2fs_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emptydisk, "MKE2FS", "no-such-program")
    with pytest.raises(DependencyDown, match="e2fsprogs"):
        make_empty_disk(tmp_path / "top", MIB)


async def test_a_clone_on_ext4_copies_what_was_written_and_nothing_of_the_image(
    filesystem: Callable[[str], Path],
) -> None:
    place = filesystem("ext4")
    storage = LayersStorage(shares_blocks=False)
    image = make_image(place / "image")
    volume = await storage.clone(image, made(place / "vm"))
    assert occupied(volume.path) <= EMPTY_BYTES_MAX
    async with disk_machine(volume) as machine:
        for block in range(WRITTEN_BYTES // 65536):
            await machine.write(NEW_AT + block * 65536, 0x55)
        frozen = await freeze_now(storage, volume, place / "checkpoint", machine)
    clone = await storage.clone(frozen, made(place / "clone"))
    assert clone.base_path is not None
    assert clone.base_path.samefile(image.path)
    assert clone.path.read_bytes() == frozen.path.read_bytes()
    assert WRITTEN_BYTES <= occupied(clone.path) <= WRITTEN_BYTES + EMPTY_BYTES_MAX


async def test_each_freeze_has_a_name_of_its_own_because_names_stand_for_contents(tmp_path: Path) -> None:
    storage = LayersStorage(shares_blocks=False)
    volume = await storage.clone(make_image(tmp_path / "image"), made(tmp_path / "vm"))
    one, two = [await freeze_now(storage, volume, tmp_path / name, None) for name in ("one", "two")]
    assert one.top != two.top
    assert one.files == (BASE_NAME, one.top)


async def test_a_checkpoint_moved_elsewhere_brings_its_base_along(
    tmp_path: Path, filesystem: Callable[[str], Path]
) -> None:
    storage, place = LayersStorage(shares_blocks=False), filesystem("ext4")
    volume = await storage.clone(make_image(place / "image"), made(place / "vm"))
    frozen = await freeze_now(storage, volume, place / "checkpoint", None)
    moved = made(tmp_path / "elsewhere")
    for name in frozen.files:
        sparse_copy(frozen.directory / name, moved / name)
    shutil.rmtree(place / "vm")
    elsewhere = FrozenDisk(directory=moved, format=frozen.format, top=frozen.top, files=frozen.files)
    clone = await storage.clone(elsewhere, made(place / "clone"))  # another filesystem: copied, not linked
    assert clone.base_path is not None
    with clone.base_path.open("rb") as base:
        base.seek(FAR_AT)
        assert base.read(BLOCK) == bytes([FAR]) * BLOCK


async def test_disks_of_other_storages_are_refused_by_format_and_half_a_disk_by_name(tmp_path: Path) -> None:
    storage = LayersStorage(shares_blocks=False)
    foreign = FrozenDisk(directory=tmp_path, format="qcow2", top="disk-0001-00000000.qcow2", files=())
    with pytest.raises(Incompatible, match=r"disk format: .* is qcow2"):
        await storage.clone(foreign, made(tmp_path / "vm"))
    volume = await storage.clone(make_image(tmp_path / "image"), made(tmp_path / "other"))
    (volume.directory / BASE_NAME).unlink()
    with pytest.raises(Damaged, match=rf"no {BASE_NAME} in {volume.directory}"):
        storage.volume(volume.directory)


async def test_a_full_disk_stops_the_freeze_before_the_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LayersStorage(shares_blocks=False)
    volume = await storage.clone(make_image(tmp_path / "image"), made(tmp_path / "vm"))

    def full(*_: object) -> int:
        raise OSError(28, os.strerror(28), str(tmp_path))

    monkeypatch.setattr(rawdisk, "sparse_copy", full)
    with pytest.raises(NoSpace, match="is full; free space"):
        await storage.prepare_freeze(volume, made(tmp_path / "checkpoint"))
    assert storage.volume(volume.directory) == volume


# --- copies of what is being written ----------------------------------------------------------------------------------


def blocks_of(path: Path, count: int, at: int = 0) -> bytes:
    with path.open("rb") as file:
        file.seek(at)
        return file.read(count * BLOCK)


def make_source(path: Path, size: int = 16 * MIB) -> None:
    with path.open("xb") as file:
        file.truncate(size)
        for at in range(0, size, 3 * MIB):
            file.seek(at)
            file.write(os.urandom(MIB))


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_copy_begun_under_writes_ends_as_what_was_written(filesystem: Callable[[str], Path], kind: str) -> None:
    place, dice = filesystem(kind), random.Random(7)  # noqa: S311  no secret
    source, ahead, target = place / "source", place / "ahead", place / "target"
    make_source(source)
    copied = threading.Event()

    def write() -> None:
        left = 100  # that nobody has copied
        with source.open("r+b", buffering=0) as file:
            while left:
                file.seek(dice.randrange(0, 16 * MIB - BLOCK))
                file.write(os.urandom(dice.randrange(1, BLOCK)))
                left -= copied.is_set()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        copy_ahead(source, ahead)
    finally:
        copied.set()
        writer.join()
    trio.run(trio.to_thread.run_sync, finish_copy, source, ahead, target)
    assert target.read_bytes() == source.read_bytes()
    assert not ahead.exists()


def test_what_the_guest_discards_after_it_was_copied_is_a_hole_again(filesystem: Callable[[str], Path]) -> None:
    place = filesystem("ext4")
    source, ahead, target = place / "source", place / "ahead", place / "target"
    make_source(source)
    copy_ahead(source, ahead)
    subprocess.run(["fallocate", "--punch-hole", "-o", "0", "-l", str(MIB), str(source)], check=True)
    trio.run(trio.to_thread.run_sync, finish_copy, source, ahead, target)
    assert target.read_bytes() == source.read_bytes()
    assert occupied(target) <= occupied(source) + 64 * BLOCK


def test_what_was_not_written_since_is_not_even_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, ahead, target = tmp_path / "source", tmp_path / "ahead", tmp_path / "target"
    make_source(source)
    os.utime(source, ns=(1, time.time_ns() - 10**9))
    copy_ahead(source, ahead)

    def read(*_: object) -> None:
        pytest.fail("it was read")

    monkeypatch.setattr(rawdisk, "_catch_up", read)
    trio.run(trio.to_thread.run_sync, finish_copy, source, ahead, target)
    assert target.read_bytes() == source.read_bytes()


def test_a_write_in_the_same_tick_as_the_copy_is_not_missed(tmp_path: Path) -> None:
    source, ahead, target = tmp_path / "source", tmp_path / "ahead", tmp_path / "target"
    make_source(source)
    copy_ahead(source, ahead)  # at once: the source's time is that of the present tick
    stamp = source.stat().st_mtime_ns
    with source.open("r+b") as file:
        file.write(b"late")
    os.utime(source, ns=(stamp, stamp))
    trio.run(trio.to_thread.run_sync, finish_copy, source, ahead, target)
    assert blocks_of(target, 1)[:4] == b"late"
