"""Disks of two raw files: an image's root file system, shared and only read, and one for what each VM writes.

    image             VM                checkpoint            clone
    rootfs.ext4 ----- base.raw -------- base.raw ------------ base.raw      one inode, which nobody writes
                      top.raw           top-91d3f00c.raw      top.raw       copies of what is written, with holes

The guest sees two disks and puts them together with overlayfs, before anything of its own runs (``guest/layers.c`` of
`noid_exec_vsock`). So a VMM needs to know nothing of layers, and a clone copies only what was ever written: kilobytes
of a fresh VM, where a whole copy has a gigabyte.

A freeze has to copy the top, too, where the filesystem shares no blocks. Nearly all of that happens before the pause
(`noid.rawdisk.copy_ahead`). What is left is reading both and writing what differs: a gigabyte that was written costs a
pause of half a second when it is in memory, and nothing when none of it has changed for a moment.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

import trio

from noid.core.backends import FreezePlan, Machine, StorageFeatures
from noid.core.model.storage import LAYERS, DiskUsage, FrozenDisk, Volume
from noid.errors import Damaged, Incompatible
from noid.hostextents import extent_bytes
from noid.hostfs import clone_file, os_errors, write_out
from noid.rawdisk import AHEAD_NAME, copy_ahead, finish_copy, link_or_copy
from noid_storage_layers.emptydisk import make_empty_disk

NAME = "layers"
BASE_NAME = "base.raw"
TOP_NAME = "top.raw"

# Copies share one disk: more of them at once take longer together, and would occupy every worker thread.
_COPIES_AT_ONCE = 4


class LayersStorage:
    """Fulfils `noid.core.backends.StorageBackend` with a base and a top.

    *shares_blocks* says that the data directory's filesystem has reflinks: then nothing is copied. *make_top* makes the
    empty file system a VM of an image begins with.
    """

    def __init__(self, *, shares_blocks: bool, make_top: Callable[[Path, int], None] = make_empty_disk) -> None:
        self.name = NAME
        self.features = StorageFeatures(
            format=LAYERS, freeze_is_constant=shares_blocks, needs_pivot=False, needs_agent=True
        )
        self._make_top = make_top
        self._copies = trio.CapacityLimiter(_COPIES_AT_ONCE)

    async def clone(self, source: FrozenDisk, into: Path) -> Volume:
        """Link *source*'s base into *into*, and copy its top. A raw *source* becomes the base, under an empty top.

        The top of an image is as large as the image. The base is copied where it cannot be linked: on another
        filesystem, or when it has all the names a file may have.

        Raises:
            Incompatible: *source* is neither raw nor of layers: another storage backend made it.
            NoSpace: *into* may hold a part.
            DependencyDown: an empty top is wanted and ``mke2fs`` is missing.
        """
        base = source.path if source.format == "raw" else source.base_path
        if base is None:
            raise Incompatible(
                f"disk format: {source.path} is {source.format}, but storage {NAME!r} takes raw and {LAYERS}. Set "
                '[backends] storage = "auto" in server.toml, or the storage that made it.'
            )

        def make() -> None:
            link_or_copy(base, into / BASE_NAME)
            if source.format == "raw":
                self._make_top(into / TOP_NAME, base.stat().st_size)
            else:
                clone_file(source.path, into / TOP_NAME, trio.from_thread.check_cancelled)

        with os_errors(f"cloning the disk {source.path}"):
            await trio.to_thread.run_sync(make, limiter=self._copies)
        return _volume(into)

    def volume(self, directory: Path) -> Volume:
        """Return the volume that lies in *directory*.

        Raises:
            Damaged: there is none, or one of its two files is missing.
        """
        for name in (BASE_NAME, TOP_NAME):
            if not (directory / name).is_file():
                raise Damaged(
                    f"there is no {name} in {directory}: it was removed, or the disk there was made by another storage "
                    f"backend than {NAME!r}. See [backends] storage in server.toml."
                )
        return _volume(directory)

    async def prepare_freeze(self, volume: Volume, into: Path) -> FreezePlan:
        """Link the base into *into*, and copy the top as it is now: in the pause only what changes is copied again.

        Raises:
            NoSpace: the volume is untouched; *into* may hold a part.
        """
        shares = self.features.freeze_is_constant

        def prepare() -> None:
            link_or_copy(volume.directory / BASE_NAME, into / BASE_NAME)
            if shares:
                write_out(volume.path)
            else:
                copy_ahead(volume.path, into / AHEAD_NAME, trio.from_thread.check_cancelled)

        with os_errors(f"preparing to freeze the disk {volume.path}"):
            await trio.to_thread.run_sync(prepare, limiter=None if shares else self._copies)
        return FreezePlan(volume=volume, into=into)

    async def freeze(self, plan: FreezePlan, machine: Machine | None) -> FrozenDisk:
        """Make the copy of the top exact. Its name is new: who knows it from another checkpoint knows another file.

        Raises:
            NoSpace: the disk is full.
        """
        source, top = plan.volume.path, f"top-{secrets.token_hex(4)}.raw"
        with os_errors(f"freezing the disk {source}"):
            await trio.to_thread.run_sync(finish_copy, source, plan.into / AHEAD_NAME, plan.into / top)
        return FrozenDisk(directory=plan.into, format=LAYERS, top=top, files=(BASE_NAME, top))

    async def abandon_freeze(self, plan: FreezePlan, machine: Machine | None) -> None:
        """Remove what was made for it in ``plan.into``. The volume has nothing of it."""

        def remove() -> None:
            for name in (AHEAD_NAME, BASE_NAME):
                (plan.into / name).unlink(missing_ok=True)

        if plan.into.is_dir() and not any(plan.into.glob("top-*.raw")):  # a freeze that has happened is none any more
            with os_errors(f"removing what was prepared in {plan.into}"):
                await trio.to_thread.run_sync(remove)

    async def usage(self, thing: Volume | FrozenDisk) -> DiskUsage:
        """Return what the files occupy: the base is shared while another directory has a name for it."""

        def measure() -> DiskUsage:
            unique_bytes, shared_bytes = extent_bytes(thing.path)
            base = (thing.directory / BASE_NAME).stat()
            if base.st_nlink > 1:
                shared_bytes += base.st_blocks * 512
            else:
                unique_bytes += base.st_blocks * 512
            return DiskUsage(unique_bytes=unique_bytes, shared_bytes=shared_bytes)

        with os_errors(f"measuring the disk {thing.path}"):
            return await trio.to_thread.run_sync(measure)

    async def delete(self, thing: Volume | FrozenDisk) -> None:
        """Remove the files. What others have a name for stays."""

        def remove() -> None:
            for name in thing.files:
                (thing.directory / name).unlink(missing_ok=True)

        with os_errors(f"deleting the disk {thing.path}"):
            await trio.to_thread.run_sync(remove)


def _volume(directory: Path) -> Volume:
    return Volume(directory=directory, format=LAYERS, top=TOP_NAME, files=(BASE_NAME, TOP_NAME))
