"""Which storage ``auto`` chooses, what each says about the filesystem it is on, and what it refuses."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import noid_storage_btrfs
import noid_storage_copy
import noid_storage_layers
import noid_storage_overlay
import pluggy
import pytest

from noid import hookspecs
from noid.core.backends import AgentContext
from noid.core.model.storage import FrozenDisk
from noid.errors import BackendError, ConfigError, DependencyDown, Incompatible, NoSpace
from noid.testing.loop_filesystem import loop_filesystem
from noid.testing.storage_conformance import (
    NEW,
    NEW_AT,
    OLD,
    OLD_AT,
    as_machine,
    disk_holds,
    disk_machine,
    freeze_now,
    make_image,
)

PLUGINS = (noid_storage_btrfs, noid_storage_copy, noid_storage_layers, noid_storage_overlay)
QCOW2 = frozenset({"raw", "qcow2", "layers"})
LAYERS = frozenset({"raw", "layers"})
RAW = frozenset({"raw"})
Filesystem = Callable[[str], Path]


def context(place: Path) -> AgentContext:
    return AgentContext(data_dir=place, run_dir=place, database=place / "noid.db")


def chosen(place: Path, formats: frozenset[str], plugins: tuple[ModuleType, ...] = PLUGINS) -> str | None:
    manager = pluggy.PluginManager("noid")
    manager.add_hookspecs(hookspecs)
    for plugin in plugins:
        manager.register(plugin)
    name: str | None = manager.hook.probe_storage(data_dir=place, vmm_disk_formats=formats)
    return name


def made(directory: Path) -> Path:
    directory.mkdir()
    return directory


@pytest.mark.parametrize(
    ("kind", "formats", "name"),
    [
        ("btrfs", QCOW2, "btrfs"),
        ("btrfs", RAW, "btrfs"),
        ("xfs", QCOW2, "btrfs"),
        ("ext4", QCOW2, "overlay"),
        ("ext4", LAYERS, "layers"),
        ("btrfs", LAYERS, "btrfs"),
        ("ext4", RAW, "copy"),
    ],
)
def test_auto_takes_the_best_for_filesystem_and_vmm_in_whatever_order_plugins_come(
    filesystem: Filesystem, kind: str, formats: frozenset[str], name: str
) -> None:
    place = filesystem(kind)
    for order in itertools.permutations(PLUGINS):
        assert chosen(place, formats, order) == name
        assert chosen(place / "not" / "made" / "yet", formats, order) == name
    assert list(place.iterdir()) == []


def test_auto_without_qemu_img_is_copy(filesystem: Filesystem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert chosen(filesystem("ext4"), QCOW2) == "copy"


async def test_layers_without_mke2fs_say_which_package_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noid_storage_layers.emptydisk, "MKE2FS", "no-such-program")
    assert chosen(tmp_path, LAYERS) == "copy"
    with pytest.raises(DependencyDown, match="e2fsprogs"):
        async with noid_storage_layers.open_storage(noid_storage_layers.LayersConfig(), context(tmp_path)):
            pytest.fail("it opened")


async def test_overlay_without_qemu_img_says_which_package_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(DependencyDown, match="qemu-utils"):
        async with noid_storage_overlay.open_storage(noid_storage_overlay.OverlayConfig(), context(tmp_path)):
            pytest.fail("it opened")


async def test_btrfs_where_blocks_cannot_be_shared_is_refused_and_names_auto(filesystem: Filesystem) -> None:
    place = filesystem("ext4")
    with pytest.raises(ConfigError, match=r'lies on ext4.* Set storage = "auto"'):
        async with noid_storage_btrfs.open_storage(noid_storage_btrfs.BtrfsConfig(), context(place)):
            pytest.fail("it opened")


@pytest.mark.parametrize(("kind", "constant"), [("ext4", False), ("btrfs", True), ("xfs", True)])
async def test_copy_says_whether_it_will_share_blocks_here(filesystem: Filesystem, kind: str, constant: bool) -> None:
    async with noid_storage_copy.open_storage(noid_storage_copy.CopyConfig(), context(filesystem(kind))) as storage:
        assert storage.features.freeze_is_constant is constant


async def test_raw_storage_refuses_layers_and_names_the_storage_that_takes_them(tmp_path: Path) -> None:
    layered = FrozenDisk(directory=tmp_path, format="qcow2", top="disk-0001-00000000.qcow2", files=())
    async with noid_storage_copy.open_storage(noid_storage_copy.CopyConfig(), context(tmp_path)) as storage:
        with pytest.raises(Incompatible, match=r'disk format: .* "overlay"'):
            await storage.clone(layered, made(tmp_path / "vm"))


async def test_btrfs_rather_fails_than_copy_while_the_guest_stands_still(filesystem: Filesystem) -> None:
    place = filesystem("btrfs")
    async with noid_storage_btrfs.open_storage(noid_storage_btrfs.BtrfsConfig(), context(place)) as storage:
        volume = await storage.clone(make_image(place / "image"), made(place / "vm"))
        into = without_shared_blocks(place / "checkpoint")
        plan = await storage.prepare_freeze(volume, into)
        with pytest.raises(BackendError, match="cannot be shared"):
            await storage.freeze(plan, None)
        assert list(into.iterdir()) == []
        assert disk_holds(volume, OLD_AT, OLD)


@pytest.mark.parametrize("plugin", [noid_storage_copy, noid_storage_overlay])
async def test_a_full_disk_stops_clone_and_freeze_and_harms_nobody(plugin: ModuleType, tmp_path: Path) -> None:
    with loop_filesystem("ext4", tmp_path, size_mib=32) as place:
        spec = plugin.storage_backend()
        async with spec.open(spec.config(), context(place)) as storage:
            image = make_image(place / "image")
            volume = await storage.clone(image, made(place / "vm"))
            async with disk_machine(volume) as machine:
                await machine.write(NEW_AT, NEW)
                clone, into = made(place / "clone"), made(place / "checkpoint")
                fill(place / "filler")
                with pytest.raises(NoSpace, match="is full; free space"):
                    await storage.clone(image, clone)
                with pytest.raises(NoSpace, match="is full; free space"):
                    await storage.freeze(await storage.prepare_freeze(volume, into), as_machine(machine))
                assert storage.volume(volume.directory) == volume
                (place / "filler").unlink()
                frozen = await freeze_now(storage, volume, place / "again", machine)
            for disk in (frozen, storage.volume(volume.directory)):
                assert disk_holds(disk, NEW_AT, NEW)
                assert disk_holds(disk, OLD_AT, OLD)


def fill(path: Path) -> None:
    """Take every block that is left."""
    with path.open("xb") as file:
        size_bytes = 1 << 30
        while size_bytes >= 4096:
            try:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), size_bytes)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                size_bytes //= 2


def without_shared_blocks(directory: Path) -> Path:
    """Make a directory whose files cannot share blocks with others, as users do for databases on btrfs."""
    directory.mkdir()
    subprocess.run(["chattr", "+C", str(directory)], check=True)
    return directory
