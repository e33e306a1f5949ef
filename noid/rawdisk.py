"""A disk as one raw file in its directory: what every storage backend without layers is made of.

A storage plugin gives it a name and says whether sharing blocks is a wish (`storage_copy`) or a promise
(`storage_btrfs`). Plain files only, no subvolumes: an ordinary user can delete them, and a hard link keeps one alive.
"""

from __future__ import annotations

from pathlib import Path

import trio

from noid.core.backends import FreezePlan, Machine, StorageFeatures
from noid.core.model.storage import DiskUsage, FrozenDisk, Volume
from noid.errors import BackendError, Damaged, Incompatible
from noid.hostfs import clone_file, extent_bytes, os_errors, reflink, write_out

DISK_NAME = "disk.raw"

# Copies share one disk: more of them at once take longer together, and would occupy every worker thread.
_COPIES_AT_ONCE = 4


class RawStorage:
    """Fulfils `noid.core.backends.StorageBackend` with raw files.

    *shares_blocks* says that the data directory's filesystem has reflinks, found out by doing. With *strict*, a freeze
    that cannot share blocks fails instead of copying while the guest stands still.
    """

    def __init__(self, name: str, *, shares_blocks: bool, strict: bool) -> None:
        self.name = name
        self.features = StorageFeatures(format="raw", freeze_is_constant=shares_blocks, needs_pivot=False)
        self._strict = strict
        self._copies = trio.CapacityLimiter(_COPIES_AT_ONCE)

    async def clone(self, source: FrozenDisk, into: Path) -> Volume:
        """Make a writable copy of *source* in *into*, sharing blocks where the two filesystems allow.

        Raises:
            Incompatible: *source* is not raw: another storage backend made it.
            NoSpace: nothing was made.
        """
        if source.format != "raw":
            raise Incompatible(
                f"disk format: {source.path} is {source.format}, but storage {self.name!r} takes raw. "
                'Set [backends] storage = "overlay" in server.toml to use it.'
            )
        with os_errors(f"cloning the disk {source.path}"):
            await trio.to_thread.run_sync(
                clone_file, source.path, into / DISK_NAME, trio.from_thread.check_cancelled, limiter=self._copies
            )
        return _volume(into)

    def volume(self, directory: Path) -> Volume:
        """Return the volume that lies in *directory*.

        Raises:
            Damaged: there is none.
        """
        if not (directory / DISK_NAME).is_file():
            raise Damaged(
                f"there is no {DISK_NAME} in {directory}: it was removed, or made by another storage backend than "
                f"{self.name!r}. See [backends] storage in server.toml."
            )
        return _volume(directory)

    async def prepare_freeze(self, volume: Volume, into: Path) -> FreezePlan:
        """Write out what the guest has written so far, so that the reflink in the pause waits for little."""
        with os_errors(f"writing out the disk {volume.path}"):
            await trio.to_thread.run_sync(write_out, volume.path)
        return FreezePlan(volume=volume, into=into)

    async def freeze(self, plan: FreezePlan, machine: Machine | None) -> FrozenDisk:
        """Copy the volume into ``plan.into``; nothing is left there after an error.

        Raises:
            NoSpace: the disk is full.
            BackendError: the blocks cannot be shared although the storage promises it, or the system's own words.
        """
        source, target = plan.volume.path, plan.into / DISK_NAME
        with os_errors(f"freezing the disk {source}"):
            if self._strict:
                if not await trio.to_thread.run_sync(reflink, source, target):
                    raise BackendError(
                        f"freezing the disk {source} failed: its blocks cannot be shared with {target} (another "
                        "filesystem, or one of the two has copy-on-write switched off by chattr +C). The VM goes on. "
                        'Clear the attribute, or set [backends] storage = "copy" in server.toml.'
                    )
            else:
                await trio.to_thread.run_sync(clone_file, source, target, trio.from_thread.check_cancelled)
        return FrozenDisk(directory=plan.into, format="raw", top=DISK_NAME, files=(DISK_NAME,))

    async def abandon_freeze(self, plan: FreezePlan, machine: Machine | None) -> None:
        """Do nothing: preparing made nothing."""
        await trio.lowlevel.checkpoint()

    async def usage(self, thing: Volume | FrozenDisk) -> DiskUsage:
        """Return what the file occupies, and which part of that other files share by reflink."""
        with os_errors(f"measuring the disk {thing.path}"):
            unique_bytes, shared_bytes = await trio.to_thread.run_sync(extent_bytes, thing.path)
        return DiskUsage(unique_bytes=unique_bytes, shared_bytes=shared_bytes)

    async def delete(self, thing: Volume | FrozenDisk) -> None:
        """Remove the file. The directory stays: it is the caller's."""

        def remove() -> None:
            for name in thing.files:
                (thing.directory / name).unlink(missing_ok=True)

        with os_errors(f"deleting the disk {thing.path}"):
            await trio.to_thread.run_sync(remove)


def _volume(directory: Path) -> Volume:
    return Volume(directory=directory, format="raw", top=DISK_NAME, files=(DISK_NAME,))
