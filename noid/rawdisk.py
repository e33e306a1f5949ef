"""A disk as one raw file in its directory: what every storage backend without layers is made of.

A storage plugin gives it a name and says whether sharing blocks is a wish (`storage_copy`) or a promise
(`storage_btrfs`). Plain files only, no subvolumes: an ordinary user can delete them, and a hard link keeps one alive.

Where blocks cannot be shared, a freeze is a copy, and most of it is made before the pause: see `copy_ahead`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import trio

from noid.core.backends import FreezePlan, Machine, StorageFeatures
from noid.core.model.storage import DiskUsage, FrozenDisk, Volume
from noid.errors import BackendError, Damaged, Incompatible
from noid.hostextents import extent_bytes
from noid.hostfs import clone_file, next_data, os_errors, reflink, sparse_copy, write_out

DISK_NAME = "disk.raw"
AHEAD_NAME = "disk.ahead"
"""What a freeze begins with, in the directory it is made in."""

# Copies share one disk: more of them at once take longer together, and would occupy every worker thread.
_COPIES_AT_ONCE = 4

# What `link` says when it never will: another filesystem, too many names (65000 on ext4), a filesystem without hard
# links, or a file of another user (fs.protected_hardlinks).
_NO_LINK = frozenset({errno.EXDEV, errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP, errno.EACCES})

_COMPARED_BYTES = 1 << 20
_BLOCK_BYTES = 4096
_QUIET_NS = 50_000_000  # times of files are those of the last tick, of which there are a hundred a second or more
_FALLOC_PUNCH_HOLE = 0x1 | 0x2  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, linux/falloc.h


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
        """Write out what the guest has written so far, so that the reflink in the pause waits for little.

        Where a freeze will copy, it copies now: in the pause what has changed since is copied again.
        """
        source, shares = volume.path, self.features.freeze_is_constant

        def prepare() -> None:
            if shares:
                write_out(source)
            else:
                copy_ahead(source, into / AHEAD_NAME, trio.from_thread.check_cancelled)

        with os_errors(f"preparing to freeze the disk {source}"):
            await trio.to_thread.run_sync(prepare, limiter=None if shares else self._copies)
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
                await trio.to_thread.run_sync(finish_copy, source, plan.into / AHEAD_NAME, target)
        return FrozenDisk(directory=plan.into, format="raw", top=DISK_NAME, files=(DISK_NAME,))

    async def abandon_freeze(self, plan: FreezePlan, machine: Machine | None) -> None:
        """Remove what was copied ahead."""
        with os_errors(f"removing the beginning of a copy of {plan.volume.path}"):
            await trio.to_thread.run_sync(lambda: (plan.into / AHEAD_NAME).unlink(missing_ok=True))

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


# --- copies of a file that is being written ---------------------------------------------------------------------------


def copy_ahead(source: Path, ahead: Path, between: Callable[[], object] | None = None) -> None:
    """Make the new file *ahead* nearly a copy of *source*, which is written meanwhile. `finish_copy` makes it one.

    Its modification time is that of *source* where it is a copy already, unless *source* is written again.

    Raises:
        OSError: no *ahead* is left.
    """
    since = _unwritten_since(source)
    sparse_copy(source, ahead, between)
    try:
        if source.stat().st_mtime_ns != since:  # once more, which takes a part of the time: less is left for the pause
            since = _unwritten_since(source)
            _catch_up(source, ahead, between)
        write_out(ahead)
        os.utime(ahead, ns=(since, since))
    except BaseException:
        ahead.unlink(missing_ok=True)
        raise


def finish_copy(source: Path, ahead: Path, target: Path) -> None:
    """Give *ahead* the name *target* and the content of *source*, which nobody writes to meanwhile.

    Reads both, and writes what differs; where *source* was not written since, it does not even read. Where there is no
    *ahead*, it copies, the cheapest way there is.

    Raises:
        FileExistsError: *target* exists; it is untouched.
        OSError: there is no *target*, and may be an *ahead*.
    """
    if not ahead.exists():
        clone_file(source, target, trio.from_thread.check_cancelled)
        return
    if source.stat().st_mtime_ns != ahead.stat().st_mtime_ns:
        _catch_up(source, ahead, trio.from_thread.check_cancelled)
    os.link(ahead, target)
    ahead.unlink()


def link_or_copy(source: Path, target: Path) -> int:
    """Give *source* the second name *target*; copy it where that is impossible. Returns the bytes copied.

    Runs in a thread of trio's. *source* must be immutable.
    """
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        return clone_file(source, target, trio.from_thread.check_cancelled)
    return 0


def _unwritten_since(path: Path) -> int:
    """Return the modification time of *path*, which any later write changes; 0 if one could get the same."""
    written_ns = path.stat().st_mtime_ns
    return written_ns if 0 < written_ns < time.time_ns() - _QUIET_NS else 0


def _catch_up(source: Path, target: Path, between: Callable[[], object] | None) -> None:
    """Write to *target* what differs in *source*, of the same size. Holes in both cost nothing, and stay."""
    source_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        target_fd = os.open(target, os.O_RDWR | os.O_CLOEXEC)
        try:
            size = os.fstat(source_fd).st_size
            ours, theirs = memoryview(bytearray(_COMPARED_BYTES)), memoryview(bytearray(_COMPARED_BYTES))
            offset = 0
            while (start := _next_in_either(source_fd, target_fd, offset, size)) is not None:
                if between is not None:
                    between()
                offset = min(start + _COMPARED_BYTES, size)
                mine, other = ours[: offset - start], theirs[: offset - start]
                if os.preadv(source_fd, [mine], start) != len(mine):
                    raise OSError(errno.EIO, "the disk has become shorter", str(source))
                if os.preadv(target_fd, [other], start) != len(other) or mine.obj != other.obj:
                    _rewrite(target_fd, start, mine, other)
        finally:
            os.close(target_fd)
    finally:
        os.close(source_fd)


def _next_in_either(one: int, other: int, offset: int, size: int) -> int | None:
    """Return where one of two files has data at or after *offset*, at the beginning of a block."""
    found = [extent[0] for fd in (one, other) if (extent := next_data(fd, offset, size)) is not None]
    return min(found) // _BLOCK_BYTES * _BLOCK_BYTES if found else None


def _rewrite(target_fd: int, start: int, new: memoryview, old: memoryview) -> None:
    """Write the blocks of *new* that differ from *old* at *start*; blocks of zeros become holes."""
    zeros = bytes(_BLOCK_BYTES)
    libc = ctypes.CDLL(None, use_errno=True)
    for at in range(0, len(new), _BLOCK_BYTES):
        block = bytes(new[at : at + _BLOCK_BYTES])
        if block == old[at : at + _BLOCK_BYTES]:
            continue
        if block == zeros:
            length = ctypes.c_longlong(_BLOCK_BYTES)
            if libc.fallocate(target_fd, _FALLOC_PUNCH_HOLE, ctypes.c_longlong(start + at), length) == 0:
                continue
        written = os.pwrite(target_fd, block, start + at)
        if written != len(block):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
